"""Lloyd's k-means, jitted, in memory that grows with the data alone."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from quantizers.distances import squared_distances

_CHUNK_ENTRIES = 2**20  # entries of one block of the distance table: 4 MiB
_SAMPLES_PER_CODE = 16


class KMeans(NamedTuple):
    """`assignments` are the nearest centroids; `inertia` is the sum of squared distances to them."""

    centroids: Float[Array, "codes dim"]
    assignments: Int[Array, " n"]
    inertia: Float[Array, ""]


class _Assigned(NamedTuple):
    sums: Float[Array, "codes dim"]
    counts: Float[Array, " codes"]
    assignments: Int[Array, " n"]
    distances: Float[Array, " n"]


def kmeans(x: Float[Array, "n dim"], *, num_codes: int, iterations: int, key: PRNGKeyArray) -> KMeans:
    """Greedy k-means++ (Arthur & Vassilvitskii, 2007) on a sample of 16 points a code, then Lloyd on all points.

    A cluster that empties moves to one of the points farthest from their centroids. With fewer distinct points than
    codes every distinct point becomes a centroid (given an iteration or two) and the codes left over duplicate others.
    Deterministic by key on one machine. Raises ValueError for no points, no codes or a negative count of iterations.
    """
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"kmeans: expected x of shape [n >= 1, dim >= 1], got {x.shape}; pass one vector a row")
    if num_codes < 1 or iterations < 0:
        raise ValueError(f"kmeans: expected num_codes >= 1 and iterations >= 0, got {num_codes} and {iterations}")
    return _kmeans(jnp.asarray(x, jnp.float32), iterations, key, num_codes=num_codes)


@partial(jax.jit, static_argnames="num_codes")
def _kmeans(x: Float[Array, "n dim"], iterations: int, key: PRNGKeyArray, *, num_codes: int) -> KMeans:
    center = x.mean(0, keepdims=True)  # the expanded distance loses digits far from the origin
    x = x - center
    chunks, valid = _chunked(x, num_codes=num_codes)

    def iterate(_: int, centroids: Float[Array, "codes dim"]) -> Float[Array, "codes dim"]:
        return _update(x, centroids, _assign(chunks, valid, centroids))

    centroids = jax.lax.fori_loop(0, iterations, iterate, _initialize(x, num_codes=num_codes, key=key))
    assigned = _assign(chunks, valid, centroids)
    return KMeans(centroids + center, assigned.assignments[: len(x)], assigned.distances.sum())


def _chunked(
    x: Float[Array, "n dim"], *, num_codes: int
) -> tuple[Float[Array, "chunk row dim"], Bool[Array, "chunk row"]]:
    """Equal chunks, the last one padded, each with a distance table of bounded size."""
    n, dim = x.shape
    num_chunks = -(-n * num_codes // _CHUNK_ENTRIES)
    rows = -(-n // num_chunks)
    padded = jnp.pad(x, ((0, num_chunks * rows - n), (0, 0)))
    valid = jnp.arange(num_chunks * rows) < n
    return padded.reshape(num_chunks, rows, dim), valid.reshape(num_chunks, rows)


def _initialize(x: Float[Array, "n dim"], *, num_codes: int, key: PRNGKeyArray) -> Float[Array, "codes dim"]:
    """Each next centroid is the best of a few points drawn with probability proportional to their squared distance."""
    sample_key, first_key, key = jax.random.split(key, 3)
    size = min(len(x), _SAMPLES_PER_CODE * num_codes)
    x = x[jax.random.choice(sample_key, len(x), (size,), replace=False)]
    num_candidates = 2 + int(math.log(num_codes))

    def distances_to(index: Int[Array, ""]) -> Float[Array, " n"]:
        return jnp.square(x - x[index][None, :]).sum(-1)

    def draw(distances: Float[Array, " n"], step_key: PRNGKeyArray) -> tuple[Float[Array, " n"], Int[Array, ""]]:
        drawn = jax.random.categorical(step_key, jnp.log(distances)[None, :], shape=(num_candidates,))
        after = jax.lax.map(lambda index: jnp.minimum(distances, distances_to(index)), drawn)
        best = after.sum(-1).argmin()
        return after[best], drawn[best]

    first = jax.random.randint(first_key, (), 0, size)
    _, others = jax.lax.scan(draw, distances_to(first), jax.random.split(key, num_codes - 1))
    return x[jnp.concatenate([first[None], others])]


def _assign(
    chunks: Float[Array, "chunk row dim"], valid: Bool[Array, "chunk row"], centroids: Float[Array, "codes dim"]
) -> _Assigned:
    """Nearest centroids; sums by matrix product with one-hot codes, which, unlike a scatter, adds in a fixed order."""
    indices = jnp.arange(len(centroids))[None, :]

    def one_chunk(totals: _Totals, chunk: tuple[Array, Array]) -> tuple[_Totals, tuple[Array, Array]]:
        points, keep = chunk
        codes = squared_distances(points, centroids).argmin(-1).astype(jnp.int32)
        one_hot = ((codes[:, None] == indices) & keep[:, None]).astype(jnp.float32)
        sums = totals[0] + jnp.matmul(one_hot.T, points, precision=jax.lax.Precision.HIGHEST)
        distances = jnp.where(keep, jnp.square(points - centroids[codes]).sum(-1), 0)
        return (sums, totals[1] + one_hot.sum(0)), (codes, distances)

    start = (jnp.zeros_like(centroids), jnp.zeros(len(centroids)))
    (sums, counts), (codes, distances) = jax.lax.scan(one_chunk, start, (chunks, valid))
    return _Assigned(sums, counts, codes.reshape(-1), distances.reshape(-1))


_Totals = tuple[Float[Array, "codes dim"], Float[Array, " codes"]]


def _update(
    x: Float[Array, "n dim"], centroids: Float[Array, "codes dim"], assigned: _Assigned
) -> Float[Array, "codes dim"]:
    """Means of the clusters; the i-th empty cluster moves to the i-th farthest point, where one is off its centroid."""
    empty = assigned.counts == 0
    means = assigned.sums / jnp.maximum(assigned.counts, 1)[:, None]
    far, points = jax.lax.top_k(assigned.distances, min(len(x), len(centroids)))
    rank = jnp.cumsum(empty) - 1
    pick = jnp.clip(rank, 0, len(far) - 1)
    moved = (rank < len(far)) & (far[pick] > 0)
    fallback = jnp.where(moved[:, None], x[points[pick]], centroids)
    return jnp.where(empty[:, None], fallback, means)
