import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from semid.artifacts import read_manifest
from semid.data import Dataset, ShuffledTies, SourceOrder
from semid.data.ties import repeated_lines
from semid.errors import SemidError
from semid.stage import store_dataset

ITEMS = 40
# Two users with 20 items each, on two days: the database has them by item id.
COLUMNS = {
    "user_id": ["v"] * 20 + ["u"] * 20,
    "item_id": [f"i{row:02}" for row in range(ITEMS)],
    "timestamp": ([0] * 10 + [86_400] * 10) * 2,
    "event": [f"e{row}" for row in range(ITEMS)],
    "weight": [float(row) for row in range(ITEMS)],
}


def build(ties, *, columns=COLUMNS, rows=None):
    interactions = pa.table(columns)
    interactions = interactions if rows is None else interactions.take(pa.array(rows))
    items = pa.table({"item_id": COLUMNS["item_id"]})
    return Dataset.build(items, interactions, name="t", ties=ties)


def sequences(dataset):
    """(item id, time) of every interaction, in order, by user id."""
    users, items = dataset.users.to_pylist(), dataset.item_ids.to_pylist()
    found = {user: [] for user in users}
    for user, item, time in zip(dataset.user, dataset.item, dataset.time, strict=True):
        found[users[user]].append((items[item], int(time)))
    return found


def test_a_time_keeps_its_items_in_another_order():
    plain, shuffled = sequences(build(SourceOrder())), sequences(build(ShuffledTies()))
    assert plain.keys() == shuffled.keys()
    for user, source in plain.items():
        assert source == sorted(source)  # control: the source tells the next item
        assert [time for _, time in shuffled[user]] == [time for _, time in source]
        assert sorted(shuffled[user]) == source
        assert shuffled[user][:10] != source[:10]
        assert shuffled[user][10:] != source[10:]


def test_what_belongs_to_an_interaction_moves_along():
    dataset = build(ShuffledTies())
    assert dataset.event.to_pylist() == [f"e{item}" for item in dataset.item]
    assert dataset.weight.tolist() == dataset.item.tolist()


def test_every_item_of_the_last_time_is_a_test_target_of_some_seed():
    datasets = [build(ShuffledTies(seed)) for seed in range(100)]
    targets = np.array([dataset.splits.test.targets for dataset in datasets])
    assert [sorted(set(column)) for column in targets.T.tolist()] == [list(range(10, 20)), list(range(30, 40))]
    assert all(dataset.splits.train[0].tolist() == dataset.item[:18].tolist() for dataset in datasets)


def test_the_seed_alone_decides_whatever_the_order_of_rows():
    first, again, other = (build(ShuffledTies(seed)) for seed in (3, 3, 4))
    assert first.digest == again.digest != other.digest
    assert sequences(first) != sequences(other)
    rows = np.random.default_rng(0).permutation(ITEMS)
    assert sequences(build(ShuffledTies(3), rows=rows)) == sequences(first)
    assert sequences(build(SourceOrder(), rows=rows)) != sequences(build(SourceOrder()))  # control


def test_positions_are_set_aside_and_times_below_a_second_are_not():
    position = {"position": range(ITEMS)}
    assert sequences(build(ShuffledTies(), columns=COLUMNS | position)) == sequences(build(ShuffledTies()))
    late = pa.array([1000 - row for row in range(ITEMS)], pa.timestamp("ms"))
    ordered = sequences(build(ShuffledTies(), columns=COLUMNS | {"timestamp": late}))
    assert ordered == sequences(build(SourceOrder(), columns=COLUMNS | {"timestamp": late}))
    assert [item for item, _ in ordered["u"]] == COLUMNS["item_id"][:19:-1]


