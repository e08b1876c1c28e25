"""Further code sequences of a history's items, e.g. one per modality, as inputs next to the codes."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.attention import segment_begins

# Codes of items, one array [..., level] per sequence; -1 if the item has none.
Sequences = tuple[Int[Array, "*n _"], ...]


@dataclass(frozen=True)
class SequenceSizes:
    """Sizes of an item's further code sequences."""

    level_sizes: tuple[tuple[int, ...], ...]
    """Codebook sizes of each sequence."""
    drop: float = 0.1
    """Share of the histories for which training drops a sequence, independently for each sequence."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"expected drop in [0, 1), got {self.drop}")
        if not all(sizes and min(sizes) > 0 for sizes in self.level_sizes):
            raise ValueError(f"expected sizes of 1 or more, of one or more levels, got {self.level_sizes}")


class SequenceEncoder(nnx.Module):
    """Embeddings of items by further code sequences, such as those of their images (MSCGRec, arXiv 2602.03713).

    A sequence is the sum of its codes' embeddings or, if missing, a learned embedding; an item is the sum of its
    sequences, so that it keeps one position. All embeddings are initialized to zero: a new model ignores the sequences.
    """

    def __init__(self, sizes: SequenceSizes, dim: int, *, rngs: nnx.Rngs) -> None:
        zeros = nnx.initializers.zeros_init()
        self.drop_share = sizes.drop
        # One table per sequence: the embedding of a missing sequence, then those of every level's codes.
        self.starts = tuple(tuple(itertools.accumulate(levels[:-1], initial=1)) for levels in sizes.level_sizes)
        self.tables = nnx.List(
            [nnx.Embed(1 + sum(levels), dim, embedding_init=zeros, rngs=rngs) for levels in sizes.level_sizes]
        )

    def __call__(self, sequences: Sequences | None) -> Float[Array, "b t dim"]:
        """Embeddings of positions. Raises ValueError for another number of sequences than configured."""
        if sequences is None or len(sequences) != len(self.starts):
            got = "none" if sequences is None else len(sequences)
            raise ValueError(f"the model reads {len(self.starts)} further code sequences of every item, got {got}")
        parts = [
            self._one(table, codes, starts)
            for table, codes, starts in zip(self.tables, sequences, self.starts, strict=True)
        ]
        return functools.reduce(jnp.add, parts)

    def drop(self, sequences: Sequences, segments: Int[Array, "b t"], key: Key[Array, ""] | None) -> Sequences:
        """Drop each sequence in a random share of the histories of a training step; without a key, change nothing.

        `segments` distinguish the histories of a row by any numbers.
        """
        if key is None or not self.drop_share:
            return sequences
        shape = (len(sequences), segments.shape[0], segments.shape[1] + 1)
        dropped = jax.random.bernoulli(key, self.drop_share, shape)
        nth = jnp.cumsum(segment_begins(segments), axis=1, dtype=jnp.int32)  # number of the segment in its row, from 1
        dropped = jnp.take_along_axis(dropped, jnp.broadcast_to(nth[None], (len(sequences), *nth.shape)), axis=2)
        return tuple(jnp.where(mask[..., None], -1, codes) for mask, codes in zip(dropped, sequences, strict=True))

    @staticmethod
    def _one(table: nnx.Embed, codes: Int[Array, "b t level"], starts: tuple[int, ...]) -> Float[Array, "b t dim"]:
        there = codes[..., :1] >= 0
        at = jnp.maximum(codes, 0) + jnp.asarray(starts, codes.dtype).reshape((1,) * (codes.ndim - 1) + (-1,))
        summed = jnp.sum(table(at), axis=-2)
        return jnp.where(there, summed, table(jnp.zeros_like(codes[..., 0])))
