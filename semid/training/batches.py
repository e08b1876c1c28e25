"""Training batches: rows shuffled and split over processes by a Grain pipeline."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from semid.errors import SemidError
from semid.training.rows import Rows, as_rows, checksum

if TYPE_CHECKING:
    import grain


class _ShuffledBatches:
    """Random access to training batches: batch `i` is a fixed function of the seed, whatever was read before."""

    def __init__(self, data: Rows, *, batch_size: int, num_batches: int, seed: int, process: tuple[int, int]) -> None:
        self._data, self._batch_size, self._length = data, batch_size, num_batches
        self._rows, self._seed, self._process = len(data), seed, process
        self._buckets = data.buckets(batch_size)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)
        self._checksum = functools.reduce(lambda seen, array: checksum(array, seen), data.arrays, 0)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Order of an epoch's rows. With buckets, nearly every batch is from one bucket; the largest rows are in the
        batches that span two epochs."""
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self._rows)
        if self._buckets is None:
            return order
        order, size = order[np.argsort(self._buckets[order], kind="stable")], self._batch_size
        begun = min(-epoch * self._rows % size, self._rows)  # rows that complete the last batch of the epoch before
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
        """Name of the pipeline in Grain's state; Grain refuses a state with another name (other data or seed)."""
        data = f"rows={self._rows}, crc32={self._checksum:08x}"
        return f"ShuffledBatches({data}, batch_size={self._batch_size}, seed={self._seed})"


def batches(
    data: Any | Rows, *, batch_size: int, num_batches: int, seed: int, process: tuple[int, int] = (0, 1)
) -> grain.DataLoaderIterator:
    """A Grain iterator over `num_batches` batches of `data`, Rows or a NamedTuple of arrays with equal first axes.

    Each epoch is a new permutation by `seed`; batches may span epochs, so that all have the same size. `process` is
    (index, count): every process gets its slice of the global batch. The iterator's state is exact and small, and
    iterators over other data refuse it.
    Raises SemidError if the batch does not divide among the processes.
    """
    import grain

    if batch_size < 1 or batch_size % process[1]:
        raise SemidError(f"batch size {batch_size} does not divide among {process[1]} processes")
    source = _ShuffledBatches(as_rows(data), batch_size=batch_size, num_batches=num_batches, seed=seed, process=process)
    # A DataLoader, since its iterator's state names the source; the state of a MapDataset is only a position.
    loader = grain.DataLoader(
        data_source=source,
        sampler=grain.samplers.SequentialSampler(num_batches, grain.sharding.NoSharding()),
        worker_count=0,
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=4),
    )
    return iter(loader)
