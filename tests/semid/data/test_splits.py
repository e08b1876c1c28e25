import numpy as np
import pyarrow as pa
import pytest

from semid.data import Dataset, GlobalTime, HeldOutItems, LeaveOneOut
from semid.errors import SemidError


def build(rows, rule, *, items=10, order="timestamp"):
    """A dataset of (user, item, time) rows; item ids are their rows."""
    users, item_ids, times = zip(*rows, strict=True)
    interactions = pa.table({"user_id": users, "item_id": pa.array(item_ids), order: times})
    return Dataset.build(pa.table({"item_id": range(items)}), interactions, name="t", split_rule=rule)


def random_rows(seed, users=30, items=12, n=300):
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, size, n).tolist() for size in (users, items, 60)]
    return list(zip(*columns, strict=True))


def examples_of(part, dataset):
    """(user id, history, target) of every example."""
    users = dataset.users.to_pylist()
    owners = [users[user] for user in part.histories.users]
    histories = [part.histories[i].tolist() for i in range(len(part))]
    return list(zip(owners, histories, part.targets.tolist(), strict=True))


def train_of(dataset):
    train = dataset.splits.train
    return {dataset.users[int(user)].as_py(): train[i].tolist() for i, user in enumerate(train.users)}


def test_leave_one_out_by_hand():
    rows = [("a", 1, 10), ("b", 7, 1), ("a", 2, 5), ("a", 3, 20), ("c", 4, 1), ("c", 5, 2), ("a", 4, 15)]
    dataset = build(rows, LeaveOneOut())
    assert train_of(dataset) == {"a": [2, 1], "b": [7], "c": [4, 5]}  # b and c have fewer than 3: they only train
    assert examples_of(dataset.splits.validation, dataset) == [("a", [2, 1], 4)]
    assert examples_of(dataset.splits.test, dataset) == [("a", [2, 1, 4], 3)]


def test_ties_keep_the_order_of_the_source():
    rows = [("a", 5, 1), ("a", 3, 1), ("a", 9, 0), ("a", 4, 1)]
    dataset = build(rows, LeaveOneOut())
    assert dataset.item.tolist() == [9, 5, 3, 4]
    assert examples_of(dataset.splits.test, dataset) == [("a", [9, 5, 3], 4)]


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_is_the_naive_cut(seed):
    rows = random_rows(seed)
    dataset = build(rows, LeaveOneOut(), items=12)
    sequences = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):
        sequences.setdefault(str(user), []).append(item)
    long = {user: seq for user, seq in sequences.items() if len(seq) >= 3}
    assert train_of(dataset) == sequences | {user: seq[:-2] for user, seq in long.items()}
    for part, cut in ((dataset.splits.validation, -2), (dataset.splits.test, -1)):
        expected = [(user, seq[:cut], seq[cut]) for user, seq in long.items()]
        assert sorted(examples_of(part, dataset)) == sorted(expected)


def test_global_time_by_hand_with_the_boundary_in_the_later_part():
    # 11 interactions at times 0..10: the .8 and .9 quantiles are 8 and 9 exactly.
    users = "aaabbaabacb"
    rows = [(user, time, time) for time, user in enumerate(users)]
    dataset = build(rows, GlobalTime(validation=0.8, test=0.9), items=11)
    assert train_of(dataset) == {"a": [0, 1, 2, 5, 6], "b": [3, 4, 7], "c": []}
    assert examples_of(dataset.splits.validation, dataset) == [("a", [0, 1, 2, 5, 6], 8)]
    # c's only interaction, at time 9, has no history, so it is no example.
    assert examples_of(dataset.splits.test, dataset) == [("b", [3, 4, 7], 10)]


@pytest.mark.parametrize("seed", range(3))
def test_global_time_trains_on_nothing_at_or_after_the_cut(seed):
    rows = random_rows(seed)
    dataset = build(rows, GlobalTime(0.6, 0.8), items=12)
    first, second = np.quantile([time for _, _, time in rows], [0.6, 0.8])
    counted = sorted(item for _, item, time in rows if time < first)
    assert sorted(item for items in train_of(dataset).values() for item in items) == counted
    for part, low, high in ((dataset.splits.validation, first, second), (dataset.splits.test, second, np.inf)):
        ends = part.histories.ends  # a history ends where its target stands
        continued = np.diff(dataset.user, prepend=-1) == 0
        assert ends.tolist() == np.flatnonzero(continued & (dataset.time >= low) & (dataset.time < high)).tolist()
        assert (dataset.item[ends] == part.targets).all()
        assert (dataset.user[ends] == part.histories.users).all()


def test_global_time_needs_timestamps_and_ordered_quantiles():
    rows = [("a", i, i) for i in range(10)]
    assert len(build(rows, GlobalTime()).splits.test) == 1
    with pytest.raises(SemidError, match="needs timestamps"):
        _ = build(rows, GlobalTime(), order="position").splits
    for quantiles in ((0.9, 0.8), (float("nan"), 0.8), (0.8, float("inf"))):
        with pytest.raises(SemidError, match="expected 0 < validation < test < 1, got {} and {}".format(*quantiles)):
            GlobalTime(*quantiles)


