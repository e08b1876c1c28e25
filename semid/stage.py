"""One protocol for every stage: skip what exists, resume what was interrupted, work, write whole, with provenance.

A stage turns inputs into one artifact. Its request (settings, parents' digests, seed, version of the stage's code)
names that artifact: where it exists it is read, else the work is done, going on from the checkpoints of an interrupted
run of the same request, and written under a temporary name that is renamed at the end.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax

from semid import artifacts
from semid.artifacts import Kind, Origin
from semid.config import difference
from semid.data import Dataset
from semid.errors import SemidError
from semid.training import HISTORY, REQUEST, discard_checkpoints, on_first

STAGE_VERSION = "stage_version"


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
    """Return the object that `request` describes, read from the artifact `out` or made and written there.

    `work(folder)` makes it, keeping checkpoints and `history.jsonl` in `folder` (`<out>.checkpoints`), and
    `write(object, folder)` writes its files; the history goes with them. Without `out` the object lives in memory and
    nothing is left on the disk. Of several processes each calls this; the first reads and writes files.
    Raises SemidError if `out` holds anything else, naming what differs.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as temporary:
            return work(Path(temporary) / "checkpoints")
    out = Path(out)
    folder = out.with_name(f"{out.name}.checkpoints")
    current = functools.partial(
        artifacts.is_current, out, kind=request.kind, config=request.config, parents=request.parents, seed=request.seed
    )
    if on_first(current):  # asked by each, the last might find what the first has just written
        on_first(functools.partial(discard_checkpoints, folder))  # a kill may have come between the artifact and this
        return load(out)
    result = work(folder)
    on_first(functools.partial(_write, request, out, functools.partial(write, result), folder))
    return result.with_origin(Origin(out, artifacts.read_manifest(out)))


def _write(request: Request, out: Path, write: Callable[[Path], None], folder: Path) -> None:
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    with artifacts.write_artifact(
        out, kind=request.kind, config=request.config, parents=request.parents, seed=request.seed, devices=devices
    ) as temporary:
        write(temporary)
        if (folder / REQUEST).exists() and (folder / HISTORY).exists():  # else the folder is another's
            shutil.copy(folder / HISTORY, temporary / HISTORY)
    discard_checkpoints(folder)


def run_recorded(request: Mapping[str, Any], file: Path, work: Callable[[], Any]) -> Any:
    """Return the JSON result of `request`, read from `file` or worked out and written there with the request.

    Raises SemidError if `file` holds the result of another request, naming what differs.
    """
    if on_first(file.exists):
        record = artifacts.read_json(file)
        if not isinstance(record, dict) or set(record) != {"request", "result"}:
            raise SemidError(f"{file}: holds no result of a request; choose another --out or delete it")
        if change := difference(record["request"], dict(request)):
            raise SemidError(f"{file}: the result of another request ({change}); choose another --out or delete it")
        return record["result"]
    result = work()
    file.parent.mkdir(parents=True, exist_ok=True)
    on_first(lambda: artifacts.write_json(file, {"request": dict(request), "result": result}))
    return result


def store_dataset(dataset: Dataset, out: str | Path) -> Dataset:
    """Write a dataset to `out`, unless the same one, by its source, was written there before.

    Raises SemidError if `out` holds another dataset, naming what differs.
    """
    request = Request(Kind.DATASET, dataset.config, {})
    return run_stage(request, out, load=Dataset.load, work=lambda _: dataset, write=Dataset.write)
