"""`ItemKNN`: items by the similarity of their users, the oldest of collaborative recommenders (Sarwar et al., 2001)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from scipy import sparse

from semid.data import Dataset, Histories
from semid.graphs.cooccurrence import interactions_matrix
from semid.graphs.ranking import BATCH, best_items, by_popularity, without_history
from semid.graphs.transitions import pruned, scaled_rows


@dataclass(frozen=True, eq=False)
class ItemKNN:
    """Scores an item by the sum of its cosines with the items of the history, among the nearest of each.

    The cosine is that of the sets of users that have had the two. It is a `Ranker` for `semid.evaluate`. Where
    `repeats` is false, items of the history are never recommended.
    """

    item_ids: pa.Array
    similarity: sparse.csr_array
    """Cosines [items, items], those of each item's nearest alone."""
    train_counts: Int[np.ndarray, " items"]
    repeats: bool

    codes: ClassVar[None] = None
    tie_break: ClassVar[bool] = False

    @classmethod
    def fit(cls, dataset: Dataset, *, neighbors: int = 100) -> ItemKNN:
        """Find the nearest `neighbors` of every item by training interactions."""
        train, users = dataset.splits.train, dataset.num_users
        taken = interactions_matrix(train, num_items=dataset.num_items, num_users=users)
        counts = np.asarray(taken.sum(axis=0)).ravel()
        scale = np.where(counts > 0, counts, 1) ** -0.5
        cosines = sparse.csr_array(scaled_rows(sparse.csr_array(taken.T @ taken), scale) @ sparse.diags_array(scale))
        cosines.setdiag(0)
        popularity = train.popularity(dataset.num_items).astype(np.int64)
        return cls(dataset.item_ids, pruned(cosines, neighbors), popularity, bool(dataset.repeats.repeated))

    def rank(self, histories: Histories, *, k: int, exclude_seen: bool = False) -> Int[np.ndarray, "n k"]:
        """The `k` best item rows for each history, then the most popular; -1 where there are fewer."""
        popular, leave_out = by_popularity(self.train_counts), exclude_seen or not self.repeats
        lists = [np.zeros((0, k), np.int32)]
        for start in range(0, len(histories), BATCH):
            part = histories.take(slice(start, start + BATCH))
            items, owner = part.flat()
            shape = (len(part), len(self.item_ids))
            taken = sparse.coo_array((np.ones(len(items), np.float32), (owner, items)), shape=shape).tocsr()
            scores = sparse.csr_array((taken > 0).astype(np.float32) @ self.similarity)
            seen = part if leave_out else None
            scores = scores if seen is None else without_history(scores, seen)
            lists.append(best_items(scores, k=k, popular=popular, seen=seen))
        return np.concatenate(lists)
