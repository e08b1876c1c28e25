"""Backbones: they read histories, packed into rows, by attention or by a state-space recurrence."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.attention import AttentionBias, KeyValue, attend_rows, rotate, segment_positions
from seq_models.conditions import TimeBias
from seq_models.layers import Attend, Block, Mixer, TransformerConfig, dropout, fused, norm, split_key
from seq_models.state_space import StateSpaceBlock, Within

# Deeper stacks are compiled as a loop over one block.
_UNROLLED = 6


@runtime_checkable
class Backbone(Protocol):
    """Reader of packed rows: the state at position `t` depends on its own segment up to `t`."""

    config: TransformerConfig

    def __call__(
        self,
        x: Float[Array, "b t dim"],
        segments: Int[Array, "b t"],
        *,
        times: TimeBias | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t dim"]:
        """States at every position. `segments` numbers the histories of a row from 1; 0 is padding. `times` is a bias
        by the time between items. Dropout is applied if there is a key."""
        ...


def build_backbone(config: TransformerConfig, *, rngs: nnx.Rngs) -> Backbone:
    """The backbone with the config's mixer."""
    return Transformer(config, rngs=rngs) if config.mixer is Mixer.ATTENTION else StateSpaceStack(config, rngs=rngs)


class Stack(nnx.Module):
    """Stack of blocks of one kind, with dropout before the first and a norm after the last."""

    def __init__(self, config: TransformerConfig, block: type[Any], *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.blocks = nnx.List([block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = norm(config, rngs)

    def begin(
        self, x: Float[Array, "b t dim"], key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "b t dim"], list[Key[Array, ""] | None]]:
        """The input of the first block, and the dropout keys of all blocks."""
        input_key, *keys = split_key(key, len(self.blocks) + 1)
        return dropout(x.astype(self.config.dtype.value), self.config.rate, input_key), keys

    def run(self, x: Float[Array, "b t dim"], context: Any, keys: list[Any]) -> tuple[Array, tuple]:
        """The states, and the second result of each block; `context` is an input of all blocks besides the states."""
        run = self._scanned if len(self.blocks) > _UNROLLED else self._unrolled
        x, kept = run(x, context, keys)
        return self.norm(x), kept

    def _unrolled(self, x: Array, context: Any, keys: list[Any]) -> tuple[Array, tuple]:
        kept = []
        for block, key in zip(self.blocks, keys, strict=True):
            x, of_block = self.config.remat(lambda x, block=block, key=key: block(x, context, key))(x)
            kept.append(of_block)
        return x, tuple(kept)

    def _scanned(self, x: Array, context: Any, keys: list[Any]) -> tuple[Array, tuple]:
        """`_unrolled` as a scan, so that one block is compiled; the blocks' parameters are stacked for this call."""
        graph, *_ = nnx.split(self.blocks[0])
        states = [nnx.split(block)[1] for block in self.blocks]
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *zip(states, keys, strict=True))

        def one(x: Array, layer: tuple[Any, Any]) -> tuple[Array, Any]:
            state, key = layer
            run = self.config.remat(lambda x, state: nnx.merge(graph, state)(x, context, key))
            return run(x, state)

        x, kept = jax.lax.scan(one, x, stacked)
        return x, tuple(jax.tree.map(lambda all_, at=at: all_[at], kept) for at in range(len(states)))


class Transformer(Stack):
    """Stack of attention blocks: a position sees its own segment, if `causal` only up to itself. Without `rotary`
    embeddings, causality is the only information on positions.

    Raises ValueError for a config of another mixer.
    """

    def __init__(self, config: TransformerConfig, *, causal: bool = True, rotary: bool = True, rngs: nnx.Rngs) -> None:
        if config.mixer is not Mixer.ATTENTION:
            raise ValueError(
                f"the mixer {config.mixer.value} is for models that decode an item from one state per history; "
                "take attention, or another model"
            )
        super().__init__(config, RelationBlock if config.relation else Block, rngs=rngs)
        self.causal, self.rotary = causal, rotary

    def __call__(
        self,
        x: Float[Array, "b t dim"],
        segments: Int[Array, "b t"],
        *,
        times: TimeBias | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t dim"]:
        """States at every position; the bias by `times` is added to the attention scores of every block."""
        return self.read(x, segments, times=times, key=key)[0]

    def read(
        self,
        x: Float[Array, "b t dim"],
        segments: Int[Array, "b t"],
        *,
        times: TimeBias | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t dim"], tuple[KeyValue, ...]]:
        """The states, and the keys and values of each block."""
        (x, keys), config, bias = self.begin(x, key), self.config, None if times is None else times.between
        width = config.dim // config.heads
        attend = attend_within(segments, causal=self.causal, rotary=width if self.rotary else 0, bias=bias)
        if not config.relation:
            return self.run(x, attend, keys)
        return self.run(x, Related(attend, _means(x, segments, causal=self.causal, heads=config.heads)), keys)


def attend_within(
    segments: Int[Array, "b t"], *, causal: bool, rotary: int | None = None, bias: AttentionBias | None = None
) -> Attend:
    """Attention function for packed rows, which also returns the rotated keys. A `bias` is added to the scores.

    The first `rotary` dimensions of a head (None: all; 0: none) are rotated by positions within segments.
    """
    positions = segment_positions(segments)

    def rotated(x: Array) -> Array:
        if rotary is None or rotary == x.shape[-1]:
            return rotate(x, positions)
        return jnp.concatenate([rotate(x[..., :rotary], positions), x[..., rotary:]], axis=-1) if rotary else x

    def attend(q: Array, kv: KeyValue) -> tuple[Array, KeyValue]:
        q, kv = rotated(q), KeyValue(rotated(kv.keys), kv.values)
        return attend_rows(q, kv, segments, causal=causal, bias=bias), kv

    return attend


class Related(NamedTuple):
    """Attention function with the user vector of each position, for blocks with a relation term."""

    attend: Attend
    users: Float[Array, "b t dim"]

    def __call__(self, q: Array, kv: KeyValue) -> tuple[Array, KeyValue]:
        """The attended values, and the keys and values to keep."""
        return self.attend(q, kv)


class RelationBlock(Block):
    """A block whose attention has MMGRec's relation term (arXiv 2404.16555): scores
    `(q k + (s_q q') (s_k k')) / sqrt(width)` and values `v + s_v v'`, with scales `s` that are linear in the user.

    The user vector is the mean of the history that a position sees, so that new users have one; in MMGRec, it is
    learned.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        kv_heads = config.kv_heads or config.heads
        outputs = (config.heads // kv_heads + 2, kv_heads, config.dim // config.heads)
        self.relation_qkv = fused(config, config.dim, outputs, rngs)
        self.scale_qkv = fused(config, config.dim, outputs, rngs)

    def mix(self, x: Array, attend: Any, key: Key[Array, ""] | None) -> tuple[Array, KeyValue]:
        """The first half of the block. Both products of a head are one product of twice the width."""
        normed = self.norm_attention(x)
        q, (keys, values) = self.attention.project(normed)
        related = self.relation_qkv(normed) * self.scale_qkv(attend.users)
        of_q, (of_keys, of_values) = self.attention.split(related)
        values = values + of_values
        kv = KeyValue(
            jnp.concatenate([keys, of_keys], axis=-1), jnp.concatenate([values, jnp.zeros_like(values)], axis=-1)
        )
        # Attention divides by the square root of the doubled width.
        heads, kept = attend(math.sqrt(2) * jnp.concatenate([q, of_q], axis=-1), kv)
        return x + dropout(self.attention.merge(heads[..., : q.shape[-1]]), self.rate, key), kept


def _means(
    x: Float[Array, "b t dim"], segments: Int[Array, "b t"], *, causal: bool, heads: int
) -> Float[Array, "b t dim"]:
    """Mean of what each position sees of its segment, by attention with equal weights."""
    values = x.reshape(*x.shape[:2], heads, -1)
    nothing = jnp.zeros_like(values)
    return attend_rows(nothing, KeyValue(nothing, values), segments, causal=causal).reshape(x.shape)


class StateSpaceStack(Stack):
    """Blocks of a state-space recurrence, which reads a segment up to each position."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, StateSpaceBlock, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t dim"],
        segments: Int[Array, "b t"],
        *,
        times: TimeBias | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t dim"]:
        """States at every position; `times` since the items before change the decays of every block."""
        x, keys = self.begin(x, key)
        return self.run(x, Within(segments, None if times is None else times.before()), keys)[0]
