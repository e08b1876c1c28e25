"""Training on 1, 2 and 8 simulated devices, however they share the parameters, is the same training.

Not to the bit: each device sums its part of the batch, so sums associate otherwise. Over these ten steps losses differ
in the last bits of float32 (2e-7 of their size were measured); the tolerance is 1e-5. Dropout is the same
everywhere: the random bits of a step do not depend on how arrays are laid out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from semid.data import Histories
from semid.generators import LossTables, ObjectiveConfig, generator_loss
from semid.recommender import ModelSpec
from semid.training import (
    MeshConfig,
    OptimizerConfig,
    batches,
    create_state,
    make_mesh,
    make_optimizer,
    make_step,
    named_leaves,
    pack,
    put_batch,
)
from semid.training.gradients import TARGETS, Gradients, accumulated
from seq_models import DenseConfig, ItemTables, Mixer, RQTransformerConfig
from seq_models.layers import TransformerConfig, dropout

ITEMS, STEPS = 40, 10


@functools.cache
def losses(
    count: int,
    sharing: MeshConfig = MeshConfig(),
    *,
    rate: float,
    accumulate: int = 1,
    dense: bool = False,
    mixer: Mixer = Mixer.ATTENTION,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Loss of each step on `count` devices, and the parameters after the last."""
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, ITEMS, rng.integers(2, 14)) for _ in range(60)]
    packed = pack(Histories.from_lists(lists), max_history=8, row_length=16)
    codes = rng.integers(0, 8, (ITEMS, 3)).astype(np.int32)
    tables = LossTables(ItemTables.from_arrays(codes, None, np.ones(ITEMS, np.int32)))
    backbone = TransformerConfig(8, layers=1, heads=2, hidden=16, dropout=rate, mixer=mixer, state_size=4)
    config = DenseConfig(backbone) if dense else RQTransformerConfig(backbone, depth_dropout=rate / 2)
    model = ModelSpec(config, (8, 8, 8), ITEMS, num_features=0, max_history=8).build(seed=0)
    mesh = make_mesh(jax.devices()[:count], sharing)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), num_steps=STEPS)
    state = create_state(model, optimizer, mesh)
    laid_out = jax.tree.map(lambda x: x.sharding, state)
    loss = functools.partial(generator_loss, objective=ObjectiveConfig(repeats=False)) if dense else generator_loss
    step = make_step(model, optimizer, loss, tables=tables, seed=0, num_steps=10, mesh=mesh, accumulate=accumulate)
    found = []
    for batch in batches(packed, batch_size=16, num_batches=STEPS, seed=0):
        state, metrics = step(state, put_batch(batch, mesh))
        found.append(float(metrics["loss"]))
    assert jax.tree.map(lambda x: x.sharding, state) == laid_out
    return np.array(found), {name: np.asarray(leaf) for name, leaf in named_leaves(state.params).items()}


def test_targets_of_small_weight_weigh_as_much_in_parts():
    """As much of the mean, that is: weights come to .003 in all."""

    def gradient(params, rest, rows, key):
        weight = rows["weight"].sum()
        value = (rows["weight"] * rows["x"]).sum() / weight
        return Gradients(nnx.State({"w": value}), {"loss": value, TARGETS: weight}, rest)

    rows = {"weight": jnp.full(4, 1e-3).at[0].set(0), "x": jnp.arange(4.0)}
    params, mesh = nnx.State({"w": jnp.zeros(())}), make_mesh(jax.devices()[:1])
    found = accumulated(gradient, params, nnx.State({}), rows, jax.random.key(0), parts=2, mesh=mesh)
    assert [float(x) for x in (found.gradients["w"], found.metrics["loss"])] == pytest.approx([2, 2])
    assert float(found.metrics[TARGETS]) == pytest.approx(3e-3)


def assert_the_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize(("count", "sharing"), [(2, MeshConfig()), (8, MeshConfig()), (8, MeshConfig(2, 2))])
def test_the_same_loss_on_1_2_and_8_devices(rate, count, sharing):
    alone = losses(1, rate=rate)
    assert alone[0][-1] < alone[0][0] - 0.5
    assert_the_same(losses(count, sharing, rate=rate), alone)


@pytest.mark.parametrize(("count", "sharing", "parts"), [(1, MeshConfig(), 4), (8, MeshConfig(2, 2), 2)])
def test_microbatches_of_unequally_many_targets_make_the_same_step(count, sharing, parts):
    assert_the_same(losses(count, sharing, rate=0.0, accumulate=parts), losses(1, rate=0.0))


@pytest.mark.parametrize("sharing", [MeshConfig(), MeshConfig(2, 2), MeshConfig(fsdp=8)])
def test_items_of_a_full_softmax_that_devices_share_make_the_same_step(sharing):
    assert_the_same(losses(8, sharing, rate=0.0, dense=True), losses(1, rate=0.0, dense=True))


def test_a_state_space_that_devices_share_by_heads_makes_the_same_step():
    recurrent = functools.partial(losses, rate=0.0, mixer=Mixer.STATE_SPACE)
    assert_the_same(recurrent(8, MeshConfig(2, 2)), recurrent(1))


def test_dropout_changes_the_loss():
    without, dropped = losses(1, rate=0.0)[0], losses(1, rate=0.2)[0]
    assert (np.abs(dropped - without) > 1e-3 * without).all()


@pytest.mark.parametrize("count", [2, 8])
def test_dropout_is_the_same_however_the_rows_are_split(count):
    def kept(devices: int) -> np.ndarray:
        mesh = make_mesh(jax.devices()[:devices])
        with jax.set_mesh(mesh):
            x = put_batch(np.ones((16, 5, 6), np.float32), mesh)
            return np.asarray(jax.jit(lambda x: dropout(x, 0.5, jax.random.key(3, impl="rbg")))(x))

    np.testing.assert_array_equal(kept(count), kept(1))
    assert 0.3 < (kept(1) == 0).mean() < 0.7
