"""Gradient paths: Jacobians against explicit matrices and finite differences."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizers import (
    GradientPath,
    Nearest,
    Quantized,
    Schedule,
    quantize_found,
    residual_codes,
    residual_decode,
    rotate,
)

DIM = 4
WARM = Nearest(temperature=Schedule(2.0))


@pytest.fixture
def codebooks() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (size, DIM)) for key, size in zip(keys, (6, 5, 4), strict=True))


@pytest.fixture
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (20, DIM))


@partial(jax.jit, static_argnames="path")
def _quantize(x: jax.Array, books: tuple[jax.Array, ...], path: GradientPath) -> Quantized:
    found = residual_codes(x, books, assignments=WARM, path=path)
    return quantize_found(x, found, books, path=path)


def _soft_in_float64(x: np.ndarray, books: list[np.ndarray], *, temperature: float, hard_residuals: bool) -> np.ndarray:
    """sum_l p_l @ E_l, written out; residuals subtract the soft vector or the nearest code."""
    residual, total = x, np.zeros_like(x)
    for book in books:
        squares = np.square(residual[:, None] - book).sum(-1)
        weights = np.exp(-(squares - squares.min(-1, keepdims=True)) / temperature)
        soft = (weights / weights.sum(-1, keepdims=True)) @ book
        total = total + soft
        residual = residual - (book[squares.argmin(-1)] if hard_residuals else soft)
    return total


def _float64(books: tuple[jax.Array, ...]) -> list[np.ndarray]:
    return [np.asarray(book, np.float64) for book in books]


@pytest.mark.parametrize("path", [GradientPath.STRAIGHT_THROUGH, GradientPath.ROTATION, GradientPath.SOFT_BACKWARD])
def test_the_value_is_that_of_the_codes(codebooks, x, path):
    quantized = _quantize(x, codebooks, path)
    np.testing.assert_array_equal(quantized.vectors, residual_decode(quantized.codes, codebooks))


def test_soft_values_are_means_under_the_probabilities(codebooks, x):
    expected = _soft_in_float64(np.asarray(x), _float64(codebooks), temperature=2.0, hard_residuals=False)
    vectors = _quantize(x, codebooks, GradientPath.SOFT).vectors
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    hard = _quantize(x, codebooks, GradientPath.SOFT_BACKWARD).vectors
    assert np.abs(np.asarray(vectors - hard)).max() > 0.5  # control


def test_cold_soft_values_approach_the_hard_ones(codebooks, x):
    cold = Nearest(temperature=Schedule(1e-3, initial=1.0))
    found = residual_codes(x, codebooks, assignments=cold, path=GradientPath.SOFT)
    soft = quantize_found(x, found, codebooks, path=GradientPath.SOFT).vectors
    np.testing.assert_allclose(soft, found.chosen.sum(-2), atol=1e-2)


@pytest.mark.parametrize("path", [GradientPath.SOFT, GradientPath.SOFT_BACKWARD])
@pytest.mark.parametrize("argument", ["x", "codebook"])
def test_soft_gradients_equal_finite_differences(codebooks, x, path, argument):
    """Of a random projection, in random directions. Hard residuals step by constants, which differences do not see."""
    rng = np.random.default_rng(2)
    projection, at = rng.normal(size=x.shape), np.asarray(x, np.float64)
    books, level = _float64(codebooks), 1

    def value(step: np.ndarray) -> float:
        moved = [
            book + step if argument == "codebook" and at_level == level else book for at_level, book in enumerate(books)
        ]
        items = at + step if argument == "x" else at
        soft = _soft_in_float64(items, moved, temperature=2.0, hard_residuals=path is not GradientPath.SOFT)
        return float((projection * soft).sum())

    def of(items: jax.Array, books: tuple[jax.Array, ...]) -> jax.Array:
        return (jnp.asarray(projection, jnp.float32) * _quantize(items, books, path).vectors).sum()

    by_x, by_books = jax.jit(jax.grad(of, argnums=(0, 1)))(x, codebooks)
    gradient = np.asarray(by_x if argument == "x" else by_books[level], np.float64)
    for _ in range(4):
        direction = rng.normal(size=gradient.shape)
        if (
            path is not GradientPath.SOFT
        ):  # dr/dx = 1 holds; dr/de is stopped, so the level's own book alone is compared
            slope = _slope_with_frozen_residuals(at, books, projection, direction, argument, level)
        else:
            slope = (value(1e-5 * direction) - value(-1e-5 * direction)) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-4, atol=2e-3)


def _slope_with_frozen_residuals(
    at: np.ndarray, books: list[np.ndarray], projection: np.ndarray, direction: np.ndarray, argument: str, level: int
) -> float:
    """Residuals are x minus constants: each level's soft vector then depends on x and on its own codebook alone."""
    residual, slope = at, 0.0
    for at_level, book in enumerate(books):
        moving_x, moving_book = argument == "x", argument == "codebook" and at_level == level
        soft = [
            _soft_in_float64(
                residual + sign * 1e-5 * direction if moving_x else residual,
                [book + sign * 1e-5 * direction if moving_book else book],
                temperature=2.0,
                hard_residuals=True,
            )
            for sign in (1, -1)
        ]
        slope += float((projection * (soft[0] - soft[1])).sum()) / 2e-5
        residual = residual - book[np.square(residual[:, None] - book).sum(-1).argmin(-1)]
    return slope


