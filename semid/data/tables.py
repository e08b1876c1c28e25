"""Reading of tables from files, folders and data frames, by the same rules wherever semid takes a table."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem

from semid.arrow import decoded, is_list, is_string
from semid.artifacts import fetched, first_line, sha256, sha256_json
from semid.data import storage
from semid.data.faults import HALF_CHARACTER
from semid.data.storage import partitions
from semid.errors import SemidError, did_you_mean

_LOG = logging.getLogger("semid")
SUFFIXES = {"parquet": (".parquet", ".pq"), "csv": (".csv", ".tsv"), "jsonl": (".jsonl", ".ndjson")}
COMPRESSED = (".gz", ".bz2", ".lz4", ".zst")
_TEXTS = ("title", "name", "text", "brand", "description", "category")
_STRINGS = ("item_id", "user_id", "event", "image_path", *_TEXTS)  # never numbers: "007" keeps its zeros
# Bytes per block of a text file. A block must hold a whole line, so larger ones are tried if a line does not fit.
_BLOCKS = (1 << 20, 1 << 24, 1 << 28)
_HEADER = 1 << 16  # bytes in which the header of a CSV file ends
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# What damaged files raise; the last two for sizes that a damaged header claims.
_UNREADABLE = (pa.ArrowException, OSError, UnicodeError, OverflowError, MemoryError)
_JSON_KINDS = {str: "string", int: "number", float: "number", bool: "boolean", list: "list", dict: "object"}


def read_table(
    path: str | Path, *, strings: Sequence[str] = _STRINGS, needed: Collection[str] | None = None
) -> pa.Table:
    """Read a `.parquet` (`.pq`), `.csv`, `.tsv`, `.jsonl` or `.ndjson` file, or a folder of such parts as Spark writes.

    Partitions of a folder (`day=2024-05-01/part-0.parquet`) become columns of whole numbers, dates or, if any value is
    neither, strings. If the files have a column of that name, it wins.

    Text files are UTF-8, or UTF-16 with a byte order mark, and may be compressed (`.csv.gz`). In CSV and TSV, the
    columns `strings` (default: ids and the usual text columns title, name, text, brand, description, category) are
    always strings; another column is of strings if any value in any part is no number, time or boolean. An empty field
    is null. Quotes in TSV are read as such only if all of them are placed as a CSV writer would. Strings in JSONL stay
    strings even if they look like dates. Parquet columns that are not in `needed` (None: all are) come as nulls.
    Raises SemidError naming the file, and the line if known, if it is missing, damaged or of an unknown kind.
    """
    path = fetched(path)
    parts = {part: _read_file(part, strings, needed) for part in table_files(path)}
    if not path.is_dir():
        return parts[path]
    if table_kind(path) == "csv" and (mixed := _mixed_columns(parts.values())):
        parts = {part: _read_file(part, (*strings, *mixed), needed) for part in parts}
    tables = [with_partitions(_decoded(table), partitions(part.relative_to(path))) for part, table in parts.items()]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
        own = {name for part in parts.values() for name in part.column_names}
        return _typed(table, [name for name in table.column_names if name not in own.union(strings)])
    except pa.ArrowException as error:
        raise SemidError(f"{path}: its parts are no one table ({first_line(error)}); write them alike") from None


def _mixed_columns(tables: Iterable[pa.Table]) -> set[str]:
    """Columns that are strings in some tables and of another type in others, as the parts of a CSV table may be."""
    fields = [field for table in tables for field in table.schema if not pa.types.is_null(field.type)]
    of_strings = {field.name for field in fields if is_string(field.type)}
    return of_strings & {field.name for field in fields if not is_string(field.type)}


def _decoded(table: pa.Table) -> pa.Table:
    """A part with its categorical columns decoded, since other parts may hold plain values."""
    for at, field in enumerate(table.schema):
        if (column := decoded(table.column(at))).type != field.type:
            table = table.set_column(at, field.name, column)
    return table


def with_partitions(table: pa.Table, values: Mapping[str, str | None]) -> pa.Table:
    """`table` with a constant string column added for each partition value, unless it has a column of that name."""
    for name, value in values.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table


def _typed(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """`table` with the string columns `names` cast to numbers or dates, if all their values allow it."""
    for name in names:
        for kind in (pa.int64(), pa.date32()):
            with contextlib.suppress(pa.ArrowException):
                table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
                break
    return table


def table_kind(path: str | Path) -> str:
    """Kind of a file, or of the first file in a folder: a key of `SUFFIXES`. Raises SemidError for other suffixes."""
    path = fetched(path)
    suffix = _suffix(table_files(path)[0] if path.is_dir() else path)
    kind = next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)
    if kind is None:
        raise SemidError(f"{path}: unknown suffix {suffix!r}; expected .parquet, .csv, .tsv, .jsonl or .ndjson")
    return kind


def table_files(path: Path) -> list[Path]:
    """The files of a local table: the file itself, or the parts in its folder (see `storage.table_files`).

    Raises SemidError if there are none.
    """
    if not path.exists():
        raise SemidError(f"{path}: no such file; check the path")
    return [Path(file) for file in storage.table_files(LocalFileSystem(), str(path))]


def is_table(path: str | Path) -> bool:
    """Tell whether a path has a suffix of tables."""
    return any(_suffix(Path(path)) in suffixes for suffixes in SUFFIXES.values())


def table_digest(path: Path) -> str:
    """sha256 of a table's file, or of the names and contents of the files in its folder."""
    if not path.is_dir():
        return sha256(path)
    return sha256_json({part.relative_to(path).as_posix(): sha256(part) for part in table_files(path)})


