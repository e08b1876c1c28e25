"""LightGCN and its kin: item and user vectors by propagation on graphs of users' items and of content.

He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation", arXiv 2002.02126. Nodes
are the users, then the items. Propagation is linear and symmetric, so it is its own transpose: the gradient with
respect to the ego embeddings is the propagated gradient with respect to the final ones.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from scipy import sparse

from quantizers import unit_rows
from semid.config import check_range, later_field
from semid.data import Dataset, Histories
from semid.errors import SemidError
from semid.graphs.cooccurrence import interactions_matrix
from semid.graphs.losses import bootstrap_loss, bpr_loss, content_contrast, ego_norm, uniform_loss, view_contrast
from semid.graphs.propagation import (
    Graph,
    Hyperedges,
    content_graph,
    hyperedges,
    make_graph,
    propagate,
    propagate_hyperedges,
    propagate_once,
)
from semid.graphs.signals import Signal, content_scale, has_content, standardize_content, vector_column
from semid.progress import show_progress


class TripleLoss(enum.Enum):
    """Loss of a step's (user, item, random item) triples."""

    BPR = "bpr"
    """The user's inner product with the item is to exceed that with the random item."""
    BOOTSTRAP = "bootstrap"
    """BM3's, without negatives: a user, an item and its content each predict others' vectors by a linear map; targets
    have dropout and no gradient."""
    UNIFORM = "uniform"
    """CM3's, without negatives: users and their items lie near each other on the sphere, users and items far from
    others; items of like content repel each other less."""


@dataclass(frozen=True)
class GraphConfig(Signal):
    """Vectors of users and items, trained on the graph of their interactions: edges, propagation and loss.

    Final vectors are means over rounds of propagation. To an item's, the embeddings of its content neighbors and its
    own may be added. The defaults are LightGCN.
    """

    dim: int = 64
    """Dimensions of the vectors."""
    layers: int = 3
    """Rounds of propagation; the final vectors are the mean over 0 to `layers` rounds."""
    epochs: int = 10
    """Passes over the interactions."""
    batch_size: int = 4096
    """Interactions per step, each with one random item as negative; fewer where there are fewer interactions."""
    learning_rate: float = 1e-2
    """Learning rate of Adam."""
    weight_decay: float = 1e-4
    """Weight of half the squared norm of a batch's ego embeddings, a mean over its interactions."""
    keep: float = later_field(1.0)
    """Share of the edges that an epoch propagates over, drawn again each epoch, those of popular nodes less often
    (FREEDOM)."""
    neighbors: int = later_field(0)
    """Nearest items by content whose ego embeddings are added to an item's vector, normalized by degree; 0: none."""
    residual: bool = later_field(False)
    """Add an item's own ego embedding to its vector (BM3)."""
    objective: TripleLoss = later_field(TripleLoss.BPR)
    """Loss of a step."""
    dropout: float = later_field(0.3)
    """Dropout of the targets (bootstrap alone)."""
    contrast: float = later_field(0.0)
    """Weight of InfoNCE between final item vectors and projected content (RLMRec), among at most 1024 of a step's
    interactions."""
    uniformity: float = later_field(0.5)
    """Weight of the uniformity, over at most 1024 of a step's interactions (uniform alone)."""
    hyperedges: int = later_field(0)
    """Nearest items in a content neighborhood, over which items propagate as users do over the items that they share.
    The result, from embeddings of its own and at unit length, is added to the final vectors (MMHCL). 0: none."""
    views: float = later_field(0.0)
    """Weight of InfoNCE between a node's vectors by edges and by hyperedges, among at most 1024 of a step's
    interactions."""
    column: str = later_field("")
    """Vector column of the content that the other settings read; none given: the dataset's only one."""

    def __post_init__(self) -> None:
        check_range(self, "dim", "epochs", "batch_size", at_least=1)
        check_range(self, "learning_rate", above=0)
        check_range(self, "keep", above=0, at_most=1)
        check_range(self, "dropout", at_least=0, below=1)
        check_range(self, "layers", "weight_decay", "neighbors", "hyperedges", at_least=0)
        check_range(self, "contrast", "uniformity", "views", at_least=0)
        if self.views and not self.hyperedges:
            raise SemidError("views contrast vectors by edges with those by hyperedges: give hyperedges too")

    @property
    def reads_content(self) -> bool:
        """Some setting needs the content column."""
        return bool(self.neighbors or self.contrast or self.hyperedges or self.objective is not TripleLoss.BPR)

    def item_vectors(self, dataset: Dataset, *, seed: int) -> Float[np.ndarray, "items signal"]:
        return self.vectors(dataset, seed=seed).items

    def lacks_content(self, dataset: Dataset) -> bool:
        of_losses = self.contrast or self.objective is not TripleLoss.BPR
        return bool(of_losses) and not has_content(vector_column(dataset, self.column)[1]).all()

    def vectors(self, dataset: Dataset, *, seed: int) -> GraphVectors:
        """Final vectors of the dataset's items and users. Raises SemidError for a column that nothing reads."""
        if self.column and not self.reads_content:
            raise SemidError(
                f"{type(self).__name__}: column {self.column!r} would not be read, as no setting needs content; "
                "give neighbors, contrast or hyperedges too, or leave column out"
            )
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
    objective: TripleLoss = TripleLoss.BOOTSTRAP
    name = "bm3"