@pytest.mark.parametrize("seed", range(4))
def test_held_out_items_never_train_and_are_all_targets(seed):
    rows = random_rows(seed)
    dataset = build(rows, HeldOutItems(fraction=0.34, seed=seed), items=12)
    splits = dataset.splits
    held = [set(part.targets.tolist()) for part in (splits.validation, splits.test)]
    warm = {item for items in train_of(dataset).values() for item in items}
    assert len(held[0]) == len(held[1]) == 2
    assert not held[0] & held[1]
    assert warm == set(range(12)) - held[0] - held[1]
    for part, cold in ((splits.validation, held[0]), (splits.test, held[1])):
        expected = []
        for user in range(dataset.num_users):
            sequence = dataset.item[dataset.user == user].tolist()
            for i, item in enumerate(sequence):
                history = [earlier for earlier in sequence[:i] if earlier in warm]
                if item in cold and history:
                    expected.append((dataset.users[user].as_py(), history, item))
        assert examples_of(part, dataset) == expected


def test_held_out_items_depend_on_the_seed_alone():
    rows = random_rows(0)
    targets = [set(build(rows, HeldOutItems(0.5, seed), items=12).splits.test.targets.tolist()) for seed in (0, 0, 1)]
    assert targets[0] == targets[1] != targets[2]


@pytest.mark.parametrize("fraction", [0.05, 0.99])
def test_held_out_fraction_must_leave_items_on_both_sides(fraction):
    rows = random_rows(0)
    with pytest.raises(SemidError, match=f"fraction {fraction} of 12 items holds out"):
        _ = build(rows, HeldOutItems(fraction), items=12).splits


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan"), float("inf")])
def test_what_is_no_fraction_is_refused(fraction):
    with pytest.raises(SemidError, match=f"expected a fraction of the items between 0 and 1, got {fraction}"):
        HeldOutItems(fraction)


def test_examples_by_name():
    splits = build([("a", i, i) for i in range(4)], LeaveOneOut()).splits
    assert splits.examples("test").targets.tolist() == [3]
    assert splits.examples("validation").take(slice(0, 0)).targets.tolist() == []
    with pytest.raises(SemidError, match="expected split 'validation' or 'test', got 'train'"):
        splits.examples("train")


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (LeaveOneOut(), "no user has 3 interactions or more"),
        (GlobalTime(), "no interaction of that time follows an earlier one of its user"),
        (HeldOutItems(0.5), "no interaction with its held-out items follows one with another item"),
    ],
)
def test_a_split_without_examples_says_why(rule, why):
    once = [(user, row, row) for row, user in enumerate("abcdefgh")]
    with pytest.raises(SemidError, match=f"the test split has no examples: {why}"):
        build(once, rule).splits.examples("test")
    often = [(user, row, row + 8 * n) for n, user in enumerate("abcd") for row in range(8)]
    assert len(build(often, rule).splits.examples("test"))


def test_a_seed_that_is_none_is_refused():
    with pytest.raises(SemidError, match="expected a seed of 0 or more, got -1"):
        HeldOutItems(seed=-1)
    with pytest.raises(SemidError, match=r"expected a seed below 2\*\*32, got 4294967296"):
        HeldOutItems(seed=2**32)
    HeldOutItems(seed=2**32 - 1)  # control


@pytest.mark.parametrize("rule", [LeaveOneOut(), GlobalTime(0.5, 0.7), HeldOutItems(0.4)])
def test_events_ride_along_with_histories_and_targets(rule):
    """An interaction's event is its item's name, so that it shows whether it went astray."""
    rows = random_rows(7)
    users, item_ids, times = zip(*rows, strict=True)
    events = [f"{item:02}" for item in item_ids]
    interactions = pa.table({"user_id": users, "item_id": pa.array(item_ids), "timestamp": times, "event": events})
    items = pa.table({"item_id": range(12)})
    dataset = Dataset.build(items, interactions, name="t", split_rule=rule)
    assert dataset.events == tuple(f"{item:02}" for item in range(12))
    plain = Dataset.build(items, interactions.drop_columns(["event"]), name="t", split_rule=rule).splits
    assert (plain.train.events, plain.test.target_events, plain.test.histories.events) == (None, None, None)
    for part, other in ((dataset.splits.validation, plain.validation), (dataset.splits.test, plain.test)):
        np.testing.assert_array_equal(part.target_events, part.targets + 1)
        np.testing.assert_array_equal(part.targets, other.targets)
        assert part.take(np.array([1, 0])).target_events.tolist() == (part.targets[[1, 0]] + 1).tolist()
    for histories in (dataset.splits.train, dataset.splits.test.histories):
        np.testing.assert_array_equal(histories.events, histories.items + 1)
