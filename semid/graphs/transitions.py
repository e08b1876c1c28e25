"""Weighted edges between items: transitions counted in histories, and neighbors by content.

Sparse matrices of item rows; an entry [i, j] is the weight of the edge from item i to item j.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from semid.config import check_range
from semid.data import Histories
from semid.errors import SemidError
from semid.graphs.neighbors import neighbors

# Bounds of what is computed at once: pairs of positions, and entries of the product of counts and content edges.
_PAIRS, _ENTRIES = 1 << 23, 1 << 24
# Default weights of items with content: of smoothed counts, of counts given to new items, and of content edges.
_SMOOTHING, _NEW_ITEMS, _CONTENT = 1.0, 1.0, 6.0


@dataclass(frozen=True)
class ItemGraphConfig:
    """Constants of an item graph `G = D^-a (C + tau C T + nu C N + kappa T)`, and weights of a history's items.

    `C` counts transitions, rows of `T` are weights of content neighbors that sum to one, and `D` are the row sums of
    the bracket. `C N` gives each new item, to which no transition leads, the mean count of its content neighbors:
    `N` is the transpose of `T` in the new items' columns, and zero elsewhere.
    """

    window: int = 20
    """Positions of a history within which one item leads to another."""
    decay: float = 0.65
    """Factor of a transition's weight per position of distance."""
    backward: float = 0.1
    """Weight of the reverse of each transition."""
    neighbors: int = 10
    """Number of content edges per item, to the nearest items by cosine of the content vectors."""
    temperature: float = 0.1
    """Divides the cosines before their softmax."""
    smoothing: float | None = None
    """tau: weight of the counts that also go to the content neighbors of the item that followed; none given: 1, or 0
    where the items have no vectors."""
    new_items: float | None = None
    """nu: weight of the counts that items without any get, the mean of their content neighbors'; none given: 1, or 0
    where the items have no vectors."""
    content: float | None = None
    """kappa: weight of the content edges, in transitions; none given: 6, or 0 where the items have no vectors."""
    degree_power: float = 0.5
    """a: power of its degree that an item's edges are divided by; 1 makes them probabilities."""
    recency: float = 0.5
    """Factor on the weight of a history's item for each item after it."""
    width: int = 64
    """Number of edges kept per item, the largest."""
    columns: tuple[str, ...] | None = None
    """Vector columns to find content neighbors by; none given: all of them; empty: no content."""

    def __post_init__(self) -> None:
        check_range(self, "window", "neighbors", "width", at_least=1)
        check_range(self, "decay", "backward", "degree_power", "recency", at_least=0, at_most=1)
        check_range(self, "smoothing", "new_items", "content", at_least=0)
        check_range(self, "temperature", above=0)

    def resolved(self, columns: Sequence[str]) -> ItemGraphConfig:
        """Fill in the defaults for items with these vector columns.

        Raises SemidError for a column that they lack, and for weights of content where they have none.
        """
        chosen = tuple(columns) if self.columns is None else self.columns
        if missing := [name for name in chosen if name not in columns]:
            raise SemidError(f"no vector column {missing[0]!r} for content edges; there are {list(columns) or 'none'}")
        if not chosen and (self.smoothing or self.new_items or self.content):
            raise SemidError(
                f"smoothing {self.smoothing}, new_items {self.new_items} and content {self.content} weigh content "
                "edges, and the items have no vectors; give a dataset with a vector column (`semid prepare` makes one "
                "of texts), or 0"
            )
        defaults = ((self.smoothing, _SMOOTHING), (self.new_items, _NEW_ITEMS), (self.content, _CONTENT))
        smoothing, new_items, content = (
            given if given is not None else default if chosen else 0.0 for given, default in defaults
        )
        return replace(self, columns=chosen, smoothing=smoothing, new_items=new_items, content=content)


