"""Rows of training data, built on demand: several packed histories, or one history and one target."""

from __future__ import annotations

import abc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from semid.data import Histories, seconds_since
from semid.errors import SemidError

# Minimum batches per epoch for a length of rows to get a compiled program of its own.
_MIN_BATCHES = 100
# Rows per block when rows are sorted into buckets.
_AT_ONCE = 1 << 20
_NO_TARGETS = "no training history has two items or more: there is nothing to learn from"


class Rows(abc.ABC):
    """Random access to the rows of training data."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: Int[np.ndarray, " n"]) -> Any:
        """Rows by number, a NamedTuple of arrays whose first axis is that of `index`."""

    @property
    @abc.abstractmethod
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Arrays that determine the rows; a resumed run checks that they have not changed."""

    def prepare(self, folder: Path) -> None:
        """Preparation that must be done once before the first row is read; processes share `folder`, which may not
        exist yet."""
        del folder

    def buckets(self, batch_size: int) -> Int[np.ndarray, " rows"] | None:
        """The bucket of each row (batches are from one bucket if possible); None: all rows have the same length."""
        del batch_size
        return None

    def batch(self, index: Int[np.ndarray, " n"], *, bucket: int) -> Any:
        """Rows by number, none from a larger bucket than `bucket` (-1: the largest)."""
        del bucket
        return self[index]


