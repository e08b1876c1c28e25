"""Codebook maintenance against numpy: moving averages, entropy, diversity, k-means initialization by direction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import quantizers
from quantizers import Distance, ResidualQuantizer, fit_codebooks, residual_codes

DIM = 4

# Compiled whole: one by one, their operations are hundreds of programs.
cluster_means = jax.jit(quantizers.cluster_means, static_argnames="num_codes")
diversity_loss, usage_entropy_loss = jax.jit(quantizers.diversity_loss), jax.jit(quantizers.usage_entropy_loss)
ema_codebook = jax.jit(quantizers.ema_codebook, static_argnames="decay")
diversity_gradient = jax.jit(jax.grad(quantizers.diversity_loss))


@nnx.jit
def update(quantizer, x, mask=None):
    quantizer.update_statistics(quantizer.search(x, mask=mask), mask=mask)


def test_means_are_those_of_the_members_that_count():
    x = np.random.default_rng(0).normal(size=(50, DIM)).astype(np.float32)
    codes, mask = np.arange(50) % 7, np.arange(50) < 40
    found = np.asarray(cluster_means(np.where(mask[:, None], x, np.float32("nan")), codes, num_codes=8, mask=mask))
    for code in range(7):
        np.testing.assert_allclose(found[code], x[(codes == code) & mask].mean(0), atol=1e-6)
    np.testing.assert_array_equal(found[7], 0)


def test_means_are_summed_in_a_fixed_order_on_a_gpu():
    """Not by a scatter, whose atomic additions have none; counts are integers, for which the order does not matter."""
    traced = cluster_means.trace(jnp.ones((50, DIM)), jnp.zeros(50, jnp.int32), num_codes=8)
    programs = [traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")]
    scatters = [program.count('"stablehlo.scatter"') for program in programs]
    assert scatters == [2, 1]


def test_moving_averages_equal_a_second_implementation_with_sums():
    """Van den Oord et al.: N <- d N + (1 - d) n, m <- d m + (1 - d) sum of inputs, e = m / N, ten steps."""
    rng, decay = np.random.default_rng(0), 0.9
    quantizer = ResidualQuantizer((6, 5), dim=DIM, rngs=nnx.Rngs(0), decay=decay)
    books = [np.asarray(book[...], np.float64) for book in quantizer.codebooks]
    numbers = [np.full(len(book), 1 / len(book)) for book in books]
    sums = [number[:, None] * book for number, book in zip(numbers, books, strict=True)]
    for _ in range(10):
        x = rng.normal(size=(3, 10, DIM)).astype(np.float32)
        update(quantizer, x)
        residual = x.reshape(-1, DIM).astype(np.float64)
        for level, old in enumerate([book.copy() for book in books]):
            codes = np.square(residual[:, None] - old).sum(-1).argmin(-1)
            one_hot = np.eye(len(old))[codes]
            numbers[level] = decay * numbers[level] + (1 - decay) * one_hot.mean(0)
            sums[level] = decay * sums[level] + (1 - decay) * one_hot.T @ residual / len(residual)
            books[level] = sums[level] / numbers[level][:, None]
            residual = residual - old[codes]
    for level in range(2):
        np.testing.assert_allclose(quantizer.codebooks[level][...], books[level], atol=1e-5)
        np.testing.assert_allclose(quantizer.usage[level][...], numbers[level], atol=1e-6)


def test_a_code_that_is_never_used_stays_where_it_is():
    moved, means = np.float32([[0, 1], [50, 50]]), np.float32([[1, 1], [0, 0]])
    usage, shares = np.float32([0.5, 0.5]), np.float32([1, 0])
    for _ in range(2000):
        moved = ema_codebook(moved, usage, means=means, shares=shares, decay=0.9)
        usage = np.float32(0.9) * usage + np.float32(0.1) * shares
    np.testing.assert_allclose(moved, [[1.0, 1.0], [50.0, 50.0]], rtol=1e-4)


def test_moving_averages_reach_the_error_of_kmeans():
    x = jax.random.normal(jax.random.key(0), (512, DIM))
    quantizer = ResidualQuantizer((16,), dim=DIM, rngs=nnx.Rngs(0), decay=0.8)
    before = float(jnp.square(quantizer(x).vectors - x).mean())
    for _ in range(30):
        update(quantizer, x)
    (centroids,) = fit_codebooks(x, level_sizes=(16,), iterations=30, key=jax.random.key(0))
    best = float(jnp.square(residual_codes(x, (centroids,)).chosen[:, 0] - x).mean())
    after = float(jnp.square(quantizer(x).vectors - x).mean())
    assert after < 1.1 * best < 0.8 * before


def test_only_observe_moves_and_masked_rows_count_for_nothing():
    x = jax.random.normal(jax.random.key(0), (20, DIM))
    mask = jnp.arange(20) < 12
    kept, whole, part, none = (ResidualQuantizer((6, 5), dim=DIM, rngs=nnx.Rngs(0), decay=0.9) for _ in range(4))
    kept(x), kept.encode(x)
    update(part, jnp.where(mask[:, None], x, jnp.nan), mask)
    update(whole, x[:12])
    none.update_statistics(none.search(x), mask=jnp.zeros(20, bool))
    for level in range(2):
        np.testing.assert_allclose(part.codebooks[level][...], whole.codebooks[level][...], atol=1e-6)
        np.testing.assert_allclose(part.usage[level][...], whole.usage[level][...], atol=1e-6)
        np.testing.assert_array_equal(kept.usage[level][...], np.float32(1 / kept.level_sizes[level]))
        np.testing.assert_array_equal(none.usage[level][...], kept.usage[level][...])
        np.testing.assert_allclose(none.codebooks[level][...], kept.codebooks[level][...], rtol=1e-6)
    assert not np.allclose(whole.codebooks[0][...], kept.codebooks[0][...])


def test_statistics_are_no_parameters_and_move_in_a_jitted_step():
    x = jax.random.normal(jax.random.key(0), (20, DIM))
    by_gradient = ResidualQuantizer((6, 5), dim=DIM, rngs=nnx.Rngs(0))
    moving = ResidualQuantizer((6, 5), dim=DIM, rngs=nnx.Rngs(0), decay=0.9)
    assert len(jax.tree.leaves(nnx.state(by_gradient, nnx.Param))) == 2
    assert not jax.tree.leaves(nnx.state(moving, nnx.Param))
    graph, params, rest = nnx.split(by_gradient, nnx.Param, ...)

    @jax.jit
    def step(params: nnx.State, rest: nnx.State) -> tuple[nnx.State, nnx.State]:
        def loss(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            quantizer = nnx.merge(graph, params, rest, copy=True)
            found = quantizer.search(x)
            quantizer.update_statistics(found)
            return quantizer.quantize_found(x, found).losses.codebook, nnx.split(quantizer, nnx.Param, ...)[2]

        return jax.grad(loss, has_aux=True)(params)

    gradient, after = step(params, rest)
    update(by_gradient, x)
    expected = nnx.split(by_gradient, nnx.Param, ...)[2]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    assert len(jax.tree.leaves(after)) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, expected)


def test_entropy_is_that_of_the_mean_row():
    rng = np.random.default_rng(0)
    levels = [rng.dirichlet(np.ones(size), size=(4, 5)).astype(np.float32) for size in (6, 3)]
    mask = np.arange(20).reshape(4, 5) % 3 > 0
    means = [level[mask].mean(0) for level in levels]
    expected = sum((mean * np.log(mean)).sum() for mean in means)
    poisoned = tuple(np.where(mask[..., None], level, np.float32("nan")) for level in levels)
    np.testing.assert_allclose(usage_entropy_loss(poisoned, mask=mask), expected, rtol=1e-5)
    uniform, one = np.full((5, 8), 1 / 8, np.float32), np.eye(8, dtype=np.float32)[[0] * 5]
    np.testing.assert_allclose(usage_entropy_loss((uniform, uniform)), -2 * np.log(8), rtol=1e-6)
    np.testing.assert_allclose(usage_entropy_loss((one,)), 0, atol=1e-6)
    np.testing.assert_array_equal(usage_entropy_loss((uniform,), mask=np.zeros(5, bool)), 0)
    gradient = np.asarray(jax.jit(jax.grad(lambda p: usage_entropy_loss((p,))))(one))
    assert np.isfinite(gradient).all()
    assert (gradient[:, 0] > gradient[:, 1]).all()


def _diversity_in_loops(book: np.ndarray, clusters: np.ndarray, codes: np.ndarray) -> float:
    losses = []
    for code in codes:
        others = [other for other in range(len(book)) if other != code]
        scores = book[others] @ book[code]
        log_shares = dict(zip(others, scores - np.log(np.exp(scores).sum()), strict=True))
        mates = [other for other in others if clusters[other] == clusters[code]]
        losses.append(-np.mean([log_shares[mate] for mate in mates]) if mates else 0.0)
    return float(np.mean(losses))


def test_diversity_equals_loops_over_items_and_mates():
    rng = np.random.default_rng(0)
    book = rng.normal(size=(9, DIM)).astype(np.float32)
    clusters, codes = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3]), rng.integers(0, 9, size=(6, 5))
    codes[0] = 8  # without mates
    found = diversity_loss(book, clusters, codes=codes)
    np.testing.assert_allclose(found, _diversity_in_loops(book, clusters, codes.ravel()), rtol=1e-5)
    mask = rng.random((6, 5)) < 0.5
    masked = diversity_loss(book, clusters, codes=codes, mask=mask)
    np.testing.assert_allclose(masked, _diversity_in_loops(book, clusters, codes[mask]), rtol=1e-5)
    assert np.isfinite(diversity_gradient(book, clusters, codes=codes)).all()
    alone = diversity_gradient(np.ones((1, DIM), np.float32), np.zeros(1, np.int32), codes=np.zeros(5, np.int32))
    np.testing.assert_array_equal(alone, 0)


def test_a_step_on_diversity_draws_mates_together_and_clusters_apart():
    book, clusters = np.asarray(jax.random.normal(jax.random.key(0), (8, DIM))), np.arange(8) // 4
    step = book - np.float32(0.5) * diversity_gradient(book, clusters, codes=np.arange(8))

    def gap(vectors: np.ndarray) -> float:
        products, same = np.asarray(vectors @ vectors.T), np.asarray(clusters[:, None] == clusters[None, :])
        return float(products[same & ~np.eye(8, dtype=bool)].mean() - products[~same].mean())

    assert gap(np.asarray(step)) > gap(book) + 0.05


def test_cosine_codebooks_are_means_of_what_shares_a_direction():
    rng = np.random.default_rng(0)
    truth, lengths = np.arange(300) % 5, rng.uniform(0.5, 8, size=300)
    x = (lengths[:, None] * (np.eye(5)[truth] + 0.02 * rng.normal(size=(300, 5)))).astype(np.float32)
    (book,) = fit_codebooks(x, level_sizes=(5,), iterations=10, key=jax.random.key(0), distance=Distance.COSINE)
    codes = np.asarray(residual_codes(jnp.asarray(x), (book,), distance=Distance.COSINE).codes)[:, 0]
    assert len(set(zip(truth.tolist(), codes.tolist(), strict=True))) == 5
    for code in range(5):
        np.testing.assert_allclose(book[code], x[codes == code].mean(0), rtol=1e-4, atol=1e-4)
    euclidean = np.asarray(residual_codes(jnp.asarray(x), (book,)).codes)[:, 0]
    assert (euclidean != codes).any()  # control


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_decay_is_a_share(decay):
    with pytest.raises(ValueError, match="decay"):
        ResidualQuantizer((4,), dim=2, rngs=nnx.Rngs(0), decay=decay)