def log_unused(columns: Iterable[str]) -> None:
    """Log the columns that nothing reads, each once, if there are any."""
    if names := list(dict.fromkeys(columns)):
        _LOG.info("not used: %s", ", ".join(names))


def as_table(
    table: str | Path | pa.Table | Any, *, strings: Sequence[str] = _STRINGS, needed: Collection[str] | None = None
) -> pa.Table:
    """Convert to an Arrow table: a file (see `read_table`), a pandas DataFrame, an Arrow dataset, a polars frame, lazy
    or not, or anything else with Arrow's stream interface, such as a DuckDB relation."""
    if isinstance(table, (str, Path)):
        return read_table(table, strings=strings, needed=needed)
    if isinstance(table, pa.Table):
        return table
    if hasattr(table, "scanner"):  # a dataset of Arrow's, whose module imports pandas
        return table.to_table()
    is_pandas = hasattr(table, "iloc")
    if not is_pandas and not hasattr(table, "__arrow_c_stream__") and hasattr(table, "collect"):
        table = table.collect()
    if not is_pandas and not hasattr(table, "__arrow_c_stream__"):
        found = f"got {type(table).__name__}; make a table of it"
        raise SemidError(f"expected a path, a pandas DataFrame or an Arrow table, {found}")
    try:
        return pa.Table.from_pandas(table, preserve_index=False) if is_pandas else pa.table(table)
    except (pa.ArrowException, ValueError, TypeError, AttributeError, KeyError) as error:
        problem = " ".join(", ".join(str(part) for part in error.args).split())
        raise SemidError(f"DataFrame that Arrow cannot hold ({problem}); give each column one type and name") from None


def as_mapped_table(
    table: str | Path | pa.Table | Any, columns: Mapping[str, str], *, strings: Sequence[str] = _STRINGS
) -> pa.Table:
    """A table (see `as_table`) of new items or ids. Its columns may have semid's names, or the names in the dataset's
    source tables that `columns` maps these to (`{"item_id": "asin"}`)."""
    theirs = [columns[name] for name in strings if name in columns]
    return with_own_names(as_table(table, strings=(*strings, *theirs)), columns)


