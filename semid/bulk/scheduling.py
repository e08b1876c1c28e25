"""Encoding of many files of vectors: sequentially in this process, or in parallel on a cluster."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from semid import artifacts
from semid.bulk.encoding import UNSTEADY, Done, Job, digest_of, encode_file, failed
from semid.data import log_unused, output_name, storage
from semid.errors import SemidError, refuse_path
from semid.tokenizers import BLOCK, SemanticTokenizer

LOCAL = "local"


class Encoded(NamedTuple):
    """Files of codes per input, number of encoded items, and inputs whose outputs existed already."""

    outputs: list[str]
    items: int
    skipped: list[str]


def encode_files(
    tokenizer: SemanticTokenizer,
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    id_column: str = "item_id",
    columns: str | Sequence[str] | None = None,
    scheduler: str = LOCAL,
    retries: int = 2,
    block: int = BLOCK,
    on_progress: Callable[[int, int], None] = lambda items, files: None,
) -> Encoded:
    """Write `out/NAME` for every Parquet file NAME of `inputs`, with columns `item_id` and `codes` as in a catalogue.

    Inputs are files, patterns, and folders of parts, whose output names begin with the names of their partitions. Codes
    are those of `tokenizer.encode`; collisions stay (see `write_catalog`). Paths may be URLs known to fsspec. With a
    `scheduler`, `tcp://HOST:PORT`, the workers of that Dask cluster encode files in parallel; otherwise this process
    encodes one after the other. A file is streamed: memory holds the block being encoded, the next one, and the codes
    of half a million rows. `columns` are those that the tokenizer was fitted to, in that order; if it does not record
    them, a file's only list of floats. An output is complete or absent: calling again after an interruption encodes
    only the missing files. A file with disk or network errors is retried up to `retries` times, unlike one that is not
    Parquet. `on_progress` gets the numbers of items and files encoded since its last call.

    Raises SemidError after all other files are done, naming each failed file with its reason: column and row of a
    missing column or id, of a vector that is not finite or of another width, or an output made from another input; and
    before any work for negative `retries` or a `block` without rows.
    """
    refuse_path(tokenizer, "SemanticTokenizer.from_pretrained")
    if retries < 0 or block < 1:
        raise SemidError(
            f"expected 0 or more retries (--retries) and a block of 1 row or more, got {retries} and {block}; correct "
            "them"
        )
    jobs = _jobs(tokenizer, inputs, out, id_column=id_column, columns=columns, block=block)
    folder = storage.absolute(out)
    if storage.exists(f"{folder}/{artifacts.MANIFEST}"):
        raise SemidError(f"{folder}: is an artifact of semid; choose another folder for the files of codes (--out)")
    with _claimed(folder, jobs):
        before = storage.names_in(folder)  # read now, as a repeated task would find the output of its first run
        if scheduler == LOCAL:
            results = encode_here(tokenizer, jobs, retries=retries, on_progress=on_progress)
        else:
            results = _on_cluster(tokenizer, jobs, scheduler=scheduler, retries=retries, on_progress=on_progress)
        done = dict(results)
        storage.remove_leftovers(folder, {posixpath.basename(job.output) for job in jobs})
    log_unused(name for job in jobs for name in done[job].unused)
    _raise_faults([done[job].fault for job in jobs if done[job].fault], files=len(jobs))
    skipped = [job for job in jobs if posixpath.basename(job.output) in before]
    total = sum(done[job].items for job in set(jobs).difference(skipped))
    return Encoded([job.output for job in jobs], total, [job.source for job in skipped])


@contextlib.contextmanager
def _claimed(folder: str, jobs: Sequence[Job]) -> Iterator[None]:
    """Check that the output folder can be written, and lock it if it is local; URLs have no locks."""
    if not jobs or not storage.is_local(storage.locate(folder)[0]):
        yield
        return
    artifacts.try_file(f"{max((job.output for job in jobs), key=len)}{storage.WRITING}{'0' * 32}")
    with artifacts.locked(Path(folder) / ".lock", Path(folder)):
        yield


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
        if not done.fault:
            on_progress(0, 1)
        yield job, done


def _jobs(
    tokenizer: SemanticTokenizer,
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    id_column: str,
    columns: str | Sequence[str] | None,
    block: int,
) -> list[Job]:
    """One job per file. Raises SemidError if two inputs have the same output, or an input would be overwritten."""
    folder, made = storage.absolute(out), dict[str, str]()
    for source in storage.find_all(inputs):
        name = output_name(source)
        if (other := made.setdefault(name, source)) != source:
            raise SemidError(f"{other} and {source} would both be written to {folder}/{name}; encode them apart")
        if storage.is_same(source, f"{folder}/{name}"):
            raise SemidError(f"{source}: its codes would be written to this very file; choose another folder (--out)")
    digest, chosen = digest_of(tokenizer), (columns,) if isinstance(columns, str) else tuple(columns or ())
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
