"""Training batches: histories packed into rows, shuffled and split over processes by a Grain pipeline."""

from __future__ import annotations

import abc
import functools
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from semid.data import Histories, seconds_since
from semid.errors import SemidError

if TYPE_CHECKING:
    import grain

# Batches of an epoch that make rows of one length worth a compiled program of their own.
_MIN_BATCHES = 100
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
        """The arrays that determine the rows; a resumed run checks that they are the same."""

    def buckets(self, batch_size: int) -> Int[np.ndarray, " rows"] | None:
        """The bucket of each row, as a batch is of one bucket where possible; None: all rows are alike."""
        del batch_size
        return None

    def batch(self, index: Int[np.ndarray, " n"], *, bucket: int) -> Any:
        """Rows by number, none of them of a larger bucket than `bucket` (-1: the largest)."""
        del bucket
        return self[index]


class _StoredRows(Rows):
    """Rows of a NamedTuple of arrays, None where there is none."""

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

    Codes are never in it: they are gathered on the device.
    `segments` numbers the histories of a row from 1 and is 0 on padding; `targets[t]` is the item that follows
    `history[t]`, -1 where there is none. Where the data have events, `events` are the history's and `target_events` the
    targets' (see `Histories`), 0 on padding and where there is no target. For models that read them, `times` are
    seconds since the history's first item in the row, -1 on padding.
    """

    history: Int[Any, "rows length"]
    targets: Int[Any, "rows length"] | Int[Any, " rows"]
    segments: Int[Any, "rows length"]
    events: Int[Any, "rows length"] | None = None
    target_events: Int[Any, "rows length"] | Int[Any, " rows"] | None = None
    times: Int[Any, "rows length"] | None = None


def pack(
    train: Histories, *, max_history: int, row_length: int, append_last: bool = False, times: bool = False
) -> PackedRows:
    """Pack training histories into rows of `row_length` positions, best fit, longest first.

    Every item but a history's first is a target exactly once, seeing at most `max_history` items before it; longer
    histories are cut into windows from the end. `append_last` puts behind each its last target, at a position of the
    same segment without a target, for models whose codes are predicted from the tokens before them. With `times`, rows
    have those of the histories.
    Raises SemidError when no history has two items.
    """
    if not 1 <= max_history <= row_length - append_last:
        limit = "< row_length (behind each stands its last target)" if append_last else "<= row_length"
        raise SemidError(f"expected 1 <= max_history {limit}, got {max_history} and {row_length}; change either")
    starts, sizes = _windows(train, max_history)
    if not len(sizes):
        raise SemidError(_NO_TARGETS)
    order = np.argsort(-sizes, kind="stable")
    starts, sizes = starts[order], sizes[order] + append_last  # from here on sizes are numbers of positions
    row_of, offset_of, segment_of, num_rows = _best_fit(sizes, row_length)
    empty = np.zeros((num_rows, row_length), np.int32)
    packed = PackedRows(empty, np.full_like(empty, -1), np.zeros_like(empty))
    window = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(len(window)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    at, source = (row_of[window], offset_of[window] + within), starts[window] + within
    packed.history[at] = train.items[source]
    packed.segments[at] = segment_of[window]
    followed = within < sizes[window] - append_last
    asked = at[0][followed], at[1][followed]
    packed.targets[asked] = train.items[source[followed] + 1]
    if times and train.times is not None:
        seconds = np.full_like(empty, -1)
        seconds[at] = seconds_since(train.times[source], train.times[starts[window]])
        packed = packed._replace(times=seconds)
    if train.events is None:
        return packed
    events, target_events = np.zeros_like(empty), np.zeros_like(empty)
    events[at], target_events[asked] = train.events[source], train.events[source[followed] + 1]
    return packed._replace(events=events, target_events=target_events)


class SingleRows(Rows):
    """Rows of one history and one target: every item of the training histories but their first, after at most
    `max_history` items before it.

    Rows are built on demand, `rows[index] -> PackedRows` with targets [n], segments numbering the training histories
    from 1; memory holds one number per history. Batches are of rows of about one length, if there are enough of them,
    padded to a quarter of `max_history`, half of it, or all. `seen` counts the first items of each history that are no
    targets. Raises SemidError when there is no row.
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
        first = 1 if seen is None else np.maximum(seen, 1)
        self._until = np.cumsum(np.maximum(train.ends - train.starts - first, 0))  # targets up to and with each history
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
        owner, target = self._targets(np.arange(len(self)))
        found = np.searchsorted(self._lengths, np.minimum(target - self._train.starts[owner], self._max_history))
        for bucket in range(len(self._lengths) - 1):
            if np.count_nonzero(found == bucket) < _MIN_BATCHES * batch_size:
                found[found == bucket] += 1
        return None if (found == found[0]).all() else found.astype(np.int8)

    def batch(self, index: Int[np.ndarray, " n"], *, bucket: int) -> PackedRows:
        """Rows by number, padded to the length of the bucket."""
        return self._padded(index, int(self._lengths[bucket]))

    @property
    def _lengths(self) -> Int[np.ndarray, " buckets"]:
        return np.unique([-(-self._max_history // 4), -(-self._max_history // 2), self._max_history])

    def _targets(self, index: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The history of each row, and the place of its target."""
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
        if train.events is None:
            return rows
        return rows._replace(events=before.padded_events(length), target_events=train.events[target])

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        train, along = self._train, [x for x in (self._train.events, self._times) if x is not None]
        return train.items, train.starts, train.ends, self._until, np.array(self._max_history), *along


def _windows(train: Histories, max_history: int) -> tuple[np.ndarray, np.ndarray]:
    """Start on the flat array and number of targets of each window of at most `max_history` inputs."""
    targets = np.maximum(train.lengths.astype(np.int64) - 1, 0)
    count = -(-targets // max_history)
    owner = np.repeat(np.arange(len(train)), count)
    nth_from_end = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    end = train.ends[owner] - 1 - nth_from_end * max_history
    start = np.maximum(train.starts[owner], end - max_history)
    return start, end - start


def _best_fit(sizes: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Row, offset and segment number for sizes in descending order, each into the fullest row that has room."""
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    filled: list[int] = []
    segments: list[int] = []
    placed = np.empty((3, len(sizes)), np.int64)
    for index, size in enumerate(sizes.tolist()):
        room = next((r for r in range(size, row_length + 1) if by_room[r]), None)
        if room is None:
            filled.append(0)
            segments.append(0)
            row, room = len(filled) - 1, row_length
        else:
            row = by_room[room].pop()
        segments[row] += 1
        placed[:, index] = row, filled[row], segments[row]
        filled[row] += size
        by_room[room - size].append(row)
    return placed[0], placed[1], placed[2], len(filled)


class _ShuffledBatches:
    """Random access to training batches: batch `i` is a fixed function of the seed, whatever was read before."""

    def __init__(self, data: Rows, *, batch_size: int, num_batches: int, seed: int, process: tuple[int, int]) -> None:
        self._data, self._batch_size, self._length = data, batch_size, num_batches
        self._rows, self._seed, self._process = len(data), seed, process
        self._buckets = data.buckets(batch_size)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)
        self._checksum = functools.reduce(lambda seen, array: zlib.crc32(array.tobytes(), seen), data.arrays, 0)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The order of the epoch's rows. With buckets, nearly all batches are of one bucket; the largest rows fill the
        batches that two epochs share."""
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self._rows)
        if self._buckets is None:
            return order
        order, size = order[np.argsort(self._buckets[order], kind="stable")], self._batch_size
        begun = min(-epoch * self._rows % size, self._rows)  # what the last batch of the epoch before still takes
        whole = (self._rows - begun) // size * size
        batches, rest = rng.permutation(order[:whole].reshape(-1, size)), order[whole:]
        return np.concatenate([rest[:begun], batches.reshape(-1), rest[begun:]])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        index = int(index)
        global_index = np.arange(index * self._batch_size, (index + 1) * self._batch_size)
        epoch, within = np.divmod(global_index, self._rows)
        chosen = np.concatenate([self._order(int(e))[within[epoch == e]] for e in np.unique(epoch)])
        rank, count = self._process
        local = chosen[rank * (len(chosen) // count) : (rank + 1) * (len(chosen) // count)]
        return self._data.batch(local, bucket=-1 if self._buckets is None else int(self._buckets[chosen].max()))

    def __repr__(self) -> str:
        """The name of the pipeline in Grain's state, by which Grain refuses a state of other data or another seed."""
        data = f"rows={self._rows}, crc32={self._checksum:08x}"
        return f"ShuffledBatches({data}, batch_size={self._batch_size}, seed={self._seed})"


def as_rows(data: Any | Rows) -> Rows:
    """`data` as Rows; it may be a NamedTuple of arrays with equal first axes."""
    return _StoredRows(data) if isinstance(data, tuple) else data


def batches(
    data: Any | Rows, *, batch_size: int, num_batches: int, seed: int, process: tuple[int, int] = (0, 1)
) -> grain.DataLoaderIterator:
    """A Grain iterator over `num_batches` batches of `data`, Rows or a NamedTuple of arrays with equal first axes.

    Each epoch is a fresh permutation by `seed`; batches run on across epochs, so that all have one size. `process`
    is (index, count): every process gets its slice of the global batch. The iterator's state is exact and small, and
    no other pipeline's iterator takes it.
    Raises SemidError if the batch does not divide among the processes.
    """
    import grain

    if batch_size < 1 or batch_size % process[1]:
        raise SemidError(f"batch size {batch_size} does not divide among {process[1]} processes")
    source = _ShuffledBatches(as_rows(data), batch_size=batch_size, num_batches=num_batches, seed=seed, process=process)
    # A DataLoader, since its iterator's state names the source; that of a MapDataset is a bare position.
    loader = grain.DataLoader(
        data_source=source,
        sampler=grain.samplers.SequentialSampler(num_batches, grain.sharding.NoSharding()),
        worker_count=0,
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=4),
    )
    return iter(loader)
