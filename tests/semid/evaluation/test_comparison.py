"""Several models on one split, the baselines that go with a dataset, and users to look at."""

import types

import numpy as np
import pyarrow as pa
import pytest

from semid.data import Dataset, HeldOutItems, Histories
from semid.data.simulated import SimulatedConfig, simulate
from semid.errors import SemidError
from semid.evaluation import (
    GROUPS,
    Popularity,
    against_exact,
    baselines,
    compare,
    compare_lists,
    evaluate,
    example_users,
    largest_differences,
    user_table,
)
from semid.graphs import ItemGraph, ItemKNN
from seq_models import Conditions

ITEMS = 12


class Toy:
    """Ranks item rows by a fixed score of each after the last item; notes what it was asked."""

    tie_break = False

    def __init__(self, item_ids: pa.Array, codes: np.ndarray | None = None) -> None:
        self.item_ids, self.codes, self.asked = item_ids, codes, []

    def log_probs(self, histories: Histories, rows: np.ndarray) -> np.ndarray:
        last = np.array([histories[index][-1] for index in range(len(histories))])
        return -np.abs(rows[None, :] - last[:, None] - 0.25)

    def catalog_log_probs(self, histories: Histories) -> np.ndarray:
        return self.log_probs(histories, np.arange(len(self.item_ids)))

    def rank(self, histories: Histories, *, k: int, exclude_seen: bool, **options) -> np.ndarray:
        self.asked.append({"k": k, "exclude_seen": exclude_seen, **options})
        order = np.argsort(-self.catalog_log_probs(histories), axis=1)
        if exclude_seen:
            seen = [np.isin(row, histories[index]) for index, row in enumerate(order)]
            order = np.where(seen, -1, order)
            order = np.take_along_axis(order, np.argsort(order < 0, axis=1, kind="stable"), axis=1)
        return np.pad(order[:, :k].astype(np.int32), ((0, 0), (0, max(k - order.shape[1], 0))), constant_values=-1)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    rows = [(f"u{user}", f"i{item}", at) for user in range(9) for at, item in enumerate(rng.permutation(ITEMS)[:5])]
    users, items, positions = zip(*rows, strict=True)
    table = pa.table({"user_id": users, "item_id": items, "position": positions})
    return Dataset.build(pa.table({"item_id": [f"i{row}" for row in range(ITEMS)]}), table, name="toy")


def _codes() -> np.ndarray:
    return np.stack(np.unravel_index(np.arange(ITEMS), (3, 4)), axis=1).astype(np.int32)


def test_the_rows_are_those_of_evaluate_and_only_searchers_get_a_beam(dataset):
    searcher, plain = Toy(dataset.item_ids, _codes()), Toy(dataset.item_ids)
    measured = compare({"a": searcher, "b": plain}, dataset, split="validation", ks=(3,), beam_size=7)
    assert list(measured) == ["a", "b"]
    assert searcher.asked == [{"k": 3, "exclude_seen": False, "beam_size": 7}]
    assert plain.asked == [{"k": 3, "exclude_seen": False}]
    alone = evaluate(Toy(dataset.item_ids), dataset, split="validation", ks=(3,))
    assert measured["b"].values == alone.values
    same = evaluate(plain, dataset, split="validation", ks=(3,), beam_size=7)  # no search, and so no beam
    assert (same.values, same.provenance) == (alone.values, alone.provenance)
    assert plain.asked[-1] == {"k": 3, "exclude_seen": False}
    assert measured["a"].provenance["options"] == {"beam_size": 7}


def test_excluding_seen_items_reaches_every_ranker(dataset):
    toys = {"a": Toy(dataset.item_ids, _codes()), "b": Toy(dataset.item_ids)}
    measured = compare(toys, dataset, exclude_seen=True)
    assert all(asked["exclude_seen"] for toy in toys.values() for asked in toy.asked)
    assert all(metrics.provenance["exclude_seen"] for metrics in measured.values())


@pytest.mark.filterwarnings("ignore:.*removed from the catalogue")
def test_items_removed_from_the_catalogue_are_recommended_by_none(dataset):
    catalog = dataset.item_ids.filter(pa.array(~np.isin(np.arange(ITEMS), [0, 3])))
    toy = Toy(dataset.item_ids)
    toy.active = np.ones(ITEMS, bool)  # knows by itself
    measured = compare(baselines(dataset) | {"toy": toy}, dataset, ks=(ITEMS,), item_ids=catalog)
    for name in ("popularity", "bigram"):
        assert not np.isin(measured[name].ranked, [0, 3]).any()
        assert measured[name].provenance["catalogue_items"] == ITEMS - 2
    assert "allowed" not in toy.asked[0]


