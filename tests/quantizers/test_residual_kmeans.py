"""Residual k-means: balance, blocks, and catalogues with fewer vectors than codes."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizers.kmeans import balanced_kmeans
from quantizers.residual_kmeans import ResidualKMeans, cluster_levels

KEY = jax.random.key(0)


@pytest.fixture
def x() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(5, 4))[rng.integers(5, size=400)] + 0.3 * rng.normal(size=(400, 4))).astype(np.float32)


def _error(quantizer: ResidualKMeans, x: np.ndarray) -> float:
    return float(np.square(np.asarray(quantizer.decode(quantizer.encode(jnp.asarray(x)))) - x).mean())


def test_codes_of_the_fit_are_those_of_encode(x):
    found = cluster_levels(x, level_sizes=(6, 5, 4), iterations=4, key=KEY)
    np.testing.assert_array_equal(found.codes, ResidualKMeans(found.codebooks).encode(jnp.asarray(x)))


def test_residuals_of_unit_norm_use_codebooks_that_a_few_large_ones_would_take():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 8)).astype(np.float32)
    x[:40] *= 30
    settings = {"level_sizes": (8, 8), "iterations": 10, "key": KEY}
    for unit_norm, used in ((False, range(80)), (True, range(300, 600))):
        found = cluster_levels(x, unit_norm=unit_norm, **settings)
        fitted = ResidualKMeans.fit(jnp.asarray(x), unit_norm=unit_norm, **settings)
        np.testing.assert_array_equal(fitted.encode(jnp.asarray(x)), found.codes)
        typical = np.bincount(found.codes[40:, 1], minlength=8)
        assert 560 - typical.max() in used
        inputs = x - np.asarray(fitted.codebooks[0])[found.codes[:, 0]]
        norms = np.linalg.norm(inputs, axis=-1, keepdims=True)
        np.testing.assert_allclose(found.norms, [1, norms.mean()], rtol=1e-5)
        np.testing.assert_allclose(
            fitted.last_inputs(jnp.asarray(x)), inputs / norms if unit_norm else inputs, atol=1e-4
        )


def test_rounding_of_items_alone_on_their_code_is_not_scaled_to_unit_norm():
    rng = np.random.default_rng(0)
    clusters = np.repeat(3 * rng.normal(size=(60, 8)), 6, axis=0) + 0.1 * rng.normal(size=(360, 8))
    x = jnp.asarray(np.concatenate([clusters, 40 * rng.normal(size=(30, 8))]), jnp.float32)
    settings = {"level_sizes": (90, 8, 8), "iterations": 10, "key": KEY, "unit_norm": True}
    fitted = ResidualKMeans.fit(x, **settings)
    codes = fitted.encode(x)
    np.testing.assert_array_equal(cluster_levels(x, **settings).codes, codes)
    np.testing.assert_array_equal(fitted.encode(jnp.nextafter(x, jnp.inf)), codes)
    np.testing.assert_array_equal(np.concatenate([fitted.encode(x[row : row + 1]) for row in range(len(x))]), codes)
    second = ResidualKMeans(fitted.codebooks[:2], fitted.norms[:2]).last_inputs(x)
    np.testing.assert_array_equal(second[-30:], 0)
    np.testing.assert_allclose(np.linalg.norm(second[:-30], axis=-1), 1, rtol=1e-5)


def test_every_level_balances_the_items_it_was_fitted_to(x):
    found = cluster_levels(x, level_sizes=(7, 6), iterations=8, key=KEY, cluster=balanced_kmeans)
    for level, size in enumerate((7, 6)):
        counts = np.bincount(found.codes[:, level], minlength=size)
        assert counts.max() - counts.min() <= 1
    left = x - found.codebooks[0][ResidualKMeans(found.codebooks).encode(jnp.asarray(x))[:, 0]]  # by nearest codes
    means = [left[found.codes[:, 1] == code].mean(0) for code in range(6)]
    np.testing.assert_allclose(found.codebooks[1], means, atol=1e-5)
    plain = cluster_levels(x, level_sizes=(7, 6), iterations=8, key=KEY)
    assert np.ptp(np.bincount(plain.codes[:, 0])) > 10  # control
    assert _error(ResidualKMeans(found.codebooks), x) < 2 * _error(ResidualKMeans(plain.codebooks), x)


@pytest.mark.parametrize("sizes", [(400,), (150, 1, 249)])
def test_where_the_sample_holds_all_rows_blocks_give_what_memory_gives(x, sizes):
    blocks = np.split(x + 30, np.cumsum(sizes)[:-1])  # far from the origin
    streamed = ResidualKMeans.fit_blocks(lambda: iter(blocks), level_sizes=(6, 5), iterations=2, passes=3, key=KEY)
    in_memory = ResidualKMeans.fit(jnp.asarray(x + 30), level_sizes=(6, 5), iterations=5, key=KEY)
    for ours, theirs in zip(streamed.codebooks, in_memory.codebooks, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_passes_over_a_catalogue_larger_than_the_sample_come_as_close_as_memory(x):
    many = np.concatenate([x + 0.1 * np.float32(shift) for shift in np.sin(np.arange(20))])
    blocks = np.array_split(many, 7)

    def fit(passes: int) -> ResidualKMeans:
        return ResidualKMeans.fit_blocks(lambda: blocks, level_sizes=(6, 5), iterations=3, passes=passes, key=KEY)

    whole = _error(ResidualKMeans.fit(jnp.asarray(many), level_sizes=(6, 5), iterations=13, key=KEY), many)
    assert _error(fit(10), many) < 1.05 * whole
    assert _error(fit(10), many) < _error(fit(0), many)


def test_levels_shrink_to_the_vectors_there_are_and_say_so(x):
    rows = x[[0, 1, 2, 1, 0]]
    with pytest.warns(UserWarning, match="no more distinct vectors") as caught:
        fitted = ResidualKMeans.fit(jnp.asarray(rows), level_sizes=(8, 5), iterations=3, key=KEY)
    assert [re.match(r"level (\d) has (\d) codes, not (\d)", str(w.message)).groups() for w in caught] == [
        ("0", "3", "8"),
        ("1", "1", "5"),
    ]
    assert fitted.level_sizes == (3, 1)
    np.testing.assert_array_equal(fitted.encode(jnp.asarray(rows)), [[0, 0], [1, 0], [2, 0], [1, 0], [0, 0]])
    np.testing.assert_array_equal(fitted.decode(fitted.encode(jnp.asarray(rows))), rows)
    with pytest.warns(UserWarning, match="no more distinct vectors"):
        streamed = ResidualKMeans.fit_blocks(
            lambda: [rows[:2], rows[2:]], level_sizes=(8, 5), iterations=3, passes=1, key=KEY
        )
    np.testing.assert_array_equal(streamed.codebooks[0], fitted.codebooks[0])
    full = ResidualKMeans.fit(jnp.asarray(x), level_sizes=(8, 5), iterations=3, key=KEY)  # control: no warning
    assert full.level_sizes == (8, 5)


def test_a_rare_vector_outside_the_sample_still_gets_its_code():
    rows = np.zeros((5000, 2), np.float32)
    rows[4321] = 1
    with pytest.warns(UserWarning, match="no more distinct vectors"):
        fitted = ResidualKMeans.fit_blocks(lambda: [rows], level_sizes=(3,), iterations=1, passes=1, key=KEY)
    np.testing.assert_array_equal(fitted.codebooks[0], [[0, 0], [1, 1]])


@pytest.mark.parametrize("cluster_of_one", [1, 50])
def test_identical_vectors_have_one_code(x, cluster_of_one):
    rows = np.repeat(x[:1], cluster_of_one, axis=0)
    with pytest.warns(UserWarning, match="no more distinct vectors"):
        fitted = ResidualKMeans.fit(jnp.asarray(rows), level_sizes=(4,), iterations=2, key=KEY, cluster=balanced_kmeans)
    np.testing.assert_array_equal(fitted.codebooks[0], x[:1])


def test_bad_input(x):
    settings = {"level_sizes": (3,), "iterations": 1, "key": KEY}
    once = iter([x])
    bad = x.copy()
    bad[217, 1] = np.inf
    for blocks, message in (
        (lambda: [], "at least one vector"),
        (lambda: once, "a new iterable each time"),
        (lambda: [bad[:200], bad[200:]], "row 217"),
    ):
        with pytest.raises(ValueError, match=message):
            ResidualKMeans.fit_blocks(blocks, passes=1, **settings)
    with pytest.raises(ValueError, match="at least one vector"):
        ResidualKMeans.fit(jnp.zeros((0, 3)), **settings)
    with pytest.raises(ValueError, match="row 217 of 400"):
        ResidualKMeans.fit(jnp.asarray(bad), **settings)
    with pytest.raises(ValueError, match="each 1 or more"):
        ResidualKMeans.fit(jnp.asarray(x), **(settings | {"level_sizes": (3, 0)}))
