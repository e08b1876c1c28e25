"""Losses against optax and sums by hand; the blocked softmax over shapes, weights and devices."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import special

from seq_models import losses
from seq_models.losses import (
    code_cross_entropy,
    constrained_cross_entropy,
    cross_entropy,
    distillation,
    softmax_cross_entropy,
)
from seq_models.trie import CodeTrie

FLOATS = (0, 1, 3)  # states, vectors, weights


@jax.jit
def reference(states, vectors, targets, weights, without=None):
    logits = jnp.matmul(states, vectors.T, precision="highest")
    if without is not None:
        logits = jnp.where(jax.nn.one_hot(without, len(vectors), dtype=bool).any(axis=1), -jnp.inf, logits)
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


reference_and_gradients = jax.jit(jax.value_and_grad(reference, FLOATS))


def problem(n, ids, *, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    states, vectors = ((scale * rng.normal(size=(rows, 4))).astype(np.float32) for rows in (n, ids))
    weights = (rng.uniform(size=n) * rng.integers(0, 2, n)).astype(np.float32)  # some are zero
    return jax.device_put((states, vectors, rng.integers(0, ids, n), weights))


def left_out(inputs, width, *, seed=0):
    """Ids for each state to leave out, some of them twice or none (-1), never its target."""
    states, vectors, targets, _ = inputs
    rng = np.random.default_rng(seed)
    without = rng.integers(-1, len(vectors), (len(states), width)).astype(np.int32)
    without[:, -1] = without[:, 0]
    return jax.device_put(np.where(without == np.asarray(targets)[:, None], -1, without))


def check(inputs, placed=None, without=None, **axes):
    loss = functools.partial(softmax_cross_entropy, without=without, **axes)
    value, gradients = jax.jit(jax.value_and_grad(loss, FLOATS))(*(placed or inputs))
    expected, wanted = reference_and_gradients(*inputs, without)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(gradients, wanted, strict=True):  # small entries are what is left of terms like the largest
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, np.abs(want).max()))


# With a block of 24 logits: one block, a whole number of blocks, a rest, one state a block, fewer states than a block.
@pytest.mark.parametrize(("n", "ids"), [(4, 6), (8, 6), (7, 6), (5, 30), (2, 3), (1, 1)])
def test_value_and_gradients_are_those_of_optax(n, ids, monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK", 24)
    monkeypatch.setattr(losses, "_FEW_STATES", 1)
    check(inputs := problem(n, ids))
    check(inputs, without=left_out(inputs, 3))


# 24 logits and 4 states a block, hence 6 ids: a whole number of blocks of either, and a rest of either or both.
@pytest.mark.parametrize(("n", "ids"), [(8, 12), (7, 12), (8, 14), (7, 13), (2, 30)])
def test_blocks_of_ids_change_nothing(n, ids, monkeypatch):
    for name, value in {"_BLOCK": 24, "_FEW_STATES": 9, "_MANY_STATES": 4}.items():
        monkeypatch.setattr(losses, name, value)
    check(problem(n, ids))
    check(inputs := problem(n, ids, scale=5.0))
    check(inputs, without=left_out(inputs, 30))  # of some states, a block of ids altogether


def test_a_state_may_leave_out_all_ids_but_its_target(monkeypatch):
    for name, value in {"_BLOCK": 24, "_FEW_STATES": 9, "_MANY_STATES": 4}.items():
        monkeypatch.setattr(losses, name, value)
    states, vectors, targets, _ = problem(7, 14, scale=5.0)
    others = jnp.where(jax.nn.one_hot(targets, 14, dtype=bool), -1, jnp.arange(14)[None])
    loss = functools.partial(softmax_cross_entropy, without=others)
    value, gradients = jax.value_and_grad(loss, (0, 1))(states, vectors, targets, jnp.ones(7))
    assert value == pytest.approx(0, abs=1e-4)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-4)


def test_a_state_without_target_may_leave_out_all_ids():
    states, vectors, targets, _ = problem(5, 6)
    targets, without = targets.at[4].set(-1), jnp.full((5, 6), -1).at[4].set(jnp.arange(6))
    loss = jax.value_and_grad(softmax_cross_entropy, (0, 1))
    value, gradients = loss(states, vectors, targets, jnp.ones(5).at[4].set(0), without=without)
    expected, others = loss(states[:4], vectors, targets[:4], jnp.ones(4))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], np.pad(others[0], ((0, 1), (0, 0))), atol=1e-6)
    np.testing.assert_allclose(gradients[1], others[1], atol=1e-6)


@pytest.mark.parametrize("width", [1, 31, 64, 70, 256])
def test_columns_are_left_out_by_comparison_as_by_a_scatter(width):
    rng = np.random.default_rng(0)
    logits, at = rng.normal(size=(5, width)).astype(np.float32), rng.integers(0, 2 * width, (5, 9)).astype(np.int32)
    at[:, 1], at[0, 2:], at[1, 2] = at[:, 0], width, 2**31 - 1
    logits, at = jax.device_put((logits, at))
    left = np.array(jax.jit(losses._leave_out)(logits, at))
    assert np.isneginf(left).any()
    np.testing.assert_array_equal(jax.jit(losses._leave_out_by_comparison)(logits, at), left)


def test_a_tpu_scatters_no_single_logits():
    """Nothing but the targets' rows of the vectors' gradient."""
    inputs = problem(8, 12)
    loss = jax.jit(jax.grad(functools.partial(softmax_cross_entropy, without=left_out(inputs, 3)), FLOATS))

    def scatters(platform):
        text = loss.trace(*inputs).lower(lowering_platforms=(platform,)).as_text()
        return ["update_window_dims" in line for line in text.splitlines() if "#stablehlo.scatter" in line]

    assert scatters("tpu") == [True]
    assert not all(scatters("cpu"))  # control


def test_a_gpu_takes_more_logits_at_once(monkeypatch):
    for name, value in {"_BLOCK": 24, "_GPU_BLOCK": 200, "_FEW_STATES": 4, "_MANY_STATES": 4}.items():
        monkeypatch.setattr(losses, name, value)
    inputs = problem(23, 14)
    without, loss = left_out(inputs, 3), jax.value_and_grad(softmax_cross_entropy, FLOATS)

    def turns():
        """Of the loops over blocks of states, and of ids within them, and what they add up to."""
        jax.clear_caches()
        run = functools.partial(loss, without=without)
        return re.findall(r"length=(\d+)", str(jax.make_jaxpr(run)(*inputs))), jax.jit(run)(*inputs)

    def for_gpus(*inputs, cuda=None, default, **others):
        return (cuda or default)(*inputs)

    monkeypatch.setattr(losses.jax.lax, "platform_dependent", lambda *inputs, default, **others: default(*inputs))
    many, expected = turns()
    monkeypatch.setattr(losses.jax.lax, "platform_dependent", for_gpus)
    few, got = turns()
    assert {*many} == {"6", "3"}
    assert {*few} == {"2", "1"}  # 12 states, a multiple of 4, and all ids
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_one_block_holds_a_small_problem():
    check(problem(40, 30))


def test_large_logits_do_not_overflow():
    states, vectors, *rest = problem(16, 9, scale=5.0)
    assert jnp.isinf(jnp.exp(states @ vectors.T)).any()
    check((states, vectors, *rest))


def test_the_gradient_is_scaled_by_what_follows_and_needs_no_jit():
    states, *rest = problem(6, 5)
    doubled = jax.grad(lambda s: 2.0 * softmax_cross_entropy(s, *rest))(states)
    np.testing.assert_allclose(doubled, 2 * jax.grad(lambda s: reference(s, *rest))(states), rtol=1e-5, atol=1e-6)


def test_rows_of_weight_zero_count_for_nothing():
    states, vectors, targets, weights = problem(9, 5)
    other = np.where(weights[:, None] == 0, np.float32(1e3), states)
    assert np.any(np.asarray(weights) == 0)
    gradient = jax.jit(jax.grad(softmax_cross_entropy, 1))
    whole, again = (gradient(s, vectors, targets, weights) for s in (states, other))
    np.testing.assert_allclose(whole, again, atol=1e-6)
    assert softmax_cross_entropy(states, vectors, targets, jnp.zeros_like(weights)) == 0


def test_repeated_targets_add_up():
    states, vectors, _, weights = problem(8, 5)
    check((states, vectors, jnp.full(8, 2), jnp.ones_like(weights)))


@pytest.mark.parametrize("few_states", [1, 1000])
@pytest.mark.parametrize(
    ("shape", "row_axes", "id_axes"),
    [((8, 1, 1), ("data",), ()), ((2, 2, 2), ("data", "fsdp"), ("tensor",)), ((2, 1, 4), (), ("data", "tensor"))],
)
def test_states_and_ids_over_eight_devices_give_the_same(shape, row_axes, id_axes, few_states, monkeypatch):
    for name, value in {"_BLOCK": 24, "_FEW_STATES": few_states, "_MANY_STATES": 5}.items():
        monkeypatch.setattr(losses, name, value)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    inputs = problem(48, 24)
    rows, ids = (NamedSharding(mesh, PartitionSpec(names or None)) for names in (row_axes, id_axes))
    with jax.set_mesh(mesh):
        placed = jax.device_put(inputs, (rows, ids, rows, rows))
        check(inputs, placed, row_axes=row_axes, id_axes=id_axes)
        without = jax.device_put(left_out(inputs, 5), rows)
        check(inputs, placed, without, row_axes=row_axes, id_axes=id_axes)
        gradient = jax.jit(jax.grad(functools.partial(softmax_cross_entropy, row_axes=row_axes, id_axes=id_axes), 1))
        assert gradient(*placed).sharding.is_equivalent_to(ids, 2)


def test_states_over_devices_leave_their_ids_out_where_they_are():
    """Nothing but sums travels between devices, though the loss is not told how the states lie."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inputs = problem(48, 24)
    rows, whole = (NamedSharding(mesh, PartitionSpec(names)) for names in ("data", None))
    placed = jax.device_put((*inputs, left_out(inputs, 5)), (rows, whole, rows, rows, rows))
    loss = jax.jit(lambda *given: softmax_cross_entropy(*given[:4], without=given[4]))
    text = jax.jit(jax.value_and_grad(loss, FLOATS)).lower(*placed).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_no_array_of_all_logits_is_held(monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK", 64)
    n, ids = 64, 32

    def held(function):
        text = jax.jit(jax.grad(function, FLOATS)).lower(*problem(n, ids)).as_text()
        return f"tensor<{n}x{ids}xf32>" in text

    assert not held(softmax_cross_entropy)
    assert not held(functools.partial(softmax_cross_entropy, without=jnp.zeros((n, 3), jnp.int32)))
    assert held(reference)


def memory(ids, n):
    """Bytes that the compiled value and gradient takes beside its inputs and outputs."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, 64), (ids, 64), (n,))]
    states, vectors, weights = shapes
    loss = jax.jit(jax.value_and_grad(softmax_cross_entropy, FLOATS))
    compiled = loss.lower(states, vectors, jax.ShapeDtypeStruct((n,), jnp.int32), weights).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_million_ids_take_the_memory_of_their_vectors():
    """All logits would be 8 GiB; the vectors' own gradient is 256 MB, and a few copies of it are all there is."""
    assert memory(1_000_000, 2048) < 4 * 256e6


def test_bfloat16_states_are_multiplied_in_it_and_have_gradients_of_it():
    states, *rest = problem(16, 12)
    value, gradients = jax.jit(jax.value_and_grad(softmax_cross_entropy, FLOATS))(states.astype(jnp.bfloat16), *rest)
    expected, wanted = reference_and_gradients(states, *rest)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_allclose(value, expected, rtol=0.02)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05)