def test_rotation_jacobian_is_the_explicit_scaled_rotation(codebooks, x):
    quantized = residual_codes(x, codebooks).chosen.sum(-2)
    jacobian = jax.jit(jax.vmap(jax.jacrev(rotate)))(x, quantized)
    for item, target, found in zip(np.asarray(x), np.asarray(quantized), np.asarray(jacobian), strict=True):
        source, end = item / np.linalg.norm(item), target / np.linalg.norm(target)
        middle = (source + end) / np.linalg.norm(source + end)
        rotation = np.eye(DIM) - 2 * np.outer(middle, middle) + 2 * np.outer(end, source)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(DIM), atol=1e-5)
        scale = np.linalg.norm(target) / np.linalg.norm(item)
        np.testing.assert_allclose(scale * rotation @ item, target, atol=1e-5)
        np.testing.assert_allclose(found, scale * rotation, atol=1e-4)
    through = jax.jit(jax.vmap(jax.jacrev(lambda v: _quantize(v, codebooks, GradientPath.ROTATION).vectors)))(x)
    np.testing.assert_allclose(through, jacobian, atol=1e-6)


@pytest.mark.parametrize(
    ("item", "target"), [([0.0, 0.0], [1.0, 2.0]), ([1.0, 2.0], [-1.0, -2.0]), ([1.0, 2.0], [0.0, 0.0])]
)
def test_rotation_is_finite_where_no_rotation_is_defined(item, target):
    value, gradient = jax.value_and_grad(lambda v: rotate(v, jnp.array(target)).sum())(jnp.array(item))
    assert value == sum(target)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("path", GradientPath)
def test_masked_rows_reach_neither_gradients_nor_codebooks(codebooks, x, path):
    mask = np.arange(20) % 2 > 0

    def total(items: jax.Array, books: tuple[jax.Array, ...], mask: jax.Array) -> jax.Array:
        found = residual_codes(items, books, assignments=WARM, mask=mask, path=path)
        rows = mask[:, None]
        vectors = quantize_found(items, found, books, mask=mask, path=path).vectors
        sharpness = sum(jnp.where(rows, jnp.square(p), 0).sum() for p in found.probabilities)
        return jnp.where(rows, vectors, 0).sum() + sharpness

    gradient, x = jax.jit(jax.grad(total, argnums=(0, 1))), np.asarray(x)
    by_x, by_books = jax.device_get(gradient(np.where(mask[:, None], x, np.float32("nan")), codebooks, mask))
    alone_by_x, alone_by_books = gradient(x[mask], codebooks, np.ones(10, bool))
    np.testing.assert_array_equal(by_x[~mask], 0)
    np.testing.assert_allclose(by_x[mask], alone_by_x, rtol=1e-4, atol=1e-5)
    for found, alone in zip(by_books, alone_by_books, strict=True):
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)
