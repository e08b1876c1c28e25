"""Distillation: a teacher's ranking of the next item at every position of the training rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy import sparse

from semid import artifacts
from semid.artifacts import Origin
from semid.data import Histories
from semid.errors import SemidError
from semid.generators.objective import ObjectiveConfig
from semid.generators.vector_teacher import VectorTeacher
from semid.graphs import ItemGraph, LeaveOneOutGraph, pruned
from semid.recommender import Recommender
from semid.training import PackedRows, Rows, SharedArray, own_share
from seq_models import TeacherItems, last_state
from seq_models.layers import products
from seq_models.ranking import active_log_probs, scatter_rows
from seq_models.types import seen_items

# A dense teacher scores this many (position, item) pairs at once.
_SCORES = 1 << 24
# Best items of a dense teacher that are mixed with a graph's.
_DENSE_ITEMS = 256
# Blocks of targets: their indices in `rows.targets`, and their distributions [targets, items].
_Distributions = Iterator[tuple[tuple[Int[np.ndarray, " n"], ...], sparse.csr_array]]


@runtime_checkable
class Teacher(Protocol):
    """Ranks the items that may come next; a generator learns its ranking (`train(teacher=)`).

    `item_ids` are its items by row, the dataset's in the same order; `digest` identifies it, and `origin` is the
    artifact that holds it, if any. `best(rows, k=)` returns its k best items and their log-probabilities, -1 and -inf
    where there are fewer: [rows, length, k], one list per position, for rows of several histories, or [rows, k], one
    per row, for rows of one. The rows are those of training and hold their targets: a teacher that was fitted to them
    by counting must leave out what each history has added. Lists at positions without a target are not used.
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
    events: Int[Any, "rows length"] | None = None
    target_events: Int[Any, " rows *length"] | None = None
    times: Int[Any, "rows length"] | None = None
    target_weights: Float[Any, " rows *length"] | None = None


def taught(rows: PackedRows, teacher: Teacher, objective: ObjectiveConfig) -> TaughtRows:
    """Add the teacher's ranking to every position of `rows`."""
    best = teacher.best(rows, k=min(objective.teacher_items, len(teacher.item_ids)))
    scores = np.asarray(best.scores, np.float32) / np.float32(objective.teacher_temperature)
    return TaughtRows(**rows._asdict(), teacher_items=np.asarray(best.rows, np.int32), teacher_scores=scores)


class TaughtHistories(Rows):
    """Rows of histories with a teacher's rankings, `rows[index] -> TaughtRows`, which `prepare` computes.

    Each process computes those of its own share of the rows (see `SharedArray`).
    """

    def __init__(self, rows: Rows, teacher: Teacher, objective: ObjectiveConfig) -> None:
        self._rows, self._teacher, self._objective = rows, teacher, objective

    def prepare(self, folder: Path) -> None:
        """Compute the teacher's rankings."""
        own = taught(self._rows[own_share(len(self))], self._teacher, self._objective)
        self._items = SharedArray.exchanged(own.teacher_items, folder / "items")
        self._scores = SharedArray.exchanged(own.teacher_scores, folder / "scores")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Int[np.ndarray, " n"]) -> TaughtRows:
        return self._taught(self._rows[index], index)

    def buckets(self, batch_size: int) -> Int[np.ndarray, " rows"] | None:
        """Buckets of the rows."""
        return self._rows.buckets(batch_size)

    def batch(self, index: Int[np.ndarray, " n"], *, bucket: int) -> TaughtRows:
        """Rows by number, of the bucket's length."""
        return self._taught(self._rows.batch(index, bucket=bucket), index)

    def _taught(self, rows: PackedRows, index: Int[np.ndarray, " n"]) -> TaughtRows:
        return TaughtRows(**rows._asdict(), teacher_items=self._items[index], teacher_scores=self._scores[index])

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Arrays of the rows, and the teacher's digest: its scores would depend on the device that computes them."""
        return *self._rows.arrays, np.frombuffer(self._teacher.digest.encode(), np.uint8)


