"""Stages: reuse an existing artifact, resume an interrupted run, or do the work and write the result atomically.

A stage turns inputs into one artifact, identified by its request: settings, digests of its parents, seed, and version
of the stage's code. If the artifact exists, it is read. Otherwise the work runs, from the last checkpoint if the same
request was interrupted before, and the result is written under a temporary name that is renamed at the end.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax

from semid import artifacts
from semid.artifacts import Kind, Manifest, Origin, Place
from semid.config import check_seed, difference
from semid.data import Dataset
from semid.errors import SemidError
from semid.training import HISTORY, REQUEST, check_events, discard_checkpoints, on_first

STAGE_VERSION = "stage_version"

# Linux allows a process 65,530 memory maps, and LLVM aborts the process when none is left; a stage uses some thousands.
_MAPS, _MAX_MAPS = Path("/proc/self/maps"), 30_000


@runtime_checkable
class Stored(Protocol):
    """Object that records the artifact it is stored in."""

    def with_origin(self, origin: Origin) -> Any: ...


T = TypeVar("T", bound=Stored)


@dataclass(frozen=True)
class Request:
    """Everything that determines a stage's artifact.

    `version` is the version of the stage's code: raise it when the same settings come to mean something else, so that
    older artifacts are not reused.
    """

    kind: Kind
    settings: dict[str, Any]
    parents: Mapping[str, str]
    seed: int | None = None
    version: int | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def config(self) -> dict[str, Any]:
        """Settings and version, as the manifest records them."""
        return self.settings if self.version is None else {**self.settings, STAGE_VERSION: self.version}

    @property
    def checkpoints(self) -> dict[str, Any]:
        """The request as checkpoints record it."""
        return {"config": self.config, "seed": self.seed, "parents": dict(self.parents)}


def run_stage(
    request: Request,
    out: str | Path | None,
    *,
    load: Callable[[Path], T],
    work: Callable[[Path], T],
    write: Callable[[T, Path], None],
) -> T:
    """Return the object that `request` describes: loaded from the artifact `out` if it exists, else made and written.

    `work(folder)` makes the object and keeps checkpoints and `history.jsonl` in `folder` (`<out>.checkpoints`, or
    `<out>/.checkpoints` if `out` is a mount point or the working directory). `write(object, folder)` writes its files;
    the history is copied next to them. Without `out` the object stays in memory and nothing is left on the disk. Every
    process of a distributed run calls this; the first one reads and writes the files.
    Raises SemidError, before any work, if `out` cannot be written, is being written by another run, or holds something
    else, naming what differs; also if several processes make a catalogue or a model without `out`, since they need a
    shared folder for its checkpoints.
    """
    _drop_programs()
    if out is None:
        if request.kind in (Kind.CATALOG, Kind.MODEL) and jax.process_count() > 1:
            raise SemidError("several processes need one folder for the checkpoints that they share; set out")
        check_events(request.settings)
        with tempfile.TemporaryDirectory() as temporary:
            return work(Path(temporary) / "checkpoints")
    out = shared_folder(out)
    current = functools.partial(
        artifacts.is_current, out, kind=request.kind, config=request.config, parents=request.parents, seed=request.seed
    )
    with contextlib.ExitStack() as stack:
        if not on_first(current):  # one process checks: a slower one might already see what the first has written
            check_events(request.settings, out)
            place = Place(out, on_first(functools.partial(_claim, out, request.kind, stack)))
            if not on_first(current):  # another run may have finished between check and lock
                result = work(place.checkpoints)
                on_first(functools.partial(_write, request, place, functools.partial(write, result)))
                return result.with_origin(Origin(out, artifacts.read_manifest(out)))
    on_first(functools.partial(_discard, out))  # a run killed after writing the artifact leaves its checkpoints
    return load(out)


def _drop_programs() -> None:
    """Drop compiled programs if the process, say a notebook with many trainings, has mapped too much memory."""
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MAX_MAPS:
        jax.clear_caches()


def shared_folder(path: str | Path) -> Path:
    """Absolute path of a folder that all processes write to. Raises SemidError for a URL if there are several."""
    path = artifacts.resolved(path)
    if (url := artifacts.url_of(path)) and jax.process_count() > 1:
        raise SemidError(f"{url}: several processes need a folder on a disk that they share; write there, then copy it")
    return path


def _claim(out: Path, kind: Kind, stack: contextlib.ExitStack) -> bool:
    """Check that `out` can be written, lock it until the stack closes, and return its `Place.inside`."""
    place = artifacts.output_folder(out, kind=kind)
    stack.enter_context(artifacts.locked(place.lock, out))
    return place.inside


def _write(request: Request, place: Place, write: Callable[[Path], None]) -> None:
    manifest = Manifest(request.kind, request.config, {}, dict(request.parents), request.seed)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    folder = place.checkpoints
    with artifacts.fill(place, manifest, devices=devices) as temporary:
        write(temporary)
        if (folder / REQUEST).exists() and (folder / HISTORY).exists():  # without a request it is not semid's folder
            shutil.copy(folder / HISTORY, temporary / HISTORY)
    discard_checkpoints(folder)


def _discard(out: Path) -> None:
    for place in Place.either(out):
        discard_checkpoints(place.checkpoints)


def run_recorded(request: Mapping[str, Any], file: str | Path, work: Callable[[], Any]) -> Any:
    """Return the JSON result of `request`: read from `file` if it exists, else computed and written with the request.

    Raises SemidError, before any work, if `file` cannot be written, is being written by another run, or holds the
    result of another request, naming what differs.
    """
    _drop_programs()
    file = artifacts.resolved(file)
    on_first(lambda: artifacts.refresh(file))
    with contextlib.ExitStack() as stack:
        if not on_first(file.exists):
            on_first(functools.partial(_claim_file, file, stack))
            if not on_first(file.exists):  # another run may have finished between check and lock
                result = work()
                on_first(lambda: artifacts.write_json(file, {"request": dict(request), "result": result}))
                return result
    record = artifacts.read_json(file)
    if not isinstance(record, dict) or set(record) != {"request", "result"}:
        raise SemidError(f"{file}: is not a result file of semid; choose another path (--out) or delete it")
    if change := difference(record["request"], dict(request)):
        raise SemidError(f"{file}: result of another request ({change}); choose another path (--out) or delete it")
    return record["result"]


def _claim_file(file: Path, stack: contextlib.ExitStack) -> None:
    artifacts.try_file(file)
    stack.enter_context(artifacts.locked(file.with_name(f".{file.name}.lock"), file))


def store_dataset(
    dataset: Dataset, out: str | Path, *, source: dict | None = None, work: Callable[[], Dataset] | None = None
) -> Dataset:
    """Write a dataset to `out`, unless `out` holds one of the same config; return it with its origin.

    `work`, if given, makes the dataset to write (say, with encoded columns), whose `source` is then the given one.
    Raises SemidError if `out` holds another dataset, naming what differs.
    """
    config = dataset.config if source is None else dataset.replace(source=source).config
    make = work or (lambda: dataset)
    request = Request(Kind.DATASET, config, {})
    return run_stage(request, out, load=Dataset.load, work=lambda _: make(), write=Dataset.write)
