"""RQ-Transformer (Lee et al., CVPR 2022): one position per item, and a small causal decoder over its levels.

The backbone reads a history with each item as one position, the sum of its code embeddings. The depth decoder writes
the codes of the next item level by level, conditioned on the backbone's state: for level `l` its input is
`state + sum_{j<l} e_j(c_j) + p_l` (eq. 9 there, with the state added at every level rather than at the first alone).
In search the backbone runs once per user and only the depth decoder once per beam and level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.layers import Backbone, Block, TransformerConfig, dropout, last_state


@dataclass(frozen=True)
class RQTransformerConfig:
    """The backbone's size, the depth decoder's, and whether output heads are the input tables."""

    backbone: TransformerConfig = TransformerConfig()
    depth_layers: int = 1
    depth_dropout: float = 0.1
    tied_heads: bool = True
    id_embedding: bool = False
    """Add a learned embedding of the item's row to the input. A hybrid: it knows nothing of new items."""


class Inputs(NamedTuple):
    """What stands at each position of a history. Absent inputs are None."""

    codes: Int[Array, "b t level"]
    dense: Float[Array, "b t feature"] | None = None
    ids: Int[Array, "b t"] | None = None


class DepthCache(NamedTuple):
    """A beam's own state: the sum of its code embeddings, and keys and values of its levels, one entry a layer."""

    summed: Float[Array, "batch beam dim"]
    keys: tuple[Float[Array, "batch beam level heads width"], ...]
    values: tuple[Float[Array, "batch beam level heads width"], ...]


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
        depth = TransformerConfig(
            dim, config.depth_layers, config.backbone.heads, config.backbone.hidden, config.depth_dropout
        )
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
        x = sum(table(inputs.codes[..., level]) for level, table in enumerate(self.tables))
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
        """Teacher-forced logits of every level given the codes before it; one array a level."""
        embedded = jnp.stack([table(codes[:, level]) for level, table in enumerate(self.tables)], axis=1)
        before = jnp.cumsum(embedded, axis=1) - embedded
        x = states[:, None, :] + before + self.levels.embedding[...][None]
        keys = [None] * (len(self.depth) + 1) if key is None else list(jax.random.split(key, len(self.depth) + 1))
        x = dropout(x, self.rate, keys[0])
        for block, block_key in zip(self.depth, keys[1:], strict=True):
            q, k, v = block.attention.project(block.norm_attention(x))
            mixed = jnp.stack([_attend(q[:, at], k[:, : at + 1], v[:, : at + 1]) for at in range(x.shape[1])], axis=1)
            x = block.residual(x, block.attention.out(mixed), block_key)
        x = self.norm(x)
        return tuple(self._head(x[:, level], level) for level in range(len(self.level_sizes)))

    def start(self, states: Float[Array, "batch dim"]) -> DepthCache:
        """The cache of one empty beam per user."""
        batch, dim = states.shape
        heads = self.depth[0].attention.heads if len(self.depth) else 1
        empty = jnp.zeros((batch, 1, 0, heads, dim // heads), states.dtype)
        none_yet = (empty,) * len(self.depth)
        return DepthCache(jnp.zeros((batch, 1, dim), states.dtype), none_yet, none_yet)

    def step(
        self, states: Float[Array, "batch dim"], cache: DepthCache, codes: Int[Array, "batch beam"] | None, level: int
    ) -> tuple[Float[Array, "batch beam size"], DepthCache]:
        """Logits of `level` for every beam, whose code at the level before was `codes` (None at the first)."""
        summed = cache.summed if codes is None else cache.summed + self.tables[level - 1](codes)
        x = states[:, None, :] + summed + self.levels.embedding[level][None, None, :]
        keys, values = [], []
        for index, block in enumerate(self.depth):
            q, k, v = block.attention.project(block.norm_attention(x))
            keys.append(jnp.concatenate([cache.keys[index], k[:, :, None]], axis=2))
            values.append(jnp.concatenate([cache.values[index], v[:, :, None]], axis=2))
            x = block.residual(x, block.attention.out(_attend(q, keys[-1], values[-1])), None)
        return self._head(self.norm(x), level), DepthCache(summed, tuple(keys), tuple(values))

    def _head(self, x: Float[Array, "*b dim"], level: int) -> Float[Array, "*b size"]:
        table = self.tables[level] if self.heads is None else self.heads[level]
        scores = table.attend(x)
        return scores + self.biases[level][...].reshape((1,) * (scores.ndim - 1) + (-1,))


def _attend(
    q: Float[Array, "*b heads width"], k: Float[Array, "*b level heads width"], v: Float[Array, "*b level heads width"]
) -> Float[Array, "*b dim"]:
    """One query over a handful of levels, by sums of products: XLA fuses them, and would not fuse tiny matmuls."""
    scores = jnp.sum(q[..., None, :, :] * k, axis=-1, keepdims=True) * (q.shape[-1] ** -0.5)
    mixed = jnp.sum(jax.nn.softmax(scores, axis=-3) * v, axis=-3)
    return mixed.reshape((*mixed.shape[:-2], -1))
