"""Item vectors as a teacher, against loops over the positions of rows."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from semid.errors import SemidError
from semid.generators import Teacher, VectorTeacher
from semid.training import PackedRows

ITEMS = 9
IDS = pa.array([f"i{row}" for row in range(ITEMS)])
ROWS = PackedRows(
    np.array([[3, 1, 4, 2, 0], [5, 5, 0, 0, 0]]),
    np.array([[1, -1, 2, 6, -1], [7, -1, -1, -1, -1]]),
    np.array([[1, 1, 2, 2, 0], [1, 1, 0, 0, 0]]),
)
PREFIXES = [[[3], [3, 1], [4], [4, 2], []], [[5], [5, 5], [], [], []]]


@pytest.fixture(scope="module")
def teacher():
    return VectorTeacher(IDS, np.random.default_rng(0).normal(size=(ITEMS, 4)).astype(np.float32), temperature=0.3)


def _expected(teacher, history, k):
    if not history:
        return [-1] * k, [-np.inf] * k
    mean = teacher.vectors[history].mean(axis=0)
    cosines = teacher.vectors @ mean / np.linalg.norm(mean) / np.linalg.norm(teacher.vectors, axis=1)
    shares = np.where(np.isin(np.arange(ITEMS), history), 0, np.exp(cosines / teacher.temperature))
    best = np.argsort(-shares)[:k]
    return best.tolist(), np.log(shares[best] / shares.sum())


def test_every_position_asks_for_what_follows_the_items_up_to_it(teacher):
    best = teacher.best(ROWS, k=3)
    assert isinstance(teacher, Teacher)
    for row, prefixes in enumerate(PREFIXES):
        for at, history in enumerate(prefixes):
            items, log_probs = _expected(teacher, history, 3)
            assert best.rows[row, at].tolist() == items
            np.testing.assert_allclose(best.scores[row, at], log_probs, rtol=1e-4)


def test_rows_of_one_history_ask_once(teacher):
    single = PackedRows(ROWS.history[:, :2], np.array([4, 7]), ROWS.segments[:, :2])
    best = teacher.best(single, k=ITEMS)
    for row, history in enumerate(([3, 1], [5, 5])):
        items, log_probs = _expected(teacher, history, ITEMS - len(set(history)))
        assert best.rows[row].tolist() == items + [-1] * len(set(history))
        np.testing.assert_allclose(best.scores[row, : len(items)], log_probs, rtol=1e-4)


def test_vectors_and_temperature_tell_teachers_apart(teacher):
    digests = {teacher.digest, dataclasses.replace(teacher, temperature=1.0).digest}
    digests.add(dataclasses.replace(teacher, vectors=teacher.vectors[::-1]).digest)
    assert len(digests) == 3
    assert dataclasses.replace(teacher, vectors=teacher.vectors.copy()).digest == teacher.digest
    with pytest.raises(SemidError, match=r"expected 9 vectors and a temperature above 0, got 8 and 0\.3"):
        dataclasses.replace(teacher, vectors=teacher.vectors[1:])
