"""Product quantization: one small codebook per part of the vector, after an optional optimized rotation.

Codes are unordered: each encodes its own coordinates, independently of the others (Jégou et al., 2011). The rotation is
the non-parametric one of optimized product quantization (Ge et al., CVPR 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from quantizers.distances import nearest
from quantizers.gradients import straight_through
from quantizers.kmeans import kmeans
from quantizers.residual import level_errors
from quantizers.types import Quantized, QuantizerLosses

_CHUNK_ENTRIES = 2**20  # entries of one block of the distance table: 4 MiB


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProductKMeans:
    """Product quantizer of fixed codebooks, one per part; a pytree. `rotation` is the identity unless optimized."""

    codebooks: Float[Array, "level codes part"]
    rotation: Float[Array, "dim dim"]

    @classmethod
    def fit(
        cls,
        x: Float[Array | np.ndarray, "items dim"],
        *,
        level_sizes: Sequence[int],
        iterations: int,
        key: PRNGKeyArray,
        rotation_rounds: int = 0,
    ) -> ProductKMeans:
        """Fit codebooks; with `rotation_rounds` above 0 (faiss: 50), optimize the rotation, too.

        `level_sizes` must be equal, and their number must divide `dim`. Raises ValueError otherwise, or for a row that
        is not finite.
        """
        x = jnp.asarray(x, jnp.float32)
        _check(x, level_sizes)
        if rotation_rounds < 0:
            raise ValueError(f"ProductKMeans.fit: expected rotation_rounds >= 0, got {rotation_rounds}")
        rotation_key, key = jax.random.split(key)
        rotation = jnp.eye(x.shape[1])
        shape = {"num_levels": len(level_sizes), "num_codes": level_sizes[0], "iterations": iterations}
        if rotation_rounds:
            rotation = _best_rotation(x, rounds=rotation_rounds, key=rotation_key, **shape)
        return cls(_fit_codebooks(x, rotation, key=key, **shape), rotation)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        num_levels, num_codes, _ = self.codebooks.shape
        return (num_codes,) * num_levels

    @jax.jit
    def __call__(self, x: Float[Array, "*b dim"], *, mask: Bool[Array, "*b"] | None = None) -> Quantized:
        """Codes, straight-through vectors, and losses: mean squares over dimensions and the items where `mask` is true.

        The rotation is taken as fixed: no gradient reaches it.
        """
        codebooks, rotation = self.codebooks, jax.lax.stop_gradient(self.rotation)
        parts = _parts(x, rotation, len(codebooks))
        codes = _nearest(parts, codebooks)
        chosen = _chosen(codes, codebooks)
        codebook_errors = level_errors(jax.lax.stop_gradient(parts) - chosen, mask=mask)
        commitment_errors = level_errors(parts - jax.lax.stop_gradient(chosen), mask=mask)
        losses = QuantizerLosses(codebook_errors.mean(), commitment_errors.mean())
        return Quantized(codes, straight_through(x, _joined(chosen, rotation)), losses)

    @jax.jit
    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]:
        """Nearest code of every part of `x @ rotation`."""
        return _nearest(_parts(x, self.rotation, len(self.codebooks)), self.codebooks)

    @jax.jit
    def decode(self, codes: Integer[Array, "*b level"]) -> Float[Array, "*b dim"]:
        """Code vectors side by side, rotated back; a code outside its codebook gives NaN."""
        num_levels = len(self.codebooks)
        if codes.shape[-1] != num_levels:
            raise ValueError(f"decode: expected codes of shape [..., {num_levels}], one per level, got {codes.shape}")
        return _joined(_chosen(codes, self.codebooks), self.rotation)


def _parts(x: Float[Array, "*b dim"], rotation: Float[Array, "dim dim"], num_levels: int) -> Array:
    """`x @ rotation`, cut: [*b, level, part]."""
    return _matmul(x.astype(jnp.float32), rotation).reshape(*x.shape[:-1], num_levels, x.shape[-1] // num_levels)


def _nearest(parts: Float[Array, "*b level part"], codebooks: Float[Array, "level codes part"]) -> Array:
    """Nearest codes level by level, which on CPUs is faster than a batched product, and needs one distance table."""
    codes = jax.lax.map(lambda level: nearest(*level), (jnp.moveaxis(parts, -2, 0), codebooks))
    return jnp.moveaxis(codes, 0, -1)


def _chosen(codes: Integer[Array, "*b level"], codebooks: Float[Array, "level codes part"]) -> Array:
    def take(codebook: Array, code: Array) -> Array:
        return jnp.take(codebook, code, axis=0).astype(jnp.float32)

    return jax.vmap(take, in_axes=(0, -1), out_axes=-2)(codebooks, codes)


def _joined(parts: Float[Array, "*b level part"], rotation: Float[Array, "dim dim"]) -> Float[Array, "*b dim"]:
    return _matmul(parts.reshape(*parts.shape[:-2], len(rotation)), rotation.T)


def _matmul(a: Float[Array, "*b n"], b: Float[Array, "n m"]) -> Float[Array, "*b m"]:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames=("num_levels", "num_codes", "iterations"))
def _fit_codebooks(
    x: Float[Array, "items dim"],
    rotation: Float[Array, "dim dim"],
    *,
    num_levels: int,
    num_codes: int,
    iterations: int,
    key: PRNGKeyArray,
) -> Float[Array, "level codes part"]:
    """k-means part by part: compiled once, with the memory of one part."""

    def fit(level: tuple[Float[Array, "items part"], PRNGKeyArray]) -> Float[Array, "codes part"]:
        part, level_key = level
        return kmeans(part, num_codes=num_codes, iterations=iterations, key=level_key).centroids

    parts = _parts(x, rotation, num_levels).swapaxes(0, 1)
    return jax.lax.map(fit, (parts, jax.random.split(key, num_levels)))


def _best_rotation(
    x: Float[Array, "items dim"], *, num_levels: int, num_codes: int, iterations: int, rounds: int, key: PRNGKeyArray
) -> Float[Array, "dim dim"]:
    """The better result of two starts: the principal axes, good for correlated coordinates, and the identity, good for
    clustered parts."""
    x = x - x.mean(0, keepdims=True)  # a common offset would hinder the rotation
    shape = {"num_levels": num_levels, "num_codes": num_codes, "iterations": iterations}
    found = []
    for start in (jnp.eye(x.shape[1]), _principal_rotation(x, num_levels=num_levels)):
        found.append(_optimize_rotation(x, _fit_codebooks(x, start, key=key, **shape), start, rounds))
    return min(found, key=lambda result: float(result[1]))[0]


def _principal_rotation(x: Float[Array, "items dim"], *, num_levels: int) -> Float[Array, "dim dim"]:
    """Principal axes, distributed so that the parts have similar products of variances (Ge et al., section 3.2)."""
    variances, axes = np.linalg.eigh(np.asarray(_matmul(x.T, x), np.float64))
    logs = np.log(np.maximum(variances, max(variances[-1], 1e-30) * 1e-9))
    parts: list[list[int]] = [[] for _ in range(num_levels)]
    for axis in np.argsort(-logs, kind="stable"):
        open_parts = [part for part in parts if len(part) < len(logs) // num_levels]
        min(open_parts, key=lambda part: (logs[part] - logs.min()).sum()).append(int(axis))
    return jnp.asarray(axes[:, np.concatenate(parts)], jnp.float32)


@jax.jit
def _optimize_rotation(
    x: Float[Array, "items dim"],
    codebooks: Float[Array, "level codes part"],
    rotation: Float[Array, "dim dim"],
    rounds: int | Int[Array, ""],
) -> tuple[Float[Array, "dim dim"], Float[Array, ""]]:
    """Alternate between one Lloyd step under the rotation and the best rotation under the codes.

    Returns the rotation and the mean squared error of the last codes.
    """

    def one_round(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codebooks, rotation, _ = state
        parts = _parts(x, rotation, len(codebooks))
        codes, codebooks = _lloyd(parts, codebooks)
        chosen = _chosen(codes, codebooks)
        # Orthogonal Procrustes: the rotation R that minimizes |x R - chosen|^2.
        left, _, right = jnp.linalg.svd(_matmul(x.T, chosen.reshape(x.shape)))
        return codebooks, _matmul(left, right), jnp.square(parts - chosen).mean()

    start = (codebooks, rotation, jnp.zeros(()))
    _, rotation, error = jax.lax.fori_loop(0, rounds, one_round, start)
    return rotation, error


def _lloyd(
    parts: Float[Array, "items level part"], codebooks: Float[Array, "level codes part"]
) -> tuple[Int[Array, "items level"], Float[Array, "level codes part"]]:
    """Nearest codes and their means, level by level."""
    codes, means = jax.lax.map(lambda level: _lloyd_level(*level), (parts.swapaxes(0, 1), codebooks))
    return codes.T, means


def _lloyd_level(
    points: Float[Array, "items part"], codebook: Float[Array, "codes part"]
) -> tuple[Int[Array, " items"], Float[Array, "codes part"]]:
    """Lloyd step of one level, in chunks. Unused codes stay. Sums are matrix products, which add in a fixed order."""
    num_codes, dim = codebook.shape
    rows = min(len(points), max(1, _CHUNK_ENTRIES // num_codes))
    padding = -len(points) % rows
    chunks = jnp.pad(points, ((0, padding), (0, 0))).reshape(-1, rows, dim)
    valid = (jnp.arange(len(points) + padding) < len(points)).reshape(-1, rows)

    def one_chunk(totals: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        rows, keep = chunk
        codes = nearest(rows, codebook)
        one_hot = jnp.where(keep[:, None], jax.nn.one_hot(codes, num_codes), 0)
        return (totals[0] + _matmul(one_hot.T, rows), totals[1] + one_hot.sum(0)), codes

    start = (jnp.zeros_like(codebook), jnp.zeros(num_codes))
    (sums, counts), codes = jax.lax.scan(one_chunk, start, (chunks, valid))
    means = jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], codebook)
    return codes.reshape(-1)[: len(points)], means


def _check(x: Float[Array, "items dim"], level_sizes: Sequence[int]) -> None:
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"ProductKMeans.fit: expected x of shape [items >= 1, dim >= 1], got {x.shape}")
    if not level_sizes or min(level_sizes) < 1 or len(set(level_sizes)) > 1:
        raise ValueError(f"ProductKMeans.fit: expected equal level_sizes of 1 or more, got {tuple(level_sizes)}")
    if x.shape[1] % len(level_sizes):
        raise ValueError(
            f"ProductKMeans.fit: vectors of {x.shape[1]} dimensions do not divide into {len(level_sizes)} equal parts; "
            f"take a number of level_sizes that divides {x.shape[1]}, or project the vectors"
        )
    bad = jnp.flatnonzero(~jnp.isfinite(x).all(-1))
    if len(bad):
        raise ValueError(f"ProductKMeans.fit: expected finite vectors, got NaN or infinity in row {bad[0]} of {len(x)}")
