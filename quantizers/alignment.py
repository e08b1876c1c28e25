"""Losses that align vectors of one space with those of another, with the other rows of the batch as negatives.

They are functions of gathered rows. Under `jax.jit` with rows sharded over a mesh (Auto axes) nothing more is needed:
the arrays are global, and so are the negatives. Inside `jax.shard_map` each device sees its rows only: name the mesh
axis (or axes) of the rows as `axis_name` and the loss, the same on every device, is that of the whole batch.
"""

from __future__ import annotations

import enum
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

AxisName = str | tuple[str, ...]


class Similarity(enum.Enum):
    """COSINE forgets lengths; INNER_PRODUCT keeps them, as LETTER's release does (at temperature 1)."""

    COSINE = "cosine"
    INNER_PRODUCT = "inner product"


class ClickLoss(enum.Enum):
    """What makes a clicked pair score above the pairs of other rows."""

    SOFTMAX = "softmax"
    """Sampled softmax over the batch."""
    BCE = "bce"
    """Binary cross-entropy: the clicked pair, and the mean over the row's negatives, with equal weight."""


class DebiasLosses(NamedTuple):
    """Unweighted means: `tied` of 1 - cos(bias, observed), `apart` of the squared cos(interest, bias)."""

    tied: Float[Array, ""]
    apart: Float[Array, ""]


class _Pairs(NamedTuple):
    """Scores of this device's anchors with all candidates: each anchor's own is `positive`, the usable `negative`."""

    logits: Float[Array, "n candidates"]
    positive: Bool[Array, "n candidates"]
    negative: Bool[Array, "n candidates"]


