"""Transformer pieces that every model shares: projections of attention, SwiGLU, dropout, the block and its stack."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.attention import AttentionBias, KeyValue, attend_rows, rotate, segment_positions

# More blocks than this are compiled as one, in a loop.
_UNROLLED = 6


class Precision(enum.Enum):
    """Number format in which matrices are multiplied. Parameters, norms, softmax and logits are float32 in any case."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(enum.Enum):
    """Values that the backward pass computes again instead of keeping them: less memory, more time."""

    NOTHING = "nothing"
    DOTS = "dots"
    """Of each block all but the products with its matrices."""
    FULL = "full"
    """Each block, but for its input."""

    @classmethod
    def _missing_(cls, value: object) -> Remat | None:
        """Configs once said yes or no."""
        return {True: cls.FULL, False: cls.NOTHING}[value] if isinstance(value, bool) else None

    @property
    def stored(self) -> bool | str:
        """The value in stored configs: yes or no as before, so that what was made before is of the same settings."""
        return self.value if self is Remat.DOTS else self is Remat.FULL

    def __call__(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, a block's pass, computed again as this says."""
        if self is Remat.NOTHING:
            return run
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(run, policy=dots if self is Remat.DOTS else None)


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
    """Share of values dropped on the input and on each residual, in training. None: 0.1, or what whoever trains chooses
    by the data (`semid train`: 0.3 below 10,000 training interactions)."""
    dtype: Precision = Precision.FLOAT32
    """Number format in which matrices are multiplied."""
    remat: Remat = Remat.NOTHING
    """Values that the backward pass computes again instead of keeping them: nothing, of each block all but its
    products with matrices (dots), or each block (full): less memory, more time."""

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} must divide into {self.heads} heads of even width; change dim or heads")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"heads {self.heads} must divide among kv_heads {self.kv_heads}; change either")
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")

    @property
    def rate(self) -> float:
        """Dropout, 0.1 where none is named."""
        return 0.1 if self.dropout is None else self.dropout


