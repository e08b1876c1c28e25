"""Lists of items by sparse scores, filled up with the most popular; and the base class of item rankers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from scipy import sparse

from semid.data import Allowed, Histories, as_masks
from semid.graphs.transitions import pruned, scaled_rows

# Histories whose scores are computed at once.
BATCH = 1024


@dataclass(frozen=True, eq=False)
class ItemRanker:
    """Base of rankers of items after histories, ties by popularity: a `Ranker` for `semid.evaluate`."""

    item_ids: pa.Array
    train_counts: Int[np.ndarray, " items"]
    """Number of interactions per item."""
    repeats: bool
    """Items repeat in the histories that it was fitted to; if not, it recommends no item of the history."""
    dataset: str
    """Digest of the dataset that it was fitted to; empty: not known."""

    codes: ClassVar[None] = None
    tie_break: ClassVar[bool] = False

    @functools.cached_property
    def _popular(self) -> Int[np.ndarray, " items"]:
        return by_popularity(self.train_counts)

    def _blocks(
        self, histories: Histories, allowed: Allowed, *, size: int = BATCH
    ) -> Iterator[tuple[Histories, Bool[np.ndarray, "masks items"] | None]]:
        """Blocks of `size` histories, each with the one mask for all, or one per history."""
        num_items = len(self.item_ids)
        masks = None if allowed is None else as_masks(allowed, num_items=num_items, num_histories=len(histories))
        for start in range(0, len(histories), size):
            block = slice(start, start + size)
            yield histories.take(block), masks if masks is None or len(masks) == 1 else masks[block]


def best_items(
    scores: sparse.csr_array,
    *,
    k: int,
    popular: Int[np.ndarray, " items"],
    seen: Histories | None = None,
    allowed: Bool[np.ndarray, "masks items"] | None = None,
) -> Int[np.ndarray, "n k"]:
    """The `k` items of the largest positive scores of each row, then the first of `popular`; -1 where there are fewer.

    Popularity adds no item of the history of the same index in `seen`. Only items that are `allowed` (one mask for all,
    or one per row) are listed.
    """
    if allowed is not None:
        owner = np.repeat(np.arange(scores.shape[0]), np.diff(scores.indptr))
        scores.data[~np.broadcast_to(allowed, scores.shape)[owner, scores.indices]] = 0
    best = pruned(scores, k)
    places = np.arange(k) < np.diff(best.indptr)[:, None]
    ranked = np.full((scores.shape[0], k), -1, np.int32)
    ranked[places] = best.indices
    if allowed is not None and len(allowed) == 1:
        popular, allowed = popular[allowed[0][popular]], None
    for row in map(int, np.flatnonzero(~places[:, -1])):  # few: histories that no edges lead far from
        found = ranked[row][places[row]]
        history = popular[:0] if seen is None else seen[row]
        order = popular if allowed is None else popular[allowed[row][popular]]
        near = order[: k + len(found) + len(history)]
        more = near[~np.isin(near, np.concatenate([found, history]))][: k - len(found)]
        ranked[row, len(found) : len(found) + len(more)] = more
    return ranked


def largest(scores: Float[np.ndarray, "n items"], k: int) -> Int[np.ndarray, "n k"]:
    """Columns of the `k` largest scores of each row (all, where there are fewer), largest first, ties by column.

    Entries below a row's k-th largest are never sorted.
    """
    if k >= scores.shape[1]:
        return np.argsort(-scores, axis=1, kind="stable")
    thresholds = -np.partition(-scores, k - 1, axis=1)[:, k - 1]
    rows, columns = np.nonzero(~(scores < thresholds[:, None]))  # NaN comes last, as by argsort
    order = np.lexsort((columns, -scores[rows, columns], rows))
    rows, columns = rows[order], columns[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, np.arange(len(scores)))[rows]
    return columns[place < k].reshape(len(scores), k)


def by_popularity(counts: Int[np.ndarray, " items"]) -> Int[np.ndarray, " items"]:
    """Item rows by descending count, ties by row."""
    return np.argsort(-counts, kind="stable").astype(np.int32)


def without_history(scores: sparse.csr_array, histories: Histories) -> sparse.csr_array:
    """Scores without those of the histories' items."""
    items, owner = histories.flat()
    seen = sparse.coo_array((np.ones(len(items), np.float32), (owner, items)), shape=scores.shape).tocsr()
    rest = sparse.csr_array(scores - scores.multiply(seen > 0))
    rest.eliminate_zeros()
    return rest


def normalized(scores: sparse.csr_array) -> sparse.csr_array:
    """Rows that sum to one, or have no entry."""
    total: Float[np.ndarray, " n"] = np.asarray(scores.sum(axis=1))
    return scaled_rows(scores, 1 / np.where(total > 0, total, 1))
