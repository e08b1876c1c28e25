"""RQ-Transformer (Lee et al., CVPR 2022): one position per item, and a small causal decoder over its levels.

The backbone reads a history with each item as one position, the sum of its code embeddings. The depth decoder writes
the codes of the next item level by level, conditioned on the backbone's state: for level `l` its input is
`state + sum_{j<l} e_j(c_j) + p_l` (eq. 9 there, with the state added at every level rather than at the first alone).
In search the backbone runs once per user and only the depth decoder once per beam and level.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.layers import Backbone, Block, TransformerConfig, dropout, last_state, split_key


@dataclass(frozen=True)
class RQTransformerConfig:
    """The backbone's size, the depth decoder's, and whether output heads are the input tables."""

    backbone: TransformerConfig = TransformerConfig(dropout=0.1)
    """Reads the history."""
    depth_layers: int = 1
    """Blocks of the depth decoder, which has the backbone's width."""
    depth_dropout: float = 0.0
    """Dropout in the depth decoder."""
    tied_heads: bool = True
    """Score a level's codes by the embeddings that the input uses; if not, by tables of their own."""
    id_embedding: bool = False
    """Add a learned embedding of the item's row to the input. A hybrid: it knows nothing of new items."""

    def __post_init__(self) -> None:
        if self.depth_layers < 0:
            raise ValueError(f"expected depth_layers of at least 0, got {self.depth_layers}")
        if not 0.0 <= self.depth_dropout < 1.0:
            raise ValueError(f"depth_dropout {self.depth_dropout} must lie in [0, 1)")


class Inputs(NamedTuple):
    """What stands at each position of a history. Absent inputs are None."""

    codes: Int[Array, "b t level"]
    dense: Float[Array, "b t feature"] | None = None
    ids: Int[Array, "b t"] | None = None


class Past(NamedTuple):
    """What one block of the depth decoder attends to: keys and values, one array for each level so far."""

    keys: tuple[Float[Array, "*b heads width"], ...]
    values: tuple[Float[Array, "*b heads width"], ...]


class DepthCache(NamedTuple):
    """A beam's own state: the sum of its code embeddings, and the past of every block."""

    summed: Float[Array, "batch beam dim"]
    past: tuple[Past, ...]