def test_positions_break_the_ties_of_times_below_a_second_alone():
    late = pa.array([1000 - row // 2 for row in range(ITEMS)], pa.timestamp("ms"))  # two rows tie each
    columns = COLUMNS | {"timestamp": late, "position": range(ITEMS)}
    found = [item for item, _ in sequences(build(SourceOrder(), columns=columns))["u"]]
    assert found == [f"i{row + of:02}" for row in range(38, 19, -2) for of in (0, 1)]


def test_events_and_weights_tell_rows_of_one_item_and_time_apart():
    rows = {"user_id": ["u"] * 8, "item_id": ["i00"] * 8, "timestamp": [0] * 8}
    rows |= {"event": ["a", None, "b", "a"] * 2, "weight": [0.0] * 4 + [1.0] * 4}
    orders = [build(ShuffledTies(), columns=rows, rows=order) for order in (range(8), range(7, -1, -1))]
    pairs = [list(zip(of.event.to_pylist(), of.weight.tolist(), strict=True)) for of in orders]
    assert pairs[0] == pairs[1]
    assert len(set(pairs[0])) == 6  # control: the rows are not alike


def test_the_rule_is_a_part_of_the_dataset_and_the_default_leaves_no_trace(tmp_path):
    plain, shuffled = build(SourceOrder()), build(ShuffledTies(5))
    assert "ties" not in plain.config
    assert shuffled.config["ties"] == {"type": "ShuffledTies", "seed": 5}
    assert plain.statistics()["order of equal times"] == "in source order"
    assert shuffled.statistics()["order of equal times"] == "shuffled by seed 5"
    assert shuffled.statistics()["same time as the one before"] == 36
    store_dataset(shuffled, tmp_path / "d")
    loaded = Dataset.load(tmp_path / "d")
    assert (loaded.ties, loaded.config, sequences(loaded)) == (shuffled.ties, shuffled.config, sequences(shuffled))
    digest = read_manifest(tmp_path / "d").digest
    assert store_dataset(build(ShuffledTies(5)), tmp_path / "d").digest == digest
    for ties, change in ((SourceOrder(), r"ties: \{'type': 'ShuffledTies', 'seed': 5\} -> None"), (6, "seed: 5 -> 6")):
        other = build(ShuffledTies(ties) if isinstance(ties, int) else ties)
        with pytest.raises(SemidError, match=f"in use by a dataset of other settings .*{change}"):
            store_dataset(other, tmp_path / "d")


def test_positions_alone_have_no_ties(tmp_path):
    columns = {name: COLUMNS[name] for name in ("user_id", "item_id")} | {"position": range(ITEMS)}
    assert len(build(SourceOrder(), columns=columns).item) == ITEMS
    why = "ties shuffled by seed 0 need column 'timestamp': by 'position' alone nothing ties; add it"
    with pytest.raises(SemidError, match=f"^interactions: {why}"):
        build(ShuffledTies(), columns=columns)
    file = tmp_path / "x.parquet"
    pa.parquet.write_table(pa.table(columns), file)
    with pytest.raises(SemidError, match=f"^{file}: {why}"):
        Dataset.from_tables(pa.table({"item_id": COLUMNS["item_id"]}), file, name="t", ties=ShuffledTies())


def test_seeds_start_at_0():
    with pytest.raises(SemidError, match="expected a seed of 0 or more, got -1"):
        ShuffledTies(-1)


DOUBLED = {
    "user_id": ["u", "u", "v", "u", "u", "v", "u"],
    "item_id": ["a", "b", "a", "a", "a", "a", "b"],
    "timestamp": [5, 5, 5, 5, 9, 5, 5],
    "event": ["buy", None, "buy", "buy", "buy", "view", None],
    "weight": [1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 3.0],
}


@pytest.mark.parametrize(
    ("columns", "repeats", "equal"),
    [
        (["event", "weight"], [3], "user, item, timestamp, event and weight"),
        (["event"], [3, 6], "user, item, timestamp and event"),
        (["weight"], [3, 5], "user, item, timestamp and weight"),
        ([], [3, 5, 6], "user, item and timestamp"),
    ],
)
def test_lines_sent_twice_are_told_and_dropped_on_request(caplog, columns, repeats, equal):
    table = pa.table(DOUBLED).select(["user_id", "item_id", "timestamp", *columns])
    items = pa.table({"item_id": ["a", "b"]})
    plain = Dataset.build(items, table, name="t", interaction_file="X.csv")
    said = f"X.csv: {len(repeats)} of 7 interactions repeat {equal} of an earlier one; "
    assert caplog.messages == [
        said + "all become targets; if they are events logged twice, drop them (--drop-repeated-lines)"
    ]
    assert plain.statistics()[f"repeated ({', '.join(['user', 'item', 'time', *columns])})"] == len(repeats)
    caplog.clear()
    rest = table.take(pa.array([row for row in range(7) if row not in repeats]))
    for ties in (SourceOrder(), ShuffledTies(3)):
        dropped = Dataset.build(items, table, name="t", ties=ties, drop_repeated_lines=True)
        assert dropped.source == {"repeated lines left out": len(repeats)}
        assert dropped.replace(source={}).digest == Dataset.build(items, rest, name="t", ties=ties).digest
    assert caplog.messages == []
    assert not any(name.startswith("repeated (user, item, ") for name in dropped.statistics())


def test_an_item_again_at_another_time_repeats_no_line(caplog):
    rows = {"user_id": ["u"] * 3, "item_id": ["a", "b", "a"]}
    late = pa.array([1000, 1000, 1001], pa.timestamp("ms"))  # two events of one second
    for order in ({"timestamp": [1, 1, 2]}, {"timestamp": late}, {"position": [0, 1, 2]}):
        table = pa.table(rows | order)
        dataset = Dataset.build(pa.table({"item_id": ["a", "b"]}), table, name="t", drop_repeated_lines=True)
        assert len(dataset.item) == 3
        Dataset.build(pa.table({"item_id": ["a", "b"]}), table, name="t")
    assert caplog.messages == []
    Dataset.build(pa.table({"item_id": ["a", "b"]}), pa.table(rows | {"position": [0, 1, 0]}), name="t")  # control
    assert "1 of 3 interactions repeat user, item and position of an earlier one" in caplog.text


def test_repeated_lines_are_those_of_enumeration():
    rng = np.random.default_rng(0)
    user, time, item, event = (np.sort(rng.integers(0, 4, 200)), *rng.integers(0, 4, (3, 200)))
    time = time[np.lexsort((time, user))]
    lines = list(zip(user, time, item, event, strict=True))
    expected = [row for row, line in enumerate(lines) if line in lines[:row]]
    assert 0 < len(expected) < 200
    assert repeated_lines(user, time, [item, event]).tolist() == expected
    assert repeated_lines(user[:1], time[:1], [item[:1]]).tolist() == []
