"""Assignments: the plan against a float64 Sinkhorn, noise against what it must not change."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizers import AssignedCodes, Assignment, Gumbel, Nearest, OverusedGumbel, Schedule, Sinkhorn, sinkhorn
from quantizers.distances import squared_distances

N, CODES = 96, 8
ALL = [Nearest(), Sinkhorn(), Gumbel(), OverusedGumbel()]
_names = pytest.mark.parametrize("assignment", ALL, ids=lambda assignment: type(assignment).__name__)


@pytest.fixture
def table() -> jax.Array:
    """Distances of inputs of which most lie near the first code."""
    x = 0.3 * jax.random.normal(jax.random.key(0), (N, 3))
    codebook = jax.random.normal(jax.random.key(1), (CODES, 3)).at[0].set(0.0)
    return squared_distances(x, codebook)


def _assign(assignment: Assignment, distances: jax.Array, **options: object) -> AssignedCodes:
    plain = {
        "mask": np.ones(len(distances), bool),
        "usage": np.full(distances.shape[1], 1 / distances.shape[1], np.float32),
        "key": None,
        "progress": 1.0,
    }
    return _compiled(assignment, distances, **(plain | options))


@partial(jax.jit, static_argnums=0)
def _compiled(assignment: Assignment, distances: jax.Array, **options: object) -> AssignedCodes:
    return assignment(distances, **options)


def _plan_in_float64(distances: np.ndarray, *, epsilon: float, iterations: int) -> np.ndarray:
    """Plain Sinkhorn on the kernel, as LC-Rec scales the distances."""
    middle = (distances.max() + distances.min()) / 2
    kernel = np.exp(-(distances - middle) / (distances.max() - middle + 1e-5) / epsilon)
    n, codes = kernel.shape
    rows, columns = np.ones(n), np.ones(codes)
    for _ in range(iterations):
        columns = 1 / codes / (kernel.T @ rows)
        rows = 1 / n / (kernel @ columns)
    return rows[:, None] * kernel * columns


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("epsilon", [0.003, 0.1])
def test_rows_and_columns_of_the_plan_sum_to_their_marginals_in_float32(table, epsilon, masked):
    mask = jnp.arange(N) % 3 > 0 if masked else jnp.ones(N, bool)
    poisoned = jnp.where(mask[:, None], table, jnp.nan)
    plan = sinkhorn(poisoned, epsilon=epsilon, iterations=2000, mask=mask)
    assert plan.dtype == jnp.float32
    np.testing.assert_allclose(plan.sum(0), np.full(CODES, 1 / CODES), rtol=1e-3)
    np.testing.assert_allclose(plan.sum(1), np.asarray(mask) / np.asarray(mask).sum(), rtol=1e-5)


def test_the_plan_equals_plain_sinkhorn_in_float64(table):
    found = sinkhorn(table, epsilon=0.05, iterations=500)
    expected = _plan_in_float64(np.asarray(table, np.float64), epsilon=0.05, iterations=5000)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-3)


def test_columns_are_near_after_the_default_iterations():
    x = jax.random.normal(jax.random.key(0), (1024, 32))
    table = squared_distances(x, 0.7 * jax.random.normal(jax.random.key(1), (256, 32)))
    columns = 256 * np.asarray(sinkhorn(table, epsilon=0.003, iterations=50)).sum(0)
    assert np.abs(columns - 1).mean() < 0.03
    found = _assign(Sinkhorn(), table)
    assert np.bincount(found.codes, minlength=256).max() <= 8  # twice the average of 4
    assert np.bincount(table.argmin(-1), minlength=256).max() > 8  # control


def test_sinkhorn_chooses_the_largest_share_of_its_plan(table):
    codes = _assign(Sinkhorn(), table).codes
    plan = np.asarray(sinkhorn(table, epsilon=0.003, iterations=50))
    np.testing.assert_allclose(plan[np.arange(N), codes], plan.max(-1))
    assert np.bincount(codes, minlength=CODES).max() <= 16  # balanced is 12
    assert np.bincount(_assign(Nearest(), table).codes, minlength=CODES).max() > 48  # control


def test_masked_rows_do_not_weigh_in_the_balance(table):
    mask = jnp.arange(N) < 60
    alone = _assign(Sinkhorn(), table[:60]).codes
    np.testing.assert_array_equal(_assign(Sinkhorn(), table, mask=mask).codes[:60], alone)
    assert not np.array_equal(_assign(Sinkhorn(), table).codes[:60], alone)  # control


@_names
def test_probabilities_are_the_softmax_of_minus_distance_over_temperature(table, assignment):
    cooled = type(assignment)(temperature=Schedule(0.5, initial=2.0))
    for progress, temperature in ((0.0, 2.0), (1.0, 0.5)):
        found = _assign(cooled, table, progress=progress)
        np.testing.assert_allclose(found.probabilities, jax.nn.softmax(-table / temperature), rtol=1e-5)
    one = _assign(assignment, jnp.arange(8.0)[None, :])
    assert (jnp.diff(one.probabilities[0]) < 0).all()


@_names
def test_gradients_of_probabilities_are_finite(table, assignment):
    first = jax.grad(lambda d: _assign(assignment, d, key=jax.random.key(0)).probabilities[:, 0].sum())
    gradient = np.asarray(jax.jit(first)(table))
    assert np.isfinite(gradient).all()
    assert (gradient[:, 0] < 0).all()


@_names
def test_no_inputs_one_input_and_nothing_but_masked_inputs(table, assignment):
    assert _assign(assignment, table[:0]).codes.shape == (0,)
    assert _assign(assignment, table[:1]).codes.shape == (1,)
    hidden = _assign(assignment, table, mask=jnp.zeros(N, bool))
    np.testing.assert_array_equal(hidden.codes, table.argmin(-1))


@pytest.mark.parametrize("assignment", [Gumbel(), OverusedGumbel()])
def test_without_a_key_noise_is_off_and_with_it_the_key_decides(table, assignment):
    crowded = jnp.eye(CODES)[0]
    np.testing.assert_array_equal(_assign(assignment, table, usage=crowded).codes, table.argmin(-1))
    first, again, other = (
        _assign(assignment, table, usage=crowded, key=jax.random.key(seed)).codes for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, table.argmin(-1))
    assert not np.array_equal(first, other)


def test_gumbel_noise_samples_the_softmax():
    """argmax(-d + scale g) has the probabilities softmax(-d / scale)."""
    distances = jnp.broadcast_to(jnp.array([0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), (20_000, CODES))
    found = _assign(Gumbel(scale=Schedule(2.0)), distances, key=jax.random.key(0))
    shares = np.bincount(found.codes, minlength=CODES) / 20_000
    np.testing.assert_allclose(shares, jax.nn.softmax(-distances[0] / 2), atol=0.015)


def test_noise_reaches_only_inputs_of_over_used_codes(table):
    nearest = np.asarray(table.argmin(-1))
    key = jax.random.key(3)
    balanced = jnp.full(CODES, 1 / CODES)
    at_the_threshold = balanced.at[0].set(1.5 / CODES)
    for usage in (balanced, at_the_threshold):
        np.testing.assert_array_equal(_assign(OverusedGumbel(), table, usage=usage, key=key).codes, nearest)
    crowded = _assign(OverusedGumbel(), table, usage=balanced.at[0].set(0.5), key=key).codes
    np.testing.assert_array_equal(crowded[nearest != 0], nearest[nearest != 0])
    noisy = _assign(Gumbel(), table, key=key).codes
    np.testing.assert_array_equal(crowded[nearest == 0], noisy[nearest == 0])
    assert (noisy[nearest == 0] != 0).any()
    assert (noisy[nearest != 0] != nearest[nearest != 0]).any()  # control


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"iterations": 0}])
def test_sinkhorn_wants_a_positive_epsilon_and_an_iteration(options):
    with pytest.raises(ValueError, match="epsilon > 0 and iterations >= 1"):
        Sinkhorn(**options)


@pytest.mark.parametrize("kind", [Nearest, Sinkhorn, Gumbel, OverusedGumbel])
def test_temperatures_are_above_zero(kind):
    for temperature in (Schedule(0.0), Schedule(0.1, initial=0.0)):
        with pytest.raises(ValueError, match=rf"^{kind.__name__}: expected temperatures above 0, by which .* got S"):
            kind(temperature=temperature)
    with pytest.raises(ValueError, match="expected a finite threshold above 0, got 0"):
        OverusedGumbel(threshold=0)
    kind(temperature=Schedule(1e-3))
