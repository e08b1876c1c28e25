"""Datasets: items and interactions, histories, splits, content vectors, importing and validation.

The readers of public datasets are loaded on first use: their builders need TFDS, which is slow to import.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from semid.data.content import (
    ContentEncoder,
    StoredEncoder,
    check_column,
    is_encoder_file,
    joined_texts,
    read_encoders,
)
from semid.data.dataset import Dataset
from semid.data.faults import Faults, raise_faults
from semid.data.features import Standardizer, content_blocks
from semid.data.histories import Histories, Repeats, seconds_since
from semid.data.huggingface import read_huggingface
from semid.data.ids import Allowed, Id, as_ids, as_masks, parse_ids, read_boosts, read_id_file, read_ids
from semid.data.images import load_image
from semid.data.importing import add_vector_files
from semid.data.splits import Examples, GlobalTime, HeldOutItems, LeaveOneOut, SplitRule, Splits
from semid.data.tables import SUFFIXES, as_mapped_table, as_table, log_unused, read_table, read_text, table_kind
from semid.data.tags import Tags, tag_lists, usual_tag_column, usual_tags
from semid.data.ties import ShuffledTies, SourceOrder, TieRule
from semid.data.vector_files import Block, VectorFile, output_name

__all__ = [
    "SUFFIXES",
    "Allowed",
    "Block",
    "ContentEncoder",
    "Dataset",
    "Examples",
    "Faults",
    "GlobalTime",
    "HeldOutItems",
    "Histories",
    "Id",
    "LeaveOneOut",
    "Repeats",
    "ShuffledTies",
    "SourceOrder",
    "SplitRule",
    "Splits",
    "Standardizer",
    "StoredEncoder",
    "Tags",
    "TieRule",
    "VectorFile",
    "add_vector_files",
    "as_ids",
    "as_mapped_table",
    "as_masks",
    "as_table",
    "check_column",
    "content_blocks",
    "is_encoder_file",
    "joined_texts",
    "load_image",
    "log_unused",
    "output_name",
    "parse_ids",
    "raise_faults",
    "read_amazon_reviews",
    "read_boosts",
    "read_encoders",
    "read_huggingface",
    "read_id_file",
    "read_ids",
    "read_movielens",
    "read_table",
    "read_tencentgr",
    "read_text",
    "seconds_since",
    "table_kind",
    "tag_lists",
    "usual_tag_column",
    "usual_tags",
]

if _TYPE_CHECKING:
    from semid.data.builders import read_amazon_reviews as read_amazon_reviews
    from semid.data.builders import read_movielens as read_movielens
    from semid.data.builders import read_tencentgr as read_tencentgr


def __getattr__(name: str) -> _Any:
    if name not in ("read_amazon_reviews", "read_movielens", "read_tencentgr"):
        raise AttributeError(f"module 'semid.data' has no attribute {name!r}")
    return getattr(_importlib.import_module("semid.data.builders"), name)
