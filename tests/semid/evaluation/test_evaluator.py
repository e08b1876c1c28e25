"""The evaluator: chunks, item rows of another order, collisions, rankers that break the rules, what is written."""

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
import shapes

from semid.artifacts import Manifest, Origin
from semid.catalog import SemanticCatalog
from semid.data import Dataset, HeldOutItems, Histories, ShuffledTies, SourceOrder
from semid.errors import SemidError
from semid.evaluation import Bigram, Popularity, compare, evaluate, write_metrics
from semid.graphs import ItemGraph

ITEMS, USERS = 15, 40
IN_HISTORY_ONLY, COLD_TARGET, UNUSED = 12, 13, 14


@dataclass
class Fixed:
    """A ranker that gives every history the same list."""

    item_ids: pa.Array
    ranking: list[int]
    codes: np.ndarray | None = None
    tie_break: bool = False

    def rank(self, histories: Histories, *, k: int, exclude_seen: bool) -> np.ndarray:
        padded = (self.ranking + [-1] * k)[:k]
        return np.tile(np.array(padded, np.int32), (len(histories), 1))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(USERS - 1), rng.integers(3, 9, size=USERS - 1))
    items = np.minimum(rng.geometric(0.25, size=len(users)) - 1, ITEMS - 4)
    users = np.append(users, [USERS - 1] * 3)
    items = np.append(items, [IN_HISTORY_ONLY, 0, COLD_TARGET])
    interactions = pa.table(
        {
            "user_id": [f"u{u}" for u in users],
            "item_id": [f"i{i}" for i in items],
            "position": np.arange(len(users)),
        }
    )
    catalogue = pa.table({"item_id": [f"i{i}" for i in range(ITEMS)], "title": ["a title"] * ITEMS})
    return Dataset.build(catalogue, interactions, name="tiny")


@pytest.fixture(scope="module")
def bigram(dataset) -> Bigram:
    return Bigram.fit(dataset.splits.train, dataset.item_ids)


def test_values_of_a_fixed_list_counted_by_hand(dataset):
    targets = dataset.splits.test.targets
    result = evaluate(Fixed(dataset.item_ids, [0, 1, 2]), dataset, ks=(1, 2, 5))
    first, second, third = ((targets == row).mean() for row in range(3))
    assert result.values["recall@1"] == pytest.approx(first)
    assert result.values["recall@2"] == pytest.approx(first + second)
    assert result.values["ndcg@5"] == pytest.approx(first + second / np.log2(3) + third / 2)
    assert result.values["mrr"] == pytest.approx(first + second / 2 + third / 3)
    assert result.values["valid"] == pytest.approx(3 / 5)
    assert result.values["coverage@5"] == pytest.approx(3 / ITEMS)
    assert result.per_example["recall@2"].tolist() == np.isin(targets, [0, 1]).tolist()
    assert "code_recall@1" not in result.values


def test_metrics_are_one_line_in_a_notebook(dataset, bigram):
    result = evaluate(bigram, dataset, ks=(5,))
    values = ", ".join(f"{name} {result.values[name]:.4f}" for name in ("recall@5", "ndcg@5", "mrr"))
    assert repr(result) == f"Metrics({values}; {USERS} examples of tiny/test)"


