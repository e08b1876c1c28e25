"""Codebook maintenance: k-means initialization, moving averages, re-seeding, losses that spread usage and codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from quantizers.distances import Distance, nearest_by_slices, unit_vectors
from quantizers.kmeans import kmeans, sums_by_code


class ReseededCodebooks(NamedTuple):
    """Codebooks after re-seeding, the codes replaced in each (whose optimizer moments are stale), and their number."""

    codebooks: tuple[Float[Array, "_ dim"], ...]
    replaced: tuple[Bool[Array, " _"], ...]
    num_replaced: Int[Array, " level"]


def fit_codebooks(
    x: Float[Array | np.ndarray, "items dim"],
    *,
    level_sizes: Sequence[int],
    iterations: int,
    key: PRNGKeyArray,
    distance: Distance = Distance.EUCLIDEAN,
) -> tuple[Float[Array, "_ dim"], ...]:
    """Codebooks by k-means on the vectors, then on the residuals of each level.

    Raises ValueError naming a row that is not finite.
    """
    residuals = jnp.asarray(x, jnp.float32)
    bad = jnp.flatnonzero(~jnp.isfinite(residuals).all(-1))
    if len(bad):
        raise ValueError(f"fit_codebooks: expected finite vectors, got NaN or infinity in row {bad[0]} of {len(x)}")
    codebooks = []
    for size, level_key in zip(level_sizes, jax.random.split(key, len(level_sizes)), strict=True):
        points = unit_vectors(residuals) if distance is Distance.COSINE else residuals
        clusters = kmeans(points, num_codes=size, iterations=iterations, key=level_key)
        codebook, codes = clusters.centroids, clusters.assignments
        if distance is Distance.COSINE:  # cluster unit vectors; code vectors are means with the original norms
            codebook = cluster_means(residuals, codes, num_codes=size)
            codes = nearest_by_slices(residuals, codebook, distance=distance)
        residuals = residuals - codebook[codes]
        codebooks.append(codebook)
    return tuple(codebooks)


def code_counts(
    codes: Integer[Array, "*b level"], *, level_sizes: Sequence[int], mask: Bool[Array, "*b"] | None = None
) -> tuple[Int[Array, " _"], ...]:
    """Occurrences of each code of each level, masked items left out."""
    codes = codes.astype(jnp.int32)  # the number of codes may not fit into a smaller type
    weights = jnp.ones(codes.shape[:-1], jnp.int32) if mask is None else mask.astype(jnp.int32)
    return tuple(
        jnp.zeros(size, jnp.int32).at[codes[..., level]].add(weights) for level, size in enumerate(level_sizes)
    )


def cluster_means(
    x: Float[Array, "n dim"], codes: Integer[Array, " n"], *, num_codes: int, mask: Bool[Array, " n"] | None = None
) -> Float[Array, "codes dim"]:
    """Mean of the unmasked vectors on each code; zero for a code without any."""
    kept = jnp.ones(len(x), bool) if mask is None else mask
    sums = sums_by_code(jnp.where(kept[:, None], x, 0), codes, num_codes=num_codes)
    (counts,) = code_counts(codes[:, None], level_sizes=(num_codes,), mask=kept)
    return sums / jnp.maximum(counts, 1)[:, None].astype(x.dtype)


def ema_codebook(
    codebook: Float[Array, "codes dim"],
    usage: Float[Array, " codes"],
    *,
    means: Float[Array, "codes dim"],
    shares: Float[Array, " codes"],
    decay: float,
) -> Float[Array, "codes dim"]:
    """Codebook of moving averages of each code's inputs (arXiv 1711.00937, appendix A.1); an unused code stays.

    The paper stores moving sums; here they are the code times its usage, so that only these two are stored.
    """
    weights = decay * usage + (1 - decay) * shares
    sums = decay * usage[:, None] * codebook + (1 - decay) * shares[:, None] * means
    tiny = weights < 1e-30
    return jnp.where(tiny[:, None], codebook, sums / jnp.where(tiny, 1, weights)[:, None])


@jax.jit
def reseed_dead_codes(
    codebooks: Sequence[Float[Array, "_ dim"]],
    counts: Sequence[Int[Array, " _"]],
    *,
    residuals: Float[Array, "items level dim"],
    key: PRNGKeyArray,
) -> ReseededCodebooks:
    """Replace every code with a zero count by a random residual of its level (as given by `residual_codes`).

    Residuals are drawn without replacement; with more dead codes than items, some are reused.
    """
    keys = jax.random.split(key, len(codebooks))
    dead = tuple(count == 0 for count in counts)
    levels = zip(codebooks, dead, keys, strict=True)
    alive = tuple(_replace(book, rows, residuals[:, level], k) for level, (book, rows, k) in enumerate(levels))
    return ReseededCodebooks(alive, dead, jnp.stack([rows.sum() for rows in dead]))


def usage_entropy_loss(
    probabilities: Sequence[Float[Array, "*b _"]], *, mask: Bool[Array, "*b"] | None = None
) -> Float[Array, ""]:
    """Minus the entropy (nats) of the batch's mean probabilities, summed over levels (UniGRec, arXiv 2601.17438).

    It lies between minus the sum of log(codes) (all codes equally used) and 0 (one code per level); 0 if all rows are
    masked.
    """
    total = jnp.zeros((), jnp.float32)
    for level in probabilities:
        kept = jnp.ones(level.shape[:-1], bool) if mask is None else mask
        rows = jnp.where(kept[..., None], level, 0).reshape(-1, level.shape[-1])
        mean = rows.sum(0) / jnp.maximum(kept.sum(), 1).astype(jnp.float32)
        total = total + jax.scipy.special.xlogy(mean, jnp.maximum(mean, 1e-30)).sum()
    return total


def diversity_loss(
    codebook: Float[Array, "codes dim"],
    clusters: Integer[Array, " codes"],
    *,
    codes: Integer[Array, "*b"],
    mask: Bool[Array, "*b"] | None = None,
) -> Float[Array, ""]:
    """Loss of one level that pulls codes of a cluster together and pushes clusters apart (LETTER, arXiv 2405.07314,
    eq. 5).

    For every chosen code, the cross-entropy of a code of the same cluster among all other codes by inner product,
    averaged over the codes of the cluster (LETTER draws one). A code alone in its cluster adds nothing. `clusters`
    labels the codes; LETTER uses balanced clusters, recomputed once per epoch.
    """
    num_codes = len(codebook)
    vectors = codebook.astype(jnp.float32)
    own = jnp.eye(num_codes, dtype=bool)
    logits = jnp.where(own, -jnp.inf, jnp.matmul(vectors, vectors.T, precision=jax.lax.Precision.HIGHEST))
    mates = ((clusters[:, None] == clusters[None, :]) & ~own).astype(jnp.float32)
    log_share = jnp.where(own, 0, jax.nn.log_softmax(logits, axis=-1)) if num_codes > 1 else jnp.zeros((1, 1))
    of_code = -(mates * log_share).sum(-1) / jnp.maximum(mates.sum(-1), 1)
    (counts,) = code_counts(codes[..., None], level_sizes=(num_codes,), mask=mask)
    return (of_code * counts.astype(jnp.float32)).sum() / jnp.maximum(counts.sum(), 1).astype(jnp.float32)


def _replace(
    codebook: Float[Array, "codes dim"],
    dead: Bool[Array, " codes"],
    residuals: Float[Array, "items dim"],
    key: PRNGKeyArray,
) -> Float[Array, "codes dim"]:
    order = jax.random.permutation(key, len(residuals))
    rank = jnp.maximum(jnp.cumsum(dead) - 1, 0)
    fresh = residuals[order[rank % len(residuals)]].astype(codebook.dtype)
    return jnp.where(dead[:, None], fresh, codebook)
