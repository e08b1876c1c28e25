"""Optimizer, step and named leaves, each against what can be computed by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from semid.errors import SemidError
from semid.training import (
    OptimizerConfig,
    bound_loss,
    create_state,
    make_mesh,
    make_optimizer,
    make_step,
    named_leaves,
    put_batch,
    replace_leaves,
    with_variables,
)
from semid.training.checkpoints import Checkpoints

NUM_STEPS = 20


class Tiny(nnx.Module):
    """One matrix, one vector, and something that no gradient changes."""

    def __init__(self):
        self.matrix = nnx.Param(jnp.full((2, 3), 2.0))
        self.vector = nnx.Param(jnp.full((3,), 2.0))
        self.fixed = nnx.Variable(jnp.arange(3.0))


def updates(config: OptimizerConfig, gradient: float, *, steps: int = NUM_STEPS) -> list[dict]:
    """The updates of every step under a constant gradient, parameters never moved."""
    params = nnx.state(Tiny(), nnx.Param)
    optimizer = make_optimizer(config, num_steps=NUM_STEPS)
    gradients, state, found = jax.tree.map(lambda p: jnp.full_like(p, gradient), params), optimizer.init(params), []
    for _ in range(steps):
        with jax.numpy_dtype_promotion("standard"):
            change, state = optimizer.update(gradients, state, params)
        found.append({name: np.asarray(leaf) for name, leaf in named_leaves(change).items()})
    return found


def test_warm_up_to_the_peak_then_cosine():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, warmup=0.25, final=0.1)
    # Adam's update under a constant gradient is the learning rate itself.
    rates = [-float(change["vector"][0]) for change in updates(config, 0.01)]
    rising = [0.1 * at / 5 for at in range(5)]
    falling = [0.01 + 0.09 * (1 + np.cos(np.pi * at / 15)) / 2 for at in range(15)]
    np.testing.assert_allclose(rates, rising + falling, rtol=1e-4, atol=1e-7)
    assert max(rates) == pytest.approx(0.1, rel=1e-5)


def test_without_warm_up_the_first_step_is_the_largest():
    first, second, *_ = updates(OptimizerConfig(learning_rate=0.1, weight_decay=0.0, warmup=0.0), 0.01, steps=2)
    assert -first["vector"][0] == pytest.approx(0.1, rel=1e-5)
    assert -second["vector"][0] < 0.1


def test_decay_is_decoupled_and_on_matrices_only():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup=0.0)
    change = updates(config, 0.0, steps=1)[0]
    np.testing.assert_allclose(change["matrix"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(change["vector"], 0)


@pytest.mark.parametrize(("gradient", "seen"), [(100.0, 1 / 3), (0.1, 0.1)])
def test_gradients_are_clipped_by_their_global_norm(gradient, seen):
    params = nnx.state(Tiny(), nnx.Param)  # nine entries: a clipped constant gradient has entries 1 / sqrt(9)
    optimizer = make_optimizer(OptimizerConfig(clip=1.0), num_steps=NUM_STEPS)
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(
            jax.tree.map(lambda p: jnp.full_like(p, gradient), params), optimizer.init(params), params
        )
    moments = {name: leaf for name, leaf in named_leaves(state).items() if "/mu/" in name}
    assert len(moments) == 2
    for leaf in moments.values():
        np.testing.assert_allclose(leaf, 0.1 * seen, rtol=1e-5)  # b1 = 0.9


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"warmup": 1.0}, r"warmup in \[0, 1\), got 1.0"),
        ({"warmup": -0.1}, "warmup"),
        ({"learning_rate": 0.0}, "learning_rate above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate above 0, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate above 0 and finite, got inf"),
        ({"clip": 0.0}, "clip above 0, got 0.0"),
        ({"clip": float("inf")}, "clip"),
        ({"weight_decay": -0.1}, "weight_decay of at least 0, got -0.1"),
        ({"final": -1.0}, r"final in \[0, 1\], got -1.0"),
        ({"beta2": 1.0}, r"beta2 in \[0, 1\), got 1.0"),
        ({"rates": (("head", float("nan")),)}, "rates"),
    ],
)
def test_an_optimizer_that_cannot_work(bad, message):
    with pytest.raises(SemidError, match=message):
        OptimizerConfig(**bad)


@pytest.mark.parametrize("num_steps", [1, 2, 20])
@pytest.mark.parametrize("warmup", [0.05, 0.98])
def test_the_shortest_run_has_a_schedule(num_steps, warmup):
    assert make_optimizer(OptimizerConfig(warmup=warmup), num_steps=num_steps).init(nnx.state(Tiny(), nnx.Param))


def noisy_loss(model, batch, tables, context):
    noise = jax.random.normal(context.key, (3,))
    loss = jnp.mean(batch @ model.matrix[...] * tables[None]) + jnp.sum(model.vector[...] * (noise + model.fixed[...]))
    return loss, {"noise": noise[0]}


def make(seed: int = 0):
    model, mesh = Tiny(), make_mesh()
    optimizer = make_optimizer(OptimizerConfig(), num_steps=NUM_STEPS)
    step = make_step(model, optimizer, noisy_loss, tables=jnp.ones(3), seed=seed, num_steps=10, mesh=mesh)
    batch = put_batch(np.ones((8, 2), np.float32), mesh)
    return model, create_state(model, optimizer, mesh), step, batch


def test_a_step_counts_donates_and_leaves_the_callers_model_alone():
    model, state, step, batch = make()
    before = {name: np.array(leaf) for name, leaf in named_leaves(nnx.state(model)).items()}
    new, metrics = step(state, batch)
    assert (int(state.step.is_deleted()), int(new.step)) == (True, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    for name, leaf in named_leaves(nnx.state(model)).items():
        np.testing.assert_array_equal(leaf, before[name])
    newer, _ = step(new, batch)  # the first step has learning rate 0
    assert set(metrics) == {"loss", "gradient_norm", "noise"}
    changed = named_leaves(newer.params)
    assert set(changed) == {"matrix", "vector"}
    assert (np.asarray(changed["vector"]) != before["vector"]).all()
    np.testing.assert_array_equal(with_variables(model, newer.params, newer.rest).vector[...], changed["vector"])
    np.testing.assert_array_equal(with_variables(model, newer.params, newer.rest).fixed[...], before["fixed"])


def test_steps_of_equal_arguments_are_one_program_whatever_their_seed():
    traced, mesh = [], make_mesh()

    def loss(model, batch, tables, context, *, scale):
        traced.append(scale)
        return scale * jnp.mean(batch @ model.matrix[...]), {}

    batch = put_batch(np.ones((8, 2), np.float32), mesh)
    for seed, (scale, rate) in enumerate(((1.0, 0.1), (1.0, 0.1), (2.0, 0.1), (2.0, 0.2))):
        model, optimizer = Tiny(), make_optimizer(OptimizerConfig(learning_rate=rate), num_steps=NUM_STEPS)
        options = {"tables": None, "seed": seed, "num_steps": NUM_STEPS, "mesh": mesh}
        make_step(model, optimizer, bound_loss(loss, scale=scale), **options)(
            create_state(model, optimizer, mesh), batch
        )
    assert traced == [1.0, 2.0, 2.0]


def test_a_part_at_rate_0_costs_no_gradient_and_does_not_count():
    def loss(model, batch, tables, context):
        return jnp.mean(batch @ model.matrix[...] @ jnp.ones((3, 64)) @ jnp.ones((64, 3)) @ model.vector[...]), {}

    batch = put_batch(np.ones((8, 2), np.float32), mesh := make_mesh())
    flops, norms = [], []
    for rates in ((), (("matrix", 0.0),)):
        model, optimizer = Tiny(), make_optimizer(OptimizerConfig(rates=rates), num_steps=NUM_STEPS)
        options = {"tables": None, "seed": 0, "num_steps": NUM_STEPS, "mesh": mesh, "rates": rates}
        step, state = make_step(model, optimizer, loss, **options), create_state(model, optimizer, mesh)
        flops.append(step.lower(state, batch).compile().cost_analysis()["flops"])
        norms.append(float(step(state, batch)[1]["gradient_norm"]))
    assert flops[1] < 0.8 * flops[0]
    assert 0 < norms[1] < norms[0]


def test_gradient_norm_is_of_the_gradient_before_clipping():
    _, state, step, batch = make()
    _, metrics = step(state, batch)
    key = jax.random.fold_in(jax.random.key(0, impl="rbg"), 0)
    of_vector = jax.random.normal(key, (3,)) + jnp.arange(3.0)
    of_matrix = np.full((2, 3), 1 / 3)  # a mean over 8 rows and 3 columns of ones
    expected = np.sqrt(np.square(of_vector).sum() + np.square(of_matrix).sum())
    assert float(metrics["gradient_norm"]) == pytest.approx(expected, rel=1e-5)


def test_the_cost_of_a_step_is_known_before_it_is_taken():
    _, state, step, batch = make()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, batch))
    for given in ((state, batch), shapes):
        lowered = step.lower(*given)
        # A product of 8 x 2 and 2 x 3 and the gradient of the matrix: 2 x (8 x 2 x 3) each.
        assert lowered.cost_analysis()["flops"] > 2 * 2 * 48
        assert lowered.compile().memory_analysis().argument_size_in_bytes > 0
    assert not state.step.is_deleted()
    new, _ = step(state, batch)
    assert int(new.step) == 1


class Counting(nnx.Module):
    """Counts its steps in a variable of its own, and says in what share of the training it is."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones((2, 1)))
        self.seen = nnx.Variable(jnp.zeros((), jnp.int32))


