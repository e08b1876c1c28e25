"""Gradient surgery against a search for the nearest gradient without conflict."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from semid.joint import projected, sum_without_conflict


def random(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 2), "b": (4,), "c": (2, 2), "d": (5,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def inner(a, b):
    return float(np.sum(np.asarray(a, float) * np.asarray(b, float)))


def nearest_without_conflict(x, other):
    """The point nearest to `x` in the half-space where the inner product with `other` is not negative."""
    x, other = np.asarray(x, float).ravel(), np.asarray(other, float).ravel()
    limit = {"type": "ineq", "fun": lambda v: v @ other, "jac": lambda v: other}
    return minimize(lambda v: ((v - x) ** 2).sum(), x, jac=lambda v: 2 * (v - x), constraints=[limit], tol=1e-12).x


@pytest.mark.parametrize("seed", range(4))
def test_each_leaf_is_the_nearest_one_without_conflict(seed):
    gradients, against = random(seed), random(100 + seed)
    found = jax.jit(projected)(gradients, against)
    opposed = [name for name in gradients if inner(gradients[name], against[name]) < 0]
    assert float(found.conflicts) == pytest.approx(len(opposed) / 4)
    for name, leaf in found.gradients.items():
        expected = nearest_without_conflict(gradients[name], against[name])
        np.testing.assert_allclose(np.ravel(leaf), expected, atol=1e-5)
        if name not in opposed:
            np.testing.assert_array_equal(leaf, gradients[name])


def test_no_conflict_remains():
    gradients = random(0)
    against = {name: -x + 0.1 * y for (name, x), y in zip(gradients.items(), random(1).values(), strict=True)}
    found = projected(gradients, against)
    assert float(found.conflicts) == 1
    for name, leaf in found.gradients.items():
        scale = np.linalg.norm(gradients[name]) * np.linalg.norm(against[name])
        assert inner(gradients[name], against[name]) < -0.5 * scale
        assert abs(inner(leaf, against[name])) < 1e-6 * scale


def test_leaves_that_one_loss_does_not_reach_stay_and_do_not_count():
    gradients, against = random(0), jax.tree.map(jnp.negative, random(0))
    gradients["a"], against["b"] = jnp.zeros((3, 2)), jnp.zeros(4)
    found = projected(gradients, against)
    assert float(found.conflicts) == 1
    np.testing.assert_array_equal(found.gradients["a"], 0)
    np.testing.assert_array_equal(found.gradients["b"], gradients["b"])
    nothing = jax.tree.map(jnp.zeros_like, gradients)
    assert float(projected(gradients, nothing).conflicts) == 0


def test_the_sum_helps_the_first_loss_wherever_it_reaches():
    kept, yielding = random(0), jax.tree.map(lambda x: -3 * x, random(0))
    total, metrics = sum_without_conflict([kept, yielding])
    assert float(metrics["conflicts"]) == 1
    for name, leaf in total.items():
        np.testing.assert_allclose(leaf, kept[name], atol=1e-5)
    agreeing, metrics = sum_without_conflict([kept, kept])
    assert float(metrics["conflicts"]) == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-6), agreeing, kept)
