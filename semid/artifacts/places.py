"""Places of output, tried before any work: a path that can be written, and how."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from semid.artifacts import remote
from semid.artifacts.files import flush, read_json, remove_dead, temporary_file
from semid.artifacts.processes import in_use
from semid.errors import SemidError

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# Entries of a folder that are no artifact's: a writer's own in a folder that is written into, and a disk's.
_OWN = re.compile(r"\.lock|\.checkpoints|\.(writing|trying)[-.].+")
_DISK = "lost+found"
_MANIFEST = "manifest.json"


class Place(NamedTuple):
    """Place of an artifact: a folder that is renamed to `path` whole, or is filled, where none can take its place.

    `inside`: `path` is filled: a mount point, a folder where a process works, or the child of one that is read-only.
    """

    path: Path
    inside: bool

    def hidden(self, use: str) -> Path:
        """Path of what goes with the work and not with the artifact, on the same disk."""
        return self.path / f".{use}" if self.inside else self.path.with_name(f".{self.path.name}.{use}")

    @property
    def lock(self) -> Path:
        """File that the process which writes here holds (see `locked`)."""
        return self.hidden("lock")

    @property
    def checkpoints(self) -> Path:
        """Folder for the checkpoints of unfinished work."""
        return self.hidden("checkpoints") if self.inside else self.path.with_name(f"{self.path.name}.checkpoints")

    @classmethod
    def either(cls, path: Path) -> tuple[Place, Place]:
        """Both places that a path may have been when an earlier process wrote there."""
        return cls(path, inside=False), cls(path, inside=True)


def resolved(path: str | Path) -> Path:
    """Absolute path without `~` and links: what is written through a link stands where the link points.

    That of a URL is the path of its copy here (see `semid.artifacts.remote`): what is written there goes to the URL.
    """
    try:
        return remote.place(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, no such home, a null character
        raise SemidError(f"{str(path)!r}: no path to write to ({error}); choose another path (--out)") from None


def try_folder(path: str | Path) -> Place:
    """Where a folder can be written, tried by making and renaming a file as large as a page where it would stand.

    Raises SemidError naming the path and what forbids it.
    """
    path = resolved(path)
    try:
        if path.is_dir() and _is_fixed(path):
            _try(path / _MANIFEST)
            return Place(path, inside=True)
        try:
            _try(path)
        except OSError as error:
            if error.errno not in _REFUSED or not path.is_dir():
                raise
            _try(path / _MANIFEST)
            return Place(path, inside=True)
        remote.try_url(path)
        return Place(path, inside=False)
    except OSError as error:
        raise _refusal(path, error) from None


def try_file(path: str | Path) -> Path:
    """Path, without `~` and links, where a file can be written, tried as `try_folder` does.

    Raises SemidError naming the path and what forbids it, such as an artifact that the file is part of.
    """
    path = resolved(path)
    remote.refresh(path)
    try:
        if path.is_dir():
            raise SemidError(f"{path}: is a folder; name the file to write")
        _check_no_part(path)
        _try(path)
        remote.try_url(path)
    except OSError as error:
        raise _refusal(path, error) from None
    return path


def _check_no_part(path: Path) -> None:
    """Raise SemidError for a file of an artifact, as that would not be read any more."""
    for folder in path.parents:
        with contextlib.suppress(SemidError):  # none, or one of something else
            manifest = read_json(folder / _MANIFEST)
            files = manifest.get("files") if isinstance(manifest, dict) else None
            if isinstance(files, dict) and path.relative_to(folder).as_posix() in {*files, _MANIFEST}:
                break
    else:
        return
    raise SemidError(f"{path}: is a file of the artifact {folder}; choose another path (--out)")


def is_empty(folder: Path) -> bool:
    """Tell whether a folder holds nothing, or only what an unfinished artifact leaves in one that is filled."""
    return all(_OWN.fullmatch(entry.name) or entry.name == _DISK for entry in folder.iterdir())


def is_unfinished(folder: Path) -> bool:
    """Tell whether an artifact was begun in a folder that is filled."""
    return any(_OWN.fullmatch(entry.name) for entry in folder.iterdir())


def _is_fixed(folder: Path) -> bool:
    """Tell whether no other folder can take the name of this one."""
    here = Path.cwd()
    return folder in (here, *here.parents) or folder in _mount_points() or is_unfinished(folder)


def _mount_points() -> Iterator[Path]:
    """All mounts, those of folders of the same disk (`os.path.ismount` does not see them) included."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        name = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), line.split()[4])
        yield Path(os.fsdecode(name))


def _try(path: Path) -> None:
    """Write a file under the longest hidden name that a writer uses, below the nearest folder there is, and rename it.

    Raises OSError.
    """
    above = next(parent for parent in path.parents if os.path.lexists(parent))
    remove_dead(above, "trying.@")
    trial = above / f".{in_use(f'trying.{threading.get_ident()}')}"
    try:
        below = trial.joinpath(*path.relative_to(above).parts[:-1])
        below.mkdir(parents=True, exist_ok=True)
        temporary = below / temporary_file(path).name
        temporary.write_bytes(bytes(os.sysconf("SC_PAGE_SIZE")))
        flush(temporary)  # a full disk may say so late
        os.replace(temporary, below / path.name)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _refusal(path: Path, error: OSError) -> SemidError:
    for above in path.parents:
        if os.path.lexists(above) and not above.is_dir():
            return SemidError(f"{above}: is a file, and {path} should go below it; choose another path (--out)")
    return SemidError(f"{path}: cannot be written ({error.strerror or error}); choose another path (--out)")
