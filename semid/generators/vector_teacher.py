"""Item vectors as a teacher, such as those of AlphaRec's map."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from scipy.special import log_softmax

from semid.artifacts import Origin
from semid.errors import SemidError
from semid.graphs.ranking import largest
from semid.training import PackedRows
from seq_models import TeacherItems

# Scores that are computed at once.
_SCORES = 1 << 24


@dataclass(frozen=True, eq=False)
class VectorTeacher:
    """Ranks items by the softmax of their cosines with the mean of a history's vectors.

    AlphaRec's vectors (`semid.graphs.AlphaRecConfig`) rank as AlphaRec itself does. Without `repeats` the history's own
    items are not ranked; `train` turns it off where its objective leaves them out. Raises SemidError for another number
    of vectors than of items, and a temperature that is not above 0.
    """

    item_ids: pa.Array
    vectors: Float[np.ndarray, "items dim"]
    temperature: float = 0.15
    origin: Origin | None = None
    """The artifact that the vectors are from."""
    repeats: bool = True

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.item_ids) or not self.temperature > 0:
            raise SemidError(
                f"expected {len(self.item_ids)} vectors and a temperature above 0, got {len(self.vectors)} and "
                f"{self.temperature}"
            )

    @property
    def digest(self) -> str:
        """Digest of vectors, temperature and `repeats`; without the last it is that of before there was the field."""
        settings = (self.vectors.shape, self.temperature, *(["repeats"] if self.repeats else []))
        total = hashlib.sha256(repr(settings).encode())
        total.update(np.ascontiguousarray(self.vectors, np.float32).data)
        return total.hexdigest()

    def best(self, rows: PackedRows, *, k: int) -> TeacherItems:
        """The k most probable items at every position, or after each row of one history."""
        single = rows.targets.ndim == 1
        histories = [
            history for row in zip(rows.history, rows.segments, strict=True) for history in _prefixes(*row, single)
        ]
        unit = _unit(self.vectors)
        items = np.full((*rows.targets.shape, k), -1, np.int32).reshape(-1, k)
        scores = np.full(items.shape, -np.inf, np.float32)
        size = max(_SCORES // len(unit), 1)
        for start in range(0, len(histories), size):
            block = slice(start, start + size)
            items[block], scores[block] = self._most_probable(unit, histories[block], k)
        shape = (*rows.targets.shape, k)
        return TeacherItems(items.reshape(shape), scores.reshape(shape))

    def _most_probable(
        self, unit: Float[np.ndarray, "items dim"], histories: Sequence[Int[np.ndarray, " _"]], k: int
    ) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """The best items after these histories, and their log-probabilities; none after an empty one."""
        sums = np.stack([self.vectors[history].sum(axis=0) for history in histories])
        logits = (_unit(sums) @ unit.T) / self.temperature
        if not self.repeats:
            for row, history in enumerate(histories):
                logits[row, history] = -np.inf
        best = largest(logits, k)
        log_probs = np.take_along_axis(log_softmax(logits, axis=1), best, axis=1)
        real = np.isfinite(log_probs) & np.array([len(history) > 0 for history in histories])[:, None]
        return np.where(real, best, -1).astype(np.int32), np.where(real, log_probs, -np.inf).astype(np.float32)


def _unit(vectors: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n dim"]:
    """Rows of length 1; zeros stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _prefixes(
    history: Int[np.ndarray, " length"], segments: Int[np.ndarray, " length"], single: bool
) -> list[Int[np.ndarray, " _"]]:
    """Items of its segment up to each position of a row; with `single`, all of the row once."""
    if single:
        return [history[segments != 0]]
    begins = np.maximum.accumulate(np.where(np.diff(segments, prepend=-1) != 0, np.arange(len(segments)), 0))
    return [
        history[begin : at + 1] if segment else history[:0]
        for at, (begin, segment) in enumerate(zip(begins, segments, strict=True))
    ]
