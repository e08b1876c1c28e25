"""Arrays by rows of which every process computes a share and reads all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jaxtyping import Int, Shaped

from semid.training.tracking import naming

# Their folder within a run's folder.
SHARES = "shares"


def own_share(count: int) -> Int[np.ndarray, " n"]:
    """Numbers of the rows, of `count`, that this process computes."""
    return np.array_split(np.arange(count), jax.process_count())[jax.process_index()]


class SharedArray:
    """An array by rows, read a few rows at a time; `parts` are the processes' shares in their order."""

    def __init__(self, parts: Sequence[Shaped[np.ndarray, "_ ..."]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    @classmethod
    def exchanged(cls, own: Shaped[np.ndarray, "n ..."], file: Path) -> SharedArray:
        """The array of which this process has computed the share `own`.

        Several processes write their shares next to `file`, in a shared folder, and map each other's files into memory,
        of which only the rows that are read take any. All processes must call this, and wait for each other.
        """
        if jax.process_count() == 1:
            return cls([own])
        files = [file.with_name(f"{file.name}.{process}.npy") for process in range(jax.process_count())]
        with naming(files[jax.process_index()]):
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(files[jax.process_index()], own)
        sync_global_devices(file.name)
        return cls([np.load(part, mmap_mode="r") for part in files])

    def __getitem__(self, index: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, "n ..."]:
        """Rows by number."""
        part_of = np.searchsorted(self._ends, index, side="right")
        rows = np.empty((len(index), *self._parts[0].shape[1:]), self._parts[0].dtype)
        for number, part in enumerate(self._parts):
            at = np.flatnonzero(part_of == number)
            rows[at] = part[index[at] - (self._ends[number] - len(part))]
        return rows