def dropout(x: Float[Array, "*b dim"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*b dim"]:
    """Zero a share `rate` of `x` and rescale the rest; the identity without a key (that is: in evaluation).

    The rate is rounded to 1/256, so that one 32-bit draw serves four values: the generator of random bits, not the
    arithmetic, is what dropout costs on a CPU.
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
    """Inner products with every row of `table`, multiplied in `dtype`, summed in float32: logits."""
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
    """A config that states the precision of matrix products."""

    @property
    def dtype(self) -> Precision: ...


def linear(config: HasPrecision, inputs: int, outputs: int, rngs: nnx.Rngs, *, bias: bool = False) -> nnx.Linear:
    """A matrix with float32 parameters, multiplied in the config's dtype."""
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=config.dtype.value, rngs=rngs)


def fused(config: HasPrecision, inputs: int, outputs: tuple[int, ...], rngs: nnx.Rngs) -> nnx.LinearGeneral:
    """Matrices of the same input as one, the first axis of `outputs` telling them apart.

    Their outputs have axes of their own, so that devices may share each of the matrices.
    """
    return nnx.LinearGeneral(inputs, outputs, use_bias=False, dtype=config.dtype.value, rngs=rngs)


class Attention(nnx.Module):
    """Projections of self-attention; the caller attends."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        kv_heads = config.kv_heads or config.heads
        self.group, width = config.heads // kv_heads, config.dim // config.heads
        self.qkv = fused(config, config.dim, (self.group + 2, kv_heads, width), rngs)
        self.out = linear(config, config.dim, config.dim, rngs)

    def project(self, x: Float[Array, "*b dim"]) -> tuple[Float[Array, "*b heads width"], KeyValue]:
        """Queries, and keys and values."""
        q, k, v = jnp.split(self.qkv(x), [self.group, self.group + 1], axis=-3)
        q = jnp.swapaxes(q, -3, -2)  # to the heads of a group side by side
        return q.reshape((*x.shape[:-1], -1, q.shape[-1])), KeyValue(k[..., 0, :, :], v[..., 0, :, :])

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


# From queries, keys and values to the attended values, and the keys and values to keep.
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
        """The first half: states with what they attended to, and the keys and values to keep."""
        heads, kept = attend(*self.attention.project(self.norm_attention(x)))
        return x + dropout(self.attention.merge(heads), self.rate, key), kept

    def feed_forward(self, x: Array, key: Key[Array, ""] | None) -> Array:
        """The second half."""
        return x + dropout(self.feed(self.norm_feed(x)), self.rate, key)

    def __call__(self, x: Array, attend: Attend, key: Key[Array, ""] | None) -> tuple[Array, KeyValue]:
        first, second = split_key(key, 2)
        x, kept = self.mix(x, attend, first)
        return self.feed_forward(x, second), kept


def attend_within(
    segments: Int[Array, "b t"], *, causal: bool, rotary: bool = True, bias: AttentionBias | None = None
) -> Attend:
    """Attention of packed rows, with rotary positions within segments if asked; keeps the rotated keys. A `bias` is
    added to the scores."""
    positions = segment_positions(segments)

    def attend(q: Array, kv: KeyValue) -> tuple[Array, KeyValue]:
        if rotary:
            q, kv = rotate(q, positions), KeyValue(rotate(kv.keys, positions), kv.values)
        return attend_rows(q, kv, segments, causal=causal, bias=bias), kv

    return attend


class Backbone(nnx.Module):
    """Stack of blocks over packed rows: position `t` sees its own segment; causal: no later position of it. Without
    `rotary` it knows no positions but by that."""

    def __init__(self, config: TransformerConfig, *, causal: bool = True, rotary: bool = True, rngs: nnx.Rngs) -> None:
        self.config, self.causal, self.rotary = config, causal, rotary
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = norm(config, rngs)

    def __call__(
        self,
        x: Float[Array, "b t dim"],
        segments: Int[Array, "b t"],
        *,
        bias: AttentionBias | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t dim"]:
        """States at every position. `segments` numbers the histories of a row from 1; 0 is padding. A `bias` is added
        to the scores of attention in every block."""
        return self.read(x, segments, bias=bias, key=key)[0]

    def read(
        self,
        x: Float[Array, "b t dim"],
        segments: Int[Array, "b t"],
        *,
        bias: AttentionBias | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t dim"], tuple[KeyValue, ...]]:
        """The states, and the keys and values of each block."""
        input_key, *keys = split_key(key, len(self.blocks) + 1)
        x = dropout(x.astype(self.config.dtype.value), self.config.rate, input_key)
        run = self._scanned if len(self.blocks) > _UNROLLED else self._unrolled
        x, kept = run(x, attend_within(segments, causal=self.causal, rotary=self.rotary, bias=bias), keys)
        return self.norm(x), kept

    def _unrolled(self, x: Array, attend: Attend, keys: list[Any]) -> tuple[Array, tuple[KeyValue, ...]]:
        kept = []
        for block, key in zip(self.blocks, keys, strict=True):
            x, kv = self.config.remat(functools.partial(block, attend=attend, key=key))(x)
            kept.append(kv)
        return x, tuple(kept)

    def _scanned(self, x: Array, attend: Attend, keys: list[Any]) -> tuple[Array, tuple[KeyValue, ...]]:
        """The same by a loop over the blocks' parameters, stacked in the step alone: one block is compiled."""
        graph, *_ = nnx.split(self.blocks[0])
        states = [nnx.split(block)[1] for block in self.blocks]
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *zip(states, keys, strict=True))

        def one(x: Array, layer: tuple[Any, Any]) -> tuple[Array, KeyValue]:
            state, key = layer
            run = self.config.remat(lambda x, state: nnx.merge(graph, state)(x, attend, key))
            return run(x, state)

        x, kept = jax.lax.scan(one, x, stacked)
        return x, tuple(jax.tree.map(lambda all_, at=at: all_[at], kept) for at in range(len(states)))


def last_state(states: Float[Array, "b t dim"], segments: Int[Array, "b t"]) -> Float[Array, "b dim"]:
    """The state at the last real position of rows that hold one history each, padded on either side."""
    index = jnp.arange(segments.shape[1])[None]
    last = jnp.max(jnp.where(segments != 0, index, 0), axis=1)
    return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
