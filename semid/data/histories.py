"""Ragged item sequences as windows on one flat array."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from semid.errors import SemidError

# Share of the targets from which on they count as repeating: fewer, in a log of millions, are its faults.
_COMMON = 1e-3
# `repeats` goes through about so many items at once.
_ITEMS = 1 << 20


class Repeats(NamedTuple):
    """Number of targets that stand in their own history, and of all targets."""

    repeated: int
    targets: int

    @property
    def share(self) -> float:
        """Share of the targets that stand in their own history; 0 where there are none."""
        return self.repeated / max(self.targets, 1)

    @property
    def common(self) -> bool:
        """At least one target in a thousand stands in its own history: what repeats is a part of the behaviour."""
        return self.repeated > 0 and self.share >= _COMMON

    def __str__(self) -> str:
        rare = f" ({100 * self.share:.2g}%; below {_COMMON:.1%} they count as none)"
        return f"{self.repeated:,} of {self.targets:,}{rare if self.repeated and not self.common else ''}"


@dataclass(frozen=True, eq=False)
class Histories:
    """Item rows of `n` histories, oldest first: history `i` is `items[starts[i]:ends[i]]`.

    Windows may overlap, so that a user's training, validation and test histories share one array. `users` are dense
    user indices, -1 where the history belongs to nobody in the dataset.
    """

    users: Int[np.ndarray, " n"]
    items: Int[np.ndarray, " total"]
    starts: Int[np.ndarray, " n"]
    ends: Int[np.ndarray, " n"]

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int] | Int[np.ndarray, " _"]]) -> Histories:
        """Histories of nobody in particular, from lists of item rows."""
        ends = np.cumsum([len(rows) for rows in lists], dtype=np.int64)
        items = np.array([row for rows in lists for row in rows], np.int32)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if lists else ends
        return cls(users=np.full(len(lists), -1, np.int32), items=items, starts=starts, ends=ends)

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> Int[np.ndarray, " length"]:
        """Item rows of one history."""
        return self.items[self.starts[index] : self.ends[index]]

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Number of items of each history."""
        return (self.ends - self.starts).astype(np.int32)

    def take(self, index: Int[np.ndarray, " m"] | slice) -> Histories:
        """The histories at `index`, in that order."""
        return Histories(self.users[index], self.items, self.starts[index], self.ends[index])

    def flat(self) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " total"]]:
        """All item rows, history after history, and the index of the history that each belongs to."""
        lengths = self.ends - self.starts
        owner = np.repeat(np.arange(len(self)), lengths)
        before = np.cumsum(lengths) - lengths
        return self.items[np.arange(len(owner)) + (self.starts - before)[owner]], owner

    def popularity(self, num_items: int) -> Int[np.ndarray, " items"]:
        """Number of occurrences of each item row."""
        return np.bincount(self.flat()[0], minlength=num_items)

    def repeats(self) -> Repeats:
        """Repeats among the items behind each history's first, each after all that its history has before it."""
        size, seen = int(self.items.max(initial=0)) + 1, np.cumsum(self.lengths, dtype=np.int64)
        cuts = np.searchsorted(seen, np.arange(0, seen[-1] if len(seen) else 0, _ITEMS)).tolist()
        repeated = 0
        for start, end in itertools.pairwise([*cuts, len(self)]):
            items, owner = self.take(slice(start, end)).flat()
            pairs = np.sort(owner * size + items)
            repeated += int((pairs[1:] == pairs[:-1]).sum())
        return Repeats(repeated, int(np.maximum(self.lengths - 1, 0).sum()))

    def padded(self, length: int) -> tuple[Int[np.ndarray, "n length"], Bool[np.ndarray, "n length"]]:
        """The last `length` items of each history, right-padded with row 0, and where they are real."""
        if length < 1:
            raise SemidError(f"expected a length of at least 1 to pad to, got {length}")
        starts = np.maximum(self.starts, self.ends - length)
        source = starts[:, None] + np.arange(length)
        real = source < self.ends[:, None]
        rows = np.zeros(real.shape, np.int32)
        rows[real] = self.items[source[real]]
        return rows, real
