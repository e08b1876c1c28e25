"""Locks of places that one process may write: a file that says who, held by the system for as long as that lives."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from semid.artifacts import remote
from semid.errors import SemidError


@dataclass(frozen=True)
class Owner:
    """Process that holds a lock."""

    host: str
    boot: str
    """Identity of the running system: containers of one machine have names of their own and share this."""
    pid: int
    started: str
    """Time of the process's start in the system's ticks: a later process of the same number has another."""
    since: str
    """When it took the lock, in UTC."""

    @classmethod
    def this(cls) -> Owner:
        """This process, now."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(platform.node(), _boot(), os.getpid(), _started(os.getpid()), since)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def is_elsewhere(self) -> bool:
        """Tell whether another machine runs it."""
        return self.host != platform.node() and (self.boot != _boot() or not self.boot)

    def lives(self) -> bool:
        """Tell whether this machine runs it; of a process in another container that is not known."""
        return self.boot == _boot() and self.started != "" and self.started == _started(self.pid)

    def has_ended(self) -> bool:
        """Tell whether this machine ran it and does so no more; of another machine or container that is not known."""
        return self.host == platform.node() and self.started != "" and not self.lives()


@contextlib.contextmanager
def locked(file: Path, path: Path) -> Iterator[None]:
    """Hold the lock `file` of `path`: one process at a time, which the file names; it goes at the end.

    The lock of a process that was killed is taken over. Of the copy of a URL, an object there says so to others.
    Raises SemidError naming host, number and time of the owner; of one on another machine, whose end is not seen from
    here, with the file to delete.
    """
    missing = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(file, path)
    try:
        with _locked_there(file, path):
            yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone, or the disk
            file.unlink()  # first: whoever opened it in the meantime finds that it is another file's name now
        os.close(descriptor)
        with contextlib.suppress(OSError):  # work that failed leaves no empty folders
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def _locked_there(file: Path, path: Path) -> Iterator[None]:
    """Hold the lock of the URL that `file` is the copy of."""
    url = remote.url_of(file)
    if url is None:
        yield
        return
    try:
        remote.write_object(file, _this(), exclusive=True)
    except FileExistsError:
        owner = _parsed(remote.read_object(file))
        if owner is not None and (owner.is_elsewhere() or (owner.lives() and owner.pid != os.getpid())):
            raise SemidError(f"{path}: in use by {owner}; if that no longer runs, delete {url}") from None
        remote.write_object(file, _this())
    try:
        yield
    finally:
        remote.remove(file)


def _acquire(file: Path, path: Path) -> int:
    """Descriptor of the file, locked and with this process's name in it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _check_free(file, descriptor, path)
            if _is_still(file, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _this(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _check_free(file: Path, descriptor: int, path: Path) -> None:
    """Take the system's lock. Raises SemidError where a process has it, or has the file where there are no such."""
    taken = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        taken = True
    except OSError:  # a file system without locks: what the file says must do
        owner = _owner(descriptor)
        taken = owner is not None and owner.lives()
    owner = _owner(descriptor)
    if taken:
        raise SemidError(f"{path}: in use by {owner or 'another process'}; wait for it, or choose another path (--out)")
    if owner is not None and owner.is_elsewhere():
        raise SemidError(f"{path}: in use by {owner}; if that no longer runs, delete {file}")


def _owner(descriptor: int) -> Owner | None:
    return _parsed(os.pread(descriptor, 4096, 0))


def _this() -> bytes:
    return json.dumps(asdict(Owner.this())).encode()


def _parsed(said: bytes) -> Owner | None:
    """Owner that says so; None for nothing and for what no lock of semid says."""
    try:
        return Owner(**json.loads(said))
    except (ValueError, TypeError, RecursionError):
        return None


def _is_still(file: Path, descriptor: int) -> bool:
    """Tell whether the name is still that of the open file: its last owner removes it."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _boot() -> str:
    return _text(Path("/proc/sys/kernel/random/boot_id"))


def _started(pid: int) -> str:
    """Time of a process's start; empty if there is no such process."""
    return next(iter(_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[19:20]), "")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
