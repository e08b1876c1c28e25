"""Progress of long work: a bar on a terminal, one line that changes in a notebook, log lines elsewhere.

The lines are records of the logger `semid` at level INFO, so that whoever configures logging has them; the command line
shows them on stderr. Bars are shown unless that logger has a level above INFO of its own.
"""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta

LOG = logging.getLogger("semid")


def show_progress(title: str, *, total: int, unit: str, done: int = 0) -> Progress:
    """A view of pieces of work that are done, of all:

        with show_progress("training", total=1000, unit="steps") as progress:
            progress.say("compiling ...")
            progress.advance(20, "loss 0.5000")

    says `training: 20/1,000 steps, loss 0.5000, 43.2 steps/s, 0:00:22 left`.
    """
    kind = Progress
    if LOG.level <= logging.INFO:
        kind = _NotebookLine if _in_notebook() else _Bar if sys.stderr.isatty() else Progress
    return kind(title, total=total, unit=unit, done=done)


class Progress:
    """Log lines at growing intervals, and one of the end."""

    # Seconds until the next line: few at first, so that a log shows soon that all is well.
    pauses: tuple[float, ...] = (3.0, 10.0, 20.0, 30.0)

    def __init__(self, title: str, *, total: int, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit, self.done, self.note = title, total, unit, done, ""
        self._first: tuple[float, int] | None = None  # rates are from the first advance on: before it is compilation
        self._lines, self._next_line, self._shown, self._ended = 0, 0.0, done, False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = True  # of work that ends before all is done, no time is left
        if self._shown != self.done:
            self._show_line()

    def advance(self, done: int, note: str = "") -> None:
        """Show that so many pieces are done, with a short note."""
        self.done, self.note = done, note
        if time.monotonic() >= self._next_line:
            self._show_line()
        self._first = self._first or (time.monotonic(), done)

    def say(self, text: str) -> None:
        """Show what is under way before the next piece is done."""
        self._put(f"{self.title}: {text}")

    @property
    def line(self) -> str:
        """Title, pieces, note, pieces per second and the time that is left."""
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
    """One line under the cell, written over and over; ipywidgets are not needed."""

    pauses = (0.5,)

    def __exit__(self, *error: object) -> None:
        self._ended = True
        self._put(self.line)
        print()

    def _put(self, line: str) -> None:
        print(f"\r{line:<100}", end="", flush=True)


class _Bar(Progress):
    """A bar of rich, for terminals."""

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
