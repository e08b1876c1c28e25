import tracemalloc

import numpy as np
import pytest

from semid.data import Histories, Repeats
from semid.errors import SemidError

LISTS = [[3, 1, 4], [], [1, 5, 9, 2, 6], [5], []]


def test_from_lists_gives_back_the_lists():
    histories = Histories.from_lists(LISTS)
    assert len(histories) == 5
    assert [history.tolist() for history in (histories[i] for i in range(5))] == LISTS
    assert histories.lengths.tolist() == [3, 0, 5, 1, 0]
    assert histories.users.tolist() == [-1] * 5
    assert (histories.items.dtype, histories.lengths.dtype, histories.starts.dtype) == (np.int32, np.int32, np.int64)


def test_flat_lists_items_and_owners():
    items, owner = Histories.from_lists(LISTS).flat()
    assert items.tolist() == [3, 1, 4, 1, 5, 9, 2, 6, 5]
    assert owner.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 3]


def test_windows_may_overlap_and_leave_gaps():
    items = np.arange(10, 20, dtype=np.int32)
    windows = Histories(np.array([7, 7, 8], np.int32), items, np.array([2, 2, 8]), np.array([4, 6, 10]))
    assert windows.flat()[0].tolist() == [12, 13, 12, 13, 14, 15, 18, 19]
    assert windows[1].tolist() == [12, 13, 14, 15]
    assert windows.padded(3)[0].tolist() == [[12, 13, 0], [13, 14, 15], [18, 19, 0]]


@pytest.mark.parametrize("index", [np.array([2, 0, 2]), slice(1, 4), np.array([], np.int64)])
def test_take_is_indexing_of_the_lists(index):
    histories = Histories.from_lists(LISTS)
    taken = histories.take(index)
    chosen = np.arange(5)[index]
    assert [taken[i].tolist() for i in range(len(taken))] == [LISTS[i] for i in chosen]
    assert taken.flat()[0].tolist() == [row for i in chosen for row in LISTS[i]]


@pytest.mark.parametrize("length", [1, 2, 4, 5, 9])
def test_padded_holds_the_last_items_on_the_left(length):
    rows, real = Histories.from_lists(LISTS).padded(length)
    assert rows.dtype == np.int32
    assert rows.tolist() == [(values[-length:] + [0] * length)[:length] for values in LISTS]
    assert real.tolist() == [[i < len(values) for i in range(length)] for values in LISTS]


@pytest.mark.parametrize("block", [1, 3, 100])
def test_repeats_are_targets_that_stand_before_in_their_own_history(block, monkeypatch):
    monkeypatch.setattr("semid.data.histories._CHUNK_ITEMS", block)
    rng = np.random.default_rng(0)
    lists = [[], [7], [7, 7], [7, 8, 7, 7], [7], *(rng.integers(0, 9, n).tolist() for n in rng.integers(0, 12, 30))]
    targets = [row[at] in row[:at] for row in lists for at in range(1, len(row))]
    assert Histories.from_lists(lists).repeats() == Repeats(sum(targets), len(targets))
    assert Histories.from_lists([[1, 2], [2, 1], [3]]).repeats() == Repeats(0, 2)  # of others, nothing repeats
    assert Histories.from_lists([]).repeats().share == 0


@pytest.mark.parametrize("block", [1, 3, 100])
def test_popularity_counts_the_items_of_all_histories(block, monkeypatch):
    monkeypatch.setattr("semid.data.histories._CHUNK_ITEMS", block)
    histories = Histories.from_lists([[], [7, 7, 1], [], [8], [], [7, 8, 7, 7]])
    assert histories.popularity(10).tolist() == [0, 1, 0, 0, 0, 0, 0, 5, 2, 0]
    assert histories.take(slice(2, 4)).popularity(9).tolist() == [0] * 8 + [1]
    assert Histories.from_lists([]).popularity(2).tolist() == [0, 0]


def test_popularity_takes_the_memory_of_a_part(monkeypatch):
    monkeypatch.setattr("semid.data.histories._CHUNK_ITEMS", 1 << 12)
    users, ends = 8_000, np.arange(1, 8_001) * 25
    histories = Histories(np.zeros(users, np.int32), np.zeros(users * 25, np.int32), ends - 25, ends)
    tracemalloc.start()
    try:
        assert histories.popularity(3).tolist() == [users * 25, 0, 0]
        assert tracemalloc.get_traced_memory()[1] < 3 * users * 25  # bytes; of all at once, 25 per item
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("repeats", "common", "shown"),
    [
        (Repeats(0, 0), False, "0 of 0"),
        (Repeats(0, 5), False, "0 of 5"),
        (Repeats(1, 5), True, "1 of 5"),
        (Repeats(1, 1_000), True, "1 of 1,000"),
        (Repeats(1, 1_001), False, "1 of 1,001 (0.1%; below 0.1% they count as none)"),
        (Repeats(3, 4_000_000), False, "3 of 4,000,000 (7.5e-05%; below 0.1% they count as none)"),
    ],
)
def test_a_few_repeats_in_a_thousand_targets_count_as_none(repeats, common, shown):
    assert (repeats.common, str(repeats)) == (common, shown)


def test_no_histories():
    histories = Histories.from_lists([])
    assert len(histories) == 0
    assert histories.flat()[0].tolist() == []
    assert histories.padded(3)[0].shape == (0, 3)


def test_padding_to_nothing_is_refused():
    assert Histories.from_lists(LISTS).padded(1)[0].shape == (5, 1)
    with pytest.raises(SemidError, match="expected a length of at least 1 to pad to, got 0"):
        Histories.from_lists(LISTS).padded(0)


def test_events_are_those_of_the_items():
    events = [[10 + row for row in rows] for rows in LISTS]
    histories = Histories.from_lists(LISTS, events=events)
    rows, real = histories.padded(3)
    assert histories.padded_events(3).tolist() == np.where(real, rows + 10, 0).tolist()
    taken = histories.take(np.array([2, 0]))
    assert taken.padded_events(5).tolist() == [events[2], [*events[0], 0, 0]]
    unknown = histories.without_events()
    assert unknown.events is None
    assert not unknown.padded_events(3).any()
