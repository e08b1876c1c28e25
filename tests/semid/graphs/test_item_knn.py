"""Rankers by nearness: item-kNN against its definition, and vectors of users."""

import numpy as np
import pyarrow as pa
import pytest

from semid.data import Dataset, Histories
from semid.errors import SemidError
from semid.evaluation import evaluate
from semid.graphs import ItemKNN, LightGCNConfig, UserItemVectors, VectorKNN, item_knn
from semid.graphs.ranking import largest

USERS, ITEMS = 30, 12


def drawn(repeats=False, users=range(USERS)):
    rng = np.random.default_rng(0)
    rows = [rng.choice(ITEMS, 6, replace=repeats) for _ in range(USERS)]
    interactions = {
        "user_id": [f"u{user}" for user in users for _ in range(6)],
        "item_id": [f"i{row}" for user in users for row in rows[user]],
        "timestamp": list(range(6)) * len(users),
    }
    items = pa.table({"item_id": [f"i{row}" for row in range(ITEMS)], "title": ["x"] * ITEMS})
    return Dataset.from_tables(items, pa.table(interactions), name="drawn")


def test_scores_are_the_sums_of_cosines_of_the_sets_of_users():
    dataset = drawn()
    taken = np.zeros((USERS, ITEMS))
    items, owner = dataset.splits.train.flat()
    taken[owner, items] = 1
    cosines = (taken.T @ taken) / np.sqrt(np.outer(taken.sum(0), taken.sum(0)))
    np.fill_diagonal(cosines, 0)
    for row in cosines:
        row[np.argsort(-row, kind="stable")[4:]] = 0
    histories = Histories.from_lists([[0, 3, 3], [5]])
    scores = np.stack([cosines[[0, 3]].sum(0), cosines[5]])
    scores[0, [0, 3]] = scores[1, 5] = 0
    popular = np.argsort(-taken.sum(0), kind="stable")
    knn = ItemKNN.fit(dataset, neighbors=4)
    np.testing.assert_allclose(knn.similarity.toarray(), cosines, rtol=1e-6)
    for history, row, listed in zip(histories, scores, knn.rank(histories, k=ITEMS), strict=True):
        found = [item for item in np.argsort(-row, kind="stable") if row[item] > 0]
        assert listed.tolist()[: len(found)] == found
        rest = [item for item in popular if item not in {*found, *history.tolist()}]
        assert listed.tolist()[len(found) :] == rest + [-1] * (ITEMS - len(found) - len(rest))


def test_no_neighbors_are_refused():
    with pytest.raises(SemidError, match="neighbors of at least 1, got 0"):
        ItemKNN.fit(drawn(), neighbors=0)


def test_the_history_is_left_out_where_nothing_repeats_or_where_asked():
    histories = Histories.from_lists([[0, 3]])
    assert not ItemKNN.fit(drawn()).repeats
    knn = ItemKNN.fit(drawn(repeats=True))
    assert knn.repeats
    assert {0, 3} <= set(knn.rank(histories, k=ITEMS)[0].tolist())
    assert not {0, 3} & set(knn.rank(histories, k=ITEMS, exclude_seen=True)[0].tolist())


def test_it_is_measured_as_any_ranker():
    found = evaluate(ItemKNN.fit(drawn()), drawn(), ks=(5,))
    assert found.provenance["leaves_out_history"]
    assert 0 < found.values["recall@5"] <= 1


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_masks_leave_the_order_of_what_they_allow(repeats, shared, monkeypatch):
    monkeypatch.setattr(item_knn, "_SCORES", 7 * ITEMS)
    rng, dataset = np.random.default_rng(1), drawn(repeats)
    histories = dataset.splits.test.histories
    allowed = rng.random((1 if shared else len(histories), ITEMS)) < 0.4
    rankers = [
        ItemKNN.fit(dataset, neighbors=4),
        VectorKNN.fit(dataset, rng.integers(0, 2, (ITEMS, 3)).astype(np.float32)),  # many ties
        UserItemVectors.fit(dataset, LightGCNConfig(dim=4, epochs=2), seed=0),
    ]
    for ranker in rankers:
        found = ranker.rank(histories, k=5, allowed=allowed[0] if shared else allowed)
        masks = np.broadcast_to(allowed, (len(histories), ITEMS))
        for listed, everything, mask in zip(found, ranker.rank(histories, k=ITEMS), masks, strict=True):
            expected = [row for row in everything if row >= 0 and mask[row]][:5]
            assert listed.tolist() == expected + [-1] * (5 - len(expected))
        with pytest.raises(SemidError, match="expected allowed as booleans"):
            ranker.rank(histories, k=5, allowed=np.ones(ITEMS - 1, bool))


@pytest.mark.filterwarnings("ignore:.*not allowed")
def test_vectors_are_measured_on_some_items():
    dataset = drawn()
    found = evaluate(VectorKNN.fit(dataset, np.eye(ITEMS)), dataset, ks=(5,), item_ids=dataset.item_ids[:8])
    assert found.ranked.max() == 7
    assert found.provenance["catalogue_items"] == 8


def test_vectors_of_users_are_found_by_their_ids():
    """Without its first user a dataset numbers all others anew."""
    whole, rest = drawn(), drawn(users=range(1, USERS))
    ranker = UserItemVectors.fit(whole, LightGCNConfig(dim=4, epochs=2), seed=0)
    of_all, of_rest = evaluate(ranker, whole, ks=(5,)), evaluate(ranker, rest, ks=(5,), other_dataset=True)
    places = [whole.users.to_pylist().index(user) for user in rest.users.to_pylist()]
    np.testing.assert_array_equal(of_rest.ranked, of_all.ranked[places])
    np.testing.assert_array_equal(of_rest.per_example["ndcg@5"], of_all.per_example["ndcg@5"][places])
    own = UserItemVectors.fit(rest, LightGCNConfig(dim=4, epochs=2), seed=0)
    with pytest.raises(SemidError, match=r"of the 29 users that .* 1 of 30 are of none, the first of them history 0;"):
        evaluate(own, whole, ks=(5,), other_dataset=True)
    table = pa.table({"history": [["i0"], ["i1", "i2"]], "target": ["i3", "i4"]})
    with pytest.raises(SemidError, match=r"of the 30 users that .* 2 of 2 are of none"):
        evaluate(ranker, table, ks=(5,))


def test_all_vectors_are_normalized_once(monkeypatch):
    dataset, normalized = drawn(), []
    ranker = VectorKNN.fit(dataset, np.random.default_rng(0).normal(size=(ITEMS, 3)))
    unit_vectors = item_knn.unit_vectors
    monkeypatch.setattr(item_knn, "unit_vectors", lambda x: (normalized.append(len(x)), unit_vectors(x))[1])
    found = [evaluate(ranker, dataset, ks=(5,), batch_size=size).ranked for size in (7, USERS)]
    np.testing.assert_array_equal(*found)
    assert normalized.count(ITEMS) == 1
    assert len(normalized) == 1 + 5 + 1  # and the histories of each batch


@pytest.mark.parametrize("k", [1, 3, 8, 9, 20])
def test_the_largest_are_those_of_a_stable_sort(k):
    scores = np.random.default_rng(0).integers(0, 4, (40, 9)).astype(np.float32)  # many ties
    scores[:3] = -np.inf
    scores[3:6, 2:] = -np.inf
    scores[6, ::2] = np.nan
    np.testing.assert_array_equal(largest(scores, k), np.argsort(-scores, axis=1, kind="stable")[:, :k])
