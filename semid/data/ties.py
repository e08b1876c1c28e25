"""Order of a user's interactions of equal time, by a declared rule: it stands before anything is split or trained.

Lines that repeat an earlier one are found among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int, Shaped

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


def repeated_lines(
    user: Int[np.ndarray, " n"], time: Int[np.ndarray, " n"], others: Iterable[Shaped[np.ndarray, " n"]]
) -> Int[np.ndarray, " repeats"]:
    """Places of interactions, which are sorted by user and time, that equal an earlier one in `others`, too.

    Of each column, only what is equal in all before it is sorted, which is little of a long log.
    """
    rows, run = _runs((user[1:] == user[:-1]) & (time[1:] == time[:-1]))
    columns = iter(others)
    while len(rows) and (column := next(columns, None)) is not None:
        order = np.lexsort((column[rows], run))  # stable: the earliest stays first
        rows, run, values = rows[order], run[order], column[rows[order]]
        places, run = _runs((run[1:] == run[:-1]) & (values[1:] == values[:-1]))
        rows = rows[places]
    return np.sort(rows[1:][run[1:] == run[:-1]])


def _runs(equal: Bool[np.ndarray, " pairs"]) -> tuple[Int[np.ndarray, " places"], Int[np.ndarray, " places"]]:
    """Places in runs of equal neighbors, and the number of the run that each is in."""
    to_last, to_next = np.append(False, equal), np.append(equal, False)
    places = np.flatnonzero(to_last | to_next)
    return places, np.cumsum(~to_last[places])


def other_columns(interactions: pa.Table) -> Iterator[Shaped[np.ndarray, " n"]]:
    """Numbers that tell checked interactions of one user, item and second apart: ticks, event and weight."""
    yield from _columns(interactions, "ticks")
    if "event" in interactions.column_names:
        event = interactions["event"].dictionary_encode(null_encoding="encode").combine_chunks()
        yield event.indices.to_numpy()
    if "weight" in interactions.column_names:
        yield interactions["weight"].to_numpy()


def _columns(interactions: pa.Table, name: str) -> SortKeys:
    return (interactions[name].to_numpy(),) if name in interactions.column_names else ()


def _places(values: pa.ChunkedArray) -> Int[np.ndarray, " n"]:
    """Place of each value among the distinct ones, sorted; null is the last."""
    encoded = values.dictionary_encode(null_encoding="encode").combine_chunks()
    return pc.rank(encoded.dictionary).to_numpy()[encoded.indices.to_numpy()].astype(np.int64)
