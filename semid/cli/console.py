"""The console that all commands print to."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from semid.data import Dataset

# Ids and paths are printed as they are, brackets and colons included, and never broken into lines.
console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_statistics(dataset: Dataset) -> None:
    """Print a dataset's counts as a table."""
    table = Table(title=f"dataset {dataset.name}", show_header=False)
    for name, value in dataset.statistics().items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)
