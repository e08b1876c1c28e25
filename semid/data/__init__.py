"""Datasets: items and interactions, histories, splits, content vectors, importing and validation."""

from semid.data.builders import (
    read_amazon_reviews,
    read_movielens,
)
from semid.data.dataset import (
    Dataset,
)
from semid.data.features import (
    Standardizer,
    content_blocks,
)
from semid.data.histories import (
    Histories,
)
from semid.data.images import (
    load_image,
)
from semid.data.importing import (
    SUFFIXES,
    add_vector_files,
    as_table,
    read_table,
)
from semid.data.splits import (
    Examples,
    GlobalTime,
    HeldOutItems,
    LeaveOneOut,
    SplitRule,
    Splits,
)
from semid.data.validation import (
    Faults,
    is_string,
    raise_faults,
)
from semid.data.vector_files import (
    Block,
    VectorFile,
)

__all__ = [
    "SUFFIXES",
    "Block",
    "Dataset",
    "Examples",
    "Faults",
    "GlobalTime",
    "HeldOutItems",
    "Histories",
    "LeaveOneOut",
    "SplitRule",
    "Splits",
    "Standardizer",
    "VectorFile",
    "add_vector_files",
    "as_table",
    "content_blocks",
    "is_string",
    "load_image",
    "raise_faults",
    "read_amazon_reviews",
    "read_movielens",
    "read_table",
]
