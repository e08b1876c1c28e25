"""Transformer pieces that every model shares: attention with rotary positions, SwiGLU, dropout, the block stack."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key


@dataclass(frozen=True)
class TransformerConfig:
    """Width and depth of a stack of pre-norm blocks."""

    dim: int = 64
    """Width of the states."""
    layers: int = 2
    """Blocks."""
    heads: int = 2
    """Attention heads; dim / heads must be even."""
    hidden: int = 128
    """Width inside the SwiGLU (three matrices of dim x hidden)."""
    dropout: float = 0.2
    """Share of values dropped on the input and on each residual, in training."""

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} must divide into {self.heads} heads of even width; change dim or heads")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")


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
    """`n` keys for `n` dropouts; none of them a key without one."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def rotate(x: Float[Array, "b t heads width"], positions: Int[Array, "b t"]) -> Float[Array, "b t heads width"]:
    """Rotary position embedding (Su et al. 2021, RoFormer eq. 15), halves convention."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * rates[None, None, None, :]
    sin, cos = jnp.sin(angles).astype(x.dtype), jnp.cos(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Attention(nnx.Module):
    """Multi-head self-attention; with `positions`, queries and keys are rotated."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.heads = config.heads
        self.qkv = nnx.Linear(config.dim, 3 * config.dim, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(config.dim, config.dim, use_bias=False, rngs=rngs)

    def project(self, x: Float[Array, "*b dim"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each `[*b, heads, width]`."""
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        shape = (*x.shape[:-1], self.heads, -1)
        return q.reshape(shape), k.reshape(shape), v.reshape(shape)

    def __call__(
        self, x: Float[Array, "b t dim"], mask: Bool[Array, "b t t"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t dim"]:
        q, k, v = self.project(x)
        q, k = rotate(q, positions), rotate(k, positions)
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
        return self.out(mixed.reshape(x.shape))


class SwiGLU(nnx.Module):
    """Gated feed-forward layer (Shazeer 2020, eq. 6)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(config.dim, 2 * config.hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(config.hidden, config.dim, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        gate, value = jnp.split(self.up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * value)


class Block(nnx.Module):
    """Pre-norm block: attention and feed-forward, each with a residual and dropout."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout
        self.norm_attention = nnx.RMSNorm(config.dim, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm_feed = nnx.RMSNorm(config.dim, rngs=rngs)
        self.feed = SwiGLU(config, rngs=rngs)

    def residual(self, x: Array, mixed: Array, key: Key[Array, ""] | None) -> Array:
        """What follows attention: both residual additions, the feed-forward layer between them."""
        first, second = split_key(key, 2)
        x = x + dropout(mixed, self.rate, first)
        return x + dropout(self.feed(self.norm_feed(x)), self.rate, second)

    def __call__(self, x: Array, mask: Array, positions: Array, key: Key[Array, ""] | None) -> Array:
        return self.residual(x, self.attention(self.norm_attention(x), mask, positions), key)


class Backbone(nnx.Module):
    """A causal stack over packed rows: position `t` sees the positions before it in its own segment."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t dim"], segments: Int[Array, "b t"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "b t dim"]:
        """States at every position. `segments` numbers the histories of a row from 1; 0 is padding."""
        input_key, *block_keys = split_key(key, len(self.blocks) + 1)
        x = dropout(x, self.rate, input_key)
        mask, positions = causal_mask(segments), segment_positions(segments)
        for block, block_key in zip(self.blocks, block_keys, strict=True):
            x = block(x, mask, positions, block_key)
        return self.norm(x)


def causal_mask(segments: Int[Array, "b t"]) -> Bool[Array, "b t t"]:
    """True where query `t` may look at key `s`: same segment, not later. Padding sees padding, so no row is empty."""
    length = segments.shape[-1]
    same = segments[:, :, None] == segments[:, None, :]
    return same & jnp.tril(jnp.ones((length, length), bool))[None]


def segment_positions(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each entry within its segment, from 0."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[-1])[None], segments.shape)
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def last_state(states: Float[Array, "b t dim"], segments: Int[Array, "b t"]) -> Float[Array, "b dim"]:
    """The state at the last real position of right-padded rows that hold one history each."""
    last = jnp.maximum(jnp.sum(segments != 0, axis=1) - 1, 0)
    return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
