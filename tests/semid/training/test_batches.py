"""Packing against brute force, and the stream of batches: permutations, shards, exact positions."""

import dataclasses
import functools
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest

from semid.data import Histories
from semid.errors import SemidError
from semid.training import PackedHistories, PackedRows, SharedArray, SingleRows, batches, pack
from semid.training.rows import _best_fit


class Rows(NamedTuple):
    rows: np.ndarray
    twice: np.ndarray


def numbered(n: int) -> Rows:
    return Rows(np.arange(n), 2 * np.arange(n))


def ragged(rng: np.random.Generator, *, users: int, longest: int) -> list[list[int]]:
    """Histories whose items are all different, so that an item names its user and position."""
    lengths = rng.integers(0, longest + 1, users)
    return np.split(rng.permutation(lengths.sum()), np.cumsum(lengths)[:-1])


def contexts(packed: PackedRows) -> dict[int, list[int]]:
    """What the model may read before each target, by a walk over every row."""
    found: dict[int, list[int]] = {}
    for history, targets, segments in zip(*packed[:3], strict=True):
        for at in np.flatnonzero(targets >= 0):
            assert segments[at] > 0
            first = np.flatnonzero(segments == segments[at])[0]
            assert int(targets[at]) not in found, "a target twice"
            found[int(targets[at])] = history[first : at + 1].tolist()
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("max_history", "row_length"), [(1, 1), (3, 3), (5, 8), (20, 32)])
def test_every_target_once_in_its_own_context(seed, max_history, row_length):
    lists = ragged(np.random.default_rng(seed), users=60, longest=30)
    expected = expected_contexts(lists, max_history=max_history)
    packed = pack(Histories.from_lists(lists), max_history=max_history, row_length=row_length)
    assert packed.history.shape[1] == row_length
    assert {array.dtype for array in packed[:3]} == {np.dtype(np.int32)}
    assert packed[3:] == (None, None, None, None)
    assert contexts(packed) == expected
    assert sorted(expected) == sorted(int(i) for items in lists for i in items[1:])


def test_segments_count_from_one_and_stand_together():
    packed = pack(
        Histories.from_lists(ragged(np.random.default_rng(1), users=80, longest=12)), max_history=6, row_length=16
    )
    for segments in packed.segments:
        real = segments[segments != 0]
        assert (segments[: len(real)] == real).all(), "padding before the end of a row"
        steps = np.diff(real, prepend=0)
        assert set(steps.tolist()) <= {0, 1}
        assert real[0] == 1
    padding = packed.segments == 0
    assert padding.any()
    assert not packed.history[padding].any()
    assert (packed.targets[padding] == -1).all()
    assert (packed.targets[~padding] >= 0).all()


def _weighed(train):
    """Every item weighs a tenth of its row."""
    return dataclasses.replace(train, weights=(train.items / 10).astype(np.float32))


@pytest.mark.parametrize("append_last", [False, True])
def test_rows_by_number_are_those_of_all(append_last):
    rng = np.random.default_rng(5)
    lists = [rng.integers(0, 9, length).tolist() for length in rng.integers(0, 30, 60)]
    train = _weighed(Histories.from_lists(lists, events=lists, times=lists))
    sizes = {"max_history": 5, "row_length": 8, "append_last": append_last, "times": True}
    rows, whole = PackedHistories(train, **sizes), pack(train, **sizes)
    index = rng.integers(0, len(rows), 20)
    for field, of_all in zip(rows[index], whole, strict=True):
        np.testing.assert_array_equal(field, of_all[index])
    stream = {"batch_size": 6, "num_batches": 9, "seed": 3}
    for asked, stored in zip(batches(rows, **stream), batches(whole, **stream), strict=True):
        np.testing.assert_array_equal(asked.history, stored.history)


def test_windows_on_a_shared_array_do_not_leak():
    shared = np.arange(100, 110, dtype=np.int32)
    train = Histories(np.array([0, 1], np.int32), shared, np.array([0, 5]), np.array([3, 9]))
    assert contexts(pack(train, max_history=4, row_length=8)) == {
        101: [100], 102: [100, 101], 106: [105], 107: [105, 106], 108: [105, 106, 107],
    }  # fmt: skip


