"""Collaborative signals against brute force on tiny histories, for leaks, and on planted communities."""

from __future__ import annotations

import importlib
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from semid.data import Dataset, Histories
from semid.errors import SemidError
from semid.graphs import cooccurrence, interactions_matrix, ppmi, ppmi_vectors, sample_partners, user_vectors
from semid.graphs.neighbors import _largest_by_stripes, neighbors

LISTS = [[0, 1, 2, 1], [3], [], [2, 2, 0, 4, 1, 3], [1, 0]]  # item 5 is nobody's


def _histories(lists):
    made = Histories.from_lists(lists)
    return Histories(np.arange(len(lists), dtype=np.int32), made.items, made.starts, made.ends)


def _random_histories(seed, *, num_items, num_users):
    rng = np.random.default_rng(seed)
    return _histories([rng.integers(0, num_items, rng.integers(0, 12)) for _ in range(num_users)])


def _communities(seed, *, shuffled):
    """200 users, each with 8 of the 20 items of one of two communities; `shuffled` deals all items out again."""
    rng = np.random.default_rng(seed)
    lists = np.stack([20 * (user % 2) + rng.permutation(20)[:8] for user in range(200)])
    return _histories((rng.permutation(lists.reshape(-1)).reshape(lists.shape) if shuffled else lists).tolist())