def as_teacher(
    teacher: Recommender | ItemGraph | Teacher, objective: ObjectiveConfig, *, graph: ItemGraph | None = None
) -> Teacher:
    """Make a teacher of an item graph, or of a dense recommender, which is mixed with `graph` if the objective says so.

    Other teachers stay as they are, but item vectors leave the history out if the objective does. A generator of codes
    raises SemidError when it is to rank.
    """
    if isinstance(teacher, ItemGraph):
        return GraphTeacher(teacher, repeats=objective.repeats is not False)
    if isinstance(teacher, VectorTeacher):
        return replace(teacher, repeats=teacher.repeats and objective.repeats is not False)
    if not isinstance(teacher, Recommender):
        return teacher
    dense = DenseTeacher(teacher, repeats=teacher.repeats and objective.repeats is not False)
    if not objective.teacher_graph:
        return dense
    if graph is None:
        raise SemidError(f"teacher_graph {objective.teacher_graph} needs an item graph; give one (--graph)")
    counted = GraphTeacher(graph, repeats=objective.repeats is not False)
    return MixedTeacher(dense, counted, objective.teacher_graph)


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
        """Digest of the recommender."""
        return self.recommender.digest

    @property
    def origin(self) -> Origin | None:
        """Artifact of the recommender."""
        return self.recommender.origin

    def best(self, rows: PackedRows, *, k: int) -> TeacherItems:
        """The model's k best items; the number of scores held at once is bounded."""
        model, tables, single = self.recommender.dense_model(), self.recommender.tables, rows.targets.ndim == 1
        vectors, (graph, params) = model.vectors(tables.features), nnx.split(model)

        @jax.jit
        def best(params: nnx.State, vectors: Array, history: Array, segments: Array) -> TeacherItems:
            model = nnx.merge(graph, params)
            states = model.states(vectors, history, segments)
            states = (last_state(states, segments) if single else states).reshape(-1, states.shape[-1])
            logits = products(model.ranked_by(states), model.ranked_by(vectors), model.dtype)
            if not self.repeats:
                seen = seen_items(history, segments, last=single).reshape(len(logits), -1)
                position = jnp.arange(len(logits))[:, None]
                logits = logits.at[position, scatter_rows(seen, len(vectors))].set(-jnp.inf, mode="drop")
            values, items = jax.lax.top_k(active_log_probs(logits, tables), k)
            shape = (len(history), k) if single else (*history.shape, k)
            return TeacherItems(jnp.where(values == -jnp.inf, -1, items).reshape(shape), values.reshape(shape))

        size = max(_SCORES // (len(vectors) * (1 if single else rows.history.shape[1])), 1)
        blocks: list[TeacherItems] = []
        for start, stop in itertools.pairwise([*range(0, len(rows.history), size), len(rows.history)]):
            block = (rows.history[start:stop], rows.segments[start:stop])
            padded = (np.pad(part, ((0, size - len(part)), (0, 0))) for part in block)  # one shape, so one program
            blocks.append(TeacherItems(*(np.asarray(part)[: stop - start] for part in best(params, vectors, *padded))))
        return TeacherItems(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


@dataclass(frozen=True)
class GraphTeacher:
    """An item graph as teacher, without the transitions that it has counted in the ranked history itself. Without
    `repeats`, items of the history up to a position are not ranked there."""

    graph: ItemGraph
    repeats: bool = True

    @property
    def item_ids(self) -> pa.Array:
        """External ids, by item row."""
        return self.graph.item_ids

    @property
    def digest(self) -> str:
        """Digest of the graph."""
        return self.graph.digest

    @property
    def origin(self) -> Origin | None:
        """Artifact of the graph."""
        return self.graph.origin

    def best(self, rows: PackedRows, *, k: int) -> TeacherItems:
        """The k most probable items."""
        return _most_probable(self.distributions(rows), rows, k)

    def distributions(self, rows: PackedRows) -> _Distributions:
        """Per block of the rows' targets: their indices in `rows.targets`, and their distributions [targets, items]."""
        row, column = np.nonzero(rows.segments)
        single = rows.targets.ndim == 1
        segment = rows.segments[row, column]
        starts = np.flatnonzero(np.diff(row, prepend=-1) | np.diff(segment, prepend=-1))
        ends = np.append(starts[1:], len(row))
        last = rows.targets[row[ends - 1]] if single else rows.targets[row[ends - 1], column[ends - 1]]
        # The graph has counted each history with its last target: append that, unless the row already ends with it.
        items = np.insert(rows.history[row, column], ends[last >= 0], last[last >= 0])
        lengths = ends - starts + (last >= 0)
        source = np.insert(np.arange(len(row)), ends[last >= 0], -1)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        histories = Histories(np.full(len(starts), -1, np.int32), items.astype(np.int32), bounds[:-1], bounds[1:])
        is_last = np.isin(np.arange(len(row)), ends - 1)
        for block, shares in LeaveOneOutGraph(self.graph, repeats=self.repeats).distributions(histories):
            at = source[block]
            has_target = is_last[at] if single else rows.targets[row[at], column[at]] >= 0
            chosen = np.flatnonzero((at >= 0) & has_target)
            indices = (row[at[chosen]],) if single else (row[at[chosen]], column[at[chosen]])
            yield indices, shares[chosen]


@dataclass(frozen=True)
class MixedTeacher:
    """A dense model and an item graph as one teacher: the mean of their distributions, weighted by the graph's share.

    Only the dense model's 256 best items count.
    """

    dense: DenseTeacher
    graph: GraphTeacher
    graph_share: float

    @property
    def item_ids(self) -> pa.Array:
        """External ids, by item row."""
        return self.dense.item_ids

    @property
    def digest(self) -> str:
        """Digest of model, graph and share."""
        return artifacts.sha256_json([self.dense.digest, self.graph.digest, self.graph_share])

    @property
    def origin(self) -> Origin | None:
        """Artifact of the dense model."""
        return self.dense.origin

    def best(self, rows: PackedRows, *, k: int) -> TeacherItems:
        """The k most probable items."""
        dense = self.dense.best(rows, k=min(_DENSE_ITEMS, len(self.item_ids)))

        def mixed() -> _Distributions:
            for indices, graph_shares in self.graph.distributions(rows):
                items, values = np.asarray(dense.rows)[indices], np.exp(np.asarray(dense.scores)[indices])
                real = items >= 0
                starts = np.concatenate([[0], np.cumsum(real.sum(axis=1))])
                dense_shares = sparse.csr_array((values[real], items[real], starts), shape=graph_shares.shape)
                mixture = (1 - self.graph_share) * dense_shares + self.graph_share * graph_shares
                yield indices, sparse.csr_array(mixture)

        return _most_probable(mixed(), rows, k)


def _most_probable(blocks: _Distributions, rows: PackedRows, k: int) -> TeacherItems:
    """The k most probable items at each target, and their log-probabilities."""
    shape = (*rows.targets.shape, k)
    items, log_probs = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
    for indices, shares in blocks:
        largest = pruned(shares, k)
        nth = np.arange(largest.nnz) - np.repeat(largest.indptr[:-1], np.diff(largest.indptr))
        at = tuple(np.repeat(index, np.diff(largest.indptr)) for index in indices)
        items[(*at, nth)], log_probs[(*at, nth)] = largest.indices, np.log(largest.data)
    return TeacherItems(items, log_probs)