def with_own_names(table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """`table` with columns renamed to semid's names, unless it has a column of that name already."""
    names = {theirs: own for own, theirs in columns.items() if own not in table.column_names}
    return table.rename_columns([names.get(name, name) for name in table.column_names])


def read_mapped(
    tables: Mapping[str, str | Path | pa.Table | Any],
    columns: Mapping[str, str],
    *,
    needed: Mapping[str, Collection[str]],
) -> dict[str, pa.Table]:
    """Read tables (see `as_table`) and rename their columns to semid's names: `{"item_id": "asin"}` renames `asin`.

    `needed` lists the columns to read, by their names in the table, for the tables of which not all are needed.
    Raises SemidError for a column that no table has, naming the nearest, and for a table that has both names.
    """
    theirs = [column for own, column in columns.items() if own in _STRINGS]
    strings = (*_STRINGS, *theirs)
    for column in columns.values():
        if len(same := [f"{own}={column}" for own, name in columns.items() if name == column]) > 1:
            raise SemidError(f"columns {' '.join(same)}: one column has one name in semid; leave out the others")
    read = {key: as_table(table, strings=strings, needed=needed.get(key)) for key, table in tables.items()}
    known = [name for table in read.values() for name in table.column_names]
    for own, column in columns.items():
        if column not in known:
            is_turned = own in known and column in (*_STRINGS, "timestamp", "position", "weight")
            turned = f"; write {column}={own}, the name in semid first"
            hint = turned if is_turned else did_you_mean(column, known, cutoff=0.3)
            raise SemidError(f"columns {own}={column}: no table has a column {column!r}{hint}")
    return {key: _renamed(table, columns, key) for key, table in read.items()}


def _renamed(table: pa.Table, columns: Mapping[str, str], what: str) -> pa.Table:
    names = {column: own for own, column in columns.items() if column in table.column_names}
    for column, own in names.items():
        if own in table.column_names and own not in names:
            raise SemidError(f"columns {own}={column}: the {what} have a column {own!r} too; leave one out")
    return table.rename_columns([names.get(name, name) for name in table.column_names])


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8 (byte order mark optional) or UTF-16 (with one), compressed or not.

    Raises SemidError naming the file, and the line that cannot be decoded.
    """
    try:
        data = _open_text(fetched(path)).read()
    except FileNotFoundError:
        raise SemidError(f"{path}: no such file; check the path") from None
    except _UNREADABLE as error:
        raise SemidError(f"{path}: not readable as text ({first_line(error)}); check the file") from None
    if fault := _encoding_fault(data):
        raise SemidError(f"{path}: {fault}")
    return data.decode("utf-8-sig")


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_file(path: Path, strings: Sequence[str], needed: Collection[str] | None) -> pa.Table:
    kind, suffix = table_kind(path), _suffix(path)
    try:
        if kind == "parquet":
            table = _read_parquet(path, needed)
        elif kind == "jsonl":
            table = _read_json(path)
        else:
            table = _read_tsv(path, strings) if suffix == ".tsv" else _read_csv(path, strings)
        _ = table.column_names  # raises UnicodeDecodeError for damaged names; the next line checks the values
        table.validate(full=True)
        return table
    except _UNREADABLE as error:
        fault = None if kind == "parquet" else _text_fault(path, kind)
        raise SemidError(
            f"{path}: not readable as {suffix[1:]} ({fault or first_line(error)}); check the file"
        ) from None


def _read_parquet(path: Path, needed: Collection[str] | None) -> pa.Table:
    with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        if needed is None or len(set(names)) < len(names):
            return file.read()
        table = file.read(columns=[name for name in names if name in needed])
        nothing = pa.nulls(file.metadata.num_rows)
    return pa.table({name: table[name] if name in needed else nothing for name in names})


def _open_text(path: Path) -> pa.NativeFile:
    """The file as a stream, decompressed, and UTF-16 converted to UTF-8."""
    with pa.input_stream(str(path)) as stream:
        is_utf_16 = stream.read(2) in _UTF_16
    stream = pa.input_stream(str(path))
    return pa.transcoding_input_stream(stream, "utf-16", "utf-8") if is_utf_16 else stream


def _in_blocks(read: Callable[[int], pa.Table]) -> pa.Table:
    """`read(block)` with the smallest block size that holds the longest line."""
    for block in _BLOCKS:
        try:
            return read(block)
        except pa.ArrowInvalid as error:
            if "straddl" not in str(error) or block == _BLOCKS[-1]:
                raise
    raise AssertionError("the last block returns or raises")


def _read_csv(path: Path, strings: Sequence[str]) -> pa.Table:
    """Read CSV. Raises SemidError for another separator, or if a quote that is not closed at the end of its field would
    swallow lines."""
    with _open_text(path) as stream:
        header = stream.read(_HEADER).split(b"\n")[0]
    if b"," not in header and (separator := next((s for s in "\t;|" if s.encode() in header), None)):
        also = ", or call the file .tsv" if separator == "\t" else ""
        raise SemidError(f"{path}: {separator!r} stands between the columns' names; separate all by commas{also}")
    table = _read_separated(path, ",", '"', strings)
    if _any(table, lambda column: pc.match_substring(column, "\n")) and (line := _quotes(path, b",").misplaced):
        raise SemidError(f"{path}: line {line}: a field begins with a quote and does not end with it; double it")
    return table


def _read_tsv(path: Path, strings: Sequence[str]) -> pa.Table:
    """Read TSV. Quotes are plain characters, unless every quoted field ends with its quote and some needed quoting."""
    table, error = None, None
    try:
        table = _read_separated(path, "\t", False, strings)
    except pa.ArrowInvalid as caught:
        error = caught
    has_quotes = table is None or table.column_names[0].startswith('"')
    if has_quotes or _any(table, lambda column: pc.starts_with(column, '"')):
        quotes = _quotes(path, b"\t")
        if quotes.needed and quotes.misplaced is None:
            return _read_separated(path, "\t", '"', strings)
    if error is not None:
        raise error
    return table


def _read_separated(path: Path, separator: str, quote: str | bool, strings: Sequence[str]) -> pa.Table:
    parse = pa.csv.ParseOptions(delimiter=separator, quote_char=quote, newlines_in_values=bool(quote))
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(strings, pa.string()), null_values=[""], strings_can_be_null=True
    )

    def read(block: int, use_threads: bool = True) -> pa.Table:
        options = pa.csv.ReadOptions(block_size=block, use_threads=use_threads)
        return pa.csv.read_csv(_open_text(path), read_options=options, parse_options=parse, convert_options=convert)

    try:
        table = _in_blocks(read)
    except pa.ArrowInvalid:
        table = _in_blocks(functools.partial(read, use_threads=False))  # without threads the error names the row
    if any(pa.types.is_binary(field.type) for field in table.schema):
        raise pa.ArrowInvalid("not UTF-8")
    return table


class _Quotes(NamedTuple):
    """Use of quotes at the beginning of fields."""

    needed: bool
    """A field needs its quotes (it holds a quote, separator or line break), or the file begins with one."""
    misplaced: int | None
    """First line with a quote that begins a field and does not end it; None if there is none."""


def _quotes(path: Path, separator: bytes) -> _Quotes:
    data = _open_text(path).read().removeprefix(_BOM)
    inside = rb'"([^"]*+(?:""[^"]*+)*+)"(?=[%b\r\n]|\Z)' % separator
    needed = False
    for match in re.finditer(rb'(?:\A|(?<=[%b\r\n]))(?:%b|")' % (separator, inside), data):
        if match[1] is None:
            return _Quotes(needed, data.count(b"\n", 0, match.start()) + 1)
        needed = needed or not match.start() or any(mark in match[1] for mark in (b'"', separator, b"\n"))
    return _Quotes(needed, None)


def _any(table: pa.Table, holds: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> bool:
    """Tell whether a condition holds for any string of the table."""
    return any(pc.any(holds(column)).as_py() for column in table.columns if is_string(column.type))


def _read_json(path: Path) -> pa.Table:
    """Read JSON lines. Arrow turns strings that look like times into times: read such columns again as strings."""

    def read(block: int) -> pa.Table:
        options = pa.json.ReadOptions(block_size=block)
        return pa.json.read_json(pa.BufferReader(data), read_options=options, parse_options=parse)

    data = _open_text(path).read().removeprefix(_BOM)
    if re.search(rb"(?m)^[ \t\r]*[^{\s]", data):  # a block that begins with null would crash Arrow
        raise pa.ArrowInvalid("a line is no object")
    parse = pa.json.ParseOptions()
    table = _in_blocks(read)
    schema = pa.schema([field.with_type(_without_times(field.type)) for field in table.schema])
    if schema.equals(table.schema):
        return table
    parse = pa.json.ParseOptions(explicit_schema=schema)
    return _in_blocks(read)


def _without_times(kind: pa.DataType) -> pa.DataType:
    """A type that Arrow inferred from JSON, with strings in place of times."""
    if is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_times(field.type)) for field in kind])
    return pa.string() if pa.types.is_timestamp(kind) else kind


def _text_fault(path: Path, kind: str) -> str | None:
    """The first fault, with its line, of a text file that Arrow refused; None if none is found."""
    try:
        data = _open_text(path).read()
    except _UNREADABLE:
        return None
    return _encoding_fault(data) or (_json_fault(data) if kind == "jsonl" else None)


def _encoding_fault(data: bytes) -> str | None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8"
        return f"line {line}: {what}; convert the file to UTF-8 (from Latin-1: iconv -f latin1 -t utf-8)"
    return None


def _json_fault(data: bytes) -> str | None:
    """The first line that is no JSON object, or where a value is of another kind than in an earlier line."""
    kinds: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(data.removeprefix(_BOM).split(b"\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            return f"line {number}: {HALF_CHARACTER}: {half!r}; write both halves or neither"
        except (ValueError, RecursionError) as error:
            return f"line {number}: no JSON object: {error}"
        if not isinstance(row, dict):
            return f"line {number}: expected an object, got {line[:40].decode(errors='replace')!r}; write one a line"
        for name, kind in (pair for key, value in row.items() for pair in _json_kinds(key, value)):
            first, where = kinds.setdefault(name, (kind, number))
            if kind != first:
                return f"line {number}: {name!r} is {kind}, in line {where} {first}; write all alike"
    return None


def _json_kinds(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Names and kinds of a value and all values nested in it; null, which fits any kind, is skipped."""
    if value is not None:
        yield name, _JSON_KINDS[type(value)]
    for inner in value if isinstance(value, list) else ():
        yield from _json_kinds(f"{name}[]", inner)
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from _json_kinds(f"{name}.{key}", inner)
