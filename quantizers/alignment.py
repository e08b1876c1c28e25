"""Losses that align vectors of one space with those of another, with the other rows of the batch as negatives.

They are functions of gathered rows. Under `jax.jit` with rows sharded over a mesh (Auto axes) nothing more is needed:
the arrays are global, and so are the negatives.
"""

from __future__ import annotations

import enum
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer


class Similarity(enum.Enum):
    """Score of a pair: COSINE ignores norms, INNER_PRODUCT keeps them (LETTER's release, at temperature 1)."""

    COSINE = "cosine"
    INNER_PRODUCT = "inner product"


@partial(jax.jit, static_argnames="similarity")
def info_nce(
    anchors: Float[Array, "n dim"],
    positives: Float[Array, "n dim"],
    *,
    temperature: float | Float[Array, ""] = 0.07,
    similarity: Similarity = Similarity.COSINE,
    mask: Bool[Array, " n"] | None = None,
    ids: Integer[Array, " n"] | None = None,
    false_negatives: Bool[Array, "n n"] | None = None,
    log_popularity: Float[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """-mean_r log softmax_c(sim(anchors_r, positives_c) / temperature - log_popularity_c)[r] (arXiv 1807.03748, eq. 4).

    Row `c` is a negative of row `r` unless it is masked, has the same id, or `false_negatives[r, c]`. Masked rows are
    ignored, even if they are NaN; the mean over no rows is 0. `ids` and `log_popularity` (finite) belong to the
    positives; the latter corrects for popular items being drawn more often (log-Q: Yi et al., RecSys 2019). Computed in
    float32. This is one direction; for both, average with a call with the sides swapped and the other side's ids and
    popularity. Raises ValueError for shapes that do not agree.
    """
    _check_pairs(anchors, positives, mask=mask, ids=ids, log_popularity=log_popularity)
    scale = _unit if similarity is Similarity.COSINE else lambda x: x
    candidates = scale(_zero_masked(positives, mask))
    products = jnp.matmul(scale(_zero_masked(anchors, mask)), candidates.T, precision=jax.lax.Precision.HIGHEST)
    logits = products / temperature
    if log_popularity is not None:
        logits = logits - _zero_masked(log_popularity, mask)[None, :]
    own = jnp.eye(len(anchors), dtype=bool)
    negative = ~own
    if mask is not None:
        negative &= mask[None, :]
    if ids is not None:
        negative &= ids[:, None] != ids[None, :]
    if false_negatives is not None:
        if false_negatives.shape != own.shape:
            raise ValueError(f"alignment: expected false_negatives of shape {own.shape}, got {false_negatives.shape}")
        negative &= ~false_negatives
    total = jax.nn.logsumexp(logits, axis=-1, where=own | negative)
    return masked_mean(total - jnp.where(own, logits, 0).sum(-1), mask=mask)


def unit_rows(
    x: Float[Array | np.ndarray, "n dim"], *, mask: Bool[Array | np.ndarray, " n"] | None = None
) -> Float[Array, "n dim"]:
    """Rows scaled to norm 1, in float32; a row that is zero or masked (even if NaN) becomes zero without gradient."""
    return _unit(_zero_masked(x, mask))


def masked_mean(
    x: Float[Array | np.ndarray, " n"], *, mask: Bool[Array | np.ndarray, " n"] | None = None
) -> Float[Array, ""]:
    """Mean over the rows where `mask` is true; 0 if there are none."""
    counted = jnp.ones(x.shape, bool) if mask is None else mask
    return jnp.where(counted, x, 0).sum() / jnp.maximum(counted.sum(), 1).astype(jnp.float32)


def _zero_masked(
    x: Float[Array | np.ndarray, " n *rest"], mask: Bool[Array | np.ndarray, " n"] | None
) -> Float[Array, " n *rest"]:
    """`x` in float32 with masked rows set to zero, before any arithmetic, so that a NaN there reaches no gradient."""
    x = jnp.asarray(x, jnp.float32)
    return x if mask is None else jnp.where(jnp.expand_dims(mask, range(1, x.ndim)), x, 0)


def _unit(x: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    """Rows scaled to norm 1; a row of zeros, which has no direction, stays zero and gets no gradient."""
    squares = jnp.square(x).sum(-1, keepdims=True)
    directed = squares > jnp.finfo(jnp.float32).tiny
    return x * jnp.where(directed, jax.lax.rsqrt(jnp.where(directed, squares, 1)), 0)


def _check_pairs(x: Array, y: Array, **rows: Array | None) -> None:
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"alignment: expected two arrays of one shape [n, dim], got {x.shape} and {y.shape}")
    for name, values in rows.items():
        if values is not None and values.shape != x.shape[:1]:
            raise ValueError(f"alignment: expected {name} of shape {x.shape[:1]}, one per row, got {values.shape}")