def test_a_long_history_is_cut_from_the_end():
    packed = pack(Histories.from_lists([list(range(8))]), max_history=3, row_length=3)
    assert contexts(packed) == {
        7: [4, 5, 6], 6: [4, 5], 5: [4],
        4: [1, 2, 3], 3: [1, 2], 2: [1],
        1: [0],
    }  # fmt: skip


def test_rows_are_full_on_lengths_like_those_of_shops():
    rng = np.random.default_rng(0)
    lengths = np.minimum(3 + rng.geometric(0.2, 5000), 200)  # 5-core data: many short histories, few long ones
    packed = pack(Histories.from_lists([[0] * n for n in lengths]), max_history=20, row_length=32)
    assert (packed.segments != 0).mean() >= 0.95
    assert (packed.segments != 0).sum() == (lengths - 1).sum()


def test_packing_is_best_fit():
    # 5 and 4 open rows with room for 1 and 2; 2 goes to the second, 1 to the first: not one row more than needed.
    packed = pack(Histories.from_lists([[0] * (n + 1) for n in (1, 4, 2, 5)]), max_history=6, row_length=6)
    assert sorted((packed.segments != 0).sum(axis=1)) == [6, 6]


def _one_by_one(sizes, row_length):
    """Best fit as it is defined, a window at a time."""
    by_room = [[] for _ in range(row_length + 1)]
    row_of, num_rows = [], 0
    for size in sizes:
        room = next((r for r in range(size, row_length + 1) if by_room[r]), None)
        if room is None:
            row, room, num_rows = num_rows, row_length, num_rows + 1
        else:
            row = by_room[room].pop()
        row_of.append(row)
        by_room[room - size].append(row)
    return row_of


@pytest.mark.parametrize("seed", range(64))
def test_windows_of_one_size_at_once_are_placed_as_one_by_one(seed):
    rng, row_length = np.random.default_rng(seed), seed + 1
    for number in (0, 1, 40, 400):
        sizes = -np.sort(-rng.integers(1, rng.integers(1, row_length + 1) + 1, number))
        np.testing.assert_array_equal(_best_fit(sizes, row_length), _one_by_one(sizes.tolist(), row_length))


def expected_contexts(lists, *, max_history: int) -> dict[int, list[int]]:
    """What may be read before each target when long histories are cut into windows from the end."""
    found = {}
    for items in lists:
        for last in range(len(items) - 1, 0, -max_history):  # the last target of each window
            first = max(last - max_history, 0)
            found |= {int(items[at]): items[first:at].tolist() for at in range(first + 1, last + 1)}
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("max_history", "row_length"), [(1, 2), (3, 4), (5, 8), (20, 32)])
def test_closed_rows_hold_every_target_behind_its_history(seed, max_history, row_length):
    lists = ragged(np.random.default_rng(seed), users=60, longest=30)
    packed = pack(Histories.from_lists(lists), max_history=max_history, row_length=row_length, append_last=True)
    assert contexts(packed) == expected_contexts(lists, max_history=max_history)
    at = np.nonzero(packed.targets >= 0)
    behind = (at[0], at[1] + 1)
    np.testing.assert_array_equal(packed.history[behind], packed.targets[at])
    np.testing.assert_array_equal(packed.segments[behind], packed.segments[at])
    closing = (packed.segments > 0) & (packed.targets < 0)
    assert set(packed.targets[packed.targets < 0].tolist()) == {-1}
    assert closing.sum() == packed.segments.max(axis=1).sum(), "one position a history"


def test_closed_rows_are_one_longer():
    whole = Histories.from_lists([[1, 2, 3, 4, 5]])
    closed = pack(whole, max_history=4, row_length=5, append_last=True)
    assert [field.tolist() for field in closed[:3]] == [[[1, 2, 3, 4, 5]], [[2, 3, 4, 5, -1]], [[1] * 5]]
    with pytest.raises(SemidError, match=r"expected 1 <= max_history < row_length \(behind .*\), got 4 and 4; change"):
        pack(whole, max_history=4, row_length=4, append_last=True)
    assert pack(whole, max_history=4, row_length=4).history.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_history", [1, 3, 40])
