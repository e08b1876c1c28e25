"""Groups of items that share all codes, and a tie-break level that distinguishes them. Deterministic, on the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer, Real


class TieBreak(NamedTuple):
    """Codes with the added level, and the size of that level: the number of items in the largest group."""

    codes: Integer[np.ndarray, "items level+1"]
    level_size: int


def collision_groups(codes: Integer[np.ndarray, "items level"]) -> Int[np.ndarray, " items"]:
    """Dense group numbers of the items, equal where all codes are equal, in the lexicographic order of the codes."""
    order, starts = _sorted_groups(codes)
    groups = np.empty(len(codes), np.int64)
    groups[order] = np.cumsum(starts) - 1
    return groups


def tie_break(
    codes: Integer[np.ndarray, "items level"], *, popularity: Real[np.ndarray, " items"] | None = None
) -> TieBreak:
    """Append a level that counts the items of a group from 0, which makes every row unique.

    They are counted in row order (arrival) or, given popularities (say interaction counts of the training split), from
    the most popular down, equals in row order: code 0 is then the group's most popular item (MMGRec, arXiv 2404.16555).
    """
    order, starts = _sorted_groups(codes, within=None if popularity is None else _descending(popularity, len(codes)))
    positions = np.arange(len(codes))
    first = np.maximum.accumulate(np.where(starts, positions, 0))
    rank = np.empty(len(codes), np.int32)
    rank[order] = positions - first  # the sort is stable: rows of a group stay in row order
    return TieBreak(np.column_stack([codes, rank]), int(rank.max(initial=0)) + 1)


def _sorted_groups(
    codes: Integer[np.ndarray, "items level"], *, within: Real[np.ndarray, " items"] | None = None
) -> tuple[Int[np.ndarray, " items"], Bool[np.ndarray, " items"]]:
    """Rows in lexicographic order of their codes, then of `within`, and a flag where a new group starts in that order.

    Equals stay in row order.
    """
    if codes.ndim != 2 or codes.shape[1] == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"expected integer codes of shape [items, level >= 1], got {codes.dtype} {codes.shape}")
    order = np.lexsort((*(() if within is None else (within,)), *codes.T[::-1]))
    ordered = codes[order]
    starts = np.ones(len(codes), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(1)
    return order, starts


def _descending(popularity: Real[np.ndarray, " items"], items: int) -> Real[np.ndarray, " items"]:
    """A key that sorts the most popular first."""
    if popularity.shape != (items,):
        raise ValueError(f"tie_break: expected one popularity per item, shape ({items},), got {popularity.shape}")
    values = popularity.astype(np.float64)  # the negative of an unsigned count would wrap around
    if np.isnan(values).any():
        raise ValueError(f"tie_break: the popularity of row {np.isnan(values).argmax()} is NaN; give 0 for unknown")
    return -values
