"""Signals and errors that end a command: one line and an exit status each."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from semid.errors import SemidError

# Commands that can resume after they were stopped.
_RESUMED = ("demo", "tokenize", "train", "sweep", "train-end-to-end", "experiments", "reliability")


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM, as an exception that libraries do not swallow."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def signals_raised() -> Iterator[None]:
    """Raise `Stopped` at the first SIGINT or SIGTERM; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in heeded}  # shells make background jobs ignore SIGINT
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) is _stop:  # keep ignoring signals that are ignored
            signal.signal(each, signal.SIG_DFL)
    raise Stopped(number)


@dataclass(frozen=True)
class Outcome:
    """Reports the end of a command, given its words and whether errors are shown with tracebacks."""

    words: Sequence[str]
    debug: bool

    def report(self, error: BaseException) -> int:
        """Print one line about what ended the command (none if its output has no reader); return the exit status."""
        if isinstance(error, BrokenPipeError) and _output_has_no_reader():
            return 128 + signal.SIGPIPE  # like a process ended by the signal
        if self.debug:
            traceback.print_exception(error)
        if stopped := stopped_by(error):
            print(f"semid: {self._stopped_line(stopped)}", file=sys.stderr)
            return 128 + stopped.number
        from semid.artifacts import shown  # imported here so that --help stays fast

        line = str(error) if isinstance(error, (SemidError, OSError)) else _memory_line(error) or self._fault(error)
        print(f"semid: {shown(line)}", file=sys.stderr)
        return 1

    def _stopped_line(self, stopped: Stopped) -> str:
        name = self.words[0] if self.words else "help"
        what = "interrupted" if stopped.number == signal.SIGINT else "terminated"
        after = "starts again"
        if name in _RESUMED:
            after = "goes on from what is finished and the last checkpoint, if there is any"
        return f"{name} {what}; the same command {after}"

    def _fault(self, error: BaseException) -> str:
        """The line for an unforeseen exception; the traceback is kept in a file, as hours of work may precede it."""
        first = next(iter(str(error).splitlines()), "")
        line = f"{type(error).__name__}: {first} (unexpected; "
        if self.debug:
            return f"{line}please report it with the traceback above)"
        try:
            with tempfile.NamedTemporaryFile("w", prefix="semid-", suffix=".log", delete=False) as file:
                file.write("".join(traceback.format_exception(error)))
        except OSError:
            return f"{line}run again with --debug for the traceback, and please report it)"
        return f"{line}please report it with its traceback, {file.name}; --debug prints it)"


def _memory_line(error: BaseException) -> str | None:
    """The line for an out-of-memory error of the host or a device; None for other errors."""
    of_device = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    if not (of_device or isinstance(error, MemoryError)):
        return None
    from semid.artifacts import first_line

    advice = "train with a smaller --batch-size or more --accumulate, search with a smaller --beam-size"
    return f"out of memory ({first_line(error)}); {advice}"


def _output_has_no_reader() -> bool:
    """Tell whether the reader of the output has ended (`semid ... | head`), and discard unwritten output."""
    poll, output = select.poll(), sys.stdout.fileno()
    poll.register(output, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def stopped_by(error: BaseException | None) -> Stopped | None:
    """The signal that caused an exception; libraries may wrap it in exceptions of their own."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__ or error.__context__
    return error
