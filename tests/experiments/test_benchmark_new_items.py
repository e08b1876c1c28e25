"""New items in the benchmark of them: histories without them, and places among them alone."""

import numpy as np

from experiments.benchmarks.new_items import main, ndcg, without
from semid.data import Histories
from semid.data.simulated import SimulatedConfig, simulate


class _Fixed:
    def rank(self, histories, *, k):
        return np.tile(np.array([3, 0, 2, 1, -1])[:k], (len(histories), 1))


def test_places_are_counted_among_the_items_that_may_be_listed():
    new = np.array([False, True, True, False])
    histories = without(Histories.from_lists([[0, 1, 3], [2, 1], [3]]), new)
    assert [histories[user].tolist() for user in range(3)] == [[0, 3], [], [3]]
    targets = np.array([3, 1, 2])
    np.testing.assert_allclose(ndcg(_Fixed(), histories, targets, among=np.ones(4, bool)), [1, 1 / np.log2(5), 0.5])
    np.testing.assert_allclose(ndcg(_Fixed(), histories, targets, among=new), [0, 1 / np.log2(3), 1])


def test_the_weight_moves_hits_from_the_others_to_new_items(tmp_path, capsys):
    simulate(SimulatedConfig(num_items=80, num_users=150)).dataset.save(tmp_path / "data")
    main(tmp_path / "data", tmp_path / "out.json", weights=(0, 8), fraction=0.2, users=100)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    few, many = ([float(figure) for figure in row[-4:]] for row in rows[1:])
    assert few[1] < many[1]
    assert few[2] > many[2]
