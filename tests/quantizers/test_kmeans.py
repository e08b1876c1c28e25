"""k-means against a plain second implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from quantizers.kmeans import balanced_kmeans, kmeans, lloyd_pass


def _distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.stack([np.square(x - centroid).sum(-1) for centroid in centroids], -1)


def _lloyd(x: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray, float]:
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    for _ in range(iterations):
        assignments = _distances(x, centroids).argmin(-1)
        centroids = np.stack([x[assignments == code].mean(0) for code in range(len(centroids))])
    distances = _distances(x, centroids)
    return centroids, distances.argmin(-1), distances.min(-1).sum()


@pytest.mark.parametrize(("n", "num_codes"), [(300, 7), (5001, 256)])  # the second needs two chunks and padding
def test_equals_a_plain_lloyd_from_the_same_start(n, num_codes):
    x = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    start = kmeans(x, num_codes=num_codes, iterations=0, key=jax.random.key(0))
    np.testing.assert_allclose(_distances(np.asarray(start.centroids), x).min(-1), 0, atol=1e-10)  # all are points
    fitted = kmeans(x, num_codes=num_codes, iterations=4, key=jax.random.key(0))
    centroids, assignments, inertia = _lloyd(x, np.asarray(start.centroids), 4)
    np.testing.assert_array_equal(fitted.assignments, assignments)
    np.testing.assert_allclose(fitted.centroids, centroids, atol=1e-5)
    np.testing.assert_allclose(fitted.inertia, inertia, rtol=1e-5)


def test_inertia_never_rises_and_is_of_the_returned_centroids():
    x = np.random.default_rng(1).normal(size=(400, 5)).astype(np.float32)
    runs = [kmeans(x, num_codes=16, iterations=count, key=jax.random.key(4)) for count in range(12)]
    inertia = np.array([run.inertia for run in runs])
    assert (np.diff(inertia) <= 1e-6 * inertia[0]).all()
    assert inertia[-1] < 0.9 * inertia[0]
    for run in runs:
        np.testing.assert_allclose(_distances(x, np.asarray(run.centroids)).min(-1).sum(), run.inertia, rtol=1e-5)


def test_finds_separated_clusters():
    rng = np.random.default_rng(2)
    truth = np.arange(600) % 12
    x = (10 * rng.normal(size=(12, 8))[truth] + 0.1 * rng.normal(size=(600, 8))).astype(np.float32)
    found = np.asarray(kmeans(x, num_codes=12, iterations=5, key=jax.random.key(0)).assignments)
    assert len(set(zip(truth.tolist(), found.tolist(), strict=True))) == len(set(found.tolist())) == 12


def test_empty_clusters_move_to_the_farthest_points():
    """The sample of 64 sees copies of one point, so every code starts there; the three others must still be found."""
    x = np.zeros((10_003, 2), np.float32)
    x[[17, 4000, 9000]] = [[5, 0], [0, 5], [-5, 0]]
    start = kmeans(x, num_codes=4, iterations=0, key=jax.random.key(0))
    np.testing.assert_array_equal(start.centroids, np.broadcast_to(start.centroids[:1], (4, 2)))
    fitted = kmeans(x, num_codes=4, iterations=2, key=jax.random.key(0))
    np.testing.assert_allclose(fitted.inertia, 0, atol=1e-6)
    assert len(np.unique(np.asarray(fitted.assignments)[[0, 17, 4000, 9000]])) == 4


def test_more_codes_than_distinct_points_duplicates_centroids():
    x = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    fitted = kmeans(x, num_codes=20, iterations=3, key=jax.random.key(0))
    np.testing.assert_allclose(fitted.inertia, 0, atol=1e-10)
    np.testing.assert_allclose(fitted.centroids[fitted.assignments], x, atol=1e-6)
    assert np.isfinite(fitted.centroids).all()
    np.testing.assert_allclose(_distances(np.asarray(fitted.centroids), x).min(-1), 0, atol=1e-10)


def test_far_from_the_origin_clusters_stay_apart():
    x = np.random.default_rng(3).integers(-8, 8, size=(200, 4)).astype(np.float32)
    near = kmeans(x, num_codes=9, iterations=6, key=jax.random.key(0))
    far = kmeans(x + 4096, num_codes=9, iterations=6, key=jax.random.key(0))  # exact in float32
    np.testing.assert_allclose(far.inertia, near.inertia, rtol=1e-2)


def test_the_key_decides():
    x = np.random.default_rng(4).normal(size=(200, 4)).astype(np.float32)
    first, same, other = (kmeans(x, num_codes=8, iterations=2, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.centroids, same.centroids)
    assert not np.array_equal(first.centroids, other.centroids)


def test_runs_under_vmap_as_alone():
    x = np.random.default_rng(5).normal(size=(100, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(lambda key: kmeans(x, num_codes=5, iterations=3, key=key))(keys)
    alone = [kmeans(x, num_codes=5, iterations=3, key=key).inertia for key in keys]
    np.testing.assert_allclose(together.inertia, jnp.stack(alone), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "num_codes", "iterations", "message"),
    [
        ((0, 3), 2, 1, r"\(0, 3\)"),
        ((6,), 2, 1, r"\(6,\)"),
        ((6, 3), 0, 1, "num_codes >= 1"),
        ((6, 3), 2, -1, "iterations >= 0"),
    ],
)
def test_bad_input(shape, num_codes, iterations, message):
    with pytest.raises(ValueError, match=message):
        kmeans(jnp.zeros(shape), num_codes=num_codes, iterations=iterations, key=jax.random.key(0))


def _clusters_of_very_different_sizes(n: int) -> np.ndarray:
    rng = np.random.default_rng(6)
    truth = np.minimum(rng.geometric(0.6, size=n), 6)
    return (8 * rng.normal(size=(7, 3))[truth] + rng.normal(size=(n, 3))).astype(np.float32)


@pytest.mark.parametrize("n", [7, 60, 203, 500])
def test_balanced_clusters_differ_by_at_most_one(n):
    x = _clusters_of_very_different_sizes(n)
    fitted = balanced_kmeans(x, num_codes=7, iterations=5, key=jax.random.key(0))
    sizes = np.bincount(fitted.assignments, minlength=7)
    assert sizes.max() - sizes.min() <= 1
    assert sizes.sum() == n
    plain = kmeans(x, num_codes=7, iterations=5, key=jax.random.key(0))
    assert np.ptp(np.bincount(plain.assignments, minlength=7)) > 1 or n == 7  # control
    means = np.stack([x[np.asarray(fitted.assignments) == code].mean(0) for code in range(7)])
    np.testing.assert_allclose(fitted.centroids, means, atol=1e-5)
    np.testing.assert_allclose(fitted.inertia, np.square(x - means[fitted.assignments]).sum(), rtol=1e-5, atol=1e-4)


def test_balanced_clusters_are_as_tight_as_with_the_best_assignments():
    """The same iterations, each with a minimum-cost assignment."""
    x = _clusters_of_very_different_sizes(210)
    start = np.asarray(kmeans(x, num_codes=7, iterations=0, key=jax.random.key(0)).centroids)
    centroids, inertia = start, 0.0
    for _ in range(10):
        seats = scipy.optimize.linear_sum_assignment(np.repeat(_distances(x, centroids), 30, axis=1))[1] // 30
        centroids = np.stack([x[seats == code].mean(0) for code in range(7)])
        inertia = np.square(x - centroids[seats]).sum()
    fitted = balanced_kmeans(x, num_codes=7, iterations=10, key=jax.random.key(0))
    np.testing.assert_allclose(fitted.inertia, inertia, rtol=0.1)


def test_balance_splits_copies_and_survives_few_points():
    copies = np.ones((20, 2), np.float32)
    assert (
        np.bincount(balanced_kmeans(copies, num_codes=4, iterations=2, key=jax.random.key(0)).assignments).tolist()
        == [5] * 4
    )
    few = balanced_kmeans(np.eye(3, dtype=np.float32), num_codes=5, iterations=3, key=jax.random.key(0))
    assert len(np.unique(few.assignments)) == 3
    np.testing.assert_allclose(few.inertia, 0, atol=1e-6)


@pytest.mark.parametrize(("n", "num_codes"), [(5, 1), (1, 1), (1, 3)])
def test_where_one_code_has_seats_all_balance_on_it(n, num_codes):
    """Nobody bids for another, over any number of rounds: no NaN, and no warning of one."""
    x = np.random.default_rng(8).normal(size=(n, 2)).astype(np.float32)
    found = balanced_kmeans(x, num_codes=num_codes, iterations=3, key=jax.random.key(0))
    assert np.ptp(found.assignments) == 0
    np.testing.assert_allclose(found.centroids[found.assignments[0]], x.mean(0), atol=1e-6)


@pytest.mark.parametrize("sizes", [(300,), (1, 100, 0, 199), (50,) * 6])
def test_a_pass_over_blocks_is_an_iteration_in_memory(sizes):
    x = np.random.default_rng(7).normal(size=(300, 3)).astype(np.float32)
    start = kmeans(x, num_codes=7, iterations=0, key=jax.random.key(0)).centroids
    blocks = np.split(x, np.cumsum(sizes)[:-1])
    centroids = start
    for _ in range(3):
        centroids = lloyd_pass(blocks, centroids)
    np.testing.assert_allclose(centroids, _lloyd(x, np.asarray(start), 3)[0], atol=1e-5)


def test_a_pass_moves_empty_clusters_to_the_farthest_points_of_all_blocks():
    x = np.array([[0, 0], [9, 0], [0, 1], [0, 7], [0, 0]], np.float32)
    centroids = lloyd_pass([x[:2], x[2:]], jnp.zeros((3, 2)))
    np.testing.assert_allclose(centroids, [x.mean(0), [9, 0], [0, 7]], atol=1e-6)