def _same_community(found):
    return (found // 20 == np.arange(40)[:, None] // 20).mean()


def _counted(lists, num_items, window):
    counts = np.zeros((num_items, num_items), int)
    for rows in lists:
        for i, left in enumerate(rows):
            for j, right in enumerate(rows):
                counts[left, right] += left != right and abs(i - j) <= window
    return counts


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_cooccurrence_counts_pairs_of_positions(window):
    counts = cooccurrence(_histories(LISTS), num_items=6, window=window)
    np.testing.assert_array_equal(counts.toarray(), _counted(LISTS, 6, window))


def test_cooccurrence_reads_the_windows_of_overlapping_histories_only():
    """History 1 starts inside history 0, and what follows its end belongs to nobody."""
    histories = Histories(np.array([0, 1], np.int32), np.arange(6, dtype=np.int32), np.array([0, 2]), np.array([3, 4]))
    counts = cooccurrence(histories, num_items=6, window=5)
    np.testing.assert_array_equal(counts.toarray(), _counted([[0, 1, 2], [2, 3]], 6, 5))


def test_ppmi_in_blocks_of_rows_is_the_same_to_the_bit(monkeypatch):
    counts = cooccurrence(_random_histories(0, num_items=40, num_users=60), num_items=40, window=5)
    whole = ppmi(counts)
    monkeypatch.setattr(importlib.import_module("semid.graphs.cooccurrence"), "_ROWS", 7)
    blocks = ppmi(counts)
    assert blocks.shape == whole.shape
    for name in ("indptr", "indices", "data"):
        found, expected = getattr(blocks, name), getattr(whole, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("smoothing", [1.0, 0.75])
def test_ppmi_equals_its_definition(smoothing):
    counts = cooccurrence(_histories(LISTS), num_items=6, window=2)
    dense = counts.toarray()
    total, rows = dense.sum(), dense.sum(1)
    contexts = rows**smoothing / (rows**smoothing).sum()
    expected = np.zeros((6, 6))
    for i, j in np.argwhere(dense):
        expected[i, j] = max(math.log(dense[i, j] / total / (rows[i] / total * contexts[j])), 0)
    found = ppmi(counts, smoothing=smoothing)
    np.testing.assert_allclose(found.toarray(), expected, atol=1e-12)
    assert 0 < found.nnz == np.count_nonzero(expected)


@pytest.mark.parametrize("num_items", [60, 540])  # by dense SVD and by ARPACK
def test_ppmi_vectors_are_the_best_low_rank_factors(num_items):
    histories = _random_histories(0, num_items=num_items - 5, num_users=2 * num_items)
    vectors = ppmi_vectors(histories, num_items=num_items, dim=6, window=3, seed=0)
    dense = ppmi(cooccurrence(histories, num_items=num_items, window=3)).toarray()
    left, singular, _ = np.linalg.svd(dense)
    expected = left[:, :6] * np.sqrt(singular[:6])
    np.testing.assert_allclose(np.abs(vectors), np.abs(expected), atol=1e-3)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-3)
    assert vectors.dtype == np.float32
    assert (vectors[np.abs(vectors).argmax(0), np.arange(6)] > 0).all()
    np.testing.assert_array_equal(vectors[-5:], 0)
    again = ppmi_vectors(histories, num_items=num_items, dim=6, window=3, seed=0)
    np.testing.assert_array_equal(vectors, again)


def test_partners_are_drawn_in_proportion():
    weights = sparse.csr_array(np.array([[0, 1, 3, 0], [0, 0, 0, 0], [0.5, 0, 0, 0], [1, 1, 1, 5]]))
    drawn = sample_partners(weights, samples=20_000, seed=0)
    assert drawn.dtype == np.int32
    np.testing.assert_array_equal(drawn[1], -1)
    for row in (0, 2, 3):
        share = np.bincount(drawn[row], minlength=4) / drawn.shape[1]
        np.testing.assert_allclose(share, weights.toarray()[row] / weights.toarray()[row].sum(), atol=0.02)
    np.testing.assert_array_equal(drawn, sample_partners(weights, samples=20_000, seed=0))
    assert not np.array_equal(drawn, sample_partners(weights, samples=20_000, seed=1))


def test_partners_of_stored_zeros_are_never_drawn():
    weights = sparse.csr_array(np.ones((3, 4)))
    weights.data[:] = [0, 1, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0]
    drawn = sample_partners(weights, samples=500, seed=0)
    assert [set(row.tolist()) for row in drawn] == [{1, 2}, {-1}, {1}]


def test_partners_by_the_interactions_are_what_the_user_had_and_who_had_the_item():
    matrix = interactions_matrix(_histories(LISTS), num_items=6, num_users=5)
    of_users = sample_partners(matrix, samples=200, seed=0)
    of_items = sample_partners(sparse.csr_array(matrix.T), samples=200, seed=0)
    assert [set(row.tolist()) for row in of_users] == [set(rows) or {-1} for rows in LISTS]
    owners = [{user for user, rows in enumerate(LISTS) if item in rows} or {-1} for item in range(6)]
    assert [set(row.tolist()) for row in of_items] == owners


def test_interactions_are_binary_and_by_user_not_by_position():
    histories = _histories(LISTS).take(np.array([4, 0]))
    matrix = interactions_matrix(histories, num_items=6, num_users=7).toarray()
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(np.argwhere(matrix), [[0, 0], [0, 1], [0, 2], [4, 0], [4, 1]])
    assert Counter(matrix.reshape(-1).tolist()).keys() == {0.0, 1.0}


def test_user_vectors_are_means_of_different_items():
    items = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    found = user_vectors(_histories(LISTS), items, num_users=6)
    expected = [items[sorted(set(rows))].mean(0) if rows else np.zeros(3) for rows in [*LISTS, []]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("block", [1, 7, 64])
def test_neighbors_equal_brute_force(block):
    vectors = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    vectors[[3, 17]] = 0
    found = neighbors(vectors, k=5, block=block)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found[[3, 17]], -1)
    for row in set(range(30)) - {3, 17}:
        others = [i for i in range(30) if i not in (row, 3, 17)]
        cosine = {i: vectors[row] @ vectors[i] / math.hypot(*vectors[row]) / math.hypot(*vectors[i]) for i in others}
        assert found[row].tolist() == sorted(others, key=lambda i: -cosine[i])[:5]


def test_neighbors_run_out():
    vectors = np.array([[1, 0], [1, 1], [0, 0], [-1, 2]], np.float32)
    assert neighbors(vectors, k=6).tolist() == [
        [1, 3, -1, -1, -1, -1],
        [0, 3, -1, -1, -1, -1],
        [-1] * 6,
        [1, 0, -1, -1, -1, -1],
    ]


def test_ppmi_neighbors_lie_in_the_planted_community():
    def share(shuffled):
        vectors = ppmi_vectors(_communities(0, shuffled=shuffled), num_items=40, dim=2, window=8, seed=0)
        return _same_community(neighbors(vectors, k=5))

    assert share(shuffled=False) > 0.95
    assert 0.3 < share(shuffled=True) < 0.7


def _dataset(lists):
    rows = [(f"u{user}", f"i{item}", time) for user, items in enumerate(lists) for time, item in enumerate(items)]
    users, items, times = zip(*rows, strict=True)
    interactions = pa.table({"user_id": users, "item_id": items, "timestamp": pa.array(times, pa.int64())})
    catalogue = pa.table({"item_id": [f"i{item}" for item in range(12)], "title": ["x"] * 12})
    return Dataset.build(catalogue, interactions, name="tiny")


def test_validation_and_test_interactions_change_nothing():
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 12, 7).tolist() for _ in range(30)]

    def vectors(lists):
        dataset = _dataset(lists)
        train = dataset.splits.train
        found = ppmi_vectors(train, num_items=dataset.num_items, dim=4, window=3, seed=0)
        return np.concatenate([found, user_vectors(train, found, num_users=dataset.num_users)])

    held_out = [[*items[:5], *rng.integers(0, 12, 2).tolist()] for items in lists]
    trained_on = [[*items[:4], *rng.integers(0, 12, 3).tolist()] for items in lists]
    np.testing.assert_array_equal(vectors(lists), vectors(held_out))
    assert not np.array_equal(vectors(lists), vectors(trained_on))


