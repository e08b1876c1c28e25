"""A user's own table: one answer whatever it comes as, masks against brute force, and each fault by row and column."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semid.data import Dataset, Histories
from semid.errors import SemidError
from semid.evaluation import Popularity, evaluate, metrics

IDS = [f"i{row}" for row in range(8)]
HISTORIES = [["i1", "i2"], [], ["i3"], ["i2", "i2", "i5"]]
TARGETS = ["i0", "i4", "i3", "i7"]
TABLE = pa.table({"history": HISTORIES, "target": TARGETS})
ORDER = [3, 0, 4, 7, 1, 2, 5, 6]


@dataclass
class Ranked:
    """Ranks all items in one order for everybody, of those that may be recommended."""

    item_ids: pa.Array
    codes: np.ndarray | None = None
    tie_break: bool = False
    obeys: bool = True

    def rank(self, histories: Histories, *, k: int, exclude_seen: bool, allowed: np.ndarray | None = None):
        ranked = np.full((len(histories), k), -1, np.int32)
        for index in range(len(histories)):
            seen = set(histories[index].tolist()) if exclude_seen else set()
            mask = (
                np.ones(8, bool)
                if allowed is None or not self.obeys
                else np.atleast_2d(allowed)[index % len(np.atleast_2d(allowed))]
            )
            rows = [row for row in ORDER if mask[row] and row not in seen][:k]
            ranked[index, : len(rows)] = rows
        return ranked


@pytest.fixture
def ranker() -> Ranked:
    return Ranked(pa.array(IDS))


def _as_file(folder, suffix: str):
    path = folder / f"held_out.{suffix}"
    if suffix == "parquet":
        pq.write_table(TABLE, path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in TABLE.to_pylist()))
    else:
        path.write_text(
            "history,target\n"
            + "".join(f'"{",".join(h) or ","}",{t}\n' for h, t in zip(HISTORIES, TARGETS, strict=True))
        )
    return path


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv", "pandas", "chunked", "stream"])
def test_a_table_is_the_same_whatever_it_comes_as(ranker, tmp_path, form):
    expected = evaluate(ranker, TABLE, ks=(1, 3))
    assert expected.per_example["recall@1"].tolist() == [0, 0, 1, 0]
    assert expected.per_example["recall@3"].tolist() == [1, 1, 1, 0]

    class Stream:
        def __arrow_c_stream__(self, requested_schema=None):
            return TABLE.__arrow_c_stream__(requested_schema)

    chunked = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)])
    made = {"pandas": TABLE.to_pandas, "chunked": lambda: chunked, "stream": Stream}
    found = evaluate(ranker, made[form]() if form in made else _as_file(tmp_path, form), ks=(1, 3))
    assert found.values == expected.values
    assert found.provenance["table_sha256"] == expected.provenance["table_sha256"]
    other = evaluate(ranker, TABLE.slice(1), ks=(1, 3))
    assert other.provenance["table_sha256"] != expected.provenance["table_sha256"]


def test_what_a_table_has_besides_is_said(ranker, caplog):
    caplog.set_level("INFO", "semid")
    expected = evaluate(ranker, TABLE, ks=(1, 3))
    assert caplog.messages == []
    found = evaluate(ranker, TABLE.append_column("weight", pa.array([1.0] * len(TABLE))), ks=(1, 3))
    assert caplog.messages == ["not used: weight"]
    assert found.values == expected.values


def test_a_table_measures_as_the_split_that_it_is_of(tmp_path):
    """Rows of a dataset's test split: the same metrics but for what needs the training counts."""
    rng = np.random.default_rng(0)
    users, items = np.repeat(np.arange(20), 6), rng.choice(8, 120)
    items[:8] = range(8)
    interactions = {"user_id": users.astype(str), "item_id": [IDS[i] for i in items], "position": np.arange(120)}
    dataset = Dataset.build(pa.table({"item_id": IDS, "title": IDS}), pa.table(interactions), name="tiny")
    ranker = Popularity.fit(dataset.splits.train, dataset.item_ids)
    test = dataset.splits.test
    names = [[IDS[row] for row in test.histories[i]] for i in range(len(test))]
    table = pa.table({"history": names, "target": [IDS[row] for row in test.targets]})
    expected, found = evaluate(ranker, dataset, exclude_seen=True), evaluate(ranker, table, exclude_seen=True)
    for name in ("recall@5", "ndcg@10", "mrr", "valid", "coverage@10"):
        assert found.values[name] == pytest.approx(expected.values[name])
    assert found.provenance["targets_out_of_reach"] == expected.provenance["targets_out_of_reach"] > 0
    assert found.provenance["popularity_of"] == "histories of the table"


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 1024])
def test_masks_make_their_items_the_whole_catalogue(ranker, shared, exclude_seen, batch_size):
    """Places counted by hand among what is allowed; a target that is not is a miss, and counted."""
    masks = np.random.default_rng(3).random((1 if shared else 4, 8)) < 0.6
    masks[0, [0, 7]] = True, False  # the first target is allowed, and the last is not
    masks[-1, 7] = False
    allowed = masks[0] if shared else masks
    missed = sum(not masks[i % len(masks), IDS.index(t)] for i, t in enumerate(TARGETS))
    assert 0 < missed < 4
    with pytest.warns(UserWarning, match=f"{missed} of 4 targets are not allowed"):
        found = evaluate(ranker, TABLE, ks=(2,), allowed=allowed, exclude_seen=exclude_seen, batch_size=batch_size)
    hits, listed, possible, reached = [], 0, 0, 0
    for i, (history, target) in enumerate(zip(HISTORIES, TARGETS, strict=True)):
        seen = {IDS.index(h) for h in history} if exclude_seen else set()
        may = [row for row in ORDER if masks[i % len(masks), row] and row not in seen]
        hits.append(float(IDS.index(target) in may[:2]))
        reached += IDS.index(target) in may
        listed, possible = listed + len(may[:2]), possible + min(2, len(may))
    assert found.per_example["recall@2"].tolist() == hits
    assert found.provenance["targets_out_of_reach"] == 4 - reached
    assert found.values["valid"] == listed / possible == 1
    assert found.provenance["allowed_items"] == masks.sum(axis=1).mean()


