"""Metrics against hand-worked numbers, enumeration of all orders inside groups, and ir-measures."""

import itertools
import math

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, Qrel, R, ScoredDoc, nDCG

from semid.data import Histories
from semid.errors import SemidError
from semid.evaluation import MetricState, metrics
from semid.evaluation.metrics import Places


def test_hand_worked_expectation_for_a_target_in_a_group_of_three_at_rank_two():
    values = metrics.accuracy(Places(np.array([2]), np.array([3])), (1, 3, 10))
    assert values["recall@1"] == 0
    assert values["recall@3"] == pytest.approx(2 / 3)  # ranks 2 and 3 of 2, 3, 4
    assert values["recall@10"] == pytest.approx(1)
    assert values["ndcg@3"] == pytest.approx((1 / math.log2(3) + 1 / 2) / 3)
    assert values["ndcg@10"] == pytest.approx((1 / math.log2(3) + 1 / 2 + 1 / math.log2(5)) / 3)
    assert values["mrr"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


def test_a_target_that_is_not_listed_scores_nothing():
    values = metrics.accuracy(Places(np.array([0, 1]), np.array([1, 1])), (2,))
    assert {name: value.tolist() for name, value in values.items()} == {
        "recall@2": [0, 1],
        "ndcg@2": [0, 1],
        "mrr": [0, 1],
    }


def test_groups_count_with_all_members_even_those_not_listed():
    groups = np.array([0, 1, 1, 1, 2, 2])
    # One item for each code: group 1 (three items) stands before group 2, whose item 5 is not listed itself.
    places = metrics.item_places(np.array([[1, 4, -1]]), np.array([5]), groups)
    assert (places.first.tolist(), places.size.tolist()) == ([4], [2])


def test_seen_items_count_in_no_group():
    groups = np.array([0, 1, 1, 1, 2, 2])
    seen = Histories.from_lists([[2, 4, 2], [5]])
    places = metrics.item_places(np.array([[1, 5, -1], [1, 4, -1]]), np.array([5, 5]), groups, seen=seen)
    assert places.first.tolist() == [3, 0]  # item 2 is gone from before; the second target is itself seen
    assert places.size.tolist() == [1, 1]


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_one_mask_counts_as_the_same_for_each_and_visits_no_members(exclude_seen):
    rng = np.random.default_rng(0)
    numbers, n = rng.integers(0, 4, 40), 12
    ranked, targets = rng.integers(-1, 40, (n, 6)), rng.integers(0, 40, n)
    seen = Histories.from_lists(rng.integers(0, 40, (n, 5)).tolist()) if exclude_seen else None
    mask = rng.random((1, 40)) < 0.5
    one, each = metrics.ItemGroups(numbers), metrics.ItemGroups(numbers)
    places = one.places(ranked, targets, seen=seen, allowed=mask)
    expected = each.places(ranked, targets, seen=seen, allowed=np.repeat(mask, n, axis=0))
    np.testing.assert_array_equal(places, expected)
    assert "members" not in vars(one)  # of a large group they are many
    assert "members" in vars(each)


def _mean_over_orders(blocks: list[list[int]], target: int, k: int) -> tuple[float, float, float]:
    """Recall, NDCG and reciprocal rank at `k`, averaged over every order of the items inside each block."""
    found = []
    for order in itertools.product(*(itertools.permutations(block) for block in blocks)):
        ranking = list(itertools.chain(*order))
        rank = ranking.index(target) + 1 if target in ranking else math.inf
        found.append((1.0, 1 / math.log2(rank + 1), 1 / rank) if rank <= k else (0.0, 0.0, 0.0))
    return tuple(np.mean(found, axis=0))


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_expectation_equals_enumeration_of_all_orders_within_groups(seed, exclude_seen):
    rng = np.random.default_rng(seed)
    groups = metrics.group_ids(rng.integers(0, 2, size=(7, 2)))  # 7 items on at most 4 code tuples
    history = rng.choice(7, size=2).tolist()
    target, k = int(rng.integers(7)), int(rng.integers(1, 6))
    candidates = [item for item in range(7) if not (exclude_seen and item in history)]
    blocks = [[i for i in candidates if groups[i] == g] for g in rng.permutation(groups.max() + 1)]
    listed = np.array([list(itertools.chain(*blocks))[:k]])
    listed = np.pad(listed, ((0, 0), (0, k - listed.shape[1])), constant_values=-1)
    seen = Histories.from_lists([history]) if exclude_seen else None
    values = metrics.accuracy(metrics.item_places(listed, np.array([target]), groups, seen=seen), (k,))
    got = [values[name][0] for name in (f"recall@{k}", f"ndcg@{k}", "mrr")]
    np.testing.assert_allclose(got, _mean_over_orders(blocks, target, k), atol=1e-12)


def test_agrees_with_ir_measures_where_nothing_collides():
    rng = np.random.default_rng(3)
    n, num_items, k = 200, 30, 10
    ranked = np.stack([rng.permutation(num_items)[:k] for _ in range(n)])
    ranked[rng.random(n) < 0.3, 6:] = -1
    targets = rng.integers(num_items, size=n)
    values = metrics.accuracy(metrics.item_places(ranked, targets, np.arange(num_items)), (5, k))
    run = [
        ScoredDoc(str(q), str(doc), float(-rank)) for q in range(n) for rank, doc in enumerate(ranked[q]) if doc >= 0
    ]
    qrels = [Qrel(str(q), str(target), 1) for q, target in enumerate(targets)]
    names = {"recall@5": R @ 5, "recall@10": R @ 10, "ndcg@5": nDCG @ 5, "ndcg@10": nDCG @ 10, "mrr": RR @ 10}
    expected = ir_measures.calc_aggregate(list(names.values()), qrels, run)
    for name, measure in names.items():
        assert values[name].mean() == pytest.approx(expected[measure], abs=1e-9), name
    assert 0 < values["mrr"].mean() < 1


def test_code_level_counts_distinct_codes_and_credits_any_item_of_the_group():
    groups = np.array([0, 0, 1, 2])
    ranked, targets = np.array([[0, 1, 2], [2, 1, 3], [0, 1, 2]]), np.array([2, 0, 3])
    places = metrics.code_places(ranked, targets, groups)
    assert places.first.tolist() == [2, 2, 0]
    assert places.size.tolist() == [1, 1, 1]


def test_group_ids_number_equal_code_tuples_alike():
    codes = np.array([[1, 0], [0, 1], [1, 0], [0, 0], [0, 1]])
    groups = metrics.group_ids(codes)
    same = (codes[:, None] == codes[None]).all(axis=-1)
    np.testing.assert_array_equal(groups[:, None] == groups[None], same)
    assert sorted(set(groups.tolist())) == [0, 1, 2]


def test_state_of_a_hand_worked_batch():
    ranked = np.array([[0, 1], [0, -1], [3, -1]])
    state = metrics.measure(
        {"recall@2": np.array([1.0, 0.0, 0.5]), "ndcg@2/popularity_cold": np.array([])},
        ranked,
        available=np.array([4, 1, 4]),  # the second user has a single candidate: its list is not short
        popularity=np.array([1.0, 2.0, 3.0, 4.0]),
    )
    expected = {"recall@2": 0.5, "valid": 4 / 5, "popularity_rank@2": (1 + 2 + 1 + 4) / 4, "coverage@2": 0.75}
    values = state.compute()
    assert values.pop("gini@2") == pytest.approx(metrics.gini(np.array([2, 1, 0, 1])))
    assert values == pytest.approx(expected)


def _random_state(rng, n):
    ranked = np.stack([rng.permutation(20)[:4] for _ in range(n)])
    return {"x": rng.random(n)}, ranked


def test_states_of_unequal_parts_add_up_to_the_whole():
    values, ranked = _random_state(np.random.default_rng(0), 100)
    popularity = np.arange(1.0, 21.0)

    def state(part):
        named = {name: value[part] for name, value in values.items()}
        return metrics.measure(named, ranked[part], available=np.full(len(ranked[part]), 20), popularity=popularity)

    parts = [state(slice(0, 3)), state(slice(3, 90)), state(slice(90, 100))]
    whole = state(slice(0, 100)).compute()
    assert (parts[0] + parts[1] + parts[2]).compute() == pytest.approx(whole, abs=1e-12)
    mean_of_means = np.mean([part.compute()["x"] for part in parts])
    assert mean_of_means != pytest.approx(whole["x"], abs=1e-6)


def test_states_of_different_k_do_not_add():
    one, other = (MetricState({}, np.zeros(3, np.int64), k) for k in (5, 10))
    with pytest.raises(SemidError, match="got k 5 and 10"):
        one + other
    assert (one + one).compute() == {"coverage@5": 0.0, "gini@5": 0.0}


def test_gini_of_known_distributions():
    assert metrics.gini(np.array([3, 3, 3, 3])) == 0
    assert metrics.gini(np.array([0, 8, 0, 0])) == pytest.approx(1 - 1 / 4)
    counts = np.random.default_rng(1).integers(0, 9, size=50)
    pairs = np.abs(counts[:, None] - counts[None]).sum()  # the definition: mean absolute difference over twice the mean
    assert metrics.gini(counts) == pytest.approx(pairs / (2 * 50 * counts.sum()))


def test_popularity_ranks_share_the_mean_of_ties():
    assert metrics.popularity_ranks(np.array([5, 0, 7, 5, 0])).tolist() == [2.5, 4.5, 1, 2.5, 4.5]


def test_terciles_are_values_that_occur():
    assert metrics.terciles(np.array([3, 1, 2, 9, 8, 7])).tolist() == [2, 7]


def test_history_membership_and_repeats():
    rows = np.array([[2, 0, -1, 2], [1, 1, 0, -1]])
    histories = Histories.from_lists([[2, 2], []])
    assert metrics.in_history(rows, histories).tolist() == [[True, False, False, True], [False] * 4]
    assert metrics.repeated(rows).tolist() == [[False, False, False, True], [False, True, False, False]]
    assert metrics.num_candidates(2, 3, seen=histories, allowed=None).tolist() == [2, 3]


def test_bootstrap_finds_a_real_difference_and_none_where_there_is_none():
    rng = np.random.default_rng(0)
    hits = (rng.random(2000) < 0.1).astype(float)
    better = np.maximum(hits, rng.random(2000) < 0.02)
    shuffled = rng.permutation(hits)
    real = metrics.paired_bootstrap(better, hits, samples=2000, seed=1)
    assert real.mean == pytest.approx((better - hits).mean())
    assert 0 < real.low < real.mean < real.high
    assert real.p < 0.01
    chance = metrics.paired_bootstrap(shuffled, hits, samples=2000, seed=1)
    assert chance.low < 0 < chance.high
    assert chance.p > 0.05
    same = metrics.paired_bootstrap(hits, hits, samples=2000, seed=1)
    assert same == (0, 0, 0, 1)


def test_bootstrap_interval_is_that_of_resampling_examples():
    rng = np.random.default_rng(5)
    a, b = rng.random(200), rng.random(200)
    got = metrics.paired_bootstrap(a, b, samples=5000, seed=2)
    means = (a - b)[rng.integers(200, size=(5000, 200))].mean(axis=1)
    np.testing.assert_allclose([got.low, got.high], np.quantile(means, [0.025, 0.975]), atol=0.004)
    assert got == metrics.paired_bootstrap(a, b, samples=5000, seed=2)
    assert got != metrics.paired_bootstrap(a, b, samples=5000, seed=3)
    with pytest.raises(SemidError, match="expected samples of the bootstrap of at least 1, got 0"):
        metrics.paired_bootstrap(a, b, samples=0)
    with pytest.raises(SemidError, match=rf"the user of each of {len(a)} examples, got users \(2,\)"):
        metrics.paired_bootstrap(a, b, users=np.zeros(2, np.int64))


def test_intervals_are_over_users_and_not_over_their_examples():
    rng = np.random.default_rng(6)
    a, b, users = rng.random(60), rng.random(60), rng.permutation(90)[:60]
    alone = metrics.half_width(a), metrics.paired_bootstrap(a, b, samples=500)
    for own in (users, np.full(60, -1)):  # one example per user, whose numbers say nothing
        assert metrics.half_width(a, users=own) == pytest.approx(alone[0], rel=1e-12)
        assert metrics.paired_bootstrap(a, b, users=own, samples=500) == alone[1]
    a8, b8, users8 = np.repeat(a, 8), np.repeat(b, 8), np.repeat(users, 8)
    mixed = rng.permutation(480)
    half = metrics.half_width(a8[mixed], users=users8[mixed])
    difference = metrics.paired_bootstrap(a8[mixed], b8[mixed], users=users8[mixed], samples=500)
    assert half == pytest.approx(alone[0], rel=1e-9)
    np.testing.assert_allclose(difference, alone[1], rtol=1e-9)
    assert metrics.half_width(a8) < 0.4 * half  # control: as if there were eight times as many users
    assert metrics.half_width(a, users=np.zeros(60, np.int64)) == 0


def test_users_of_several_examples_are_drawn_with_all_of_them():
    rng = np.random.default_rng(7)
    users = rng.integers(40, size=200)
    a, b = rng.random(200) + users / 40, rng.random(200)
    got = metrics.paired_bootstrap(a, b, users=users, samples=5000, seed=2)
    of_user = [np.flatnonzero(users == user) for user in np.unique(users)]
    drawn = [np.concatenate([of_user[u] for u in rng.integers(len(of_user), size=len(of_user))]) for _ in range(5000)]
    expected = np.quantile([(a - b)[rows].mean() for rows in drawn], [0.025, 0.975])
    np.testing.assert_allclose([got.low, got.high], expected, atol=0.01)
    assert got.mean == (a - b).mean()
    assert metrics.half_width(a - b, users=users) == pytest.approx((got.high - got.low) / 2, rel=0.1)


def test_bootstrap_refuses_unpaired_values():
    with pytest.raises(SemidError, match=r"got \(3,\) and \(4,\)"):
        metrics.paired_bootstrap(np.zeros(3), np.zeros(4))
