"""k-means by Lloyd's algorithm: in memory, with clusters of equal size, and over blocks of data on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from quantizers.distances import first_argmin, squared_distances

Blocks = Callable[[], Iterable[Float[np.ndarray, "_ dim"]]]  # each call returns the same rows in the same order

_CHUNK_ENTRIES = 2**20  # entries of one block of the distance table: 4 MiB
_SAMPLES_PER_CODE = 16
_AUCTION_ENTRIES = 2**28  # table entries read before an auction is stopped: enough for small ones, seconds for large
_FIRST_STEP, _LAST_STEP = 1.0, 0.02  # bid steps of balanced k-means: coarse while centroids still move


class KMeans(NamedTuple):
    """Centroids, the codes assigned to the points, and the sum of squared distances to them."""

    centroids: Float[Array, "codes dim"]
    assignments: Int[Array, " n"]
    inertia: Float[Array, ""]


class _Clusters(NamedTuple):
    """Sum and number of the points of each code."""

    sums: Float[Array, "codes dim"]
    counts: Int[Array, " codes"]


def kmeans(x: Float[Array | np.ndarray, "n dim"], *, num_codes: int, iterations: int, key: PRNGKeyArray) -> KMeans:
    """Greedy k-means++ (Arthur & Vassilvitskii, 2007) on a sample of 16 points per code, then Lloyd on all points.

    An empty cluster moves to one of the points farthest from their centroids. With fewer distinct points than codes,
    every distinct point becomes a centroid (after an iteration or two) and the remaining codes are duplicates.
    Deterministic per key on one machine. Raises ValueError for no points, no codes or a negative count of iterations.
    """
    return _kmeans(_checked(x, num_codes=num_codes, iterations=iterations), iterations, key, num_codes=num_codes)


def _checked(x: Float[Array | np.ndarray, "n dim"], *, num_codes: int, iterations: int) -> Float[Array, "n dim"]:
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"kmeans: expected x of shape [n >= 1, dim >= 1], got {x.shape}; pass one vector per row")
    if num_codes < 1 or iterations < 0:
        raise ValueError(f"kmeans: expected num_codes >= 1 and iterations >= 0, got {num_codes} and {iterations}")
    return jnp.asarray(x, jnp.float32)


def balanced_kmeans(
    x: Float[Array | np.ndarray, "n dim"], *, num_codes: int, iterations: int, key: PRNGKeyArray
) -> KMeans:
    """k-means with clusters of equal size, as in OneRec's tokenizer (arXiv 2502.18965).

    Sizes in `assignments` differ by at most one. Each centroid is the mean of the points assigned to it, which need not
    be the nearest ones. Lloyd's iterations with an auction as assignment, on the host; memory holds a few tables of
    n x codes distances. Raises ValueError as `kmeans` does.
    """
    x = _checked(x, num_codes=num_codes, iterations=iterations)
    center = x.mean(0, keepdims=True)
    x, seats = x - center, len(x) // num_codes + (np.arange(num_codes) < len(x) % num_codes)
    centroids = _initialize(x, num_codes=num_codes, key=key)
    prices = np.zeros(num_codes, np.float32)
    for iteration, step in enumerate(np.geomspace(_FIRST_STEP, _LAST_STEP, max(iterations, 1))):
        codes, prices = _auction(np.asarray(squared_distances(x, centroids)), seats, prices, step=step)
        if iteration < iterations:
            centroids = _jitted_update(x, centroids, jnp.asarray(codes))
    return KMeans(centroids + center, jnp.asarray(codes), _distances_to_own(x, centroids, jnp.asarray(codes)).sum())


def _auction(
    costs: Float[np.ndarray, "n codes"],
    seats: Int[np.ndarray, " codes"],
    prices: Float[np.ndarray, " codes"],
    *,
    step: float,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " codes"]]:
    """Low-cost assignment of all points to codes with limited seats, and the codes' prices (auction; Bertsekas, 1988).

    All unassigned points bid at once: the price at which their second best code becomes as good, plus a step (a
    multiple of the mean distance to the nearest code). A full code keeps its highest bids; the lowest of them is its
    price. Points still unassigned when the work limit is reached take free seats (`_fill`). The next auction starts
    from these prices.
    """
    step = step * max(float(costs.min(1).mean()), float(costs.mean()) / 20) or 1.0
    codes, bids = np.full(len(costs), -1), np.zeros(len(costs), np.float32)
    prices = np.where(seats > 0, prices, np.inf).astype(np.float32)
    work = max(_AUCTION_ENTRIES, 10 * costs.size)
    while len(out := np.flatnonzero(codes < 0)) and work > 0:
        work -= len(out) * len(seats) + 100 * len(costs)  # the second for the sort
        choice, regret = _two_cheapest(costs[out] + prices)
        codes[out], bids[out] = choice, prices[choice] + regret + step
        members = np.flatnonzero(np.isin(codes, choice))
        members = members[np.lexsort((-bids[members], codes[members]))]
        of_member = codes[members]
        rank = np.arange(len(members)) - np.searchsorted(of_member, of_member)
        last = rank == seats[of_member] - 1
        prices[of_member[last]] = bids[members[last]]
        codes[members[rank >= seats[of_member]]] = -1
    out = np.flatnonzero(codes < 0)
    codes[out] = _fill(costs[out], seats - np.bincount(codes[codes >= 0], minlength=len(seats)))
    full = np.bincount(codes, minlength=len(seats)) >= seats
    return codes.astype(np.int32), np.where(full & (seats > 0), prices, 0)


def _fill(costs: Float[np.ndarray, "n codes"], seats: Int[np.ndarray, " codes"]) -> Int[np.ndarray, " n"]:
    """Assign points to free seats in rounds: every point asks for its cheapest code with free seats, and those that
    would lose most otherwise are seated first.

    A code that refuses a point is full, so there are at most as many rounds as codes.
    """
    codes, left, free = np.full(len(costs), -1), np.arange(len(costs)), np.arange(len(seats))
    while len(left):
        still = seats[free] > 0
        free, costs = free[still], costs[:, still]
        choice, regret = _two_cheapest(costs)
        order = np.lexsort((-regret, choice))
        wanted = free[choice[order]]
        rank = np.arange(len(wanted)) - np.searchsorted(wanted, wanted)
        seated = rank < seats[wanted]
        codes[left[order[seated]]] = wanted[seated]
        seats = seats - np.bincount(wanted[seated], minlength=len(seats))
        waiting = np.sort(order[~seated])
        left, costs = left[waiting], costs[waiting]
    return codes


def _two_cheapest(costs: Float[np.ndarray, "n codes"]) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The cheapest column of each row, and the extra cost of the second cheapest: 0 if there is no other."""
    first = costs.argmin(1)[:, None]
    others = costs.copy()
    np.put_along_axis(others, first, np.inf, axis=1)
    cheapest, next_one = np.take_along_axis(costs, first, axis=1)[:, 0], others.min(1)
    return first[:, 0], np.where(np.isinf(next_one), cheapest, next_one) - cheapest