class _StoredRows(Rows):
    """Rows of a NamedTuple of arrays, some of which may be None."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return tuple(array for array in self._stored if array is not None)

    def __len__(self) -> int:
        return len(self._stored[0])

    def __getitem__(self, index: Int[np.ndarray, " n"]) -> Any:
        return type(self._stored)(*(None if array is None else array[index] for array in self._stored))


class PackedRows(NamedTuple):
    """Rows of several histories, or of one history and one target; numpy arrays on the host, JAX arrays in a step.

    Codes are not part of it: they are gathered on the device.
    `segments` numbers the histories of a row from 1 and is 0 on padding; `targets[t]` is the item that follows
    `history[t]`, -1 if there is none. If the data have events, `events` are the history's and `target_events` the
    targets' (see `Histories`), 0 on padding and without a target. For models that read them, `times` are seconds since
    the history's first item in the row, -1 on padding. `target_weights` are weights of the targets; None: equal.
    """

    history: Int[Any, "rows length"]
    targets: Int[Any, "rows length"] | Int[Any, " rows"]
    segments: Int[Any, "rows length"]
    events: Int[Any, "rows length"] | None = None
    target_events: Int[Any, "rows length"] | Int[Any, " rows"] | None = None
    times: Int[Any, "rows length"] | None = None
    target_weights: Float[Any, "rows length"] | Float[Any, " rows"] | None = None


class PackedHistories(Rows):
    """Rows of `row_length` positions with several histories each, packed best fit, longest first.

    Every item but a history's first is a target exactly once, after at most `max_history` items; longer histories are
    cut into windows from the end. `append_last` appends to each history its last target, as a position without a
    target, for models that predict codes from the tokens before them. With `times`, rows have the histories' times.

    Rows are built on demand, `rows[index] -> PackedRows`; memory holds two numbers per window and one per row.
    Raises SemidError when no history has two items.
    """

    def __init__(
        self, train: Histories, *, max_history: int, row_length: int, append_last: bool = False, times: bool = False
    ) -> None:
        if not 1 <= max_history <= row_length - append_last:
            limit = "< row_length (behind each stands its last target)" if append_last else "<= row_length"
            raise SemidError(f"expected 1 <= max_history {limit}, got {max_history} and {row_length}; change either")
        starts, sizes = _windows(train, max_history)
        if not len(sizes):
            raise SemidError(_NO_TARGETS)
        self._train, self._times = train, train.times if times else None
        self._row_length, self._append_last = row_length, append_last
        sizes = sizes + append_last  # from numbers of targets to numbers of positions
        longest_first = np.argsort(-sizes, kind="stable")
        row_of = _best_fit(sizes[longest_first], row_length)
        by_row = longest_first[np.argsort(row_of, kind="stable")]
        self._starts, self._sizes = starts[by_row], sizes[by_row].astype(np.int32)
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of))])  # where each row's windows begin

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: Int[np.ndarray, " n"]) -> PackedRows:
        train, first, count = self._train, self._bounds[index], self._bounds[index + 1] - self._bounds[index]
        row, nth = _counted(count)
        window = first[row] + nth
        starts, sizes = self._starts[window], self._sizes[window]
        owner, within = _counted(sizes)
        before = np.cumsum(sizes) - sizes
        offset = before - before[np.cumsum(count) - count][row]
        at, source = (row[owner], offset[owner] + within), starts[owner] + within
        empty = np.zeros((len(index), self._row_length), np.int32)
        packed = PackedRows(empty, np.full_like(empty, -1), np.zeros_like(empty))
        packed.history[at] = train.items[source]
        packed.segments[at] = (nth + 1)[owner]
        followed = within < sizes[owner] - self._append_last
        asked = at[0][followed], at[1][followed]
        packed.targets[asked] = train.items[source[followed] + 1]
        if self._times is not None:
            seconds = np.full_like(empty, -1)
            seconds[at] = seconds_since(self._times[source], self._times[starts[owner]])
            packed = packed._replace(times=seconds)
        if train.weights is not None:
            weights = np.zeros(empty.shape, np.float32)
            weights[asked] = train.weights[source[followed] + 1]
            packed = packed._replace(target_weights=weights)
        if train.events is None:
            return packed
        events, target_events = np.zeros_like(empty), np.zeros_like(empty)
        events[at], target_events[asked] = train.events[source], train.events[source[followed] + 1]
        return packed._replace(events=events, target_events=target_events)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        along = [x for x in (self._train.events, self._times, self._train.weights) if x is not None]
        sizes = np.array([self._row_length, self._append_last])
        return self._train.items, self._starts, self._sizes, self._bounds, sizes, *along


def pack(
    train: Histories, *, max_history: int, row_length: int, append_last: bool = False, times: bool = False
) -> PackedRows:
    """All rows of `PackedHistories` at once."""
    rows = PackedHistories(train, max_history=max_history, row_length=row_length, append_last=append_last, times=times)
    return rows[np.arange(len(rows))]


class SingleRows(Rows):
    """Rows of one history and one target: every item of a training history but its first, after at most `max_history`
    items.

    Rows are built on demand, `rows[index] -> PackedRows` with targets [n] and segments that number the training
    histories from 1; memory holds one number per history. If there are enough rows of similar length, a batch has only
    these, padded to a quarter of `max_history`, half of it, or all. `seen` is the number of first items of each history
    that are no targets. Raises SemidError if there is no row.
    """

    def __init__(
        self,
        train: Histories,
        *,
        max_history: int,
        seen: Int[np.ndarray, " histories"] | None = None,
        times: bool = False,
    ) -> None:
        if max_history < 1:
            raise SemidError(f"expected max_history of at least 1, got {max_history}")
        self._train, self._max_history = train, max_history
        self._times = train.times if times else None
        self._largest = -1  # largest bucket of a row, set by `buckets`
        first = 1 if seen is None else np.maximum(seen, 1)
        self._until = np.cumsum(np.maximum(train.ends - train.starts - first, 0))  # targets up to the end of a history
        if not len(self):
            raise SemidError(
                _NO_TARGETS if seen is None else "no training history has an item that it did not have before"
            )

    def __len__(self) -> int:
        return int(self._until[-1]) if len(self._until) else 0

    def __getitem__(self, index: Int[np.ndarray, " n"]) -> PackedRows:
        return self._padded(index, self._max_history)

    def buckets(self, batch_size: int) -> Int[np.ndarray, " rows"] | None:
        """The bucket of each row: the smallest of `_lengths` that holds its history, if enough rows share it."""
        found = np.concatenate([self._buckets_of(block) for block in _blocks(len(self))])
        self._largest = int(found.max())
        for bucket in range(self._largest):
            if np.count_nonzero(found == bucket) < _MIN_BATCHES * batch_size:
                found[found == bucket] += 1
        return None if (found == found[0]).all() else found

    def batch(self, index: Int[np.ndarray, " n"], *, bucket: int) -> PackedRows:
        """Rows by number, padded to the length of the bucket."""
        return self._padded(index, int(self._lengths[self._largest if bucket < 0 else bucket]))

    def _buckets_of(self, index: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        owner, target = self._targets(index)
        length = np.minimum(target - self._train.starts[owner], self._max_history)
        return np.searchsorted(self._lengths, length).astype(np.int8)

    @property
    def _lengths(self) -> Int[np.ndarray, " buckets"]:
        return np.unique([-(-self._max_history // 4), -(-self._max_history // 2), self._max_history])

    def _targets(self, index: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The history of each row, and the index of its target."""
        owner = np.searchsorted(self._until, index, side="right")
        return owner, self._train.ends[owner] - (self._until[owner] - index)

    def _padded(self, index: Int[np.ndarray, " n"], length: int) -> PackedRows:
        train, (owner, target) = self._train, self._targets(index)
        along = train.events, self._times
        before = Histories(train.users[owner], train.items, train.starts[owner], target, *along)
        history, real = before.padded(length)
        rows = PackedRows(history, train.items[target], np.where(real, owner[:, None] + 1, 0).astype(np.int32))
        if self._times is not None:
            rows = rows._replace(times=before.padded_times(length))
        if train.weights is not None:
            rows = rows._replace(target_weights=train.weights[target])
        if train.events is None:
            return rows
        return rows._replace(events=before.padded_events(length), target_events=train.events[target])

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        train = self._train
        along = [x for x in (train.events, self._times, train.weights) if x is not None]
        return train.items, train.starts, train.ends, self._until, np.array(self._max_history), *along


