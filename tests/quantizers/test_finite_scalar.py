"""Finite scalar quantization: its grid, its round trip and its gradient."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizers import finite_scalar
from quantizers.finite_scalar import bound

SIZES = (8, 5, 5, 5)


class FiniteScalarQuantizer(finite_scalar.FiniteScalarQuantizer):
    """Compiled whole: one by one, its operations are forty programs for each shape."""

    __call__, encode, decode = (
        jax.jit(getattr(finite_scalar.FiniteScalarQuantizer, name), static_argnums=0)
        for name in ("__call__", "encode", "decode")
    )


def test_hand_worked_grid():
    quantizer = FiniteScalarQuantizer((4, 3, 2, 1))
    vectors = quantizer.decode(jnp.array([[0, 0, 0, 0], [1, 1, 1, 0], [2, 2, 0, 0], [3, 0, 0, 0]]))
    third = 1 / 3
    expected = [[-1, -1, -1, 0], [-third, 0, 1, 0], [third, 1, -1, 0], [1, -1, -1, 0]]
    np.testing.assert_allclose(vectors, expected, atol=1e-7)
    points = [[-0.01, 0.0, -0.01, 9.0], [0.01, 0.6, 0.01, -9.0], [-9.0, 0.45, -9.0, 0.0]]
    codes = quantizer.encode(jnp.array(points))
    np.testing.assert_array_equal(codes, [[1, 1, 0, 0], [2, 2, 1, 0], [0, 1, 0, 0]])


def test_every_tuple_survives_the_round_trip():
    quantizer = FiniteScalarQuantizer(SIZES)
    codes = np.array(list(itertools.product(*map(range, SIZES))))
    vectors = quantizer.decode(codes)
    np.testing.assert_array_equal(quantizer.encode(vectors), codes)
    quantized = quantizer(vectors)
    np.testing.assert_array_equal(quantized.vectors, vectors)
    np.testing.assert_array_equal(quantized.losses, 0)
    assert len(np.unique(np.asarray(vectors), axis=0)) == len(codes) == 1000


def test_every_code_of_every_size_survives_the_round_trip():
    sizes = np.arange(1, 301)
    quantizer = FiniteScalarQuantizer(tuple(sizes.tolist()))
    codes = np.arange(300)[:, None] % sizes
    np.testing.assert_array_equal(quantizer.encode(quantizer.decode(codes)), codes)


@pytest.mark.parametrize(("dtype", "size"), [(np.uint8, 250), (np.int8, 120)])
def test_codes_of_small_integers_decode_as_others(dtype, size):
    quantizer, codes = FiniteScalarQuantizer((size,)), np.arange(size)[:, None]
    np.testing.assert_array_equal(quantizer.decode(jnp.asarray(codes.astype(dtype))), quantizer.decode(codes))


def test_control_tanh_would_lose_the_outer_codes():
    quantizer = FiniteScalarQuantizer(SIZES)
    top = quantizer.decode(jnp.array([7, 4, 4, 4]))
    np.testing.assert_array_equal(quantizer.encode(top), [7, 4, 4, 4])
    assert int(jnp.round((jnp.tanh(top[0]) + 1) / 2 * 7)) == 6


def test_codes_equal_a_plain_second_implementation():
    x = np.random.default_rng(0).normal(size=(4000, 4)).astype(np.float32) * 2
    sizes = np.array(SIZES)
    wide = np.abs(x.astype(np.float64))
    position = (np.sign(x) * wide / (1 + wide**sizes) ** (1 / sizes) + 1) / 2 * (sizes - 1)
    clear = (np.abs(position % 1 - 0.5) > 1e-4).all(-1)  # float32 decides no near-tie
    assert clear.mean() > 0.99
    codes = FiniteScalarQuantizer(SIZES).encode(x)
    np.testing.assert_array_equal(np.asarray(codes)[clear], np.floor(position + 0.5).astype(int)[clear])


def test_even_sizes_are_symmetric():
    x = jax.random.normal(jax.random.key(0), (500, 4))
    quantizer = FiniteScalarQuantizer((8, 6, 4, 2))
    np.testing.assert_array_equal(quantizer.encode(-x), np.array([7, 5, 3, 1]) - np.asarray(quantizer.encode(x)))
    shares = np.stack([np.bincount(column, minlength=8) for column in np.asarray(quantizer.encode(x)).T])
    assert (shares[3, :2] > 200).all()
    assert (shares > 0).sum(-1).tolist() == [8, 6, 4, 2]


def test_gradient_is_that_of_the_bound():
    quantizer = FiniteScalarQuantizer(SIZES)
    x = jax.random.normal(jax.random.key(0), (50, 4))
    by_vectors = jax.jit(jax.grad(lambda items: quantizer(items).vectors.sum()))(x)
    slope = (1 + np.abs(np.asarray(x)) ** np.array(SIZES)) ** (-1 - 1 / np.array(SIZES))  # worked out by hand
    np.testing.assert_allclose(by_vectors, slope, rtol=1e-4, atol=1e-6)
    assert (slope > 0).all()


def test_far_points_are_bounded_and_pull_nowhere():
    x = jnp.array([[1e30, -1e30, 0.0, 1e-30]])
    quantizer = FiniteScalarQuantizer(SIZES)
    np.testing.assert_array_equal(quantizer.encode(x), [[7, 0, 2, 2]])
    np.testing.assert_array_equal(bound(x, SIZES)[0, :3], [1, -1, 0])
    gradient = jax.jit(jax.grad(lambda items: quantizer(items).vectors.sum()))(x)
    np.testing.assert_allclose(gradient, [[0, 0, 1, 1]], atol=1e-6)


def test_training_by_gradient_finds_the_codes():
    quantizer = FiniteScalarQuantizer(SIZES)
    codes = jnp.asarray(np.random.default_rng(0).integers(SIZES, size=(100, 4)), jnp.int32)
    target = quantizer.decode(codes)
    x = 0.1 * jax.random.normal(jax.random.key(1), codes.shape)
    assert (quantizer.encode(x) == codes).mean() < 0.5
    descend = jax.jit(jax.grad(lambda items: jnp.square(quantizer(items).vectors - target).sum()))
    for _ in range(100):
        x = x - 0.05 * descend(x)
    np.testing.assert_array_equal(quantizer.encode(x), codes)


def test_is_a_pytree_without_leaves_and_hashable():
    plain = finite_scalar.FiniteScalarQuantizer
    assert jax.tree.leaves(plain(SIZES)) == []
    assert hash(plain(list(SIZES))) == hash(plain(SIZES))


def test_codes_that_do_not_exist_are_nan():
    vectors = FiniteScalarQuantizer(SIZES).decode(jnp.array([[7, 4, 4, 4], [8, 0, 0, 0], [0, -1, 0, 0]]))
    np.testing.assert_array_equal(np.isnan(vectors).all(-1), [False, True, True])
    np.testing.assert_array_equal(np.isnan(vectors).any(-1), [False, True, True])


@pytest.mark.parametrize("sizes", [(), (4, 0)])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match="1 or more"):
        FiniteScalarQuantizer(sizes)


def test_wants_one_dimension_a_level():
    quantizer = FiniteScalarQuantizer(SIZES)
    for call in (quantizer, quantizer.encode):
        with pytest.raises(ValueError, match=r"\[\.\.\., 4\].*\(9, 3\)"):
            call(jnp.zeros((9, 3)))