def test_segments_divide_the_examples(dataset, bigram):
    result = evaluate(bigram, dataset)
    counts = result.provenance["segment_examples"]
    for kind in ("activity", "popularity"):
        sizes = {name: count for name, count in counts.items() if name.startswith(kind) and count}
        assert sum(sizes.values()) == USERS
        mean = sum(result.values[f"ndcg@10/{name}"] * count for name, count in sizes.items()) / USERS
        assert mean == pytest.approx(result.values["ndcg@10"])
    train = np.bincount(dataset.splits.train.flat()[0], minlength=ITEMS)
    assert counts["popularity_cold"] == (train[dataset.splits.test.targets] == 0).sum() > 0
    low, _ = result.provenance["tercile_bounds"]["activity"]
    assert counts["activity_low"] == (dataset.splits.test.histories.lengths <= low).sum()


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_any_batch_size_gives_the_same(dataset, bigram, exclude_seen):
    whole = evaluate(bigram, dataset, exclude_seen=exclude_seen)
    done = []
    parts = evaluate(
        bigram, dataset, exclude_seen=exclude_seen, batch_size=7, progress=lambda now, total: done.append((now, total))
    )
    assert parts.values == pytest.approx(whole.values, abs=1e-12)
    np.testing.assert_array_equal(parts.per_example["ndcg@10"], whole.per_example["ndcg@10"])
    assert done == [(now, USERS) for now in (0, 7, 14, 21, 28, 35, 40)]
    assert parts.provenance == whole.provenance
    test = dataset.splits.test
    repeated = sum(target in test.histories[row] for row, target in enumerate(test.targets))
    assert whole.provenance["targets_out_of_reach"] == (repeated if exclude_seen else 0)
    assert repeated > 0


def test_a_ranker_with_rows_in_another_order_is_measured_alike(dataset, bigram):
    order = np.random.default_rng(1).permutation(ITEMS)  # own row r is the dataset's row order[r]

    @dataclass
    class Reordered:
        item_ids: pa.Array
        codes: None = None
        tie_break: bool = False

        def rank(self, histories, *, k, exclude_seen):
            rows = Histories(histories.users, order[histories.items], histories.starts, histories.ends)
            ranked = bigram.rank(rows, k=k, exclude_seen=exclude_seen)
            return np.where(ranked >= 0, np.argsort(order)[ranked], -1)

    ranker = Reordered(dataset.item_ids.take(pa.array(order)))
    for split, exclude_seen in itertools.product(("validation", "test"), (False, True)):
        expected = evaluate(bigram, dataset, split=split, exclude_seen=exclude_seen)
        assert evaluate(ranker, dataset, split=split, exclude_seen=exclude_seen).values == pytest.approx(
            expected.values
        )


@pytest.mark.parametrize("item", [IN_HISTORY_ONLY, COLD_TARGET])
def test_an_item_that_the_ranker_does_not_know_is_named_if_the_split_needs_it(dataset, item):
    def without(row):
        return Fixed(dataset.item_ids.filter(pa.array(np.arange(ITEMS) != row)), [0])

    with pytest.raises(SemidError, match=rf"1 items of the test split .* not in the model's catalogue \(i{item}\)"):
        evaluate(without(item), dataset)
    assert evaluate(without(UNUSED), dataset).provenance["catalogue_items"] == ITEMS - 1


def test_colliding_items_share_credit_at_item_level_and_count_in_full_at_code_level(dataset):
    codes = np.arange(ITEMS)[:, None] // 3  # three items on each code
    result = evaluate(Fixed(dataset.item_ids, [0, 1, 2], codes), dataset, ks=(1, 2, 3))
    in_group = (dataset.splits.test.targets < 3).mean()
    assert result.values["recall@1"] == pytest.approx(in_group / 3)
    assert result.values["recall@2"] == pytest.approx(in_group * 2 / 3)
    assert result.values["recall@3"] == pytest.approx(in_group)
    assert result.values["code_recall@1"] == result.values["code_ndcg@1"] == pytest.approx(in_group)


def test_seen_items_are_no_competitors_within_a_group(dataset):
    @dataclass
    class Unseen(Fixed):
        def rank(self, histories, *, k, exclude_seen):
            return Popularity(self.item_ids, np.arange(ITEMS)).rank(histories, k=k, exclude_seen=exclude_seen)

    codes = np.zeros((ITEMS, 1), np.int32)  # one group of everything: the target is at any rank with equal probability
    result = evaluate(Unseen(dataset.item_ids, [], codes), dataset, ks=(1,), exclude_seen=True)
    for i, target in enumerate(dataset.splits.test.targets):
        seen = set(dataset.splits.test.histories[i].tolist())
        expected = 0 if target in seen else 1 / (ITEMS - len(seen))
        assert result.per_example["recall@1"][i] == pytest.approx(expected)


