"""One catalogue from many files of codes, possibly larger than memory: DuckDB sorts, counts and spills to disk."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from semid import artifacts
from semid.artifacts import Kind, Manifest, Origin
from semid.bulk.encoding import REQUEST, TOKENIZER, digest_of
from semid.catalog import (
    CATALOG_FILE,
    CatalogPath,
    Collisions,
    copy_tokenizer_files,
    file_metadata,
    warn_of_large_group,
)
from semid.config import enum_member, to_dict
from semid.data import storage
from semid.errors import SemidError
from semid.tokenizers import SemanticTokenizer

_ROWS = 1 << 17  # rows per row group
# The number of an item among those of equal codes, in the order of the ids' bytes.
_TABLE = """
    CREATE TABLE items AS
    SELECT item_id, codes, (row_number() OVER (PARTITION BY codes ORDER BY item_id) - 1)::INTEGER AS number
    FROM read_parquet($files, hive_partitioning = false)
"""


def write_catalog(
    codes: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path,
    collisions: Collisions | str = Collisions.TIE_BREAK,
    memory_limit: str = "1GiB",
    temp_directory: str | Path | None = None,
) -> None:
    """Write the catalogue artifact `out` of all items in the files that `encode_files` wrote, or in its folder.

    Items of all files are sorted by id (by its UTF-8 bytes). With `TIE_BREAK`, a tie-break level numbers the items of
    equal codes in that order, as `quantizers.tie_break` does; with `ALLOWED`, collisions stay. `tokenizer` is the
    catalogue folder whose tokenizer made the codes; the tokenizer is copied, so that `out` can replace that folder.
    DuckDB uses at most `memory_limit` and spills to `temp_directory` (default: a folder next to `out`).

    Tie-breaks are numbered from 0 regardless of `tokenizer`'s own catalogue, so train a new model on this one.

    Raises SemidError for what `check_catalog` refuses, for a repeated id, naming its files, for codes of another
    tokenizer, and for too little disk space or memory.
    """
    collisions = enum_member(Collisions, collisions, "collisions")
    codes = storage.find_all(codes)
    if not codes:
        raise SemidError("expected at least one file of codes, got none")
    if temp_directory is not None:
        temp_directory = artifacts.local_only(temp_directory, "DuckDB spills there")
    out, tokenizer = artifacts.resolved(out), CatalogPath.parse(tokenizer).folder
    parent = check_catalog(out, tokenizer=tokenizer, collisions=collisions, memory_limit=memory_limit)
    loaded = SemanticTokenizer.from_pretrained(tokenizer)
    config = to_dict(dataclasses.replace(loaded.config, collisions=collisions))
    made_of = {"tokenizer": config, "codes": _requests(codes, digest_of(loaded))}
    parents = {"tokenizer": parent.digest}
    if artifacts.is_current(out, kind=Kind.CATALOG, config=made_of, parents=parents, seed=None):
        return
    for path in codes:
        _verify(path)
    with (
        artifacts.write_artifact(out, kind=Kind.CATALOG, config=made_of, parents=parents) as folder,
        tempfile.TemporaryDirectory(dir=temp_directory or folder) as scratch,
        _database(codes, Path(scratch), memory_limit, out) as database,
    ):
        _fill(database, codes)
        _write(database, folder / CATALOG_FILE, codes, loaded, collisions)
        copy_tokenizer_files(Origin(tokenizer, parent), folder)


def check_catalog(
    out: str | Path, *, tokenizer: str | Path, collisions: Collisions | str, memory_limit: str
) -> Manifest:
    """Check all arguments of `write_catalog` but the files of codes; return the manifest of the catalogue `tokenizer`.

    Raises SemidError for a policy that needs all vectors, a `tokenizer` that is no catalogue, an `out` that is in use,
    an invalid memory limit, and a missing DuckDB.
    """
    collisions = enum_member(Collisions, collisions, "collisions")
    if collisions not in (Collisions.TIE_BREAK, Collisions.ALLOWED):
        raise SemidError(
            f"collisions {collisions.value!r} needs all vectors at once; for that of files take tie-break or allowed"
        )
    parent = artifacts.read_artifact(CatalogPath.parse(tokenizer).folder, Kind.CATALOG)
    out = artifacts.check_output(out, kind=Kind.CATALOG)
    if (out / artifacts.MANIFEST).is_file():
        made = artifacts.read_artifact(out, Kind.CATALOG)
        if "codes" not in made.config or made.parents != {"tokenizer": parent.digest}:
            raise SemidError(f"{out}: in use by another catalogue; choose another folder, or delete it")
    duckdb = _duckdb()
    try:
        duckdb.connect(config={"memory_limit": memory_limit}).close()
    except duckdb.Error as error:
        raise SemidError(
            f"memory_limit {memory_limit!r} (--memory-limit): expected one such as 4GiB ({_line(error)})"
        ) from None
    return parent


def _requests(codes: Sequence[str], tokenizer: str) -> str:
    """Hash of the requests that files of codes record, in any order. Raises SemidError for another tokenizer's file."""
    requests = []
    for path in codes:
        with _opened(path) as file:
            metadata, names = file.schema_arrow.metadata or {}, file.schema_arrow.names
        if metadata.get(TOKENIZER.encode()) != tokenizer.encode():
            raise SemidError(f"{path}: its codes are not of this catalogue's tokenizer; encode its items with it")
        if REQUEST.encode() not in metadata:
            raise SemidError(f"{path}: is damaged (names no input); delete it, and encode its items again")
        if missing := {"item_id", "codes"} - set(names):  # DuckDB itself ignores case
            raise SemidError(
                f"{path}: is damaged (has no column {min(missing)!r}); delete it, and encode its items again"
            )
        requests.append(metadata[REQUEST.encode()].decode(errors="replace"))
    return artifacts.sha256_json(sorted(requests))


