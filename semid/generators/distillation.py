"""Distillation from a dense teacher: its best items at every position of the training rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from semid.generators.objective import ObjectiveConfig
from semid.recommender import Recommender
from semid.training import PackedRows, SingleRows

# A teacher scores this many (position, item) pairs at once.
_SCORES = 1 << 24


class TaughtRows(NamedTuple):
    """PackedRows with the teacher's best items, and their scores, at every position with a target."""

    history: Int[Any, "rows length"]
    targets: Int[Any, " rows *length"]
    segments: Int[Any, "rows length"]
    teacher_items: Int[Any, "rows *length k"]
    teacher_scores: Float[Any, "rows *length k"]


def taught(rows: PackedRows | SingleRows, teacher: Recommender, objective: ObjectiveConfig) -> TaughtRows:
    """Add the teacher's ranking to every position of `rows`: its own training histories, as it saw them."""
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
        values, rows = jax.lax.top_k(scores / objective.teacher_temperature, k)
        return values, rows

    positions = stored.targets.shape[1] if stored.targets.ndim > 1 else 1
    size = max(_SCORES // (items * positions), 1)
    ranked: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(stored.history), size):
        block = (stored.history[start : start + size], stored.segments[start : start + size])
        count = len(block[0])
        padded = (np.pad(part, ((0, size - count), (0, 0))) for part in block)  # one shape, so one program
        scores, best_rows = best(*padded)
        ranked.append((np.asarray(best_rows)[:count].astype(np.int32), np.asarray(scores)[:count]))
    return TaughtRows(*stored, *(np.concatenate(parts) for parts in zip(*ranked, strict=True)))