def test_a_tie_break_level_tells_items_apart_at_item_level_only(dataset):
    codes = np.stack([np.arange(ITEMS) // 3, np.arange(ITEMS) % 3], axis=1)
    targets = dataset.splits.test.targets
    with_tie_break = evaluate(Fixed(dataset.item_ids, [0, 1, 2], codes, tie_break=True), dataset, ks=(1,))
    without = evaluate(Fixed(dataset.item_ids, [0, 1, 2], codes), dataset, ks=(1,))
    assert with_tie_break.values["recall@1"] == without.values["recall@1"] == pytest.approx((targets == 0).mean())
    assert with_tie_break.values["code_recall@1"] == pytest.approx((targets < 3).mean())
    assert without.values["code_recall@1"] == pytest.approx((targets == 0).mean())


def test_a_ranker_that_leaves_the_history_out_is_measured_as_one_that_was_asked_to(dataset):
    class Cheat(Fixed):
        repeats = False

    train, ids = dataset.splits.train, dataset.item_ids
    asked = evaluate(Popularity.fit(train, ids), dataset, exclude_seen=True)
    found = evaluate(Popularity.fit(train, ids, repeats=False), dataset)
    assert found.values == asked.values
    about = ("leaves_out_history", "exclude_seen", "repeat_share")
    assert [found.provenance[name] for name in about] == [True, False, dataset.repeats.share]
    assert [asked.provenance[name] for name in about] == [False, True, dataset.repeats.share]
    assert found.provenance["targets_out_of_reach"] == asked.provenance["targets_out_of_reach"] > 0
    with pytest.raises(SemidError, match="of the history, which is left out"):
        evaluate(Cheat(ids, list(range(10))), dataset)


def test_a_ranker_that_lists_seen_items_is_caught(dataset):
    popularity = Popularity.fit(dataset.splits.train, dataset.item_ids)
    cheat = Fixed(dataset.item_ids, popularity.order.tolist())
    with pytest.raises(SemidError, match="of the history, which is left out"):
        evaluate(cheat, dataset, exclude_seen=True)
    allowed = evaluate(cheat, dataset, exclude_seen=False)
    assert allowed.values["recall@10"] == evaluate(popularity, dataset).values["recall@10"]
    excluded = evaluate(popularity, dataset, exclude_seen=True)
    assert excluded.provenance["exclude_seen"] is True
    repeats = [t in dataset.splits.test.histories[i] for i, t in enumerate(dataset.splits.test.targets)]
    assert any(repeats)
    assert excluded.per_example["recall@10"][repeats].max() == 0


def test_fewer_candidates_than_k_are_no_invalid_entries(dataset):
    popularity = Popularity.fit(dataset.splits.train, dataset.item_ids)
    for exclude_seen in (False, True):
        result = evaluate(popularity, dataset, ks=(ITEMS + 5,), exclude_seen=exclude_seen)
        assert result.values["valid"] == 1
    assert evaluate(Fixed(dataset.item_ids, [0, 1]), dataset, ks=(4,)).values["valid"] == 0.5


@pytest.mark.parametrize(
    ("ranking", "message"),
    [([0, 3, 0], "twice in one list: 40 entries .* 'i0'"), ([0, ITEMS], "expected -1 to 14"), ([-2], "rows -2 to")],
)
def test_impossible_lists_are_refused(dataset, ranking, message):
    with pytest.raises(SemidError, match=message):
        evaluate(Fixed(dataset.item_ids, ranking), dataset)
    assert evaluate(Fixed(dataset.item_ids, [0, 3]), dataset).values["recall@10"] > 0


def test_lists_of_another_shape_or_type_are_refused(dataset):
    class Short(Fixed):
        def rank(self, histories, *, k, exclude_seen):
            return super().rank(histories, k=k - 1, exclude_seen=exclude_seen)

    with pytest.raises(SemidError, match=r"expected integers \[40, 10\] from Short.rank, got int32 \(40, 9\)"):
        evaluate(Short(dataset.item_ids, [0]), dataset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": ()}, "got ks"),
        ({"ks": (0,)}, "got ks"),
        ({"ks": 10}, r"ks as a list of whole numbers, such as \(5, 10\), got 10"),
        ({"ks": (5.0,)}, r"whole numbers, .* got \(5.0,\)"),
        ({"ks": (True,)}, r"whole numbers, .* got \(True,\)"),
        ({"batch_size": 2.5}, "batch_size of at least 1, got .* 2.5"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"split": "train"}, "train"),
    ],
)
def test_wrong_arguments_are_refused(dataset, bigram, changes, message):
    with pytest.raises(SemidError, match=message):
        evaluate(bigram, dataset, **changes)


