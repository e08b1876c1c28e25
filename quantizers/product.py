"""Product quantization: one small codebook for each part of the vector, after a rotation that may be optimized.

Codes are unordered: each stands for its own coordinates, whatever the others are (Jégou et al., 2011). The rotation is
the non-parametric one of optimized product quantization (Ge et al., CVPR 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from quantizers.distances import nearest
from quantizers.gradients import straight_through
from quantizers.kmeans import kmeans
from quantizers.residual import level_errors
from quantizers.types import Quantized, QuantizerLosses

_CHUNK_ENTRIES = 2**20  # entries of one block of the distance tables: 4 MiB


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProductKMeans:
    """Fixed codebooks, one a part; a pytree. `rotation` is the identity unless it was optimized."""

    codebooks: Float[Array, "level codes part"]
    rotation: Float[Array, "dim dim"]

    @classmethod
    def fit(
        cls,
        x: Float[Array, "items dim"],
        *,
        level_sizes: Sequence[int],
        iterations: int,
        key: PRNGKeyArray,
        rotation_rounds: int = 0,
    ) -> ProductKMeans:
        """Plain product quantization with no `rotation_rounds`, the optimized one with some (faiss takes 50).

        `level_sizes` are all the same, and as many as divide `dim`. Raises ValueError otherwise, or for a row that is
        not finite.
        """
        x = jnp.asarray(x, jnp.float32)
        _check(x, level_sizes)
        rotation_key, key = jax.random.split(key)
        rotation = jnp.eye(x.shape[1])
        shape = {"num_levels": len(level_sizes), "num_codes": level_sizes[0], "iterations": iterations}
        if rotation_rounds:
            centered = x - x.mean(0, keepdims=True)  # a common offset would hold the rotation back
            start = _fit_codebooks(centered, rotation, key=rotation_key, **shape)
            rotation = _optimize_rotation(centered, start, rotation, rotation_rounds)
        return cls(_fit_codebooks(x, rotation, key=key, **shape), rotation)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        num_levels, num_codes, _ = self.codebooks.shape
        return (num_codes,) * num_levels

    def __call__(self, x: Float[Array, "*b dim"], *, mask: Bool[Array, "*b"] | None = None) -> Quantized:
        return product_quantize(x, self.codebooks, self.rotation, mask=mask)

    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]:
        return product_codes(x, self.codebooks, self.rotation)

    def decode(self, codes: Int[Array, "*b level"]) -> Float[Array, "*b dim"]:
        return product_decode(codes, self.codebooks, self.rotation)


@jax.jit
def product_codes(
    x: Float[Array, "*b dim"], codebooks: Float[Array, "level codes part"], rotation: Float[Array, "dim dim"]
) -> Int[Array, "*b level"]:
    """The nearest code of every part of `x @ rotation`."""
    return _nearest(_parts(x, rotation, len(codebooks)), codebooks)


@jax.jit
def product_quantize(
    x: Float[Array, "*b dim"],
    codebooks: Float[Array, "level codes part"],
    rotation: Float[Array, "dim dim"],
    *,
    mask: Bool[Array, "*b"] | None = None,
) -> Quantized:
    """Codes, straight-through vectors, and losses: mean squares over dimensions and the items where `mask` is true.

    The rotation is taken as fixed: no gradient reaches it.
    """
    rotation = jax.lax.stop_gradient(rotation)
    parts = _parts(x, rotation, len(codebooks))
    codes = _nearest(parts, codebooks)
    chosen = _chosen(codes, codebooks)
    codebook_errors = level_errors(jax.lax.stop_gradient(parts) - chosen, mask=mask)
    commitment_errors = level_errors(parts - jax.lax.stop_gradient(chosen), mask=mask)
    losses = QuantizerLosses(codebook_errors.mean(), commitment_errors.mean())
    return Quantized(codes, straight_through(x, _joined(chosen, rotation)), losses)


@jax.jit
def product_decode(
    codes: Int[Array, "*b level"], codebooks: Float[Array, "level codes part"], rotation: Float[Array, "dim dim"]
) -> Float[Array, "*b dim"]:
    """The code vectors side by side, rotated back; a code outside its codebook gives NaN."""
    if codes.shape[-1] != len(codebooks):
        raise ValueError(f"decode: expected codes of shape [..., {len(codebooks)}], one a level, got {codes.shape}")
    return _joined(_chosen(codes, codebooks), rotation)


def _parts(x: Float[Array, "*b dim"], rotation: Float[Array, "dim dim"], num_levels: int) -> Array:
    """`x @ rotation`, cut: [*b, level, part]."""
    return _matmul(x.astype(jnp.float32), rotation).reshape(*x.shape[:-1], num_levels, x.shape[-1] // num_levels)


def _nearest(parts: Float[Array, "*b level part"], codebooks: Float[Array, "level codes part"]) -> Array:
    return jax.vmap(nearest, in_axes=(-2, 0), out_axes=-1)(parts, codebooks)


def _chosen(codes: Int[Array, "*b level"], codebooks: Float[Array, "level codes part"]) -> Array:
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
    """k-means of one part after the other: compiled once, in the memory of one."""

    def fit(level: tuple[Float[Array, "items part"], PRNGKeyArray]) -> Float[Array, "codes part"]:
        part, level_key = level
        return kmeans(part, num_codes=num_codes, iterations=iterations, key=level_key).centroids

    parts = _parts(x, rotation, num_levels).swapaxes(0, 1)
    return jax.lax.map(fit, (parts, jax.random.split(key, num_levels)))


@jax.jit
def _optimize_rotation(
    x: Float[Array, "items dim"],
    codebooks: Float[Array, "level codes part"],
    rotation: Float[Array, "dim dim"],
    rounds: int,
) -> Float[Array, "dim dim"]:
    """In turn: codes and their means under the rotation (one step of Lloyd's), the best rotation under the codes."""

    def one_round(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        codebooks, rotation = state
        parts = _parts(x, rotation, len(codebooks))
        codes, codebooks = _lloyd(parts, codebooks)
        target = _chosen(codes, codebooks).reshape(x.shape)
        left, _, right = jnp.linalg.svd(_matmul(x.T, target))  # orthogonal Procrustes: min ||x R - target||
        return codebooks, _matmul(left, right)

    return jax.lax.fori_loop(0, rounds, one_round, (codebooks, rotation))[1]


def _lloyd(
    parts: Float[Array, "items level part"], codebooks: Float[Array, "level codes part"]
) -> tuple[Int[Array, "items level"], Float[Array, "level codes part"]]:
    """Nearest codes and their means; a code of no item stays. Sums by matrix product, which adds in a fixed order."""
    num_levels, num_codes, _ = codebooks.shape
    rows = min(len(parts), max(1, _CHUNK_ENTRIES // (num_levels * num_codes)))
    padding = -len(parts) % rows
    chunks = jnp.pad(parts, ((0, padding), (0, 0), (0, 0))).reshape(-1, rows, *parts.shape[1:])
    valid = (jnp.arange(len(parts) + padding) < len(parts)).reshape(-1, rows)

    def one_chunk(totals: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        points, keep = chunk
        codes = _nearest(points, codebooks)
        one_hot = jnp.where(keep[:, None, None], jax.nn.one_hot(codes, num_codes), 0)
        sums = jnp.einsum("rlk,rlp->lkp", one_hot, points, precision=jax.lax.Precision.HIGHEST)
        return (totals[0] + sums, totals[1] + one_hot.sum(0)), codes

    start = (jnp.zeros_like(codebooks), jnp.zeros((num_levels, num_codes)))
    (sums, counts), codes = jax.lax.scan(one_chunk, start, (chunks, valid))
    means = sums / jnp.maximum(counts, 1)[..., None]
    codes = codes.reshape(-1, num_levels)[: len(parts)]
    return codes, jnp.where(counts[..., None] > 0, means, codebooks)


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
