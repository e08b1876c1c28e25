"""Items and interactions from Parquet, CSV, TSV and JSONL files, pandas DataFrames and Arrow tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from semid.arrow import decoded, digest, is_fixed_vector, is_string, is_text, to_lists
from semid.artifacts import fetched, refresh
from semid.data.faults import Faults, raise_faults
from semid.data.tables import log_unused, read_mapped, table_digest
from semid.data.validation import INTERACTION_READERS, checked_tables
from semid.errors import SemidError


class ImportedTables(NamedTuple):
    """Checked items and interactions, their `source` (checksums and column names), and the interactions' file name."""

    items: pa.Table
    interactions: pa.Table
    source: dict
    interaction_file: str


def read_import(
    items: str | Path | pa.Table | Any,
    interactions: str | Path | pa.Table | Any,
    *,
    vectors: Mapping[str, str | Path],
    columns: Mapping[str, str],
) -> ImportedTables:
    """Read and check the tables of `Dataset.from_tables`. Raises SemidError that lists all faults, one per line."""
    tables = {"items": items, "interactions": interactions}
    files = {key: fetched(table) for key, table in tables.items() if isinstance(table, (str, Path))}
    vector_files = {column: fetched(path) for column, path in vectors.items()}
    faults = Faults(str(files.get("items", "items")))
    folder = files["items"].parent if "items" in files else Path()
    needed = {"interactions": {*INTERACTION_READERS, *columns.values()}}
    items, interactions = read_mapped(tables | files, columns, needed=needed).values()
    has_paths = "image_path" in items.column_names
    items = add_vector_files(_with_images(items, folder, faults), vector_files, faults)
    interaction_file = str(files.get("interactions", "interactions"))
    names = (items.column_names, interactions.column_names)
    try:
        items, interactions = checked_tables(items, interactions, faults.file, interaction_file)
    except SemidError as error:
        raise SemidError("\n".join([*faults.lines, str(error)])) from None
    raise_faults(faults.lines)
    files |= {f"vectors.{column}": path for column, path in vector_files.items()}
    checksums = {key: table_digest(path) for key, path in files.items()}
    if has_paths and "image" in items.column_names:
        checksums["image"] = digest(items.select(["image"]))
    others = [name for name in names[1] if name not in interactions.column_names]
    log_unused([*_unused(names[0], items.schema), *others])
    mapped = {"columns": dict(columns)} if columns else {}
    return ImportedTables(items, interactions, {"type": "tables", "sha256": checksums, **mapped}, interaction_file)


def _unused(items: Sequence[str], checked: pa.Schema) -> list[str]:
    """Columns of items that nothing reads, being neither text nor vectors."""
    read = {field.name for field in checked if is_text(field.type) or is_fixed_vector(field.type)}
    return [name for name in items if name not in read | {"image"}]


def add_vector_files(items: pa.Table, files: Mapping[str, str | Path], faults: Faults) -> pa.Table:
    """`items` with a vector column from each `.npy` file, replacing one of the same name; bad files go to `faults`."""
    for column, path in files.items():
        values = _load_vectors(path, column, items.num_rows, faults)
        items = items.drop_columns([column]) if column in items.column_names else items
        items = items if values is None else items.append_column(column, values)
    return items


def _load_vectors(path: str | Path, column: str, num_items: int, faults: Faults) -> pa.FixedSizeListArray | None:
    """The vectors of a `.npy` file with one row per item, float16 or else float32; None, and faults, if it is not."""
    own = Faults(str(path), faults.lines)
    try:
        vectors = np.load(path, allow_pickle=False, mmap_mode="r")  # a false header may claim more than the memory
    except Exception as error:  # NumPy parses the header as Python source, which can raise nearly anything
        own.table(f"not readable as .npy ({error}); check the file")
        return None
    is_matrix = isinstance(vectors, np.ndarray) and vectors.ndim == 2 and vectors.dtype.kind == "f"
    if not is_matrix or vectors.shape[0] != num_items or not vectors.shape[1]:
        found = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, np.ndarray) else "an archive"
        own.table(f"expected floats [{num_items}, dim], a row for each item, got {found}")
        return None
    with np.errstate(over="ignore"):  # numbers too large for float32 become infinite and are reported below
        vectors = vectors.astype(np.float16 if vectors.dtype == np.float16 else np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    own.rows(column, ~finite, "vector holds a NaN or infinite number; fix it or drop the item")
    return to_lists(vectors) if finite.all() else None


def _with_images(items: pa.Table, folder: Path, faults: Faults) -> pa.Table:
    if "image_path" not in items.column_names:
        return items
    names = decoded(items["image_path"])
    if not (is_string(names.type) or pa.types.is_null(names.type)):
        faults.column("image_path", f"expected strings, got {names.type}; convert it")
        return items
    paths = [folder / name if name else None for name in names.to_pylist()]
    for path in filter(None, paths):
        refresh(path)
    # os.path.isfile, unlike Path.is_file, is False for impossible names instead of raising.
    absent = np.array([path is not None and not os.path.isfile(path) for path in paths], bool)
    faults.rows("image_path", absent, "no such file: {}; correct the path or leave it empty", names)
    items = items.drop_columns("image_path")
    if not any(paths):  # keep a column `image` as it is
        return items
    images = [None if path is None or gone else path.read_bytes() for path, gone in zip(paths, absent, strict=True)]
    items = items.drop_columns("image") if "image" in items.column_names else items
    return items.append_column("image", pa.array(images, pa.binary()))
