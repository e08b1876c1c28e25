"""Optimizers by name on a mesh, schedules and clipping, each against what can be computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from semid.errors import SemidError
from semid.training import (
    MeshConfig,
    OptimizerConfig,
    RateSchedule,
    create_state,
    make_mesh,
    make_optimizer,
    make_step,
    named_leaves,
    put_batch,
    shardings,
)
from semid.training.optimizers import learning_rate

NUM_STEPS = 8


class Network(nnx.Module):
    """An embedding, two layers, and a part that may be held."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.table = nnx.Embed(16, 8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.out = nnx.Linear(16, 4, rngs=rngs)


def squares(model, batch, tables, context):
    hidden = jax.nn.relu(model.up(model.table(batch.astype(jnp.int32))))
    return jnp.mean(jnp.square(model.out(hidden) - 1)), {}


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor", "sgd"])
def test_an_optimizer_by_name_lowers_the_loss_on_a_mesh(name):
    model, mesh = Network(), make_mesh(jax.devices()[:4], MeshConfig(fsdp=2, tensor=2))
    factored = (("min_dim_size_to_factor", 4),) if name == "adafactor" else ()
    config = OptimizerConfig(name=name, learning_rate=0.02, schedule=RateSchedule.CONSTANT, warmup=0, options=factored)
    optimizer = make_optimizer(config, num_steps=NUM_STEPS)
    state = create_state(model, optimizer, mesh)
    lay = {name: leaf.sharding for name, leaf in named_leaves(state).items()}
    assert lay == named_leaves(shardings(state, mesh))
    if name != "sgd":  # control: moments of a matrix lie in parts, as the matrix does
        moments = [of for leaf, of in lay.items() if leaf.startswith("opt_state/") and leaf.endswith("up/kernel")]
        assert lay["params/up/kernel"] in moments or name == "adafactor"
    step = make_step(model, optimizer, squares, tables=None, seed=0, num_steps=NUM_STEPS, mesh=mesh)
    batch, losses = put_batch(np.arange(16), mesh), []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]
    assert {leaf: x.sharding for leaf, x in named_leaves(state).items()} == lay


def test_muon_orthogonalizes_kernels_and_leaves_embeddings_to_adam():
    params = nnx.state(Network(), nnx.Param)
    state = make_optimizer(OptimizerConfig(name="muon"), num_steps=NUM_STEPS).init(params)
    of_muon = {leaf.split("/mu/")[1] for leaf in named_leaves(state) if "/muon/" in leaf and "/mu/" in leaf}
    of_adam = {leaf.split("/mu/")[1] for leaf in named_leaves(state) if "/adam/" in leaf and "/mu/" in leaf}
    assert of_muon == {"up/kernel", "out/kernel"}
    assert of_adam == {"table/embedding", "up/bias", "out/bias"}


def update(config: OptimizerConfig, params: dict, gradients: dict) -> dict:
    """The first update."""
    optimizer = make_optimizer(config, num_steps=NUM_STEPS)
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(gradients, optimizer.init(params), params)[0]


def test_decay_is_decoupled_where_the_optimizer_has_none():
    config = OptimizerConfig(name="sgd", learning_rate=0.1, weight_decay=0.5, warmup=0)
    params = {"matrix": jnp.full((2, 2), 2.0), "vector": jnp.full((2,), 2.0)}
    found = update(config, params, jax.tree.map(lambda p: jnp.full_like(p, 0.1), params))
    np.testing.assert_allclose(found["matrix"], -0.1 * (0.1 + 0.5 * 2.0), rtol=1e-6)
    np.testing.assert_allclose(found["vector"], -0.1 * 0.1, rtol=1e-6)


