"""The one error that semid raises for bad input, and a hint for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SemidError(ValueError):
    """Bad input. The message is one line: what was expected, what arrived, where, and what to do about it."""


def did_you_mean(name: object, known: Iterable[str], *, cutoff: float = 0.0) -> str:
    """Hint at the known name nearest to `name`, `; did you mean 'buy'?`; empty if its similarity is below `cutoff`."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
