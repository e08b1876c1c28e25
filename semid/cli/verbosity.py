"""Verbosity of a command: the options --quiet, --verbose and --debug, anywhere among its words."""

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
    """Lowest level of log records to show, and whether to show tracebacks."""

    level: int = logging.INFO
    debug: bool = False

    @staticmethod
    def read(words: Sequence[str]) -> tuple[list[str], Verbosity]:
        """The other words, and the verbosity by these options; the last one counts."""
        given = [word for word in words if word in _LEVELS]
        others = [word for word in words if word not in _LEVELS]
        return others, Verbosity(_LEVELS[given[-1]], "--debug" in given) if given else Verbosity()

    def quiet_libraries(self) -> None:
        """Silence the warnings of XLA's C++ code (such as slow compilation); call it before JAX is imported."""
        if self.level > logging.DEBUG:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def log_lines(level: int = logging.INFO) -> Iterator[None]:
    """Show log records of `semid`, including progress, and warnings as plain lines on stderr, like the commands do. For
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
            if level > logging.DEBUG:  # after a cache error, the program is only compiled again
                warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.level, LOGGER.propagate = before


class _Lines(logging.Formatter):
    """Plain records, with the program's name before warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        from semid.artifacts import shown  # imported here so that --help stays fast

        line = shown(super().format(record))
        return f"semid: {line}" if record.levelno >= logging.WARNING else line


def _log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    LOGGER.warning("%s", message)
