"""The one error that semid raises for bad input, and the hint of one about a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SemidError(ValueError):
    """Bad input, said in one line: what was expected, what arrived, where, and what to do about it."""


def did_you_mean(name: object, known: Iterable[str], *, cutoff: float = 0.0) -> str:
    """Hint for an unknown name, the nearest known one: `; did you mean 'buy'?`; empty where none is as near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
