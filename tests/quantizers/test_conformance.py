"""What every quantizer must do. A new family adds one member."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quantizers import Quantizer, ResidualKMeans, ResidualQuantizer

DIM = 6


class Member(NamedTuple):
    build: Callable[[Sequence[np.ndarray]], Quantizer]  # from given codebooks
    fit: Callable[[np.ndarray, Sequence[int]], Quantizer]
    oracle: Callable[
        [np.ndarray, Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]
    ]  # codes and vectors, brute force


def _build_residual(codebooks: Sequence[np.ndarray]) -> ResidualQuantizer:
    quantizer = ResidualQuantizer([len(c) for c in codebooks], dim=codebooks[0].shape[1], rngs=nnx.Rngs(0))
    for parameter, codebook in zip(quantizer.codebooks, codebooks, strict=True):
        parameter[...] = jnp.asarray(codebook)
    return quantizer


def _fit_residual(x: np.ndarray, level_sizes: Sequence[int]) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(level_sizes, dim=x.shape[1], rngs=nnx.Rngs(0))
    quantizer.initialize(jnp.asarray(x), iterations=5, key=jax.random.key(1))
    return quantizer


def _fit_residual_kmeans(x: np.ndarray, level_sizes: Sequence[int]) -> ResidualKMeans:
    return ResidualKMeans.fit(jnp.asarray(x), level_sizes=level_sizes, iterations=5, key=jax.random.key(1))


def _residual_oracle(x: np.ndarray, codebooks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    residual = x.astype(np.float64)
    codes = []
    for codebook in codebooks:
        code = np.square(residual[:, None] - codebook[None].astype(np.float64)).sum(-1).argmin(-1)
        residual = residual - codebook[code]
        codes.append(code)
    return np.stack(codes, -1), x - residual


MEMBERS = {
    "residual": Member(_build_residual, _fit_residual, _residual_oracle),
    "residual_kmeans": Member(
        lambda codebooks: ResidualKMeans(tuple(map(jnp.asarray, codebooks))), _fit_residual_kmeans, _residual_oracle
    ),
}


@pytest.fixture(params=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return MEMBERS[request.param]


@pytest.fixture
def codebooks() -> list[np.ndarray]:
    """Three levels of different sizes, each finer than the one before."""
    rng = np.random.default_rng(0)
    return [scale * rng.normal(size=(size, DIM)).astype(np.float32) for size, scale in ((8, 1.0), (5, 0.5), (7, 0.25))]


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(60, DIM)).astype(np.float32)


def test_level_sizes(member, codebooks):
    assert member.build(codebooks).level_sizes == (8, 5, 7)


def test_codes_and_vectors_equal_brute_force(member, codebooks, x):
    quantizer = member.build(codebooks)
    codes, vectors = member.oracle(x, codebooks)
    quantized = quantizer(jnp.asarray(x))
    np.testing.assert_array_equal(quantizer.encode(jnp.asarray(x)), codes)
    np.testing.assert_array_equal(quantized.codes, codes)
    np.testing.assert_allclose(quantizer.decode(jnp.asarray(codes)), vectors, atol=1e-5)
    np.testing.assert_array_equal(quantized.vectors, quantizer.decode(quantized.codes))


def test_every_tuple_of_separated_codes_survives_the_round_trip(member):
    signs = np.array(np.meshgrid(*[(-1.0, 1.0)] * 3)).reshape(3, -1).T.astype(np.float32)
    quantizer = member.build([100 * signs, 10 * signs[:5], signs[:3]])
    codes = np.stack(np.meshgrid(*map(np.arange, (8, 5, 3)), indexing="ij"), -1).reshape(-1, 3)
    np.testing.assert_array_equal(quantizer.encode(quantizer.decode(jnp.asarray(codes))), codes)


@pytest.mark.parametrize("lead", [(), (60,), (3, 20), (2, 3, 10), (0,)])
def test_any_leading_dimensions(member, codebooks, x, lead):
    quantizer = member.build(codebooks)
    items = x[: np.prod(lead, dtype=int)]
    quantized = quantizer(jnp.asarray(items.reshape(*lead, DIM)))
    assert quantized.codes.shape == (*lead, 3)
    assert quantized.vectors.shape == (*lead, DIM)
    assert [loss.shape for loss in quantized.losses] == [(), ()]
    np.testing.assert_array_equal(quantized.codes.reshape(-1, 3), member.oracle(items, codebooks)[0])
    assert quantizer.decode(quantized.codes).shape == (*lead, DIM)


def test_vmap_equals_batch(member, codebooks, x):
    quantizer = member.build(codebooks)
    batch = quantizer(jnp.asarray(x))
    one_by_one = jax.vmap(quantizer)(jnp.asarray(x))
    np.testing.assert_array_equal(one_by_one.codes, batch.codes)
    np.testing.assert_allclose(one_by_one.vectors, batch.vectors, atol=1e-6)
    np.testing.assert_allclose(one_by_one.losses.commitment.mean(), batch.losses.commitment, rtol=1e-5)
    np.testing.assert_array_equal(jax.vmap(quantizer.decode)(batch.codes), quantizer.decode(batch.codes))


def test_traced_once_per_shape(member, codebooks, x):
    quantizer = member.build(codebooks)
    traced = []

    @jax.jit
    def apply(items: jax.Array) -> jax.Array:
        traced.append(items.shape)
        return quantizer.decode(quantizer.encode(items)) + quantizer(items).vectors

    for shift in (0, 1, 2):
        apply(jnp.asarray(x + shift))
    assert len(traced) == 1
    apply(jnp.asarray(x[:7]))
    assert len(traced) == 2


def test_masked_items_count_for_nothing(member, codebooks, x):
    quantizer = member.build(codebooks)
    mask = jnp.asarray(np.arange(60) % 3 > 0)

    def total(items: jax.Array) -> jax.Array:
        return sum(quantizer(items, mask=mask).losses)

    kept = quantizer(jnp.asarray(x)[mask]).losses
    poisoned = jnp.where(mask[:, None], x, jnp.nan)
    np.testing.assert_allclose(quantizer(poisoned, mask=mask).losses, kept, rtol=1e-5)
    gradient = jax.grad(total)(poisoned)
    np.testing.assert_array_equal(gradient[~mask], 0)
    assert (jnp.abs(gradient[mask]).sum(-1) > 0).all()
    assert jnp.isnan(total(jnp.full_like(poisoned, jnp.nan)))  # control: items that count do
    np.testing.assert_array_equal(quantizer(poisoned, mask=jnp.zeros(60, bool)).losses, 0)


def test_bfloat16_gives_the_codes_of_the_same_numbers_in_float32(member, codebooks, x):
    quantizer = member.build(codebooks)
    half = jnp.asarray(x, jnp.bfloat16)
    low, full = quantizer(half), quantizer(half.astype(jnp.float32))
    np.testing.assert_array_equal(low.codes, full.codes)
    np.testing.assert_array_equal(low.vectors, full.vectors.astype(jnp.bfloat16))
    np.testing.assert_allclose(low.losses, full.losses, rtol=1e-6)
    assert (low.vectors.dtype, full.vectors.dtype) == (jnp.bfloat16, jnp.float32)
    assert {loss.dtype for loss in low.losses} == {jnp.dtype(jnp.float32)}
    assert low.codes.dtype == jnp.int32


def test_one_code_stands_for_the_mean(member, x):
    quantizer = member.fit(x, (1, 1))
    quantized = quantizer(jnp.asarray(x))
    np.testing.assert_array_equal(quantized.codes, 0)
    np.testing.assert_allclose(quantized.vectors, np.broadcast_to(x.mean(0), x.shape), atol=1e-5)


def test_one_item_is_its_own_code(member, x):
    quantizer = member.fit(x[:1], (1, 4))
    np.testing.assert_allclose(quantizer(jnp.asarray(x[:1])).vectors, x[:1], atol=1e-5)


def test_more_codes_than_items_gives_each_item_its_own(member, x):
    quantizer = member.fit(x[:3], (8, 5))
    codes = np.asarray(quantizer.encode(jnp.asarray(x[:3])))
    assert len(np.unique(codes[:, 0])) == 3
    assert (codes < (8, 5)).all()
    np.testing.assert_allclose(quantizer.decode(jnp.asarray(codes)), x[:3], atol=1e-5)


def test_fit_reconstructs_better_with_each_level(member, x):
    errors = [
        np.square(np.asarray(member.fit(x, sizes)(jnp.asarray(x)).vectors) - x).mean()
        for sizes in ((8,), (8,) * 2, (8,) * 3)
    ]
    assert errors[0] > 1.2 * errors[1] > 1.44 * errors[2]


def test_fit_is_deterministic(member, x):
    first, second = (member.fit(x, (8, 8))(jnp.asarray(x)) for _ in range(2))
    np.testing.assert_array_equal(first.vectors, second.vectors)


def test_fit_names_the_row_that_is_not_finite(member, x):
    member.fit(x, (2,))
    x[17, 2] = np.nan
    with pytest.raises(ValueError, match="row 17 of 60"):
        member.fit(x, (2,))


def test_decode_wants_one_code_a_level_and_marks_codes_that_do_not_exist(member, codebooks):
    quantizer = member.build(codebooks)
    with pytest.raises(ValueError, match=r"\[\.\.\., 3\].*\(4, 2\)"):
        quantizer.decode(jnp.zeros((4, 2), jnp.int32))
    vectors = quantizer.decode(jnp.array([[7, 4, 6], [7, 5, 6]]))
    assert np.isfinite(vectors[0]).all()
    assert np.isnan(vectors[1]).all()
