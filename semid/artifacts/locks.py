"""Locks of output paths: a file that names the process that is writing, locked by the system while it lives."""

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
    """Boot id of the running system, which containers of a machine share, unlike host names."""
    pid: int
    started: str
    """Start time of the process in system ticks, which distinguishes it from later processes of the same number."""
    since: str
    """Time when it took the lock, in UTC."""

    @classmethod
    def this(cls) -> Owner:
        """This process, now."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(platform.node(), _boot(), os.getpid(), _started(os.getpid()), since)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def is_elsewhere(self) -> bool:
        """Tell whether it runs on another machine."""
        return self.host != platform.node() and (self.boot != _boot() or not self.boot)

    def lives(self) -> bool:
        """Tell whether it runs on this machine; False also for a process in another container, which is not visible."""
        return self.boot == _boot() and self.started != "" and self.started == _started(self.pid)

    def has_ended(self) -> bool:
        """Tell whether it ran on this host and has ended; False for another machine or container."""
        return self.host == platform.node() and self.started != "" and not self.lives()


@contextlib.contextmanager
def locked(file: Path, path: Path) -> Iterator[None]:
    """Hold the lock `file` of `path`, which names this process, until the end of the block.

    The lock of a killed process is taken over. For the local copy of a URL, an object at the URL is the lock for other
    machines. Raises SemidError naming host, process and time of the owner, and for one on another machine, whose end
    is not visible from here, the file to delete.
    """
    missing = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(file, path)
    try:
        with _locked_there(file, path):
            yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone, or the disk
            file.unlink()  # before closing: a process that has opened it since sees that the name is gone
        os.close(descriptor)
        with contextlib.suppress(OSError):  # remove empty folders that failed work has left
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def _locked_there(file: Path, path: Path) -> Iterator[None]:
    """Hold the lock at the URL of which `file` is the local copy, if it is one."""
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
    """Descriptor of the lock file, locked and naming this process."""
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
    """Take the system's lock. Raises SemidError if another process has it or, without system locks, owns the file."""
    taken = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        taken = True
    except OSError:  # a file system without locks: rely on the content of the file
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


def _parsed(content: bytes) -> Owner | None:
    """Owner in the content of a lock file; None if it is empty or not written by semid."""
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None


def _is_still(file: Path, descriptor: int) -> bool:
    """Tell whether the name still refers to the open file, as the last owner removes it."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _boot() -> str:
    return _text(Path("/proc/sys/kernel/random/boot_id"))


def _started(pid: int) -> str:
    """Start time of a process; empty if there is no such process."""
    return next(iter(_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[19:20]), "")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