def count_transitions(
    histories: Histories,
    config: ItemGraphConfig,
    *,
    num_items: int,
    loops: bool = False,
    new: Int[np.ndarray, " n"] | None = None,
) -> sparse.csr_array:
    """Float32[items, items]: `decay^(d - 1)` for each pair at distance d <= window, and `backward` times that reversed.

    `loops` counts pairs of an item with itself too. `new` is the number of each history's latest items that were not
    counted before: only pairs whose later item is one of them count. Memory is about three times that of the result.
    """
    counts = _forward_transitions(histories, config, num_items=num_items, loops=loops, new=new)
    if not config.backward:
        return counts
    backward = (config.backward * counts.T).tocsr()
    return (counts + backward).tocsr()


def _forward_transitions(
    histories: Histories,
    config: ItemGraphConfig,
    *,
    num_items: int,
    loops: bool,
    new: Int[np.ndarray, " n"] | None,
) -> sparse.csr_array:
    """Count transitions from earlier to later items."""
    items, owner = histories.flat()
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        raise SemidError(f"expected item rows of 0 to {num_items - 1} in histories, got {items.min()} to {items.max()}")
    is_new = np.ones(len(items), bool)
    if new is not None:
        is_new = np.arange(len(items)) >= (np.cumsum(histories.lengths) - new)[owner]
    window = min(config.window, max(int(histories.lengths.max(initial=0)) - 1, 0))
    steps = np.arange(1, window + 1)
    weight = (config.decay ** (steps - 1.0)).astype(np.float32)
    counts = sparse.csr_array((num_items, num_items), dtype=np.float32)
    size = max(_PAIRS // max(window, 1), 1)
    for start in range(0, len(items), size):
        at = np.arange(start, min(start + size, len(items)))
        later = at[:, None] + steps
        inside = later < len(items)
        later = np.minimum(later, len(items) - 1)
        pairs = inside & (owner[later] == owner[at][:, None]) & is_new[later]
        if not loops:
            pairs &= items[later] != items[at][:, None]
        source, target = items[at[np.nonzero(pairs)[0]]], items[later[pairs]]
        weights = np.broadcast_to(weight, pairs.shape)[pairs]
        counts = counts + sparse.coo_array((weights, (source, target)), shape=counts.shape).tocsr()
    return counts


def content_edges(vectors: Float[np.ndarray, "items dim"], config: ItemGraphConfig) -> sparse.csr_array:
    """Float32[items, items]: softmax of cosine over temperature among the nearest items; zero vectors have none."""
    nearest = neighbors(vectors, k=config.neighbors)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1)
    real = nearest >= 0
    cosines = np.full(nearest.shape, -np.inf, np.float32)
    for column in range(nearest.shape[1]):
        products = np.einsum("id,id->i", unit, unit[nearest[:, column]])
        cosines[:, column] = np.where(real[:, column], products, -np.inf)
    largest = np.where(real.any(axis=1), cosines.max(axis=1, initial=-np.inf), 0)[:, None]
    powers = np.exp((cosines - largest) / config.temperature)
    weights = powers / np.maximum(powers.sum(axis=1, keepdims=True), 1)
    source = np.repeat(np.arange(len(vectors)), real.sum(axis=1))
    shape = (len(vectors), len(vectors))
    return sparse.coo_array((weights[real], (source, nearest[real])), shape=shape).tocsr()


def spreading_matrix(
    counts: sparse.csr_array, content: sparse.csr_array, config: ItemGraphConfig
) -> sparse.csr_array | None:
    """`tau T + nu N`, by which the counts that lead to an item spread to others; None if it is zero.

    `counts` are those of all items.
    """
    new = np.asarray(counts.sum(axis=0)) == 0
    smoothing, new_items = config.smoothing or 0.0, config.new_items if config.new_items and new.any() else 0.0
    if not new_items:
        return smoothing * content if smoothing else None
    to_new = sparse.csr_array(sparse.diags_array(new.astype(np.float32)) @ content).T
    return (smoothing * content + new_items * to_new).tocsr()