def _windows(train: Histories, max_history: int) -> tuple[np.ndarray, np.ndarray]:
    """Start in the flat array and number of targets of each window of at most `max_history` inputs."""
    targets = np.maximum(train.lengths.astype(np.int64) - 1, 0)
    owner, nth_from_end = _counted(-(-targets // max_history))
    end = train.ends[owner] - 1 - nth_from_end * max_history
    start = np.maximum(train.starts[owner], end - max_history)
    return start, end - start


def _counted(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For groups of the sizes `counts`: the group of each member, and its number in the group, from 0."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _best_fit(sizes: np.ndarray, row_length: int) -> np.ndarray:
    """Best-fit packing of sizes in descending order: the row of each, the fullest one with enough room.

    Equal sizes are placed at once: a row takes as many as fit, since after each one it remains the fullest row with
    room.
    """
    by_room = [np.zeros(0, np.int64)] * (row_length + 1)  # rows by what is free in them; the last is filled first
    row_of, placed, num_rows = np.empty(len(sizes), np.int64), 0, 0
    counts = np.bincount(sizes, minlength=row_length + 1).tolist()
    for size in (size for size in range(row_length, 0, -1) if counts[size]):
        end = placed + counts[size]
        for room in (room for room in range(size, row_length + 1) if room == row_length or len(by_room[room])):
            if placed == end:
                break
            per_row = room // size
            needed = -(-(end - placed) // per_row)
            if room == row_length:
                rows, num_rows = np.arange(num_rows, num_rows + needed), num_rows + needed
            else:
                rows, by_room[room] = by_room[room][-needed:][::-1], by_room[room][:-needed]
            into = np.repeat(rows, per_row)[: end - placed]
            row_of[placed : placed + len(into)] = into
            placed += len(into)
            full, in_last = divmod(len(into), per_row)
            for filled, number in ((rows[:full], per_row), (rows[full:], in_last)):
                if len(filled):
                    left = room - number * size
                    by_room[left] = np.concatenate([by_room[left], filled])
    return row_of


def _blocks(count: int) -> Iterator[np.ndarray]:
    """The numbers below `count`, in blocks."""
    return (np.arange(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE))


def checksum(array: np.ndarray, seen: int = 0) -> int:
    """CRC-32 of an array's bytes, continuing from the checksum `seen`."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, seen)


def as_rows(data: Any | Rows) -> Rows:
    """`data` as Rows; it may be a NamedTuple of arrays with equal first axes."""
    return _StoredRows(data) if isinstance(data, tuple) else data