@dataclass(frozen=True)
class MMHCLConfig(GraphConfig):
    """MMHCL: hyperedges among users and among items, contrasted with edges (Guo et al., arXiv 2504.16576)."""

    layers: int = 2
    hyperedges: int = 5
    views: float = 0.05
    name = "mmhcl"


@dataclass(frozen=True)
class CM3Config(GraphConfig):
    """CM3: alignment and calibrated uniformity on the sphere (Zhou et al., arXiv 2508.01226)."""

    neighbors: int = 10
    objective: TripleLoss = TripleLoss.UNIFORM
    name = "cm3"


class GraphVectors(NamedTuple):
    """Final item and user vectors; the score of an item for a user is their inner product."""

    items: Float[np.ndarray, "items dim"]
    users: Float[np.ndarray, "users dim"]


class TrainingEdges(NamedTuple):
    """Edges that a step propagates over: users with items, and items with items by content."""

    interactions: Graph
    content: Graph | None
    hyper: Hyperedges | None = None


class Heads(NamedTuple):
    """Linear maps that some losses train, of content and of predictions; None where no loss does."""

    content: Float[Array, "dim width"] | None
    predictor: Float[Array, "width width"] | None


class Parameters(NamedTuple):
    """Embeddings to propagate over edges, linear maps, and embeddings to propagate over hyperedges, if any."""

    ego: Float[Array, "nodes dim"]
    heads: Heads
    hyper: Float[Array, "nodes dim"] | None


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

    Nodes without interactions get zero vectors, except items with content if that is propagated. Items without content
    have rows of zeros in `content`, and no content loss counts them. Deterministic by seed on one machine.
    Raises SemidError without any interaction, and if content is needed and missing.
    """
    title = type(config).__name__.removesuffix("Config")
    matrix = interactions_matrix(histories, num_items=num_items, num_users=num_users)
    if config.reads_content and content is None:
        raise SemidError(f"{title}: expected content vectors of the items, got none")
    nearest = content_graph(content, config.neighbors) if content is not None and config.neighbors else None
    features, present = None, np.ones(num_items, bool)
    if content is not None:
        features, present = jnp.asarray(standardize_content(content, content_scale(content))), has_content(content)
    mask = None if present.all() else jnp.asarray(present)
    users, items = (jnp.asarray(index, jnp.int32) for index in matrix.tocoo().coords)
    key, start_key = jax.random.split(jax.random.key(seed))
    ego = 0.1 * jax.random.normal(start_key, (num_users + num_items, config.dim))
    hyper = 0.1 * jax.random.normal(jax.random.fold_in(start_key, 2), ego.shape) if config.hyperedges else None
    parameters = Parameters(ego, _heads(features, config, jax.random.fold_in(start_key, 1)), hyper)
    optimizer = optax.adam(config.learning_rate)
    state = (parameters, optimizer.init(parameters))
    sets = hyperedges(matrix, content, config.hyperedges) if content is not None and config.hyperedges else None
    edges, rng = TrainingEdges(make_graph(matrix), nearest, sets), np.random.default_rng(seed)
    with show_progress(f"training {title}", total=config.epochs, unit="epochs") as progress:
        progress.say("compiling ...")
        for epoch in range(config.epochs):
            drawn = edges if config.keep == 1 else _draw_edges(edges, matrix, config.keep, rng)
            epoch_key = jax.random.fold_in(key, epoch)
            state = _epoch(state, drawn, users, items, features, mask, epoch_key, num_users=num_users, config=config)
            jax.block_until_ready(state)
            progress.advance(epoch + 1)
    final = np.asarray(_final(state[0], edges, num_users=num_users, config=config))
    joined = _degrees(matrix) > 0
    if content is not None and (nearest is not None or sets is not None):
        joined[num_users:] |= present
    final = np.where(joined[:, None], final, np.float32(0))
    return GraphVectors(items=final[num_users:], users=final[:num_users])


def _heads(features: Float[Array, "items dim"] | None, config: GraphConfig, key: PRNGKeyArray) -> Heads:
    """Initialize the maps that the config's losses train."""
    bootstrap = config.objective is TripleLoss.BOOTSTRAP
    mapped = features is not None and (bootstrap or config.contrast > 0)
    shape = (features.shape[1], config.dim) if mapped and features is not None else (1, 1)
    content = shape[0] ** -0.5 * jax.random.normal(key, shape)
    return Heads(content if mapped else None, jnp.eye(config.dim) if bootstrap else None)


