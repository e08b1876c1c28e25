"""Provenance of a result: the code, the command and the machine."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from semid import __version__

# Replaced by the commit in archives (`git archive`, by .gitattributes), which are no checkouts.
_ARCHIVED = "$Format:%H$"
_PACKAGES = ("jax", "flax", "optax", "numpy", "pyarrow")


@functools.cache
def code() -> dict[str, str | None]:
    """Version of semid, and commit of the checkout, if there is one (with `+changes` if files differ from it)."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    if not _ARCHIVED.startswith("$"):
        return {"semid": __version__, "commit": _ARCHIVED[:7]}
    commit = git("rev-parse", "--short=7", "HEAD")
    return {"semid": __version__, "commit": f"{commit}+changes" if git("status", "--porcelain", "-uno") else commit}


def command() -> str:
    """The command line of this process."""
    return shlex.join(["python", "-m", "experiments", *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """Processor, cores, devices, system and versions of the packages."""
    devices = jax.devices()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
