"""Residual quantization: each level quantizes what the levels before it left (RQ-VAE: Lee et al., arXiv 2203.01941)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from quantizers.distances import nearest
from quantizers.kmeans import kmeans
from quantizers.types import Quantized, QuantizerLosses

Codebooks = Sequence[Float[Array, "codes dim"]]


class ResidualCodes(NamedTuple):
    """`residuals[..., l, :]` is what level `l` quantizes, `chosen[..., l, :]` the code vector it takes, in float32."""

    codes: Int[Array, "*b level"]
    residuals: Float[Array, "*b level dim"]
    chosen: Float[Array, "*b level dim"]


class Reseeded(NamedTuple):
    """Codebooks after re-seeding, the codes replaced in each (whose optimizer moments are stale), and their number."""

    codebooks: tuple[Float[Array, "codes dim"], ...]
    replaced: tuple[Bool[Array, " codes"], ...]
    num_replaced: Int[Array, " level"]


@jax.jit
def residual_codes(x: Float[Array, "*b dim"], codebooks: Codebooks) -> ResidualCodes:
    """Greedy nearest codes, level by level.

    Residuals subtract the code without its gradient, `r_l = r_{l-1} - sg(e_l)`: each of them keeps the identity as its
    derivative by x. (Subtracting a straight-through code instead makes that derivative zero from the second level on.)
    """
    residual = x.astype(jnp.float32)
    codes, residuals, chosen = [], [], []
    for codebook in codebooks:
        code = nearest(residual, codebook)
        vector = codebook[code].astype(jnp.float32)
        codes.append(code)
        residuals.append(residual)
        chosen.append(vector)
        residual = residual - jax.lax.stop_gradient(vector)
    return ResidualCodes(jnp.stack(codes, -1), jnp.stack(residuals, -2), jnp.stack(chosen, -2))


@jax.jit
def residual_quantize(
    x: Float[Array, "*b dim"], codebooks: Codebooks, *, mask: Bool[Array, "*b"] | None = None
) -> Quantized:
    """Codes, straight-through sum of their vectors, and losses summed over levels; see `level_errors` for `mask`."""
    codes, residuals, chosen = residual_codes(x, codebooks)
    codebook_errors = level_errors(jax.lax.stop_gradient(residuals) - chosen, mask=mask)
    commitment_errors = level_errors(residuals - jax.lax.stop_gradient(chosen), mask=mask)
    losses = QuantizerLosses(codebook_errors.sum(), commitment_errors.sum())
    return Quantized(codes, straight_through(x, chosen.sum(-2)), losses)


def straight_through(x: Float[Array, "*b dim"], quantized: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
    """The value of `quantized` with the gradient of `x`, in the dtype of `x`.

    It is `x + sg(quantized - x)`, arranged so that no digit of `quantized` is lost.
    """
    return jax.lax.stop_gradient(quantized).astype(x.dtype) + (x - jax.lax.stop_gradient(x))


def level_errors(
    difference: Float[Array, "*b level dim"], *, mask: Bool[Array, "*b"] | None = None
) -> Float[Array, " level"]:
    """Mean square of each level over dimensions and over the items where `mask` is true (0 if there are none)."""
    if mask is None:
        mask = jnp.ones(difference.shape[:-2], bool)
    kept = jnp.where(mask[..., None, None], difference, 0)  # before the square: a NaN there must not reach the gradient
    count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    return jnp.square(kept).mean(-1).sum(range(mask.ndim)) / count


@jax.jit
def residual_decode(codes: Int[Array, "*b level"], codebooks: Codebooks) -> Float[Array, "*b dim"]:
    """Sum of the code vectors; a code outside its codebook gives NaN."""
    if codes.shape[-1] != len(codebooks):
        raise ValueError(f"decode: expected codes of shape [..., {len(codebooks)}], one a level, got {codes.shape}")
    vectors = [jnp.take(codebook, codes[..., level], axis=0) for level, codebook in enumerate(codebooks)]
    return jnp.stack(vectors, -2).sum(-2)


def fit_codebooks(
    x: Float[Array, "items dim"], *, level_sizes: Sequence[int], iterations: int, key: PRNGKeyArray
) -> tuple[Float[Array, "codes dim"], ...]:
    """k-means on the vectors, then on what each level leaves of them. Raises ValueError naming a row not finite."""
    residuals = jnp.asarray(x, jnp.float32)
    bad = jnp.flatnonzero(~jnp.isfinite(residuals).all(-1))
    if len(bad):
        raise ValueError(f"fit_codebooks: expected finite vectors, got NaN or infinity in row {bad[0]} of {len(x)}")
    codebooks = []
    for size, level_key in zip(level_sizes, jax.random.split(key, len(level_sizes)), strict=True):
        clusters = kmeans(residuals, num_codes=size, iterations=iterations, key=level_key)
        residuals = residuals - clusters.centroids[clusters.assignments]
        codebooks.append(clusters.centroids)
    return tuple(codebooks)


def code_counts(
    codes: Int[Array, "*b level"], *, level_sizes: Sequence[int], mask: Bool[Array, "*b"] | None = None
) -> tuple[Int[Array, " codes"], ...]:
    """How often each code of each level occurs, masked items left out."""
    weights = jnp.ones(codes.shape[:-1], jnp.int32) if mask is None else mask.astype(jnp.int32)
    return tuple(
        jnp.zeros(size, jnp.int32).at[codes[..., level]].add(weights) for level, size in enumerate(level_sizes)
    )


@jax.jit
def reseed_dead_codes(
    codebooks: Codebooks,
    counts: Sequence[Int[Array, " codes"]],
    *,
    residuals: Float[Array, "items level dim"],
    key: PRNGKeyArray,
) -> Reseeded:
    """Replace every code with a zero count by a random residual of its level (as given by `residual_codes`).

    Residuals are drawn without replacement; with more dead codes than items some are used again.
    """
    keys = jax.random.split(key, len(codebooks))
    dead = tuple(count == 0 for count in counts)
    levels = zip(codebooks, dead, keys, strict=True)
    alive = tuple(_replace(book, rows, residuals[:, level], k) for level, (book, rows, k) in enumerate(levels))
    return Reseeded(alive, dead, jnp.stack([rows.sum() for rows in dead]))


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


class ResidualQuantizer(nnx.Module):
    """Codebooks learned by gradient: add `losses.codebook` and a multiple of `losses.commitment` (.25) to the loss."""

    def __init__(self, level_sizes: Sequence[int], *, dim: int, rngs: nnx.Rngs):
        if not level_sizes or min(level_sizes) < 1 or dim < 1:
            raise ValueError(
                f"ResidualQuantizer: expected level_sizes and dim of 1 or more, got {level_sizes} and {dim}"
            )
        self.level_sizes = tuple(level_sizes)
        scale = dim**-0.5
        self.codebooks = nnx.List(
            [nnx.Param(scale * jax.random.normal(rngs.params(), (size, dim))) for size in self.level_sizes]
        )

    def __call__(self, x: Float[Array, "*b dim"], *, mask: Bool[Array, "*b"] | None = None) -> Quantized:
        return residual_quantize(x, self._arrays(), mask=mask)

    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]:
        return residual_codes(x, self._arrays()).codes

    def decode(self, codes: Int[Array, "*b level"]) -> Float[Array, "*b dim"]:
        return residual_decode(codes, self._arrays())

    def initialize(self, x: Float[Array, "items dim"], *, iterations: int, key: PRNGKeyArray) -> None:
        """Set all codebooks by residual k-means on the latents of all items."""
        fitted = fit_codebooks(x, level_sizes=self.level_sizes, iterations=iterations, key=key)
        for codebook, centroids in zip(self.codebooks, fitted, strict=True):
            codebook[...] = centroids

    def _arrays(self) -> tuple[Float[Array, "codes dim"], ...]:
        return tuple(codebook[...] for codebook in self.codebooks)
