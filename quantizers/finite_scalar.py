"""Finite scalar quantization: every dimension bounded and rounded, no codebook (Mentzer et al., arXiv 2309.15505)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from quantizers.gradients import straight_through
from quantizers.types import Quantized, QuantizerLosses


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FiniteScalarQuantizer:
    """Quantizer with one code per dimension, e.g. (8, 5, 5, 5): nothing to fit, no loss; a pytree without leaves."""

    level_sizes: Sequence[int] = field(metadata={"static": True})

    def __post_init__(self) -> None:
        if not self.level_sizes or min(self.level_sizes) < 1:
            raise ValueError(f"FiniteScalarQuantizer: expected level_sizes of 1 or more, got {self.level_sizes}")
        object.__setattr__(self, "level_sizes", tuple(self.level_sizes))  # hashable: part of the pytree's structure

    def __call__(self, x: Float[Array, "*b level"], *, mask: Bool[Array, "*b"] | None = None) -> Quantized:
        """Vectors on the grid with the gradient of `bound`; both losses are 0, so `mask` changes nothing."""
        zero = jnp.zeros((), jnp.float32)
        bounded_x = bound(x, self.level_sizes)
        codes = _rounded(bounded_x, self.level_sizes)
        vectors = straight_through(bounded_x, self.decode(codes)).astype(x.dtype)
        return Quantized(codes, vectors, QuantizerLosses(zero, zero))

    def encode(self, x: Float[Array, "*b level"]) -> Int[Array, "*b level"]:
        return _rounded(bound(x, self.level_sizes), self.level_sizes)

    def decode(self, codes: Integer[Array, "*b level"]) -> Float[Array, "*b level"]:
        """Code `c` of `n` becomes `(2 c - (n - 1)) / (n - 1)`; an item with a code out of range becomes NaN."""
        if codes.shape[-1] != len(self.level_sizes):
            raise ValueError(
                f"decode: expected codes of shape [..., {len(self.level_sizes)}], one per level, got {codes.shape}"
            )
        sizes = _row(self.level_sizes, codes.ndim)
        codes, steps = codes.astype(jnp.int32), sizes - 1  # 2 * code may overflow a small type
        values = (2 * codes - steps).astype(jnp.float32) / jnp.maximum(steps, 1).astype(jnp.float32)
        exists = ((codes >= 0) & (codes < sizes)).all(-1, keepdims=True)
        return jnp.where(exists, values, jnp.nan)


def bound(x: Float[Array, "*b level"], level_sizes: Sequence[int]) -> Float[Array, "*b level"]:
    """`z / (1 + |z|^n)^(1/n)` for a level of `n` codes: a smooth map onto (-1, 1), in float32.

    The paper leaves the map open, with tanh as an example. This one moves no grid point by more than half a step, so
    that `encode(decode(codes)) == codes`; tanh would pull the outer codes of a fine level inwards. The grid is
    symmetric also for even `n`: 0 lies between the two middle codes.
    """
    if x.shape[-1] != len(level_sizes):
        raise ValueError(
            f"FiniteScalarQuantizer: expected vectors of shape [..., {len(level_sizes)}], one dimension per level, "
            f"got {x.shape}"
        )
    x = x.astype(jnp.float32)
    power = jnp.maximum(_row(level_sizes, x.ndim), 2).astype(jnp.float32)
    scale = jax.lax.stop_gradient(jnp.maximum(jnp.abs(x), 1))  # cancels; without it the power overflows
    total = (1 / scale) ** power + jnp.abs(x / scale) ** power
    return x / scale / total ** (1 / power)


def _rounded(bounded_x: Float[Array, "*b level"], level_sizes: Sequence[int]) -> Int[Array, "*b level"]:
    """Codes 0 .. n - 1; half a step rounds to the even code."""
    steps = _row(level_sizes, bounded_x.ndim) - 1
    return jnp.round((bounded_x + 1) / 2 * steps.astype(jnp.float32)).astype(jnp.int32)


def _row(level_sizes: Sequence[int], ndim: int) -> Int[Array, "... level"]:
    return jnp.asarray(level_sizes, jnp.int32).reshape((1,) * (ndim - 1) + (-1,))
