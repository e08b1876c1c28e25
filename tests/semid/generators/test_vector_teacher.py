"""Item vectors as a teacher, against loops over the positions of rows."""

import dataclasses
import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest

from semid import artifacts
from semid.catalog import SemanticCatalog
from semid.data import Dataset
from semid.errors import SemidError
from semid.generators import GeneratorConfig, ObjectiveConfig, Teacher, VectorTeacher, train
from semid.training import PackedRows, TrainingConfig
from seq_models import RQTransformerConfig, TransformerConfig

ITEMS = 9
IDS = pa.array([f"i{row}" for row in range(ITEMS)])
ROWS = PackedRows(
    np.array([[3, 1, 4, 2, 0], [5, 5, 0, 0, 0]]),
    np.array([[1, -1, 2, 6, -1], [7, -1, -1, -1, -1]]),
    np.array([[1, 1, 2, 2, 0], [1, 1, 0, 0, 0]]),
)
PREFIXES = [[[3], [3, 1], [4], [4, 2], []], [[5], [5, 5], [], [], []]]


VECTORS = np.random.default_rng(0).normal(size=(ITEMS, 4)).astype(np.float32)


@pytest.fixture(scope="module", params=[True, False])
def teacher(request):
    return VectorTeacher(IDS, VECTORS, temperature=0.3, repeats=request.param)


def _expected(teacher, history, k):
    if not history:
        return [-1] * k, [-np.inf] * k
    mean = teacher.vectors[history].mean(axis=0)
    cosines = teacher.vectors @ mean / np.linalg.norm(mean) / np.linalg.norm(teacher.vectors, axis=1)
    out = np.isin(np.arange(ITEMS), history) & (not teacher.repeats)
    shares = np.where(out, 0, np.exp(cosines / teacher.temperature))
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
        out = 0 if teacher.repeats else len(set(history))
        items, log_probs = _expected(teacher, history, ITEMS - out)
        assert best.rows[row].tolist() == items + [-1] * out
        np.testing.assert_allclose(best.scores[row, : len(items)], log_probs, rtol=1e-4)


def test_vectors_and_temperature_tell_teachers_apart(teacher):
    digests = {teacher.digest, dataclasses.replace(teacher, temperature=1.0).digest}
    digests.add(dataclasses.replace(teacher, vectors=teacher.vectors[::-1]).digest)
    digests.add(dataclasses.replace(teacher, repeats=not teacher.repeats).digest)
    assert len(digests) == 4
    assert dataclasses.replace(teacher, vectors=teacher.vectors.copy()).digest == teacher.digest
    with pytest.raises(SemidError, match=r"expected 9 vectors and a temperature above 0, got 8 and 0\.3"):
        dataclasses.replace(teacher, vectors=teacher.vectors[1:])


def test_the_digest_without_repeats_is_that_of_before(teacher):
    """Models that were taught so are current still."""
    before = hashlib.sha256(repr((teacher.vectors.shape, 0.3)).encode() + teacher.vectors.tobytes()).hexdigest()
    assert (teacher.digest == before) == (not teacher.repeats)


@pytest.mark.parametrize("repeats", [None, False])
def test_a_model_is_taught_of_the_history_where_targets_repeat(repeats, tmp_path):
    rows = [(f"u{user}", f"i{(user + at % 2) % ITEMS}", at) for user in range(16) for at in range(6)]
    users, taken, places = zip(*rows, strict=True)
    table = pa.table({"user_id": users, "item_id": taken, "position": places})
    dataset = Dataset.build(pa.table({"item_id": IDS}), table, name="to and fro")
    assert dataset.repeats.common
    codes = np.stack(np.unravel_index(np.arange(ITEMS), (3, 3)), axis=1).astype(np.int32)
    config = GeneratorConfig(
        RQTransformerConfig(TransformerConfig(dim=8, layers=1, heads=2, hidden=8)),
        max_history=4,
        row_length=6,
        training=TrainingConfig(epochs=2, batch_size=8, log_every=1),
        objective=ObjectiveConfig(repeats=repeats),
    )
    catalog, teacher = SemanticCatalog(IDS, codes, (3, 3)), VectorTeacher(IDS, VECTORS)
    train(dataset, catalog, config, out=tmp_path / "model", teacher=teacher)
    history = [json.loads(line) for line in (tmp_path / "model" / "history.jsonl").read_text().splitlines()]
    assert np.isfinite([record["loss/distillation"] for record in history if "loss/distillation" in record]).sum() == 2
    taught_by = VectorTeacher(IDS, VECTORS, repeats=repeats is None)
    assert artifacts.read_manifest(tmp_path / "model").parents["teacher"] == taught_by.digest
