"""Baselines without parameters to train: popularity and item bigram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from semid.data import Histories
from semid.evaluation.metrics import in_history, repeated


@dataclass(frozen=True)
class Popularity:
    """Items by training interactions, most first, equal counts by item row: the same list for everybody."""

    item_ids: pa.Array
    order: Int[np.ndarray, " items"]
    codes: ClassVar[None] = None
    tie_break: ClassVar[bool] = False

    @classmethod
    def fit(cls, train: Histories, item_ids: pa.Array) -> Popularity:
        """Count the training interactions; `item_ids` by item row."""
        return cls(item_ids, _by_popularity(train, len(item_ids)))

    def rank(self, histories: Histories, *, k: int, exclude_seen: bool = False) -> Int[np.ndarray, "n k"]:
        """The `k` most popular item rows for each history, -1 where there are fewer."""
        popular = self.order[: k + _most_seen(histories, exclude_seen)]
        candidates = np.broadcast_to(popular, (len(histories), len(popular)))
        unwanted = in_history(candidates, histories) if exclude_seen else np.zeros(candidates.shape, bool)
        return _first_wanted(candidates, unwanted, k)


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
    codes: ClassVar[None] = None
    tie_break: ClassVar[bool] = False

    @classmethod
    def fit(cls, train: Histories, item_ids: pa.Array) -> Bigram:
        """Count which item follows which in the training histories; `item_ids` by item row."""
        num_items, order = len(item_ids), _by_popularity(train, len(item_ids))
        items, owner = train.flat()
        follows = owner[1:] == owner[:-1]
        keys = items[:-1][follows].astype(np.int64) * num_items + items[1:][follows]
        pairs, counts = np.unique(keys, return_counts=True)
        previous, following = pairs // num_items, pairs % num_items
        best_first = np.lexsort((np.argsort(order)[following], -counts, previous))
        bounds = np.searchsorted(previous, np.arange(num_items + 1))
        return cls(item_ids, order, following[best_first].astype(np.int32), bounds)

    def rank(self, histories: Histories, *, k: int, exclude_seen: bool = False) -> Int[np.ndarray, "n k"]:
        """The `k` best item rows for each history, -1 where there are fewer."""
        reach = k + _most_seen(histories, exclude_seen)  # that many candidates leave k after the seen ones are gone
        following = self._following(histories, reach)
        popular = self.order[:reach]
        candidates = np.hstack([following, np.broadcast_to(popular, (len(histories), len(popular)))])
        unwanted = repeated(candidates) | (candidates < 0)
        if exclude_seen:
            unwanted |= in_history(candidates, histories)
        return _first_wanted(candidates, unwanted, k)

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


def _most_seen(histories: Histories, exclude_seen: bool) -> int:
    return int(histories.lengths.max(initial=0)) if exclude_seen else 0


def _first_wanted(
    candidates: Int[np.ndarray, "n m"], unwanted: Bool[np.ndarray, "n m"], k: int
) -> Int[np.ndarray, "n k"]:
    """The first `k` candidates of each row that are wanted, in their order, -1 where there are fewer."""
    order = np.argsort(unwanted, axis=1, kind="stable")[:, :k]
    best = np.where(np.take_along_axis(unwanted, order, axis=1), -1, np.take_along_axis(candidates, order, axis=1))
    ranked = np.full((len(candidates), k), -1, np.int32)
    ranked[:, : best.shape[1]] = best
    return ranked
