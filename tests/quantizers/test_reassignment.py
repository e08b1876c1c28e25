"""Re-assignment of the last level against brute force, and against Sinkhorn in logarithms, one group at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import logsumexp

from quantizers import reassignment
from quantizers.collisions import collision_groups
from quantizers.reassignment import min_cost_reassign, sinkhorn_reassign

POLICIES = [min_cost_reassign, sinkhorn_reassign]


def _problem(seed, *, items=300, prefixes=25, size=40, dim=6):
    """Nearest codes of residuals that lie in clumps."""
    rng = np.random.default_rng(seed)
    codebook = rng.normal(size=(size, dim))
    residuals = codebook[rng.integers(0, size // 4, items)] + 0.2 * rng.normal(size=(items, dim))
    last = np.square(residuals[:, None] - codebook).sum(-1).argmin(-1)
    codes = np.column_stack([rng.integers(0, prefixes, items) // 5, rng.integers(0, 5, items), last])
    return codes.astype(np.int32), residuals.astype(np.float32), codebook.astype(np.float32)


def _cost(last, residuals, codebook):
    return np.square(residuals.astype(np.float64) - codebook.astype(np.float64)[last]).sum()


def _colliding(codes):
    sizes = np.bincount(collision_groups(codes))
    return sizes[sizes > 1].sum()


@pytest.mark.parametrize("policy", POLICIES)
def test_only_the_last_level_of_groups_with_a_collision_changes(policy):
    codes, residuals, codebook = _problem(0)
    before = codes.copy()
    found = policy(codes, residuals=residuals, codebook=codebook)
    np.testing.assert_array_equal(codes, before)
    np.testing.assert_array_equal(found.codes[:, :-1], codes[:, :-1])
    prefix, groups = collision_groups(codes[:, :-1]), collision_groups(codes)
    collides = np.isin(prefix, prefix[np.bincount(groups)[groups] > 1])
    np.testing.assert_array_equal(found.codes[~collides], codes[~collides])
    assert found.codes.dtype == codes.dtype
    assert found.moved == (found.codes != codes).any(1).sum() > 0
    assert found.colliding == _colliding(found.codes) < _colliding(codes)


@pytest.mark.parametrize("policy", POLICIES)
def test_deterministic_and_done_where_nothing_collides(policy):
    codes, residuals, codebook = _problem(1)
    found = policy(codes, residuals=residuals, codebook=codebook)
    again = policy(codes, residuals=residuals, codebook=codebook)
    np.testing.assert_array_equal(found.codes, again.codes)
    unique = min_cost_reassign(codes, residuals=residuals, codebook=codebook)
    rest = policy(unique.codes, residuals=residuals, codebook=codebook)
    np.testing.assert_array_equal(rest.codes, unique.codes)
    assert (rest.moved, rest.colliding) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_min_cost_is_the_least_of_all_unique_assignments(seed):
    rng = np.random.default_rng(seed)
    codebook, residuals = rng.normal(size=(6, 2)), rng.normal(size=(4, 2))
    codes = np.column_stack([np.full(4, 7), [0, 1, 2, 0]])
    found = min_cost_reassign(codes, residuals=residuals, codebook=codebook)
    least = min(_cost(list(chosen), residuals, codebook) for chosen in itertools.permutations(range(6), 4))
    np.testing.assert_allclose(_cost(found.codes[:, -1], residuals, codebook), least)


@pytest.mark.parametrize("seed", range(3))
def test_min_cost_leaves_nothing_colliding(seed):
    codes, residuals, codebook = _problem(seed)
    found = min_cost_reassign(codes, residuals=residuals, codebook=codebook)
    assert found.colliding == 0
    assert len(np.unique(found.codes, axis=0)) == len(codes)


def test_true_duplicates_part_under_min_cost_and_never_under_sinkhorn():
    codebook = np.random.default_rng(0).normal(size=(8, 3))
    codes, residuals = np.full((8, 2), 5), np.repeat(codebook[5:6], 8, axis=0)
    found = min_cost_reassign(codes, residuals=residuals, codebook=codebook)
    np.testing.assert_array_equal(np.sort(found.codes[:, -1]), np.arange(8))
    assert sinkhorn_reassign(codes, residuals=residuals, codebook=codebook).colliding == 8


def test_one_level_is_one_prefix_group():
    codebook = np.random.default_rng(0).normal(size=(5, 3))
    found = min_cost_reassign(np.zeros((5, 1), np.int32), residuals=codebook[::-1], codebook=codebook)
    np.testing.assert_array_equal(found.codes[:, 0], np.arange(5)[::-1])


def _naive_round(codes, residuals, codebook, *, epsilon, iterations):
    """One round of LC-Rec, group by group."""
    result = codes.copy()
    groups = collision_groups(codes)
    for group in range(groups.max() + 1):
        rows = np.flatnonzero(groups == group)
        if len(rows) == 1:
            continue
        distances = np.square(residuals[rows].astype(np.float64)[:, None] - codebook.astype(np.float64)).sum(-1)
        middle = (distances.max() + distances.min()) / 2
        plan = -(distances - middle) / (distances.max() - middle) / epsilon
        for _ in range(iterations):
            plan = plan - logsumexp(plan, axis=1, keepdims=True)
            plan = plan - logsumexp(plan, axis=0, keepdims=True)
        for row, share, distance in zip(rows, np.exp(plan), distances, strict=True):
            result[row, -1] = min(np.flatnonzero(share >= share.max() * (1 - 1e-6)), key=lambda code: distance[code])
    return result


@pytest.mark.parametrize("epsilon", [0.003, 1.0])
def test_sinkhorn_equals_the_naive_rounds(epsilon):
    codes, residuals, codebook = _problem(2)
    expected = codes
    for rounds in (1, 2):
        expected = _naive_round(expected, residuals, codebook, epsilon=epsilon, iterations=50)
        found = sinkhorn_reassign(codes, residuals=residuals, codebook=codebook, rounds=rounds, epsilon=epsilon)
        np.testing.assert_array_equal(found.codes, expected)


def test_sinkhorn_continues_where_it_stopped():
    codes, residuals, codebook = _problem(0)
    half = sinkhorn_reassign(codes, residuals=residuals, codebook=codebook, rounds=2)
    assert half.colliding > 0
    resumed = sinkhorn_reassign(half.codes, residuals=residuals, codebook=codebook, rounds=2)
    whole = sinkhorn_reassign(codes, residuals=residuals, codebook=codebook, rounds=4)
    np.testing.assert_array_equal(resumed.codes, whole.codes)
    assert (half.codes != whole.codes).any()
    straight = sinkhorn_reassign(codes, residuals=residuals, codebook=codebook)
    again = sinkhorn_reassign(straight.codes, residuals=residuals, codebook=codebook)
    np.testing.assert_array_equal(again.codes, straight.codes)


def test_sinkhorn_gives_the_best_of_its_rounds_and_ends_when_none_is_better(monkeypatch):
    codes, residuals, codebook = _problem(3, items=400, prefixes=5)  # crowded: collisions come and go for many rounds
    colliding, choose = [_colliding(codes)], reassignment._choose

    def watched(current, *args):
        choose(current, *args)
        colliding.append(_colliding(current))

    monkeypatch.setattr(reassignment, "_choose", watched)
    found = sinkhorn_reassign(codes, residuals=residuals, codebook=codebook)
    best = int(np.argmin(colliding))
    assert colliding[1] < colliding[2] > colliding[3] < colliding[4]
    assert found.colliding == _colliding(found.codes) == colliding[best] < colliding[-1]
    assert len(colliding) == 1 + best + 5


def test_no_rounds_and_no_items():
    codes, residuals, codebook = _problem(4)
    found = sinkhorn_reassign(codes, residuals=residuals, codebook=codebook, rounds=0)
    np.testing.assert_array_equal(found.codes, codes)
    assert (found.moved, found.colliding) == (0, _colliding(codes))
    for policy in POLICIES:
        empty = policy(codes[:0], residuals=residuals[:0], codebook=codebook)
        assert (empty.codes.shape, empty.moved, empty.colliding) == ((0, 3), 0, 0)


def test_a_group_larger_than_the_codebook():
    codes = np.array([[9, 0], [1, 0], [1, 1], [1, 1], [9, 1]])
    residuals, codebook = np.zeros((5, 2)), np.arange(6.0).reshape(3, 2)
    assert min_cost_reassign(codes, residuals=residuals, codebook=codebook).colliding == 0
    with pytest.raises(ValueError, match=r"3 items .* first is row 1.* 2 codes; give it at least 3, .* tie_break"):
        min_cost_reassign(codes, residuals=residuals, codebook=codebook[:2])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.zeros((2, 2))}, "integer codes"),
        ({"codes": np.array([[0, 1], [0, 3]])}, r"last code 3 of row 1 lies outside 0\.\.2"),
        ({"residuals": np.zeros((3, 2))}, r"got \(3, 2\) and \(3, 2\)"),
        ({"residuals": np.zeros((2, 4))}, r"got \(2, 4\) and \(3, 2\)"),
        ({"residuals": np.array([[0, 1], [np.nan, 0]])}, "finite residuals.* row 1"),
        ({"codebook": np.array([[0, 1], [0, 0], [np.inf, 0]])}, "finite codebook.* row 2"),
    ],
)
def test_bad_input(policy, change, message):
    given = {"codes": np.zeros((2, 2), np.int32), "residuals": np.zeros((2, 2)), "codebook": np.eye(3)[:, :2]}
    assert policy(given["codes"], residuals=given["residuals"], codebook=given["codebook"]).codes.shape == (2, 2)
    given |= change
    with pytest.raises(ValueError, match=message):
        policy(given["codes"], residuals=given["residuals"], codebook=given["codebook"])


@pytest.mark.parametrize("change", [{"rounds": -1}, {"iterations": 0}, {"epsilon": 0.0}])
def test_bad_settings_of_sinkhorn(change):
    codes, residuals, codebook = _problem(0)
    with pytest.raises(ValueError, match="epsilon > 0"):
        sinkhorn_reassign(codes, residuals=residuals, codebook=codebook, **change)
