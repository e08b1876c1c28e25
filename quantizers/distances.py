"""Euclidean distances between vectors and the codes of one codebook."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def squared_distances(x: Float[Array, "*b dim"], codebook: Float[Array, "codes dim"]) -> Float[Array, "*b codes"]:
    """||x||^2 - 2 x.e + ||e||^2 in float32: one matrix product, at full precision on every device."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    codes = codebook.astype(jnp.float32)
    products = jnp.matmul(rows, codes.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.square(rows).sum(-1)[:, None] - 2 * products + jnp.square(codes).sum(-1)[None, :]
    return jnp.maximum(squares, 0).reshape(*x.shape[:-1], len(codebook))


def code_logits(
    x: Float[Array, "*b dim"], codebook: Float[Array, "codes dim"], *, temperature: float
) -> Float[Array, "*b codes"]:
    """-||x - e||^2 / temperature: the nearer the code, the larger its logit."""
    return -squared_distances(x, codebook) / temperature


def nearest(x: Float[Array, "*b dim"], codebook: Float[Array, "codes dim"]) -> Int[Array, "*b"]:
    """The nearest code; the lowest index wins a tie."""
    return squared_distances(x, codebook).argmin(-1).astype(jnp.int32)
