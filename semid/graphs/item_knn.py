"""Rankers of items near those of a history: by users in common (`ItemKNN`), or by vectors (`VectorKNN`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from scipy import sparse

from quantizers import unit_vectors
from semid.data import Allowed, Dataset, Histories
from semid.errors import SemidError
from semid.graphs.cooccurrence import interactions_matrix
from semid.graphs.lightgcn import GraphConfig
from semid.graphs.ranking import BATCH, ItemRanker, best_items, largest, without_history
from semid.graphs.transitions import pruned, scaled_rows

# Scores of items after histories that are computed at once.
_SCORES = 1 << 24


@dataclass(frozen=True, eq=False)
class ItemKNN(ItemRanker):
    """Item kNN, the oldest of collaborative recommenders (Sarwar et al., 2001).

    Scores an item by the sum of its cosines with the history's items, over the nearest of each. The cosine is that of
    the sets of users who have had the two items.
    """

    similarity: sparse.csr_array
    """Cosines [items, items] of each item with its nearest, else 0."""

    @classmethod
    def fit(cls, dataset: Dataset, *, neighbors: int = 100) -> ItemKNN:
        """Find the nearest `neighbors` (1 or more) of every item by training interactions."""
        if neighbors < 1:
            raise SemidError(f"expected neighbors of at least 1, got {neighbors}")
        train, users = dataset.splits.train, dataset.num_users
        matrix = interactions_matrix(train, num_items=dataset.num_items, num_users=users)
        counts = np.asarray(matrix.sum(axis=0)).ravel()
        scale = np.where(counts > 0, counts, 1) ** -0.5
        cosines = sparse.csr_array(scaled_rows(sparse.csr_array(matrix.T @ matrix), scale) @ sparse.diags_array(scale))
        cosines.setdiag(0)
        return cls(**_ranker_fields(dataset), similarity=pruned(cosines, neighbors))

    def rank(
        self, histories: Histories, *, k: int, exclude_seen: bool = False, allowed: Allowed = None
    ) -> Int[np.ndarray, "n k"]:
        """The `k` best item rows for each history, then the most popular; -1 where there are fewer."""
        leave_out, lists = exclude_seen or not self.repeats, [np.zeros((0, k), np.int32)]
        for part, masks in self._blocks(histories, allowed):
            items, owner = part.flat()
            shape = (len(part), len(self.item_ids))
            counts = sparse.coo_array((np.ones(len(items), np.float32), (owner, items)), shape=shape).tocsr()
            scores = sparse.csr_array((counts > 0).astype(np.float32) @ self.similarity)
            seen = part if leave_out else None
            scores = scores if seen is None else without_history(scores, seen)
            lists.append(best_items(scores, k=k, popular=self._popular, seen=seen, allowed=masks))
        return np.concatenate(lists)


@dataclass(frozen=True, eq=False)
class VectorKNN(ItemRanker):
    """Scores an item by the cosine of its vector with the mean of the history's vectors.

    With content vectors this is content kNN, with a signal's the signal as a recommender.
    """

    vectors: Float[np.ndarray, "items dim"]

    @classmethod
    def fit(cls, dataset: Dataset, vectors: Float[np.ndarray, "items dim"]) -> VectorKNN:
        """Rank the dataset's items by these vectors."""
        return cls(**_ranker_fields(dataset), vectors=vectors.astype(np.float32))

    def rank(
        self, histories: Histories, *, k: int, exclude_seen: bool = False, allowed: Allowed = None
    ) -> Int[np.ndarray, "n k"]:
        """The `k` best item rows for each history, ties by popularity; -1 where there are fewer."""

        def scores(part: Histories) -> Float[np.ndarray, "n items"]:
            items, owner = part.flat()
            sums = np.zeros((len(part), self.vectors.shape[1]), np.float32)
            np.add.at(sums, owner, self.vectors[items])
            return np.asarray(unit_vectors(sums)) @ self._unit.T

        return _rank_by_scores(self, scores, histories, k=k, exclude_seen=exclude_seen, allowed=allowed)

    @functools.cached_property
    def _unit(self) -> Float[np.ndarray, "items dim"]:
        return np.asarray(unit_vectors(self.vectors))


@dataclass(frozen=True, eq=False)
class UserItemVectors(ItemRanker):
    """Scores an item by the inner product of its vector with the user's: LightGCN and its kin.

    It ranks for the users that it was trained on, found by their ids.
    """

    user_ids: pa.Array
    items: Float[np.ndarray, "items dim"]
    users: Float[np.ndarray, "users dim"]

    @classmethod
    def fit(cls, dataset: Dataset, config: GraphConfig, *, seed: int) -> UserItemVectors:
        """Train on the dataset's training histories."""
        vectors = config.vectors(dataset, seed=seed)
        return cls(**_ranker_fields(dataset), user_ids=dataset.users, items=vectors.items, users=vectors.users)

    def rank(
        self, histories: Histories, *, k: int, exclude_seen: bool = False, allowed: Allowed = None
    ) -> Int[np.ndarray, "n k"]:
        """The `k` best item rows for the user of each history, ties by popularity; -1 where there are fewer.

        Raises SemidError for a history of none of the users.
        """
        if len(rows := np.flatnonzero((histories.users < 0) | (histories.users >= len(self.users)))):
            raise SemidError(
                f"expected histories of the {len(self.users):,} users that these vectors were trained on, and "
                f"{len(rows):,} of {len(histories):,} are of none, the first of them history {rows[0]}; train on a "
                "dataset with these users, or rank by histories (VectorKNN)"
            )

        def scores(part: Histories) -> Float[np.ndarray, "n items"]:
            return self.users[part.users] @ self.items.T

        return _rank_by_scores(self, scores, histories, k=k, exclude_seen=exclude_seen, allowed=allowed)


def _ranker_fields(dataset: Dataset) -> dict[str, Any]:
    """Fields of an `ItemRanker` for this dataset."""
    return {
        "item_ids": dataset.item_ids,
        "train_counts": dataset.splits.train.popularity(dataset.num_items).astype(np.int64),
        "repeats": dataset.repeats.common,
        "dataset": dataset.digest,
    }


def _rank_by_scores(
    ranker: ItemRanker,
    scores: Callable[[Histories], Float[np.ndarray, "n items"]],
    histories: Histories,
    *,
    k: int,
    exclude_seen: bool,
    allowed: Allowed,
) -> Int[np.ndarray, "n k"]:
    """The `k` allowed items of the largest scores, those of the history left out; ties by popularity."""
    order, lists = ranker._popular, [np.full((0, k), -1, np.int32)]
    size = max(min(BATCH, _SCORES // max(len(order), 1)), 1)
    for part, masks in ranker._blocks(histories, allowed, size=size):
        table = scores(part)
        if exclude_seen or not ranker.repeats:
            items, owner = part.flat()
            table[owner, items] = -np.inf
        if masks is not None:
            table = np.where(masks, table, -np.inf)
        table = table[:, order]
        best = largest(table, k)
        rows = np.where(np.isneginf(np.take_along_axis(table, best, axis=1)), -1, order[best])
        lists.append(np.pad(rows, ((0, 0), (0, k - best.shape[1])), constant_values=-1).astype(np.int32))
    return np.concatenate(lists)
