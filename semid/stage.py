"""One protocol for every stage: skip what exists, resume what was interrupted, work, write whole, with provenance.

A stage turns inputs into one artifact. Its request (settings, parents' digests, seed, version of the stage's code)
names that artifact: where it exists it is read, else the work is done, going on from the checkpoints of an interrupted
run of the same request, and written under a temporary name that is renamed at the end.
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

# Linux gives a process 65,530 maps of memory, and LLVM ends it where a program gets none; a stage makes some thousands.
_MAPS, _MOST_MAPS = Path("/proc/self/maps"), 30_000


@runtime_checkable
class Stored(Protocol):
    """Object that knows the artifact which holds it."""

    def with_origin(self, origin: Origin) -> Any: ...


T = TypeVar("T", bound=Stored)


@dataclass(frozen=True)
class Request:
    """Everything that determines a stage's artifact.

    `version` is that of the stage's code: raise it where the same settings come to mean something else, so that
    artifacts of before are not taken for current ones.
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


def refuse_path(given: Any, *loaders: str) -> None:
    """Raise SemidError for a path where a stage takes what it holds, which `loaders` such as `Dataset.load` read."""
    if isinstance(given, str | Path):
        kinds = " or ".join(loader.partition(".")[0] for loader in loaders)
        loads = " or ".join(f"{loader}({str(given)!r})" for loader in loaders)
        raise SemidError(f"expected {'an' if kinds[0] in 'AEIOU' else 'a'} {kinds}, got a path: {loads}")


def run_stage(
    request: Request,
    out: str | Path | None,
    *,
    load: Callable[[Path], T],
    work: Callable[[Path], T],
    write: Callable[[T, Path], None],
) -> T:
    """Return the object that `request` describes, read from the artifact `out` or made and written there.

    `work(folder)` makes it, keeping checkpoints and `history.jsonl` in `folder` (`<out>.checkpoints`; where `out` is
    a mount point or the working directory, `<out>/.checkpoints`), and `write(object, folder)` writes its files; the
    history goes with them. Without `out` the object lives in memory and nothing is left on the disk. Of several
    processes each calls this; the first reads and writes files.
    Raises SemidError, before any work, if `out` cannot be written, another run is writing it, or it holds anything
    else, naming what differs; and without `out` where several processes make a catalogue or a model, as they share the
    folder of its checkpoints.
    """
    _forget_programs()
    if out is None:
        if request.kind in (Kind.CATALOG, Kind.MODEL) and jax.process_count() > 1:
            raise SemidError("several processes share the folder of a run's checkpoints: name one with out")
        check_events(request.settings)
        with tempfile.TemporaryDirectory() as temporary:
            return work(Path(temporary) / "checkpoints")
    out = place_of_all(out)
    current = functools.partial(
        artifacts.is_current, out, kind=request.kind, config=request.config, parents=request.parents, seed=request.seed
    )
    with contextlib.ExitStack() as stack:
        if not on_first(current):  # asked by each, the last might find what the first has just written
            check_events(request.settings, out)
            place = Place(out, on_first(functools.partial(_claim, out, request.kind, stack)))
            if not on_first(current):  # another run may have come first
                result = work(place.checkpoints)
                on_first(functools.partial(_write, request, place, functools.partial(write, result)))
                return result.with_origin(Origin(out, artifacts.read_manifest(out)))
    on_first(functools.partial(_discard, out))  # a kill may have come between the artifact and this
    return load(out)


def _forget_programs() -> None:
    """Drop compiled programs where a process of many trainings, such as a notebook's, has come to hold too many."""
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


def place_of_all(path: str | Path) -> Path:
    """Absolute path of a folder that every process writes to. Raises SemidError for a URL where there are several."""
    path = artifacts.resolved(path)
    if (url := artifacts.url_of(path)) and jax.process_count() > 1:
        raise SemidError(f"{url}: several processes write one folder that they share; give such a one, and copy it")
    return path


def _claim(out: Path, kind: Kind, stack: contextlib.ExitStack) -> bool:
    """Try the place of an artifact, lock it until the stack ends, and tell whether it is inside its folder."""
    place = artifacts.output_folder(out, kind=kind)
    stack.enter_context(artifacts.locked(place.lock, out))
    return place.inside


def _write(request: Request, place: Place, write: Callable[[Path], None]) -> None:
    wanted = Manifest(request.kind, request.config, {}, dict(request.parents), request.seed)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    folder = place.checkpoints
    with artifacts.fill(place, wanted, devices=devices) as temporary:
        write(temporary)
        if (folder / REQUEST).exists() and (folder / HISTORY).exists():  # else the folder is another's
            shutil.copy(folder / HISTORY, temporary / HISTORY)
    discard_checkpoints(folder)


def _discard(out: Path) -> None:
    for place in Place.either(out):
        discard_checkpoints(place.checkpoints)


def run_recorded(request: Mapping[str, Any], file: str | Path, work: Callable[[], Any]) -> Any:
    """Return the JSON result of `request`, read from `file` or worked out and written there with the request.

    Raises SemidError, before any work, if `file` cannot be written, another run is writing it, or it holds the result
    of another request, naming what differs.
    """
    _forget_programs()
    file = artifacts.resolved(file)
    on_first(lambda: artifacts.refresh(file))
    with contextlib.ExitStack() as stack:
        if not on_first(file.exists):
            on_first(functools.partial(_claim_file, file, stack))
            if not on_first(file.exists):  # another run may have come first
                result = work()
                on_first(lambda: artifacts.write_json(file, {"request": dict(request), "result": result}))
                return result
    record = artifacts.read_json(file)
    if not isinstance(record, dict) or set(record) != {"request", "result"}:
        raise SemidError(f"{file}: holds no result of a request; choose another path (--out) or delete it")
    if change := difference(record["request"], dict(request)):
        raise SemidError(f"{file}: the result of another request ({change}); choose another path (--out) or delete it")
    return record["result"]


def _claim_file(file: Path, stack: contextlib.ExitStack) -> None:
    artifacts.try_file(file)
    stack.enter_context(artifacts.locked(file.with_name(f".{file.name}.lock"), file))


def store_dataset(
    dataset: Dataset, out: str | Path, *, source: dict | None = None, work: Callable[[], Dataset] | None = None
) -> Dataset:
    """Write a dataset, or what `work` makes of it with this `source`, to `out`, unless the same one, by its source, was
    written there before.

    Raises SemidError if `out` holds another dataset, naming what differs.
    """
    config = dataset.config if source is None else dataset.replace(source=source).config
    make = work or (lambda: dataset)
    request = Request(Kind.DATASET, config, {})
    return run_stage(request, out, load=Dataset.load, work=lambda _: make(), write=Dataset.write)