@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize("with_seen", [False, True])
def test_places_among_what_is_allowed_are_those_of_a_catalogue_without_the_rest(masks, with_seen):
    """Against brute force: leave out the items, number the others anew."""
    rng = np.random.default_rng(masks)
    for _ in range(20):
        groups, allowed = rng.integers(0, 5, 12), rng.random((masks, 12)) < 0.6
        groups = np.unique(groups, return_inverse=True)[1]
        lists = [rng.choice(12, rng.integers(0, 4)).tolist() for _ in range(3)]
        histories, targets = Histories.from_lists(lists), rng.integers(0, 12, 3)
        may = [
            np.array([allowed[i % masks, r] and not (with_seen and r in lists[i]) for r in range(12)]) for i in range(3)
        ]
        ranked = np.full((3, 4), -1, np.int32)
        for i in range(3):
            rows = rng.permutation(np.flatnonzero(may[i]))[:4]
            ranked[i, : len(rows)] = rows
        found = metrics.item_places(ranked, targets, groups, allowed=allowed, seen=histories if with_seen else None)
        for i in range(3):
            if not may[i][targets[i]]:
                assert found.first[i] == 0
                continue
            number = np.cumsum(may[i]) - 1
            kept = np.unique(groups[may[i]], return_inverse=True)[1]
            row = np.where(ranked[i] >= 0, number[ranked[i]], -1)[None]
            alone = metrics.item_places(row, number[targets[i : i + 1]], kept)
            assert (found.first[i], found.size[i]) == (alone.first[0], alone.size[0])


def test_a_ranker_that_breaks_the_mask_is_caught():
    lawless = Ranked(pa.array(IDS), obeys=False)
    mask = np.arange(8) < 8
    evaluate(lawless, TABLE, ks=(3,), allowed=mask)  # control: everything is allowed
    mask[3] = False
    with (
        pytest.warns(UserWarning, match="1 of 4 targets are not allowed"),
        pytest.raises(SemidError, match="not allowed: 4 entries of a batch, the first 'i3'"),
    ):
        evaluate(lawless, TABLE, ks=(3,), allowed=mask)


