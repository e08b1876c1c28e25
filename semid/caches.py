"""The user's cache, `$XDG_CACHE_HOME/semid` or `~/.cache/semid`, and its bound. Imports nothing that is slow."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path


def user_cache(name: str) -> Path:
    """A folder of the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "semid" / name


def is_off() -> bool:
    """Tell whether SEMID_CACHE=off asks to keep nothing."""
    return os.environ.get("SEMID_CACHE") == "off"


def remove_oldest(
    folder: Path, *, limit: int, before: float = math.inf, spared: Callable[[str], bool] = lambda name: False
) -> None:
    """Remove the files that were not read for longest, until the rest take no more than `limit` bytes.

    Those that were read at the time `before` or later stay, and those whose names below `folder` are `spared`.
    """
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process renamed or removed it
            if stat.S_ISREG((found := path.lstat()).st_mode):
                files.append((path, found))
    total = sum(found.st_size for _, found in files)
    for path, found in sorted(files, key=lambda file: _last_read(file[1])):
        if total <= limit or _last_read(found) >= before:
            break
        if not spared(path.relative_to(folder).as_posix()):
            with contextlib.suppress(OSError):
                path.unlink()
                total -= found.st_size


def _last_read(found: os.stat_result) -> float:
    return max(found.st_atime, found.st_mtime)
