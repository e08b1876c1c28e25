"""Transformer layers shared by all models: attention projections, SwiGLU, dropout, and the block."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.attention import KeyValue


class Precision(enum.Enum):
    """Dtype of matrix products. Parameters, norms, softmax and logits are always float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(enum.Enum):
    """Values that the backward pass recomputes instead of storing them: less memory, more time."""

    NOTHING = "nothing"
    DOTS = "dots"
    """All values of a block but the products with its matrices."""
    FULL = "full"
    """All values of a block but its input."""

    @classmethod
    def _missing_(cls, value: object) -> Remat | None:
        """Members for the booleans of older configs."""
        return {True: cls.FULL, False: cls.NOTHING}[value] if isinstance(value, bool) else None

    @property
    def stored(self) -> bool | str:
        """The value in stored configs: a boolean where older configs had one, so that their digests still match."""
        return self.value if self is Remat.DOTS else self is Remat.FULL

    def __call__(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, the forward pass of a block, with the chosen rematerialization."""
        if self is Remat.NOTHING:
            return run
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(run, policy=dots if self is Remat.DOTS else None)


class Mixer(enum.Enum):
    """Layer by which a position of a history reads the positions before it."""

    ATTENTION = "attention"
    STATE_SPACE = "state-space"
    """A recurrence with input-dependent decays, in time linear in the length (`seq_models.state_space`)."""


@dataclass(frozen=True)
class TransformerConfig:
    """Width and depth of a stack of pre-norm blocks."""

    dim: int = 64
    """Width of the states."""
    layers: int = 2
    """Blocks."""
    heads: int = 2
    """Attention heads; dim / heads must be even."""
    kv_heads: int | None = None
    """Heads of keys and values, each shared by a group of query heads; by default as many as heads."""
    hidden: int = 128
    """Width inside the SwiGLU (three matrices of dim x hidden)."""
    dropout: float | None = 0.2
    """Dropout on the input and on each residual. None: 0.1, or the trainer's choice by the data (`semid train`: 0.3
    below 10,000 training interactions)."""
    dtype: Precision = Precision.FLOAT32
    """Dtype of matrix products."""
    remat: Remat = Remat.NOTHING
    """Values that the backward pass recomputes instead of storing them, for less memory and more time: none, all of a
    block but its products with matrices (dots), or all of a block (full)."""
    # "later": added after configs were stored, which omit these fields at their defaults.
    mixer: Mixer = field(default=Mixer.ATTENTION, metadata={"later": True})
    """How positions of a history read those before them: attention or, for models that decode an item from one state, a
    state-space recurrence (after MMM4Rec, arXiv 2506.02916)."""
    state_size: int = field(default=64, metadata={"later": True})
    """State size of the recurrence per dimension (state-space only)."""
    relation: bool = field(default=False, metadata={"later": True})
    """Add MMGRec's relation term to attention (arXiv 2404.16555): a second product of queries and keys, and second
    values, scaled by the mean of the history."""

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "hidden", "state_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} must divide into {self.heads} heads of even width; change dim or heads")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"heads {self.heads} must divide among kv_heads {self.kv_heads}; change either")
        if self.relation and self.mixer is not Mixer.ATTENTION:
            raise ValueError("relation is a term of attention; leave it out, or the state-space mixer")
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")

    @property
    def rate(self) -> float:
        """The dropout rate; 0.1 if the config sets none."""
        return 0.1 if self.dropout is None else self.dropout


def dropout(x: Float[Array, "*b dim"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*b dim"]:
    """Zero a share `rate` of `x` and rescale the rest; the identity without a key, as in evaluation.

    The rate is rounded to 1/256, so that one random 32-bit number serves four values: on a CPU, most of the cost of
    dropout is generating random bits.
    """
    keep = max(round((1.0 - rate) * 256), 1)
    if key is None or keep == 256:
        return x
    words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(bits < keep, x * (256 / keep), jnp.zeros_like(x))


def split_key(key: Key[Array, ""] | None, n: int) -> list[Key[Array, ""] | None]:
    """Split a key for `n` dropouts; without a key, `n` times None."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def products(x: Float[Array, "*b dim"], table: Float[Array, "n dim"], dtype: Precision) -> Float[Array, "*b n"]:
    """Logits: inner products with every row of `table`, multiplied in `dtype` and summed in float32."""
    x, table = x.astype(dtype.value), table.astype(dtype.value)
    return jnp.matmul(x, table.T, preferred_element_type=jnp.float32)


