"""The user's cache folder, `$XDG_CACHE_HOME/semid` or `~/.cache/semid`, and the limit of its size. Fast to import."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path


def user_cache(name: str) -> Path:
    """Path of the folder `name` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "semid" / name


def is_off() -> bool:
    """Tell whether SEMID_CACHE=off disables caching."""
    return os.environ.get("SEMID_CACHE") == "off"


def remove_oldest(
    folder: Path, *, limit: int, before: float = math.inf, spared: Callable[[str], bool] = lambda name: False
) -> None:
    """Remove the least recently read files below `folder` until the rest take at most `limit` bytes.

    Files last read at time `before` or later stay, and so do those whose relative paths are `spared`.
    """
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process renamed or removed it
            if stat.S_ISREG((status := path.lstat()).st_mode):
                files.append((path, status))
    total = sum(status.st_size for _, status in files)
    for path, status in sorted(files, key=lambda file: _last_read(file[1])):
        if total <= limit or _last_read(status) >= before:
            break
        if not spared(path.relative_to(folder).as_posix()):
            with contextlib.suppress(OSError):
                path.unlink()
                total -= status.st_size


def _last_read(status: os.stat_result) -> float:
    return max(status.st_atime, status.st_mtime)
