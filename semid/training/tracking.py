"""Training log: one JSON line per record, progress, and trackers on request."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

from semid import artifacts
from semid.errors import SemidError
from semid.progress import LOG, show_progress
from semid.training.processes import on_first
from semid.training.sinks import Sink, TrackedRun, check_folder, check_tracker, chosen_trackers, open_sinks

HISTORY = "history.jsonl"


_GO_ON = "make space, and give the same command again: it goes on from the last checkpoint"


@contextlib.contextmanager
def naming(path: Path, advice: str = _GO_ON) -> Iterator[None]:
    """Convert exceptions of libraries that cannot write `path` into one line with the path, the reason and `advice`."""
    try:
        yield
    except SemidError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # Orbax has no error of its own for a full disk
        said = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        full = os.strerror(errno.ENOSPC)
        raise SemidError(f"{path}: cannot be written ({full if full in said else said[:300]}); {advice}") from None


class Tracker:
    """Training log: scalars in `history.jsonl`, and progress. A resumed run drops the records after its first step.

    Scalars and config also go to the experiment trackers (see `tracked_by`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        title: str,
        num_steps: int,
        first_step: int = 0,
        config: Mapping[str, Any] | None = None,
        trackers: tuple[str, ...] = (),
    ) -> None:
        self.path = folder / HISTORY
        with naming(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            kept = [r for r in read_history(self.path) if r["step"] <= first_step] if self.path.exists() else []
            with artifacts.replacing(self.path) as rewritten:  # if killed here, no record is lost
                rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._sinks = list(open_sinks(TrackedRun(folder, title, config or {}, first_step), trackers))
        self._file = self.path.open("ab", buffering=0)
        self._progress = show_progress(title, total=num_steps, unit="steps", done=first_step)

    def __enter__(self) -> Tracker:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__()
        self._file.close()
        failed = error is not None and not isinstance(error, SystemExit)
        self._tell(lambda sink: sink.close(failed=failed))

    def log(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Record the scalars of one step; a value that is not finite becomes null."""
        values = {name: float(value) for name, value in scalars.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(json.dumps({"step": step, **finite}).encode() + b"\n")
        self.show(step, values)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Send scalars of one step only to the trackers: wall times, which would make logs of equal runs differ."""
        self._tell(lambda sink: sink.log(step, values))

    def _tell(self, call: Callable[[Sink], None]) -> None:
        """Call each tracker; one that fails is dropped with a warning, and the training continues."""
        for sink in tuple(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                name, why = type(sink).__name__, artifacts.first_line(error)
                LOG.warning("%s: %s; what follows is in %s alone", name, why, self.path)

    def _append(self, line: bytes) -> None:
        """Write a whole line; on failure raise SemidError and remove a partial line."""
        size = os.fstat(self._file.fileno()).st_size
        with naming(self.path):
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(size)
                raise

    def advance(self, step: int, note: str) -> None:
        """Show progress up to `step`, with a short note."""
        self._progress.advance(step, note)

    def say(self, text: str) -> None:
        """Show what is happening before the next step is done."""
        self._progress.say(text)


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

    def show(self, step: int, values: Mapping[str, float]) -> None:
        del step, values

    def advance(self, step: int, note: str) -> None:
        del step, note

    def say(self, text: str) -> None:
        del text


def open_tracker(folder: Path, **options: Any) -> Tracker:
    """A Tracker in the first process, a NullTracker in the others. An exception of the first is raised in all."""
    opened: list[Tracker] = [NullTracker(folder)]
    on_first(lambda: opened.append(Tracker(folder, **options)))
    return opened[-1]


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a `history.jsonl`, without a last line that a killed run left incomplete.

    Raises SemidError naming the file and a line that is no record.
    """
    return [
        _record(line, f"{path}: line {number}") for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1)
    ]


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = artifacts.parse_json(line, where=where)
    except SemidError:
        record = None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise SemidError(f"{where}: not a record of a training log; delete the file")
    return record


def check_events(settings: Any, *folders: Path) -> None:
    """Raise SemidError if TensorBoard events are requested, by settings at any depth or by `tracked_by`, and cannot be
    written: a folder is the copy of a URL, or the extra is missing."""
    if "tensorboard" not in chosen_trackers(tensorboard=_asks_for_events(settings)):
        return
    for folder in folders:
        check_folder(folder)
    check_tracker("tensorboard")


def _asks_for_events(settings: Any) -> bool:
    if isinstance(settings, Mapping):
        return settings.get("tensorboard") is True or any(map(_asks_for_events, settings.values()))
    return isinstance(settings, list | tuple) and any(map(_asks_for_events, settings))
