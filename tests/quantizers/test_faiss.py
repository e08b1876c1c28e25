"""faiss as the second opinion: the same number of codes on the same vectors, and codes equal to plain numpy's."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizers import ProductKMeans, ResidualKMeans, kmeans, reconstruction_error

with warnings.catch_warnings():  # types made by SWIG have no module; Python 3.12 says so on import
    warnings.filterwarnings("ignore", "builtin type .* has no __module__ attribute", DeprecationWarning)
    import faiss

DIM, BITS, ITERATIONS = 16, 6, 25
SIZE = 2**BITS


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """4000 correlated vectors around 100 centers."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(100, DIM))[rng.integers(100, size=4000)] + 0.5 * rng.normal(size=(4000, DIM))
    spectrum = np.exp(-np.arange(DIM) / 6)
    return (points * spectrum @ np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]).astype(np.float32)


def _error(x: np.ndarray, quantizer: ResidualKMeans | ProductKMeans) -> float:
    return reconstruction_error(x, np.asarray(quantizer.decode(quantizer.encode(jnp.asarray(x)))))


def _faiss_error(x: np.ndarray, quantizer: faiss.Quantizer) -> float:
    quantizer.train(x)
    return reconstruction_error(x, quantizer.decode(quantizer.compute_codes(x)))


def test_kmeans(x):
    found = kmeans(jnp.asarray(x), num_codes=SIZE, iterations=ITERATIONS, key=jax.random.key(0))
    theirs = faiss.Kmeans(DIM, SIZE, niter=ITERATIONS, seed=1)
    theirs.train(x)
    distances, _ = theirs.index.search(x, 1)
    assert float(found.inertia) < 1.02 * distances.sum()


def test_residual_kmeans(x):
    ours = ResidualKMeans.fit(jnp.asarray(x), level_sizes=(SIZE,) * 3, iterations=ITERATIONS, key=jax.random.key(0))
    theirs = faiss.ResidualQuantizer(DIM, 3, BITS)
    theirs.max_beam_size = 1
    assert _error(x, ours) < 1.02 * _faiss_error(x, theirs)


def test_product_kmeans(x):
    ours = ProductKMeans.fit(jnp.asarray(x), level_sizes=(SIZE,) * 4, iterations=ITERATIONS, key=jax.random.key(0))
    assert _error(x, ours) < 1.02 * _faiss_error(x, faiss.ProductQuantizer(DIM, 4, BITS))


def test_optimized_product_kmeans(x):
    x = x[:2000]  # faiss takes its time
    sizes, key = (SIZE,) * 4, jax.random.key(0)
    ours = ProductKMeans.fit(jnp.asarray(x), level_sizes=sizes, iterations=ITERATIONS, key=key, rotation_rounds=50)
    rotation = faiss.OPQMatrix(DIM, 4)
    rotation.pq = faiss.ProductQuantizer(DIM, 4, BITS)
    rotation.train(x)
    theirs = _faiss_error(rotation.apply(x), faiss.ProductQuantizer(DIM, 4, BITS))
    assert _error(x, ours) < 1.02 * theirs


# Vectors and codes of small integers: float32 is exact, so that even ties fall alike on every machine.


def _integers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-40, 41, size=shape).astype(np.float32)


def _nearest(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    return np.stack([np.square(x - code).sum(-1) for code in codebook], -1).argmin(-1)


def test_residual_codes_are_numpys():
    x, codebooks = _integers(3000, DIM, seed=0), [_integers(SIZE, DIM, seed=level) for level in (1, 2, 3)]
    residual, codes = x, []
    for codebook in codebooks:
        codes.append(_nearest(residual, codebook))
        residual = residual - codebook[codes[-1]]
    found = ResidualKMeans(tuple(map(jnp.asarray, codebooks))).encode(jnp.asarray(x))
    np.testing.assert_array_equal(found, np.stack(codes, -1))


def test_product_codes_are_numpys():
    x, codebooks = _integers(3000, DIM, seed=0), _integers(4, SIZE, 4, seed=1)
    order = np.random.default_rng(2).permutation(DIM)
    parts = np.split(x[:, order], 4, axis=1)
    codes = np.stack([_nearest(part, book) for part, book in zip(parts, codebooks, strict=True)], -1)
    rotation = np.eye(DIM, dtype=np.float32)[:, order]
    quantizer = ProductKMeans(jnp.asarray(codebooks), jnp.asarray(rotation))
    np.testing.assert_array_equal(quantizer.encode(jnp.asarray(x)), codes)
    for part, book in zip(parts, codebooks, strict=True):  # ties do occur
        table = np.sort(np.stack([np.square(part - code).sum(-1) for code in book], -1), -1)
        assert (table[:, 0] == table[:, 1]).any()
