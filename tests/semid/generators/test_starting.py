"""The start of a generator from its teacher: its states are the teacher's, and what cannot start is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from semid.artifacts import read_manifest
from semid.catalog import SemanticCatalog
from semid.data import Dataset
from semid.errors import SemidError
from semid.generators import GeneratorConfig, train
from semid.generators.starting import start_from_teacher
from semid.joint import JointConfig
from semid.recommender import ItemData, ModelSpec, Recommender
from semid.training import TrainingConfig
from seq_models import (
    DenseConfig,
    EncoderDecoderConfig,
    HybridConfig,
    ParallelHeadsConfig,
    RQTransformerConfig,
    TransformerConfig,
)

ITEMS = 12
BACKBONE = TransformerConfig(dim=8, layers=2, heads=2, hidden=8, dropout=0.1)
DENSE = DenseConfig(replace(BACKBONE, dropout=0.3))
VECTORS = np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32)
FAMILIES = {
    "rq-transformer": RQTransformerConfig(BACKBONE, id_embedding=True),
    "parallel-heads": ParallelHeadsConfig(BACKBONE, id_embedding=True),
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rows = [(f"u{user}", f"i{(user + at) % ITEMS}", at) for user in range(12) for at in range(6)]
    users, items, positions = zip(*rows, strict=True)
    table = pa.table({"user_id": users, "item_id": items, "position": positions})
    made = Dataset.build(pa.table({"item_id": [f"i{row}" for row in range(ITEMS)]}), table, name="circle")
    return made.with_vectors("v", VECTORS)


@pytest.fixture(scope="module")
def catalog(dataset) -> SemanticCatalog:
    codes = np.stack(np.unravel_index(np.arange(ITEMS), (3, 4)), axis=1).astype(np.int32)
    return SemanticCatalog(dataset.item_ids, codes, (3, 4))


def untrained(model, catalog, *, seed) -> Recommender:
    spec = ModelSpec(model, catalog.level_sizes, ITEMS, VECTORS.shape[1], max_history=4)
    return Recommender(spec.build(seed=seed), catalog, spec=spec, items=ItemData(np.ones(ITEMS, np.int32), VECTORS))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_the_teachers_but_for_the_codes(catalog, family):
    """Content that the teacher projects is in its item vectors; the two share no parameters afterwards."""
    teacher, own = untrained(DENSE, catalog, seed=0), untrained(FAMILIES[family], catalog, seed=1)
    model = start_from_teacher(own, teacher).model
    for table in model.tables:
        table.embedding[...] = jnp.zeros_like(table.embedding[...])
    history, segments = jnp.array([[3, 1, 4, 7, 2]]), jnp.array([[1, 1, 1, 2, 2]])
    dense = teacher.dense_model()
    expected = jax.jit(dense.history_states)(dense.vectors(teacher.tables.features), history, segments)
    states = jax.jit(model.history_states)(own.tables.inputs(history), segments)
    np.testing.assert_allclose(states, expected, rtol=1e-5, atol=1e-5)
    scale = model.backbone.norm.scale
    scale[...] = scale[...] + 1
    assert float(jnp.max(dense.backbone.norm.scale[...])) == 1


def test_training_goes_on_from_there_and_the_artifact_says_so(dataset, catalog, tmp_path):
    """A learning rate of nothing, as good as: what is written is the start."""
    teacher = train(dataset, catalog, _config(DENSE), out=tmp_path / "sasrec")
    config = replace(_config(FAMILIES["rq-transformer"]), start_from_teacher=True)
    train(dataset, catalog, config, out=tmp_path / "model", teacher=teacher)
    assert read_manifest(tmp_path / "model").config["generator"]["start_from_teacher"] is True
    found = Recommender.from_pretrained(tmp_path / "model").model.ids.embedding[...]
    np.testing.assert_allclose(found, teacher.item_vectors() * 8**0.5, atol=1e-3)


def _config(model) -> GeneratorConfig:
    training = TrainingConfig(epochs=1, batch_size=8)
    training = replace(training, optimizer=replace(training.optimizer, learning_rate=1e-6))
    return GeneratorConfig(model, max_history=4, row_length=6, training=training)


@pytest.mark.parametrize(
    ("model", "teacher", "message"),
    [
        (RQTransformerConfig(BACKBONE), DENSE, r"start_from_teacher is for models .* this RQ-Transformer does not"),
        (
            EncoderDecoderConfig(BACKBONE, id_embedding=True),
            DENSE,
            r"is for models .*; set id_embedding where there is one",
        ),
        (FAMILIES["rq-transformer"], FAMILIES["rq-transformer"], "needs a SASRec model for a teacher; give one"),
        (FAMILIES["rq-transformer"], None, "needs a SASRec model for a teacher; give one"),
        (
            FAMILIES["rq-transformer"],
            DenseConfig(replace(BACKBONE, dim=16)),
            r"start_from_teacher: backbone\.dim is 8, the teacher's 16; make them equal, or leave it out",
        ),
    ],
)
def test_what_cannot_start_from_the_teacher_is_refused(catalog, model, teacher, message):
    given = None if teacher is None else untrained(teacher, catalog, seed=0)
    with pytest.raises(SemidError, match=message):
        start_from_teacher(untrained(model, catalog, seed=1), given)


def test_end_to_end_training_has_no_dense_head():
    generator = JointConfig().generator
    for model in (replace(generator.model, id_embedding=True, dense_share=0.4), HybridConfig()):
        with pytest.raises(SemidError, match="joint steps train no dense head; take the RQ-Transformer without"):
            JointConfig(generator=replace(generator, model=model))


def test_end_to_end_training_starts_from_no_teacher():
    with pytest.raises(SemidError, match="starts from no teacher"):
        JointConfig(generator=replace(JointConfig().generator, start_from_teacher=True))
