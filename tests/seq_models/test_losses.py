"""Blocked softmax cross-entropy against optax: value and every gradient, over shapes, weights and devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seq_models import losses
from seq_models.losses import softmax_cross_entropy

FLOATS = (0, 1, 3)  # states, vectors, weights


def reference(states, vectors, targets, weights):
    logits = jnp.matmul(states, vectors.T, precision="highest")
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def problem(n, ids, *, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    states, vectors = (jnp.asarray(scale * rng.normal(size=(rows, 4)), jnp.float32) for rows in (n, ids))
    weights = jnp.asarray(rng.uniform(size=n) * rng.integers(0, 2, n), jnp.float32)  # some are zero
    return states, vectors, jnp.asarray(rng.integers(0, ids, n)), weights


def check(inputs, placed=None):
    value, gradients = jax.jit(jax.value_and_grad(softmax_cross_entropy, FLOATS))(*(placed or inputs))
    expected, wanted = jax.value_and_grad(reference, FLOATS)(*inputs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# With a block of 24 logits: one block, a whole number of blocks, a rest, one state a block, fewer states than a block.
@pytest.mark.parametrize(("n", "ids"), [(4, 6), (8, 6), (7, 6), (5, 30), (2, 3), (1, 1)])
def test_value_and_gradients_are_those_of_optax(n, ids, monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK", 24)
    check(problem(n, ids))


def test_one_block_holds_a_small_problem():
    check(problem(40, 30))


def test_large_logits_do_not_overflow():
    check(problem(16, 9, scale=12.0))


def test_the_gradient_is_scaled_by_what_follows_and_needs_no_jit():
    states, *rest = problem(6, 5)
    doubled = jax.grad(lambda s: 2.0 * softmax_cross_entropy(s, *rest))(states)
    np.testing.assert_allclose(doubled, 2 * jax.grad(lambda s: reference(s, *rest))(states), rtol=1e-5, atol=1e-6)


def test_rows_of_weight_zero_count_for_nothing():
    states, vectors, targets, weights = problem(9, 5)
    other = jnp.where(weights[:, None] == 0, 1e3, states)
    assert np.any(np.asarray(weights) == 0)
    whole, again = (jax.grad(softmax_cross_entropy, 1)(s, vectors, targets, weights) for s in (states, other))
    np.testing.assert_allclose(whole, again, atol=1e-6)
    assert softmax_cross_entropy(states, vectors, targets, jnp.zeros_like(weights)) == 0


def test_repeated_targets_add_up():
    states, vectors, _, weights = problem(8, 5)
    check((states, vectors, jnp.full(8, 2), jnp.ones_like(weights)))


def test_a_batch_over_eight_devices_gives_the_same(monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK", 100)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inputs = problem(48, 10)
    whole, rows = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    check(inputs, jax.device_put(inputs, (rows, whole, rows, rows)))


def test_no_array_of_all_logits_is_held(monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK", 64)
    n, ids = 64, 32

    def held(function):
        text = jax.jit(jax.grad(function, FLOATS)).lower(*problem(n, ids)).as_text()
        return f"tensor<{n}x{ids}xf32>" in text

    assert not held(softmax_cross_entropy)
    assert held(reference)