def test_a_ranker_of_another_dataset_is_measured_only_where_asked(dataset, tmp_path):
    """The same interactions, cut in another way: what is test here was trained on there."""
    graph, other = ItemGraph.fit(dataset), dataset.replace(split_rule=HeldOutItems(0.5))
    message = rf"trained on dataset digest {dataset.digest[:16]}, not on .*{other.digest[:16]}.*other_dataset=True"
    made = Origin(tmp_path / "made", Manifest("graph", {}, {}, {"dataset": dataset.digest}))
    mixed = Fixed(dataset.item_ids, [0])
    mixed.graph = graph
    rankers = {"ItemGraph": graph, str(tmp_path / "made"): graph.with_origin(made), "Fixed": mixed}
    for name, ranker in rankers.items():
        assert "trained_on_other_dataset" not in evaluate(ranker, dataset).provenance
        with pytest.raises(SemidError, match=f"^{name}: {message}"):
            evaluate(ranker, other)
        with pytest.raises(SemidError, match=message):
            compare({"a": ranker}, other)
        asked = compare({"a": ranker}, other, other_dataset=True)["a"].provenance
        assert asked["trained_on_other_dataset"] == {name: dataset.digest}
    written = dataset.replace()
    saved = written.save(tmp_path / "dataset")
    for same in (saved, saved.with_vectors("v", np.eye(ITEMS))):  # saved since, with a column more
        evaluate(graph, same)
    for same in (written, saved.with_vectors("v", np.eye(ITEMS))):  # what was saved, before and after
        evaluate(ItemGraph.fit(saved), same)
    with pytest.raises(SemidError, match="trained on dataset digest unknown"):
        evaluate(graph.with_origin(Origin(tmp_path, Manifest("graph", {}, {}))), dataset)
    evaluate(dataclasses.replace(graph, dataset=""), other)  # one that does not know


def test_what_is_no_ranker_is_refused(dataset):
    with pytest.raises(SemidError, match=r"expected a ranker .* got object"):
        evaluate(object(), dataset)


@pytest.mark.parametrize(
    ("option", "got"),
    [
        ({"catalog": "runs/catalog"}, "catalog="),
        ({"catalog": pa.array(["i1"])}, "catalog="),
        ({"item_ids": "runs/catalog"}, "a str"),
        ({"item_ids": SemanticCatalog(pa.array(["i1"]), np.zeros((1, 1), np.int32), (1,))}, "a SemanticCatalog"),
    ],
)
def test_a_catalogue_is_given_to_the_model_not_to_its_measurement(dataset, bigram, option, got):
    message = rf"expected item_ids as a pyarrow array, got {got}; .*Recommender.from_pretrained\(model, catalog=...\)"
    with pytest.raises(SemidError, match=message):
        evaluate(bigram, dataset, **option)


