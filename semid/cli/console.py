"""The console that all commands print to."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

# Maximum width of a table in characters, more than any needs.
_WIDEST = 1 << 20


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, but tables at full width: ids that are cut off would look alike."""
        for table in objects:
            if isinstance(table, Table):
                table.width = Measurement.get(self, self.options.update(width=_WIDEST), table).maximum
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Raise the error, which `Outcome` handles."""
        raise


# Ids and paths are printed as they are, brackets and colons included, and never broken into lines.
console = _Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
