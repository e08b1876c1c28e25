"""Training in bfloat16 beside training in float32: the same losses, as far as eight bits of a number tell."""

import dataclasses

import jax
import numpy as np
import pyarrow as pa
import pytest

from semid.catalog import SemanticCatalog
from semid.data import Dataset
from semid.generators import GeneratorConfig, train
from semid.training import OptimizerConfig, TrainingConfig, read_history
from seq_models import DenseConfig, Precision, RQTransformerConfig, TransformerConfig

ITEMS, BACKBONE = 12, TransformerConfig(dim=16, layers=1, heads=2, hidden=16, dropout=0.0)
TRAINING = TrainingConfig(8, 8, optimizer=OptimizerConfig(learning_rate=1e-2), validate_every=8, log_every=1)


@pytest.fixture(scope="module")
def circle() -> tuple[Dataset, SemanticCatalog]:
    """Everybody walks round the circle of items."""
    rows = [(f"u{user}", f"i{(user + at) % ITEMS}", at) for user in range(48) for at in range(6)]
    users, items, positions = zip(*rows, strict=True)
    table = pa.table({"user_id": users, "item_id": items, "position": positions})
    made = Dataset.build(pa.table({"item_id": [f"i{row}" for row in range(ITEMS)]}), table, name="circle")
    codes = np.stack(np.unravel_index(np.arange(ITEMS), (3, 4)), axis=1).astype(np.int32)
    return made, SemanticCatalog(made.item_ids, codes, (3, 4))


@pytest.mark.parametrize("family", [RQTransformerConfig(BACKBONE), DenseConfig(BACKBONE)], ids=lambda c: c.name)
def test_losses_in_bfloat16_stay_beside_those_in_float32(circle, family, tmp_path):
    losses = {}
    for precision in Precision:
        model = dataclasses.replace(family, backbone=dataclasses.replace(BACKBONE, dtype=precision))
        config = GeneratorConfig(model, max_history=4, row_length=6, training=TRAINING)
        with jax.numpy_dtype_promotion("standard"):  # JAX's own attention promotes bfloat16
            train(*circle, config, out=tmp_path / precision.value)
        history = read_history(tmp_path / precision.value / "history.jsonl")
        losses[precision] = np.array([record["loss"] for record in history if "loss" in record])
    exact, rough = losses[Precision.FLOAT32], losses[Precision.BFLOAT16]
    assert exact[-1] < exact[0] / 2, "it learns"
    assert not np.array_equal(exact, rough), "control"
    np.testing.assert_allclose(rough, exact, rtol=0.02)
