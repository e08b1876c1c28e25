"""Encoding of one file of vectors to one file of codes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from semid.arrow import to_lists
from semid.artifacts import sha256_json
from semid.catalog import file_metadata
from semid.config import to_dict
from semid.data import Block, VectorFile, storage
from semid.errors import SemidError
from semid.tokenizers import SemanticTokenizer, pad_rows

T = TypeVar("T")

# Rows per row group of an output, which are held in memory before they are written.
_ROW_GROUP = 1 << 19
REQUEST, TOKENIZER = "semid.request", "semid.tokenizer"


class Done(NamedTuple):
    """Outcome for one file: the number of encoded items, or a fault; and the columns that nothing reads."""

    items: int = 0
    fault: str = ""
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One file to encode, in plain values for any process. `tokenizer` is the digest of the tokenizer to use."""

    source: str
    output: str
    tokenizer: str
    id_column: str
    columns: tuple[str, ...]
    block: int


# Errors that a retry may fix: of network, disk or object store. Damaged pages raise the same errors and are retried,
# too. A file that is not Parquet raises SemidError (`open_parquet`) and is not retried.
UNSTEADY = (OSError, pa.ArrowException)


def failed(job: Job, error: BaseException) -> str:
    """Message for a file that could not be encoded for a reason that is not its content."""
    reason = " ".join(str(error).split())
    return f"{job.source}: not encoded to {job.output} ({type(error).__name__}: {reason})"


def encode_file(
    tokenizer: SemanticTokenizer, job: Job, *, on_items: Callable[[int], None] = lambda items: None
) -> Done:
    """Encode one file, unless its output exists. Faults of the content are returned, as a retry would find them again.
    Raises `UNSTEADY` errors."""
    try:
        file = VectorFile.open(
            job.source,
            dim=tokenizer.dim,
            id_column=job.id_column,
            columns=job.columns or tokenizer.input_columns,
            encoders=tokenizer.content_encoders,
            names=tokenizer.source_columns,
        )
        request = file.request(job.tokenizer)
        if (standing := _items_of(job.output, request)) is not None:
            return Done(standing, unused=file.unused)
        total = 0
        metadata = {REQUEST: request, TOKENIZER: job.tokenizer}
        with _writing(job.output, tokenizer.level_sizes, metadata) as write:
            for one in _one_ahead(file.blocks(job.block)):
                codes = np.asarray(tokenizer.encode_block(pad_rows(one.vectors, rows=job.block)))[: len(one.vectors)]
                _check_finite(one, codes)
                write(one.item_ids, codes)
                on_items(len(codes))
                total += len(codes)
        return Done(total, unused=file.unused)
    except SemidError as error:
        return Done(fault=str(error))


def _check_finite(block: Block, codes: Int[np.ndarray, "n level"]) -> None:
    """Raise SemidError naming file, column and row of a vector with NaN or infinity."""
    for row in np.flatnonzero(codes[:, 0] < 0)[:1]:
        at = 0
        for column, width in block.file.widths.items():
            if not np.isfinite(block.vectors[row, at : at + width]).all():
                where = block.file.at(column, block.first + row)
                raise SemidError(f"{where}: expected a finite vector, got NaN or infinity; leave the item out")
            at += width


@contextlib.contextmanager
def _writing(
    path: str, level_sizes: tuple[int, ...], metadata: dict[str, str]
) -> Iterator[Callable[[pa.Array, Int[np.ndarray, "n level"]], None]]:
    """Yield a function that appends ids and codes to a Parquet file, which is published at `path` at the end."""
    schema = pa.schema(
        {"item_id": pa.string(), "codes": pa.list_(pa.int32(), len(level_sizes))},
        metadata=file_metadata(level_sizes, tie_break=False, source_columns={}) | metadata,
    )
    held: list[pa.RecordBatch] = []

    def flush() -> None:
        file.write_table(pa.Table.from_batches(held, schema), row_group_size=2 * _ROW_GROUP)
        held.clear()

    def write(item_ids: pa.Array, codes: Int[np.ndarray, "n level"]) -> None:
        held.append(pa.record_batch([item_ids, to_lists(codes.astype(np.int32))], schema=schema))
        if sum(len(batch) for batch in held) >= _ROW_GROUP:
            flush()

    with (
        storage.replacing(path) as (fs, name),
        pq.ParquetWriter(name, schema, filesystem=fs, compression="zstd", write_page_checksum=True) as file,
    ):
        yield write
        flush()


def _items_of(output: str, request: str) -> int | None:
    """Number of items in `output`, if it was written for this request; None if it does not exist. Raises SemidError for
    any other file."""
    if not storage.exists(output):
        return None
    with storage.open_parquet(output) as file:
        found, items = (file.schema_arrow.metadata or {}).get(REQUEST.encode()), file.metadata.num_rows
    if found != request.encode():
        what = "not written by `semid tokenize`" if found is None else "made by another tokenizer or of another input"
        raise SemidError(f"{output}: exists, and was {what}; choose another path (--out) or delete it")
    return items


def digest_of(tokenizer: SemanticTokenizer) -> str:
    """sha256 of everything that a tokenizer's codes depend on."""
    arrays = [tokenizer.standardizer.mean, tokenizer.standardizer.scale, *jax.tree.leaves(tokenizer.model)]
    digests = [encoder.digest for encoder in tokenizer.encoders]
    values = [np.asarray(array).tobytes().hex() for array in arrays]
    return sha256_json([to_dict(tokenizer.config.method), *values, *digests])


def _one_ahead(values: Iterator[T]) -> Iterator[T]:
    """The same values, each computed in a thread while the previous one is used."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, values, end)
        while (value := coming.result()) is not end:
            coming = thread.submit(next, values, end)
            yield cast(T, value)
