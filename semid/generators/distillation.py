"""Distillation: what a teacher thinks comes next, at every position of the training rows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float, Int

from semid.artifacts import Origin
from semid.generators.objective import ObjectiveConfig
from semid.recommender import Recommender
from semid.training import PackedRows, SingleRows
from seq_models import TeacherItems, last_state
from seq_models.layers import products
from seq_models.ranking import active_log_probs, scatter_rows
from seq_models.types import seen_items

# A dense teacher scores this many (position, item) pairs at once.
_SCORES = 1 << 24


@runtime_checkable
class Teacher(Protocol):
    """Anything that ranks the items that may come next: a generator learns its ranking (`train(teacher=)`).

    `item_ids` gives its row order, which must be the dataset's, `digest` tells it from others, and `origin` names the
    artifact that holds it, None where there is none. `best(rows, k=)` gives its k best items at every position of rows
    of several histories, Int [rows, length, k], or after each of rows of one history, [rows, k], and their
    log-probabilities; -1 and -inf where there are fewer. The rows are all that is trained on, with their targets, which
    a teacher that has counted them must take out again; what it says where there is no target is not used.
    """

    @property
    def item_ids(self) -> pa.Array: ...
    @property
    def digest(self) -> str: ...
    @property
    def origin(self) -> Origin | None: ...
    def best(self, rows: PackedRows, *, k: int) -> TeacherItems: ...


class TaughtRows(NamedTuple):
    """PackedRows with the teacher's best items, and their scores, at every position with a target."""

    history: Int[Any, "rows length"]
    targets: Int[Any, " rows *length"]
    segments: Int[Any, "rows length"]
    teacher_items: Int[Any, "rows *length k"]
    teacher_scores: Float[Any, "rows *length k"]


def taught(rows: PackedRows | SingleRows, teacher: Recommender | Teacher, objective: ObjectiveConfig) -> TaughtRows:
    """Add the teacher's ranking to every position of `rows`: a dense recommender's, or any other teacher's.

    Raises SemidError for a recommender that speaks in codes.
    """
    stored = rows if isinstance(rows, PackedRows) else rows[np.arange(len(rows))]
    if isinstance(teacher, Recommender):
        teacher = DenseTeacher(teacher, repeats=teacher.repeats and objective.repeats is not False)
    best = teacher.best(stored, k=min(objective.teacher_items, len(teacher.item_ids)))
    scores = np.asarray(best.scores, np.float32) / np.float32(objective.teacher_temperature)
    return TaughtRows(*stored, np.asarray(best.rows, np.int32), scores)


@dataclass(frozen=True)
class DenseTeacher:
    """A dense recommender as teacher; without `repeats`, a position's own history is left out of its softmax."""

    recommender: Recommender
    repeats: bool

    @property
    def item_ids(self) -> pa.Array:
        """External ids, by item row."""
        return self.recommender.item_ids

    @property
    def digest(self) -> str:
        """The recommender's."""
        return self.recommender.digest

    @property
    def origin(self) -> Origin | None:
        """The recommender's."""
        return self.recommender.origin

    def best(self, rows: PackedRows, *, k: int) -> TeacherItems:
        """The k best items of the model, a bounded number of scores at a time."""
        model, tables, single = self.recommender.dense_model(), self.recommender.tables, rows.targets.ndim == 1
        vectors = model.vectors(tables.features)

        @jax.jit
        def best(vectors: Array, history: Array, segments: Array) -> TeacherItems:
            states = model.states(vectors, history, segments)
            states = (last_state(states, segments) if single else states).reshape(-1, states.shape[-1])
            logits = products(states, vectors, model.dtype)
            if not self.repeats:
                seen = seen_items(history, segments, last=single).reshape(len(logits), -1)
                position = jnp.arange(len(logits))[:, None]
                logits = logits.at[position, scatter_rows(seen, len(vectors))].set(-jnp.inf, mode="drop")
            values, items = jax.lax.top_k(active_log_probs(logits, tables), k)
            shape = (len(history), k) if single else (*history.shape, k)
            return TeacherItems(jnp.where(values == -jnp.inf, -1, items).reshape(shape), values.reshape(shape))

        size = max(_SCORES // (len(vectors) * (1 if single else rows.history.shape[1])), 1)
        found: list[TeacherItems] = []
        for start, stop in itertools.pairwise([*range(0, len(rows.history), size), len(rows.history)]):
            block = (rows.history[start:stop], rows.segments[start:stop])
            padded = (np.pad(part, ((0, size - len(part)), (0, 0))) for part in block)  # one shape, so one program
            found.append(TeacherItems(*(np.asarray(part)[: stop - start] for part in best(vectors, *padded))))
        return TeacherItems(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
