"""Training log: one JSON line per record, a progress bar, and TensorBoard events on request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

from semid.errors import SemidError

if TYPE_CHECKING:
    from rich.progress import Progress

HISTORY = "history.jsonl"


class Tracker:
    """A log of scalars in `history.jsonl` with a progress bar; a resumed run drops the records after its first step.

    With `tensorboard`, the same scalars go to event files next to it (extra `tensorboard`).
    """

    def __init__(
        self, folder: Path, *, title: str, num_steps: int, first_step: int = 0, tensorboard: bool = False
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / HISTORY
        kept = [r for r in read_history(self.path) if r["step"] <= first_step] if self.path.exists() else []
        rewritten = self.path.with_suffix(".rewritten")  # renamed when complete: a kill here loses no record
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        rewritten.replace(self.path)
        self._events = _event_writer(folder, first_step) if tensorboard else None
        self._file = self.path.open("a", encoding="utf-8")
        self._progress = _progress_bar()
        self._task = self._progress.add_task(title, total=num_steps, completed=first_step, note="")

    def __enter__(self) -> Tracker:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._events is not None:
            self._events.close()

    def log(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Record the scalars of one step; a value that is not finite becomes null."""
        values = {name: float(value) for name, value in scalars.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def advance(self, step: int, note: str) -> None:
        """Move the progress bar to `step`, followed by a short note."""
        self._progress.update(self._task, completed=step, note=note)


class NullTracker(Tracker):
    """A tracker that records nothing, for every process but the first."""

    def __init__(self, folder: Path, **options: Any) -> None:
        del folder, options

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        del error

    def log(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        del step, scalars

    def advance(self, step: int, note: str) -> None:
        del step, note


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a `history.jsonl`; a last line cut short by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _progress_bar() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, TextColumn("{task.fields[note]}"))


def _event_writer(folder: Path, first_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise SemidError("tensorboard output needs the extra: pip install 'semid[tensorboard]'") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)
