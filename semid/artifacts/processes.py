"""Names of what a process uses, which say whether it has ended."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def in_use(use: str, process: int | str | None = None) -> str:
    """A use with the host and process of it: another host cannot tell whether that process lives."""
    host = re.sub(r"[^A-Za-z0-9.]", "_", platform.node())
    return f"{use}-{host}-{os.getpid() if process is None else process}"


def has_ended(leftover: Path) -> bool:
    """Tell whether the process of this host whose number ends a name (see `in_use`) has ended."""
    process = Path("/proc") / leftover.name.rpartition("-")[2]
    return process.parent.is_dir() and not process.exists()