def counting_loss(model, batch, tables, context):
    model.seen[...] = model.seen[...] + 1
    return jnp.mean(batch @ model.weight[...]), {"progress": context.progress, "seen": model.seen[...]}


def make_counting(num_steps: int):
    model, mesh = Counting(), make_mesh()
    optimizer = make_optimizer(OptimizerConfig(), num_steps=num_steps)
    step = make_step(model, optimizer, counting_loss, tables=None, seed=0, num_steps=num_steps, mesh=mesh)
    return model, create_state(model, optimizer, mesh), step, put_batch(np.ones((8, 2), np.float32), mesh)


def test_variables_that_a_loss_sets_are_carried_on():
    model, state, step, batch = make_counting(num_steps=4)
    assert set(named_leaves(state.params)) == {"weight"}
    assert set(named_leaves(state.rest)) == {"seen"}
    for at in range(1, 4):
        state, metrics = step(state, batch)
        assert (int(metrics["seen"]), int(state.rest["seen"][...])) == (at, at)
    assert int(with_variables(model, state.params, state.rest).seen[...]) == 3
    assert int(model.seen[...]) == 0  # the caller's is left alone
    assert set(named_leaves(state.params)) == {"weight"}


def test_progress_is_the_share_of_the_steps_done():
    _, state, step, batch = make_counting(num_steps=4)
    found = []
    for _ in range(4):
        state, metrics = step(state, batch)
        found.append(float(metrics["progress"]))
    assert found == [0.0, 0.25, 0.5, 0.75]


