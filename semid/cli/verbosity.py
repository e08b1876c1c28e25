"""Verbosity of a command: the options --quiet, --verbose and --debug, which stand anywhere among its words."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LOGGER = logging.getLogger("semid")
_LEVELS = {"--quiet": logging.WARNING, "--verbose": logging.DEBUG, "--debug": logging.DEBUG}


@dataclass(frozen=True)
class Verbosity:
    """Lowest level of log records that are shown, and the choice of tracebacks."""

    level: int = logging.INFO
    debug: bool = False

    @staticmethod
    def read(words: Sequence[str]) -> tuple[list[str], Verbosity]:
        """The other words, and what these options among them ask for; the last one counts."""
        given = [word for word in words if word in _LEVELS]
        others = [word for word in words if word not in _LEVELS]
        return others, Verbosity(_LEVELS[given[-1]], "--debug" in given) if given else Verbosity()

    def quiet_libraries(self) -> None:
        """Keep the alarms of XLA's C++ (slow compilation, say) off the console, before JAX is imported."""
        if self.level > logging.DEBUG:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def log_lines(level: int = logging.INFO) -> Iterator[None]:
    """Show log records of `semid`, progress included, and warnings as plain lines on stderr: as every command does, for
    scripts."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    before = LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _log_warning
            if level > logging.DEBUG:  # a program is compiled again
                warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.level, LOGGER.propagate = before


class _Lines(logging.Formatter):
    """Records as they are; from warnings on, after the program's name."""

    def format(self, record: logging.LogRecord) -> str:
        from semid.artifacts import shown  # here: a command that only prints help is quick

        line = shown(super().format(record))
        return f"semid: {line}" if record.levelno >= logging.WARNING else line


def _log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    LOGGER.warning("%s", message)