def unit(x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
    """Vectors scaled to length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Root-mean-square norm, computed in float32."""
    return nnx.RMSNorm(config.dim, dtype=jnp.float32, rngs=rngs)


@runtime_checkable
class HasPrecision(Protocol):
    """A config with the dtype of matrix products."""

    @property
    def dtype(self) -> Precision: ...


def linear(config: HasPrecision, inputs: int, outputs: int, rngs: nnx.Rngs, *, bias: bool = False) -> nnx.Linear:
    """A linear layer with float32 parameters, multiplied in the config's dtype."""
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=config.dtype.value, rngs=rngs)


def fused(config: HasPrecision, inputs: int, outputs: tuple[int, ...], rngs: nnx.Rngs) -> nnx.LinearGeneral:
    """Several matrices with the same input as one layer; the first axis of `outputs` numbers them.

    The outputs keep separate axes, so that each matrix can be sharded.
    """
    return nnx.LinearGeneral(inputs, outputs, use_bias=False, dtype=config.dtype.value, rngs=rngs)


class Attention(nnx.Module):
    """Projections of self-attention; the attention itself is the caller's."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        kv_heads = config.kv_heads or config.heads
        self.group, width = config.heads // kv_heads, config.dim // config.heads
        self.qkv = fused(config, config.dim, (self.group + 2, kv_heads, width), rngs)
        self.out = linear(config, config.dim, config.dim, rngs)

    def project(self, x: Float[Array, "*b dim"]) -> tuple[Float[Array, "*b heads width"], KeyValue]:
        """Queries, and keys and values."""
        return self.split(self.qkv(x))

    def split(self, qkv: Float[Array, "*b n kv_heads width"]) -> tuple[Float[Array, "*b heads width"], KeyValue]:
        """Split fused projections into queries, and keys and values."""
        q, k, v = jnp.split(qkv, [self.group, self.group + 1], axis=-3)
        q = jnp.swapaxes(q, -3, -2)  # the heads of a group become adjacent
        return q.reshape((*qkv.shape[:-3], -1, q.shape[-1])), KeyValue(k[..., 0, :, :], v[..., 0, :, :])

    def merge(self, heads: Float[Array, "*b heads width"]) -> Float[Array, "*b dim"]:
        """The heads' outputs, projected to the width of the states."""
        return self.out(heads.reshape((*heads.shape[:-2], -1)))


class SwiGLU(nnx.Module):
    """Gated feed-forward layer (Shazeer 2020, eq. 6)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.up = fused(config, config.dim, (2, config.hidden), rngs)
        self.down = linear(config, config.hidden, config.dim, rngs)

    def __call__(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        gate, value = jnp.moveaxis(self.up(x), -2, 0)
        return self.down(jax.nn.silu(gate) * value)


# Attention of a block: maps queries, keys and values to the attended values, and the keys and values to cache.
Attend = Callable[[Array, KeyValue], tuple[Array, KeyValue]]


class Block(nnx.Module):
    """Pre-norm block: attention and feed-forward, each with a residual and dropout."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.rate = config.rate
        self.norm_attention = norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm_feed = norm(config, rngs)
        self.feed = SwiGLU(config, rngs=rngs)

    def mix(self, x: Array, attend: Attend, key: Key[Array, ""] | None) -> tuple[Array, KeyValue]:
        """The first half, attention: the states, and the keys and values to cache."""
        heads, kept = attend(*self.attention.project(self.norm_attention(x)))
        return x + dropout(self.attention.merge(heads), self.rate, key), kept

    def feed_forward(self, x: Array, key: Key[Array, ""] | None) -> Array:
        """The second half, the feed-forward layer."""
        return x + dropout(self.feed(self.norm_feed(x)), self.rate, key)

    def __call__(self, x: Array, attend: Attend, key: Key[Array, ""] | None) -> tuple[Array, KeyValue]:
        first, second = split_key(key, 2)
        x, kept = self.mix(x, attend, first)
        return self.feed_forward(x, second), kept


def last_state(states: Float[Array, "b t dim"], segments: Int[Array, "b t"]) -> Float[Array, "b dim"]:
    """The state at the last real position of rows with one history each, which may be padded on either side."""
    index = jnp.arange(segments.shape[1])[None]
    last = jnp.max(jnp.where(segments != 0, index, 0), axis=1)
    return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
