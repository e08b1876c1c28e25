"""Faults of tables, collected so that one error lists them all."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from semid.errors import SemidError

# Text with an unpaired surrogate, which JSON escapes can produce.
HALF_CHARACTER = "holds half a character (a surrogate alone), which is no text"
_EXAMPLES = 5  # rows named for each kind of fault


@dataclass
class Faults:
    """Faults of one file, one line each. `first` is the file's row at which the checked rows begin."""

    file: str
    lines: list[str] = field(default_factory=list)
    first: int = 0

    def table(self, what: str) -> None:
        """Add a fault of the whole table."""
        self.lines.append(f"{self.file}: {what}")

    def column(self, column: str, what: str) -> None:
        """Add a fault of a whole column."""
        self.table(f"column {column!r}: {what}")

    def rows(
        self, column: str, bad: Bool[np.ndarray, " n"], what: str, values: pa.Array | pa.ChunkedArray | None = None
    ) -> None:
        """Add a fault of the rows where `bad`: a line for each of the first few, with its number (from 1), and a count
        of the others. Braces in `what` stand for the row's entry of `values`."""
        rows = np.flatnonzero(bad)
        for row in rows[:_EXAMPLES].tolist():
            shown = what if values is None else what.format(values[row].as_py())
            self.table(f"row {self.first + row + 1}, column {column!r}: {shown}")
        if len(rows) > _EXAMPLES:
            self.column(column, f"... and {len(rows) - _EXAMPLES} more rows like these")


def raise_faults(lines: list[str]) -> None:
    """Raise one SemidError with one line per fault, if there are any."""
    if lines:
        raise SemidError("\n".join(lines))
