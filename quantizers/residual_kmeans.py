"""Residual k-means: a residual quantizer fitted level by level, without gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from quantizers.distances import Distance, nearest, nearest_by_slices
from quantizers.gradients import straight_through
from quantizers.kmeans import Blocks, KMeans, kmeans, lloyd_pass
from quantizers.residual import (
    quantize_found,
    residual_codes,
    residual_decode,
    residual_encode,
    residual_quantize,
    unit_residuals,
)
from quantizers.types import Quantized

_SAMPLES_PER_CODE = 128
_SLICE = 4096  # rows


@runtime_checkable
class ClusterFunction(Protocol):
    """Clustering of one level: `kmeans` or `balanced_kmeans`."""

    def __call__(self, x: Float[Array, "n dim"], *, num_codes: int, iterations: int, key: PRNGKeyArray) -> KMeans: ...


class LevelClusters(NamedTuple):
    """Codebooks, the items' codes in the fit, and the mean norm of each level's inputs.

    With clusters of equal size, some of these codes differ from the nearest ones of `ResidualKMeans.encode`.
    """

    codebooks: tuple[Float[Array, "_ dim"], ...]
    codes: Int[Array, "items level"]
    norms: Float[Array, " level"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidualKMeans:
    """Residual quantizer with fixed codebooks, one per level; a pytree.

    With `norms`, every residual is scaled to norm 1 before it is quantized, so that all levels use all of their codes
    even if few items have large residuals; the residual of an item that is alone on its code stays 0. Decoding scales
    code vectors back to the mean norm of their level.
    """

    codebooks: tuple[Float[Array, "_ dim"], ...]
    norms: Float[Array, " level"] | None = None
    """Mean norms of the residuals before scaling; 1 for the first level, which is not scaled."""

    @classmethod
    def fit(
        cls,
        x: Float[Array | np.ndarray, "items dim"],
        *,
        level_sizes: Sequence[int],
        iterations: int,
        key: PRNGKeyArray,
        cluster: ClusterFunction = kmeans,
        unit_norm: bool = False,
    ) -> ResidualKMeans:
        """Fit to vectors in memory (see `cluster_levels`)."""
        found = cluster_levels(
            x, level_sizes=level_sizes, iterations=iterations, key=key, cluster=cluster, unit_norm=unit_norm
        )
        return cls(found.codebooks, found.norms if unit_norm else None)

    @classmethod
    def fit_blocks(
        cls, blocks: Blocks, *, level_sizes: Sequence[int], iterations: int, passes: int, key: PRNGKeyArray
    ) -> ResidualKMeans:
        """Fit to vectors that need not fit in memory: each call of `blocks()` returns them, in blocks of any size.

        Each level starts with `iterations` of k-means on a uniform sample of 128 rows per code, and is then refined by
        `passes` exact Lloyd iterations over all blocks, which are read at most `levels * (passes + 1) + 1` times. If
        the sample holds all rows, this equals `fit` with `iterations + passes`. Levels shrink, and errors are raised,
        as in `cluster_levels`. Memory holds the sample, one block and the codebooks.
        """
        _check_sizes(level_sizes)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
        sample = _sample(blocks, size=_SAMPLES_PER_CODE * max(level_sizes), rng=rng)
        codebooks: list[Float[Array, "codes dim"]] = []
        for level, level_key in enumerate(jax.random.split(key, len(level_sizes))):
            residuals = jnp.asarray(next(iter(_residuals([sample], codebooks))))
            few = _few_rows(_residuals(blocks(), codebooks), at_most=level_sizes[level])
            if few is not None:
                codebooks.append(_shrunk(few, level=level, size=level_sizes[level]))
                continue
            # Distances lose precision far from the origin, so passes use vectors centered on the sample's mean.
            center = residuals.mean(0, keepdims=True)
            found = kmeans(residuals, num_codes=level_sizes[level], iterations=iterations, key=level_key)
            centroids = found.centroids - center
            for _ in range(passes):
                centroids = lloyd_pass(_shifted(_residuals(blocks(), codebooks), -np.asarray(center)), centroids)
            codebooks.append(centroids + center)
        return cls(tuple(codebooks))

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return tuple(len(codebook) for codebook in self.codebooks)

    def __call__(self, x: Float[Array, "*b dim"], *, mask: Bool[Array, "*b"] | None = None) -> Quantized:
        if self.norms is None:
            return residual_quantize(x, self.codebooks, mask=mask)
        found = residual_codes(x, self.codebooks, mask=mask, unit_norm=True)
        quantized = quantize_found(x, found, self.codebooks, mask=mask)
        return quantized._replace(vectors=straight_through(x, self.decode(found.codes)))

    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]:
        return residual_encode(x, self.codebooks, unit_norm=self.norms is not None)

    def decode(self, codes: Integer[Array, "*b level"]) -> Float[Array, "*b dim"]:
        if self.norms is None:
            return residual_decode(codes, self.codebooks)
        scales = zip(jnp.cumprod(self.norms), self.codebooks, strict=True)
        return residual_decode(codes, [scale * book for scale, book in scales])

    def last_inputs(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        """Inputs of the last level."""
        return residual_codes(x, self.codebooks, unit_norm=self.norms is not None).residuals[..., -1, :]


def cluster_levels(
    x: Float[Array | np.ndarray, "items dim"],
    *,
    level_sizes: Sequence[int],
    iterations: int,
    key: PRNGKeyArray,
    cluster: ClusterFunction = kmeans,
    unit_norm: bool = False,
) -> LevelClusters:
    """Cluster the vectors, then for each further level their residuals after the nearest codes, with `unit_norm` scaled
    to norm 1.

    A level with at most as many distinct vectors as codes gets exactly one code per vector, whatever `cluster` is, and
    warns if these are fewer codes than requested. Raises ValueError for no levels, no items, or a row that is not
    finite.
    """
    _check_sizes(level_sizes)
    residuals = inputs = jnp.asarray(x, jnp.float32)
    if not len(residuals):
        raise ValueError("residual k-means: expected at least one vector, got none")
    _check_finite(np.asarray(jnp.isfinite(residuals).all(-1)), first=0, what=f" of {len(residuals)}")
    codebooks, codes, norms = [], [], []
    for level, level_key in enumerate(jax.random.split(key, len(level_sizes))):
        size = level_sizes[level]
        norms.append(jnp.linalg.norm(residuals, axis=-1).mean() if level else jnp.ones(()))
        inputs = unit_residuals(residuals, of=inputs) if unit_norm and level else residuals
        slices = (np.asarray(inputs[start : start + _SLICE]) for start in range(0, len(inputs), _SLICE))
        few = _few_rows(slices, at_most=size)
        if few is None:
            centroids, assigned, _ = cluster(inputs, num_codes=size, iterations=iterations, key=level_key)
        else:
            centroids = _shrunk(few, level=level, size=size)
            assigned = nearest_by_slices(inputs, centroids, distance=Distance.EUCLIDEAN)
        # Residuals as in `encode`, after the nearest codes, which clusters of equal size may not assign.
        own = assigned
        if cluster is not kmeans:
            own = nearest_by_slices(inputs, centroids, distance=Distance.EUCLIDEAN)
        residuals = inputs - centroids[own]
        codebooks.append(centroids)
        codes.append(assigned)
    return LevelClusters(tuple(codebooks), jnp.stack(codes, -1), jnp.stack(norms))


def _few_rows(
    blocks: Iterable[Float[np.ndarray, "_ dim"]], *, at_most: int
) -> Float[np.ndarray, "distinct dim"] | None:
    """Distinct rows in order of appearance; None as soon as there are more than `at_most`, without reading on."""
    seen: dict[bytes, None] = {}
    dim = 0
    for block in blocks:
        dim = block.shape[1]
        for row in block + np.float32(0):  # -0 becomes 0
            seen.setdefault(row.tobytes())
            if len(seen) > at_most:
                return None
    if not seen:
        raise ValueError("fit_blocks: blocks() gave no rows when called again; it must make a new iterable each time")
    return np.frombuffer(b"".join(seen), np.float32).reshape(-1, dim)


def _shrunk(few: Float[np.ndarray, "distinct dim"], *, level: int, size: int) -> Float[Array, "distinct dim"]:
    if len(few) < size:
        message = f"level {level} has {len(few)} codes, not {size}: no more distinct vectors are left to tell apart"
        warnings.warn(message, stacklevel=4)
    return jnp.asarray(few)


def _sample(blocks: Blocks, *, size: int, rng: np.random.Generator) -> Float[np.ndarray, "sample dim"]:
    """A uniform sample of rows in their order, independent of how they are divided into blocks."""
    draws, rows, count = np.zeros(0), np.zeros((0, 0), np.float32), 0
    for block in blocks():
        _check_finite(np.asarray(np.isfinite(block).all(-1)), first=count, what="")
        draws = np.append(draws, rng.random(len(block)))
        block = np.asarray(block, np.float32)
        rows = np.concatenate([rows, block]) if count else block
        count += len(block)
        if len(rows) > size:
            kept = np.sort(np.argpartition(draws, size)[:size])
            draws, rows = draws[kept], rows[kept]
    if not count:
        raise ValueError("residual k-means: expected at least one vector, got none")
    return rows


def _residuals(
    blocks: Iterable[Float[np.ndarray, "_ dim"]], codebooks: Sequence[Float[Array, "_ dim"]]
) -> Iterator[Float[np.ndarray, "_ dim"]]:
    """Residuals of each block after all codebooks."""
    for block in blocks:
        residual = np.asarray(block, np.float32)
        for codebook in codebooks:
            residual = residual - np.asarray(codebook)[_codes(residual, codebook)]
        yield residual


def _codes(x: Float[np.ndarray, "n dim"], codebook: Float[Array, "codes dim"]) -> Int[np.ndarray, " n"]:
    """Nearest codes, in slices whose distance table is small; blocks of equal size compile once."""
    slices = [np.asarray(_nearest(x[start : start + _SLICE], codebook)) for start in range(0, len(x), _SLICE)]
    return np.concatenate(slices) if slices else np.zeros(0, np.int32)


_nearest = jax.jit(nearest)


def _shifted(
    blocks: Iterable[Float[np.ndarray, "_ dim"]], shift: Float[np.ndarray, "1 dim"]
) -> Iterator[Float[np.ndarray, "_ dim"]]:
    return (block + shift for block in blocks)


def _check_sizes(level_sizes: Sequence[int]) -> None:
    if not level_sizes or min(level_sizes) < 1:
        raise ValueError(f"residual k-means: expected one or more level_sizes, each 1 or more, got {level_sizes}")


def _check_finite(finite: Bool[np.ndarray, " n"], *, first: int, what: str) -> None:
    if not finite.all():
        row = first + int(np.flatnonzero(~finite)[0])
        raise ValueError(f"residual k-means: expected finite vectors, got NaN or infinity in row {row}{what}")
