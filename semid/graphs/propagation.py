"""Sums over neighbors on the graphs of users, items and content: linear and symmetric, so their own transposes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import sparse

from semid.graphs.neighbors import neighbors

_WIDTH = 8  # neighbors per row of the graph: summing gathered columns is several times faster than a scatter of edges


class Graph(NamedTuple):
    """A sparse matrix, most often `D^-1/2 A D^-1/2`: row `r` adds at most 8 weighted neighbors to node `nodes[r]`."""

    nodes: Int[Array, " rows"]
    neighbors: Int[Array, "rows width"]
    weights: Float[Array, "rows width"]


def make_graph(interactions: sparse.csr_array, *, rows: int = 0) -> Graph:
    """Graph of a binary [users, items] matrix: nodes are the users, then the items. See `normalized_graph`."""
    adjacency = sparse.block_array([[None, interactions], [interactions.T, None]], format="csr")
    return normalized_graph(adjacency, rows=rows)


def content_graph(content: Float[np.ndarray, "items dim"], k: int) -> Graph:
    """Graph of each item's `k` nearest by cosine, unweighted and made symmetric: FREEDOM's frozen graph."""
    one_way = nearest_matrix(content, k)
    return normalized_graph(one_way.maximum(one_way.T).tocsr())


def nearest_matrix(content: Float[np.ndarray, "items dim"], k: int) -> sparse.csr_array:
    """1 where the column's item is among the `k` nearest of the row's by cosine."""
    nearest = neighbors(content, k=k)
    rows, places = np.nonzero(nearest >= 0)
    entries = (np.ones(len(rows), np.float32), (rows, nearest[rows, places]))
    return sparse.coo_array(entries, shape=(len(content),) * 2).tocsr()


def normalized_graph(adjacency: sparse.csr_array, *, rows: int = 0) -> Graph:
    """`D^-1/2 A D^-1/2` of a symmetric matrix, D its row sums; at least `rows` rows, so that shapes stay the same."""
    sums = np.asarray(adjacency.sum(axis=1, dtype=np.float64)).reshape(-1)
    scale = 1 / np.sqrt(np.maximum(sums, 1)).astype(np.float32)
    nodes = np.repeat(np.arange(len(sums)), np.diff(adjacency.indptr))
    weights = scale[nodes] * scale[adjacency.indices] * adjacency.data.astype(np.float32)
    scaled = sparse.csr_array((weights, adjacency.indices, adjacency.indptr), shape=adjacency.shape)
    return weighted_graph(scaled, rows=rows)


def weighted_graph(adjacency: sparse.csr_array, *, rows: int = 0) -> Graph:
    """Graph of a sparse matrix as it is, with at least `rows` rows."""
    degrees = np.diff(adjacency.indptr)
    used = -(-degrees // _WIDTH)
    nodes = np.repeat(np.arange(len(degrees)), used)
    nth = np.arange(len(nodes)) - (np.cumsum(used) - used)[nodes]
    at = (adjacency.indptr[nodes] + nth * _WIDTH)[:, None] + np.arange(_WIDTH)
    real = at < adjacency.indptr[nodes + 1][:, None]
    neighbors = np.where(real, adjacency.indices[np.where(real, at, 0)], 0)
    weights = np.where(real, adjacency.data[np.where(real, at, 0)], 0).astype(np.float32)
    free = ((0, max(rows - len(nodes), 0)), (0, 0))
    padded = np.pad(nodes, free[0], constant_values=len(degrees) - 1)
    return Graph(
        jnp.asarray(padded, jnp.int32),
        jnp.asarray(np.pad(neighbors, free), jnp.int32),
        jnp.asarray(np.pad(weights, free)),
    )


def propagate(x: Float[Array, "nodes dim"], graph: Graph, *, layers: int) -> Float[Array, "nodes dim"]:
    """Mean of `x` after 0 to `layers` rounds of propagation (equations 3 and 4, all layers weighted alike)."""
    total = x
    for _ in range(layers):
        x = propagate_once(x, graph)
        total += x
    return total / (layers + 1)


def propagate_once(x: Float[Array, "n dim"], graph: Graph, *, nodes: int | None = None) -> Float[Array, "nodes dim"]:
    """The matrix times `x`; `nodes`: the matrix's rows, where it is not square."""
    known = "promise_in_bounds"  # no clamping: it would cost as much as the sum
    columns = range(graph.neighbors.shape[1])
    sums = sum(graph.weights[:, c, None] * x.at[graph.neighbors[:, c]].get(mode=known) for c in columns)
    return jax.ops.segment_sum(sums, graph.nodes, num_segments=nodes or len(x), indices_are_sorted=True, mode=known)


class Hyperedges(NamedTuple):
    """Sets of users and of items that propagate over a node that they share (MMHCL, arXiv 2504.16576).

    Users propagate over the items that they have had: `D^-1/2 (R R^T - diag) D^-1/2`, from users to items and back.
    Items propagate over content neighborhoods, each of an item and its nearest: the normalized `H H^T`.
    """

    to_items: Graph
    """`R^T`, unweighted."""
    to_users: Graph
    """`R`."""
    counts: Float[Array, " users"]
    """Items that a user has had, the diagonal of `R R^T`."""
    scale: Float[Array, " users"]
    content: Graph


def hyperedges(interactions: sparse.csr_array, content: Float[np.ndarray, "items dim"], k: int) -> Hyperedges:
    """Hyperedges of a binary [users, items] matrix, and of each item's `k` nearest by cosine."""
    counts = np.diff(interactions.indptr).astype(np.float64)
    others = interactions @ np.bincount(interactions.indices, minlength=interactions.shape[1]) - counts
    near = nearest_matrix(content, k) + sparse.eye_array(len(content), format="csr", dtype=np.float32)
    return Hyperedges(
        weighted_graph(interactions.T.tocsr()),
        weighted_graph(interactions),
        jnp.asarray(counts, jnp.float32),
        jnp.asarray(1 / np.sqrt(np.maximum(others, 1)), jnp.float32),
        normalized_graph((near.T @ near).tocsr()),
    )


def propagate_hyperedges(x: Float[Array, "nodes dim"], edges: Hyperedges, *, layers: int) -> Float[Array, "nodes dim"]:
    """Vectors after `layers` rounds, users among users and items among items: linear and symmetric as well."""
    num_users = len(edges.counts)
    for _ in range(layers):
        users = edges.scale[:, None] * x[:num_users]
        had = propagate_once(users, edges.to_items, nodes=len(x) - num_users)
        users = propagate_once(had, edges.to_users, nodes=num_users) - edges.counts[:, None] * users
        items = propagate_once(x[num_users:], edges.content)
        x = jnp.concatenate([edges.scale[:, None] * users, items])
    return x
