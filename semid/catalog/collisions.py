"""Items with equal codes: the collision policies, and free codes for new items."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from semid.catalog.catalog import SemanticCatalog
from semid.progress import LOG

# A group of equal codes is reported if it has at least this many items per code of the largest level.
_LARGE = 4


class Collisions(enum.Enum):
    """Policy for items that share all codes."""

    TIE_BREAK = "tie-break"
    """A last level counts the items of a group in row order."""
    POPULARITY = "popularity"
    """A last level ranks the items of a group by training popularity (MMGRec)."""
    SINKHORN = "sinkhorn"
    """The last code is re-assigned by Sinkhorn within groups (LC-Rec); some items may still collide."""
    MIN_COST = "min-cost"
    """The last code is re-assigned at the least cost within groups of equal prefix, so that no items collide."""
    ALLOWED = "allowed"
    """Collisions are allowed: several items may have the same codes."""

    @property
    def adds_level(self) -> bool:
        """A tie-break level is added."""
        return self in (Collisions.TIE_BREAK, Collisions.POPULARITY)

    @property
    def moves_last_code(self) -> bool:
        """The last code is re-assigned, by the input vectors of its level."""
        return self in (Collisions.SINKHORN, Collisions.MIN_COST)


def warn_of_large_group(size: int, item: str, level_sizes: Sequence[int]) -> None:
    """Warn if a tie-break level separates far more equal items, such as `item`, than other levels have codes."""
    if size > _LARGE * max(level_sizes):
        LOG.warning(
            "%d items, such as %s, share all codes: the last level, which tells them apart, has as many, and every "
            "search is as wide; give these items content that differs, take more levels, or let them share codes "
            "(--collisions allowed)",
            size,
            item,
        )


class Residuals(NamedTuple):
    """Input vectors of the last level and its codebook, which give the costs of other last codes."""

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
    """Codes of new items, one after the other, given the codes of a catalogue's rows, which do not change.

    With a tie-break level, an item gets the first free number in its group of equal codes or, if the group is full, in
    that of the nearest last code whose group is not. If the policy moves the last code, it gets the nearest one that is
    free among items of equal prefix; if there is none, the item collides (sinkhorn) or cannot be placed. `residuals`
    are those of the new items (None: last codes cannot move); `full` makes the error for an item that cannot be placed.
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

        chosen = last if free(last) else None
        if chosen is None and residuals is not None:
            chosen = next(filter(free, residuals().nearest(item)), None)
        if chosen is None and policy is not Collisions.SINKHORN:
            raise full(item)
        group = (*prefix, last if chosen is None else chosen)
        if breaks:
            numbers = taken.setdefault(group, set())
            group = (*group, next(number for number in range(largest_group) if number not in numbers))
        taken.setdefault(group[:-1], set()).add(group[-1])
        placed[item] = group
    return placed


def _sharing(
    codes: Int[np.ndarray, "items level"], others: Int[np.ndarray, "n code"], levels: int
) -> Int[np.ndarray, " rows"]:
    """Rows that share their first `levels` codes with one of `others`, found by hash (there may be a few more)."""
    factors = np.random.default_rng(0).integers(1 << 62, size=levels, dtype=np.int64).astype(np.uint64) | np.uint64(1)

    def hashed(of: np.ndarray) -> np.ndarray:
        return (of[:, :levels].astype(np.uint64) * factors[None]).sum(axis=1, dtype=np.uint64)

    return np.flatnonzero(np.isin(hashed(codes), hashed(others)))