def test_what_is_held_is_left_out_of_the_norm_and_does_not_decay():
    params = {"held": jnp.full((2, 2), 2.0), "learns": jnp.full((2, 2), 2.0)}
    gradients = {"held": jnp.full((2, 2), 1e6), "learns": jnp.full((2, 2), 4.0)}  # a norm of 8 without what is held
    config = OptimizerConfig(name="sgd", learning_rate=0.1, weight_decay=0.5, warmup=0, clip=2.0)
    held = update(OptimizerConfig(**{**vars(config), "rates": (("held", 0.0),)}), params, gradients)
    np.testing.assert_array_equal(held["held"], 0)
    np.testing.assert_allclose(held["learns"], -0.1 * (4.0 * 2 / 8 + 0.5 * 2.0), rtol=1e-6)
    free = update(config, params, gradients)  # control: the norm is nearly all of the other part's gradient
    np.testing.assert_allclose(free["learns"], -0.1 * 0.5 * 2.0, rtol=1e-4)
    assert np.all(free["held"] != 0)


@pytest.mark.parametrize(
    ("schedule", "last"), [(RateSchedule.LINEAR, 0.02), (RateSchedule.CONSTANT, 0.1), (RateSchedule.COSINE, 0.02)]
)
def test_schedules_rise_to_the_peak_and_end_where_they_should(schedule, last):
    config = OptimizerConfig(learning_rate=0.1, warmup=0.2, final=0.2, schedule=schedule)
    rates = [float(learning_rate(config, num_steps=20)(step)) for step in range(21)]
    np.testing.assert_allclose(rates[:5], [0.0, 0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    assert rates[20] == pytest.approx(last)
    assert rates[12] == pytest.approx((0.1 + last) / 2)  # half the way


def test_options_reach_the_optimizer():
    config = OptimizerConfig(
        name="sgd", learning_rate=0.1, warmup=0, weight_decay=0, options=(("momentum", 0.5), ("nesterov", 1))
    )
    params = {"x": jnp.ones(1)}
    assert float(update(config, params, {"x": jnp.full((1,), 0.2)})["x"][0]) == pytest.approx(-0.1 * 0.2 * 1.5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"name": "adamv"}, "expected the name of an optimizer of optax, got 'adamv'; did you mean 'adam.*'"),
        ({"name": "lbfgs"}, "expected the name of an optimizer of optax, got 'lbfgs'; known: acprop, .*, yogi"),
        ({"name": "GradientTransformation"}, "expected the name of an optimizer"),
        ({"options": (("b_1", 0.9),)}, "adamw has no option 'b_1'; did you mean 'b1'"),
        ({"options": (("b2", 0.9),)}, "adamw has no option 'b2'"),
        ({"options": (("learning_rate", 0.9),)}, "adamw has no option 'learning_rate'"),
    ],
)
def test_an_optimizer_that_optax_does_not_have(bad, message):
    with pytest.raises(SemidError, match=f"^{message}"):
        OptimizerConfig(**bad)
    OptimizerConfig(name="nadamw", options=(("b1", 0.9),))


def test_the_default_is_the_chain_that_it_always_was():
    """To the bit: AdamW after clipping, with the same names of its moments."""
    params = nnx.state(Network(), nnx.Param)
    gradients = jax.tree.map(lambda p: p * 3, params)
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 0, NUM_STEPS, end_value=0.02 * 3e-3)
    adamw = optax.adamw(
        rate, b2=0.98, weight_decay=0.01, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    expected, ours = optax.chain(optax.clip_by_global_norm(1.0), adamw), make_optimizer(OptimizerConfig(), num_steps=8)
    states = [optimizer.init(params) for optimizer in (expected, ours)]
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            (theirs, states[0]), (found, states[1]) = (
                of.update(gradients, state, params) for of, state in zip((expected, ours), states, strict=True)
            )
    pairs = [tuple(map(named_leaves, both)) for both in ((theirs, found), states)]
    for before, after in pairs:
        assert list(before) == list(after)
        for name, leaf in before.items():
            np.testing.assert_array_equal(after[name], leaf, err_msg=name)