def test_single_rows_are_every_prefix(seed, max_history):
    rng = np.random.default_rng(seed)
    lists = ragged(rng, users=60, longest=30)
    rows = SingleRows(Histories.from_lists(lists), max_history=max_history)
    expected = [(items[max(at - max_history, 0) : at], items[at]) for items in lists for at in range(1, len(items))]
    owners = [user for user, items in enumerate(lists) for _ in items[1:]]
    index = rng.permutation(len(rows))
    found = rows[index]
    assert (len(rows), found.history.shape) == (len(expected), (len(expected), max_history))
    assert {array.dtype for array in found[:3]} == {np.dtype(np.int32)}
    for history, target, segments, at in zip(*found[:3], index, strict=True):
        before, after = expected[at]
        assert (segments != 0).tolist() == [True] * len(before) + [False] * (max_history - len(before))
        assert set(segments) <= {0, 1 + owners[at]}
        assert history[: len(before)].tolist() == before.tolist()
        assert target == after


def test_single_rows_of_windows_on_a_shared_array():
    shared = np.arange(100, 110, dtype=np.int32)
    train = Histories(np.array([0, 1], np.int32), shared, np.array([0, 5]), np.array([3, 9]))
    rows = SingleRows(train, max_history=2)
    history, targets, segments = rows[np.arange(len(rows))][:3]
    assert targets.tolist() == [101, 102, 106, 107, 108]
    assert history.tolist() == [[100, 0], [100, 101], [105, 0], [105, 106], [106, 107]]
    assert segments.tolist() == [[1, 0], [1, 1], [2, 0], [2, 2], [2, 2]]


def test_batches_of_single_rows_are_those_of_rows_kept_in_memory():
    rows = SingleRows(Histories.from_lists(ragged(np.random.default_rng(0), users=20, longest=9)), max_history=4)
    options = {"batch_size": 8, "num_batches": 30, "seed": 0}
    lazy, kept = batches(rows, **options), batches(rows[np.arange(len(rows))], **options)
    for ours, theirs in zip(lazy, kept, strict=True):
        assert all((a == b).all() for a, b in zip(ours[:3], theirs[:3], strict=True))


def test_batches_are_no_longer_than_the_longest_history_needs():
    rows = SingleRows(Histories.from_lists([[1, 2, 3]] * 40), max_history=20)
    assert rows.buckets(4) is None
    options = {"batch_size": 4, "num_batches": 2, "seed": 0}
    assert {batch.history.shape for batch in batches(rows, **options)} == {(4, 5)}


