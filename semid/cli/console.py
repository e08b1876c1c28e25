"""The console that all commands print to."""

from __future__ import annotations

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the error through: `Outcome` answers it."""
        raise


# Ids and paths are printed as they are, brackets and colons included, and never broken into lines.
console = _Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
