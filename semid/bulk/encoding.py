"""One file of vectors to one file of codes; and many, here or on a cluster."""

from __future__ import annotations

import contextlib
import hashlib
import json
import posixpath
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
from semid.bulk import storage
from semid.errors import SemidError
from semid.tokenizer import SemanticTokenizer

T = TypeVar("T")

LOCAL = "local"
# Rows of an output's row group: what is held back before it is written.
_ROW_GROUP = 1 << 19
REQUEST, TOKENIZER = "semid.request", "semid.tokenizer"


class Encoded(NamedTuple):
    """The files of codes, one an input; how many items were encoded; which inputs' outputs stood already."""

    outputs: list[str]
    items: int
    skipped: list[str]


class Done(NamedTuple):
    """What became of one file: how many items its output has, or the fault for which there is none."""

    items: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Job:
    """One file to encode: plain values that any process understands. `tokenizer` is the digest of the one to use."""

    source: str
    output: str
    tokenizer: str
    id_column: str
    columns: tuple[str, ...]
    block: int


class Block(NamedTuple):
    """Rows of one file: the first row's number, ids, and vectors of all columns side by side, float16 or float32."""

    file: VectorFile
    first: int
    item_ids: pa.Array
    vectors: Float[np.ndarray, "n dim"]


def encode_files(
    tokenizer: SemanticTokenizer,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    id_column: str = "item_id",
    columns: Sequence[str] | None = None,
    scheduler: str = LOCAL,
    retries: int = 2,
    block: int = BLOCK,
    on_progress: Callable[[int, int], None] = lambda items, files: None,
) -> Encoded:
    """Write `out/NAME` for every Parquet file NAME of `inputs`: `item_id` and `codes` as a catalogue's columns.

    Codes are those of `tokenizer.encode`; collisions stay (see `write_catalog`). Paths may be URLs of file systems
    that fsspec knows. With a `scheduler`, `tcp://HOST:PORT`, the workers of that Dask cluster take a file each;
    otherwise this process takes one after the other. A file is streamed: while one block is encoded the next is read,
    and no more than that is in memory, with the codes of half a million rows. `columns` are those that the tokenizer
    was fitted to, in their order; where it does not know them, the only list of floats of a file. An output is complete
    or absent: run again, a stopped call goes on with the files that it lacks. A file that a disk or a network fails to
    read or write is tried `retries` more times, one that is no Parquet file is not. `on_progress` gets the items and
    files that were done since it was called last.

    Raises SemidError when all others are done, naming the files that failed, each with its reason: column and row of a
    missing column or id, of a vector that is not finite or of another width, or an output made from something else.
    """
    jobs = _jobs(tokenizer, inputs, out, id_column=id_column, columns=columns, block=block)
    folder = storage.absolute(out)
    before = storage.names_in(folder)  # a task that is repeated finds the output of its first run
    if scheduler == LOCAL:
        results = encode_here(tokenizer, jobs, retries=retries, on_progress=on_progress)
    else:
        results = _on_cluster(tokenizer, jobs, scheduler=scheduler, retries=retries, on_progress=on_progress)
    done = dict(results)
    storage.remove_leftovers(folder, {posixpath.basename(job.output) for job in jobs})
    _raise_faults([done[job].fault for job in jobs if done[job].fault], files=len(jobs))
    skipped = [job for job in jobs if posixpath.basename(job.output) in before]
    total = sum(done[job].items for job in set(jobs).difference(skipped))
    return Encoded([job.output for job in jobs], total, [job.source for job in skipped])


def encode_here(
    tokenizer: SemanticTokenizer, jobs: Sequence[Job], *, retries: int, on_progress: Callable[[int, int], None]
) -> Iterator[tuple[Job, Done]]:
    """One file after the other in this process."""
    for job in jobs:
        for _ in range(retries + 1):
            try:
                done = encode_file(tokenizer, job, on_items=lambda items: on_progress(items, 0))
                break
            except UNSTEADY as error:
                done = Done(fault=failed(job, error))
        on_progress(0, 1)
        yield job, done


# What may go well the next time: a network, a disk, an object store. Damaged pages of a file that opens look the same.
# One that opens and is no Parquet file does not: `open_parquet` makes a SemidError of that, and it is not tried again.
UNSTEADY = (OSError, pa.ArrowException)


def failed(job: Job, error: BaseException) -> str:
    """What to say of a file that could not be encoded for a reason that is not its content."""
    return f"{job.source}: not encoded to {job.output} ({type(error).__name__}: {error})"


def encode_file(
    tokenizer: SemanticTokenizer, job: Job, *, on_items: Callable[[int], None] = lambda items: None
) -> Done:
    """Encode one file to its output, unless that stands. Faults of the content are returned: another try finds them
    again. Raises `UNSTEADY` errors."""
    try:
        file = VectorFile.open(job.source, tokenizer, id_column=job.id_column, columns=job.columns)
        request = file.request(job.tokenizer)
        if (standing := _items_of(job.output, request)) is not None:
            return Done(standing)
        total = 0
        metadata = {REQUEST: request, TOKENIZER: job.tokenizer}
        with _writing(job.output, tokenizer.level_sizes, metadata) as write:
            for one in _one_ahead(file.blocks(job.block)):
                codes = np.asarray(tokenizer.encode_block(padded(one.vectors, rows=job.block)))[: len(one.vectors)]
                _check_finite(one, codes)
                write(one.item_ids, codes)
                on_items(len(codes))
                total += len(codes)
        return Done(total)
    except SemidError as error:
        return Done(fault=str(error))


