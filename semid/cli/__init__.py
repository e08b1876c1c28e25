"""The command line."""

from semid.cli.app import main
from semid.cli.verbosity import log_lines

__all__ = [
    "log_lines",
    "main",
]
