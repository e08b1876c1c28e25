"""Faults of a table, collected before one error names them all."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from semid.errors import SemidError

# Of a surrogate without its other half, as JSON may escape it.
HALF_CHARACTER = "holds half a character (a surrogate alone), which is no text"
_EXAMPLES = 5  # rows named for each kind of fault


@dataclass
class Faults:
    """Faults of one file, a line for each; `first` is the number of rows before those that are looked at."""

    file: str
    lines: list[str] = field(default_factory=list)
    first: int = 0

    def table(self, what: str) -> None:
        """Note a fault of the whole table."""
        self.lines.append(f"{self.file}: {what}")

    def column(self, column: str, what: str) -> None:
        """Note a fault of a whole column."""
        self.table(f"column {column!r}: {what}")

    def rows(
        self, column: str, bad: Bool[np.ndarray, " n"], what: str, values: pa.Array | pa.ChunkedArray | None = None
    ) -> None:
        """Note the rows where `bad`, the first few by number (from 1), with their value where `what` has braces."""
        rows = np.flatnonzero(bad)
        for row in rows[:_EXAMPLES].tolist():
            shown = what if values is None else what.format(values[row].as_py())
            self.table(f"row {self.first + row + 1}, column {column!r}: {shown}")
        if len(rows) > _EXAMPLES:
            self.column(column, f"... and {len(rows) - _EXAMPLES} more rows like these")


def raise_faults(lines: list[str]) -> None:
    """Raise one SemidError with a line for each fault, if there are any."""
    if lines:
        raise SemidError("\n".join(lines))