def test_a_checkpoint_restores_what_no_gradient_moves(tmp_path):
    model, state, step, batch = make_counting(num_steps=4)
    checkpoints = Checkpoints(tmp_path, request={}, select=None)
    for _ in range(3):
        state, _ = step(state, batch)
        checkpoints.save(state, iter_of_nothing(), {"score": 0.0})
    assert (checkpoints.best_step, checkpoints.last_step) == (3, 3)
    fresh = create_state(model, make_optimizer(OptimizerConfig(), num_steps=4), make_mesh())
    assert int(fresh.rest["seen"][...]) == 0
    restored = checkpoints.restore(fresh, 3)
    checkpoints.close()
    assert (int(restored.step), int(restored.rest["seen"][...])) == (3, 3)
    _, metrics = step(restored, batch)
    assert (float(metrics["progress"]), int(metrics["seen"])) == (0.75, 4)


def iter_of_nothing():
    """Stands for the Grain iterator of a run."""
    return SimpleNamespace(get_state=lambda: b"{}")


def test_noise_is_a_function_of_seed_and_step():
    def noises(seed: int) -> list[float]:
        _, state, step, batch = make(seed)
        found = []
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(float(metrics["noise"]))
        return found

    first = noises(0)
    assert len(set(first)) == 3
    assert noises(0) == first
    assert not set(noises(1)) & set(first)


