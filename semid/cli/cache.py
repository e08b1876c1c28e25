"""JAX's cache of compiled programs, on by default for the command line."""

from __future__ import annotations

import os
from pathlib import Path

LIMIT = 2 << 30


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache, `$XDG_CACHE_HOME/semid/xla` or `~/.cache/semid/xla`.

    Set in the environment, which JAX reads when it is imported. JAX_COMPILATION_CACHE_DIR is taken as given, and
    SEMID_CACHE=off keeps none. Where the folder cannot be written, nothing is kept.
    """
    if os.environ.get("SEMID_CACHE") == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "semid" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        remove_oldest(folder, limit=LIMIT)
    except (OSError, RuntimeError):  # no home
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def remove_oldest(folder: Path, *, limit: int) -> None:
    """Remove the files that were not read for longest, until the rest take no more than `limit` bytes."""
    files = [(entry.path, entry.stat()) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    total = sum(stat.st_size for _, stat in files)
    for path, stat in sorted(files, key=lambda file: max(file[1].st_atime, file[1].st_mtime)):
        if total <= limit:
            break
        Path(path).unlink(missing_ok=True)
        total -= stat.st_size