class RQTransformer(nnx.Module):
    """Autoregressive model of the next item's codes given a history of items.

    `level_sizes` are the codebook sizes; `num_features` is the width of the dense input (0: none); `num_ids` the
    number of ids when the config asks for an id embedding.
    """

    def __init__(
        self,
        config: RQTransformerConfig,
        *,
        level_sizes: tuple[int, ...],
        num_features: int = 0,
        num_ids: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        dim, self.level_sizes = config.backbone.dim, tuple(level_sizes)
        self.rate = config.depth_dropout
        init = nnx.initializers.normal(dim**-0.5)
        self.tables = nnx.List([nnx.Embed(size, dim, embedding_init=init, rngs=rngs) for size in level_sizes])
        self.project = nnx.Linear(num_features, dim, rngs=rngs) if num_features else None
        self.ids = nnx.Embed(num_ids, dim, embedding_init=init, rngs=rngs) if config.id_embedding else None
        self.backbone = Backbone(config.backbone, rngs=rngs)
        depth = replace(config.backbone, dropout=config.depth_dropout)
        self.levels = nnx.Embed(len(level_sizes), dim, embedding_init=init, rngs=rngs)
        self.depth = nnx.List([Block(depth, rngs=rngs) for _ in range(config.depth_layers)])
        self.norm = nnx.RMSNorm(dim, rngs=rngs)
        self.heads = (
            None
            if config.tied_heads
            else nnx.List([nnx.Embed(size, dim, embedding_init=init, rngs=rngs) for size in level_sizes])
        )
        self.biases = nnx.List([nnx.Param(jnp.zeros((size,))) for size in level_sizes])

    def states(
        self, inputs: Inputs, segments: Int[Array, "b t"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "b t dim"]:
        """Backbone states: entry `t` has read positions up to and including `t` of its segment."""
        embedded = [table(inputs.codes[..., level]) for level, table in enumerate(self.tables)]
        x = functools.reduce(jnp.add, embedded)
        if self.project is not None and inputs.dense is not None:
            x = x + self.project(inputs.dense)
        if self.ids is not None and inputs.ids is not None:
            x = x + self.ids(inputs.ids)
        return self.backbone(x, segments, key=key)

    def read(self, inputs: Inputs, segments: Int[Array, "b t"]) -> Float[Array, "b dim"]:
        """The state after each history, for right-padded rows with one history each."""
        return last_state(self.states(inputs, segments), segments)

    def logits(
        self, states: Float[Array, "n dim"], codes: Int[Array, "n level"], *, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "n size"], ...]:
        """Teacher-forced logits of every level given the codes before it; one array a level.

        Level by level, as in search: on a CPU that is faster than one array of all levels, whose copies it saves.
        """
        summed, past, logits = states, self._no_past(), []
        for level, level_key in enumerate(split_key(key, len(self.level_sizes))):
            x, past = self._decode(summed, level, past, level_key)
            logits.append(self._head(x, level))
            summed = summed + self.tables[level](codes[:, level])
        return tuple(logits)

    def start(self, states: Float[Array, "batch dim"]) -> DepthCache:
        """The cache of one empty beam per user."""
        return DepthCache(jnp.zeros_like(states)[:, None, :], self._no_past())

    def step(
        self, states: Float[Array, "batch dim"], cache: DepthCache, codes: Int[Array, "batch beam"] | None, level: int
    ) -> tuple[Float[Array, "batch beam size"], DepthCache]:
        """Logits of `level` for every beam, whose code at the level before was `codes` (None at the first)."""
        summed = cache.summed if codes is None else cache.summed + self.tables[level - 1](codes)
        x, past = self._decode(states[:, None, :] + summed, level, cache.past, None)
        return self._head(x, level), DepthCache(summed, past)

    def _no_past(self) -> tuple[Past, ...]:
        return (Past((), ()),) * len(self.depth)

    def _decode(
        self, x: Float[Array, "*b dim"], level: int, past: tuple[Past, ...], key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "*b dim"], tuple[Past, ...]]:
        """The depth decoder's output at `level`, and the past with this level's keys and values added."""
        input_key, *block_keys = split_key(key, len(self.depth) + 1)
        x = dropout(x + _spread(self.levels.embedding[level], x.ndim), self.rate, input_key)
        grown = []
        for block, before, block_key in zip(self.depth, past, block_keys, strict=True):
            q, k, v = block.attention.project(block.norm_attention(x))
            grown.append(Past((*before.keys, k), (*before.values, v)))
            x = block.residual(x, block.attention.out(_attend(q, grown[-1])), block_key)
        return self.norm(x), tuple(grown)

    def _head(self, x: Float[Array, "*b dim"], level: int) -> Float[Array, "*b size"]:
        table = self.tables[level] if self.heads is None else self.heads[level]
        return table.attend(x) + _spread(self.biases[level][...], x.ndim)


def _spread(vector: Float[Array, " dim"], ndim: int) -> Float[Array, "*b dim"]:
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def _attend(q: Float[Array, "*b heads width"], past: Past) -> Float[Array, "*b dim"]:
    """One query over a handful of levels, by sums of products: XLA fuses them, and would not fuse tiny matmuls."""
    scores = jnp.stack([jnp.sum(q * k, axis=-1) for k in past.keys]) * (q.shape[-1] ** -0.5)
    shares = jax.nn.softmax(scores, axis=0)
    mixed = functools.reduce(jnp.add, [share[..., None] * v for share, v in zip(shares, past.values, strict=True)])
    return mixed.reshape((*mixed.shape[:-2], -1))
