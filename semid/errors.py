"""The one error that semid raises for bad input, a hint for misspelt names, and one for paths in place of objects."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class SemidError(ValueError):
    """Bad input. The message is one line: what was expected, what arrived, where, and what to do about it."""


def did_you_mean(name: object, known: Iterable[str], *, cutoff: float = 0.0) -> str:
    """Hint at the known name nearest to `name`, `; did you mean 'buy'?`; empty if its similarity is below `cutoff`."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def refuse_path(given: Any, *loaders: str) -> None:
    """Raise SemidError if `given` is a path and not the object that one of `loaders`, e.g. `Dataset.load`, returns."""
    if isinstance(given, str | Path):
        kinds = " or ".join(loader.partition(".")[0] for loader in loaders)
        loads = " or ".join(f"{loader}({str(given)!r})" for loader in loaders)
        raise SemidError(f"expected {'an' if kinds[0] in 'AEIOU' else 'a'} {kinds}, got a path: {loads}")
