"""A history's own transitions taken out of a graph, against graphs that were fitted without it."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from semid.data import Histories
from semid.graphs import ItemGraph, ItemGraphConfig, LeaveOneOutGraph
from tests.semid.graphs.test_item_graph import CONFIG, ITEMS, LISTS, _unrepeated, _vectors


def _graph(lists, *, repeats: bool, config: ItemGraphConfig) -> ItemGraph:
    ids = pa.array([f"i{row}" for row in range(ITEMS)])
    histories = Histories.from_lists(lists)
    return ItemGraph.from_histories(histories, ids, config, vectors=_vectors(), repeats=repeats)


def test_blocks_of_empty_histories_have_no_positions(monkeypatch):
    monkeypatch.setattr("semid.graphs.leave_one_out._POSITIONS", 2)
    teacher = LeaveOneOutGraph(_graph(LISTS, repeats=True, config=CONFIG.resolved(["content"])))
    lists = [[], [], [0, 1, 2], [], [], [1], []]
    blocks = list(teacher.distributions(Histories.from_lists(lists)))
    expected = list(teacher.distributions(Histories.from_lists([items for items in lists if items])))
    assert [block for block, _ in blocks] == [block for block, _ in expected] == [slice(0, 3), slice(3, 4)]
    for (_, found), (_, same) in zip(blocks, expected, strict=True):
        np.testing.assert_array_equal(found.toarray(), same.toarray())
    assert list(teacher.distributions(Histories.from_lists([[], []]))) == []


@pytest.mark.parametrize(
    "lists",
    [_unrepeated(0), [[item for item in items if item != 8] for items in _unrepeated(0)], LISTS],
    ids=["nothing repeats", "a new item", "repeats"],
)
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_equals_the_graph_of_all_other_histories(lists, smoothing, monkeypatch):
    monkeypatch.setattr("semid.graphs.leave_one_out._POSITIONS", 9)
    repeats = lists is LISTS
    # Without their one history, items of LISTS would be new; what is new is what no history has.
    config = dataclasses.replace(CONFIG, smoothing=smoothing, new_items=0.0 if repeats else 1.0).resolved(["content"])
    whole = _graph(lists, repeats=repeats, config=config)
    found = np.zeros((sum(map(len, lists)), ITEMS))
    for block, distributions in LeaveOneOutGraph(whole).distributions(Histories.from_lists(lists)):
        found[block] = distributions.toarray()
    place, differs = 0, 0
    for user, items in enumerate(lists):
        others = _graph([*lists[:user], *lists[user + 1 :]], repeats=repeats, config=config)
        for end in range(1, len(items) + 1):
            query = Histories.from_lists([items[:end]])
            expected = others.distribution(query).toarray()[0]
            np.testing.assert_allclose(found[place], expected, atol=1e-5)
            differs += not np.allclose(expected, whole.distribution(query).toarray()[0], atol=1e-3)
            place += 1
    assert differs > place // 2  # what a history has counted matters
