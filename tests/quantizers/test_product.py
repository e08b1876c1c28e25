"""Gradients, losses and fitting of product quantization. Codes against brute force are the battery's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizers import ProductKMeans, kmeans, reconstruction_error

DIM = 6


@pytest.fixture
def quantizer() -> ProductKMeans:
    rotation, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (DIM, DIM)))
    return ProductKMeans(jax.random.normal(jax.random.key(0), (3, 5, 2)), rotation)


@pytest.fixture
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (20, DIM))


def _fit(x: np.ndarray, *, num_levels: int = 3, num_codes: int = 8, rounds: int = 0) -> ProductKMeans:
    sizes, key = (num_codes,) * num_levels, jax.random.key(0)
    return ProductKMeans.fit(jnp.asarray(x), level_sizes=sizes, iterations=10, key=key, rotation_rounds=rounds)


def _error(quantizer: ProductKMeans, x: np.ndarray) -> float:
    return reconstruction_error(x, np.asarray(quantizer(jnp.asarray(x)).vectors))


def _rotated_parts(*, num_parts: int = 4) -> np.ndarray:
    """Pairs of coordinates of 16 values each, then mixed by a rotation that plain product quantization cannot undo."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(num_parts, 16, 2))
    parts = [book[rng.integers(16, size=2000)] for book in centers]
    mixing, _ = np.linalg.qr(rng.normal(size=(2 * num_parts, 2 * num_parts)))
    return (np.concatenate(parts, -1) @ mixing).astype(np.float32)


def test_jacobian_of_the_vectors_is_exactly_the_identity(quantizer, x):
    jacobian = jax.vmap(jax.jacrev(lambda item: quantizer(item).vectors))(x)
    np.testing.assert_array_equal(jacobian, np.broadcast_to(np.eye(DIM), (20, DIM, DIM)))


def test_losses_are_the_mean_square_error(quantizer, x):
    quantized = quantizer(x)
    np.testing.assert_allclose(quantized.losses, [jnp.square(quantized.vectors - x).mean()] * 2, rtol=1e-5)


def test_each_loss_moves_its_own_side(quantizer, x):
    found = jax.jacrev(lambda q, items: tuple(q(items).losses), argnums=(0, 1))(quantizer, x)
    (by_quantizer, codebook_by_x), (commitment_by_quantizer, by_x) = found
    quantized = quantizer(x)
    np.testing.assert_allclose(by_x, 2 * (x - quantized.vectors) / x.size, atol=1e-7)
    expected = np.zeros((3, 5, 2))
    differences = ((quantized.vectors - x) @ quantizer.rotation).reshape(20, 3, 2)
    for level in range(3):
        np.add.at(expected[level], np.asarray(quantized.codes[:, level]), 2 * differences[:, level] / x.size)
    np.testing.assert_allclose(by_quantizer.codebooks, expected, atol=1e-7)
    for zero in (codebook_by_x, commitment_by_quantizer.codebooks, by_quantizer.rotation):
        np.testing.assert_array_equal(zero, 0)


def test_parts_are_fitted_one_by_one(x):
    quantizer = _fit(x, num_codes=4)
    np.testing.assert_array_equal(quantizer.rotation, np.eye(DIM))
    keys = jax.random.split(jax.random.split(jax.random.key(0))[1], 3)
    for level, key in enumerate(keys):
        alone = kmeans(x[:, 2 * level : 2 * level + 2], num_codes=4, iterations=10, key=key)
        np.testing.assert_allclose(quantizer.codebooks[level], alone.centroids, atol=1e-6)


def test_the_rotation_undoes_a_mixing_of_the_parts():
    x = _rotated_parts()
    plain, optimized = (_fit(x, num_levels=4, num_codes=16, rounds=rounds) for rounds in (0, 60))
    rotation = optimized.rotation
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(8), atol=1e-5)
    assert _error(optimized, x) < 0.5 * _error(plain, x)


def _correlated() -> np.ndarray:
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    return (rng.normal(size=(2000, 8)) * np.exp(-np.arange(8)) @ axes).astype(np.float32)


def test_correlated_coordinates_are_shared_out():
    """The parts of a Gaussian are best with alike products of variances (Ge et al., section 3.2)."""
    x = _correlated()
    plain, optimized = (_fit(x, num_levels=4, num_codes=16, rounds=rounds) for rounds in (0, 5))
    assert _error(optimized, x) < 0.5 * _error(plain, x)
    products = np.linalg.det(np.cov((x @ optimized.rotation).T).reshape(4, 2, 4, 2)[range(4), :, range(4)])
    assert products.max() < 10 * products.min()


def test_a_common_offset_does_not_hold_the_rotation_back():
    x = _correlated()
    near, far = (_error(_fit(rows, num_levels=4, num_codes=16, rounds=5), rows) for rows in (x, x + np.float32(64)))
    assert far < 1.05 * near  # 1.1 where the mean is left in


def test_more_rounds_reconstruct_better():
    x = _rotated_parts()
    errors = [_error(_fit(x, num_levels=4, num_codes=16, rounds=rounds), x) for rounds in (0, 5, 20, 60)]
    assert errors[0] > errors[1] > errors[2] > errors[3]


def test_sixty_four_codes():
    x = np.random.default_rng(0).normal(size=(300, 128)).astype(np.float32)
    quantizer = _fit(x, num_levels=64, num_codes=16)
    codes = np.asarray(quantizer.encode(jnp.asarray(x)))
    assert codes.shape == (300, 64)
    assert all(len(np.unique(column)) == 16 for column in codes.T)
    assert _error(quantizer, x) < 0.15


@pytest.mark.parametrize(
    ("shape", "level_sizes", "message"),
    [
        ((9, 6), (4,) * 4, "6 dimensions do not divide into 4 equal parts"),
        ((9, 6), (4, 5), r"equal level_sizes of 1 or more, got \(4, 5\)"),
        ((9, 6), (0, 0), r"got \(0, 0\)"),
        ((9, 6), (), r"got \(\)"),
        ((0, 6), (4, 4), r"\(0, 6\)"),
        ((6,), (4, 4), r"\(6,\)"),
    ],
)
def test_bad_input(shape, level_sizes, message):
    ProductKMeans.fit(jnp.ones((9, 6)), level_sizes=(1, 1), iterations=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        ProductKMeans.fit(jnp.ones(shape), level_sizes=level_sizes, iterations=1, key=jax.random.key(0))


def test_rounds_are_not_negative(x):
    with pytest.raises(ValueError, match="rotation_rounds >= 0, got -1"):
        _fit(x, rounds=-1)