@pytest.mark.filterwarnings("ignore:.*removed from the catalogue")
def test_lists_alike_of_a_catalogue_with_removed_and_appended_items_have_the_same_figures(dataset):
    class Model(Popularity):
        """Popularity that knows by itself what was removed, and the items appended."""

        @property
        def active(self) -> np.ndarray:
            return np.arange(len(self.item_ids)) % 4 > 0

    train, ids = dataset.splits.train, dataset.item_ids
    model = Model.fit(train, pa.concat_arrays([ids, pa.array(["new 0", "new 1", "new 2"])]))
    rankers = {"model": model, "popularity": Popularity.fit(train, ids)}
    catalog = model.item_ids.filter(pa.array(model.active))
    ours, theirs = compare(rankers, dataset, ks=(3, 5), item_ids=catalog).values()
    np.testing.assert_array_equal(ours.ranked, theirs.ranked)
    assert ours.values == theirs.values
    assert ours.provenance == theirs.provenance
    for name, members in ours.groups.items():
        np.testing.assert_array_equal(members, theirs.groups[name])
    control = compare(rankers, dataset, ks=(3, 5))["popularity"]
    assert control.values["coverage@5"] != ours.values["coverage@5"] == 5 / 11
    novelty = [
        row["novelty"] for row in compare_lists({"model": ours, "popularity": theirs}, rankers, dataset, k=5)["rows"]
    ]
    assert novelty[0] == novelty[1]
    with pytest.raises(SemidError, match="expected samples of the bootstrap of at least 1, got 0"):
        compare_lists({"model": ours, "popularity": theirs}, rankers, dataset, k=5, samples=0)


def test_models_measured_on_other_examples_are_not_put_side_by_side(dataset):
    """As many examples of the other split, and another dataset, would be taken for those of the same users."""
    rankers = baselines(dataset)
    wrong = {"bigram": compare(rankers, dataset, ks=(3,))["bigram"]}
    wrong |= {"popularity": compare(rankers, dataset, split="validation", ks=(3,))["popularity"]}
    says = r"popularity was measured on 9 examples of toy/validation, not on the 9 examples of toy/test; measure all"
    for call in (user_table, lambda *given: compare_lists(given[0], rankers, given[1], k=3)):
        with pytest.raises(SemidError, match=says):
            call(wrong, dataset)
        with pytest.raises(
            SemidError, match=r"bigram was measured on 9 examples of toy/test, not on the .* other/test"
        ):
            call(wrong, dataset.replace(name="other"))


def test_baselines_learn_from_training_alone(dataset):
    found = baselines(dataset)
    assert list(found) == ["popularity", "bigram"]  # no oracle: nobody knows this world
    expected = Popularity.fit(dataset.splits.train, dataset.item_ids)
    np.testing.assert_array_equal(found["popularity"].order, expected.order)
    everything = np.bincount(dataset.item, minlength=ITEMS)
    assert not np.array_equal(np.argsort(-everything, kind="stable"), expected.order)  # control: it would differ


@pytest.mark.parametrize("repeats", [False, True])
def test_baselines_leave_the_history_out_where_nothing_repeats(dataset, repeats):
    if repeats:
        dataset = dataset.replace(item=dataset.item.reshape(9, 5)[:, [0, 1, 0, 3, 1]].ravel())
    assert dataset.repeats.common == repeats
    found = baselines(dataset)
    measured = compare(found | {"kNN": ItemKNN.fit(dataset), "graph": ItemGraph.fit(dataset)}, dataset)
    assert [one.provenance["leaves_out_history"] for one in measured.values()] == [not repeats] * 4
    for name, ranker in found.items():
        asked = evaluate(ranker, dataset, exclude_seen=True)
        assert (measured[name].values == asked.values) == (not repeats)
        assert np.array_equal(measured[name].ranked, asked.ranked) == (not repeats)