def _draw_edges(edges: TrainingEdges, matrix: sparse.csr_array, keep: float, rng: np.random.Generator) -> TrainingEdges:
    """Draw a share of the interactions without replacement, by weights `1 / sqrt(d_u d_i)`, and normalize again."""
    pairs, degrees = matrix.tocoo(), _degrees(matrix)
    users, items = pairs.coords
    log_weights = -0.5 * np.log(degrees[users].astype(np.float64) * degrees[matrix.shape[0] + items])
    size = max(round(keep * len(users)), 1)
    kept = np.argsort(-(log_weights + rng.gumbel(size=len(users))))[:size]
    drawn = sparse.coo_array((pairs.data[kept], (users[kept], items[kept])), shape=matrix.shape).tocsr()
    return edges._replace(interactions=make_graph(drawn, rows=len(edges.interactions.nodes)))


def propagated(
    ego: Float[Array, "nodes dim"], edges: TrainingEdges, *, num_users: int, config: GraphConfig
) -> Float[Array, "nodes dim"]:
    """Final vectors before any head: linear and symmetric, as `propagate` is."""
    final = propagate(ego, edges.interactions, layers=config.layers)
    if edges.content is not None:
        final = final.at[num_users:].add(propagate_once(ego[num_users:], edges.content))
    return final.at[num_users:].add(ego[num_users:]) if config.residual else final


@partial(jax.jit, static_argnames=("num_users", "config"))
def _final(
    parameters: Parameters, edges: TrainingEdges, *, num_users: int, config: GraphConfig
) -> Float[Array, "nodes dim"]:
    final = propagated(parameters.ego, edges, num_users=num_users, config=config)
    if parameters.hyper is not None and edges.hyper is not None:
        final += unit_rows(propagate_hyperedges(parameters.hyper, edges.hyper, layers=config.layers))
    return final if parameters.heads.predictor is None else final @ parameters.heads.predictor


