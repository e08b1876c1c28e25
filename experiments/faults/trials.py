"""Many small trials in a child process that may die of one: it is noted, and another child goes on after it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.faults.children import start
from semid.errors import SemidError

Trial = Callable[[str, random.Random], dict[str, Any]]


def run_trials(
    make: Callable[..., Trial], arguments: tuple[Any, ...], tasks: Sequence[str], *, seed: int, folder: Path
) -> Iterator[dict[str, Any]]:
    """The record of each task: what `make(*arguments)(task, dice)` gives, or that its process died."""
    log, done = folder / "trials.jsonl", 0
    log.touch()
    while done < len(tasks):
        child = start(_work, make, arguments, tasks[done:], seed + done, log)
        child.join()
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        if child.exitcode == 1:
            raise SemidError("the trials did not begin; see the traceback above")
        if child.exitcode and len(records) < len(tasks):
            records.append({"task": tasks[len(records)], "outcome": "died", "text": f"exit status {child.exitcode}"})
            log.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        yield from records[done:]
        done = len(records)


def _work(make: Callable[..., Trial], arguments: tuple[Any, ...], tasks: Sequence[str], seed: int, log: Path) -> None:
    trial = make(*arguments)
    with log.open("a", encoding="utf-8", buffering=1) as file:
        for number, task in enumerate(tasks):
            file.write(json.dumps({"task": task, **trial(task, random.Random(seed + number))}) + "\n")
