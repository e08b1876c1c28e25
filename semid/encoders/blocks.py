"""Bidirectional transformer stack of text and image encoders: from scratch, or as in BERT, ViT, CLIP, DINOv2 and T5."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from semid.config import check_range
from semid.errors import SemidError
from seq_models import Precision, dropout, linear, split_key


class Constant(nnx.Variable):
    """A parameter that is not trained: training differentiates `nnx.Param` only."""


class Activation(enum.Enum):
    """Function between the two matrices of a feed-forward layer."""

    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    QUICK_GELU = "quick_gelu"
    RELU = "relu"

    def __call__(self, x: Float[Array, "*b hidden"]) -> Float[Array, "*b hidden"]:
        match self:
            case Activation.GELU:
                return jax.nn.gelu(x, approximate=False)
            case Activation.GELU_TANH:
                return jax.nn.gelu(x, approximate=True)
            case Activation.QUICK_GELU:
                return x * jax.nn.sigmoid(1.702 * x)
            case Activation.RELU:
                return jax.nn.relu(x)


class _Block:
    """Structure of a block, by default a pre-norm one; an architecture overrides what differs."""

    norm_first: ClassVar[bool] = True
    """Norms stand before attention and feed-forward, with one at the end; else after each residual."""
    norm: ClassVar[type[nnx.LayerNorm] | type[nnx.RMSNorm]] = nnx.LayerNorm
    bias: ClassVar[bool] = True
    """Matrices have biases."""
    scale_logits: ClassVar[bool] = True
    """Divide attention logits by the square root of a head's width."""
    layer_scale: ClassVar[bool] = False
    """A learned factor per dimension on each residual."""
    gated: bool = False
    """Multiply the activation with a second matrix's output."""
    buckets: int = 0
    """Buckets of distances with a learned attention bias each; 0: positions are added to the input instead."""
    max_distance: int = 0
    """Distances from here on share a bucket."""


@dataclass(frozen=True)
class PreNorm(_Block):
    """Norms before attention and feed-forward and one at the end: encoders from scratch, ViT, CLIP."""


@dataclass(frozen=True)
class PostNorm(_Block):
    """A norm after each residual (BERT)."""

    norm_first = False


@dataclass(frozen=True)
class LayerScale(_Block):
    """Pre-norm with a learned factor per dimension on each residual (DINOv2)."""

    layer_scale = True


@dataclass(frozen=True)
class T5(_Block):
    """Pre-norm without means, biases and scaled logits; biases of attention by distance, shared by all layers
    (Raffel et al. 2020, section 2.1)."""

    norm = nnx.RMSNorm
    bias = False
    scale_logits = False
    gated: bool = False
    """Multiply the activation with a second matrix's output (T5 1.1)."""
    buckets: int = 32
    """Buckets of distances: half for earlier positions, half for later ones."""
    max_distance: int = 128
    """Distances from here on share a bucket."""


Architecture = PreNorm | PostNorm | LayerScale | T5


@dataclass(frozen=True)
class BlocksConfig:
    """A stack of bidirectional blocks. The defaults are a small pre-norm one, to be trained from scratch."""

    dim: int = 64
    """Width of the states."""
    layers: int = 2
    """Blocks."""
    heads: int = 2
    """Attention heads."""
    hidden: int = 128
    """Width inside the feed-forward layer."""
    head_width: int | None = None
    """Width of a head; by default dim / heads."""
    dropout: float = 0.1
    """Share of values dropped on the input and on each residual, in training."""
    activation: Activation = Activation.GELU
    """Activation of the feed-forward layer."""
    architecture: Architecture = PreNorm()
    """Where norms stand and which parameters a block has."""
    epsilon: float = 1e-6
    """Added to the variance in norms."""
    dtype: Precision = Precision.FLOAT32
    """Precision of matrix products."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        check_range(self, "dim", "layers", "heads", "hidden", "head_width", at_least=1)
        check_range(self, "dropout", at_least=0, below=1)
        if self.head_width is None and self.dim % self.heads:
            raise SemidError(f"dim {self.dim} must divide into {self.heads} heads; change either or give head_width")


def norm(config: BlocksConfig, *, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    """The config's norm over the last axis, with float32 outputs."""
    # The fast variance E[x^2] - E[x]^2 loses digits where the mean is large, as in trained models it is.
    return config.architecture.norm(
        config.dim, epsilon=config.epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )


