"""LightGCN and its kin: item and user vectors by propagation on the graph of users and their items, and on content's.

He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation", arXiv 2002.02126. Nodes
are the users, then the items. Propagation is linear and symmetric, so it is its own transpose: the gradient with
respect to the ego embeddings is the propagated gradient with respect to the final ones.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from scipy import sparse

from quantizers import info_nce, unit_rows
from semid.config import later_field
from semid.data import Dataset, Histories, Standardizer
from semid.errors import SemidError
from semid.graphs.cooccurrence import interactions_matrix
from semid.graphs.neighbors import neighbors
from semid.graphs.signals import Signal, vector_column
from semid.progress import show_progress

_CONTRAST_TEMPERATURE = 0.2
_WIDTH = 8  # neighbors per row of the graph: summing gathered columns is several times faster than a scatter of edges


class Objective(enum.Enum):
    """Loss of a step's (user, item, random item) triples."""

    BPR = "bpr"
    """The item's inner product with the user is to exceed the random item's."""
    BOOTSTRAP = "bootstrap"
    """BM3's, without negatives: linear predictions from a user, an item and its content are to equal each other's
    vectors, which have dropout and no gradient."""


@dataclass(frozen=True)
class GraphConfig(Signal):
    """Vectors of users and items, trained on the graph of who has had what: edges, propagation and loss.

    Final vectors are means over rounds of propagation; to an item's may be added those of its nearest by content, and
    its own. LightGCN is this with all defaults.
    """

    dim: int = 64
    layers: int = 3
    """Rounds of propagation; the final vectors are the mean over 0 to `layers` rounds."""
    epochs: int = 10
    batch_size: int = 4096
    """Interactions per step, each with one random item as negative; fewer where there are fewer interactions."""
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    """Weight of half the squared norm of a batch's ego embeddings, a mean over its interactions."""
    keep: float = later_field(1.0)
    """Share of the edges that an epoch propagates over, drawn anew, those of popular nodes less often (FREEDOM)."""
    neighbors: int = later_field(0)
    """Nearest items by content whose ego embeddings are added to an item's vector, normalized by degree; 0: none."""
    residual: bool = later_field(False)
    """Add an item's own ego embedding to its vector (BM3)."""
    objective: Objective = later_field(Objective.BPR)
    """Loss of a step."""
    dropout: float = later_field(0.3)
    """Of the bootstrap's targets."""
    contrast: float = later_field(0.0)
    """Weight of InfoNCE between final item vectors and projected content (RLMRec)."""
    column: str = later_field("")
    """Vector column of content; none given: the dataset's only one. It is read by neighbors, bootstrap and contrast."""

    def __post_init__(self) -> None:
        for name in ("dim", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise SemidError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.layers < 0 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise SemidError(
                "expected layers of 0 or more, learning_rate above 0 and weight_decay of 0 or more, "
                f"got {self.layers}, {self.learning_rate} and {self.weight_decay}"
            )
        if not (0 < self.keep <= 1 and 0 <= self.dropout < 1 and self.neighbors >= 0):
            raise SemidError(
                "expected keep above 0 up to 1, dropout of 0 to below 1 and neighbors of 0 or more, "
                f"got {self.keep}, {self.dropout} and {self.neighbors}"
            )

    @property
    def reads_content(self) -> bool:
        """Some part of it needs the column."""
        return bool(self.neighbors or self.contrast or self.objective is Objective.BOOTSTRAP)

    def item_vectors(self, dataset: Dataset, *, seed: int) -> Float[np.ndarray, "items signal"]:
        return self.vectors(dataset, seed=seed).items

    def vectors(self, dataset: Dataset, *, seed: int) -> GraphVectors:
        """Final vectors of the dataset's items and users."""
        content = vector_column(dataset, self.column)[1] if self.reads_content else None
        histories, items, users = dataset.splits.train, dataset.num_items, dataset.num_users
        return train_graph(histories, content, num_items=items, num_users=users, config=self, seed=seed)


@dataclass(frozen=True)
class LightGCNConfig(GraphConfig):
    """Item vectors of LightGCN: sizes and optimization."""

    name = "lightgcn"


@dataclass(frozen=True)
class FreedomConfig(GraphConfig):
    """FREEDOM: LightGCN on a part of the edges, and a frozen graph of content (Zhou & Shen, arXiv 2211.06924)."""

    layers: int = 2
    keep: float = 0.2
    neighbors: int = 10
    name = "freedom"


@dataclass(frozen=True)
class BM3Config(GraphConfig):
    """BM3: no negatives; content and neighbors predict each other (Zhou et al., arXiv 2207.05969)."""

    layers: int = 2
    residual: bool = True
    objective: Objective = Objective.BOOTSTRAP
    name = "bm3"


class GraphVectors(NamedTuple):
    """Final item and user vectors; the score of an item for a user is their inner product."""

    items: Float[np.ndarray, "items dim"]
    users: Float[np.ndarray, "users dim"]


class Edges(NamedTuple):
    """What a step propagates over: users with items, and items with items by content."""

    interactions: Graph
    content: Graph | None


class Heads(NamedTuple):
    """Linear maps that losses of content or without negatives train; None where none does."""

    content: Float[Array, "dim width"] | None
    predictor: Float[Array, "width width"] | None


class Graph(NamedTuple):
    """Normalized adjacency `D^-1/2 A D^-1/2`: row `r` adds up to 8 weighted neighbors into node `nodes[r]`."""

    nodes: Int[Array, " rows"]
    neighbors: Int[Array, "rows width"]
    weights: Float[Array, "rows width"]


def train_graph(
    histories: Histories,
    content: Float[np.ndarray, "items dim"] | None = None,
    *,
    num_items: int,
    num_users: int,
    config: GraphConfig = LightGCNConfig(),
    seed: int,
) -> GraphVectors:
    """Train on the different (user, item) pairs of the training histories, and on the items' content vectors.

    Nodes without any get zero vectors, but for items with content neighbors. Deterministic by seed on one machine.
    Raises SemidError without any interaction, and for content that is needed and absent.
    """
    title = type(config).__name__.removesuffix("Config")
    matrix = interactions_matrix(histories, num_items=num_items, num_users=num_users)
    if config.reads_content and content is None:
        raise SemidError(f"{title}: expected content vectors of the items, got none")
    nearest = content_graph(content, config.neighbors) if content is not None and config.neighbors else None
    features = jnp.asarray(Standardizer.fit([content])(content)) if content is not None else None
    users, items = (jnp.asarray(index, jnp.int32) for index in matrix.tocoo().coords)
    key, start_key = jax.random.split(jax.random.key(seed))
    ego = 0.1 * jax.random.normal(start_key, (num_users + num_items, config.dim))
    parameters = (ego, _heads(features, config, jax.random.fold_in(start_key, 1)))
    optimizer = optax.adam(config.learning_rate)
    state = (parameters, optimizer.init(parameters))
    edges, rng = Edges(make_graph(matrix), nearest), np.random.default_rng(seed)
    with show_progress(f"training {title}", total=config.epochs, unit="epochs") as progress:
        progress.say("compiling ...")
        for epoch in range(config.epochs):
            kept = edges if config.keep == 1 else _pruned(edges, matrix, config.keep, rng)
            epoch_key = jax.random.fold_in(key, epoch)
            state = _epoch(state, kept, users, items, features, epoch_key, num_users=num_users, config=config)
            jax.block_until_ready(state)
            progress.advance(epoch + 1)
    final = np.asarray(_final(state[0], edges, num_users=num_users, config=config))
    joined = _degrees(matrix) > 0
    if nearest is not None:
        joined[num_users:] = True
    final = np.where(joined[:, None], final, np.float32(0))
    return GraphVectors(items=final[num_users:], users=final[:num_users])


def _heads(features: Float[Array, "items dim"] | None, config: GraphConfig, key: PRNGKeyArray) -> Heads:
    """The maps that the config's loss trains, at their start."""
    bootstrap = config.objective is Objective.BOOTSTRAP
    mapped = features is not None and (bootstrap or config.contrast > 0)
    shape = (features.shape[1], config.dim) if mapped and features is not None else (1, 1)
    content = shape[0] ** -0.5 * jax.random.normal(key, shape)
    return Heads(content if mapped else None, jnp.eye(config.dim) if bootstrap else None)


def make_graph(interactions: sparse.csr_array, *, rows: int = 0) -> Graph:
    """Graph of a binary [users, items] matrix: nodes are the users, then the items. See `normalized_graph`."""
    adjacency = sparse.block_array([[None, interactions], [interactions.T, None]], format="csr")
    return normalized_graph(adjacency, rows=rows)


def content_graph(content: Float[np.ndarray, "items dim"], k: int) -> Graph:
    """Graph of the items' `k` nearest by cosine, made symmetric, all alike: FREEDOM's frozen graph."""
    nearest = neighbors(content, k=k)
    rows, places = np.nonzero(nearest >= 0)
    entries = (np.ones(len(rows), np.float32), (rows, nearest[rows, places]))
    one_way = sparse.coo_array(entries, shape=(len(content),) * 2).tocsr()
    return normalized_graph(one_way.maximum(one_way.T).tocsr())


def normalized_graph(adjacency: sparse.csr_array, *, rows: int = 0) -> Graph:
    """`D^-1/2 A D^-1/2` of a binary symmetric matrix, with at least so many rows, so that shapes stay."""
    degrees = np.diff(adjacency.indptr)
    scale = 1 / np.sqrt(np.maximum(degrees, 1)).astype(np.float32)
    used = -(-degrees // _WIDTH)
    nodes = np.repeat(np.arange(len(degrees)), used)
    nth = np.arange(len(nodes)) - (np.cumsum(used) - used)[nodes]
    at = (adjacency.indptr[nodes] + nth * _WIDTH)[:, None] + np.arange(_WIDTH)
    real = at < adjacency.indptr[nodes + 1][:, None]
    neighbors = np.where(real, adjacency.indices[np.where(real, at, 0)], 0)
    weights = np.where(real, scale[nodes][:, None] * scale[neighbors], np.float32(0))
    free = ((0, max(rows - len(nodes), 0)), (0, 0))
    padded = np.pad(nodes, free[0], constant_values=len(degrees) - 1)
    return Graph(
        jnp.asarray(padded, jnp.int32),
        jnp.asarray(np.pad(neighbors, free), jnp.int32),
        jnp.asarray(np.pad(weights, free)),
    )


def _pruned(edges: Edges, matrix: sparse.csr_array, keep: float, rng: np.random.Generator) -> Edges:
    """A share of the interactions, drawn without replacement by `1 / sqrt(d_u d_i)`, and normalized anew."""
    pairs, degrees = matrix.tocoo(), _degrees(matrix)
    users, items = pairs.coords
    log_weights = -0.5 * np.log(degrees[users].astype(np.float64) * degrees[matrix.shape[0] + items])
    size = max(round(keep * len(users)), 1)
    kept = np.argsort(-(log_weights + rng.gumbel(size=len(users))))[:size]
    drawn = sparse.coo_array((pairs.data[kept], (users[kept], items[kept])), shape=matrix.shape).tocsr()
    return edges._replace(interactions=make_graph(drawn, rows=len(edges.interactions.nodes)))


def propagated(
    ego: Float[Array, "nodes dim"], edges: Edges, *, num_users: int, config: GraphConfig
) -> Float[Array, "nodes dim"]:
    """Final vectors before any head: linear and symmetric, as `propagate` is."""
    final = propagate(ego, edges.interactions, layers=config.layers)
    if edges.content is not None:
        final = final.at[num_users:].add(_one_round(ego[num_users:], edges.content))
    return final.at[num_users:].add(ego[num_users:]) if config.residual else final


@partial(jax.jit, static_argnames=("num_users", "config"))
def _final(
    parameters: tuple[Float[Array, "nodes dim"], Heads], edges: Edges, *, num_users: int, config: GraphConfig
) -> Float[Array, "nodes dim"]:
    ego, heads = parameters
    final = propagated(ego, edges, num_users=num_users, config=config)
    return final if heads.predictor is None else final @ heads.predictor


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


def bpr_loss(final: Float[Array, "nodes dim"], triples: Int[Array, "n 3"]) -> Float[Array, ""]:
    """Mean of `-log sigmoid(user . item - user . negative)` over (user, item, negative) nodes (equation 15)."""
    user, item, negative = jnp.moveaxis(final[triples], 1, 0)
    return -jax.nn.log_sigmoid((user * (item - negative)).sum(-1)).mean()


def bootstrap_loss(
    final: Float[Array, "nodes dim"],
    triples: Int[Array, "n 3"],
    content: Float[Array, "n dim"],
    predictor: Float[Array, "dim dim"],
    key: PRNGKeyArray,
    *,
    dropout: float,
) -> Float[Array, ""]:
    """Mean of `1 - cos` between predictions of a user, an item and its content, and the vectors that they are to equal:
    the item, the user; and for the content the item and itself. Targets have dropout and no gradient."""
    users, items = final[triples[:, 0]], final[triples[:, 1]]
    targets = [
        jax.lax.stop_gradient(_dropped(vectors, jax.random.fold_in(key, place), rate=dropout))
        for place, vectors in enumerate((users, items, content))
    ]
    of_content = content @ predictor
    pairs = (
        (users @ predictor, targets[1]),
        (items @ predictor, targets[0]),
        (of_content, targets[1]),
        (of_content, targets[2]),
    )
    cosines = [(unit_rows(one) * unit_rows(other)).sum(-1).mean() for one, other in pairs]
    return len(pairs) - functools.reduce(jnp.add, cosines)


def _dropped(x: Float[Array, "n dim"], key: PRNGKeyArray, *, rate: float) -> Float[Array, "n dim"]:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def ego_norm(ego: Float[Array, "nodes dim"], triples: Int[Array, "n 3"]) -> Float[Array, ""]:
    """Half the squared norm of the three ego embeddings, a mean over the triples."""
    return 0.5 * jnp.square(ego[triples]).sum((1, 2)).mean()


_State = tuple[tuple[Array, Heads], optax.OptState]


@partial(jax.jit, static_argnames=("num_users", "config"), donate_argnums=0)
def _epoch(
    state: _State,
    edges: Edges,
    users: Int[Array, " n"],
    items: Int[Array, " n"],
    features: Float[Array, "items width"] | None,
    key: PRNGKeyArray,
    *,
    num_users: int,
    config: GraphConfig,
) -> _State:
    """One pass over the shuffled interactions in equal batches (what is left over waits for the next shuffle)."""
    optimizer = optax.adam(config.learning_rate)
    order_key, negative_key = jax.random.split(key)
    size = min(config.batch_size, len(users))
    steps = len(users) // size
    order = jax.random.permutation(order_key, len(users))[: steps * size]
    # A negative may be one of the user's own items: at the density of recommendation data too rarely to matter.
    negatives = jax.random.randint(negative_key, order.shape, num_users, len(state[0][0]), jnp.int32)
    triples = jnp.stack([users[order], num_users + items[order], negatives], -1).reshape(steps, size, 3)

    def loss(final: Float[Array, "nodes dim"], heads: Heads, triples: Int[Array, "n 3"], key: PRNGKeyArray) -> Array:
        content = None
        if heads.content is not None and features is not None:
            content = features[triples[:, 1] - num_users] @ heads.content
        if content is not None and heads.predictor is not None:
            value = bootstrap_loss(final, triples, content, heads.predictor, key, dropout=config.dropout)
        else:
            value = bpr_loss(final, triples)
        if content is not None and config.contrast:
            rows = triples[:, 1]
            value += config.contrast * info_nce(final[rows], content, ids=rows, temperature=_CONTRAST_TEMPERATURE)
        return value

    def step(state: _State, inputs: tuple[Int[Array, "n 3"], PRNGKeyArray]) -> tuple[_State, None]:
        ((ego, heads), moments), (triples, key) = state, inputs
        final = propagated(ego, edges, num_users=num_users, config=config)
        of_final, of_heads = jax.grad(loss, argnums=(0, 1))(final, heads, triples, key)
        gradient = propagated(of_final, edges, num_users=num_users, config=config)
        gradient += config.weight_decay * jax.grad(ego_norm)(ego, triples)
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction multiplies an integer count
            updates, moments = optimizer.update((gradient, of_heads), moments)
        return (optax.apply_updates((ego, heads), updates), moments), None

    keys = jax.random.split(jax.random.fold_in(key, 2), steps)
    return jax.lax.scan(step, state, (triples, keys))[0]


def _degrees(interactions: sparse.csr_array) -> Int[np.ndarray, " nodes"]:
    return np.concatenate(
        [np.diff(interactions.indptr), np.bincount(interactions.indices, minlength=interactions.shape[1])]
    )
