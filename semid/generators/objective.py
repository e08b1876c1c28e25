"""The training loss of generators: the loss terms of a model's family, weighted and added up."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from semid.config import check_range, later_field
from semid.errors import SemidError, did_you_mean
from semid.training import StepContext
from seq_models import CodeTrie, ItemModel, ItemTables, SoftmaxOver, TeacherItems, TrainingBatch


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and variants of the losses."""

    label_smoothing: float = 0.0
    """Share of each code's target distribution that is uniform, over the codes that `normalization` names."""
    normalization: SoftmaxOver = SoftmaxOver.VOCABULARY
    """Set over which a level's probabilities sum to one, in training and in search: `children` of the prefix in the
    catalogue is the constrained softmax of MSCGRec (arXiv 2602.03713)."""
    distillation: float | None = None
    """Weight of the cross-entropy to a teacher's best items, level by level (after UniGRec, arXiv 2601.17438); none
    given: 1 with a teacher, else 0."""
    teacher_items: int = 32
    """Number of the teacher's best items that are used."""
    teacher_graph: float = 0.0
    """Share of the item graph (--graph) in the teacher's distribution."""
    teacher_temperature: float = 1.0
    """Divides the teacher's scores."""
    dense: float = 1.0
    """Weight of the dense head's cross-entropy over all items (hybrid, and RQ-Transformer with a dense_share)."""
    repeats: bool | None = None
    """Items of the history may come next. False: they are left out of every softmax over items, in training and in
    recommendation. None given: false where fewer than one training target in a thousand stands in its own history."""

    event_weights: dict[str, float] = later_field({})
    """Weights of targets in the mean of the loss by their event, EVENT NUMBER; others: 1."""
    interaction_weights: bool = later_field(False)
    """Multiply the targets' weights by the dataset's column `weight`, such as inverse propensities."""
    event_loss: float = later_field(1.0)
    """Weight of the cross-entropy of events given item and history (only with event_head)."""
    state_column: str = later_field("")
    """Vector column to distill, such as a fused one: the state that an item is decoded from must find the item's vector
    among those of all items (UNGER, arXiv 2502.06269); none given: none."""
    state_loss: float = later_field(1.0)
    """Weight of that cross-entropy over the vectors (only with state_column)."""

    def __post_init__(self) -> None:
        weights = self.event_weights.values()
        if not all(0 <= weight < math.inf for weight in weights) or (weights and not any(weights)):
            raise SemidError(f"expected event_weights of 0 or more, not all 0, got {self.event_weights}")
        check_range(self, "state_loss", "teacher_temperature", above=0)
        check_range(self, "label_smoothing", at_least=0, below=1)
        check_range(self, "teacher_graph", at_least=0, at_most=1)
        check_range(self, "teacher_items", at_least=1)

    def __hash__(self) -> int:  # the generated one fails on a dict
        return hash(repr(self))

    def resolved(self, *, repeats: bool, taught: bool) -> ObjectiveConfig:
        """Fill in the defaults that depend on the data (`repeats`) and on a teacher (`taught`)."""
        return replace(
            self,
            distillation=float(taught) if self.distillation is None else self.distillation,
            repeats=repeats if self.repeats is None else self.repeats,
        )

    @property
    def repeat_factor(self) -> float:
        """Factor on the model's probabilities of the history's items."""
        return 0.0 if self.repeats is False else 1.0

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the loss terms by name; the other terms have a weight of 1."""
        return {
            "loss/distillation": self.distillation or 0.0,
            "loss/dense": self.dense,
            "loss/event": self.event_loss,
            "loss/state": self.state_loss,
        }

    def weights_of(self, events: tuple[str, ...]) -> Float[np.ndarray, " events"] | None:
        """Weights of targets by the number of their event, 0 being unknown; None: all weigh the same.

        Raises SemidError for weights of events that the data do not have.
        """
        if not self.event_weights:
            return None
        for name in self.event_weights:
            if name not in events:
                known = f"The dataset has {', '.join(events)}" if events else ": the dataset has no column 'event'"
                hint = did_you_mean(name, events)
                raise SemidError(f"event_weights: unknown event {name!r}{hint}{' ' if hint else ''}{known}")
        return np.array([1.0, *(self.event_weights.get(name, 1.0) for name in events)], np.float32)


class LossTables(NamedTuple):
    """Inputs of the loss that no step changes: tables of the items, and the trie where the losses read it."""

    items: ItemTables
    trie: CodeTrie | None = None
    event_weights: Float[Array, " events"] | None = None
    """Weights of targets by the number of their event; None: all weigh the same."""


def generator_loss(
    model: ItemModel,
    batch: Any,
    tables: LossTables,
    context: StepContext,
    *,
    objective: ObjectiveConfig = ObjectiveConfig(),
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted sum of the model's loss terms, in nats per target, for PackedRows, SingleRows or TaughtRows.

    Every term is a metric, a vector one per entry (`loss/level_0`, ...); `targets` is the number of targets.
    """
    rows = _training_batch(batch, objective, tables.event_weights)
    terms = model.loss_terms(
        tables.items, rows, trie=_trie(tables, objective), smoothing=objective.label_smoothing, key=context.key
    )
    loss = functools.reduce(operator.add, [_weighted(name, term, objective) for name, term in terms.items()])
    metrics: dict[str, Array] = {}
    for name, term in terms.items():
        metrics |= {name: term} if term.ndim == 0 else {f"{name}_{index}": value for index, value in enumerate(term)}
    return loss, metrics | {"targets": jnp.sum(rows.weights)}


def _training_batch(
    batch: Any, objective: ObjectiveConfig, event_weights: Float[Array, " events"] | None
) -> TrainingBatch:
    teacher = TeacherItems(batch.teacher_items, batch.teacher_scores) if objective.distillation else None
    optional = {"events": batch.events, "target_events": batch.target_events, "times": batch.times}
    optional["importance"] = batch.target_weights
    if event_weights is not None:
        weights = event_weights[batch.target_events]
        optional["importance"] = weights if batch.target_weights is None else weights * batch.target_weights
    rows = TrainingBatch(batch.history, batch.segments, batch.targets, teacher, **optional)
    return rows if objective.repeat_factor else rows.without_repeats()


def _trie(tables: LossTables, objective: ObjectiveConfig) -> CodeTrie | None:
    """The trie, if probabilities are over the children of a prefix."""
    if objective.normalization is not SoftmaxOver.CHILDREN:
        return None
    if tables.trie is None:
        raise SemidError("probabilities over the children of a prefix need the trie; give LossTables one")
    return tables.trie


def _weighted(name: str, term: Float[Array, "*terms"], objective: ObjectiveConfig) -> Float[Array, ""]:
    total, weight = jnp.sum(term), objective.weights.get(name)
    return total if weight is None else weight * total
