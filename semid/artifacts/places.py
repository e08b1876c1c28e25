"""Output paths: checks, before any work, that a path can be written, and how."""

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
# Entries of a folder that are not part of an artifact: a writer's own files, and those of a file system.
_OWN = re.compile(r"\.lock|\.checkpoints|\.(writing|trying)[-.].+")
_DISK = "lost+found"
_MANIFEST = "manifest.json"


class Place(NamedTuple):
    """How an artifact is written to `path`: as a folder that is renamed to it, or file by file into it.

    `inside`: file by file, as `path` cannot be replaced: it is a mount point, a process's working directory, or below a
    read-only folder.
    """

    path: Path
    inside: bool

    def hidden(self, use: str) -> Path:
        """Path for temporary files that are not part of the artifact, on the same disk."""
        return self.path / f".{use}" if self.inside else self.path.with_name(f".{self.path.name}.{use}")

    @property
    def lock(self) -> Path:
        """Lock file of the process that writes here (see `locked`)."""
        return self.hidden("lock")

    @property
    def checkpoints(self) -> Path:
        """Folder for the checkpoints of unfinished work."""
        return self.hidden("checkpoints") if self.inside else self.path.with_name(f"{self.path.name}.checkpoints")

    @classmethod
    def either(cls, path: Path) -> tuple[Place, Place]:
        """Both ways in which an earlier process may have written to a path."""
        return cls(path, inside=False), cls(path, inside=True)


def resolved(path: str | Path) -> Path:
    """Absolute path with `~` and links resolved, so that writing through a link writes to its target.

    For a URL it is the path of its local copy (see `semid.artifacts.remote`), from which files are uploaded.
    """
    try:
        return remote.place(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, no such home, a null character
        raise SemidError(f"{str(path)!r}: no path to write to ({error}); choose another path (--out)") from None


def try_folder(path: str | Path) -> Place:
    """Check that a folder can be written at `path`, by writing and renaming a file there; return how.

    Raises SemidError naming the path and the reason.
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
    """Check that a file can be written, as `try_folder` does; return its resolved path.

    Raises SemidError naming the path and the reason, such as an artifact that the file is part of.
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
    """Raise SemidError for a file of an artifact, which would no longer match its digests."""
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
    """Tell whether a folder has no files, or only temporary ones of an unfinished artifact."""
    return all(_OWN.fullmatch(entry.name) or entry.name == _DISK for entry in folder.iterdir())


def is_unfinished(folder: Path) -> bool:
    """Tell whether a folder has temporary files of an unfinished artifact."""
    return any(_OWN.fullmatch(entry.name) for entry in folder.iterdir())


def _is_fixed(folder: Path) -> bool:
    """Tell whether this folder cannot be replaced by a rename."""
    here = Path.cwd()
    return folder in (here, *here.parents) or folder in _mount_points() or is_unfinished(folder)


def _mount_points() -> Iterator[Path]:
    """All mount points, including bind mounts, which `os.path.ismount` does not detect."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        name = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4])
        yield Path(os.fsdecode(name))


def _try(path: Path) -> None:
    """Write a file under the longest temporary name that a writer uses, below the nearest existing folder; rename it.

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
        flush(temporary)  # a full disk may be reported only now
        os.replace(temporary, below / path.name)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _refusal(path: Path, error: OSError) -> SemidError:
    for above in path.parents:
        if os.path.lexists(above) and not above.is_dir():
            return SemidError(f"{above}: is a file, and {path} should go below it; choose another path (--out)")
    return SemidError(f"{path}: cannot be written ({error.strerror or error}); choose another path (--out)")
