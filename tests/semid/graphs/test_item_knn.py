"""Item-kNN against its definition, and as a ranker."""

import numpy as np
import pyarrow as pa

from semid.data import Dataset, Histories
from semid.evaluation import evaluate
from semid.graphs import ItemKNN

USERS, ITEMS = 30, 12


def drawn(repeats=False):
    rng = np.random.default_rng(0)
    rows = [rng.choice(ITEMS, 6, replace=repeats) for _ in range(USERS)]
    interactions = {
        "user_id": [f"u{user}" for user in range(USERS) for _ in range(6)],
        "item_id": [f"i{row}" for of_user in rows for row in of_user],
        "timestamp": list(range(6)) * USERS,
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