def test_a_simulated_dataset_brings_its_oracle(tmp_path):
    config = SimulatedConfig(
        num_items=60, num_users=80, taxonomy=(2, 2, 2), max_length=12, mean_length=7, images=False, seed=2
    )
    world = simulate(config)
    world.dataset.save(tmp_path / "dataset")
    loaded = Dataset.load(tmp_path / "dataset")
    found = baselines(loaded)
    assert list(found) == ["popularity", "bigram", "oracle"]
    examples = loaded.splits.test
    ranks = [oracle.rank(examples.histories, k=5, exclude_seen=False) for oracle in (world.oracle, found["oracle"])]
    np.testing.assert_array_equal(*ranks)
    measured = compare(found, loaded, ks=(10,))
    assert all(one.provenance["leaves_out_history"] for one in measured.values())
    best = measured["oracle"].values["recall@10"]
    assert best > max(measured[name].values["recall@10"] for name in ("popularity", "bigram"))


def test_the_oracle_is_the_same_without_pictures():
    small = SimulatedConfig(num_items=60, num_users=20, taxonomy=(2, 2, 2), max_length=12, mean_length=7, seed=2)
    drawn = simulate(small)
    assert "image" in drawn.dataset.items.column_names  # control: the world does have pictures
    histories = drawn.dataset.splits.test.histories
    p, q = (oracle.probabilities(histories) for oracle in (drawn.oracle, baselines(drawn.dataset)["oracle"]))
    np.testing.assert_array_equal(p, q)


def test_no_oracle_where_items_are_held_out():
    config = SimulatedConfig(num_items=60, num_users=20, taxonomy=(2, 2, 2), max_length=12, mean_length=7, images=False)
    dataset = simulate(config).dataset
    assert list(baselines(dataset.replace(split_rule=HeldOutItems(0.2)))) == ["popularity", "bigram"]
    assert "oracle" in baselines(dataset)


def test_no_oracle_of_another_world_than_the_dataset():
    config = SimulatedConfig(num_items=60, num_users=20, taxonomy=(2, 2, 2), max_length=12, mean_length=7, images=False)
    dataset = simulate(config).dataset
    older = dataset.replace(item=dataset.item[::-1].copy())
    with pytest.warns(UserWarning, match="not what the simulator makes of its config today, so it has no oracle"):
        assert "oracle" not in baselines(older)
    assert "oracle" in baselines(dataset)


def test_a_simulated_source_with_an_unknown_key_is_named(dataset):
    odd = dataset.replace(source={"type": "simulated", "config": {"num_item": 3}})
    with pytest.raises(SemidError, match=r"'toy': source.config: unknown key 'num_item'; did you mean 'num_items'"):
        baselines(odd)


def test_every_users_accuracies_stand_in_a_table_whose_means_are_the_metrics(dataset):
    measured = compare(
        {"a": Toy(dataset.item_ids), "b": Popularity.fit(dataset.splits.train, dataset.item_ids)}, dataset
    )
    table, examples = user_table(measured, dataset), dataset.splits.test
    assert table["user"].to_pylist() == dataset.users.to_pylist()
    assert table["target"].to_pylist() == [f"i{row}" for row in examples.targets.tolist()]
    for name in ("a", "b"):
        for metric in ("recall@5", "recall@10", "ndcg@5", "ndcg@10"):
            mean = np.mean(table[f"{metric}:{name}"].to_numpy())
            np.testing.assert_allclose(mean, measured[name].values[metric], atol=1e-6)
    for group, names in GROUPS.items():
        for name in names:
            inside = np.array([found == name for found in table[group].to_pylist()])
            expected = measured["a"].values.get(f"ndcg@10/{group}_{name}", 0.0)
            found = table["ndcg@10:a"].to_numpy()[inside]
            np.testing.assert_allclose(found.mean() if len(found) else 0.0, expected, atol=1e-6)


def test_users_of_the_largest_gains_and_losses():
    ours, theirs = np.array([0.0, 1.0, 0.5, 0.2, 0.0]), np.array([0.0, 0.0, 0.0, 0.3, 1.0])
    gains, losses = largest_differences(ours, theirs, count=3)
    assert gains.tolist() == [1, 2]  # the third is no gain
    assert losses.tolist() == [4, 3]
    drawn = {tuple(largest_differences(np.ones(9), np.zeros(9), count=2, seed=seed)[0]) for seed in range(5)}
    assert len(drawn) > 1


def test_chosen_users_follow_those_drawn_with_the_graphs_share_where_there_is_one(dataset):
    class Explained(Toy):
        graph = object()

        def explain_rows(self, histories: Histories, rows: np.ndarray) -> list:
            return [types.SimpleNamespace(graph_share=len(histories[0]) + row / 100) for row in rows.tolist()]

    users = example_users(Explained(dataset.item_ids), dataset, count=2, k=2, also=[7, 3])
    assert [user["user"] for user in users[2:]] == ["u7", "u3"]
    for user in users:
        for entry in user["recommendations"]:
            assert entry["graph_share"] == 4 + int(entry["item_id"][1:]) / 100
    assert "graph_share" not in example_users(Toy(dataset.item_ids), dataset, count=1)[0]["recommendations"][0]


