"""Display of objects in notebooks: small tables as text and HTML, and Arrow tables as pandas DataFrames."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from semid.errors import SemidError


@dataclass(frozen=True, repr=False)
class Facts:
    """Titled table of named values, shown as text or HTML."""

    title: str
    values: Mapping[str, Any]

    def __repr__(self) -> str:
        width = max(map(len, self.values), default=0)
        lines = [f"{name:<{width}}  {_text(value)}" for name, value in self.values.items()]
        return "\n".join([self.title, *lines])

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(_text(value))}</td></tr>"
            for name, value in self.values.items()
        ]
        return f"<table><caption><b>{html.escape(self.title)}</b></caption>{''.join(rows)}</table>"


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def as_pandas(table: pa.Table) -> Any:
    """The table as a pandas DataFrame. Raises SemidError where pandas is not installed."""
    try:
        return table.to_pandas()
    except ImportError:
        raise SemidError("a DataFrame needs pandas: pip install pandas") from None
