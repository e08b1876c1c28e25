"""Two joint steps of every phase of the published recipes: their terms, and the parts that they train."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.experiment import experiments
from semid.encoders import FeatureRows
from semid.joint import JointModel, Surgery, sum_without_conflict
from semid.joint.model import ContentTables, joint_loss, joint_losses
from semid.tokenizers import RQVAE
from semid.training import (
    PackedRows,
    create_state,
    make_mesh,
    make_optimizer,
    make_step,
    named_leaves,
    put_batch,
)
from seq_models import RQTransformer, RQTransformerConfig, TransformerConfig

RECIPES = {name.split(".")[0]: experiments()[name].model for name in ("unigrec.joint", "etegrec", "bloger")}
ITEMS, DIM, SIZES, BATCH, LENGTH = 30, 6, (4, 4), 8, 5


class Encoder(nnx.Module):
    """A linear encoder of vectors."""

    dim = DIM

    def __init__(self, rngs):
        self.linear = nnx.Linear(DIM, DIM, rngs=rngs)

    def __call__(self, content, *, key=None):
        return self.linear(content["content"].vectors)


def make(tokenizer):
    rng = np.random.default_rng(0)
    tokenizer = dataclasses.replace(tokenizer, level_sizes=SIZES, hidden=(8,), latent=4)
    backbone = RQTransformerConfig(TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0))
    generator = RQTransformer(backbone, level_sizes=(*SIZES, 3), num_features=DIM, rngs=nnx.Rngs(1))
    codes = np.column_stack([rng.integers(0, size, ITEMS) for size in (*SIZES, 3)]).astype(np.int32)
    autoencoder = RQVAE(tokenizer, dim=DIM, rngs=nnx.Rngs(3))
    model = JointModel(Encoder(nnx.Rngs(2)), autoencoder, generator, codes=codes, num_teacher=5, rngs=nnx.Rngs(4))
    vectors = jnp.asarray(rng.standard_normal((ITEMS, DIM)), jnp.float32)
    content = {"content": FeatureRows(vectors, jnp.ones(ITEMS, bool))}
    lengths = rng.integers(1, LENGTH + 1, BATCH)
    segments = (np.arange(LENGTH)[None] < lengths[:, None]) * np.arange(1, BATCH + 1)[:, None]
    batch = PackedRows(
        jnp.asarray(rng.integers(0, ITEMS, (BATCH, LENGTH)) * (segments > 0), jnp.int32),
        jnp.asarray(rng.integers(0, ITEMS, BATCH), jnp.int32),
        jnp.asarray(segments, jnp.int32),
    )
    model.bank.write(jnp.arange(ITEMS), model.encoder(content), mask=jnp.ones(ITEMS, bool))
    return model, ContentTables(content, jnp.asarray(rng.standard_normal((ITEMS, 5)), jnp.float32)), batch


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name in RECIPES for number in range(len(RECIPES[name].joint))]
)
def test_two_steps_of_a_recipe(name, number):
    phase = RECIPES[name].joint[number]
    model, tables, batch = make(RECIPES[name].tokenizer)
    optimizer = make_optimizer(phase.training.optimizer, num_steps=2)
    apart = phase.surgery is Surgery.PROJECT
    mesh = make_mesh(jax.devices()[:1])
    loss = functools.partial(joint_losses if apart else joint_loss, config=phase.step)
    combine = sum_without_conflict if apart else None
    step = make_step(model, optimizer, loss, tables=tables, seed=0, num_steps=2, mesh=mesh, combine=combine)
    state = create_state(model, optimizer, mesh)
    before = {name: np.array(leaf) for name, leaf in named_leaves(state.params).items()}
    for _ in range(2):
        state, metrics = step(state, put_batch(batch, mesh))
    assert all(np.isfinite(value).all() for value in metrics.values())
    terms = {name.removeprefix("loss/") for name in metrics if name.startswith("loss/")}
    assert terms == set(phase.step.objective.weights(0.0))
    moved = {name for name, leaf in named_leaves(state.params).items() if np.any(leaf != before[name])}
    for part, share in phase.training.optimizer.rates:
        assert bool(share) == any(name.startswith(part) for name in moved)
    assert ("conflicts" in metrics) == apart
