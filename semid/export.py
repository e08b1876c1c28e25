"""The catalogue in others' formats, and others' codes as a catalogue."""

from __future__ import annotations

import enum
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from semid import artifacts
from semid.catalog import SemanticCatalog, level_name
from semid.errors import SemidError

_TOKEN = re.compile(r"<([a-z]+)_([0-9]{1,7})>")


class Format(enum.Enum):
    """What `semid export` writes."""

    PARQUET = "parquet"  # item_id and codes as a fixed-size list of int32, level sizes in the metadata
    JSON = "json"  # {"item id": ["<a_12>", "<b_7>", ...]}: the index.json of LC-Rec and MiniOneRec
    HF_TOKENS = "hf-tokens"  # {"added_tokens": [...], "items": {"item id": "<a_12><b_7>..."}} for tokenizer.add_tokens


def export(catalog: SemanticCatalog, format: Format, out: Path) -> None:
    """Write `catalog` to the file `out`, to a temporary name first. Raises SemidError if `out` is a folder."""
    if out.is_dir():
        raise SemidError(f"{out}: is a folder; name the file to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    if format is Format.PARQUET:
        temporary = out.with_name(f".{out.name}.writing-{os.getpid()}")
        catalog.write(temporary)
        os.replace(temporary, out)
        return
    tokens = dict(zip(catalog.item_ids.to_pylist(), catalog.tokens_of(np.arange(len(catalog))), strict=True))
    if format is Format.JSON:
        artifacts.write_json(out, tokens)
        return
    added = [f"<{level_name(level)}_{code}>" for level, size in enumerate(catalog.level_sizes) for code in range(size)]
    artifacts.write_json(out, {"added_tokens": added, "items": {key: "".join(row) for key, row in tokens.items()}})


def read_tokens(path: Path, *, level_sizes: Sequence[int] | None = None, tie_break: bool = False) -> SemanticCatalog:
    """A catalogue from an `index.json` of LC-Rec or MiniOneRec, or from this module's `hf-tokens` form.

    Without `level_sizes` a level is as large as its largest code (plus one) says. Raises SemidError naming the file,
    the item and what is wrong with its tokens.
    """
    data = artifacts.read_json(path)
    items = data.get("items", data) if isinstance(data, dict) else data
    if not isinstance(items, dict) or not items:
        raise SemidError(f"{path}: expected an object from item ids to code tokens, got {json.dumps(data)[:40]}")
    codes = [_codes(path, item, tokens) for item, tokens in items.items()]
    levels = len(codes[0])
    for item, row in zip(items, codes, strict=True):
        if len(row) != levels:
            raise SemidError(f"{path}: item {item!r} has {len(row)} codes where the first item has {levels}")
    array = np.array(codes, np.int32)
    sizes = tuple(level_sizes) if level_sizes is not None else tuple((array.max(axis=0) + 1).tolist())
    return SemanticCatalog(pa.array(list(items), pa.string()), array, sizes, tie_break)


def _codes(path: Path, item: str, tokens: Any) -> list[int]:
    text = "".join(map(str, tokens)) if isinstance(tokens, list) else str(tokens)
    found = _TOKEN.findall(text)
    if not found or "".join(f"<{name}_{code}>" for name, code in found) != text:
        raise SemidError(f"{path}: item {item!r}: {text!r} is no sequence of code tokens such as <a_12><b_7>")
    for level, (name, _) in enumerate(found):
        if name != level_name(level):
            raise SemidError(
                f"{path}: item {item!r}: level {level} should be <{level_name(level)}_...>, got <{name}_...>"
            )
    return [int(code) for _, code in found]
