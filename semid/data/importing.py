"""Items and interactions from Parquet, CSV, TSV and JSONL files, pandas DataFrames and Arrow tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from jaxtyping import Float

from semid.arrow import to_lists
from semid.artifacts import sha256
from semid.data.validation import Faults, checked_tables, is_string, raise_faults
from semid.errors import SemidError

SUFFIXES = {"parquet": (".parquet", ".pq"), "csv": (".csv", ".tsv"), "jsonl": (".jsonl", ".ndjson")}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_TEXTS = ("title", "name", "text", "brand", "description", "category")
_STRINGS = ("item_id", "user_id", "event", "image_path", *_TEXTS)  # never numbers: "007" keeps its zeros


class ImportedTables(NamedTuple):
    """Checked items and interactions, and the checksums of the files that they are from."""

    items: pa.Table
    interactions: pa.Table
    source: dict


def read_import(
    items: str | Path | pa.Table | Any,
    interactions: str | Path | pa.Table | Any,
    *,
    vectors: Mapping[str, str | Path],
) -> ImportedTables:
    """Read and check the tables of `Dataset.from_tables`. Raises SemidError that lists all faults, a line each."""
    tables = {"items": items, "interactions": interactions}
    files = {key: Path(table) for key, table in tables.items() if isinstance(table, (str, Path))}
    vector_files = {f"vectors.{column}": Path(path) for column, path in vectors.items()}
    faults = Faults(str(files.get("items", "items")))
    folder = files["items"].parent if "items" in files else Path()
    items = add_vector_files(_with_images(as_table(items), folder, faults), vectors, faults)
    interactions, interaction_file = as_table(interactions), str(files.get("interactions", "interactions"))
    try:
        items, interactions = checked_tables(items, interactions, faults.file, interaction_file)
    except SemidError as error:
        raise SemidError("\n".join([*faults.lines, str(error)])) from None
    raise_faults(faults.lines)
    checksums = {key: sha256(path) for key, path in (files | vector_files).items()}
    return ImportedTables(items, interactions, {"type": "tables", "sha256": checksums})


def read_table(path: str | Path, *, strings: Sequence[str] = _STRINGS) -> pa.Table:
    """Read a `.parquet` (`.pq`), `.csv`, `.tsv`, `.jsonl` or `.ndjson` file.

    In CSV and TSV, the columns `strings` (else ids and the usual text columns: title, name, text, brand, description,
    category) are strings whatever they look like, and an empty field is null. Raises SemidError naming the file if it
    is absent, not of its kind, or of a kind that is not known.
    """
    path = Path(path)
    if not path.is_file():
        raise SemidError(f"{path}: no such file; check the path")
    suffix = path.suffix.lower()
    try:
        if suffix in SUFFIXES["parquet"]:
            return pa.parquet.read_table(path)
        if suffix in _SEPARATORS:
            return _read_separated(path, _SEPARATORS[suffix], strings)
        if suffix in SUFFIXES["jsonl"]:
            return pa.json.read_json(path)
    except (pa.ArrowException, OSError) as error:
        problem = str(error).splitlines()[0]
        raise SemidError(f"{path}: not readable as {suffix[1:]} ({problem}); check the file") from None
    raise SemidError(f"{path}: unknown suffix {suffix!r}; expected .parquet, .csv, .tsv, .jsonl or .ndjson")


def _vector_array(vectors: Float[np.ndarray, "n dim"]) -> pa.FixedSizeListArray:
    """Vectors as an Arrow column: float16 stays, anything else becomes float32."""
    kind = np.float16 if vectors.dtype == np.float16 else np.float32
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which validation names
        return to_lists(vectors.astype(kind))


def add_vector_files(items: pa.Table, files: Mapping[str, str | Path], faults: Faults) -> pa.Table:
    """`items` with a vector column for each `.npy` file, in place of one of that name; unfit files join the faults."""
    for column, path in files.items():
        values = _load_vectors(path, items.num_rows, faults)
        items = items.drop_columns([column]) if column in items.column_names else items
        items = items if values is None else items.append_column(column, values)
    return items


def _load_vectors(path: str | Path, num_items: int, faults: Faults) -> pa.FixedSizeListArray | None:
    """The vectors of a `.npy` file with one row an item; None, and a line among the faults, where it is not that."""
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        faults.lines.append(f"{path}: not readable as .npy ({error}); check the file")
        return None
    is_matrix = isinstance(vectors, np.ndarray) and vectors.ndim == 2 and vectors.dtype.kind == "f"
    if not is_matrix or vectors.shape[0] != num_items or not vectors.shape[1]:
        found = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, np.ndarray) else "an archive"
        faults.lines.append(f"{path}: expected floats [{num_items}, dim], a row for each item, got {found}")
        return None
    return _vector_array(vectors)


def _read_separated(path: Path, separator: str, strings: Sequence[str]) -> pa.Table:
    table = pa.csv.read_csv(
        path,
        parse_options=pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(strings, pa.string()), null_values=[""], strings_can_be_null=True
        ),
    )
    for field in table.schema:
        if pa.types.is_binary(field.type):
            raise SemidError(f"{path}: column {field.name!r} is not UTF-8; convert the file to UTF-8")
    return table


def as_table(table: str | Path | pa.Table | Any, *, strings: Sequence[str] = _STRINGS) -> pa.Table:
    """An Arrow table of a file (see `read_table`), a pandas DataFrame, or what else has Arrow's stream interface."""
    if isinstance(table, (str, Path)):
        return read_table(table, strings=strings)
    if isinstance(table, pa.Table):
        return table
    if hasattr(table, "__arrow_c_stream__") and not hasattr(table, "iloc"):  # pandas: below, without its index
        return pa.table(table)
    if not hasattr(table, "columns"):
        raise SemidError(f"expected a path, a pandas DataFrame or an Arrow table, got {type(table).__name__}")
    try:
        return pa.Table.from_pandas(table, preserve_index=False)
    except (pa.ArrowException, ValueError) as error:
        problem = ", ".join(str(part) for part in error.args)
        raise SemidError(f"DataFrame that Arrow cannot hold ({problem}); give each column one type and name") from None


def _with_images(items: pa.Table, folder: Path, faults: Faults) -> pa.Table:
    if "image_path" not in items.column_names:
        return items
    if not is_string(items.schema.field("image_path").type):
        faults.column("image_path", f"expected strings, got {items.schema.field('image_path').type}; convert it")
        return items
    names = items["image_path"].to_pylist()
    paths = [folder / name if name else None for name in names]
    absent = np.array([path is not None and not path.is_file() for path in paths], bool)
    faults.rows("image_path", absent, "no such file: {}; correct the path or leave it empty", items["image_path"])
    images = [None if path is None or gone else path.read_bytes() for path, gone in zip(paths, absent, strict=True)]
    replaced = [name for name in ("image", "image_path") if name in items.column_names]
    return items.drop_columns(replaced).append_column("image", pa.array(images, pa.binary()))
