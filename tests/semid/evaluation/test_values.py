"""Scores by the value of events: both readings against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from semid.data import Dataset
from semid.errors import SemidError
from semid.evaluation import compare, compare_values, target_values, value_scores
from semid.evaluation.baselines import Popularity


def scores(ranks, values, lists, *, k=10):
    """Of ranks from 1, None for a target that is not listed."""
    found = np.array([rank is not None and rank <= k for rank in ranks])
    gains = np.array([1 / np.log2(rank + 1) if rank and rank <= k else 0.0 for rank in ranks])
    return value_scores(found.astype(float), gains, np.array(values, float), np.array(lists), k=k)


def test_by_hand_with_one_target_a_list():
    """A conversion at rank 3, a click missed, a click at rank 1, an exposure at rank 1."""
    found = scores([3, None, 1, 1], [2.5, 1, 1, 0], [0, 1, 2, 3])
    assert found["weighted_recall"] == pytest.approx(2 / 3)
    assert found["weighted_ndcg"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["weighted_score"] == pytest.approx(0.31 * 2 / 3 + 0.69 * 0.5)
    assert found["value_recall"] == pytest.approx(3.5 / 4.5)
    assert found["value_ndcg"] == pytest.approx((2.5 * 0.5 + 1) / 4.5)
    assert found["value_score"] == pytest.approx(0.31 * 3.5 / 4.5 + 0.69 * 2.25 / 4.5)


def test_by_hand_with_several_targets_a_list():
    """A conversion at rank 4, a click at rank 2, a click missed; in another list an exposure missed, a click first."""
    found = scores([4, 2, None, None, 1], [2.5, 1, 1, 0, 1], [0, 0, 0, 1, 1])
    assert found["weighted_recall"] == pytest.approx((3.5 / 4.5 + 1) / 2)
    dcg = 2.5 / np.log2(5) + 1 / np.log2(3)
    ideal = 2.5 + 1 / np.log2(3) + 1 / np.log2(4)
    assert found["weighted_ndcg"] == pytest.approx((dcg / ideal + 1) / 2)
    assert found["value_recall"] == pytest.approx(4.5 / 5.5)
    assert found["value_ndcg"] == pytest.approx((dcg + 1) / (ideal + 1))


def test_only_the_first_k_count_in_the_ideal_list_too():
    found = scores([1, 2, 3], [1, 1, 1], [0, 0, 0], k=2)
    assert found["weighted_recall"] == pytest.approx(2 / 3)
    assert found["weighted_ndcg"] == found["value_ndcg"] == pytest.approx(1)


def test_with_one_target_a_list_weights_cancel_per_list_but_not_in_the_sum():
    """The formula as printed weighs nothing there; of equal values both readings are the plain metrics."""
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 15, 500)
    lists, plain = rng.permutation(500), (ranks <= 10).mean()
    ndcg = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean()
    equal = scores(ranks, np.full(500, 2.5), lists)
    for reading in ("weighted", "value"):
        assert equal[f"{reading}_recall"] == pytest.approx(plain)
        assert equal[f"{reading}_ndcg"] == pytest.approx(ndcg)
    values = np.where(ranks <= 5, 2.5, 1)  # conversions are found
    unequal = scores(ranks, values, lists)
    assert unequal["weighted_recall"] == pytest.approx(plain)
    assert unequal["weighted_ndcg"] == pytest.approx(ndcg)
    assert unequal["value_recall"] > plain + 0.05
    assert unequal["value_ndcg"] > ndcg + 0.05


@pytest.mark.parametrize("values", [[0, 0], [-1, 2], [np.nan, 1]])
def test_values_must_be_weights(values):
    with pytest.raises(SemidError, match="expected values of 0 or more, one of them above 0"):
        scores([1, 2], values, [0, 1])
    assert scores([1, 2], [0, 1], [0, 1])["weighted_recall"] == 1


@pytest.fixture(scope="module")
def dataset():
    """Popularity ranks a, b, c, d: test targets are d (exposure), a (click), c (conversion), b (click)."""
    rows = [
        *("u0 b click 0", "u0 a click 1", "u0 a exposure 2", "u0 d exposure 3"),
        *("u1 a click 0", "u1 b click 1", "u1 c exposure 2", "u1 a click 3"),
        *("u2 a click 0", "u2 b click 1", "u2 b exposure 2", "u2 c conversion 3"),
        *("u3 a click 0", "u3 c click 1", "u3 d exposure 2", "u3 b click 3"),
    ]
    user, item, event, position = zip(*(row.split() for row in rows), strict=True)
    table = pa.table({"user_id": user, "item_id": item, "event": event, "position": map(int, position)})
    return Dataset.build(pa.table({"item_id": list("abcd")}), table, name="toy")


def test_models_of_a_dataset_with_events(dataset):
    popularity = Popularity.fit(dataset.splits.train, dataset.item_ids)
    assert [dataset.item_ids[int(row)].as_py() for row in popularity.order] == list("abcd")
    measured = compare({"popularity": popularity}, dataset, ks=(2, 10))
    found = compare_values(measured, target_values(dataset), k=2)
    row = found["rows"][0]
    assert found["values"] == {"click": 1.0, "conversion": 2.5, "exposure": 0.0}
    assert found["targets"] == {"click": 2, "conversion": 1, "exposure": 1}
    assert row["model"] == "popularity"
    assert row["weighted_recall"] == pytest.approx(2 / 3)  # the exposure is of no value
    assert row["weighted_ndcg"] == pytest.approx((1 + 1 / np.log2(3)) / 3)
    assert row["value_recall"] == pytest.approx(2 / 4.5)
    assert row["value_ndcg"] == pytest.approx((1 + 1 / np.log2(3)) / 4.5)
    with pytest.raises(SemidError, match=r"popularity was measured at recall@2, recall@10, not at 5; give a k of"):
        compare_values(measured, target_values(dataset), k=5)
    half = target_values(dataset)._replace(values=np.ones(2))
    with pytest.raises(SemidError, match="popularity was measured on 4 examples, and the values are of 2; take those"):
        compare_values(measured, half, k=2)
    of_exposures = compare_values(measured, target_values(dataset, values={"exposure": 3}), k=2)["rows"][0]
    assert of_exposures["value_recall"] == of_exposures["weighted_recall"] == 0


def test_other_events_have_values_when_they_are_given(dataset):
    renamed = dataset.replace(event=pa.array(["buy" if e == "conversion" else e for e in dataset.event.to_pylist()]))
    plain = dataset.replace(event=None)
    assert target_values(renamed) is None
    assert target_values(plain) is None
    assert target_values(dataset.replace(event=pa.array(["click"] * 15 + [None]))) is None
    assert target_values(dataset.replace(event=pa.array(["exposure"] * 16))) is None
    given = target_values(renamed, values={"buy": 1})
    assert given.events == {"buy": 1.0, "click": 0.0, "exposure": 0.0}
    assert given.values.tolist() == [0, 0, 1, 0]
    with pytest.raises(SemidError, match=r"no event 'exposed' in the dataset; did you mean 'exposure'\?"):
        target_values(renamed, values={"exposed": 1})
    with pytest.raises(SemidError, match="'toy' has no events that could have values; it needs a column 'event'"):
        target_values(plain, values={"click": 1})
    for values in ({"click": 0}, {"click": -1, "buy": 1}):
        with pytest.raises(SemidError, match="expected values of 0 or more, one of them above 0; the test targets'"):
            target_values(renamed, values=values)
