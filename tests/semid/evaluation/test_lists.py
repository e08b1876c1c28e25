"""Metrics of lists against loops over pairs and tags, and numbers worked out by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pyarrow as pa
import pytest

from semid.data import Dataset, Histories, Tags
from semid.evaluation import Bigram, ListTraits, Popularity, compare, compare_lists, list_metrics
from semid.evaluation import lists as module

ITEMS, USERS, K = 14, 30, 5
GENRES = [[], *[[f"g{n % 4}", f"g{n % 3}"][: 1 + n % 2] for n in range(1, ITEMS)]]
IDS = pa.array([f"i{n}" for n in range(ITEMS)])


def traits(seed: int = 0) -> ListTraits:
    rng = np.random.default_rng(seed)
    vectors, codes = rng.normal(size=(ITEMS, 3)).astype(np.float32), rng.integers(0, 2, size=(ITEMS, 3))
    vectors[2], codes[4] = 0, -1  # an item without a vector, one without codes
    tags = Tags.from_column(pa.table({"genres": GENRES}), "genres")
    return ListTraits(IDS, rng.integers(0, 9, size=ITEMS), vectors, codes.astype(np.int32), tags)


def some_lists(seed: int = 0) -> tuple[np.ndarray, Histories]:
    """Lists of 0 to K items, the first of none and the second of one; histories, one of them empty."""
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(ITEMS)[:K] for _ in range(USERS)]).astype(np.int32)
    lengths = rng.integers(0, K + 1, size=USERS)
    lengths[:2] = 0, 1
    ranked[np.arange(K) >= lengths[:, None]] = -1
    return ranked, Histories.from_lists([rng.integers(0, ITEMS, size=n % 6).tolist() for n in range(USERS)])


def mean_of_pairs(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def brute_force(rows: list[int], history: list[int], of: ListTraits) -> dict[str, float]:
    total, names = of.counts.sum() + ITEMS, of.tags.names.to_pylist()
    cosines, distances = [], []
    for a, b in itertools.combinations(rows, 2):
        x, y = of.vectors[a].astype(float), of.vectors[b].astype(float)
        if x.any() and y.any():
            cosines.append(x @ y / math.sqrt((x @ x) * (y @ y)))
        if of.codes[a, 0] >= 0 and of.codes[b, 0] >= 0:
            same = list(
                itertools.takewhile(lambda pair: pair[0] == pair[1], zip(of.codes[a], of.codes[b], strict=True))
            )
            distances.append(1 - len(same) / 3)

    def distribution(items: list[int]) -> np.ndarray:
        shares, tagged = np.zeros(len(names)), [item for item in items if GENRES[item]]
        for item in tagged:
            for genre in set(GENRES[item]):
                shares[names.index(genre)] += 1 / len(set(GENRES[item])) / len(tagged)
        return shares

    p, q = distribution(history), distribution(rows)
    kl = sum(p[g] * math.log2(p[g] / (0.99 * q[g] + 0.01 * p[g])) for g in range(len(names)) if p[g])
    return {
        "novelty": float(np.mean([-math.log2((of.counts[i] + 1) / total) for i in rows])) if rows else math.nan,
        "diversity": 1 - mean_of_pairs(cosines),
        "code_diversity": mean_of_pairs(distances),
        "tag_entropy": -sum(x * math.log2(x) for x in q if x) if q.any() else math.nan,
        "calibration_kl": kl if p.any() and q.any() else math.nan,
    }


@pytest.mark.parametrize("batch", [1 << 22, 60])
def test_every_list_equals_loops_over_its_pairs_and_tags(batch, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", batch)
    ranked, histories = some_lists()
    found = list_metrics(ranked, histories, traits())
    for user in range(USERS):
        expected = brute_force(ranked[user][ranked[user] >= 0].tolist(), histories[user].tolist(), traits())
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][user], value, atol=1e-9, err_msg=name)
    assert np.isnan(found["diversity"][1])  # a list of one item has no pairs
    assert np.isnan(found["calibration_kl"][0])
    assert np.isfinite(found["calibration_kl"]).any()


def test_numbers_worked_out_by_hand():
    tags = Tags.from_column(pa.table({"genres": [["x"], ["y"], ["x", "y"]]}), "genres")
    vectors = np.array([[1, 0], [0, 2], [3, 0]], np.float32)
    of = ListTraits(IDS[:3], np.array([6, 1, 2]), vectors, np.array([[0, 0], [0, 1], [1, 1]]), tags)
    found = list_metrics(np.array([[0, 1], [2, 0]], np.int32), Histories.from_lists([[0, 0], [0, 1]]), of)
    shares = np.array([7, 2, 3]) / 12
    np.testing.assert_allclose(found["novelty"], [-np.log2(shares[[0, 1]]).mean(), -np.log2(shares[[2, 0]]).mean()])
    np.testing.assert_allclose(found["diversity"], [1, 0], atol=1e-12)
    np.testing.assert_allclose(found["code_diversity"], [0.5, 1])
    three_to_one = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    np.testing.assert_allclose(found["tag_entropy"], [1, three_to_one])
    half = 0.5 * math.log2(0.5 / (0.99 * 0.75 + 0.005)) + 0.5 * math.log2(0.5 / (0.99 * 0.25 + 0.005))
    np.testing.assert_allclose(found["calibration_kl"], [math.log2(1 / (0.99 * 0.5 + 0.01)), half])


def test_a_list_with_the_tags_of_the_history_is_calibrated():
    ranked = np.array([[1, 3, 5]], np.int32)
    found = list_metrics(ranked, Histories.from_lists([[5, 1, 3]]), traits())
    assert found["calibration_kl"][0] == pytest.approx(0, abs=1e-12)
    assert list_metrics(ranked, Histories.from_lists([[2, 2]]), traits())["calibration_kl"][0] > 0.1  # control


def test_traits_in_the_order_of_another_ranker_give_the_same():
    ranked, histories = some_lists(3)
    order = np.random.default_rng(1).permutation(ITEMS)
    row_of = np.append(np.argsort(order), -1)  # of -1: -1
    others = Histories(histories.users, row_of[histories.items].astype(np.int32), histories.starts, histories.ends)
    mine = traits().for_items(IDS.take(pa.array(order)))
    found, expected = list_metrics(row_of[ranked], others, mine), list_metrics(ranked, histories, traits())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-9, err_msg=name)
    larger = traits().for_items(pa.array([*IDS.to_pylist(), "new"]))
    unknown = list_metrics(np.array([[ITEMS, 1]], np.int32), Histories.from_lists([[1]]), larger)
    assert np.isnan(unknown["diversity"][0])
    known = list_metrics(np.array([[1]], np.int32), Histories.from_lists([[1]]), traits())
    assert unknown["tag_entropy"] == known["tag_entropy"]


def test_without_vectors_codes_and_tags_novelty_is_left():
    ranked, histories = some_lists()
    assert list(list_metrics(ranked, histories, ListTraits(IDS, np.ones(ITEMS, np.int64)))) == ["novelty"]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rng = np.random.default_rng(2)
    rows = [
        (f"u{user}", f"i{min(int(rng.geometric(0.2)), ITEMS) - 1}", at)
        for user in range(USERS)
        for at in range(rng.integers(3, 9))
    ]
    users, items, positions = zip(*rows, strict=True)
    table = pa.table({"user_id": users, "item_id": items, "position": positions})
    return Dataset.build(pa.table({"item_id": IDS, "genres": GENRES}), table, name="toy")


@pytest.fixture(scope="module")
def compared(dataset) -> tuple[dict, dict]:
    train = dataset.splits.train
    rankers = {"bigram": Bigram.fit(train, dataset.item_ids), "popularity": Popularity.fit(train, dataset.item_ids)}
    measured = compare(rankers, dataset, ks=(3, K))
    return measured, compare_lists(measured, rankers, dataset, k=3, samples=400)


def test_models_have_the_means_of_their_lists(dataset, compared):
    measured, found = compared
    assert {name: found[name] for name in ("k", "tags", "vectors", "codes_of")} == {
        "k": 3, "tags": "genres", "vectors": None, "codes_of": None,
    }  # fmt: skip
    of = ListTraits.from_dataset(dataset)
    for row in found["rows"]:
        metrics = measured[row["model"]]
        values = list_metrics(metrics.ranked[:, :3], dataset.splits.test.histories, of)
        for name, value in values.items():
            assert row[name]["value"] == pytest.approx(np.nanmean(value))
            assert row[name]["low"] - 1e-9 <= row[name]["value"] <= row[name]["high"] + 1e-9  # a constant is rounded
        ndcg, activity = metrics.per_example["ndcg@3"], metrics.groups["activity"]
        worst = min(ndcg[activity == group].mean() for group in np.unique(activity))
        assert row["worst_group"]["value"] == pytest.approx(worst)
        weak = np.mean([value < ndcg.mean() and group == 0 for value, group in zip(ndcg, activity, strict=True)])
        assert row["weak_users"]["value"] == pytest.approx(weak)


def test_serendipity_counts_hits_that_the_bigram_has_not(compared):
    measured, found = compared
    bigram, popularity = found["rows"]
    assert bigram["serendipity"]["value"] == 0
    hits = {name: metrics.per_example["recall@3"] for name, metrics in measured.items()}
    surprising = [a for a, b in zip(hits["popularity"], hits["bigram"], strict=True) if not b]
    assert popularity["serendipity"]["value"] == pytest.approx(sum(surprising) / USERS)
    assert sum(surprising) > 0


def test_intervals_are_those_of_a_bootstrap_over_users(dataset, compared):
    """Near the normal approximation for a mean."""
    measured, found = compared
    lists = measured["bigram"].ranked[:, :3]
    values = list_metrics(lists, dataset.splits.test.histories, ListTraits.from_dataset(dataset))
    novelty, row = values["novelty"], found["rows"][0]["novelty"]
    half = 1.96 * novelty.std() / math.sqrt(USERS)
    np.testing.assert_allclose([row["low"], row["high"]], [novelty.mean() - half, novelty.mean() + half], rtol=0.05)


def test_a_user_of_several_targets_is_drawn_with_all_lists(dataset, compared):
    measured, found = compared
    again, rows = dataclasses.replace(dataset), np.repeat(np.arange(USERS), 8)
    again.__dict__["splits"] = dataclasses.replace(dataset.splits, test=dataset.splits.test.take(rows))
    repeated = {
        name: dataclasses.replace(
            metrics,
            ranked=metrics.ranked[rows],
            per_example={metric: values[rows] for metric, values in metrics.per_example.items()},
            groups={group: members[rows] for group, members in metrics.groups.items()},
        )
        for name, metrics in measured.items()
    }
    rankers = {name: Popularity.fit(dataset.splits.train, dataset.item_ids) for name in measured}  # never asked
    for row, expected in zip(
        compare_lists(repeated, rankers, again, k=3, samples=400)["rows"], found["rows"], strict=True
    ):
        assert row.keys() == expected.keys()
        for metric in row.keys() - {"model"}:
            assert row[metric] == pytest.approx(expected[metric], rel=1e-9)


def test_bad_columns_of_tags_are_named(dataset):
    with pytest.raises(ValueError, match=r"no column 'genre' among .* did you mean 'genres'"):
        ListTraits.from_dataset(dataset, tags="genre")
    assert ListTraits.from_dataset(dataset, tags="genres").tags.column == "genres"


def test_codes_of_a_ranker_are_used_less_its_tie_break(dataset):
    class Coded:
        item_ids, tie_break = IDS[1:].take(pa.array(np.arange(ITEMS - 1)[::-1])), True
        codes = np.stack([np.arange(ITEMS - 1), np.zeros(ITEMS - 1, np.int64)], axis=1)

        def rank(self, *_, **__): ...

    codes = ListTraits.from_dataset(dataset, coded=Coded()).codes
    assert codes[:, 0].tolist() == [-1, *range(ITEMS - 2, -1, -1)]
    assert codes.shape == (ITEMS, 1)