SIZES = (3, 5)


def code_problem(n=6):
    rng = np.random.default_rng(1)
    logits = [(2 * rng.normal(size=(n, size))).astype(np.float32) for size in SIZES]
    return jax.device_put((logits, rng.integers(0, SIZES, (n, 2)), np.array([1, 0, 2, 1, 0.5, 0], np.float32)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_code_cross_entropy_is_the_weighted_mean_of_optax(smoothing):
    logits, codes, weights = code_problem()
    means = jax.jit(functools.partial(code_cross_entropy, smoothing=smoothing))(logits, codes, weights)

    @jax.jit
    def each_twice(logits, codes):
        wanted = optax.smooth_labels(jax.nn.one_hot(codes, logits.shape[-1]), smoothing)
        return optax.softmax_cross_entropy(logits, wanted), cross_entropy(logits, codes, smoothing=smoothing)

    for level in range(len(SIZES)):
        each, own = each_twice(logits[level], np.asarray(codes)[:, level])
        np.testing.assert_allclose(means[level], np.average(each, weights=weights), rtol=1e-5)
        np.testing.assert_allclose(own, each, rtol=1e-5)


def test_targets_without_weight_count_for_nothing():
    logits, codes, weights = code_problem()
    loss = jax.jit(code_cross_entropy)
    other, counted = np.array(codes), np.array(codes)
    other[1], counted[0] = (other[1] + 1) % SIZES, (counted[0] + 1) % SIZES
    np.testing.assert_array_equal(loss(logits, codes, weights), loss(logits, other, weights))
    changed = loss(logits, counted, weights)
    assert np.all(np.asarray(changed) != np.asarray(loss(logits, codes, weights)))
    np.testing.assert_array_equal(loss(logits, codes, np.zeros(6, np.float32)), [0.0, 0.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_constrained_softmax_is_the_softmax_of_the_children(smoothing):
    logits = code_problem()[0][1]
    children = [[4, 0], [2], [0, 1, 2, 3, 4], [3, 1, 4], [1], [2, 3]]
    codes = np.array([0, 2, 3, 1, 1, 2], np.int32)
    padded = np.array([one + one[-1:] * (5 - len(one)) for one in children])  # as the trie pads: by the last
    valid = np.array([[i < len(one) for i in range(5)] for one in children])

    @jax.jit
    def each(logits):
        return constrained_cross_entropy(logits, *map(jnp.asarray, (codes, padded, valid)), smoothing=smoothing)

    got = np.asarray(each(logits))
    for row, among in enumerate(children):
        log_probs = special.log_softmax(np.asarray(logits)[row, among])
        expected = -(1 - smoothing) * log_probs[among.index(int(codes[row]))] - smoothing * log_probs.mean()
        np.testing.assert_allclose(got[row], expected, atol=1e-5)
    np.testing.assert_allclose(got[[1, 4]], [0.0, 0.0], atol=1e-6)  # an only child is certain
    every = jax.jit(functools.partial(cross_entropy, smoothing=smoothing))(logits, codes)
    np.testing.assert_allclose(got[2], every[2], rtol=1e-5)
    gradient = np.asarray(jax.jit(jax.grad(lambda x: each(x).sum()))(logits))
    for row, among in enumerate(children):
        outside = [code for code in range(5) if code not in among]
        np.testing.assert_array_equal(gradient[row, np.array(outside, int)], np.zeros(len(outside)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("among_children", [False, True])
def test_distillation_is_the_cross_entropy_to_the_teachers_codes(among_children):
    """By enumeration: the teacher's probability of every code, given the target's codes before it."""
    logits, codes, weights = code_problem()
    items = np.array([[0, 1], [0, 4], [1, 1], [1, 1], [1, 3]])  # two share their codes; no item begins with 2
    codes, weights = np.array(codes), np.asarray(weights)
    codes[:, 0] = [0, 1, 1, 2, 0, 2]
    scores = np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32)
    taught = {"teacher_codes": np.broadcast_to(items, (6, 5, 2)), "teacher_scores": scores}
    exist = np.unique(np.concatenate([items, codes]), axis=0).astype(np.int32)
    trie = CodeTrie.from_codes(exist, SIZES) if among_children else None
    got = jax.jit(distillation)(logits, codes, weights, **taught, trie=trie)
    every = [np.array(of_level, np.float64) for of_level in jax.device_get(logits)]
    sums, totals = np.zeros(2), np.zeros(2)
    for row, level in np.ndindex(6, 2):
        alive = (items[:, :level] == codes[row, :level]).all(axis=1)
        if not alive.any():
            continue
        powers = np.exp(scores[row].astype(np.float64)) * alive
        wanted = np.bincount(items[:, level], powers / powers.sum(), minlength=SIZES[level])
        children = exist[(exist[:, :level] == codes[row, :level]).all(axis=1), level]
        among = np.unique(children) if among_children else np.arange(SIZES[level])
        sums[level] -= weights[row] * (wanted[among] @ special.log_softmax(every[level][row, among]))
        totals[level] += weights[row]
    assert totals[1] < totals[0]
    np.testing.assert_allclose(got, sums / totals, rtol=1e-5)


def test_distillation_pulls_towards_the_teacher_and_its_gradient_is_finite():
    logits, codes, weights = code_problem()
    teacher_codes = np.random.default_rng(3).integers(0, SIZES, (6, 4, 2))
    scores = np.zeros((6, 4), np.float32)
    taught = {"teacher_codes": jnp.asarray(teacher_codes), "teacher_scores": jnp.asarray(scores)}
    loss = jax.jit(functools.partial(distillation, **taught))
    gradient = jax.device_get(jax.jit(jax.grad(lambda x: loss(x, codes, weights).sum()))(logits))
    assert all(np.isfinite(g).all() for g in gradient)
    after = [x - 0.1 * g for x, g in zip(logits, gradient, strict=True)]
    assert loss(after, codes, weights)[0] < loss(logits, codes, weights)[0]
