"""Child processes that may be killed: forked from a process that has imported semid without starting a device."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["experiments.faults.preload"])

AuditHook = Callable[[str, tuple[Any, ...]], None]


class Ended(NamedTuple):
    """End of a command: exit status (negative for a signal), output, seconds of processor time, and peak memory."""

    status: int
    text: str
    seconds: float
    mebibytes: float


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a function in a process of its own."""
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def start_command(words: Sequence[str], *, log: Path, hook: AuditHook | None = None) -> BaseProcess:
    """Start a command of semid, with output to `log`. `hook` is an audit hook of the process (`sys.addaudithook`)."""
    return start(_command, list(words), log, hook)


def run_command(words: Sequence[str], *, log: Path, seconds: float = 600) -> Ended:
    """Run a command of semid to its end; one that takes longer than `seconds` is killed."""
    process = start_command(words, log=log)
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    usage = log.with_suffix(".usage")
    unknown = {"mebibytes": math.nan, "seconds": math.nan}
    used = json.loads(usage.read_text(encoding="utf-8")) if usage.exists() else unknown
    said = log.read_text(encoding="utf-8", errors="replace")
    return Ended(process.exitcode or 0, said, used["seconds"], used["mebibytes"])


def _command(words: list[str], log: Path, hook: AuditHook | None) -> None:
    from semid.cli import main

    if hook is not None:
        sys.addaudithook(hook)
    log.with_suffix(".usage").unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    started = time.process_time()
    try:
        main(words)
    finally:
        used = {
            "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "seconds": time.process_time() - started,
        }
        log.with_suffix(".usage").write_text(json.dumps(used), encoding="utf-8")
