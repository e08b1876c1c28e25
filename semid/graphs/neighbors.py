"""Nearest neighbors by cosine: exact, or among the lists of the nearest centers where items are many."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from semid.errors import SemidError

# All pairs are compared up to this many vectors.
_EXACT = 50_000
# Lists per square root of the vectors, and lists to search; k-means on this many vectors per list, for so many rounds.
_LISTS, _PROBES, _SAMPLE, _ROUNDS = 2, 24, 32, 4
# Columns whose maximum is computed first.
_STRIPE = 32


def neighbors(vectors: Float[np.ndarray, "n dim"], *, k: int, block: int = 1024) -> Int[np.ndarray, "n k"]:
    """`k` other rows of highest cosine, best first, -1 where there are fewer; ties in no particular order.

    Zero vectors have no neighbors and are nobody's. Memory is `block` rows of the similarity table at a time. Beyond
    50,000 vectors only those of the 24 nearest of `2 sqrt(n)` lists are compared (an inverted file, Sivic & Zisserman,
    ICCV 2003), which misses some of the farther neighbors.
    """
    if k < 1 or block < 1:
        raise SemidError(f"expected k and block of 1 or more, got {k} and {block}")
    norms = np.linalg.norm(vectors, axis=1)
    nonzero = np.flatnonzero(norms > 0)
    unit = (vectors[nonzero] / norms[nonzero, None]).astype(np.float32)
    nearest_unit = _all_pairs(unit, k, block) if len(unit) <= _EXACT else _by_lists(unit, k, block)
    nearest = np.full((len(vectors), k), -1, np.int32)
    nearest[nonzero] = np.where(nearest_unit >= 0, nonzero[nearest_unit], -1)
    return nearest


def neighbor_overlap(one: Float[np.ndarray, "n _"], other: Float[np.ndarray, "n _"], *, k: int = 20) -> float:
    """Share of the `k` nearest neighbors that a row has in both spaces, a mean over rows that have any in both."""
    first, second = neighbors(one, k=k), neighbors(other, k=k)
    rows = np.flatnonzero((first[:, 0] >= 0) & (second[:, 0] >= 0))
    if not len(rows):
        return 0.0
    common = [len(np.intersect1d(first[row], second[row][second[row] >= 0])) for row in rows]
    return float(np.mean(common / (first[rows] >= 0).sum(axis=1)))


def _all_pairs(unit: Float[np.ndarray, "n dim"], k: int, block: int) -> Int[np.ndarray, "n k"]:
    everything = np.arange(len(unit))
    blocks = (everything[first : first + block] for first in range(0, len(unit), block))
    return np.concatenate(
        [np.zeros((0, k), np.int32), *(_nearest(unit, rows, everything, k, _largest) for rows in blocks)]
    )


def _by_lists(unit: Float[np.ndarray, "n dim"], k: int, block: int) -> Int[np.ndarray, "n k"]:
    """Each list's members against the members of the lists whose centers are nearest to its own."""
    centers = _centers(unit, round(_LISTS * len(unit) ** 0.5))
    own = np.concatenate([np.argmax(unit[i : i + block] @ centers.T, axis=1) for i in range(0, len(unit), block)])
    # Equal vectors give equal centers, which are each other's nearest and all but one without members: drop these.
    used, sizes = np.unique(own, return_counts=True)
    centers, members = centers[used], np.split(np.argsort(own, kind="stable"), np.cumsum(sizes)[:-1])
    nearest = np.full((len(unit), k), -1, np.int32)
    for center, of_list in enumerate(members):
        probes = np.argsort(-(centers @ centers[center]))[:_PROBES]
        candidates = np.concatenate([members[probe] for probe in probes])
        for first in range(0, len(of_list), block):
            rows = of_list[first : first + block]
            nearest[rows] = _nearest(unit, rows, candidates, k, _largest_by_stripes)
    return nearest


def _centers(unit: Float[np.ndarray, "n dim"], number: int) -> Float[np.ndarray, "lists dim"]:
    """Spherical k-means on a sample; a center without members stays where it is."""
    sample = unit[np.random.default_rng(0).permutation(len(unit))[: _SAMPLE * number]]
    centers = sample[:number].copy()
    for _ in range(_ROUNDS):
        own = np.argmax(sample @ centers.T, axis=1)
        order = np.argsort(own, kind="stable")
        used, first = np.unique(own[order], return_index=True)
        centers[used] = np.add.reduceat(sample[order], first, axis=0)
        centers /= np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return centers


def _nearest(
    unit: Float[np.ndarray, "n dim"],
    rows: Int[np.ndarray, " r"],
    candidates: Int[np.ndarray, " c"],
    k: int,
    largest: Callable[[Float[np.ndarray, "r c"], int], Int[np.ndarray, "r m"]],
) -> Int[np.ndarray, "r k"]:
    """The `k` candidates nearest to each row other than itself, -1 where there are fewer."""
    similarity = unit[rows] @ unit[candidates].T
    order = np.argsort(candidates, kind="stable")
    own = order[np.minimum(np.searchsorted(candidates, rows, sorter=order), len(order) - 1)]
    itself = np.flatnonzero(candidates[own] == rows)
    similarity[itself, own[itself]] = -np.inf
    width = min(k, len(candidates))
    best = largest(similarity, width)
    values = np.take_along_axis(similarity, best, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    best, values = (np.take_along_axis(x, order, axis=1) for x in (best, values))
    nearest = np.where(np.isneginf(values), -1, candidates[best])
    return np.pad(nearest, ((0, 0), (0, k - width)), constant_values=-1).astype(np.int32)


def _largest(values: Float[np.ndarray, "r c"], k: int) -> Int[np.ndarray, "r k"]:
    """Columns of the `k` largest values of each row, in no particular order."""
    return np.argpartition(values, values.shape[1] - k, axis=1)[:, -k:]


def _largest_by_stripes(values: Float[np.ndarray, "r c"], k: int) -> Int[np.ndarray, "r k"]:
    """`_largest`, faster, but for the choice among equals: they lie in the `k` stripes of columns with the largest
    maxima."""
    number = values.shape[1] // _STRIPE
    if number <= k:
        return _largest(values, k)
    whole = number * _STRIPE
    maxima = values[:, :whole].reshape(-1, _STRIPE, number).max(axis=1)
    stripes = _largest(maxima, k)[:, None] + number * np.arange(_STRIPE)[:, None]
    rest = np.broadcast_to(np.arange(whole, values.shape[1]), (len(values), values.shape[1] - whole))
    columns = np.concatenate([stripes.reshape(len(values), -1), rest], axis=1)
    best = _largest(np.take_along_axis(values, columns, axis=1), k)
    return np.take_along_axis(columns, best, axis=1)
