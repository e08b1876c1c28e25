"""Items with equal codes: the policies, and codes for newcomers next to those that are taken."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from semid.catalog.catalog import SemanticCatalog
from semid.progress import LOG

# Items of one group of equal codes, for each code of the largest level, from which on a warning names the group.
_LARGE = 4


class Collisions(enum.Enum):
    """Policy for items that share all codes."""

    TIE_BREAK = "tie-break"
    """A last level counts the items of a group in row order."""
    POPULARITY = "popularity"
    """A last level ranks the items of a group by training popularity (MMGRec)."""
    SINKHORN = "sinkhorn"
    """The last code is re-assigned by Sinkhorn within groups (LC-Rec); what still collides stays so."""
    MIN_COST = "min-cost"
    """The last code is re-assigned at the least cost within groups of equal prefix, until every item is alone."""
    ALLOWED = "allowed"
    """Nothing: a tuple of codes may stand for several items."""

    @property
    def adds_level(self) -> bool:
        """A last level tells such items apart."""
        return self in (Collisions.TIE_BREAK, Collisions.POPULARITY)

    @property
    def moves_last_code(self) -> bool:
        """The last code is re-assigned, by the vectors that its level quantizes."""
        return self in (Collisions.SINKHORN, Collisions.MIN_COST)


def warn_of_large_group(size: int, item: str, level_sizes: Sequence[int]) -> None:
    """Warn where a last level tells apart far more items of equal codes, such as `item`, than the others have codes."""
    if size > _LARGE * max(level_sizes):
        LOG.warning(
            "%d items, such as %s, share all codes: the last level, which tells them apart, has as many, and every "
            "search is as wide; give these items content that differs, take more levels, or let them share codes "
            "(--collisions allowed)",
            size,
            item,
        )


class Residuals(NamedTuple):
    """Vectors that the last level quantizes, and its codebook: the costs of other last codes."""

    vectors: Float[np.ndarray, "n dim"]
    codebook: Float[np.ndarray, "codes dim"]

    def nearest(self, item: int) -> Iterator[int]:
        """Last codes of an item, the nearest first."""
        distances = np.square(self.vectors[item].astype(np.float64) - self.codebook.astype(np.float64)).sum(axis=1)
        return iter(np.argsort(distances, kind="stable").tolist())


def place(
    catalog: SemanticCatalog,
    nearest: Int[np.ndarray, "n code"],
    *,
    policy: Collisions,
    residuals: Callable[[], Residuals] | None,
    full: Callable[[int], Exception],
) -> Int[np.ndarray, "n level"]:
    """Codes of newcomers, one after the other, next to those of all rows of a catalogue, which stay.

    With a last level that tells items apart, the first free number of the group of equal codes or, where the group is
    full, that of the nearest last code whose group is not. Where the last code itself moves, the nearest that is free
    among items of equal prefix; where none is, the item collides (sinkhorn) or cannot be placed. `residuals` (None:
    there are none, so last codes cannot move) are those of the newcomers; `full` makes the error for one of them.
    """
    if policy is Collisions.ALLOWED:
        return nearest
    breaks, levels = policy.adds_level, nearest.shape[1]
    taken: dict[tuple[int, ...], set[int]] = {}
    for codes in catalog.codes[_sharing(catalog.codes, nearest, levels - 1)].tolist():
        taken.setdefault(tuple(codes[:-1]), set()).add(codes[-1])
    largest_group = catalog.level_sizes[-1] if breaks else 1
    placed = np.empty((len(nearest), catalog.num_levels), np.int32)
    for item, codes in enumerate(nearest.tolist()):
        prefix, last = tuple(codes[:-1]), codes[-1]

        def free(code: int, prefix: tuple[int, ...] = prefix) -> bool:
            if breaks:
                return len(taken.get((*prefix, code), ())) < largest_group
            return code not in taken.get(prefix, ())

        found = last if free(last) else None
        if found is None and residuals is not None:
            found = next(filter(free, residuals().nearest(item)), None)
        if found is None and policy is not Collisions.SINKHORN:
            raise full(item)
        group = (*prefix, last if found is None else found)
        if breaks:
            numbers = taken.setdefault(group, set())
            group = (*group, next(number for number in range(largest_group) if number not in numbers))
        taken.setdefault(group[:-1], set()).add(group[-1])
        placed[item] = group
    return placed


def _sharing(
    codes: Int[np.ndarray, "items level"], others: Int[np.ndarray, "n code"], levels: int
) -> Int[np.ndarray, " rows"]:
    """Rows whose first `levels` codes are those of one of the others, and perhaps a few more: by a hash of them."""
    factors = np.random.default_rng(0).integers(1 << 62, size=levels, dtype=np.int64).astype(np.uint64) | np.uint64(1)

    def hashed(of: np.ndarray) -> np.ndarray:
        return (of[:, :levels].astype(np.uint64) * factors[None]).sum(axis=1, dtype=np.uint64)

    return np.flatnonzero(np.isin(hashed(codes), hashed(others)))