def test_example_users_say_what_the_ranker_says(dataset):
    toy = Toy(dataset.item_ids, _codes())
    users = example_users(toy, dataset, count=4, k=3)
    examples = dataset.splits.test
    assert len(users) == 4
    for user in users:
        index = dataset.users.to_pylist()[:].index(user["user"])
        history, target = examples.histories[index].tolist(), int(examples.targets[index])
        assert user["history"] == [f"i{row}" for row in history]
        assert user["target"] == f"i{target}"
        ranked = toy.rank(examples.histories.take(slice(index, index + 1)), k=3, exclude_seen=False)[0]
        scores = toy.log_probs(examples.histories.take(slice(index, index + 1)), ranked)[0]
        expected = [
            {"item_id": f"i{row}", "score": score, "codes": _codes()[row].tolist()}
            for row, score in zip(ranked.tolist(), scores.tolist(), strict=True)
        ]
        assert user["recommendations"] == expected


def test_example_users_are_ranked_as_the_command_asks(dataset):
    searcher, plain = Toy(dataset.item_ids, _codes()), Toy(dataset.item_ids)
    users = [example_users(toy, dataset, count=3, beam_size=7, exclude_seen=True) for toy in (searcher, plain)]
    assert searcher.asked == [{"k": 10, "exclude_seen": True, "beam_size": 7}]
    assert plain.asked == [{"k": 10, "exclude_seen": True}]
    for user in [*users[0], *users[1]]:
        assert not {entry["item_id"] for entry in user["recommendations"]} & set(user["history"])


