"""States that are pulled to the items' vectors: the term, which families have it, and what it leaves of a model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import nnx
from safetensors.numpy import load_file

from semid.catalog import SemanticCatalog
from semid.config import to_dict
from semid.data import Dataset
from semid.errors import SemidError
from semid.generators import GeneratorConfig, ObjectiveConfig, train
from semid.training import TrainingConfig, make_mesh
from seq_models import (
    DenseConfig,
    EncoderDecoderConfig,
    FlatDecoderConfig,
    HybridConfig,
    ItemTables,
    Layout,
    ParallelHeadsConfig,
    RQTransformerConfig,
    TrainingBatch,
    TransformerConfig,
)

ITEMS, WIDTH = 12, 3
BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
CODES = np.stack(np.unravel_index(np.arange(ITEMS), (4, 3)), axis=1).astype(np.int32)
CATALOG = SemanticCatalog(pa.array([f"i{row}" for row in range(ITEMS)]), CODES, (4, 4))
VECTORS = np.random.default_rng(0).normal(size=(ITEMS, WIDTH)).astype(np.float32)
FAMILIES = {
    "rq-transformer": RQTransformerConfig(BACKBONE),
    "encoder-decoder": EncoderDecoderConfig(BACKBONE, decoder_layers=1),
    "flat": FlatDecoderConfig(BACKBONE),
    "hybrid": HybridConfig(BACKBONE),
    "parallel-heads": ParallelHeadsConfig(BACKBONE),
    "sasrec": DenseConfig(BACKBONE),
}
CONFIG = GeneratorConfig(
    model=RQTransformerConfig(BACKBONE),
    features=(),
    max_history=4,
    row_length=6,
    objective=ObjectiveConfig(repeats=True),  # no factor to compile
    training=TrainingConfig(epochs=2, batch_size=64, validate_every=2, log_every=1),
)
PULLED = replace(CONFIG, objective=replace(CONFIG.objective, state_column="fused", state_loss=0.5))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_term_is_a_softmax_of_cosines_and_moves_the_model(name):
    """Against NumPy, of the states that the logits follow from; its gradient reaches the backbone of every family."""
    model = FAMILIES[name].build(level_sizes=(4, 3), num_items=ITEMS, num_features=WIDTH, rngs=nnx.Rngs(0))
    model.add_state_head(WIDTH, rngs=nnx.Rngs(1))
    tables = ItemTables(
        jnp.asarray(CODES), jnp.asarray(VECTORS), jnp.ones(ITEMS, bool), vectors=jnp.asarray(unit(VECTORS))
    )
    history = jnp.asarray([[1, 5, 7, 2], [3, 3, 0, 11]])
    targets = jnp.asarray([[5, 7, 2, -1], [3, 0, 11, -1]])
    batch = TrainingBatch(history, jnp.ones_like(history), targets[:, 2] if model.layout is Layout.SINGLE else targets)
    graph, parameters = nnx.split(model)

    @jax.jit
    def term(parameters):
        return nnx.merge(graph, parameters).loss_terms(tables, batch)["loss/state"]

    if model.layout is not Layout.SINGLE and name != "sasrec":
        states = model.decode(
            tables.inputs(history), batch.segments, jnp.asarray(CODES)[jnp.maximum(targets, 0)]
        ).states
        cosines = unit(np.asarray(model.state_head(states))) @ unit(VECTORS).T / 0.07
        log_probs = cosines - np.log(np.exp(cosines).sum(-1, keepdims=True))
        wanted = -np.mean([log_probs[row, at, targets[row, at]] for row in range(2) for at in range(3)])
        np.testing.assert_allclose(term(parameters), wanted, rtol=1e-5)
    moved = {
        jax.tree_util.keystr(path)
        for path, gradient in jax.tree.leaves_with_path(jax.grad(term)(parameters))
        if np.abs(gradient).max() > 0
    }
    assert any("qkv" in name for name in moved)
    assert any("state_head" in name for name in moved)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    rng = np.random.default_rng(0)
    walks = [(rng.integers(ITEMS) + np.arange(6)) % ITEMS for _ in range(60)]
    table = {
        "user_id": np.repeat(np.arange(60), 6),
        "item_id": [f"i{row}" for walk in walks for row in walk],
        "position": np.tile(np.arange(6), 60),
    }
    built = Dataset.build(pa.table({"item_id": CATALOG.item_ids}), pa.table(table), name="walks")
    return built.with_vectors("fused", VECTORS)


def test_two_steps_leave_a_model_of_the_same_parameters(dataset, tmp_path):
    """Which the term has moved; without it nothing of the config is stored."""
    assert not {"state_column", "state_loss"} & to_dict(CONFIG)["objective"].keys()
    mesh = make_mesh(jax.devices()[:1])
    for config, name in ((CONFIG, "plain"), (PULLED, "pulled")):
        train(dataset, CATALOG, config, out=tmp_path / name, mesh=mesh)
    plain, pulled = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "pulled"))
    assert plain.keys() == pulled.keys()
    assert any(np.abs(plain[name] - pulled[name]).max() > 1e-5 for name in plain)
    history = (tmp_path / "pulled" / "history.jsonl").read_text()
    assert "loss/state" in history
    assert "loss/state" not in (tmp_path / "plain" / "history.jsonl").read_text()


def test_a_column_that_is_not_there_and_a_weight_of_nothing_are_refused(dataset):
    absent = replace(CONFIG, objective=ObjectiveConfig(state_column="text"))
    with pytest.raises(SemidError, match=r"^no vector column 'text' in dataset 'walks'; it has .*fused"):
        train(dataset, CATALOG, absent)
    with pytest.raises(SemidError, match=r"^expected state_loss above 0, got 0$"):
        ObjectiveConfig(state_loss=0)
