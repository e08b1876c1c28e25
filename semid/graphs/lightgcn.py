"""LightGCN: item and user vectors from training histories by propagation on the graph of users and their items.

He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation", arXiv 2002.02126. Nodes
are the users, then the items. Propagation is linear and symmetric, so it is its own transpose: the gradient with
respect to the ego embeddings is the propagated gradient with respect to the final ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from scipy import sparse

from semid.data import Dataset, Histories
from semid.errors import SemidError
from semid.graphs.cooccurrence import interactions_matrix
from semid.graphs.signals import Signal
from semid.progress import show_progress

_WIDTH = 8  # neighbors per row of the graph: summing gathered columns is several times faster than a scatter of edges


@dataclass(frozen=True)
class LightGCNConfig(Signal):
    """Item vectors of LightGCN: sizes and optimization."""

    dim: int = 64
    layers: int = 3
    """Rounds of propagation; the final vectors are the mean over 0 to `layers` rounds."""
    epochs: int = 10
    batch_size: int = 4096
    """Interactions per step, each with one random item as negative; fewer where there are fewer interactions."""
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    """Weight of half the squared norm of a batch's ego embeddings, a mean over its interactions."""
    name = "lightgcn"

    def __post_init__(self) -> None:
        for name in ("dim", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise SemidError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.layers < 0 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise SemidError(
                "expected layers of 0 or more, learning_rate above 0 and weight_decay of 0 or more, "
                f"got {self.layers}, {self.learning_rate} and {self.weight_decay}"
            )

    def item_vectors(self, dataset: Dataset, *, seed: int) -> Float[np.ndarray, "items signal"]:
        histories, items, users = dataset.splits.train, dataset.num_items, dataset.num_users
        return train_lightgcn(histories, num_items=items, num_users=users, config=self, seed=seed).items


class LightGCN(NamedTuple):
    """Final item and user vectors; the score of an item for a user is their inner product."""

    items: Float[np.ndarray, "items dim"]
    users: Float[np.ndarray, "users dim"]


class Graph(NamedTuple):
    """Normalized adjacency `D^-1/2 A D^-1/2`: row `r` adds up to 8 weighted neighbors into node `nodes[r]`."""

    nodes: Int[Array, " rows"]
    neighbors: Int[Array, "rows width"]
    weights: Float[Array, "rows width"]


def train_lightgcn(
    histories: Histories, *, num_items: int, num_users: int, config: LightGCNConfig = LightGCNConfig(), seed: int
) -> LightGCN:
    """Train LightGCN on the different (user, item) pairs of the training histories.

    Nodes without any get zero vectors. Deterministic by seed on one machine. Raises SemidError without any interaction.
    """
    matrix = interactions_matrix(histories, num_items=num_items, num_users=num_users)
    graph = make_graph(matrix)
    users, items = (jnp.asarray(index, jnp.int32) for index in matrix.tocoo().coords)
    key, start_key = jax.random.split(jax.random.key(seed))
    ego = 0.1 * jax.random.normal(start_key, (num_users + num_items, config.dim))
    optimizer = optax.adam(config.learning_rate)
    state = (ego, optimizer.init(ego))
    with show_progress("training LightGCN", total=config.epochs, unit="epochs") as progress:
        progress.say("compiling ...")
        for epoch in range(config.epochs):
            epoch_key = jax.random.fold_in(key, epoch)
            state = _epoch(state, graph, users, items, epoch_key, num_users=num_users, config=config)
            jax.block_until_ready(state)
            progress.advance(epoch + 1)
    final = np.asarray(_propagated(state[0], graph, layers=config.layers))
    final = np.where(_degrees(matrix)[:, None] > 0, final, np.float32(0))
    return LightGCN(items=final[num_users:], users=final[:num_users])


def make_graph(interactions: sparse.csr_array) -> Graph:
    """Graph of a binary [users, items] matrix: nodes are the users, then the items."""
    adjacency = sparse.block_array([[None, interactions], [interactions.T, None]], format="csr")
    degrees = np.diff(adjacency.indptr)
    scale = 1 / np.sqrt(np.maximum(degrees, 1)).astype(np.float32)
    rows = -(-degrees // _WIDTH)
    nodes = np.repeat(np.arange(len(degrees)), rows)
    nth = np.arange(len(nodes)) - (np.cumsum(rows) - rows)[nodes]
    at = (adjacency.indptr[nodes] + nth * _WIDTH)[:, None] + np.arange(_WIDTH)
    real = at < adjacency.indptr[nodes + 1][:, None]
    neighbors = np.where(real, adjacency.indices[np.where(real, at, 0)], 0)
    weights = np.where(real, scale[nodes][:, None] * scale[neighbors], np.float32(0))
    return Graph(jnp.asarray(nodes, jnp.int32), jnp.asarray(neighbors, jnp.int32), jnp.asarray(weights))


def propagate(x: Float[Array, "nodes dim"], graph: Graph, *, layers: int) -> Float[Array, "nodes dim"]:
    """Mean of `x` after 0 to `layers` rounds of propagation (equations 3 and 4, all layers weighted alike)."""
    total = x
    for _ in range(layers):
        x = _one_round(x, graph)
        total += x
    return total / (layers + 1)


def _one_round(x: Float[Array, "nodes dim"], graph: Graph) -> Float[Array, "nodes dim"]:
    known = "promise_in_bounds"  # no clamping: it would cost as much as the sum
    columns = range(graph.neighbors.shape[1])
    sums = sum(graph.weights[:, c, None] * x.at[graph.neighbors[:, c]].get(mode=known) for c in columns)
    return jax.ops.segment_sum(sums, graph.nodes, num_segments=len(x), indices_are_sorted=True, mode=known)


_propagated = jax.jit(propagate, static_argnames="layers")


def bpr_loss(final: Float[Array, "nodes dim"], triples: Int[Array, "n 3"]) -> Float[Array, ""]:
    """Mean of `-log sigmoid(user . item - user . negative)` over (user, item, negative) nodes (equation 15)."""
    user, item, negative = jnp.moveaxis(final[triples], 1, 0)
    return -jax.nn.log_sigmoid((user * (item - negative)).sum(-1)).mean()


def ego_norm(ego: Float[Array, "nodes dim"], triples: Int[Array, "n 3"]) -> Float[Array, ""]:
    """Half the squared norm of the three ego embeddings, a mean over the triples."""
    return 0.5 * jnp.square(ego[triples]).sum((1, 2)).mean()


_State = tuple[Array, optax.OptState]


@partial(jax.jit, static_argnames=("num_users", "config"), donate_argnums=0)
def _epoch(
    state: _State,
    graph: Graph,
    users: Int[Array, " n"],
    items: Int[Array, " n"],
    key: PRNGKeyArray,
    *,
    num_users: int,
    config: LightGCNConfig,
) -> _State:
    """One pass over the shuffled interactions in equal batches (what is left over waits for the next shuffle)."""
    optimizer = optax.adam(config.learning_rate)
    order_key, negative_key = jax.random.split(key)
    size = min(config.batch_size, len(users))
    steps = len(users) // size
    order = jax.random.permutation(order_key, len(users))[: steps * size]
    # A negative may be one of the user's own items: at the density of recommendation data too rarely to matter.
    negatives = jax.random.randint(negative_key, order.shape, num_users, len(state[0]), jnp.int32)
    triples = jnp.stack([users[order], num_users + items[order], negatives], -1).reshape(steps, size, 3)

    def step(state: _State, triples: Int[Array, "n 3"]) -> tuple[_State, None]:
        ego, moments = state
        gradient = jax.grad(bpr_loss)(propagate(ego, graph, layers=config.layers), triples)
        gradient = propagate(gradient, graph, layers=config.layers)
        gradient += config.weight_decay * jax.grad(ego_norm)(ego, triples)
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction multiplies an integer count
            updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(ego, updates), moments), None

    return jax.lax.scan(step, state, triples)[0]


def _degrees(interactions: sparse.csr_array) -> Int[np.ndarray, " nodes"]:
    return np.concatenate(
        [np.diff(interactions.indptr), np.bincount(interactions.indices, minlength=interactions.shape[1])]
    )
