"""Tokenization of catalogues larger than memory: Parquet files of vectors in, Parquet files of codes out."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from semid.autoencoder import BLOCK, padded
from semid.errors import SemidError
from semid.tokenizer import SemanticTokenizer

T = TypeVar("T")

# Rows of an output's row group: what is held back before it is written.
_ROW_GROUP = 1 << 19
_READ_BUFFER = 1 << 20
_REQUEST = "semid.request"


class Encoded(NamedTuple):
    """How many items were encoded, and which input files were left out because their output stands."""

    items: int
    skipped: list[Path]


class Block(NamedTuple):
    """Rows of one file: the first row's number, ids, and vectors of all columns side by side, float16 or float32."""

    file: VectorFile
    first: int
    item_ids: pa.Array
    vectors: Float[np.ndarray, "n dim"]


def encode_files(
    tokenizer: SemanticTokenizer,
    inputs: Sequence[Path],
    out: Path,
    *,
    id_column: str = "item_id",
    columns: Sequence[str] | None = None,
    block: int = BLOCK,
    on_items: Callable[[int], None] = lambda items: None,
) -> Encoded:
    """Write `out/NAME` for every Parquet file NAME of `inputs`: `item_id` and `codes` as a catalogue's columns.

    Codes are those of `tokenizer.encode`; collisions stay. One block is encoded while the next is read, and no more
    than that is in memory, with the codes of half a million rows. `columns` are those of the tokenizer's config; where
    it names none, all float lists of a file in its order. A file is complete or absent: run again, a stopped call goes
    on with the files that it lacks. `on_items` is called with the number of items of every block.

    Raises SemidError naming file, column and row of a missing column or id, of a vector that is not finite or of
    another width, and for an output that stands but was made from something else.
    """
    tokenizer_digest, outputs = _digest(tokenizer), _outputs(inputs, out)
    files = [VectorFile.open(path, tokenizer, id_column=id_column, columns=columns) for path in inputs]
    requests = {file.path: file.request(tokenizer_digest) for file in files}
    skipped = [path for path in inputs if _stands(outputs[path], requests[path])]
    out.mkdir(parents=True, exist_ok=True)
    coming = _one_ahead(itertools.chain.from_iterable(f.blocks(block) for f in files if f.path not in skipped))
    total = 0
    for path, blocks in itertools.groupby(coming, key=lambda one: one.file.path):
        with _writing(outputs[path], tokenizer.level_sizes, requests[path]) as write:
            for one in blocks:
                codes = np.asarray(tokenizer.encode_block(padded(one.vectors, rows=block)))[: len(one.vectors)]
                _check_finite(one, codes)
                write(one.item_ids, codes)
                on_items(len(codes))
                total += len(codes)
    return Encoded(total, skipped)


def count_items(inputs: Sequence[Path]) -> int:
    """Rows of Parquet files, by their footers. Raises SemidError naming a file that has none."""
    return sum(_open(file).metadata.num_rows for file in inputs)


@dataclass(frozen=True)
class VectorFile:
    """A Parquet file, its vector columns, and how wide each of them is."""

    path: Path
    id_column: str
    widths: dict[str, int]

    @classmethod
    def open(
        cls, path: Path, tokenizer: SemanticTokenizer, *, id_column: str, columns: Sequence[str] | None
    ) -> VectorFile:
        """Check the schema. Raises SemidError naming the column that is missing or no list of floats, and widths that
        do not add up to the tokenizer's."""
        schema, dim = _open(path).schema_arrow, len(tokenizer.standardizer.mean)
        wanted = columns or tokenizer.config.columns or [f.name for f in schema if _is_vector(f.type)]
        for name in (id_column, *wanted):
            if name not in schema.names:
                raise SemidError(f"{path}: column {name!r} is missing; found {', '.join(schema.names)}")
        for name in wanted:
            if not _is_vector(kind := schema.field(name).type):
                raise SemidError(f"{path}: column {name!r}: expected lists of floats, got {kind}")
        free = [name for name in wanted if not pa.types.is_fixed_size_list(schema.field(name).type)]
        if len(free) > 1:
            raise SemidError(f"{path}: columns {free} have no fixed width; write them as fixed-size lists")
        fixed = {name: schema.field(name).type.list_size for name in wanted if name not in free}
        widths = {name: fixed.get(name, dim - sum(fixed.values())) for name in wanted}
        if sum(widths.values()) != dim or min(widths.values(), default=0) < 1:
            shown = ", ".join(f"{name}: {width}" for name, width in fixed.items()) or "none"
            raise SemidError(f"{path}: expected vector columns of {dim} dimensions in all, got {shown}; choose columns")
        return cls(path, id_column, widths)

    def blocks(self, rows: int) -> Iterator[Block]:
        """The file in blocks of at most `rows`; one empty block of an empty file."""
        first = 0
        file = _open(self.path)
        for batch in file.iter_batches(rows, columns=[self.id_column, *self.widths]):
            vectors = [self._vectors(batch.column(name), name, first) for name in self.widths]
            joined = vectors[0] if len(vectors) == 1 else np.concatenate(vectors, axis=1)
            yield Block(self, first, self._ids(batch.column(self.id_column), first), joined)
            first += len(batch)
        if not file.metadata.num_rows:
            empty = np.zeros((0, sum(self.widths.values())), np.float32)
            yield Block(self, 0, pa.array([], pa.string()), empty)

    def request(self, tokenizer: str) -> str:
        """What the output depends on, hashed: the tokenizer's digest, the columns, and which file this is."""
        stat = self.path.stat()
        return _sha256([tokenizer, self.id_column, self.widths, self.path.name, stat.st_size, stat.st_mtime_ns])

    def at(self, column: str, row: int) -> str:
        """Where a fault is; rows are counted from 1, as elsewhere in files."""
        return f"{self.path}: column {column!r}, row {row + 1}"

    def _vectors(self, values: pa.Array, name: str, first: int) -> Float[np.ndarray, "n width"]:
        width = self.widths[name]
        lengths = pc.list_value_length(values)
        wrong = pc.fill_null(pc.not_equal(lengths, width), True).to_numpy(zero_copy_only=False)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            got = "nothing" if lengths[row].as_py() is None else f"{lengths[row]}"
            raise SemidError(f"{self.at(name, first + row)}: expected a vector of {width} dimensions, got {got}")
        flat = values.flatten()
        if flat.null_count:
            row = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // width
            raise SemidError(f"{self.at(name, first + row)}: a dimension is null; leave the item out or fill it")
        array = flat.to_numpy().reshape(len(values), width)
        return array if array.dtype == np.float16 else array.astype(np.float32, copy=False)

    def _ids(self, values: pa.Array, first: int) -> pa.Array:
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            raise SemidError(f"{self.at(self.id_column, first + row)}: the id is missing; every item needs one")
        try:
            return values.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise SemidError(f"{self.path}: column {self.id_column!r}: expected strings, got {values.type}") from None


