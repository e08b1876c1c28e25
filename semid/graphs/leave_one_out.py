"""An item graph's distributions on its own training histories, without what it counted in each of them.

Asked as it is, it would teach back the very pairs that it has counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from semid.data import Histories
from semid.graphs.item_graph import ItemGraph
from semid.graphs.ranking import normalized
from semid.graphs.transitions import content_edges, passed_on, pruned_edges, row_blocks, scaled_by_degree

# An item's edges of which a history's own counts are taken out: so many times as many as the graph keeps.
_SPARE = 2
# Positions whose distributions are computed at once.
_POSITIONS = 1 << 13


class LeaveOneOutGraph:
    """The next item's distribution at every position of training histories, a history's own transitions taken out.

    Exact among the `2 width` largest edges of each item; items are new that no history holds, this one included.
    Without `repeats`, or where nothing repeats in the graph, no item of the history up to a position comes next.
    """

    def __init__(self, graph: ItemGraph, *, repeats: bool = True) -> None:
        config, counts, self._repeats = graph.config, graph.counts, graph.repeats and repeats
        self._config, self._loops, self._num_items = config, graph.repeats, len(graph.item_ids)
        content = None if graph.vectors is None else content_edges(graph.vectors, config)
        self._passed = None if content is None else passed_on(counts, content, config)
        parts = []
        for block in row_blocks(counts, config):
            own = None if content is None else content[block]
            parts.append(pruned_edges(counts[block], self._passed, own, config, width=_SPARE * config.width))
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
        if self._passed is not None:
            own = own + own @ self._passed
        rest = sparse.csr_array(self._edges[items] - own)
        rest.data[rest.data < 1e-5] = 0  # own counts of edges that are not kept; and what rounding leaves
        rest.eliminate_zeros()
        degrees = np.maximum(self._degrees[items] - np.asarray(own.sum(axis=1)), 0)
        weights = (self._config.recency ** np.arange(self._config.window)).astype(np.float32)
        scores = _backward(owner, weights) @ scaled_by_degree(rest, degrees, self._config)
        return normalized(scores.tocsr() if self._repeats else self._unseen(scores.tocsr(), items, owner))

    def _own_counts(self, items: Int[np.ndarray, " n"], owner: Int[np.ndarray, " n"]) -> sparse.csr_array:
        """The part that each history has added to the row of each of its items, [positions, items]."""
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
        # An item that stands in the history more than once: each place takes out what all of them have added.
        same = sparse.coo_array(_equal_places(items, owner), shape=(len(items), len(items))).tocsr()
        return (same @ own).tocsr()

    def _unseen(
        self, scores: sparse.csr_array, items: Int[np.ndarray, " n"], owner: Int[np.ndarray, " n"]
    ) -> sparse.csr_array:
        """The scores of items that do not stand in the history up to the position."""
        held = sparse.csr_array((np.ones(len(items), np.float32), items, np.arange(len(items) + 1)), shape=scores.shape)
        seen = _backward(owner, np.ones(len(owner), np.float32)) @ held
        rest = sparse.csr_array(scores - scores.multiply(seen > 0))
        rest.eliminate_zeros()
        return rest


def _backward(owner: Int[np.ndarray, " n"], weights: Float[np.ndarray, " ages"]) -> sparse.csr_array:
    """Weights [positions, positions], by age, of the items of its history up to each position."""
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
