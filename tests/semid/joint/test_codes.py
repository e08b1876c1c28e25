"""Codes that a gradient passes: their values are the quantizer's codes, their gradients those of plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizers import Gumbel, Nearest, Schedule, residual_codes, residual_encode
from semid.joint import Relaxation, code_mixtures

SIZES, DIM, ROWS = (5, 4, 3), 4, 6
HARD = (Relaxation.SOFT_BACKWARD, Relaxation.STRAIGHT_THROUGH)


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


BOOKS = tuple(random(level, size, DIM) for level, size in enumerate(SIZES))
X = random(9, ROWS, DIM)
WEIGHTS = tuple(random(20 + level, ROWS, size) for level, size in enumerate(SIZES))


@jax.jit
def pulled_back(mixtures, weights):
    return sum((m * w).sum() for m, w in zip(mixtures, weights, strict=True))


def mixtures(x, books=BOOKS, *, relaxation=Relaxation.SOFT_BACKWARD, assignment=Nearest(Schedule(0.7)), **options):
    found = residual_codes(x, books, assignments=assignment, **options)
    return code_mixtures(found, books, relaxation=relaxation)


def softmax_loss(x, books, codes, *, temperature, soft):
    """In float64: weighted sums of softmax(-d / temperature), or of -d; the codes that residuals subtract are fixed."""
    total, residual = 0.0, x
    for book, fixed, level, weights in zip(books, BOOKS, codes.T, WEIGHTS, strict=True):
        passed = -((residual[:, None] - book[None]) ** 2).sum(-1)
        if soft:
            passed = np.exp((passed - passed.max(-1, keepdims=True)) / temperature)
            passed = passed / passed.sum(-1, keepdims=True)
        total += (passed * np.asarray(weights, float)).sum()
        residual = residual - np.asarray(fixed, float)[level]
    return total


def differences(f, x, step=1e-5):
    """Central finite differences."""
    gradient = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        change = np.zeros_like(x)
        change[at] = step
        gradient[at] = (f(x + change) - f(x - change)) / (2 * step)
    return gradient


@pytest.mark.parametrize("relaxation", HARD)
def test_values_are_the_nearest_codes_exactly(relaxation):
    codes = residual_encode(X, BOOKS)
    for level, mixture in enumerate(jax.jit(lambda x: mixtures(x, relaxation=relaxation))(X)):
        np.testing.assert_array_equal(mixture, np.eye(SIZES[level])[codes[:, level]])


@pytest.mark.parametrize(("relaxation", "soft"), [(HARD[0], True), (HARD[1], False), (Relaxation.SOFT, True)])
def test_gradients_by_inputs_and_codebooks_are_those_of_finite_differences(relaxation, soft):
    """A residual subtracts its code as a constant, so that only a level's own distances move its codebook."""
    codes = np.asarray(residual_encode(X, BOOKS))
    by_x, by_books = jax.jit(
        jax.grad(lambda x, books: pulled_back(mixtures(x, books, relaxation=relaxation), WEIGHTS), argnums=(0, 1))
    )(X, BOOKS)
    x, books = np.asarray(X, float), [np.asarray(book, float) for book in BOOKS]

    def loss(x, books):
        return softmax_loss(x, books, codes, temperature=0.7, soft=soft)

    np.testing.assert_allclose(by_x, differences(lambda v: loss(v, books), x), rtol=1e-3, atol=1e-4)
    for level, found in enumerate(by_books):
        expected = differences(lambda v, at=level: loss(x, [*books[:at], v, *books[at + 1 :]]), books[level])
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_straight_through_and_soft_backward_pull_differently():
    soft, plain = (
        jax.grad(lambda x, r=relaxation: pulled_back(mixtures(x, relaxation=r), WEIGHTS))(X) for relaxation in HARD
    )
    assert np.abs(soft - plain).max() > 1e-2


def test_the_temperature_falls_with_the_training():
    """Gradients at half the way are those at the temperature half the way."""
    falling = Nearest(Schedule(0.2, initial=1.0))

    @jax.jit
    def gradient(x, progress):
        return jax.grad(lambda v: pulled_back(mixtures(v, assignment=falling, progress=progress), WEIGHTS))(x)

    def fixed(x, temperature):
        return jax.grad(lambda v: pulled_back(mixtures(v, assignment=Nearest(Schedule(temperature))), WEIGHTS))(x)

    for progress, temperature in ((0.0, 1.0), (0.5, 0.6), (1.0, 0.2)):
        np.testing.assert_allclose(gradient(X, progress), fixed(X, temperature), rtol=1e-4, atol=1e-5)


def test_at_the_lowest_temperature_soft_is_hard():
    soft, hard, warm = (
        mixtures(X, relaxation=relaxation, assignment=Nearest(Schedule(temperature)))
        for relaxation, temperature in ((Relaxation.SOFT, 1e-3), (HARD[0], 1e-3), (Relaxation.SOFT, 1.0))
    )
    for cold, exact, mixed in zip(soft, hard, warm, strict=True):
        np.testing.assert_allclose(cold, exact, atol=1e-6)
        assert np.abs(mixed - exact).max() > 0.1


def test_gumbel_noise_is_the_keys():
    draw = jax.jit(lambda key: mixtures(X, assignment=Gumbel(scale=Schedule(5.0)), key=key))
    first, again, other = (np.concatenate(draw(jax.random.key(seed)), -1) for seed in (0, 0, 1))
    quiet = np.concatenate(mixtures(X, assignment=Gumbel(scale=Schedule(5.0))), -1)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(quiet, np.concatenate(mixtures(X), -1))
    np.testing.assert_array_equal(np.sort(first, -1)[:, : -len(SIZES)], 0)  # one code a level, noise or not
    assert np.all(first.sum(-1) == len(SIZES))


def test_gumbel_gradients_see_the_noise_that_chose():
    """The first level: softmax((-d + noise) / temperature), the noise taken from what it made of equal distances."""
    key, books, assignment = jax.random.key(3), BOOKS[:1], Gumbel(Schedule(1.5), Schedule(0.9))
    noise = jax.random.gumbel(jax.random.fold_in(key, 0), (ROWS, SIZES[0]), jnp.float32)

    def direct(x):
        logits = -jnp.square(x[:, None] - books[0][None]).sum(-1) + 1.5 * noise
        return (jax.nn.softmax(logits / 0.9) * WEIGHTS[0]).sum()

    found = jax.grad(lambda x: pulled_back(mixtures(x, books, assignment=assignment, key=key), WEIGHTS[:1]))(X)
    np.testing.assert_allclose(found, jax.grad(direct)(X), rtol=1e-4, atol=1e-5)