@pytest.mark.parametrize(
    ("item_ids", "message"),
    [
        (["i0", "i1", "i0"], r"item_ids name 1 of 3 items again; give item_ids.unique\(\)"),
        ([1, 2, 3], "Bigram recommends none of the 3 item_ids; give some of its items, or leave item_ids out"),
        ([], "none of the 0 item_ids"),
        (["x", "y"], "none of the 2 item_ids"),
        ([0.5], r"item ids: entry 0 is 0.5 of type float"),
    ],
)
def test_item_ids_that_would_count_for_nothing_or_twice_are_refused(dataset, bigram, item_ids, message):
    with pytest.raises(SemidError, match=message):
        evaluate(bigram, dataset, item_ids=pa.array(item_ids))


@pytest.mark.filterwarnings("ignore:.*not allowed")
def test_item_ids_of_any_type_of_text_are_the_same(dataset, bigram):
    some = pa.concat_arrays([dataset.item_ids[:8], pa.array(["unknown"])])
    expected = evaluate(bigram, dataset, item_ids=some)
    measured = evaluate(bigram, dataset, item_ids=some.cast(pa.large_string()))
    assert (measured.values, measured.provenance) == (expected.values, expected.provenance)
    assert expected.provenance["catalogue_items"] == 9


def test_options_go_to_the_ranker_and_into_the_provenance(dataset, bigram):
    @dataclass
    class Searching(Fixed):
        beam_sizes: tuple = ()

        def rank(self, histories, *, k, exclude_seen, beam_size):
            self.beam_sizes += (beam_size,)
            return super().rank(histories, k=k, exclude_seen=exclude_seen)

    ranker = Searching(dataset.item_ids, [0], codes=np.arange(ITEMS)[:, None])
    assert evaluate(ranker, dataset, beam_size=50).provenance["options"] == {"beam_size": 50}
    assert ranker.beam_sizes == (50,)
    assert evaluate(bigram, dataset, beam_size=50).provenance["options"] == {}  # it has no codes to search
    with pytest.raises(TypeError, match="temperature"):
        evaluate(bigram, dataset, temperature=2)


def test_the_tie_rule_stands_beside_the_values():
    interactions = pa.table({"user_id": ["u"] * 3, "item_id": ["a", "b", "c"], "timestamp": [0, 0, 0]})

    def tie_rule(ties):
        dataset = Dataset.build(pa.table({"item_id": ["a", "b", "c"]}), interactions, name="t", ties=ties)
        return evaluate(Fixed(dataset.item_ids, [0]), dataset).provenance["tie_rule"].split(";")[0]

    assert tie_rule(SourceOrder()) == "interactions of equal time in source order"
    assert tie_rule(ShuffledTies(7)) == "interactions of equal time shuffled by seed 7"


def test_metrics_file(dataset, bigram, tmp_path):
    result = evaluate(bigram, dataset)
    row = result.row("bigram")
    write_metrics(tmp_path / "metrics.json", "test", [row, {"model": "other", "recall@10": 0.5}], result.provenance)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["split"] == "test"
    assert written["rows"] == [{"model": "bigram", **result.values}, {"model": "other", "recall@10": 0.5}]
    assert written["provenance"]["split_rule"] == {"type": "LeaveOneOut"}
    examples = [{"user": "u1"}]
    write_metrics(tmp_path / "metrics.json", "test", [row], {}, examples=examples)
    with shapes.unchecked():
        of_numpy = evaluate(bigram, dataset, ks=(np.int64(5), np.int64(10)), exclude_seen=np.False_)
    assert of_numpy.provenance == result.provenance
    write_metrics(tmp_path / "new/folder/metrics.json", "test", [row], of_numpy.provenance, examples=examples)
    assert json.loads((tmp_path / "examples.json").read_text()) == examples
    digest = hashlib.sha256((tmp_path / "examples.json").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "metrics.json").read_text())["files"] == {"examples.json": digest}
    assert (written["provenance"]["users"], written["provenance"]["exclude_seen"]) == (USERS, False)
