"""The console that all commands print to."""

from __future__ import annotations

from rich.console import Console

# Ids and paths are printed as they are, brackets and colons included, and never broken into lines.
console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
