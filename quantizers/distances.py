"""Distances between vectors and the codes of one codebook."""

from __future__ import annotations

from enum import Enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_ENTRIES = 2**24  # entries of the distance table of one slice: 64 MiB


class Distance(Enum):
    """Distance by which the nearest code is chosen. `COSINE` ignores norms; decoded code vectors keep theirs."""

    EUCLIDEAN = "euclidean"
    COSINE = "cosine"


def distances(
    x: Float[Array | np.ndarray, "*b dim"], codebook: Float[Array | np.ndarray, "codes dim"], *, distance: Distance
) -> Float[Array, "*b codes"]:
    """Squared distances between the vectors or, for `COSINE`, between their directions (2 - 2 cos)."""
    if distance is Distance.COSINE:
        return squared_distances(unit_vectors(x), unit_vectors(codebook))
    return squared_distances(x, codebook)


def squared_distances(
    x: Float[Array | np.ndarray, "*b dim"], codebook: Float[Array | np.ndarray, "codes dim"]
) -> Float[Array, "*b codes"]:
    """||x||^2 - 2 x.e + ||e||^2 in float32: one matrix product, at full precision on every device."""
    rows = jnp.asarray(x, jnp.float32).reshape(-1, x.shape[-1])
    codes = jnp.asarray(codebook, jnp.float32)
    products = jnp.matmul(rows, codes.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.square(rows).sum(-1)[:, None] - 2 * products + jnp.square(codes).sum(-1)[None, :]
    return jnp.maximum(squares, 0).reshape(*x.shape[:-1], len(codebook))


def unit_vectors(x: Float[Array | np.ndarray, "*b dim"]) -> Float[Array, "*b dim"]:
    """Vectors scaled to norm 1, in float32; one shorter than 1e-12 has no direction and is returned unchanged."""
    x = jnp.asarray(x, jnp.float32)
    squares = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(squares > 1e-24, squares, 1))


def code_logits(
    x: Float[Array, "*b dim"], codebook: Float[Array, "codes dim"], *, temperature: float
) -> Float[Array, "*b codes"]:
    """-||x - e||^2 / temperature: the nearer the code, the larger its logit."""
    return -squared_distances(x, codebook) / temperature


def nearest(
    x: Float[Array | np.ndarray, "*b dim"],
    codebook: Float[Array | np.ndarray, "codes dim"],
    *,
    distance: Distance = Distance.EUCLIDEAN,
) -> Int[Array, "*b"]:
    """Nearest code of each vector; the lowest index wins a tie."""
    return first_argmin(distances(x, codebook, distance=distance))


def nearest_by_slices(
    x: Float[Array, "n dim"], codebook: Float[Array | np.ndarray, "codes dim"], *, distance: Distance
) -> Int[Array, " n"]:
    """`nearest` for any number of vectors, in slices, so that memory holds only a part of the distance table."""
    rows = max(_ENTRIES // len(codebook), 1)
    slices = [nearest(x[at : at + rows], codebook, distance=distance) for at in range(0, len(x), rows)]
    return jnp.concatenate(slices)


def first_argmin(table: Float[Array, "*b codes"]) -> Int[Array, "*b"]:
    """The first index of each row's smallest value: an argmin that XLA vectorizes on CPUs, unlike its own."""
    # Both reductions must see the same bits: fused separately, the table could be computed and rounded twice.
    table = jax.lax.optimization_barrier(jax.lax.stop_gradient(table))
    indices = jnp.arange(table.shape[-1], dtype=jnp.int32)
    smallest = table == table.min(-1, keepdims=True)
    return jnp.where(smallest, indices[(None,) * (table.ndim - 1)], table.shape[-1] - 1).min(-1)
