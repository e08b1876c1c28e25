"""What a generator learns from a batch: losses of codes and of items, weighted and added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from semid.errors import SemidError
from semid.recommender import ItemTables, Recommender, inputs_at
from semid.training import PackedRows, SingleRows, StepContext
from seq_models import (
    CodeModel,
    CodeTrie,
    DenseTransformer,
    HybridTransformer,
    Normalization,
    code_cross_entropy,
    constrained_cross_entropy,
    distillation,
    softmax_cross_entropy,
    weighted_mean,
)

# A teacher scores this many (position, item) pairs at once.
_SCORES = 1 << 24


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and variants of the losses."""

    label_smoothing: float = 0.0
    """Share of each code's target that is uniform: over its level, or over what it is normalized over."""
    normalization: Normalization = Normalization.VOCABULARY
    """What a level's probabilities sum to one over, in training and in search: `children` of the prefix in the
    catalogue is the constrained softmax of MSCGRec (arXiv 2602.03713)."""
    distillation: float = 0.0
    """Weight of the cross-entropy to a dense teacher's best items, level by level (after UniGRec, arXiv 2601.17438)."""
    teacher_items: int = 20
    """How many of the teacher's best items it is heard about."""
    teacher_temperature: float = 1.0
    """Divides the teacher's scores."""
    dense: float = 1.0
    """Weight of the dense head's cross-entropy over all items (hybrid alone)."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise SemidError(f"expected label_smoothing in [0, 1), got {self.label_smoothing}")
        if self.teacher_items < 1 or not self.teacher_temperature > 0:
            raise SemidError(
                f"expected teacher_items of at least 1 and teacher_temperature above 0, got {self.teacher_items} and "
                f"{self.teacher_temperature}"
            )


class TaughtRows(NamedTuple):
    """PackedRows, and of every position with a target the teacher's best items and their scores."""

    history: Int[Any, "rows length"]
    targets: Int[Any, " rows *length"]
    segments: Int[Any, "rows length"]
    teacher_items: Int[Any, "rows *length k"]
    teacher_scores: Float[Any, "rows *length k"]


class LossTables(NamedTuple):
    """What no step changes: tables of the items, and the trie where the losses read it."""

    items: ItemTables
    trie: CodeTrie | None = None