def _jobs(
    tokenizer: SemanticTokenizer,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    id_column: str,
    columns: Sequence[str] | None,
    block: int,
) -> list[Job]:
    """One a file. Raises SemidError where two inputs would have the same output, or one would be its own."""
    folder, made = storage.absolute(out), dict[str, str]()
    for source in map(storage.absolute, inputs):
        name = posixpath.basename(source)
        if (other := made.setdefault(name, source)) != source:
            raise SemidError(f"{other} and {source} would both be written to {folder}/{name}; encode them apart")
        if storage.is_same(source, f"{folder}/{name}"):
            raise SemidError(f"{source}: its codes would be written to this very file; choose another folder for --out")
    digest, chosen = digest_of(tokenizer), tuple(columns or ())
    return [Job(source, f"{folder}/{name}", digest, id_column, chosen, block) for name, source in made.items()]


def _on_cluster(tokenizer: SemanticTokenizer, jobs: Sequence[Job], **options: Any) -> Iterator[tuple[Job, Done]]:
    try:
        from semid.bulk.cluster import encode_on_cluster
    except ModuleNotFoundError as error:
        raise SemidError(f"a scheduler needs Dask ({error}): pip install 'semid[distributed]'") from None
    return encode_on_cluster(tokenizer, jobs, **options)


def _raise_faults(faults: Sequence[str], *, files: int) -> None:
    if files == 1 and faults:
        raise SemidError(faults[0])
    if faults:
        lines = "\n  ".join(faults)
        raise SemidError(f"{len(faults)} of {files} files failed, the codes of the others are kept:\n  {lines}")


@dataclass(frozen=True)
class VectorFile:
    """A Parquet file, its vector columns, and how wide each of them is."""

    path: str
    id_column: str
    widths: dict[str, int]

    @classmethod
    def open(
        cls, path: str, tokenizer: SemanticTokenizer, *, id_column: str, columns: Sequence[str] | None
    ) -> VectorFile:
        """Check the schema. Raises SemidError naming the column that is missing or no list of floats, several of which
        none is known to be the tokenizer's, and widths that do not add up to the tokenizer's."""
        with storage.open_parquet(path) as file:
            schema, dim = file.schema_arrow, len(tokenizer.standardizer.mean)
        wanted = columns or tokenizer.columns or tokenizer.config.columns
        if not wanted:
            wanted = [f.name for f in schema if is_vector(f.type)]
            if len(wanted) > 1:  # their order would be a guess, and wrong codes look like any others
                shown = ", ".join(wanted)
                raise SemidError(
                    f"{path}: has vector columns {shown}, and the tokenizer does not say which it was fitted to; name "
                    "them after --columns, in the order of its dataset"
                )
        for name in (id_column, *wanted):
            if name not in schema.names:
                raise SemidError(f"{path}: column {name!r} is missing; found {', '.join(schema.names)}")
        for name in wanted:
            if not is_vector(kind := schema.field(name).type):
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
        with storage.open_parquet(self.path) as file:
            for batch in file.iter_batches(rows, columns=[self.id_column, *self.widths]):
                vectors = [self._vectors(batch.column(name), name, first) for name in self.widths]
                joined = vectors[0] if len(vectors) == 1 else np.concatenate(vectors, axis=1)
                yield Block(self, first, self._ids(batch.column(self.id_column), first), joined)
                first += len(batch)
        if not first:
            empty = np.zeros((0, sum(self.widths.values())), np.float32)
            yield Block(self, 0, pa.array([], pa.string()), empty)

    def request(self, tokenizer: str) -> str:
        """What the output depends on, hashed: the tokenizer's digest, the columns, and which file this is."""
        name = posixpath.basename(self.path)
        return _sha256([tokenizer, self.id_column, self.widths, name, *storage.version(self.path)])

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
    path: str, level_sizes: tuple[int, ...], metadata: dict[str, str]
) -> Iterator[Callable[[pa.Array, Int[np.ndarray, "n level"]], None]]:
    """A function that appends ids and codes to a Parquet file, which stands at `path` once all are written."""
    schema = pa.schema(
        {"item_id": pa.string(), "codes": pa.list_(pa.int32(), len(level_sizes))},
        metadata={"semid.level_sizes": ",".join(map(str, level_sizes)), "semid.tie_break": "0", **metadata},
    )
    held: list[pa.RecordBatch] = []

    def flush() -> None:
        file.write_table(pa.Table.from_batches(held, schema), row_group_size=2 * _ROW_GROUP)
        held.clear()

    def write(item_ids: pa.Array, codes: Int[np.ndarray, "n level"]) -> None:
        flat = pa.array(np.ascontiguousarray(codes, np.int32).reshape(-1))
        held.append(pa.record_batch([item_ids, pa.FixedSizeListArray.from_arrays(flat, codes.shape[1])], schema=schema))
        if sum(len(batch) for batch in held) >= _ROW_GROUP:
            flush()

    with (
        storage.replacing(path) as (fs, name),
        pq.ParquetWriter(name, schema, filesystem=fs, compression="zstd", write_page_checksum=True) as file,
    ):
        yield write
        flush()


def _items_of(output: str, request: str) -> int | None:
    """How many items `output` has, if it was written for this request; None if nothing stands there. Raises SemidError
    for anything else."""
    if not storage.exists(output):
        return None
    with storage.open_parquet(output) as file:
        found, items = (file.schema_arrow.metadata or {}).get(REQUEST.encode()), file.metadata.num_rows
    if found != request.encode():
        what = "not written by `semid tokenize`" if found is None else "made by another tokenizer or of another input"
        raise SemidError(f"{output}: exists, and was {what}; choose another --out or delete it")
    return items


def digest_of(tokenizer: SemanticTokenizer) -> str:
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


def is_vector(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and pa.types.is_floating(kind.value_type)
