"""Writing of artifacts: into a hidden folder, sealed with a manifest, and published atomically."""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from semid.artifacts import remote
from semid.artifacts.files import Rename, rename, sealed, sha256, write_json
from semid.artifacts.locks import locked
from semid.artifacts.manifests import CONFIG, MANIFEST, Manifest, read_artifact, read_manifest, regular_file
from semid.artifacts.places import Place, is_empty, resolved, try_folder
from semid.artifacts.processes import has_ended, in_use
from semid.config import difference
from semid.errors import SemidError

_LOG = logging.getLogger("semid")
_PACKAGES = ("semid", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pyarrow")


@contextlib.contextmanager
def write_artifact(
    path: str | Path,
    *,
    kind: str,
    config: dict,
    parents: Mapping[str, str] | None = None,
    seed: int | None = None,
    devices: str = "",
) -> Iterator[Path]:
    """Yield a temporary directory for the files of the artifact `path`, which is published there at the end.

    An existing artifact at `path` is replaced; anything else there is refused (see `output_folder`).
    `parents` are digests of the artifacts that it is made from, by role.
    Temporary files are removed after an exception, and by the next call of this or `is_current` after a kill.
    Raises SemidError if another process is writing there.
    """
    place = output_folder(path, kind=kind)
    with locked(place.lock, place.path), fill(place, _request(kind, config, parents, seed), devices=devices) as folder:
        yield folder


@contextlib.contextmanager
def fill(place: Place, wanted: Manifest, *, devices: str = "") -> Iterator[Path]:
    """`write_artifact` for a checked and locked place: yield a temporary directory, then seal and publish it."""
    _remove_leftovers(place.path, locked_here=True)
    _check_use(place.path, kind=wanted.kind)
    temporary = place.hidden(in_use("writing"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        files = {str(p.relative_to(temporary)): sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
        values = asdict(wanted) | {"files": files, "packages": _packages(), "devices": devices or platform.machine()}
        values |= {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(temporary / MANIFEST, sealed(values | {"digest": Manifest(**values).digest}))
        _show(temporary, place)
    finally:
        _remove_leftovers(place.path, locked_here=True)


def _show(temporary: Path, place: Place) -> None:
    """Publish a sealed folder, first at the URL if the place is the copy of one."""
    path = place.path
    remote.upload(temporary, path, last=MANIFEST)
    if place.inside:
        _move_up(temporary, path)
        return
    if path.exists():
        if rename(temporary, path, Rename.EXCHANGE):
            return
        os.replace(path, place.hidden(in_use("replaced")))  # move it away: a rename cannot replace a full directory
    os.replace(temporary, path)


def _move_up(sealed: Path, path: Path) -> None:
    """Move the files of a sealed folder into its parent, replacing those of an old artifact, the manifest last.

    Another call completes it after a kill.
    """
    if (path / MANIFEST).is_file():
        for name in read_manifest(path).files:
            if os.path.lexists(path / name):
                regular_file(path, name).unlink()
        (path / MANIFEST).unlink()
    for name in [*read_manifest(sealed).files, MANIFEST]:
        if (sealed / name).exists():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(sealed / name, path / name)
    shutil.rmtree(sealed)


def is_current(path: str | Path, *, kind: str, config: dict, parents: Mapping[str, str], seed: int | None) -> bool:
    """Tell whether `path` has the artifact that this request would write, and log that the stage is skipped.

    Raises SemidError if it has another one, naming what differs: an output folder in use is never overwritten.
    """
    path = resolved(path)
    _remove_leftovers(path)
    remote.refresh(path)
    _check_use(path, kind=kind)
    if not (path / MANIFEST).is_file():
        return False
    standing = read_artifact(path, kind)
    if standing.digest in parents.values():
        raise SemidError(f"{path}: is what the new {kind} is made of; choose another path (--out)")
    existing, requested = (
        made.config | {"schema_version": made.schema_version, "seed": made.seed, "parents": made.parents}
        for made in (standing, _request(kind, config, parents, seed))
    )
    if change := difference(existing, requested):
        raise SemidError(
            f"{path}: in use by a {kind} of other settings ({change}); choose another path (--out) or delete it"
        )
    _LOG.info("%s: this %s exists, made with the same settings and inputs; skipped", remote.url_of(path) or path, kind)
    return True


def check_output(path: str | Path, *, kind: str) -> Path:
    """Check, before any work, that `path` has an artifact of this kind or that one can be written; return it resolved.

    Raises SemidError if the path cannot be written, or if it has something other than such an artifact.
    """
    path = resolved(path)
    _remove_leftovers(path)
    remote.refresh(path)
    _check_use(path, kind=kind)
    if not (path / MANIFEST).is_file():  # a finished artifact may be in a read-only folder
        try_folder(path)
    return path


def output_folder(path: str | Path, *, kind: str) -> Place:
    """How an artifact of this kind can be written, also if it replaces an existing one; otherwise as `check_output`.

    Raises SemidError, too, where one stands with a file that is not its own, such as another artifact in its folder.
    """
    place = try_folder(check_output(path, kind=kind))
    if not place.inside and (place.path / MANIFEST).is_file():
        _check_nothing_else(place.path, kind=kind)
    return place


def _check_nothing_else(folder: Path, *, kind: str) -> None:
    """Raise SemidError for a foreign file in the folder of an artifact, which would be deleted with it."""
    own = {*read_manifest(folder).files, MANIFEST, CONFIG}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in own and (path.is_symlink() or not path.is_dir()):
            raise SemidError(
                f"{folder}: the {kind} there would be replaced, and with it {name}, which is not part of it; move that "
                "file, or choose another path (--out)"
            )


def _check_use(path: Path, *, kind: str) -> None:
    """Raise SemidError if `path` has something other than an artifact of this kind."""
    if above := next((p for p in path.absolute().parents if p.exists() and not p.is_dir()), None):
        raise SemidError(f"{above}: is a file, and {path} should go below it; choose another path (--out)")
    if not path.exists():
        return
    if not path.is_dir() or ((not (path / MANIFEST).is_file()) and not is_empty(path)):
        raise SemidError(
            f"{path}: output folder in use by something that is no {kind} artifact; choose another path (--out)"
        )
    if (path / MANIFEST).is_file() and (found := read_manifest(path).kind) != kind:
        raise SemidError(
            f"{path}: output folder in use by a {found} artifact; choose another path (--out) for this {kind}"
        )


def _request(kind: str, config: dict, parents: Mapping[str, str] | None, seed: int | None) -> Manifest:
    return Manifest(kind=kind, config=config, files={}, parents=dict(parents or {}), seed=seed)


def _remove_leftovers(path: Path, *, locked_here: bool = False) -> None:
    """Clean up after killed processes of this host that were writing `path`.

    An artifact that was moved away for one that was never completed is put back, and one that was sealed inside its
    folder is published. With the lock, this process's own leftovers are removed, too, and all those inside the folder.
    """
    beside, inside = Place.either(path)
    stepped_aside = _ended(beside.hidden(in_use("replaced", "")), own=locked_here)
    for leftover in stepped_aside:
        if not path.exists():
            os.replace(leftover, path)
    begun = list(path.glob(".writing-*")) if locked_here else _ended(inside.hidden(in_use("writing", "")))
    for leftover in begun:
        if (leftover / MANIFEST).is_file():
            _move_up(leftover, path)
    for leftover in [*stepped_aside, *begun, *_ended(beside.hidden(in_use("writing", "")), own=locked_here)]:
        shutil.rmtree(leftover, ignore_errors=True)
    for lock in (beside.lock, inside.lock):
        if lock.exists():
            with contextlib.suppress(SemidError, OSError), locked(lock, path):  # removes the lock of a dead owner
                pass


def _ended(name: Path, *, own: bool = False) -> list[Path]:
    """Hidden paths with this prefix of killed processes, and with `own` of this process."""
    found = name.parent.glob(f"{glob.escape(name.name)}*")
    return [path for path in found if has_ended(path) or (own and path.name.rpartition("-")[2] == str(os.getpid()))]


def _packages() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
