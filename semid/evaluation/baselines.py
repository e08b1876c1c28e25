"""Baselines without parameters to train: popularity and item bigram."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from semid.data import Allowed, Histories, as_masks
from semid.evaluation.metrics import in_history, repeated

# Candidates per block.
_CANDIDATES = 1 << 22


@dataclass(frozen=True)
class Popularity:
    """Items by number of training interactions, ties by item row: the same list for every history."""

    item_ids: pa.Array
    order: Int[np.ndarray, " items"]
    repeats: bool = True
    """Items of the history may be recommended."""
    codes: ClassVar[None] = None
    tie_break: ClassVar[bool] = False

    @classmethod
    def fit(cls, train: Histories, item_ids: pa.Array, *, repeats: bool = True) -> Popularity:
        """Count the training interactions; `item_ids` by item row."""
        return cls(item_ids, _by_popularity(train, len(item_ids)), repeats)

    def rank(
        self, histories: Histories, *, k: int, exclude_seen: bool = False, allowed: Allowed = None
    ) -> Int[np.ndarray, "n k"]:
        """The `k` most popular item rows for each history, -1 where there are fewer; `allowed` is as in `evaluate`."""
        return _rank(self, histories, k, exclude_seen, allowed)

    def _only(self, allowed: Bool[np.ndarray, " items"]) -> Popularity:
        """The same of these items alone."""
        return replace(self, order=self.order[allowed[self.order]])

    def _candidates(self, histories: Histories, reach: int) -> Int[np.ndarray, "n m"]:
        """The first `reach` items, best first."""
        popular = self.order[:reach]
        return np.broadcast_to(popular, (len(histories), len(popular)))


@dataclass(frozen=True)
class Bigram:
    """Items by how often they came right after the history's last item in training, then by popularity.

    `successors[bounds[i]:bounds[i + 1]]` are the items that followed item `i`, most often first, ties by popularity.
    An item that nothing followed, and an empty history, get the popularity order.
    """

    item_ids: pa.Array
    order: Int[np.ndarray, " items"]
    successors: Int[np.ndarray, " pairs"]
    bounds: Int[np.ndarray, " bounds"]
    repeats: bool = True
    """Items of the history may be recommended."""
    codes: ClassVar[None] = None
    tie_break: ClassVar[bool] = False

    @classmethod
    def fit(cls, train: Histories, item_ids: pa.Array, *, repeats: bool = True) -> Bigram:
        """Count which item follows which in the training histories; `item_ids` by item row."""
        num_items, order = len(item_ids), _by_popularity(train, len(item_ids))
        items, owner = train.flat()
        follows = owner[1:] == owner[:-1]
        keys = items[:-1][follows].astype(np.int64) * num_items + items[1:][follows]
        pairs, counts = np.unique(keys, return_counts=True)
        previous, following = pairs // num_items, pairs % num_items
        best_first = np.lexsort((np.argsort(order)[following], -counts, previous))
        bounds = np.searchsorted(previous, np.arange(num_items + 1))
        return cls(item_ids, order, following[best_first].astype(np.int32), bounds, repeats)

    def rank(
        self, histories: Histories, *, k: int, exclude_seen: bool = False, allowed: Allowed = None
    ) -> Int[np.ndarray, "n k"]:
        """The `k` best item rows for each history, -1 where there are fewer; `allowed` is as in `evaluate`."""
        return _rank(self, histories, k, exclude_seen, allowed)

    def _only(self, allowed: Bool[np.ndarray, " items"]) -> Bigram:
        """The baseline restricted to these items."""
        order, kept = self.order[allowed[self.order]], allowed[self.successors]
        bounds = np.concatenate([[0], np.cumsum(kept)])[self.bounds]
        return replace(self, order=order, successors=self.successors[kept], bounds=bounds)

    def _candidates(self, histories: Histories, reach: int) -> Int[np.ndarray, "n m"]:
        """The first `reach` successors and then the first popular items, with repeats and -1."""
        popular = self.order[:reach]
        following = self._following(histories, reach)
        return np.hstack([following, np.broadcast_to(popular, (len(histories), len(popular)))])

    def _following(self, histories: Histories, reach: int) -> Int[np.ndarray, "n m"]:
        """The first `reach` successors of each history's last item, -1 where there are fewer."""
        some = histories.lengths > 0
        last = histories.items[histories.ends[some] - 1]
        start, end = np.zeros((2, len(histories)), np.int64)
        start[some], end[some] = self.bounds[last], self.bounds[last + 1]
        at = start[:, None] + np.arange(min(reach, (end - start).max(initial=0)))
        real = at < end[:, None]
        following = np.full(at.shape, -1, np.int32)
        following[real] = self.successors[at[real]]
        return following


def _by_popularity(train: Histories, num_items: int) -> Int[np.ndarray, " items"]:
    counts = train.popularity(num_items)
    return np.argsort(-counts, kind="stable").astype(np.int32)


def _rank(
    model: Popularity | Bigram, histories: Histories, k: int, exclude_seen: bool, allowed: Allowed
) -> Int[np.ndarray, "n k"]:
    """The first `k` allowed candidates of each history. A common mask restricts the baseline itself; masks per history,
    and histories that are left out, need more candidates."""
    num_items, exclude_seen = len(model.item_ids), exclude_seen or not model.repeats
    masks = None if allowed is None else as_masks(allowed, num_items=num_items, num_histories=len(histories))
    if masks is not None and len(masks) == 1:
        model, masks = model._only(masks[0]), None
    reach = np.full(len(histories), k) + (histories.lengths if exclude_seen else 0)
    reach = np.minimum(reach if masks is None else reach + num_items - masks.sum(axis=1), num_items)
    ranked = np.full((len(histories), k), -1, np.int32)
    for rows in _blocks(reach):
        some = histories.take(rows)
        candidates = model._candidates(some, int(reach[rows[-1]]))
        unwanted = repeated(candidates) | (candidates < 0)
        if exclude_seen:
            unwanted |= in_history(candidates, some)
        if masks is not None:
            unwanted |= ~masks[rows[:, None], candidates]
        ranked[rows] = _first_wanted(candidates, unwanted, k)
    return ranked


def _blocks(reach: Int[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " m"]]:
    """Blocks of histories with a bounded number of candidates, sorted by how many candidates they need."""
    order = np.argsort(reach, kind="stable")
    while len(order):
        candidates = reach[order] * np.arange(1, len(order) + 1)
        size = max(int(np.searchsorted(candidates, _CANDIDATES, side="right")), 1)
        yield order[:size]
        order = order[size:]


def _first_wanted(
    candidates: Int[np.ndarray, "n m"], unwanted: Bool[np.ndarray, "n m"], k: int
) -> Int[np.ndarray, "n k"]:
    """The first `k` wanted candidates of each row, in order, padded with -1."""
    order = np.argsort(unwanted, axis=1, kind="stable")[:, :k]
    best = np.where(np.take_along_axis(unwanted, order, axis=1), -1, np.take_along_axis(candidates, order, axis=1))
    ranked = np.full((len(candidates), k), -1, np.int32)
    ranked[:, : best.shape[1]] = best
    return ranked