def test_unknown_ids_are_dropped_and_counted_on_request(ranker):
    table = pa.table({"history": [["i1", "new", "i2"], ["newer"], ["i3"]], "target": ["i0", "newest", "i3"]})
    with pytest.raises(SemidError) as caught:
        evaluate(ranker, table)
    assert str(caught.value).splitlines() == [
        f"table: row {row}, column {column!r}: item id {name!r} is not in the model's catalogue; "
        "correct it, or drop such with drop_unknown=True"
        for row, column, name in [(1, "history", "new"), (2, "history", "newer"), (2, "target", "newest")]
    ]
    masks = np.ones((3, 8), bool)
    masks[1] = False  # of the row that is dropped
    found = evaluate(ranker, table, ks=(1,), drop_unknown=True, allowed=masks)
    known = pa.table({"history": [["i1", "i2"], ["i3"]], "target": ["i0", "i3"]})
    assert found.values == evaluate(ranker, known, ks=(1,), allowed=masks[[0, 2]]).values
    assert found.provenance["dropped"] == {"unknown_history_items": 2, "rows_of_unknown_target": 1}
    assert (found.provenance["table_rows"], found.provenance["examples"]) == (3, 2)
    with pytest.raises(SemidError, match="column 'target': none of the 1 targets"):
        evaluate(ranker, table.slice(1, 1), drop_unknown=True)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"history": [["i1"]]}, r"table: column 'target': missing; expected the id .* there are \['history'\]"),
        ({"history": [["i1"], None], "target": ["i0", "i0"]}, "row 2, column 'history': null; expected a list"),
        ({"history": [["i1"], ["i2", None]], "target": ["i0", "i0"]}, "row 2, column 'history': a null or an empty"),
        ({"history": [["i1"], []], "target": ["i0", None]}, "row 2, column 'target': is null; fill it in"),
        ({"history": [[1.0, 2]], "target": ["i0"]}, "column 'history': expected lists of strings .*<.*double>"),
        ({"history": [["i1"]], "target": [3.5]}, r"column 'target': expected strings .*double \(row 1: 3.5\)"),
        ({"history": pa.array([], pa.list_(pa.string())), "target": pa.array([], pa.string())}, "table: no rows"),
    ],
)  # fmt: skip
def test_each_fault_of_a_table_is_named(ranker, columns, says):
    with pytest.raises(SemidError, match=says):
        evaluate(ranker, pa.table(columns))


def test_a_column_that_occurs_twice_is_named(ranker):
    with pytest.raises(SemidError, match="column 'target': occurs more than once; rename or drop one"):
        evaluate(ranker, TABLE.append_column("target", TABLE["target"]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"allowed": np.ones(7, bool)}, r"booleans \[8 items\] or \[4 examples, 8 items\], got bool \[7\]"),
        ({"allowed": np.ones((3, 8), bool)}, r"got bool \[3, 8\]"),
        ({"allowed": np.ones(8)}, r"got float64 \[8\]"),
        ({"split": "validation"}, "a table has no split 'validation'"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_a_table(ranker, options, says):
    with pytest.raises(SemidError, match=says):
        evaluate(ranker, TABLE, **options)


def test_a_frame_with_an_index_of_its_own_and_empty_histories(ranker):
    frame = pd.DataFrame({"history": [[], []], "target": ["i3", "i0"]}, index=["x", "y"])
    assert evaluate(ranker, frame, ks=(1,)).values["recall@1"] == 0.5


class Fixed:
    """Ranks its items in one order for everybody."""

    tie_break = False

    def __init__(self, order: list[str], ids: list[str], codes: dict[str, list[int]]) -> None:
        self.item_ids, self.codes = pa.array(ids), np.array([codes[name] for name in ids])
        self.rows = np.array([ids.index(name) for name in order], np.int32)

    def rank(self, histories: Histories, *, k: int, exclude_seen: bool, allowed: np.ndarray | None = None):
        kept = self.rows if allowed is None else self.rows[allowed[self.rows]]
        return np.tile(np.pad(kept[:k], (0, max(k - len(kept), 0)), constant_values=-1), (len(histories), 1))


def test_removed_items_are_no_part_of_the_catalogue(monkeypatch):
    codes = {"a": [0], "b": [0], "c": [1], "d": [2]}  # a, which shares its codes with b, is removed
    whole, rest = Fixed(["b", "d"], ["a", "b", "c", "d"], codes), Fixed(["b", "d"], ["b", "c", "d"], codes)
    whole.active = np.array([False, True, True, True])
    table = pa.table({"history": [["c"], ["d"]], "target": ["b", "c"]})
    found, expected = (evaluate(of, table, ks=(1, 3)) for of in (whole, rest))
    assert found.values == expected.values
    assert found.values["recall@1"] == 0.5
    assert found.provenance["catalogue_items"] == 3
    table = pa.concat_tables([table] * 3)
    sorted_shapes, argsort = [], np.argsort
    monkeypatch.setattr(np, "argsort", lambda a, **kw: (sorted_shapes.append(a.shape), argsort(a, **kw))[1])
    assert evaluate(whole, table, ks=(1, 3), batch_size=2).values == expected.values
    assert sorted_shapes.count((len(codes),)) == 0  # one mask is counted without an order of the items by their groups
    monkeypatch.undo()
    del whole.active
    assert evaluate(whole, table, ks=(1, 3)).values != expected.values
    whole.active = np.array([False, True, True, True])
    with pytest.warns(UserWarning, match="1 of 1 targets are not allowed, or removed from the catalogue"):
        gone = evaluate(whole, pa.table({"history": [["c"]], "target": ["a"]}), ks=(1,))
    assert (gone.values["recall@1"], gone.provenance["targets_out_of_reach"]) == (0.0, 1)
