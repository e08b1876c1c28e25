"""What every generator of codes offers: to training, teacher-forced logits; to search, one step at a time."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float, Int, Key

# What all beams of a user share, a pytree of arrays [batch, ...]; never repeated per beam.
Context = Any
# What beams computed in earlier steps, a pytree of arrays [batch, beam of that step, ...]; never re-gathered.
Cache = Any


class Inputs(NamedTuple):
    """What stands at each position of a history. Absent inputs are None; a model adds up the others' embeddings.

    `mixtures`, one array a level, stand for the codes where given: a level's embedding is the mean under its mixture.
    """

    codes: Int[Array, "b t level"]
    dense: Float[Array, "b t feature"] | None = None
    ids: Int[Array, "b t"] | None = None
    mixtures: tuple[Float[Array, "b t size"], ...] | None = None


class Prefixes(NamedTuple):
    """The live beams of a search before `level` codes are chosen, best first.

    `ancestors[..., l]` is the place, among the beams that were live at step `l`, of the one this beam descends from:
    what step `l` left in the cache for a beam is found there.
    """

    codes: Int[Array, "batch beam level"]
    ancestors: Int[Array, "batch beam level"]

    @property
    def level(self) -> int:
        """The level whose codes come next."""
        return self.codes.shape[-1]


class Layout(enum.Enum):
    """How training histories lie in rows, and so what a model's teacher-forced logits are of."""

    PACKED = "packed"  # several histories a row; every position predicts the item after it
    CLOSED = "closed"  # packed, and behind each history its last target, which predicts nothing
    SINGLE = "single"  # one history a row, and one target


class CodeModel(Protocol):
    """A model of the next item's codes, level by level, given a history of items.

    Rows hold histories numbered by `segments` from 1, 0 being padding; no history sees another, and where padding
    stands changes nothing.
    """

    level_sizes: tuple[int, ...]
    layout: Layout

    def logits(
        self,
        inputs: Inputs,
        segments: Int[Array, "b t"],
        targets: Int[Array, "*n level"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*n size"], ...]:
        """Logits of every level given the codes before it, one array a level; `*n` is `b t`, or `b` for SINGLE.

        With a key, as in training: with dropout. What stands at positions without a target is undefined.
        """
        ...

    def read(self, inputs: Inputs, segments: Int[Array, "b t"]) -> Context:
        """What a search needs of rows of one history each."""
        ...

    def start(self, context: Context) -> Cache:
        """The cache before the first step."""
        ...

    def step(self, context: Context, cache: Cache, prefixes: Prefixes) -> tuple[Float[Array, "batch beam size"], Cache]:
        """Logits of the next level for every live beam, and the cache with what this step computed added to it."""
        ...