def code_loss(
    model: CodeModel,
    batch: PackedRows | TaughtRows,
    tables: LossTables,
    context: StepContext,
    *,
    objective: ObjectiveConfig = ObjectiveConfig(),
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy of the next item's codes given the codes before, summed over levels, in nats per item."""
    codes, weights = _targets(batch, tables)
    inputs = inputs_at(tables.items, batch.history)
    logits = model.logits(inputs, batch.segments, codes, key=context.key)
    return _of_codes(logits, batch, codes, weights, tables, objective)


def hybrid_loss(
    model: HybridTransformer,
    batch: PackedRows | TaughtRows,
    tables: LossTables,
    context: StepContext,
    *,
    objective: ObjectiveConfig = ObjectiveConfig(),
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """That of codes, and the dense head's over all items that training has (LIGER, section 3): one pass of states."""
    codes, weights = _targets(batch, tables)
    backbone_key, depth_key = jax.random.split(context.key)
    states = model.states(inputs_at(tables.items, batch.history), batch.segments, key=backbone_key)
    loss, metrics = _of_codes(
        model.depth_logits(states, codes, key=depth_key), batch, codes, weights, tables, objective
    )
    # An unknown item is no negative: of a zero vector it adds the same to every sum.
    features = tables.items.features
    if features is None:
        raise TypeError("the dense head reads the items' dense input, and the tables have none")
    vectors = jnp.where(tables.items.known[:, None], model.vectors(features), 0.0)
    dense = _over_items(model.queries(states), vectors, batch.targets, weights)
    return loss + objective.dense * dense, metrics | {"loss/dense": dense}


def dense_loss(
    model: DenseTransformer, batch: PackedRows, tables: LossTables, context: StepContext
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Full-softmax cross-entropy of the next item, in nats per item."""
    vectors = model.vectors(tables.items.features)
    states = model.states(vectors, batch.history, batch.segments, key=context.key)
    weights = (batch.targets >= 0).astype(jnp.float32)
    return _over_items(states, vectors, batch.targets, weights), {"targets": jnp.sum(weights)}


def taught(rows: PackedRows | SingleRows, teacher: Recommender, objective: ObjectiveConfig) -> TaughtRows:
    """`rows` with what the teacher thinks of every position, asked once: its own training histories, as it saw them."""
    stored = rows if isinstance(rows, PackedRows) else rows[np.arange(len(rows))]
    model, items = teacher.dense_model(), teacher.spec.num_items
    k = min(objective.teacher_items, items)
    features = teacher.tables.features

    @jax.jit
    def best(history: Array, segments: Array) -> tuple[Array, Array]:
        vectors = model.vectors(features)
        if stored.targets.ndim == 1:
            scores = model.scores(vectors, history, segments)
        else:
            scores = jnp.matmul(model.states(vectors, history, segments), vectors.T)
        return jax.lax.top_k(scores / objective.teacher_temperature, k)

    positions = stored.targets.shape[1] if stored.targets.ndim > 1 else 1
    size = max(_SCORES // (items * positions), 1)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(stored.history), size):
        parts = (stored.history[start : start + size], stored.segments[start : start + size])
        kept = len(parts[0])
        padded = (np.pad(part, ((0, size - kept), (0, 0))) for part in parts)  # one shape, so one program
        scores, rows_of = best(*padded)
        found.append((np.asarray(rows_of)[:kept].astype(np.int32), np.asarray(scores)[:kept]))
    return TaughtRows(*stored, *(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _targets(batch: Any, tables: LossTables) -> tuple[Int[Array, "*n level"], Float[Array, "*n"]]:
    """Codes of the targets (of any item where there is none), and 1 where there is one."""
    return tables.items.codes[jnp.maximum(batch.targets, 0)], (batch.targets >= 0).astype(jnp.float32)


def _of_codes(
    logits: tuple[Float[Array, "*n size"], ...],
    batch: Any,
    codes: Int[Array, "*n level"],
    weights: Float[Array, "*n"],
    tables: LossTables,
    objective: ObjectiveConfig,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    if objective.normalization is Normalization.CHILDREN:
        levels = _among_children(logits, codes, weights, tables, objective.label_smoothing)
    else:
        levels = code_cross_entropy(logits, codes, weights, smoothing=objective.label_smoothing)
    loss, metrics = jnp.sum(levels), {f"loss/level_{level}": value for level, value in enumerate(levels)}
    if objective.distillation:
        of_teacher = tables.items.codes[batch.teacher_items]
        distilled = distillation(
            logits, codes, weights, teacher_codes=of_teacher, teacher_scores=batch.teacher_scores
        ).sum()
        loss, metrics = loss + objective.distillation * distilled, metrics | {"loss/distillation": distilled}
    return loss, metrics | {"targets": jnp.sum(weights)}


def _among_children(
    logits: tuple[Float[Array, "*n size"], ...],
    codes: Int[Array, "*n level"],
    weights: Float[Array, "*n"],
    tables: LossTables,
    smoothing: float,
) -> Float[Array, " level"]:
    """Each level's cross-entropy among the children that the target's prefix has in the catalogue."""
    trie = tables.trie
    if trie is None:
        raise TypeError("probabilities over the children of a prefix need the trie")
    path = trie.path(codes)
    parents = (jnp.zeros_like(path[0]), *path[:-1])
    losses: list[Array] = []
    for level, nodes in enumerate(parents):
        children = trie.children(nodes, level=level)
        each = constrained_cross_entropy(
            logits[level], codes[..., level], children.tokens, children.valid, smoothing=smoothing
        )
        losses.append(weighted_mean(each, weights))
    return jnp.stack(losses)


def _over_items(
    states: Float[Array, "*n dim"], vectors: Float[Array, "items dim"], targets: Int[Array, "*n"], weights: Array
) -> Float[Array, ""]:
    """Mean cross-entropy of the next item among all."""
    flat = (states.reshape(-1, states.shape[-1]), vectors, jnp.maximum(targets, 0).reshape(-1), weights.reshape(-1))
    return softmax_cross_entropy(*flat) / jnp.maximum(jnp.sum(weights), 1)
