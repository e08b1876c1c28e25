"""JAX's cache of compiled programs, on by default for the command line."""

from __future__ import annotations

import os

from semid.caches import is_off, remove_oldest, user_cache

LIMIT = 2 << 30


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache, `$XDG_CACHE_HOME/semid/xla` or `~/.cache/semid/xla`.

    Sets environment variables, which JAX reads when it is imported. A JAX_COMPILATION_CACHE_DIR that is set takes
    precedence, and SEMID_CACHE=off disables the cache. It is also disabled if the folder cannot be written.
    """
    if is_off() or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = user_cache("xla")
        folder.mkdir(parents=True, exist_ok=True)
        remove_oldest(folder, limit=LIMIT)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