def _linear(config: BlocksConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(config, inputs, outputs, rngs, bias=config.architecture.bias)


class Attention(nnx.Module):
    """Self-attention in which every position sees every real one."""

    def __init__(self, config: BlocksConfig, *, rngs: nnx.Rngs) -> None:
        self.heads, self.scale = config.heads, None if config.architecture.scale_logits else 1.0
        width = config.heads * (config.head_width or config.dim // config.heads)
        self.query = _linear(config, config.dim, width, rngs)
        self.key = _linear(config, config.dim, width, rngs)
        self.value = _linear(config, config.dim, width, rngs)
        self.out = _linear(config, width, config.dim, rngs)

    def __call__(
        self, x: Float[Array, "n t dim"], mask: Bool[Array, "n t"] | None, bias: Float[Array, "1 heads t t"] | None
    ) -> Float[Array, "n t dim"]:
        n, t, _ = x.shape
        q, k, v = (project(x).reshape(n, t, self.heads, -1) for project in (self.query, self.key, self.value))
        seen = None if mask is None else mask[:, None, None, :]
        with jax.numpy_dtype_promotion("standard"):  # it converts bfloat16 logits to float32 implicitly
            read = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=seen, scale=self.scale)
        return self.out(read.reshape(n, t, -1))


class FeedForward(nnx.Module):
    """Two matrices with an activation between them, gated or not."""

    def __init__(self, config: BlocksConfig, *, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        self.up = _linear(config, config.dim, config.hidden, rngs)
        self.gate = _linear(config, config.dim, config.hidden, rngs) if config.architecture.gated else None
        self.down = _linear(config, config.hidden, config.dim, rngs)

    def __call__(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and feed-forward, each with a residual, a norm before or after it, and dropout."""

    def __init__(self, config: BlocksConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.norm_attention = norm(config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm_feed = norm(config, rngs=rngs)
        self.feed = FeedForward(config, rngs=rngs)
        if config.architecture.layer_scale:
            self.scale_attention = nnx.Param(jnp.ones(config.dim))
            self.scale_feed = nnx.Param(jnp.ones(config.dim))

    def __call__(
        self,
        x: Float[Array, "n t dim"],
        mask: Bool[Array, "n t"] | None,
        bias: Float[Array, "1 heads t t"] | None,
        keys: tuple[Key[Array, ""] | None, Key[Array, ""] | None],
    ) -> Float[Array, "n t dim"]:
        def residual(
            x: Float[Array, "n t dim"],
            run: Callable[[Array], Array],
            norm: Callable[[Array], Array],
            scale: Any,
            key: Key[Array, ""] | None,
        ) -> Float[Array, "n t dim"]:
            change = run(norm(x) if architecture.norm_first else x)
            if architecture.layer_scale:
                change = change * scale.astype(change.dtype)[None, None]
            x = x + dropout(change, self.config.dropout, key)
            return x if architecture.norm_first else norm(x).astype(x.dtype)

        architecture = self.config.architecture
        scales = (self.scale_attention[...], self.scale_feed[...]) if architecture.layer_scale else (None, None)
        attend = functools.partial(self.attention, mask=mask, bias=bias)
        x = residual(x, attend, self.norm_attention, scales[0], keys[0])
        return residual(x, self.feed, self.norm_feed, scales[1], keys[1])


def distance_buckets(length: int, architecture: Architecture) -> Int[np.ndarray, "t t"]:
    """The bucket of key `j` seen from query `i`: small distances each their own, larger ones by their logarithm."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = architecture.buckets // 2
    exact = half // 2
    size = np.abs(distance)
    fraction = np.log(np.maximum(size, 1) / exact) / np.log(architecture.max_distance / exact)
    large = np.minimum(exact + (fraction * (half - exact)).astype(np.int32), half - 1)
    return np.where(distance > 0, half, 0) + np.where(size < exact, size, large)


class Blocks(nnx.Module):
    """The stack. `layers[i].attention.{query,key,value,out}` and `layers[i].feed.{up,down[,gate]}` are `nnx.Linear`."""

    def __init__(self, config: BlocksConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = norm(config, rngs=rngs) if config.architecture.norm_first else None
        buckets = config.architecture.buckets
        self.distances = nnx.Embed(buckets, config.heads, rngs=rngs) if buckets else None

    def __call__(
        self, x: Float[Array, "n t dim"], mask: Bool[Array, "n t"] | None = None, *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "n t dim"]:
        """States of all positions, normed; `mask` is False at padding, which nothing reads. Dropout needs a `key`."""
        last = self.hidden(x, mask, key=key)[-1]
        return last if self.norm is None else self.norm(last).astype(last.dtype)

    def hidden(
        self, x: Float[Array, "n t dim"], mask: Bool[Array, "n t"] | None = None, *, key: Key[Array, ""] | None = None
    ) -> list[Float[Array, "n t dim"]]:
        """`x` and each block's output, before the norm at the end."""
        keys = split_key(key, 2 * len(self.layers) + 1)
        x = dropout(x.astype(self.config.dtype.value), self.config.dropout, keys[-1])
        bias, states = self._distance_bias(x.shape[1]), [x]
        for layer, first, second in zip(self.layers, keys[0:-1:2], keys[1:-1:2], strict=True):
            run = functools.partial(layer, mask=mask, bias=bias, keys=(first, second))
            states.append((jax.checkpoint(run) if self.config.remat else run)(states[-1]))
        return states

    def _distance_bias(self, length: int) -> Float[Array, "1 heads t t"] | None:
        if self.distances is None:
            return None
        bias = self.distances(jnp.asarray(distance_buckets(length, self.config.architecture)))
        return jnp.moveaxis(bias, -1, 0)[None].astype(self.config.dtype.value)
