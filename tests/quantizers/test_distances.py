"""Distances against numpy, in both metrics."""

from __future__ import annotations

import contextlib
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from quantizers import Distance, code_logits, distances, nearest, unit_vectors
from quantizers.distances import nearest_by_slices


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)


@pytest.fixture
def codebook() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(11, 5)).astype(np.float32)


def test_squared_distances_equal_numpy(x, codebook):
    expected = np.square(x[..., None, :].astype(np.float64) - codebook).sum(-1)
    np.testing.assert_allclose(distances(jnp.asarray(x), codebook, distance=Distance.EUCLIDEAN), expected, atol=1e-5)
    np.testing.assert_array_equal(nearest(jnp.asarray(x), codebook), expected.argmin(-1))


def test_cosine_distances_equal_numpy_and_ignore_lengths(x, codebook):
    lengths = np.linalg.norm(x, axis=-1)[..., None] * np.linalg.norm(codebook, axis=-1)
    found = distances(jnp.asarray(x), codebook, distance=Distance.COSINE)
    np.testing.assert_allclose(found, 2 - 2 * (x @ codebook.T) / lengths, atol=1e-5)
    scaled = np.arange(1, 12, dtype=np.float32)[:, None] * codebook
    np.testing.assert_allclose(distances(9 * jnp.asarray(x), scaled, distance=Distance.COSINE), found, atol=1e-5)
    cosine, euclidean = (
        nearest(jnp.asarray(x), scaled, distance=distance) for distance in (Distance.COSINE, Distance.EUCLIDEAN)
    )
    np.testing.assert_array_equal(cosine, found.argmin(-1))
    assert not np.array_equal(cosine, euclidean)


@pytest.mark.parametrize("distance", Distance)
def test_logits_decrease_with_distance(distance):
    """Points on an arc: away from the vector both in distance and in direction."""
    angles = np.linspace(0, np.pi, 9)
    arc = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], -1), jnp.float32)
    assert (np.diff(-distances(arc[0], arc, distance=distance)) < 0).all()
    assert (np.diff(code_logits(arc[0], arc, temperature=0.5)) < 0).all()


@pytest.mark.parametrize("distance", Distance)
def test_slices_have_the_nearest_codes_of_all(x, codebook, distance, monkeypatch):
    rows = jnp.asarray(x.reshape(-1, 5))
    for entries in (11 * 4, 5):
        monkeypatch.setattr(sys.modules["quantizers.distances"], "_ENTRIES", entries)
        found = nearest_by_slices(rows, codebook, distance=distance)
        np.testing.assert_array_equal(found, nearest(rows, codebook, distance=distance))


def test_directions_have_length_one_and_zero_stays_zero(x):
    np.testing.assert_allclose(np.linalg.norm(unit_vectors(1e-4 * jnp.asarray(x)), axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(unit_vectors(jnp.zeros((2, 3))), 0)
    gradient = jax.grad(lambda v: unit_vectors(v).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()


def test_annotations_are_checked_in_this_file():
    with contextlib.suppress(jaxtyping.TypeCheckError):
        nearest(jnp.zeros((2, 3)), jnp.zeros((4, 5)))
        pytest.fail("vectors of 3 dimensions and codes of 5 passed")
