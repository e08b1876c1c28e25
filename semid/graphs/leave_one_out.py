"""An item graph's distributions on its own training histories, each without that history's counts.

With them, a generator would be taught the very transitions to its training targets.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from semid.data import Histories
from semid.graphs.item_graph import ItemGraph
from semid.graphs.ranking import normalized
from semid.graphs.transitions import content_edges, pruned_edges, row_blocks, scaled_by_degree, spreading_matrix

# Edges per item from which a history's counts are subtracted, as a multiple of those that the graph keeps.
_WIDTH_FACTOR = 2
# Positions whose distributions are computed at once.
_POSITIONS = 1 << 13


class LeaveOneOutGraph:
    """Distributions of the next item at every position of training histories, without the history's own transitions.

    Exact among the `2 width` largest edges of each item; but an item counts as new only if no history holds it, not
    even this one. Without `repeats`, or if items do not repeat in the graph, those of the history so far get 0.
    """

    def __init__(self, graph: ItemGraph, *, repeats: bool = True) -> None:
        config, counts, self._repeats = graph.config, graph.counts, graph.repeats and repeats
        self._config, self._loops, self._num_items = config, graph.repeats, len(graph.item_ids)
        content = None if graph.vectors is None else content_edges(graph.vectors, config)
        self._spreading = None if content is None else spreading_matrix(counts, content, config)
        parts = []
        for block in row_blocks(counts, config):
            near = None if content is None else content[block]
            parts.append(pruned_edges(counts[block], self._spreading, near, config, width=_WIDTH_FACTOR * config.width))
        self._edges = sparse.vstack([edges for edges, _ in parts], format="csr")
        self._degrees = np.concatenate([degrees for _, degrees in parts])

    def distributions(self, histories: Histories) -> Iterator[tuple[slice, sparse.csr_array]]:
        """For blocks of positions of `histories.flat()`: distributions [positions, items] of the item after each."""
        bounds = np.concatenate([[0], np.cumsum(histories.lengths)])
        start = 0
        while start < len(histories):
            end = max(int(np.searchsorted(bounds, bounds[start] + _POSITIONS, side="right")) - 1, start + 1)
            if bounds[end] > bounds[start]:
                yield slice(bounds[start], bounds[end]), self._block(histories.take(slice(start, end)))
            start = end

    def _block(self, histories: Histories) -> sparse.csr_array:
        items, owner = histories.flat()
        own = self._own_counts(items, owner)
        if self._spreading is not None:
            own = own + own @ self._spreading
        rest = sparse.csr_array(self._edges[items] - own)
        rest.data[rest.data < 1e-5] = 0  # negative where the edge was pruned, or what rounding leaves
        rest.eliminate_zeros()
        degrees = np.maximum(self._degrees[items] - np.asarray(own.sum(axis=1)), 0)
        weights = (self._config.recency ** np.arange(self._config.window)).astype(np.float32)
        scores = _weights_by_age(owner, weights) @ scaled_by_degree(rest, degrees, self._config)
        return normalized(scores.tocsr() if self._repeats else self._without_seen(scores.tocsr(), items, owner))

    def _own_counts(self, items: Int[np.ndarray, " n"], owner: Int[np.ndarray, " n"]) -> sparse.csr_array:
        """Counts [positions, items] that each history has added to the rows of its items."""
        shape, config = (len(items), self._num_items), self._config
        own = sparse.csr_array(shape, dtype=np.float32)
        for distance in range(1, min(config.window, len(items) - 1) + 1):
            pair = owner[:-distance] == owner[distance:]
            if not self._loops:
                pair &= items[:-distance] != items[distance:]
            earlier = np.flatnonzero(pair)
            later = earlier + distance
            place = np.concatenate([earlier, later])
            other = np.concatenate([items[later], items[earlier]])
            weight = np.repeat([1, config.backward], len(earlier)) * config.decay ** (distance - 1)
            own = own + sparse.coo_array((weight.astype(np.float32), (place, other)), shape=shape).tocsr()
        # Where an item stands at several positions of the history, subtract at each what all of them have added.
        same = sparse.coo_array(_equal_places(items, owner), shape=(len(items), len(items))).tocsr()
        return (same @ own).tocsr()

    def _without_seen(
        self, scores: sparse.csr_array, items: Int[np.ndarray, " n"], owner: Int[np.ndarray, " n"]
    ) -> sparse.csr_array:
        """Scores without those of the history's items up to each position."""
        ones = np.ones(len(items), np.float32)
        items_at = sparse.csr_array((ones, items, np.arange(len(items) + 1)), shape=scores.shape)
        seen = _weights_by_age(owner, ones) @ items_at
        rest = sparse.csr_array(scores - scores.multiply(seen > 0))
        rest.eliminate_zeros()
        return rest


def _weights_by_age(owner: Int[np.ndarray, " n"], weights: Float[np.ndarray, " ages"]) -> sparse.csr_array:
    """Weights [positions, positions] of the positions of its history up to each position, by their age."""
    at, places, values = [], [], []
    for age, weight in enumerate(weights):
        later = np.flatnonzero(owner[age:] == owner[: len(owner) - age]) + age
        if not len(later):
            break
        at.append(later)
        places.append(later - age)
        values.append(np.full(len(later), weight, np.float32))
    shape = (len(owner), len(owner))
    entries = (np.concatenate(values), (np.concatenate(at), np.concatenate(places)))
    return sparse.coo_array(entries, shape=shape).tocsr()


def _equal_places(items: Int[np.ndarray, " n"], owner: Int[np.ndarray, " n"]) -> tuple[np.ndarray, tuple]:
    """Ones at the pairs of positions of one history that hold the same item."""
    _, group = np.unique(np.stack([owner, items]), axis=1, return_inverse=True)
    groups = sparse.coo_array((np.ones(len(items), np.float32), (np.arange(len(items)), group.ravel()))).tocsr()
    pairs = (groups @ groups.T).tocoo()
    return pairs.data, pairs.coords