@partial(jax.jit, static_argnames=("similarity", "axis_name"))
def info_nce(
    anchors: Float[Array, "n dim"],
    positives: Float[Array, "n dim"],
    *,
    temperature: float | Float[Array, ""] = 0.07,
    similarity: Similarity = Similarity.COSINE,
    mask: Bool[Array, " n"] | None = None,
    ids: Int[Array, " n"] | None = None,
    false_negatives: Bool[Array, "n candidates"] | None = None,
    log_popularity: Float[Array, " n"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """-mean_r log softmax_c(sim(anchors_r, positives_c) / temperature - log_popularity_c)[r] (arXiv 1807.03748, eq. 4).

    Row `c` is a negative of row `r` unless it is masked, has the same id, or `false_negatives[r, c]`; with `axis_name`
    the columns of `false_negatives` are the rows of all devices. Masked rows count for nothing, NaN or not; the mean
    over no rows is 0. `ids` and `log_popularity` (finite) are those of the positives: the latter corrects for popular
    ones being drawn more often (log-Q: Yi et al., RecSys 2019). Computed in float32. One direction: for both, average
    with the call that swaps the sides, its ids and popularity being the other side's. Raises ValueError for shapes
    that do not agree.
    """
    pairs = _pairs(
        anchors,
        positives,
        temperature=temperature,
        similarity=similarity,
        mask=mask,
        ids=ids,
        false_negatives=false_negatives,
        log_popularity=log_popularity,
        axis_name=axis_name,
    )
    return _mean(_cross_entropy(pairs), mask=mask, axis_name=axis_name)


@partial(jax.jit, static_argnames=("loss", "axis_name"))
def debiased_click_loss(
    user_interest: Float[Array, "n dim"],
    user_conformity: Float[Array, "n bias"],
    item_property: Float[Array, "n dim"],
    item_popularity: Float[Array, "n bias"],
    *,
    loss: ClickLoss = ClickLoss.SOFTMAX,
    mask: Bool[Array, " n"] | None = None,
    ids: Int[Array, " n"] | None = None,
    false_negatives: Bool[Array, "n candidates"] | None = None,
    log_popularity: Float[Array, " n"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """Loss of clicks: the user of a row clicked its item, the items of the other rows are negatives.

    Scores are interest . property + conformity . popularity (DAS, arXiv 2508.10584, after DICE, arXiv 2006.11011).
    The rest as in `info_nce`, `ids` being the items'. Without `log_popularity` popular items are negatives more often,
    which hides from the popularity vectors just what they are to explain.
    """
    _check_pairs(user_conformity, item_popularity)
    pairs = _pairs(
        jnp.concatenate([user_interest, user_conformity], -1),
        jnp.concatenate([item_property, item_popularity], -1),
        temperature=1.0,
        similarity=Similarity.INNER_PRODUCT,
        mask=mask,
        ids=ids,
        false_negatives=false_negatives,
        log_popularity=log_popularity,
        axis_name=axis_name,
    )
    losses = _cross_entropy(pairs) if loss is ClickLoss.SOFTMAX else _binary_cross_entropy(pairs)
    return _mean(losses, mask=mask, axis_name=axis_name)


@partial(jax.jit, static_argnames="axis_name")
def debias_loss(
    interest: Float[Array, "n dim"],
    bias: Float[Array, "n dim"],
    observed: Float[Array, "n dim"],
    *,
    mask: Bool[Array, " n"] | None = None,
    axis_name: AxisName | None = None,
) -> DebiasLosses:
    """Keep popularity in `bias` and out of `interest` (DAS, arXiv 2508.10584).

    Of users these are interest and conformity, of items property and popularity. `observed` is a vector made of the
    counts of training (activity, popularity); if the function that makes it is learned, add the click loss: alone, both
    sides of `tied` may become one constant. Means over rows where `mask` is true. Raises ValueError for shapes that do
    not agree.
    """
    _check_pairs(interest, bias, mask=mask)
    _check_pairs(bias, observed)
    interests, biases, targets = (_unit(_kept(x, mask)) for x in (interest, bias, observed))
    tied = 1 - (biases * targets).sum(-1)
    apart = jnp.square((interests * biases).sum(-1))
    return DebiasLosses(*(_mean(x, mask=mask, axis_name=axis_name) for x in (tied, apart)))


def _pairs(
    anchors: Float[Array, "n dim"],
    positives: Float[Array, "n dim"],
    *,
    temperature: float | Float[Array, ""],
    similarity: Similarity,
    mask: Bool[Array, " n"] | None,
    ids: Int[Array, " n"] | None,
    false_negatives: Bool[Array, "n candidates"] | None,
    log_popularity: Float[Array, " n"] | None,
    axis_name: AxisName | None,
) -> _Pairs:
    _check_pairs(anchors, positives, mask=mask, ids=ids, log_popularity=log_popularity)
    scale = _unit if similarity is Similarity.COSINE else lambda x: x
    candidates = _gathered(scale(_kept(positives, mask)), axis_name)
    products = jnp.matmul(scale(_kept(anchors, mask)), candidates.T, precision=jax.lax.Precision.HIGHEST)
    logits = products / temperature
    if log_popularity is not None:
        logits = logits - _gathered(_kept(log_popularity, mask), axis_name)[None, :]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(anchors)
    own = (jnp.arange(len(anchors)) + first)[:, None] == jnp.arange(len(candidates))[None, :]
    negative = ~own
    if mask is not None:
        negative &= _gathered(mask, axis_name)[None, :]
    if ids is not None:
        negative &= ids[:, None] != _gathered(ids, axis_name)[None, :]
    if false_negatives is not None:
        if false_negatives.shape != own.shape:
            raise ValueError(f"alignment: expected false_negatives of shape {own.shape}, got {false_negatives.shape}")
        negative &= ~false_negatives
    return _Pairs(logits, own, negative)


def _cross_entropy(pairs: _Pairs) -> Float[Array, " n"]:
    total = jax.nn.logsumexp(pairs.logits, axis=-1, where=pairs.positive | pairs.negative)
    return total - jnp.where(pairs.positive, pairs.logits, 0).sum(-1)


def _binary_cross_entropy(pairs: _Pairs) -> Float[Array, " n"]:
    clicked = jnp.where(pairs.positive, jax.nn.softplus(-pairs.logits), 0).sum(-1)
    others = jnp.where(pairs.negative, jax.nn.softplus(pairs.logits), 0).sum(-1)
    return clicked + others / jnp.maximum(pairs.negative.sum(-1), 1).astype(jnp.float32)


def _kept(x: Float[Array, "n *rest"], mask: Bool[Array, " n"] | None) -> Float[Array, "n *rest"]:
    """`x` in float32, masked rows zero: before any arithmetic, so that a NaN there reaches no gradient."""
    x = x.astype(jnp.float32)
    return x if mask is None else jnp.where(jnp.expand_dims(mask, range(1, x.ndim)), x, 0)


def _unit(x: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    """Rows of length 1; a row of zeros, which has no direction, stays and gets no gradient."""
    squares = jnp.square(x).sum(-1, keepdims=True)
    directed = squares > jnp.finfo(jnp.float32).tiny
    return x * jnp.where(directed, jax.lax.rsqrt(jnp.where(directed, squares, 1)), 0)


def _gathered(x: Array, axis_name: AxisName | None) -> Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def _mean(x: Float[Array, " n"], *, mask: Bool[Array, " n"] | None, axis_name: AxisName | None) -> Float[Array, ""]:
    """Mean over the rows of all devices where `mask` is true; 0 if there are none."""
    kept = jnp.ones(x.shape, bool) if mask is None else mask
    total, count = jnp.where(kept, x, 0).sum(), kept.sum()
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1).astype(jnp.float32)


def _check_pairs(x: Array, y: Array, **rows: Array | None) -> None:
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"alignment: expected two arrays of one shape [n, dim], got {x.shape} and {y.shape}")
    for name, values in rows.items():
        if values is not None and values.shape != x.shape[:1]:
            raise ValueError(f"alignment: expected {name} of shape {x.shape[:1]}, one a row, got {values.shape}")
