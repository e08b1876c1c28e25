"""Baselines without parameters to train: popularity and item bigram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from semid.data import Histories, as_masks
from semid.evaluation.metrics import in_history, repeated

Allowed = Bool[np.ndarray, " items"] | Bool[np.ndarray, "n items"] | None


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

    def rank(
        self, histories: Histories, *, k: int, exclude_seen: bool = False, allowed: Allowed = None
    ) -> Int[np.ndarray, "n k"]:
        """The `k` most popular item rows for each history, -1 where there are fewer; `allowed` is as in `evaluate`."""
        left_out = _LeftOut.of(histories, len(self.order), exclude_seen, allowed)
        popular = self.order[: k + left_out.most]
        candidates = np.broadcast_to(popular, (len(histories), len(popular)))
        return _first_wanted(candidates, left_out.among(candidates), k)


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

    def rank(
        self, histories: Histories, *, k: int, exclude_seen: bool = False, allowed: Allowed = None
    ) -> Int[np.ndarray, "n k"]:
        """The `k` best item rows for each history, -1 where there are fewer; `allowed` is as in `evaluate`."""
        left_out = _LeftOut.of(histories, len(self.order), exclude_seen, allowed)
        reach = k + left_out.most
        following = self._following(histories, reach)
        popular = self.order[:reach]
        candidates = np.hstack([following, np.broadcast_to(popular, (len(histories), len(popular)))])
        unwanted = repeated(candidates) | (candidates < 0) | left_out.among(candidates)
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


@dataclass(frozen=True)
class _LeftOut:
    """Items that may not be recommended to each history."""

    seen: Histories | None
    masks: Bool[np.ndarray, "masks items"] | None

    @classmethod
    def of(cls, histories: Histories, num_items: int, exclude_seen: bool, allowed: Allowed) -> _LeftOut:
        many = len(histories)
        masks = None if allowed is None else as_masks(allowed, num_items=num_items, num_histories=many)
        return cls(histories if exclude_seen else None, masks)

    @property
    def most(self) -> int:
        """Most of them for one history: so many more candidates leave enough."""
        seen = 0 if self.seen is None else int(self.seen.lengths.max(initial=0))
        return seen + (0 if self.masks is None else int((~self.masks).sum(axis=1).max(initial=0)))

    def among(self, candidates: Int[np.ndarray, "n m"]) -> Bool[np.ndarray, "n m"]:
        unwanted = np.zeros(candidates.shape, bool) if self.seen is None else in_history(candidates, self.seen)
        return unwanted if self.masks is None else unwanted | ~np.take_along_axis(self.masks, candidates, axis=1)


def _first_wanted(
    candidates: Int[np.ndarray, "n m"], unwanted: Bool[np.ndarray, "n m"], k: int
) -> Int[np.ndarray, "n k"]:
    """The first `k` candidates of each row that are wanted, in their order, -1 where there are fewer."""
    order = np.argsort(unwanted, axis=1, kind="stable")[:, :k]
    best = np.where(np.take_along_axis(unwanted, order, axis=1), -1, np.take_along_axis(candidates, order, axis=1))
    ranked = np.full((len(candidates), k), -1, np.int32)
    ranked[:, : best.shape[1]] = best
    return ranked
