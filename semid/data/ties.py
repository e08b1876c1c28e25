"""Order of a user's interactions of equal time, by a declared rule: it stands before anything is split or trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from semid.config import check_seed

SortKeys = tuple[Int[np.ndarray, " n"], ...]


@dataclass(frozen=True)
class SourceOrder:
    """Ties by `position` where there is one, else in the order of the source.

    Many sources sort a day by item: what a model learns from that order tells nothing of users. See `ShuffledTies`.
    """

    @property
    def description(self) -> str:
        """Words that follow "interactions of equal time"."""
        return "in source order"

    def sort_keys(self, interactions: pa.Table) -> SortKeys:
        """Keys of a stable sort of checked interactions, after user and time, in the order of `np.lexsort`."""
        return (*_columns(interactions, "position"), *_columns(interactions, "ticks"))


@dataclass(frozen=True)
class ShuffledTies:
    """Ties in an order drawn by `seed`; `position` and the order of the source are set aside.

    The draw goes through all interactions by user id, item id (both as text), time and, where there are such, event and
    weight: the same in whatever order the rows come.
    """

    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def description(self) -> str:
        """Words that follow "interactions of equal time"."""
        return f"shuffled by seed {self.seed}"

    def sort_keys(self, interactions: pa.Table) -> SortKeys:
        """Keys as of `SourceOrder`; times finer than a second still order what falls into one."""
        ticks = _columns(interactions, "ticks")
        names = [name for name in ("weight", "event") if name in interactions.column_names]
        others, ids = ([_places(interactions[name]) for name in of] for of in (names, ("item_id", "user_id")))
        canonical = np.lexsort((*others, *ticks, *_columns(interactions, "timestamp"), *ids))
        drawn = np.empty(len(canonical), np.int64)
        drawn[canonical] = np.random.default_rng(self.seed).permutation(len(canonical))
        return (drawn, *ticks)


TieRule = SourceOrder | ShuffledTies


def _columns(interactions: pa.Table, name: str) -> SortKeys:
    return (interactions[name].to_numpy(),) if name in interactions.column_names else ()


def _places(values: pa.ChunkedArray) -> Int[np.ndarray, " n"]:
    """Place of each value among the distinct ones, sorted; null is the last."""
    encoded = values.dictionary_encode(null_encoding="encode").combine_chunks()
    return pc.rank(encoded.dictionary).to_numpy()[encoded.indices.to_numpy()].astype(np.int64)