def weighted_edges(
    counts: sparse.csr_array,
    spreading: sparse.csr_array | None,
    content: sparse.csr_array | None,
    config: ItemGraphConfig,
) -> sparse.csr_array:
    """`C + tau C T + nu C N + kappa T` for the rows of `counts` and `content`; see `spreading_matrix`."""
    edges = counts
    if spreading is not None:
        edges = edges + counts @ spreading
    if content is not None and config.content:
        edges = edges + config.content * content
    return sparse.csr_array(edges)


def pruned_edges(
    counts: sparse.csr_array,
    spreading: sparse.csr_array | None,
    content: sparse.csr_array | None,
    config: ItemGraphConfig,
    *,
    width: int | None = None,
) -> tuple[sparse.csr_array, Float[np.ndarray, " rows"]]:
    """The `width` (by default the config's) largest `weighted_edges` of each row, and the row sums before pruning."""
    edges = weighted_edges(counts, spreading, content, config)
    degrees = np.asarray(edges.sum(axis=1), np.float64)
    return pruned(edges, config.width if width is None else width), degrees


def scaled_by_degree(
    edges: sparse.csr_array, degrees: Float[np.ndarray, " rows"], config: ItemGraphConfig
) -> sparse.csr_array:
    """`D^-a` times the edges; rows of degree 0 stay as they are."""
    scale = np.where(degrees > 0, degrees, 1.0) ** -config.degree_power
    return scaled_rows(edges, scale)


def scaled_rows(matrix: sparse.csr_array, factors: Float[np.ndarray, " rows"]) -> sparse.csr_array:
    """Multiply each row by its factor; entries keep their order."""
    scaled = matrix.copy()
    scaled.data *= np.repeat(factors.astype(np.float32), np.diff(matrix.indptr))
    return scaled


def row_blocks(counts: sparse.csr_array, config: ItemGraphConfig) -> Iterator[slice]:
    """Blocks of rows whose weighted edges have a bounded number of entries."""
    entries = np.cumsum(np.diff(counts.indptr).astype(np.int64) * (1 + config.neighbors) + config.neighbors)
    start = 0
    while start < counts.shape[0]:
        before = entries[start - 1] if start else 0
        end = max(int(np.searchsorted(entries, before + _ENTRIES, side="right")), start + 1)
        yield slice(start, end)
        start = end


def pruned(matrix: sparse.csr_array, width: int) -> sparse.csr_array:
    """The `width` largest positive entries of each row, largest first, ties by column."""
    matrix = sparse.csr_array(matrix)
    owner = np.repeat(np.arange(matrix.shape[0], dtype=np.int32), np.diff(matrix.indptr))
    if (np.diff(matrix.indptr) > 4 * width).any():  # most entries of long rows need no sorting
        enough = matrix.data >= _row_thresholds(matrix, width)[owner]
    else:
        enough = np.ones(len(owner), bool)
    enough &= matrix.data > 0
    owner, columns, values = owner[enough], matrix.indices[enough], matrix.data[enough]
    order = np.lexsort((columns, -values, owner))
    owner, columns, values = owner[order], columns[order], values[order]
    place = np.arange(len(owner)) - np.searchsorted(owner, np.arange(matrix.shape[0]))[owner]
    kept = place < width
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner[kept], minlength=matrix.shape[0]))])
    return sparse.csr_array((values[kept], columns[kept], starts), shape=matrix.shape)


def _row_thresholds(matrix: sparse.csr_array, width: int) -> Float[np.ndarray, " rows"]:
    """Each row's `width`-th largest entry; 0 where it has fewer."""
    thresholds = np.zeros(matrix.shape[0], matrix.dtype)
    for row in np.flatnonzero(np.diff(matrix.indptr) > width):
        values = matrix.data[matrix.indptr[row] : matrix.indptr[row + 1]]
        thresholds[row] = np.partition(values, len(values) - width)[len(values) - width]
    return thresholds