def _check_finite(block: Block, codes: Int[np.ndarray, "n level"]) -> None:
    """Raises SemidError naming file, column and row where the tokenizer found NaN or infinity."""
    for row in np.flatnonzero(codes[:, 0] < 0)[:1]:
        at = 0
        for column, width in block.file.widths.items():
            if not np.isfinite(block.vectors[row, at : at + width]).all():
                where = block.file.at(column, block.first + row)
                raise SemidError(f"{where}: expected a finite vector, got NaN or infinity; leave the item out")
            at += width


@contextlib.contextmanager
def _writing(
    path: Path, level_sizes: tuple[int, ...], request: str
) -> Iterator[Callable[[pa.Array, Int[np.ndarray, "n level"]], None]]:
    """A function that appends ids and codes to a Parquet file, which stands at `path` once all are written."""
    schema = pa.schema(
        {"item_id": pa.string(), "codes": pa.list_(pa.int32(), len(level_sizes))},
        metadata={"semid.level_sizes": ",".join(map(str, level_sizes)), "semid.tie_break": "0", _REQUEST: request},
    )
    temporary = path.with_name(f".{path.name}.writing")
    held: list[pa.RecordBatch] = []

    def flush() -> None:
        file.write_table(pa.Table.from_batches(held, schema), row_group_size=2 * _ROW_GROUP)
        held.clear()

    def write(item_ids: pa.Array, codes: Int[np.ndarray, "n level"]) -> None:
        flat = pa.array(np.ascontiguousarray(codes, np.int32).reshape(-1))
        held.append(pa.record_batch([item_ids, pa.FixedSizeListArray.from_arrays(flat, codes.shape[1])], schema=schema))
        if sum(len(batch) for batch in held) >= _ROW_GROUP:
            flush()

    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as file:
            yield write
            flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _outputs(inputs: Sequence[Path], out: Path) -> dict[Path, Path]:
    """The file to write for each input. Raises SemidError where two inputs would have the same."""
    made: dict[str, Path] = {}
    for path in inputs:
        if (other := made.setdefault(path.name, path)) is not path:
            raise SemidError(f"{other} and {path} would both be written to {out / path.name}; encode them apart")
    return {path: out / path.name for path in inputs}


def _stands(output: Path, request: str) -> bool:
    """Whether `output` was written for this request. Raises SemidError for anything else that stands there."""
    if not output.exists():
        return False
    found = (_open(output).schema_arrow.metadata or {}).get(_REQUEST.encode())
    if found != request.encode():
        what = "not written by `semid encode`" if found is None else "made by another tokenizer or of another input"
        raise SemidError(f"{output}: exists, and was {what}; choose another --out or delete it")
    return True


def _digest(tokenizer: SemanticTokenizer) -> str:
    """sha256 of all that a tokenizer's codes depend on."""
    arrays = [tokenizer.standardizer.mean, tokenizer.standardizer.scale, *jax.tree.leaves(tokenizer.model)]
    return _sha256([repr(tokenizer.config.method), *(np.asarray(array).tobytes().hex() for array in arrays)])


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _one_ahead(values: Iterator[T]) -> Iterator[T]:
    """The same values, each made in a thread while the one before it is in use."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, values, end)
        while (value := coming.result()) is not end:
            coming = thread.submit(next, values, end)
            yield cast(T, value)


def _open(path: Path) -> pq.ParquetFile:
    """A Parquet file that is read piece by piece: a row group may be larger than memory."""
    try:
        return pq.ParquetFile(path, buffer_size=_READ_BUFFER, pre_buffer=False)
    except FileNotFoundError:
        raise SemidError(f"{path}: no such file") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise SemidError(f"{path}: not a readable Parquet file ({error})") from None


def _is_vector(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and pa.types.is_floating(kind.value_type)
