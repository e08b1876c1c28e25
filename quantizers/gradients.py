"""Gradient estimators for the choice of codes, which has no gradient of its own."""

from __future__ import annotations

from enum import Enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class GradientPath(Enum):
    """Estimator of the gradient of the quantized vectors. With the first three, their values are the decoded vectors.

    `STRAIGHT_THROUGH`: the identity. `ROTATION`: see `rotate`. `SOFT_BACKWARD`: the gradient of the soft vectors
    (DIGER, arXiv 2601.19711; BLOGER, arXiv 2510.21242). `SOFT`: value and gradient of the soft vectors,
    `sum_l p_l @ E_l`, and residuals subtract soft vectors, too (UniGRec, arXiv 2601.17438). These codes agree with
    `encode`, which subtracts the nearest code vectors, only if the assignment's temperature becomes low compared with
    the distances (UniGRec: .01 to .001).
    """

    STRAIGHT_THROUGH = "straight_through"
    ROTATION = "rotation"
    SOFT_BACKWARD = "soft_backward"
    SOFT = "soft"


def straight_through(x: Float[Array, "*b dim"], quantized: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
    """Value of `quantized` with the gradient of `x`, in the dtype of `x`: `x + sg(quantized - x)`, computed so that the
    value is exact."""
    return jax.lax.stop_gradient(quantized).astype(x.dtype) + (x - jax.lax.stop_gradient(x))


def rotate(x: Float[Array, "*b dim"], quantized: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
    """Value of `quantized`; the derivative by `x` is the scaled rotation that maps `x` to it, treated as constant.

    The rotation trick (Fifty et al., arXiv 2410.06424, section 4.2): `|q|/|x| (I - 2 s s' + 2 q x')`, where q, x and s
    are the directions of `quantized`, of `x` and of the sum of these two. For zero `x`, the identity is used.
    """
    start, end = jax.lax.stop_gradient(x).astype(jnp.float32), jax.lax.stop_gradient(quantized).astype(jnp.float32)
    length = jnp.linalg.norm(start, axis=-1, keepdims=True)
    source, target = _direction(start), _direction(end)
    middle = _direction(source + target)
    moving = x.astype(jnp.float32)
    turned = moving - 2 * middle * _dot(middle, moving) + 2 * target * _dot(source, moving)
    scale = jnp.linalg.norm(end, axis=-1, keepdims=True) / jnp.where(length > 0, length, 1)
    return straight_through(jnp.where(length > 0, scale * turned, moving), quantized).astype(x.dtype)


def soft_vectors(
    probabilities: Float[Array, "*b codes"], codebook: Float[Array, "codes dim"]
) -> Float[Array, "*b dim"]:
    """Mean of the code vectors under `probabilities`, in float32."""
    return jnp.matmul(probabilities, codebook.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _direction(x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0, length, 1)


def _dot(a: Float[Array, "*b dim"], b: Float[Array, "*b dim"]) -> Float[Array, "*b 1"]:
    return (a * b).sum(-1, keepdims=True)