@jax.jit
def _jitted_update(
    x: Float[Array, "n dim"], centroids: Float[Array, "codes dim"], codes: Int[Array, " n"]
) -> Float[Array, "codes dim"]:
    return _update(x, centroids, codes, _clusters(x, codes, num_codes=len(centroids)))


def lloyd_pass(
    blocks: Iterable[Float[np.ndarray, "_ dim"]], centroids: Float[Array, "codes dim"]
) -> Float[Array, "codes dim"]:
    """One Lloyd iteration over all blocks, equal to that of `kmeans` in memory, whatever the sizes of the blocks.

    Memory holds one block and a few codebooks; sums over blocks are float64.
    """
    num_codes, dim = centroids.shape
    sums, counts = np.zeros((num_codes, dim)), np.zeros(num_codes, np.int64)
    far, points = np.zeros(0, np.float32), np.zeros((0, dim), np.float32)
    for chunk, keep in _padded(blocks, rows=max(1, _CHUNK_ENTRIES // num_codes)):
        _, distances, clusters = jax.device_get(_jitted_nearest(chunk, keep, centroids))
        sums, counts = sums + clusters.sums, counts + clusters.counts
        far, points = np.append(far, distances[keep]), np.concatenate([points, chunk[keep]])
        farthest = np.argsort(-far, kind="stable")[:num_codes]
        far, points = far[farthest], points[farthest]
    averages = jnp.asarray(sums / np.maximum(counts, 1)[:, None], jnp.float32)
    averaged = _Clusters(averages, jnp.asarray(counts > 0, jnp.int32))
    return _means(centroids, averaged, jnp.asarray(far), jnp.asarray(points))


def _padded(
    blocks: Iterable[Float[np.ndarray, "_ dim"]], *, rows: int
) -> Iterator[tuple[Float[np.ndarray, "row dim"], Bool[np.ndarray, " row"]]]:
    """Chunks of at most `rows` rows, padded to a power of two, so that few shapes are compiled."""
    for block in blocks:
        for start in range(0, len(block), rows):
            chunk = np.asarray(block[start : start + rows], np.float32)
            size = min(rows, 1 << (len(chunk) - 1).bit_length())
            yield np.pad(chunk, ((0, size - len(chunk)), (0, 0))), np.arange(size) < len(chunk)


@partial(jax.jit, static_argnames="num_codes")
def _kmeans(x: Float[Array, "n dim"], iterations: int | Int[Array, ""], key: PRNGKeyArray, *, num_codes: int) -> KMeans:
    center = x.mean(0, keepdims=True)  # the expanded distance loses digits far from the origin
    x = x - center
    chunks, valid = _chunked(x, num_codes=num_codes)

    def iterate(_: Int[Array, ""], centroids: Float[Array, "codes dim"]) -> Float[Array, "codes dim"]:
        codes, clusters = _assign(chunks, valid, centroids)
        return _update(x, centroids, codes[: len(x)], clusters)

    centroids = jax.lax.fori_loop(0, iterations, iterate, _initialize(x, num_codes=num_codes, key=key))
    codes = _assign(chunks, valid, centroids)[0][: len(x)]
    return KMeans(centroids + center, codes, _distances_to_own(x, centroids, codes).sum())


def _chunked(
    x: Float[Array, "n dim"], *, num_codes: int
) -> tuple[Float[Array, "chunk row dim"], Bool[Array, "chunk row"]]:
    """Chunks of equal size, the last one padded, so that each has a distance table of bounded size."""
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
    squares = jnp.square(x).sum(-1)
    num_candidates = 2 + int(math.log(num_codes))

    def distances_to(rows: Int[Array, " row"]) -> Float[Array, "row n"]:
        products = jnp.matmul(x[rows], x.T, precision=jax.lax.Precision.HIGHEST)
        scale = squares[rows][:, None] + squares[None, :]
        distances = scale - 2 * products
        return jnp.where(distances > 1e-6 * scale, distances, 0)  # smaller ones are rounding errors of equal points

    def draw(distances: Float[Array, " n"], step_key: PRNGKeyArray) -> tuple[Float[Array, " n"], Int[Array, ""]]:
        drawn = jax.random.categorical(step_key, jnp.log(distances)[None, :], shape=(num_candidates,))
        after = jnp.minimum(distances[None, :], distances_to(drawn))
        best = after.sum(-1).argmin()
        return after[best], drawn[best]

    first = jax.random.randint(first_key, (), 0, size)
    _, others = jax.lax.scan(draw, distances_to(first[None])[0], jax.random.split(key, num_codes - 1))
    return x[jnp.concatenate([first[None], others])]


def _nearest(
    points: Float[Array, "row dim"], keep: Bool[Array, " row"], centroids: Float[Array, "codes dim"]
) -> tuple[Int[Array, " row"], Float[Array, " row"], _Clusters]:
    """Nearest centroids of one chunk, the squared distances to them, and the clusters of the points to keep."""
    table = squared_distances(points, centroids)
    codes = first_argmin(table)
    return codes, table.min(-1), _clusters(points, jnp.where(keep, codes, len(centroids)), num_codes=len(centroids))


@jax.jit
def _jitted_nearest(
    points: Float[Array, "row dim"], keep: Bool[Array, " row"], centroids: Float[Array, "codes dim"]
) -> tuple[Int[Array, " row"], Float[Array, " row"], _Clusters]:
    return _nearest(points, keep, centroids)


def sums_by_code(
    points: Float[Array, "n dim"], codes: Integer[Array, " n"], *, num_codes: int
) -> Float[Array, "codes dim"]:
    """Sum of the points on each code, added in a fixed order; points with code `num_codes` are skipped."""

    def scattered(points: Float[Array, "n dim"], codes: Integer[Array, " n"]) -> Float[Array, "codes dim"]:
        return jnp.zeros((num_codes, points.shape[1])).at[codes].add(points, mode="drop")

    def multiplied(points: Float[Array, "n dim"], codes: Integer[Array, " n"]) -> Float[Array, "codes dim"]:
        one_hot = (codes[:, None] == jnp.arange(num_codes)[None, :]).astype(jnp.float32)
        return jnp.matmul(one_hot.T, points, precision=jax.lax.Precision.HIGHEST)

    codes = codes.astype(jnp.int32)  # `num_codes` may not fit into a smaller type
    # A scatter is cheap and serial on a CPU; an accelerator's atomics would add in an order that varies.
    return jax.lax.platform_dependent(points, codes, cpu=scattered, default=multiplied)


def _clusters(points: Float[Array, "n dim"], codes: Int[Array, " n"], *, num_codes: int) -> _Clusters:
    """Sums and counts of the clusters; points with code `num_codes` are skipped."""
    sums = sums_by_code(points, codes, num_codes=num_codes)
    return _Clusters(sums, jnp.zeros(num_codes, jnp.int32).at[codes].add(1, mode="drop"))


def _assign(
    chunks: Float[Array, "chunk row dim"], valid: Bool[Array, "chunk row"], centroids: Float[Array, "codes dim"]
) -> tuple[Int[Array, " padded"], _Clusters]:
    def one_chunk(total: _Clusters, chunk: tuple[Array, Array]) -> tuple[_Clusters, Int[Array, " row"]]:
        codes, _, clusters = _nearest(*chunk, centroids)
        return _Clusters(total.sums + clusters.sums, total.counts + clusters.counts), codes

    start = _Clusters(jnp.zeros_like(centroids), jnp.zeros(len(centroids), jnp.int32))
    total, codes = jax.lax.scan(one_chunk, start, (chunks, valid))
    return codes.reshape(-1), total


def _update(
    x: Float[Array, "n dim"], centroids: Float[Array, "codes dim"], codes: Int[Array, " n"], clusters: _Clusters
) -> Float[Array, "codes dim"]:
    """Means of the clusters; the i-th empty one moves to the i-th farthest point, if that is not on its centroid."""

    def farthest() -> Float[Array, "codes dim"]:
        far, points = jax.lax.top_k(_distances_to_own(x, centroids, codes), min(len(x), len(centroids)))
        return _means(centroids, clusters, far, x[points])

    def none_empty() -> Float[Array, "codes dim"]:
        return clusters.sums / clusters.counts.astype(jnp.float32)[:, None]

    return jax.lax.cond((clusters.counts == 0).any(), farthest, none_empty)


def _means(
    centroids: Float[Array, "codes dim"], clusters: _Clusters, far: Float[Array, " m"], points: Float[Array, "m dim"]
) -> Float[Array, "codes dim"]:
    """Means of the clusters; the i-th empty one moves to `points[i]` if its distance `far[i]` is not zero."""
    empty = clusters.counts == 0
    averages = clusters.sums / jnp.maximum(clusters.counts, 1).astype(jnp.float32)[:, None]
    rank = jnp.cumsum(empty) - 1
    pick = jnp.clip(rank, 0, len(far) - 1)
    moved = (rank < len(far)) & (far[pick] > 0)
    return jnp.where(empty[:, None], jnp.where(moved[:, None], points[pick], centroids), averages)


def _distances_to_own(
    x: Float[Array, "n dim"], centroids: Float[Array, "codes dim"], codes: Int[Array, " n"]
) -> Float[Array, " n"]:
    return jnp.square(x - centroids[codes]).sum(-1)