NOTHING = _histories([[], []])
LONELY = _histories([[0], [1, 1], [2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cooccurrence(NOTHING, num_items=6, window=2),
            "training histories hold no interaction.*move the split",
        ),
        (lambda: interactions_matrix(NOTHING, num_items=6, num_users=2), "training histories hold no interaction"),
        (lambda: ppmi_vectors(LONELY, num_items=6, dim=1, window=2, seed=0), "no two different items"),
        (lambda: ppmi_vectors(_histories(LISTS), num_items=6, dim=5, window=2, seed=0), "dim of 1 to 4.*lower dim"),
        (lambda: ppmi_vectors(_histories(LISTS), num_items=6, dim=0, window=2, seed=0), "dim of 1 to 4"),
        (lambda: cooccurrence(_histories(LISTS), num_items=6, window=0), "window of 1"),
        (lambda: cooccurrence(_histories(LISTS), num_items=4, window=1), "item rows of 0 to 3.*got 0 to 4"),
        (lambda: interactions_matrix(Histories.from_lists(LISTS), num_items=6, num_users=5), "users of 0 to 4.*-1"),
        (lambda: interactions_matrix(_histories(LISTS), num_items=6, num_users=4), "users of 0 to 3.*to 4"),
        (lambda: sample_partners(sparse.csr_array([[1.0, -1.0]]), samples=1, seed=0), "weights of 0 or more"),
        (lambda: sample_partners(sparse.csr_array([[1.0, np.nan]]), samples=1, seed=0), "finite"),
        (lambda: neighbors(np.eye(3), k=0), "k and block"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(SemidError, match=message):
        call()


def test_the_same_calls_with_good_input_pass():
    assert ppmi_vectors(_histories(LISTS), num_items=6, dim=4, window=2, seed=0).shape == (6, 4)
    assert cooccurrence(_histories(LISTS), num_items=5, window=1).shape == (5, 5)
    assert interactions_matrix(_histories(LISTS), num_items=6, num_users=5).nnz == 11


def test_neighbors_of_many_vectors_are_looked_for_in_the_nearest_lists(monkeypatch):
    rng = np.random.default_rng(0)
    families = rng.normal(size=(60, 8))
    vectors = np.repeat(families, 20, axis=0) + 0.3 * rng.normal(size=(1200, 8))
    vectors[7] = 0
    exact = neighbors(vectors, k=5)
    monkeypatch.setattr("semid.graphs.neighbors._EXACT", 100)
    monkeypatch.setattr("semid.graphs.neighbors._PROBES", 4)
    found = neighbors(vectors, k=5, block=64)
    assert (found[7] == -1).all()
    assert not (found == 7).any()
    shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    assert 0.9 < np.mean(shared) / 5 < 1


def test_lists_that_equal_vectors_leave_empty_are_not_searched(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(60, 8)), 20, axis=0) + 0.3 * rng.normal(size=(1200, 8))
    vectors[:700] = vectors[0]
    exact = neighbors(vectors, k=5)
    monkeypatch.setattr("semid.graphs.neighbors._EXACT", 100)
    monkeypatch.setattr("semid.graphs.neighbors._PROBES", 4)
    found = neighbors(vectors, k=5, block=64)
    assert (found[:700] < 700).all()
    others = exact.min(axis=1) >= 700
    shared = [len(set(a) & set(b)) for a, b in zip(found[others].tolist(), exact[others].tolist(), strict=True)]
    assert np.mean(shared) / 5 > 0.9


@pytest.mark.parametrize(("columns", "k"), [(31, 3), (64, 2), (100, 2), (330, 10), (1000, 10)])
def test_the_largest_by_stripes_are_the_largest(columns, k):
    values = np.random.default_rng(columns).normal(size=(7, columns)).astype(np.float32)
    values[3] = -np.inf
    values[3, 5:25] = np.arange(20)
    np.testing.assert_array_equal(np.sort(_largest_by_stripes(values, k)), np.sort(np.argsort(-values)[:, :k]))