def _verify(path: str) -> None:
    """Read a file of codes and verify the checksums of its pages, which DuckDB does not do."""
    with _opened(path) as file:
        for _ in file.iter_batches(_ROWS):
            pass


def _fill(database: Any, codes: Sequence[str]) -> None:
    """Make the table of all items. Raises SemidError naming a file that DuckDB cannot read."""
    duckdb = _duckdb()
    try:
        database.execute(_TABLE, {"files": _patterns(codes)})
    except duckdb.OutOfMemoryException:  # not the fault of a file
        raise
    except duckdb.Error:
        for path in codes:
            try:
                database.execute(
                    "SELECT bit_xor(hash(item_id, codes)) FROM read_parquet($files, hive_partitioning = false)",
                    {"files": _patterns([path])},
                )
            except duckdb.Error as error:
                raise SemidError(_damaged(path, error)) from None
        raise


def _patterns(codes: Sequence[str]) -> list[str]:
    """Patterns that match exactly these files, as DuckDB interprets names as patterns."""
    return [glob.escape(path) for path in codes]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """Open a file of codes. Raises SemidError, also while it is read, if it is damaged."""
    try:
        with storage.open_parquet(path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise SemidError(_damaged(path, error)) from None


def _duckdb() -> Any:
    try:
        import duckdb
    except ModuleNotFoundError as error:
        raise SemidError(f"joining files of codes needs DuckDB ({error}): pip install 'semid[distributed]'") from None
    return duckdb


@contextlib.contextmanager
def _database(codes: Sequence[str], scratch: Path, memory_limit: str, out: Path) -> Iterator[Any]:
    """A database on disk that can read the files. Its errors in the block become SemidErrors that name `out`."""
    duckdb = _duckdb()
    config = {"memory_limit": memory_limit, "temp_directory": str(scratch), "preserve_insertion_order": False}
    try:
        with duckdb.connect(scratch / "items.duckdb", config=config) as database:
            for fs in {id(fs): fs for fs, _ in map(storage.locate, codes) if not storage.is_local(fs)}.values():
                database.register_filesystem(fs)
            yield database
    except (duckdb.Error, pa.ArrowException) as error:  # Arrow's where the rows are read
        raise SemidError(
            f"{out}: not written; DuckDB, spilling to {scratch} beyond memory_limit {memory_limit} (--memory-limit): "
            f"{_line(error)}"
        ) from None


def _damaged(path: str, error: Exception) -> str:
    return f"{path}: is damaged ({_line(error)}); delete it, and encode its items again"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _write(
    database: Any, file: Path, codes: Sequence[str], tokenizer: SemanticTokenizer, collisions: Collisions
) -> None:
    tie_break = collisions is Collisions.TIE_BREAK
    query = "SELECT count(*), max(number) + 1, arg_max(item_id, number) FROM items"
    ((items, largest, item),) = database.sql(query).fetchall()
    if not items:
        raise SemidError(f"{len(codes)} files of codes hold no item; a catalogue needs at least one")
    sizes = tokenizer.level_sizes
    if tie_break:
        warn_of_large_group(largest, item, sizes)
        sizes = (*sizes, largest)
    schema = pa.schema(
        {"item_id": pa.string(), "codes": pa.list_(pa.int32(), len(sizes))},
        metadata=file_metadata(sizes, tie_break=tie_break, source_columns=tokenizer.source_columns),
    )
    chosen = "list_append(codes, number)" if tie_break else "codes"
    rows = database.sql(f"SELECT item_id, {chosen} AS codes FROM items ORDER BY item_id")
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for batch in _distinct(rows.to_arrow_reader(_ROWS), database, codes):
            flat = batch["codes"].flatten()
            columns = [batch["item_id"].cast(pa.string()), pa.FixedSizeListArray.from_arrays(flat, len(sizes))]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _distinct(batches: Iterator[pa.RecordBatch], database: Any, codes: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The same batches, which are sorted by id. Raises SemidError for a repeated id, naming its files."""
    last = pa.array([], pa.string())
    for batch in batches:
        item_ids = pa.concat_arrays([last, batch["item_id"].cast(pa.string())])
        twice = item_ids[1:].filter(pc.equal(item_ids[1:], item_ids[:-1]))
        if len(twice):
            _raise_repeated(twice[0].as_py(), database, codes)
        last = item_ids[-1:]
        yield batch


def _raise_repeated(item_id: str, database: Any, codes: Sequence[str]) -> None:
    files = "read_parquet($files, filename = true, hive_partitioning = false)"
    query = f"SELECT filename FROM {files} WHERE item_id = $item ORDER BY filename"
    found = database.cursor().execute(query, {"files": _patterns(codes), "item": item_id}).fetchall()
    where = ", ".join(name for (name,) in found[:4])
    raise SemidError(f"item id {item_id!r} appears {len(found)} times, in {where}; keep one of its rows, encode again")