def test_batches_are_of_rows_of_about_one_length(monkeypatch):
    """Every example once an epoch, short ones together and padded to less; each process makes the same of it."""
    lists = ragged(np.random.default_rng(0), users=300, longest=16)
    rows, size = SingleRows(Histories.from_lists(lists), max_history=8), 4
    assert set(buckets := rows.buckets(size)) == {0, 1, 2}
    monkeypatch.setattr("semid.training.rows._AT_ONCE", 100)
    assert (rows.buckets(size) == buckets).all()
    assert rows.buckets(64) is None  # too few of any length
    epochs, options = 3, {"batch_size": size, "num_batches": 3 * len(rows) // size, "seed": 0}
    found = list(batches(rows, **options))
    real = [(batch.segments > 0).sum(axis=1) for batch in found]
    assert {batch.history.shape[1] for batch in found} == {2, 4, 8}
    assert all(lengths.max() <= batch.history.shape[1] for lengths, batch in zip(real, found, strict=True))
    read = sum(lengths.sum() for lengths in real) / sum(batch.history.size for batch in found)
    best = np.minimum(np.concatenate([np.arange(1, len(items)) for items in lists if len(items) > 1]), 8)
    assert read > 0.9 * best.sum() / np.array([2, 4, 8])[np.searchsorted([2, 4, 8], best)].sum()
    taken = Counter(
        (tuple(history[segments > 0].tolist()), int(target))
        for batch in found
        for history, target, segments in zip(*batch[:3], strict=True)
    )
    whole = rows[np.arange(len(rows))]
    once = Counter((tuple(h[s > 0].tolist()), int(t)) for h, t, s in zip(*whole[:3], strict=True))
    left = epochs * len(rows) % size  # examples of the last epoch that no whole batch takes
    assert sum((Counter({k: epochs * n for k, n in once.items()}) - taken).values()) == left
    assert not taken - Counter({k: epochs * n for k, n in once.items()})
    parts = [list(batches(rows, **options, process=(rank, 2))) for rank in range(2)]
    for batch, *shares in zip(found, *parts, strict=True):
        assert (np.concatenate([share.history for share in shares]) == batch.history).all()


@pytest.mark.parametrize("kind", [SingleRows, functools.partial(PackedHistories, row_length=3)])
def test_a_state_of_other_rows_is_refused(kind):
    def stream(max_history: int, *lists: list[int]):
        return batches(kind(Histories.from_lists(lists), max_history=max_history), batch_size=2, num_batches=4, seed=0)

    state = stream(3, [1, 2, 3, 7], [4, 5]).get_state()
    stream(3, [1, 2, 3, 7], [4, 5]).set_state(state)
    for other in (stream(2, [1, 2, 3, 7], [4, 5]), stream(3, [1, 2, 3, 7], [4, 6])):
        with pytest.raises(ValueError, match="in checkpoint does not match"):
            other.set_state(state)


@pytest.mark.parametrize("lists", [[], [[]], [[1]], [[1], [], [2]]])
def test_nothing_to_learn_from(lists):
    with pytest.raises(SemidError, match="no training history has two items"):
        pack(Histories.from_lists(lists), max_history=4, row_length=4)
    with pytest.raises(SemidError, match="no training history has two items"):
        SingleRows(Histories.from_lists(lists), max_history=4)
    enough = Histories.from_lists([*lists, [8, 9]])
    assert contexts(pack(enough, max_history=4, row_length=4)) == {9: [8]}
    assert SingleRows(enough, max_history=4)[np.array([0])].targets.tolist() == [9]


@pytest.mark.parametrize(("max_history", "row_length"), [(5, 4), (0, 4), (-1, 4)])
def test_lengths_that_do_not_fit(max_history, row_length):
    with pytest.raises(
        SemidError, match=f"expected 1 <= max_history <= row_length, got {max_history} and {row_length}"
    ):
        pack(Histories.from_lists([[1, 2]]), max_history=max_history, row_length=row_length)


def test_no_history_at_all_cannot_be_read():
    with pytest.raises(SemidError, match="expected max_history of at least 1, got 0"):
        SingleRows(Histories.from_lists([[1, 2]]), max_history=0)


@pytest.mark.parametrize("batch_size", [1, 4, 10, 23])
def test_each_epoch_is_another_permutation(batch_size):
    rows, epochs = 10, 6
    stream = list(batches(numbered(rows), batch_size=batch_size, num_batches=-(-rows * epochs // batch_size), seed=3))
    assert all(isinstance(batch, Rows) and len(batch.rows) == batch_size for batch in stream)
    assert all((batch.twice == 2 * batch.rows).all() for batch in stream), "the arrays of a batch go together"
    flat = np.concatenate([batch.rows for batch in stream])[: rows * epochs].reshape(epochs, rows)
    assert (np.sort(flat, axis=1) == np.arange(rows)).all()
    assert len({tuple(epoch) for epoch in flat}) == epochs


def test_the_seed_decides_and_nothing_else():
    def stream(seed: int) -> np.ndarray:
        return np.stack([b.rows for b in batches(numbered(50), batch_size=8, num_batches=12, seed=seed)])

    np.testing.assert_array_equal(stream(0), stream(0))
    assert (stream(0) != stream(1)).any()
    longer = next(iter(batches(numbered(50), batch_size=8, num_batches=99, seed=0))).rows
    np.testing.assert_array_equal(longer, stream(0)[0])


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_shards_of_all_processes_are_the_global_batch(count):
    def stream(process: tuple[int, int]) -> list[np.ndarray]:
        return [b.rows for b in batches(numbered(20), batch_size=6, num_batches=7, seed=0, process=process)]

    parts = [stream((rank, count)) for rank in range(count)]
    for whole, *shards in zip(stream((0, 1)), *parts, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(shards))


@pytest.mark.parametrize(("batch_size", "count"), [(6, 4), (0, 1), (-2, 1)])
def test_batches_that_do_not_divide_are_refused(batch_size, count):
    with pytest.raises(SemidError, match=f"batch size {batch_size} does not divide among {count} processes"):
        batches(numbered(20), batch_size=batch_size, num_batches=1, seed=0, process=(0, count))


def test_the_stream_goes_on_exactly_from_any_saved_state():
    def fresh():
        return batches(numbered(13), batch_size=4, num_batches=9, seed=5)

    whole, iterator = [batch.rows for batch in fresh()], fresh()
    for step in range(10):
        resumed = fresh()
        next(resumed)  # wherever the other stands
        resumed.set_state(iterator.get_state())
        rest = [batch.rows for batch in resumed]
        np.testing.assert_array_equal(np.array(rest), np.array(whole[step:]))
        next(iterator, None)


@pytest.mark.parametrize("change", ["seed", "batch_size", "num_batches", "rows", "content"])
def test_a_state_of_another_stream_is_refused(change):
    settings = {"batch_size": 4, "num_batches": 9, "seed": 5}
    state = batches(numbered(13), **settings).get_state()
    batches(numbered(13), **settings).set_state(state)
    data = {"rows": numbered(14), "content": Rows(np.arange(13)[::-1], np.arange(13))}.get(change, numbered(13))
    other = batches(data, **{name: value + (name == change) for name, value in settings.items()})
    with pytest.raises(ValueError, match="in checkpoint does not match"):
        other.set_state(state)


@pytest.mark.parametrize("append_last", [False, True])
def test_events_stand_where_their_items_do(append_last):
    """An item names its event, as an event of every item is its row and seven."""
    lists = ragged(np.random.default_rng(2), users=30, longest=12)
    with_events = Histories.from_lists(lists, events=[rows + 7 for rows in lists])
    sizes = {"max_history": 5, "row_length": 9, "append_last": append_last}
    plain, packed = pack(Histories.from_lists(lists), **sizes), pack(with_events, **sizes)
    for name in ("history", "targets", "segments"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(plain, name))
    np.testing.assert_array_equal(packed.events, np.where(packed.segments > 0, packed.history + 7, 0))
    np.testing.assert_array_equal(packed.target_events, np.where(packed.targets >= 0, packed.targets + 7, 0))
    assert pack(with_events.without_events(), **sizes)[3:] == (None, None, None, None)


def test_events_of_single_rows():
    lists = ragged(np.random.default_rng(3), users=9, longest=7)
    train = Histories.from_lists(lists, events=[rows + 7 for rows in lists])
    rows, plain = SingleRows(train, max_history=4), SingleRows(train.without_events(), max_history=4)
    got = rows[np.arange(len(rows))]
    np.testing.assert_array_equal(got.events, np.where(got.segments > 0, got.history + 7, 0))
    np.testing.assert_array_equal(got.target_events, got.targets + 7)
    assert plain[np.array([0])][3:] == (None, None, None, None)
    assert len(rows.arrays) == len(plain.arrays) + 1  # a run on other events is another run


@pytest.mark.parametrize("make", [pack, SingleRows])
def test_weights_stand_with_their_targets(make):
    lists = ragged(np.random.default_rng(3), users=9, longest=7)
    plain, sizes = Histories.from_lists(lists), {"max_history": 4} | ({"row_length": 6} if make is pack else {})
    weighed = make(_weighed(plain), **sizes)
    got = weighed if make is pack else weighed[np.arange(len(weighed))]
    assert got.target_weights.dtype == np.float32
    np.testing.assert_allclose(got.target_weights, np.maximum(got.targets, 0) / 10)
    rows = make(_weighed(plain).without_weights(), **sizes)
    assert (rows if make is pack else rows[np.array([0])]).target_weights is None


def test_batches_hold_the_events_of_their_rows():
    lists = ragged(np.random.default_rng(4), users=12, longest=6)
    packed = pack(Histories.from_lists(lists, events=[rows + 7 for rows in lists]), max_history=4, row_length=6)
    for batch in batches(packed, batch_size=2, num_batches=3, seed=0):
        np.testing.assert_array_equal(batch.events, np.where(batch.segments > 0, batch.history + 7, 0))


def test_an_array_in_shares_is_read_as_a_whole_one():
    whole = np.random.default_rng(0).normal(size=(11, 2, 3)).astype(np.float32)
    index = np.array([10, 0, 4, 4, 7, 3])
    for parts in ([whole], np.split(whole, [4]), np.split(whole, [0, 4, 4, 10])):
        np.testing.assert_array_equal(SharedArray(parts)[index], whole[index])
