"""Batches of item rows: histories packed into rows, shuffled and sharded by a Grain pipeline over flat arrays."""

from __future__ import annotations

import functools
import zlib
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from semid.data.histories import Histories
from semid.errors import SemidError


class PackedRows(NamedTuple):
    """Several histories side by side in each row: arrays of numpy on the host, of JAX in a step.

    Codes are never in it: they are gathered on the device.
    `segments` numbers the histories of a row from 1 and is 0 on padding; `targets[t]` is the item that follows
    `history[t]`.
    """

    history: Int[Any, "rows length"]
    targets: Int[Any, "rows length"]
    segments: Int[Any, "rows length"]


def pack(train: Histories, *, max_history: int, row_length: int) -> PackedRows:
    """Pack training histories into rows of `row_length` positions, best fit, longest first.

    Every item but a history's first is a target exactly once, seeing at most `max_history` items before it; longer
    histories are cut into windows from the end. Raises SemidError when no history has two items.
    """
    if not 1 <= max_history <= row_length:
        raise SemidError(f"expected 1 <= max_history <= row_length, got {max_history} and {row_length}; change either")
    starts, sizes = _windows(train, max_history)
    if not len(sizes):
        raise SemidError("no training history has two items or more: there is nothing to learn from")
    order = np.argsort(-sizes, kind="stable")
    row_of, offset_of, segment_of, num_rows = _best_fit(sizes[order], row_length)
    packed = PackedRows(*(np.zeros((num_rows, row_length), np.int32) for _ in PackedRows._fields))
    sizes, starts = sizes[order], starts[order]
    window = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(len(window)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    at = (row_of[window], offset_of[window] + within)
    packed.history[at] = train.items[starts[window] + within]
    packed.targets[at] = train.items[starts[window] + within + 1]
    packed.segments[at] = segment_of[window]
    return packed


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

    def __init__(self, data: Any, *, batch_size: int, num_batches: int, seed: int, process: tuple[int, int]) -> None:
        self._data, self._batch_size, self._length = data, batch_size, num_batches
        self._rows, self._seed, self._process = len(data[0]), seed, process
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)
        self._checksum = functools.reduce(lambda seen, array: zlib.crc32(array.tobytes(), seen), data, 0)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        index = int(index)
        global_index = np.arange(index * self._batch_size, (index + 1) * self._batch_size)
        epoch, within = np.divmod(global_index, self._rows)
        chosen = np.concatenate([self._order(int(e))[within[epoch == e]] for e in np.unique(epoch)])
        rank, count = self._process
        local = chosen[rank * (len(chosen) // count) : (rank + 1) * (len(chosen) // count)]
        return type(self._data)(*(array[local] for array in self._data))

    def __repr__(self) -> str:
        """Names the pipeline in Grain's state: Grain refuses a state of other data or another seed."""
        data = f"rows={self._rows}, crc32={self._checksum:08x}"
        return f"ShuffledBatches({data}, batch_size={self._batch_size}, seed={self._seed})"


def batches(
    data: Any, *, batch_size: int, num_batches: int, seed: int, process: tuple[int, int] = (0, 1)
) -> grain.DataLoaderIterator:
    """A Grain iterator over `num_batches` batches of a NamedTuple of arrays with equal first axes.

    Each epoch is a fresh permutation by `seed`; batches run on across epochs, so that all have one size. `process`
    is (index, count): every process gets its slice of the global batch. The iterator's state is exact and small, and
    no other pipeline's iterator takes it.
    Raises SemidError if the batch does not divide among the processes.
    """
    if batch_size < 1 or batch_size % process[1]:
        raise SemidError(f"batch size {batch_size} does not divide among {process[1]} processes")
    source = _ShuffledBatches(data, batch_size=batch_size, num_batches=num_batches, seed=seed, process=process)
    # A DataLoader, since its iterator's state names the source; that of a MapDataset is a bare position.
    loader = grain.DataLoader(
        data_source=source,
        sampler=grain.samplers.SequentialSampler(num_batches, grain.sharding.NoSharding()),
        worker_count=0,
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=4),
    )
    return iter(loader)