def test_example_users_are_drawn_by_seed_and_fewer_where_there_are_fewer(dataset):
    toy = Toy(dataset.item_ids)
    names = [[user["user"] for user in example_users(toy, dataset, count=4, seed=seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    everybody = example_users(toy, dataset, count=100, k=ITEMS + 5)
    assert len(everybody) == 9
    assert all(len(user["recommendations"]) == ITEMS for user in everybody)
    assert everybody[0]["recommendations"][0]["codes"] == []  # no codes: none are invented


def test_example_users_of_a_ranker_with_its_items_in_another_order(dataset):
    """The ids must be those of the dataset, not what stands in the same row of the other table."""
    order = np.random.default_rng(3).permutation(ITEMS)
    other = Popularity(dataset.item_ids.take(pa.array(order)), np.arange(ITEMS, dtype=np.int32))

    class Scored(Popularity):
        def log_probs(self, histories, rows):
            return np.zeros((len(histories), len(rows)))

    users = example_users(Scored(other.item_ids, other.order), dataset, count=9, k=2)
    straight = example_users(Toy(dataset.item_ids), dataset, count=9)
    for user, expected in zip(users, straight, strict=True):
        assert (user["user"], user["history"], user["target"]) == (
            expected["user"],
            expected["history"],
            expected["target"],
        )
        assert [entry["item_id"] for entry in user["recommendations"]] == other.item_ids.to_pylist()[:2]


class Narrow(Toy):
    """A search that never leaves the first 4 rows."""

    def rank(self, histories: Histories, *, k: int, exclude_seen: bool, **options) -> np.ndarray:
        return np.tile(np.arange(4, dtype=np.int32), (len(histories), 1))


def test_what_the_beam_loses(dataset):
    wide = against_exact(Toy(dataset.item_ids), dataset, k=4, beam_size=7)
    assert wide == {"users": 9, "beam_size": 7, "exact_top_4_found": 1.0}
    histories = dataset.splits.test.histories
    nearest = [np.argsort(np.abs(np.arange(ITEMS) - histories[i][-1] - 0.25))[:4] for i in range(len(histories))]
    expected = np.mean([np.mean(rows < 4) for rows in nearest])
    assert 0 < expected < 1
    assert against_exact(Narrow(dataset.item_ids), dataset, k=4, beam_size=7)["exact_top_4_found"] == expected


class Even(Toy):
    """One item is the best, two are equal, no other can be; it lists the first and one of the two."""

    def catalog_log_probs(self, histories: Histories) -> np.ndarray:
        return np.tile([-1, -2, -2] + [-np.inf] * (ITEMS - 3), (len(histories), 1))

    def rank(self, histories: Histories, *, k: int, exclude_seen: bool, **options) -> np.ndarray:
        return np.tile(np.array([0, 2, -1, -1], np.int32)[:k], (len(histories), 1))


@pytest.mark.parametrize(("k", "share"), [(2, 1), (4, 2 / 3)])
def test_equal_items_are_as_good_and_impossible_ones_are_not_missed(dataset, k, share):
    assert against_exact(Even(dataset.item_ids), dataset, k=k)[f"exact_top_{k}_found"] == share


class Told(Toy):
    """Ranks by distance to what it is asked for: the targets, or one row for all; anything last, where it is not."""

    conditions, graph = object(), object()

    def own_conditions(self, rows: np.ndarray, events: None, parts: tuple[str, ...]) -> np.ndarray:
        assert parts == ("group",)
        return rows

    def log_probs(self, histories: Histories, rows: np.ndarray, condition=None) -> np.ndarray:
        wanted = {"group": "5"} if condition is None else condition
        wanted = np.full(len(histories), int(wanted["group"])) if isinstance(wanted, dict) else wanted
        if isinstance(wanted, Conditions):
            wanted = wanted.group
        elif isinstance(wanted, list):
            wanted = np.array([int(one["group"]) for one in wanted])
        return -np.abs(rows[None, :] - wanted[:, None] - 0.25)

    def catalog_log_probs(self, histories: Histories, condition=None) -> np.ndarray:
        return self.log_probs(histories, np.arange(ITEMS), condition)

    def rank(
        self, histories: Histories, *, k: int, exclude_seen: bool, beam_size: int = 1, condition=None
    ) -> np.ndarray:
        return np.argsort(-self.catalog_log_probs(histories, condition), axis=1)[:, :k].astype(np.int32)

    def explain_rows(self, histories: Histories, rows: np.ndarray, condition=None) -> list:
        return [types.SimpleNamespace(graph_share=s) for s in self.log_probs(histories, rows, condition)[0].tolist()]


@pytest.mark.parametrize("asked", [{"own": ("group",)}, {"condition": {"group": "9"}}], ids=str)
def test_beams_and_examples_are_those_of_what_is_asked(dataset, monkeypatch, asked):
    monkeypatch.setattr("semid.evaluation.comparison._USERS", 4)
    ranker = Told(dataset.item_ids, _codes())
    assert against_exact(ranker, dataset, k=1, **asked)["exact_top_1_found"] == 1
    for user in example_users(ranker, dataset, count=9, k=1, also=[3, 0], **asked):
        (first,) = user["recommendations"]
        assert first["item_id"] == (user["target"] if "own" in asked else "i9")
        assert (first["score"], first["graph_share"]) == (-0.25, -0.25)


def test_conditions_of_each_example_go_with_its_batch(dataset):
    ranker, targets = Told(dataset.item_ids), dataset.splits.test.targets
    each = [{"group": str(row)} for row in targets.tolist()]
    for condition in (each, Conditions(group=targets)):
        found = evaluate(ranker, dataset, ks=(1,), beam_size=1, batch_size=4, condition=condition)
        assert found.values["recall@1"] == 1
    for condition in (each[:4], Conditions(group=targets[:4])):
        with pytest.raises(SemidError, match="expected one condition, or one for each of 9 examples, got 4"):
            evaluate(ranker, dataset, ks=(1,), beam_size=1, batch_size=4, condition=condition)


@pytest.mark.parametrize("measure", [evaluate, against_exact])
def test_targets_are_asked_for_in_one_way(dataset, measure):
    with pytest.raises(SemidError, match="`own` is each target's own condition, and `condition` another one"):
        measure(Told(dataset.item_ids), dataset, beam_size=1, own=("group",), condition={"group": "9"})


def test_all_that_takes_time_says_how_far_it_is(dataset, caplog, monkeypatch):
    monkeypatch.setattr("semid.evaluation.comparison._USERS", 4)
    caplog.set_level("INFO", "semid")
    toy = Toy(dataset.item_ids)
    assert against_exact(toy, dataset, k=4, beam_size=7) == {"users": 9, "beam_size": 7, "exact_top_4_found": 1.0}
    example_users(toy, dataset, count=4)
    said = [message.split(",")[0] for message in caplog.messages]
    assert said == [
        "comparing the beam with exact scores: compiling ...",
        "comparing the beam with exact scores: 4/9 users",
        "comparing the beam with exact scores: 9/9 users",
        "listing example users: compiling ...",
        "listing example users: 1/4 users",
        "listing example users: 4/4 users",
    ]
