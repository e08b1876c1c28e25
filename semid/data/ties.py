"""Order of a user's interactions of equal time, by a declared rule that is applied before splitting and training.

Also finds lines that repeat an earlier line.
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
    """Ties in order of `position` if there is such a column, else in the order of the source.

    Many sources sort each day's lines by item: an order that a model can learn and that says nothing about users. See
    `ShuffledTies`.
    """

    @property
    def description(self) -> str:
        """Phrase to follow "interactions of equal time"."""
        return "in source order"

    def sort_keys(self, interactions: pa.Table) -> SortKeys:
        """Keys for `np.lexsort`, to follow user and time, of checked interactions."""
        return (*_columns(interactions, "position"), *_columns(interactions, "ticks"))


@dataclass(frozen=True)
class ShuffledTies:
    """Ties in a random order drawn by `seed`, whatever their `position` and order in the source.

    Random numbers are assigned to the interactions sorted by user id, item id (both as text), time and, if present,
    event and weight, so that the result does not depend on the order of the rows.
    """

    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def description(self) -> str:
        """Phrase to follow "interactions of equal time"."""
        return f"shuffled by seed {self.seed}"

    def sort_keys(self, interactions: pa.Table) -> SortKeys:
        """Keys as in `SourceOrder.sort_keys`; times finer than a second still order interactions within it."""
        ticks = _columns(interactions, "ticks")
        optional = [name for name in ("weight", "event") if name in interactions.column_names]
        others, ids = ([_ranks(interactions[name]) for name in names] for names in (optional, ("item_id", "user_id")))
        canonical = np.lexsort((*others, *ticks, *_columns(interactions, "timestamp"), *ids))
        drawn = np.empty(len(canonical), np.int64)
        drawn[canonical] = np.random.default_rng(self.seed).permutation(len(canonical))
        return (drawn, *ticks)


TieRule = SourceOrder | ShuffledTies


def repeated_lines(
    user: Int[np.ndarray, " n"], time: Int[np.ndarray, " n"], others: Iterable[Shaped[np.ndarray, " n"]]
) -> Int[np.ndarray, " repeats"]:
    """Indices of interactions (sorted by user and time) that equal an earlier one in user, time and all of `others`.

    Of each further column only the rows that tie in all earlier ones are sorted: a small part of a long log.
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
    """Indices that are in a run of equal neighbors, and the number of the run for each."""
    to_last, to_next = np.append(False, equal), np.append(equal, False)
    places = np.flatnonzero(to_last | to_next)
    return places, np.cumsum(~to_last[places])


def other_columns(interactions: pa.Table) -> Iterator[Shaped[np.ndarray, " n"]]:
    """Numeric columns besides user, item and second that distinguish interactions: ticks, event and weight."""
    yield from _columns(interactions, "ticks")
    if "event" in interactions.column_names:
        event = interactions["event"].dictionary_encode(null_encoding="encode").combine_chunks()
        yield event.indices.to_numpy()
    if "weight" in interactions.column_names:
        yield interactions["weight"].to_numpy()


def _columns(interactions: pa.Table, name: str) -> SortKeys:
    return (interactions[name].to_numpy(),) if name in interactions.column_names else ()


def _ranks(values: pa.ChunkedArray) -> Int[np.ndarray, " n"]:
    """Rank of each value among the sorted distinct ones; nulls last."""
    encoded = values.dictionary_encode(null_encoding="encode").combine_chunks()
    return pc.rank(encoded.dictionary).to_numpy()[encoded.indices.to_numpy()].astype(np.int64)
