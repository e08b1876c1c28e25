"""Progress of long work: a bar on a terminal, one line that is rewritten in a notebook, log lines elsewhere.

Log lines go to the logger `semid` at level INFO; the command line shows them on stderr. Bars and notebook lines are
hidden if that logger's own level is above INFO.
"""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta

LOG = logging.getLogger("semid")


def show_progress(title: str, *, total: int, unit: str, done: int = 0) -> Progress:
    """Show how much of some work is done:

        with show_progress("training", total=1000, unit="steps") as progress:
            progress.say("compiling ...")
            progress.advance(20, "loss 0.5000")

    prints `training: 20/1,000 steps, loss 0.5000, 43.2 steps/s, 0:00:22 left`.
    """
    kind = Progress
    if LOG.level <= logging.INFO:
        kind = _NotebookLine if _in_notebook() else _Bar if sys.stderr.isatty() else Progress
    return kind(title, total=total, unit=unit, done=done)


class Progress:
    """Log lines at growing intervals, and a last one at the end."""

    # Seconds until the next line: short at first, so that a log soon shows that the work is progressing.
    pauses: tuple[float, ...] = (3.0, 10.0, 20.0, 30.0)

    def __init__(self, title: str, *, total: int, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit, self.done, self.note = title, total, unit, done, ""
        self._first: tuple[float, int] | None = None  # rates count from the first advance: compilation precedes it
        self._lines, self._next_line, self._shown, self._ended = 0, 0.0, done, False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = True  # the last line shows no time left, even if the work stopped early
        if self._shown != self.done:
            self._show_line()

    def advance(self, done: int, note: str = "") -> None:
        """Show that `done` units of the total are done, with a short note."""
        self.done, self.note = done, note
        if time.monotonic() >= self._next_line:
            self._show_line()
        self._first = self._first or (time.monotonic(), done)

    def say(self, text: str) -> None:
        """Show what is happening before the next unit is done."""
        self._put(f"{self.title}: {text}")

    @property
    def line(self) -> str:
        """Title, units done, note, units per second and the time left."""
        parts = [f"{self.title}: {self.done:,}/{self.total:,} {self.unit}", self.note]
        if self._first is not None and self.done > self._first[1]:
            rate = (self.done - self._first[1]) / max(time.monotonic() - self._first[0], 1e-9)
            parts.append(f"{rate:,.1f} {self.unit}/s" if rate >= 1 else f"{rate:.2g} {self.unit}/s")
            if self.done < self.total and not self._ended:
                parts.append(f"{timedelta(seconds=round((self.total - self.done) / rate))} left")
        return ", ".join(part for part in parts if part)

    def _show_line(self) -> None:
        self._put(self.line)
        self._next_line = time.monotonic() + self.pauses[min(self._lines, len(self.pauses) - 1)]
        self._lines, self._shown = self._lines + 1, self.done

    def _put(self, line: str) -> None:
        LOG.info("%s", line)


class _NotebookLine(Progress):
    """One line under the cell, rewritten in place; needs no ipywidgets."""

    pauses = (0.5,)

    def __exit__(self, *error: object) -> None:
        self._ended = True
        self._put(self.line)
        print()

    def _put(self, line: str) -> None:
        print(f"\r{line:<100}", end="", flush=True)


class _Bar(Progress):
    """Progress bar on a terminal, drawn by rich."""

    def __init__(self, title: str, *, total: int, unit: str, done: int = 0) -> None:
        from rich import progress as rich
        from rich.console import Console

        super().__init__(title, total=total, unit=unit, done=done)
        counts = (rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn())
        texts = ("{task.description}", "left", "{task.fields[note]}")
        first, left, note = (rich.TextColumn(text, markup=False) for text in texts)
        columns = (first, *counts, left, rich.TimeRemainingColumn(), note)
        self._bar = rich.Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, done: int, note: str = "") -> None:
        self._bar.update(self._task, completed=done, note=note)

    def say(self, text: str) -> None:
        self._bar.update(self._task, note=text)


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")