def test_replace_leaves_is_the_inverse_of_named_leaves():
    params = nnx.state(Tiny(), nnx.Param)
    leaves = {name: np.asarray(leaf) + 1 for name, leaf in named_leaves(params).items()}
    assert set(leaves) == {"matrix", "vector"}
    replaced = replace_leaves(params, leaves, where="here")
    assert jax.tree.structure(replaced) == jax.tree.structure(params)
    np.testing.assert_array_equal(named_leaves(replaced)["matrix"], leaves["matrix"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": None}, "file: tensor 'vector' is missing"),
        ({"odd": np.zeros(1)}, "file: tensor 'odd' is not one of the model"),
        ({"vector": np.zeros(4)}, r"file: tensor 'vector' has shape \(4,\); the config asks for \(3,\)"),
        ({"matrix": np.zeros((3, 2))}, r"file: tensor 'matrix' has shape \(3, 2\); the config asks for \(2, 3\)"),
    ],
)
def test_leaves_that_do_not_fit_are_named(change, message):
    params = nnx.state(Tiny(), nnx.Param)
    leaves = {name: leaf for name, leaf in {**named_leaves(params), **change}.items() if leaf is not None}
    with pytest.raises(SemidError, match=f"^{message}$"):
        replace_leaves(params, leaves, where="file")


@pytest.mark.parametrize(("group", "heads"), [(1, 2), (2, 2)])
def test_fused_matrices_of_earlier_versions_are_read(group, heads):
    """Their outputs lay on one axis: query heads, those of a group side by side, then keys, then values."""
    q, k, v = (np.random.default_rng(i).normal(size=(3, n * 4)) for i, n in enumerate((group * heads, heads, heads)))
    like = {"qkv": jnp.zeros((3, group + 2, heads, 4)), "up": jnp.zeros((3, 2, 5))}
    flat = {"qkv": np.concatenate([q, k, v], axis=1), "up": np.arange(30.0).reshape(3, 10)}
    read = replace_leaves(like, flat, where="file")
    np.testing.assert_array_equal(read["up"], flat["up"].reshape(3, 2, 5).astype(np.float32))
    for index in range(group):
        expected = q.reshape(3, heads, group, 4)[:, :, index].astype(np.float32)
        np.testing.assert_array_equal(read["qkv"][:, index], expected)
    for index, of in enumerate((k, v)):
        np.testing.assert_array_equal(read["qkv"][:, group + index], of.reshape(3, heads, 4).astype(np.float32))


def test_rates_scale_and_freeze_parts_by_name():
    whole = updates(OptimizerConfig(), 0.01)[-1]
    parts = updates(OptimizerConfig(rates=(("matrix", 0.5), ("vec", 0.0), ("vector", 2.0))), 0.01)[-1]
    np.testing.assert_allclose(parts["matrix"], 0.5 * whole["matrix"], rtol=1e-6)
    assert np.all(parts["vector"] == 0)
    assert np.all(whole["vector"] != 0)
    with pytest.raises(SemidError, match="of at least 0"):
        OptimizerConfig(rates=(("matrix", -1.0),))


def test_combined_gradients_of_a_vector_of_losses():
    """Two losses pull the matrix apart; what `combine` makes of their gradients is what the step follows."""
    model, mesh = Tiny(), make_mesh(jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(warmup=0.0), num_steps=NUM_STEPS)

    def losses(model, batch, tables, context):
        return jnp.stack([jnp.sum(model.matrix[...]), -3 * jnp.sum(model.matrix[...])]), {"seen": jnp.sum(batch)}

    def taken(combine):
        step = make_step(model, optimizer, losses, tables=None, seed=0, num_steps=NUM_STEPS, mesh=mesh, combine=combine)
        state, metrics = step(create_state(model, optimizer, mesh), put_batch(jnp.ones(2), mesh))
        return np.asarray(named_leaves(state.params)["matrix"]) - 2.0, metrics

    first, metrics = taken(lambda gradients: (gradients[0], {"count": jnp.float32(len(gradients))}))
    assert np.all(first < 0)
    assert float(metrics["count"]) == 2
    assert float(metrics["loss"]) == pytest.approx(12 - 36)
    assert float(metrics["seen"]) == 2
    both, _ = taken(lambda gradients: (jax.tree.map(jnp.add, *gradients), {}))
    assert np.all(both > 0)
