"""Other backbones, from two training steps to a stored model and a program that leaves."""

from dataclasses import replace

import jax
import numpy as np
import pyarrow as pa
import pytest
from jax import export
from safetensors.numpy import load_file

from semid.catalog import SemanticCatalog
from semid.data import Dataset
from semid.generators import GeneratorConfig, ObjectiveConfig, train
from semid.recommender import Recommender, export_program
from semid.training import TrainingConfig, make_mesh
from seq_models import DenseConfig, Mixer, RQTransformerConfig, TransformerConfig

ITEMS = 12
CODES = np.stack(np.unravel_index(np.arange(ITEMS), (4, 3)), axis=1).astype(np.int32)
CATALOG = SemanticCatalog(pa.array([f"i{row}" for row in range(ITEMS)]), CODES, (4, 4))
STACK = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.1)
RECURRENT = replace(STACK, mixer=Mixer.STATE_SPACE, state_size=3)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    walks = np.stack([np.random.default_rng(user).permutation(ITEMS)[:6] for user in range(60)])
    table = {
        "user_id": np.repeat(np.arange(60), 6),
        "item_id": [f"i{row}" for row in walks.reshape(-1)],
        "position": np.tile(np.arange(6), 60),
    }
    return Dataset.build(pa.table({"item_id": CATALOG.item_ids}), pa.table(table), name="walks")


@pytest.mark.usefixtures("unchecked")  # a program for any number of users
@pytest.mark.parametrize(
    "model",
    [RQTransformerConfig(RECURRENT), DenseConfig(RECURRENT), RQTransformerConfig(replace(STACK, relation=True))],
    ids=["rq state space", "dense state space", "rq relation"],
)
def test_two_steps_a_stored_model_and_its_program(model, dataset, tmp_path):
    training = TrainingConfig(epochs=2, batch_size=64, validate_every=2)
    objective = ObjectiveConfig(repeats=True)  # no factor to compile
    config = GeneratorConfig(model, features=(), max_history=4, row_length=6, objective=objective, training=training)
    trained = train(dataset, CATALOG, config, out=tmp_path / "model", mesh=make_mesh(jax.devices()[:1]))
    loaded = Recommender.from_pretrained(tmp_path / "model")
    wanted, read = (one.recommend([["i0", "i5", "i3"]], k=5) for one in (trained, loaded))
    assert wanted.item_ids == read.item_ids
    np.testing.assert_array_equal(wanted.scores, read.scores)
    export_program(loaded, tmp_path / "program", k=5, platforms=("cpu",))
    program = export.deserialize((tmp_path / "program" / "program.stablehlo").read_bytes())
    arrays = load_file(tmp_path / "program" / "arrays.safetensors")
    rows, scores = program.call(arrays, np.array([[0, 5, 3, 0]], np.int32), np.array([3], np.int32))
    assert [f"i{row}" for row in np.asarray(rows)[0]] == wanted.item_ids[0]
    np.testing.assert_allclose(np.asarray(scores)[0], wanted.scores[0], atol=1e-5)