_State = tuple[Parameters, optax.OptState]


@partial(jax.jit, static_argnames=("num_users", "config"), donate_argnums=0)
def _epoch(
    state: _State,
    edges: TrainingEdges,
    users: Int[Array, " n"],
    items: Int[Array, " n"],
    features: Float[Array, "items width"] | None,
    present: Bool[Array, " items"] | None,
    key: PRNGKeyArray,
    *,
    num_users: int,
    config: GraphConfig,
) -> _State:
    """One pass over the shuffled interactions in batches of equal size; a remainder is left out.

    `present`: items with content; None: all.
    """
    optimizer = optax.adam(config.learning_rate)
    order_key, negative_key = jax.random.split(key)
    size = min(config.batch_size, len(users))
    steps = len(users) // size
    order = jax.random.permutation(order_key, len(users))[: steps * size]
    # A negative may be one of the user's own items: at the density of recommendation data too rarely to matter.
    negatives = jax.random.randint(negative_key, order.shape, num_users, len(state[0].ego), jnp.int32)
    triples = jnp.stack([users[order], num_users + items[order], negatives], -1).reshape(steps, size, 3)

    def loss(
        by_edges: Array, heads: Heads, by_hyperedges: Array | None, triples: Int[Array, "n 3"], key: PRNGKeyArray
    ) -> Array:
        final = by_edges if by_hyperedges is None else by_edges + by_hyperedges
        content, rows = None, triples[:, 1] - num_users
        mask = None if present is None else present[rows]
        if heads.content is not None and features is not None:
            content = features[rows] @ heads.content
        if content is not None and heads.predictor is not None:
            head, dropout = heads.predictor, config.dropout
            value = bootstrap_loss(final, triples, content, head, key, dropout=dropout, present=mask)
        elif features is not None and config.objective is TripleLoss.UNIFORM:
            value = uniform_loss(final, triples, features[rows], weight=config.uniformity)
        else:
            value = bpr_loss(final, triples)
        if content is not None and config.contrast:
            value += config.contrast * content_contrast(final, triples, content, present=mask)
        if by_hyperedges is not None and config.views:
            value += config.views * view_contrast(by_edges, by_hyperedges, triples)
        return value

    def step(state: _State, inputs: tuple[Int[Array, "n 3"], PRNGKeyArray]) -> tuple[_State, None]:
        (parameters, moments), (triples, key) = state, inputs
        final = propagated(parameters.ego, edges, num_users=num_users, config=config)
        view, pull = None, None
        if parameters.hyper is not None and edges.hyper is not None:
            view, pull = jax.vjp(unit_rows, propagate_hyperedges(parameters.hyper, edges.hyper, layers=config.layers))
        of_final, of_heads, of_view = jax.grad(loss, argnums=(0, 1, 2))(final, parameters.heads, view, triples, key)
        gradient = propagated(of_final, edges, num_users=num_users, config=config)
        gradient += config.weight_decay * jax.grad(ego_norm)(parameters.ego, triples)
        if pull is not None and edges.hyper is not None:
            (of_rounds,) = pull(of_view)
            of_view = propagate_hyperedges(of_rounds, edges.hyper, layers=config.layers)
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction multiplies an integer count
            updates, moments = optimizer.update(Parameters(gradient, of_heads, of_view), moments)
        return (optax.apply_updates(parameters, updates), moments), None

    keys = jax.random.split(jax.random.fold_in(key, 2), steps)
    return jax.lax.scan(step, state, (triples, keys))[0]


def _degrees(interactions: sparse.csr_array) -> Int[np.ndarray, " nodes"]:
    return np.concatenate(
        [np.diff(interactions.indptr), np.bincount(interactions.indices, minlength=interactions.shape[1])]
    )
