"""Values of JSON files as text, and display names of metrics."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any

DASH = "\N{EN DASH}"
_WORDS = {"ndcg": "NDCG", "mrr": "MRR", "code_recall": "Code-level recall", "code_ndcg": "Code-level NDCG"}


def words(key: str) -> str:
    """Display name of a metric's key: NDCG@10 for ndcg@10."""
    name, at, k = key.partition("@")
    return (_WORDS.get(name) or name.replace("_", " ").replace("/", " ").capitalize()) + at + k


def plain(value: Any) -> str:
    """Any value of a JSON file as text; digests and floats are shortened."""
    if isinstance(value, dict):
        return ", ".join(f"{key} ({plain(v)})" if _nested(v) else f"{key} {plain(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ("; " if any(map(_nested, value)) else ", ").join(map(plain, value))
    if number(value) is not None:
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    return value[:16] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def number_of(values: Mapping[str, Any], column: str, *, default: float = math.nan) -> float:
    """The finite number under `column`, or the default."""
    found = number(values.get(column))
    return default if found is None else found


def formatted(value: Any) -> str:
    """A cell of a table; a dash for no value."""
    if value is None:
        return DASH
    return f"{value:.4f}" if isinstance(value, float) else plain(value)


def signed(value: float) -> str:
    """Four decimals with their sign."""
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def safe(text: str) -> str:
    """Escaped text for plotly, which interprets tags in labels."""
    return html.escape(text, quote=False)
