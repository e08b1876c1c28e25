"""The command line."""

from semid.cli.app import main

__all__ = [
    "main",
]
