"""Metrics of codes against numbers worked out by hand and naive implementations."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy.sparse import csc_array, csr_array

from quantizers.metrics import (
    CodeHealth,
    LevelHealth,
    health,
    linear_probe_r2,
    neighbor_prefix_overlap,
    neighbor_preservation,
    reconstruction_error,
)


def test_hand_worked_health():
    found = health(np.array([[0, 1], [0, 1], [1, 0], [2, 0]]), (4, 2))
    entropy = 1.5 * np.log(2)  # shares 1/2, 1/4, 1/4
    first, second = found.levels
    assert (first.size, first.usage, first.dead) == (4, 0.75, 1)
    np.testing.assert_allclose([first.entropy, first.perplexity], [entropy, 2**1.5])
    assert (second.size, second.usage, second.dead) == (2, 1.0, 0)
    np.testing.assert_allclose([second.entropy, second.perplexity], [np.log(2), 2])
    np.testing.assert_allclose([first.gini, second.gini], [3 / 8, 0])  # counts 2, 1, 1, 0 and 2, 2
    assert (found.items, found.collision_rate, found.largest_group) == (4, 0.5, 2)


def test_a_collapsed_and_a_perfect_assignment():
    collapsed = health(np.zeros((5, 1), np.int32), (3,))
    assert collapsed == CodeHealth(5, (LevelHealth(3, 1 / 3, 2, 0.0, 1.0, 2 / 3),), 1.0, 5)
    perfect = health(np.arange(8)[:, None], (8,))
    assert (perfect.collision_rate, perfect.largest_group, perfect.levels[0].dead) == (0.0, 1, 0)
    np.testing.assert_allclose(perfect.levels[0].perplexity, 8)


@pytest.mark.parametrize("seed", range(3))
def test_gini_is_half_the_relative_mean_difference(seed):
    codes = np.random.default_rng(seed).zipf(1.5, size=(500, 1)) % 17
    counts = np.bincount(codes[:, 0], minlength=20)
    expected = np.abs(counts[:, None] - counts).mean() / counts.mean() / 2
    np.testing.assert_allclose(health(codes, (20,)).levels[0].gini, expected)


def test_health_is_json():
    found = asdict(health(np.array([[0, 1], [1, 1]]), (2, 2)))
    assert json.loads(json.dumps(found)) == found | {"levels": list(found["levels"])}


def test_reconstruction_error():
    assert reconstruction_error(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 0.0], [0.0, 4.0]])) == 13 / 4
    with pytest.raises(ValueError, match=r"\(2, 2\), \(2, 1\)"):
        reconstruction_error(np.zeros((2, 2)), np.zeros((2, 1)))


def _nearest(x, row, k):
    distances = np.square(x - x[row]).sum(-1)
    distances[row] = np.inf
    return set(np.argsort(distances)[:k].tolist())


@pytest.mark.parametrize("k", [1, 7, 199])
def test_neighbor_preservation_equals_comparing_sets(k):
    rng = np.random.default_rng(k)
    x = rng.normal(size=(200, 5)) + 100
    reconstruction = x + 0.3 * rng.normal(size=x.shape)
    shares = [len(_nearest(x, row, k) & _nearest(reconstruction, row, k)) / k for row in range(200)]
    found = neighbor_preservation(x, reconstruction, k=k, sample=1000, seed=0)
    np.testing.assert_allclose(found, np.mean(shares), rtol=1e-6)
    sampled = neighbor_preservation(x, reconstruction, k=k, sample=20, seed=3)
    rows = np.random.default_rng(3).permutation(200)[:20]
    np.testing.assert_allclose(sampled, np.mean([shares[row] for row in rows]), rtol=1e-6)
    np.testing.assert_allclose(neighbor_preservation(x, 2 * x, k=k, sample=200, seed=0), 1, rtol=1e-6)


def test_neighbors_that_tie_count_in_equal_parts():
    x = np.square(np.arange(11.0))[:, None]
    found = neighbor_preservation(x, np.ones((11, 1)), k=3, sample=11, seed=0)
    np.testing.assert_allclose(found, 3 / 10, rtol=1e-6)  # what guessing keeps
    clumps = np.repeat(np.arange(4.0), 5)[:, None]  # every item's four twins are its neighbors, in any order
    np.testing.assert_allclose(neighbor_preservation(clumps, clumps, k=2, sample=20, seed=0), 1, rtol=1e-6)


def test_neighbor_preservation_names_bad_input():
    x = np.eye(4)
    assert neighbor_preservation(x, x, k=3, sample=1, seed=0) == pytest.approx(1)
    for other, k, sample in [(x[:3], 1, 1), (x, 4, 1), (x, 0, 1), (x, 1, 0)]:
        with pytest.raises(ValueError, match="1 <= k < items"):
            neighbor_preservation(x, other, k=k, sample=sample, seed=0)
    with pytest.raises(ValueError, match="row 2"):
        neighbor_preservation(x, np.where(np.arange(4)[:, None] == 2, np.nan, x), k=1, sample=1, seed=0)


def test_prefix_sharing_equals_counting_pairs():
    rng = np.random.default_rng(0)
    codes, neighbors = rng.integers(0, 3, size=(100, 3)), rng.integers(-1, 100, size=(100, 4))
    pairs = [(row, other) for row in range(100) for other in neighbors[row] if other >= 0]
    expected = [
        np.mean([(codes[row, :level] == codes[other, :level]).all() for row, other in pairs]) for level in (1, 2, 3)
    ]
    np.testing.assert_allclose(neighbor_prefix_overlap(codes, neighbors), expected)


def test_prefix_sharing_names_bad_input():
    codes = np.array([[0, 0], [0, 1]])
    np.testing.assert_array_equal(neighbor_prefix_overlap(codes, np.array([[1], [-1]])), [1, 0])
    with pytest.raises(ValueError, match="below 2"):
        neighbor_prefix_overlap(codes, np.array([[2], [0]]))
    with pytest.raises(ValueError, match="at least one"):
        neighbor_prefix_overlap(codes, np.array([[-1], [-1]]))
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(3, 1\)"):
        neighbor_prefix_overlap(codes, np.zeros((3, 1), int))


def _dense_probe(codes, target, level_sizes):
    """Ridge by the normal equations of a dense matrix, fold by fold."""
    fold, explained = np.random.default_rng(0).permutation(len(codes)) % 5, []
    for level in range(1, len(level_sizes) + 1):
        x = np.concatenate([np.eye(size)[codes[:, at]] for at, size in enumerate(level_sizes[:level])], axis=1)
        errors, total = np.zeros((5, 4)), 0.0
        for held in range(5):
            train, test = fold != held, fold == held
            y = target - target[train].mean()
            total += np.square(y[test]).sum()
            for at, ridge in enumerate((1, 10, 100, 1000)):
                weights = np.linalg.solve(x[train].T @ x[train] + ridge * np.eye(x.shape[1]), x[train].T @ y[train])
                errors[held, at] = np.square(y[test] - x[test] @ weights).sum()
        best = [np.delete(errors, held, axis=0).sum(0).argmin() for held in range(5)]
        explained.append(1 - errors[np.arange(5), best].sum() / total)
    return explained


def test_explained_by_codes_equals_the_dense_probe_and_finds_what_is_there():
    rng = np.random.default_rng(0)
    sizes = (8, 5, 6)
    codes = rng.integers(0, sizes, size=(600, 3))
    target = rng.normal(size=8)[codes[:, 0]] + rng.normal(size=6)[codes[:, 2]] + 0.1 * rng.normal(size=600) + 7
    found = linear_probe_r2(codes, target, level_sizes=sizes)
    np.testing.assert_allclose(found, _dense_probe(codes, target, sizes), rtol=1e-6)
    assert found[2] > 0.95 > 0.8 > found[0] > 0.3
    np.testing.assert_array_equal(found, linear_probe_r2(codes, target, level_sizes=sizes))


def test_the_probe_multiplies_codes_by_vectors_alone(monkeypatch):
    """A product of one-hot codes with themselves is dense at many levels: gigabytes, sliced for each prefix."""
    multiplied = []
    for matrix in (csc_array, csr_array):
        product = matrix.__matmul__

        def watched(self, other, product=product):
            multiplied.append(other.ndim)
            return product(self, other)

        monkeypatch.setattr(matrix, "__matmul__", watched)
    linear_probe_r2(np.array([[0, 1], [1, 0]] * 5), np.arange(10.0), level_sizes=(2, 2))
    assert set(multiplied) == {1}


@pytest.mark.parametrize("items", [400, 4000])
def test_random_codes_explain_nothing(items):
    """In the mean of 12 draws: the figure of one scatters by about .01 at 400 items, .0006 at 4000."""
    sizes, found = (256, 256, 256), []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        codes, target = rng.integers(0, 256, size=(items, 3)), rng.exponential(size=items)
        found.append(linear_probe_r2(codes, target, level_sizes=sizes))
    np.testing.assert_allclose(np.mean(found, axis=0), 0, atol=0.01)
    planted = np.random.default_rng(0).normal(size=256)[codes[:, 0]]
    assert (linear_probe_r2(codes, planted, level_sizes=sizes) > 0.1).all()


@pytest.mark.parametrize(
    "target", [np.zeros(6), np.array([0, 1, 2, np.nan, 4, 5]), np.zeros(5), np.arange(6.0)[:, None]]
)
def test_explained_by_codes_names_bad_input(target):
    codes = np.array([[0], [1]] * 3)
    assert linear_probe_r2(codes, np.array([0, 1.0] * 3), level_sizes=(2,))[0] > 0.5
    with pytest.raises(ValueError, match=r"6 .* finite values that vary"):
        linear_probe_r2(codes, target, level_sizes=(2,))
    with pytest.raises(ValueError, match="linear_probe_r2: code 1 of row 1"):
        linear_probe_r2(codes, np.arange(6.0), level_sizes=(1,))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.array([[0, 1], [3, 2]]), r"code 2 of row 1, level 1 lies outside 0\.\.1"),
        (np.array([[0, 1], [-1, 0]]), r"code -1 of row 1, level 0 lies outside 0\.\.3"),
        (np.zeros((0, 2), np.int32), r"\(0, 2\)"),
        (np.zeros((3, 3), np.int32), r"\(3, 3\)"),
    ],
)
def test_bad_input(codes, message):
    with pytest.raises(ValueError, match=message):
        health(codes, (4, 2))
