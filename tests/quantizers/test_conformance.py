"""Conformance of every quantizer. A new family adds one member."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quantizers import (
    Distance,
    GradientPath,
    Gumbel,
    Nearest,
    ProductKMeans,
    Quantizer,
    ResidualKMeans,
    ResidualQuantizer,
    Schedule,
    Sinkhorn,
)
from quantizers.finite_scalar import FiniteScalarQuantizer

DIM = 6


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


_SIGNS = np.array(np.meshgrid(*[(-1.0, 1.0)] * 3)).reshape(3, -1).T.astype(np.float32)
_FINER = (_normal(8, DIM), 0.5 * _normal(5, DIM, seed=1), 0.25 * _normal(7, DIM, seed=2))  # level by level
_SEPARATED = (100 * _SIGNS, 10 * _SIGNS[:5], _SIGNS[:3])
_PARTS = tuple(_normal(8, DIM // 3, seed=seed) for seed in range(3))
_GRIDS = tuple(np.linspace(-1, 1, size, dtype=np.float32)[:, None] for size in (8, 5, 7))
_ROTATION = np.linalg.qr(_normal(DIM, DIM, seed=3))[0]


class Member(NamedTuple):
    build: Callable[[Sequence[np.ndarray]], Quantizer]  # from given codebooks
    fit: Callable[[np.ndarray, Sequence[int]], Quantizer] | None  # None: no codebooks to fit, and no losses
    oracle: Callable[
        [np.ndarray, Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]
    ]  # codes and vectors, brute force
    calls_encode: bool = True  # a call gives the codes of `encode`, and the vectors of `decode`
    codebooks: Sequence[np.ndarray] = _FINER
    separated: Sequence[np.ndarray] = _SEPARATED  # every tuple of codes is the nearest to the vector it decodes to
    dim: int = DIM


def _build_residual(codebooks: Sequence[np.ndarray], **options: Any) -> ResidualQuantizer:
    sizes, dim = [len(c) for c in codebooks], codebooks[0].shape[1]
    quantizer = ResidualQuantizer(sizes, dim=dim, rngs=nnx.Rngs(0), **options)
    for parameter, codebook in zip(quantizer.codebooks, codebooks, strict=True):
        parameter[...] = jnp.asarray(codebook)
    return quantizer


def _fit_residual(x: np.ndarray, level_sizes: Sequence[int], **options: Any) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(level_sizes, dim=x.shape[1], rngs=nnx.Rngs(0), **options)
    quantizer.initialize(jnp.asarray(x), iterations=5, key=jax.random.key(1))
    return quantizer


def _fit_residual_kmeans(x: np.ndarray, level_sizes: Sequence[int], **options: Any) -> ResidualKMeans:
    return ResidualKMeans.fit(jnp.asarray(x), level_sizes=level_sizes, iterations=5, key=jax.random.key(1), **options)


def _residual_oracle(x: np.ndarray, codebooks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    residual = x.astype(np.float64)
    codes = []
    for codebook in codebooks:
        code = np.square(residual[:, None] - codebook[None].astype(np.float64)).sum(-1).argmin(-1)
        residual = residual - codebook[code]
        codes.append(code)
    return np.stack(codes, -1), x - residual


def _cosine_oracle(x: np.ndarray, codebooks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    residual = x.astype(np.float64)
    codes = []
    for codebook in codebooks:
        code = (residual @ (codebook / np.linalg.norm(codebook, axis=-1, keepdims=True)).T).argmax(-1)
        residual = residual - codebook[code]
        codes.append(code)
    return np.stack(codes, -1), x - residual


_NORMS = (1.0, 0.6, 0.2)


def _build_unit_norm(codebooks: Sequence[np.ndarray]) -> ResidualKMeans:
    return ResidualKMeans(tuple(map(jnp.asarray, codebooks)), jnp.asarray(_NORMS[: len(codebooks)]))


def _unit_norm_oracle(x: np.ndarray, codebooks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    residual, scale, decoded, codes = x.astype(np.float64), 1.0, np.zeros_like(x, np.float64), []
    for level, codebook in enumerate(codebooks):
        if level:
            residual = residual / np.linalg.norm(residual, axis=-1, keepdims=True)
        code = np.square(residual[:, None] - codebook[None].astype(np.float64)).sum(-1).argmin(-1)
        residual, scale = residual - codebook[code], scale * _NORMS[level]
        decoded += scale * codebook[code]
        codes.append(code)
    return np.stack(codes, -1), decoded


def _residual(oracle: Callable = _residual_oracle, *, calls_encode: bool = True, **options: Any) -> Member:
    return Member(partial(_build_residual, **options), partial(_fit_residual, **options), oracle, calls_encode)


def _build_product(codebooks: Sequence[np.ndarray], rotation: np.ndarray) -> ProductKMeans:
    return ProductKMeans(jnp.asarray(np.stack(codebooks)), jnp.asarray(rotation))


def _fit_product(x: np.ndarray, level_sizes: Sequence[int], rounds: int) -> ProductKMeans:
    sizes, key = tuple(level_sizes), jax.random.key(1)
    return ProductKMeans.fit(jnp.asarray(x), level_sizes=sizes, iterations=5, key=key, rotation_rounds=rounds)


def _product_oracle(
    x: np.ndarray, codebooks: Sequence[np.ndarray], rotation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    rotation = rotation.astype(np.float64)
    parts = np.split(x.astype(np.float64) @ rotation, len(codebooks), axis=-1)
    pairs = list(zip(parts, codebooks, strict=True))
    codes = [np.square(part[:, None] - book[None]).sum(-1).argmin(-1) for part, book in pairs]
    chosen = np.concatenate([book[code] for book, code in zip(codebooks, codes, strict=True)], -1)
    return np.stack(codes, -1), chosen @ rotation.T


def _product(rotation: np.ndarray, *, rounds: int) -> Member:
    oracle = partial(_product_oracle, rotation=rotation)
    build, fit = partial(_build_product, rotation=rotation), partial(_fit_product, rounds=rounds)
    return Member(build, fit, oracle, codebooks=_PARTS, separated=_PARTS)


def _finite_scalar_oracle(x: np.ndarray, codebooks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array([len(book) for book in codebooks])
    bounded = np.sign(x) * (1 + np.abs(x.astype(np.float64)) ** -sizes) ** (-1 / sizes)
    pairs = list(zip(bounded.T, codebooks, strict=True))
    codes = [np.abs(column[:, None] - book.T).argmin(-1) for column, book in pairs]
    chosen = np.concatenate([book[code] for book, code in zip(codebooks, codes, strict=True)], -1)
    return np.stack(codes, -1), chosen


class _FiniteScalar(FiniteScalarQuantizer):
    """Compiled whole, as the others are: one by one, its operations are forty programs for each shape."""

    __call__, encode, decode = (
        jax.jit(getattr(FiniteScalarQuantizer, name), static_argnums=0) for name in ("__call__", "encode", "decode")
    )


_FINITE_SCALAR = Member(
    lambda codebooks: _FiniteScalar(tuple(map(len, codebooks))),
    None,
    _finite_scalar_oracle,
    codebooks=_GRIDS,
    separated=_GRIDS,
    dim=3,
)

_COLD = Nearest(temperature=Schedule(1e-3))

MEMBERS = {
    "residual": _residual(),
    "residual_moving_averages": _residual(decay=0.99),
    "residual_cosine": _residual(_cosine_oracle, distance=Distance.COSINE),
    "residual_gumbel": _residual(assignment=Gumbel()),
    "residual_rotation": _residual(path=GradientPath.ROTATION),
    "residual_soft_backward": _residual(path=GradientPath.SOFT_BACKWARD),
    "residual_soft": _residual(path=GradientPath.SOFT, assignment=_COLD, calls_encode=False),
    "residual_sinkhorn": _residual(assignment=Sinkhorn(), calls_encode=False),
    "residual_kmeans": Member(
        lambda codebooks: ResidualKMeans(tuple(map(jnp.asarray, codebooks))), _fit_residual_kmeans, _residual_oracle
    ),
    "residual_kmeans_unit_norm": Member(
        _build_unit_norm,
        partial(_fit_residual_kmeans, unit_norm=True),
        _unit_norm_oracle,
        separated=(10 * np.eye(DIM)[:4], np.eye(DIM)[:3], np.eye(DIM)[3:]),
    ),
    "product": _product(np.eye(DIM, dtype=np.float32), rounds=0),
    "optimized_product": _product(_ROTATION, rounds=5),
    "finite_scalar": _FINITE_SCALAR,
}
LEARNED = [name for name, found in MEMBERS.items() if found.fit]


@pytest.fixture(params=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return MEMBERS[request.param]


learned = pytest.mark.parametrize("member", LEARNED, indirect=True)
may_shrink = pytest.mark.filterwarnings("ignore:level . has . codes, not")  # a member may leave out codes of no item


@pytest.fixture
def codebooks(member: Member) -> list[np.ndarray]:
    return list(member.codebooks)


@pytest.fixture
def x(member: Member) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(60, member.dim)).astype(np.float32)


def test_level_sizes(member, codebooks):
    assert member.build(codebooks).level_sizes == tuple(map(len, codebooks))


def test_codes_and_vectors_equal_brute_force(member, codebooks, x):
    quantizer = member.build(codebooks)
    codes, vectors = member.oracle(x, codebooks)
    quantized = quantizer(jnp.asarray(x))
    np.testing.assert_array_equal(quantizer.encode(jnp.asarray(x)), codes)
    np.testing.assert_allclose(quantizer.decode(jnp.asarray(codes)), vectors, atol=1e-5)
    if member.calls_encode:
        np.testing.assert_array_equal(quantized.codes, codes)
        np.testing.assert_array_equal(quantized.vectors, quantizer.decode(quantized.codes))


def test_every_tuple_of_separated_codes_survives_the_round_trip(member):
    quantizer = member.build(member.separated)
    grid = np.meshgrid(*(np.arange(len(book)) for book in member.separated), indexing="ij")
    codes = np.stack(grid, -1).reshape(-1, 3)
    np.testing.assert_array_equal(quantizer.encode(quantizer.decode(jnp.asarray(codes))), codes)


@pytest.mark.parametrize("lead", [(), (60,), (3, 20), (2, 3, 10), (0,)])
def test_any_leading_dimensions(member, codebooks, x, lead):
    quantizer = member.build(codebooks)
    items = x[: np.prod(lead, dtype=int)]
    quantized = quantizer(jnp.asarray(items.reshape(*lead, member.dim)))
    assert quantized.codes.shape == (*lead, 3)
    assert quantized.vectors.shape == (*lead, member.dim)
    assert [loss.shape for loss in quantized.losses] == [(), ()]
    np.testing.assert_array_equal(quantized.codes.reshape(-1, 3), quantizer(jnp.asarray(items)).codes)
    encoded = quantizer.encode(jnp.asarray(items.reshape(*lead, member.dim)))
    np.testing.assert_array_equal(encoded.reshape(-1, 3), member.oracle(items, codebooks)[0])
    assert quantizer.decode(quantized.codes).shape == (*lead, member.dim)


def test_vmap_equals_batch(member, codebooks, x):
    quantizer = member.build(codebooks)
    blocks = jnp.asarray(x.reshape(3, 20, member.dim))
    for block, found in zip(blocks, jax.vmap(quantizer)(blocks).codes, strict=True):
        np.testing.assert_array_equal(found, quantizer(block).codes)
    if not member.calls_encode:  # items may depend on the others in their batch
        return
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


@learned
def test_masked_items_count_for_nothing(member, codebooks, x):
    quantizer = member.build(codebooks)
    mask = np.arange(60) % 3 > 0

    @jax.jit
    def total(items: jax.Array) -> jax.Array:
        return sum(quantizer(items, mask=jnp.asarray(mask)).losses)

    kept = quantizer(jnp.asarray(x[mask])).losses
    poisoned = jax.device_put(np.where(mask[:, None], x, np.float32("nan")))
    np.testing.assert_allclose(quantizer(poisoned, mask=jnp.asarray(mask)).losses, kept, rtol=1e-5)
    gradient = np.asarray(jax.jit(jax.grad(total))(poisoned))
    np.testing.assert_array_equal(gradient[~mask], 0)
    assert (np.abs(gradient[mask]).sum(-1) > 0).all()
    assert np.isnan(total(np.full_like(x, np.nan)))  # control: items that count do
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


# Norms are decoded as their level's mean, so that decoded means are not exact.
@pytest.mark.parametrize("member", [name for name in LEARNED if "unit_norm" not in name], indirect=True)
def test_one_code_stands_for_the_mean(member, x):
    quantizer = member.fit(x, (1, 1))
    quantized = quantizer(jnp.asarray(x))
    np.testing.assert_array_equal(quantized.codes, 0)
    np.testing.assert_allclose(quantized.vectors, np.broadcast_to(x.mean(0), x.shape), atol=1e-5)


@learned
@may_shrink
def test_one_item_is_its_own_code(member, x):
    quantizer = member.fit(x[:1], (4, 4))
    np.testing.assert_allclose(quantizer(jnp.asarray(x[:1])).vectors, x[:1], atol=1e-5)


@learned
@may_shrink
def test_more_codes_than_items_gives_each_item_its_own(member, x):
    quantizer = member.fit(x[:3], (8, 8))
    codes = np.asarray(quantizer.encode(jnp.asarray(x[:3])))
    assert len(np.unique(codes[:, 0])) == 3
    assert (codes < 8).all()
    np.testing.assert_allclose(quantizer.decode(jnp.asarray(codes)), x[:3], atol=1e-5)


@learned
def test_fit_reconstructs_better_with_each_level(member, x):
    errors = [
        np.square(np.asarray(member.fit(x, sizes)(jnp.asarray(x)).vectors) - x).mean()
        for sizes in ((8,), (8,) * 2, (8,) * 3)
    ]
    assert errors[0] > 1.2 * errors[1] > 1.44 * errors[2]


@learned
def test_fit_is_deterministic(member, x):
    first, second = (member.fit(x, (8, 8))(jnp.asarray(x)) for _ in range(2))
    np.testing.assert_array_equal(first.vectors, second.vectors)


@learned
def test_fit_names_the_row_that_is_not_finite(member, x):
    member.fit(x, (2,))
    x[17, 2] = np.nan
    with pytest.raises(ValueError, match="row 17 of 60"):
        member.fit(x, (2,))


def test_decode_wants_one_code_a_level_and_marks_codes_that_do_not_exist(member, codebooks):
    quantizer = member.build(codebooks)
    with pytest.raises(ValueError, match=r"\[\.\.\., 3\].*\(4, 2\)"):
        quantizer.decode(jnp.zeros((4, 2), jnp.int32))
    last = np.array(quantizer.level_sizes) - 1
    vectors = quantizer.decode(jnp.asarray([last, last + np.array([0, 1, 0])]))
    assert np.isfinite(vectors[0]).all()
    assert np.isnan(vectors[1]).all()
