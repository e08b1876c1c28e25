"""Ragged item sequences as windows on one flat array."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from semid.errors import SemidError

# Smallest share of repeated targets that counts as behavior: fewer are errors of the log.
_COMMON = 1e-3
# Items per chunk in `popularity` and `repeats`, approximately.
_CHUNK_ITEMS = 1 << 20


class Repeats(NamedTuple):
    """Number of repeated targets (items seen earlier in their own history), and of all targets."""

    repeated: int
    targets: int

    @property
    def share(self) -> float:
        """Share of the targets that are repeated; 0 without targets."""
        return self.repeated / max(self.targets, 1)

    @property
    def common(self) -> bool:
        """At least one target in a thousand is repeated, so that repeating is part of users' behavior."""
        return self.repeated > 0 and self.share >= _COMMON

    def __str__(self) -> str:
        rare = f" ({100 * self.share:.2g}%; below {_COMMON:.1%} they count as none)"
        return f"{self.repeated:,} of {self.targets:,}{rare if self.repeated and not self.common else ''}"


@dataclass(frozen=True, eq=False)
class Histories:
    """Item rows of `n` histories, oldest first: history `i` is `items[starts[i]:ends[i]]`.

    Windows may overlap, so that a user's training, validation and test histories share one array. `users` are dense
    user indices, -1 if the history belongs to nobody in the dataset. Parallel to `items`: `events` are indices into
    `Dataset.events` from 1, 0 for unknown (None: all are unknown); `times` are seconds since any fixed moment (None:
    unknown); `weights` are those of the items as training targets (None: equal).
    """

    users: Int[np.ndarray, " n"]
    items: Int[np.ndarray, " total"]
    starts: Int[np.ndarray, " n"]
    ends: Int[np.ndarray, " n"]
    events: Int[np.ndarray, " total"] | None = None
    times: Int[np.ndarray, " total"] | None = None
    weights: Float[np.ndarray, " total"] | None = None

    @classmethod
    def from_lists(
        cls,
        lists: Sequence[Sequence[int] | Int[np.ndarray, " _"]],
        *,
        events: Sequence[Sequence[int] | Int[np.ndarray, " _"]] | None = None,
        times: Sequence[Sequence[int] | Int[np.ndarray, " _"]] | None = None,
    ) -> Histories:
        """Histories of unknown users, from lists of item rows and, of the same lengths, events and times."""
        ends = np.cumsum([len(rows) for rows in lists], dtype=np.int64)
        items = np.array([row for rows in lists for row in rows], np.int32)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if lists else ends
        codes = None if events is None else np.array([code for codes in events for code in codes], np.int32)
        seconds = None if times is None else np.array([second for row in times for second in row], np.int64)
        users = np.full(len(lists), -1, np.int32)
        return cls(users=users, items=items, starts=starts, ends=ends, events=codes, times=seconds)

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> Int[np.ndarray, " length"]:
        """Item rows of one history."""
        return self.items[self.starts[index] : self.ends[index]]

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Number of items of each history."""
        return (self.ends - self.starts).astype(np.int32)

    def without_events(self) -> Histories:
        """The same histories without events."""
        return replace(self, events=None)

    def without_weights(self) -> Histories:
        """The same histories with equal weights."""
        return replace(self, weights=None)

    def take(self, index: Int[np.ndarray, " m"] | slice) -> Histories:
        """The histories at `index`, in that order."""
        return replace(self, users=self.users[index], starts=self.starts[index], ends=self.ends[index])

    def flat(self) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " total"]]:
        """All item rows, history after history, and the index of the history that each belongs to."""
        lengths = self.ends - self.starts
        owner = np.repeat(np.arange(len(self)), lengths)
        before = np.cumsum(lengths) - lengths
        return self.items[np.arange(len(owner)) + (self.starts - before)[owner]], owner

    def popularity(self, num_items: int) -> Int[np.ndarray, " items"]:
        """Number of occurrences of each item row."""
        counts = np.zeros(num_items, np.int64)
        for part in self._parts():
            counts += np.bincount(part.flat()[0], minlength=num_items)
        return counts

    def repeats(self) -> Repeats:
        """Count repeats: targets are all items but each history's first, each preceded by the items before it."""
        size, repeated = int(self.items.max(initial=0)) + 1, 0
        for part in self._parts():
            items, owner = part.flat()
            pairs = np.sort(owner * size + items)
            repeated += int((pairs[1:] == pairs[:-1]).sum())
        return Repeats(repeated, int(np.maximum(self.lengths - 1, 0).sum()))

    def _parts(self) -> Iterator[Histories]:
        """The histories in consecutive parts of about `_CHUNK_ITEMS` items."""
        seen = np.cumsum(self.lengths, dtype=np.int64)
        cuts = np.searchsorted(seen, np.arange(0, seen[-1] if len(seen) else 0, _CHUNK_ITEMS)).tolist()
        for start, end in itertools.pairwise([*cuts, len(self)]):
            yield self.take(slice(start, end))

    def padded(self, length: int) -> tuple[Int[np.ndarray, "n length"], Bool[np.ndarray, "n length"]]:
        """The last `length` items of each history, right-padded with row 0, and a mask of the real ones."""
        source, real = self._latest(length)
        return _gathered(self.items, source, real), real

    def padded_events(self, length: int) -> Int[np.ndarray, "n length"]:
        """The events of the last `length` items of each history, right-padded with 0; 0 if unknown."""
        source, real = self._latest(length)
        return np.zeros(real.shape, np.int32) if self.events is None else _gathered(self.events, source, real)

    def padded_times(self, length: int) -> Int[np.ndarray, "n length"]:
        """Times of the last `length` items of each history, in seconds since the first of these items, right-padded
        with -1; -1 if unknown."""
        source, real = self._latest(length)
        if self.times is None:
            return np.full(real.shape, -1, np.int32)
        times = _gathered(self.times, source, real, np.int64)
        return np.where(real, seconds_since(times, times[:, :1]), -1).astype(np.int32)

    def _latest(self, length: int) -> tuple[Int[np.ndarray, "n length"], Bool[np.ndarray, "n length"]]:
        """Indices of the last `length` items in the flat array, and a mask of the real ones."""
        if length < 1:
            raise SemidError(f"expected a length of at least 1 to pad to, got {length}")
        source = np.maximum(self.starts, self.ends - length)[:, None] + np.arange(length)
        return source, source < self.ends[:, None]


def seconds_since(times: Int[np.ndarray, "*n"], first: Int[np.ndarray, "*#n"]) -> Int[np.ndarray, "*n"]:
    """Seconds since `first`, clipped to 0 and the largest int32 (68 years)."""
    return np.clip(times - first, 0, np.iinfo(np.int32).max)


def _gathered(
    values: Int[np.ndarray, " total"],
    source: Int[np.ndarray, "n length"],
    real: Bool[np.ndarray, "n length"],
    kind: type[np.integer] = np.int32,
) -> Int[np.ndarray, "n length"]:
    """`values` at the indices `source` where `real`, else 0."""
    gathered = np.zeros(real.shape, kind)
    gathered[real] = values[source[real]]
    return gathered
