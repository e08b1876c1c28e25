"""Names of temporary files that contain their process, to tell whether it has ended."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def in_use(use: str, process: int | str | None = None) -> str:
    """A name made of a use, the host and the process; other hosts cannot tell whether the process lives."""
    host = re.sub(r"[^A-Za-z0-9.]", "_", platform.node())
    return f"{use}-{host}-{os.getpid() if process is None else process}"


def has_ended(leftover: Path) -> bool:
    """Tell whether the process in a name of this host (see `in_use`) has ended."""
    process = Path("/proc") / leftover.name.rpartition("-")[2]
    return process.parent.is_dir() and not process.exists()
