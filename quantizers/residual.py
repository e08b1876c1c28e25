"""Residual quantization: each level quantizes the residual of those before (RQ-VAE: Lee et al., arXiv 2203.01941)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from quantizers.assignment import Assignment, Nearest
from quantizers.distances import Distance, distances
from quantizers.gradients import GradientPath, rotate, soft_vectors, straight_through
from quantizers.maintenance import cluster_means, code_counts, ema_codebook, fit_codebooks
from quantizers.types import Quantized, QuantizerLosses

Codebooks = Sequence[Float[Array, "_ dim"]]

_ROUNDING = 1e-5  # a residual shorter than this share of the level's input is a rounding error
_USAGE_DECAY = 0.99  # decay of `ResidualQuantizer.usage` if codebooks are learned by gradient (DIGER's)


class ResidualCodes(NamedTuple):
    """Codes of a residual search, with the residual that each level quantizes and the chosen code vector, in float32.

    `probabilities` are the assignment's, one array per level; under jit they are not computed if not used.
    """

    codes: Int[Array, "*b level"]
    residuals: Float[Array, "*b level dim"]
    chosen: Float[Array, "*b level dim"]
    probabilities: tuple[Float[Array, "*b _"], ...]


@partial(jax.jit, static_argnames=("assignments", "distance", "path", "unit_norm"))
def residual_codes(
    x: Float[Array, "*b dim"],
    codebooks: Codebooks,
    *,
    assignments: Assignment | tuple[Assignment, ...] = Nearest(),
    usage: Sequence[Float[Array, " _"]] | None = None,
    mask: Bool[Array, "*b"] | None = None,
    key: PRNGKeyArray | None = None,
    progress: Float[Array, ""] | float = 1.0,
    distance: Distance = Distance.EUCLIDEAN,
    path: GradientPath = GradientPath.STRAIGHT_THROUGH,
    unit_norm: bool = False,
) -> ResidualCodes:
    """Codes level by level, by one assignment for all levels or one per level; the nearest codes by default.

    Residuals subtract the code vector without its gradient, `r_l = r_{l-1} - sg(e_l)`, so that the derivative of each
    residual by x is the identity. (Subtracting a straight-through code would make it zero from the second level on.)
    On the `SOFT` path they subtract the soft vector with its gradient. Without `usage`, all codes count as equally
    used. With `unit_norm`, every residual is scaled to norm 1 (see `unit_residuals`) before the next level.
    """
    lead = x.shape[:-1]
    residual = _unmasked(x.astype(jnp.float32), mask).reshape(-1, x.shape[-1])
    keep = jnp.ones(len(residual), bool) if mask is None else mask.reshape(-1)
    codes, residuals, chosen, probabilities = [], [], [], []
    for level, assign in enumerate(assignments_per_level(assignments, len(codebooks))):
        book = codebooks[level].astype(jnp.float32)
        assigned = assign(
            distances(residual, book, distance=distance),
            mask=keep,
            usage=jnp.full(len(book), 1 / len(book)) if usage is None else usage[level],
            key=None if key is None else jax.random.fold_in(key, level),
            progress=progress,
        )
        vector = book[assigned.codes]
        codes.append(assigned.codes.reshape(lead))
        residuals.append(residual.reshape(x.shape))
        chosen.append(vector.reshape(x.shape))
        probabilities.append(assigned.probabilities.reshape(*lead, len(book)))
        soft = path is GradientPath.SOFT
        rest = residual - (soft_vectors(assigned.probabilities, book) if soft else jax.lax.stop_gradient(vector))
        residual = unit_residuals(rest, of=residual) if unit_norm else rest
    return ResidualCodes(jnp.stack(codes, -1), jnp.stack(residuals, -2), jnp.stack(chosen, -2), tuple(probabilities))


@partial(jax.jit, static_argnames=("distance", "unit_norm"))
def residual_encode(
    x: Float[Array, "*b dim"],
    codebooks: Codebooks,
    *,
    distance: Distance = Distance.EUCLIDEAN,
    unit_norm: bool = False,
) -> Int[Array, "*b level"]:
    """Nearest codes only: the other results of `residual_codes` are not computed."""
    return residual_codes(x, codebooks, distance=distance, unit_norm=unit_norm).codes


@partial(jax.jit, static_argnames="path")
def quantize_found(
    x: Float[Array, "*b dim"],
    found: ResidualCodes,
    codebooks: Codebooks,
    *,
    mask: Bool[Array, "*b"] | None = None,
    path: GradientPath = GradientPath.STRAIGHT_THROUGH,
) -> Quantized:
    """Quantized vectors of the codes `found` by `residual_codes`, and losses summed over levels.

    See `level_errors` for `mask`.
    """
    codebook_errors = level_errors(jax.lax.stop_gradient(found.residuals) - found.chosen, mask=mask)
    commitment_errors = level_errors(found.residuals - jax.lax.stop_gradient(found.chosen), mask=mask)
    losses = QuantizerLosses(codebook_errors.sum(), commitment_errors.sum())
    hard = found.chosen.sum(-2)
    if path is GradientPath.STRAIGHT_THROUGH:
        vectors = straight_through(x, hard)
    elif path is GradientPath.ROTATION:
        vectors = rotate(_unmasked(x, mask), hard)
    else:
        levels = zip(found.probabilities, codebooks, strict=True)
        soft = jnp.stack([soft_vectors(share, book) for share, book in levels], -2).sum(-2)
        vectors = soft if path is GradientPath.SOFT else straight_through(soft, hard)
    return Quantized(found.codes, vectors.astype(x.dtype), losses)


@jax.jit
def residual_quantize(
    x: Float[Array, "*b dim"], codebooks: Codebooks, *, mask: Bool[Array, "*b"] | None = None
) -> Quantized:
    """Nearest codes, straight-through sum of their vectors, and losses."""
    return quantize_found(x, residual_codes(x, codebooks), codebooks, mask=mask)


def level_errors(
    difference: Float[Array, "*b level dim"], *, mask: Bool[Array, "*b"] | None = None
) -> Float[Array, " level"]:
    """Mean square of each level over dimensions and over the items where `mask` is true (0 if there are none)."""
    if mask is None:
        mask = jnp.ones(difference.shape[:-2], bool)
    # Mask before the square, so that a NaN of a masked item does not reach the gradient.
    masked = jnp.where(mask[..., None, None], difference, 0)
    count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    return jnp.square(masked).mean(-1).sum(range(mask.ndim)) / count


@jax.jit
def residual_decode(codes: Integer[Array, "*b level"], codebooks: Codebooks) -> Float[Array, "*b dim"]:
    """Sum of the code vectors; a code outside its codebook gives NaN."""
    if codes.shape[-1] != len(codebooks):
        raise ValueError(f"decode: expected codes of shape [..., {len(codebooks)}], one per level, got {codes.shape}")
    vectors = [jnp.take(codebook, codes[..., level], axis=0) for level, codebook in enumerate(codebooks)]
    return jnp.stack(vectors, -2).sum(-2)


def unit_residuals(residuals: Float[Array, "*b dim"], *, of: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
    """Residuals `of` vectors scaled to norm 1; one below 1e-5 of its vector is a rounding error and becomes 0."""
    squares = jnp.square(residuals).sum(-1, keepdims=True)
    real = squares > _ROUNDING**2 * jnp.square(of).sum(-1, keepdims=True)
    return jnp.where(real, residuals * jax.lax.rsqrt(jnp.where(real, squares, 1)), 0)


def assignments_per_level(assignments: Assignment | tuple[Assignment, ...], num_levels: int) -> tuple[Assignment, ...]:
    """One assignment per level. Raises ValueError for a wrong number."""
    listed = assignments if isinstance(assignments, tuple) else (assignments,) * num_levels
    if len(listed) != num_levels:
        raise ValueError(f"expected one assignment, or one for each of {num_levels} levels, got {len(listed)}")
    return listed


def _unmasked(x: Float[Array, "*b dim"], mask: Bool[Array, "*b"] | None) -> Float[Array, "*b dim"]:
    """`x` without the gradients and NaNs of masked rows, which would reach the shared codebooks."""
    if mask is None:
        return x
    return jnp.where(mask[..., None], x, jax.lax.stop_gradient(jnp.nan_to_num(x, nan=0, posinf=0, neginf=0)))


class Codebook(nnx.Param):
    """Code vectors `Float[codes, dim]` learned by gradient; training selects them by this variable type."""


class RunningStatistic(nnx.Variable):
    """Variable set by `ResidualQuantizer.update_statistics` and not by gradients or optimizers."""


class ResidualQuantizer(nnx.Module):
    """Residual quantizer learned by gradient: add `losses.codebook` and about .25 `losses.commitment` to the loss.

    With `decay` (.99), codebooks are moving averages of their inputs instead: leave out `losses.codebook` and call
    `update_statistics` in every step, which also updates `usage`, the recent share of inputs on each code.
    """

    def __init__(
        self,
        level_sizes: Sequence[int],
        *,
        dim: int,
        rngs: nnx.Rngs,
        assignment: Assignment | Sequence[Assignment] = Nearest(),
        path: GradientPath = GradientPath.STRAIGHT_THROUGH,
        distance: Distance = Distance.EUCLIDEAN,
        decay: float | None = None,
    ):
        if not level_sizes or min(level_sizes) < 1 or dim < 1:
            raise ValueError(
                f"ResidualQuantizer: expected level_sizes and dim of 1 or more, got {level_sizes} and {dim}"
            )
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"ResidualQuantizer: expected decay in [0, 1), or None for gradients, got {decay}")
        self.level_sizes = tuple(level_sizes)
        listed = tuple(assignment) if isinstance(assignment, Sequence) else assignment
        self.assignments = assignments_per_level(listed, len(self.level_sizes))
        self.path, self.distance, self.decay = path, distance, decay
        scale, kind = dim**-0.5, Codebook if decay is None else RunningStatistic
        self.codebooks = nnx.List(
            [kind(scale * jax.random.normal(rngs.params(), (size, dim))) for size in self.level_sizes]
        )
        self.usage = nnx.List([RunningStatistic(jnp.full(size, 1 / size)) for size in self.level_sizes])

    def __call__(
        self,
        x: Float[Array, "*b dim"],
        *,
        mask: Bool[Array, "*b"] | None = None,
        key: PRNGKeyArray | None = None,
        progress: Float[Array, ""] | float = 1.0,
    ) -> Quantized:
        return self.quantize_found(x, self.search(x, mask=mask, key=key, progress=progress), mask=mask)

    def search(
        self,
        x: Float[Array, "*b dim"],
        *,
        mask: Bool[Array, "*b"] | None = None,
        key: PRNGKeyArray | None = None,
        progress: Float[Array, ""] | float = 1.0,
    ) -> ResidualCodes:
        """Search codes: the first half of a call. `progress` is the share of training done; without `key`, no noise."""
        usage = tuple(share[...] for share in self.usage)
        options = {"usage": usage, "mask": mask, "key": key, "progress": progress}
        static = {"assignments": self.assignments, "distance": self.distance, "path": self.path}
        return residual_codes(x, self._arrays(), **options, **static)

    def quantize_found(
        self, x: Float[Array, "*b dim"], found: ResidualCodes, *, mask: Bool[Array, "*b"] | None = None
    ) -> Quantized:
        """Quantize with the codes found by `search`: the second half of a call."""
        return quantize_found(x, found, self._arrays(), mask=mask, path=self.path)

    def update_statistics(self, found: ResidualCodes, *, mask: Bool[Array, "*b"] | None = None) -> None:
        """Update `usage` and, with `decay`, the codebooks by the codes found; no change if all rows are masked."""
        decay = _USAGE_DECAY if self.decay is None else self.decay
        keep = jnp.ones(found.codes.shape[:-1], bool) if mask is None else mask
        total = jnp.maximum(keep.sum(), 1).astype(jnp.float32)
        counts = code_counts(found.codes, level_sizes=self.level_sizes, mask=keep)
        for level, (book, usage) in enumerate(zip(self.codebooks, self.usage, strict=True)):
            old, shares = usage[...], counts[level].astype(jnp.float32) / total
            if self.decay is not None:
                residuals = jax.lax.stop_gradient(found.residuals[..., level, :]).reshape(-1, book.shape[1])
                flat = found.codes[..., level].reshape(-1)
                means = cluster_means(residuals, flat, num_codes=len(old), mask=keep.reshape(-1))
                book[...] = ema_codebook(book[...], old, means=means, shares=shares, decay=decay)
            usage[...] = jnp.where(keep.any(), decay * old + (1 - decay) * shares, old)

    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]:
        """Nearest codes, whatever the assignment in training."""
        return residual_encode(x, self._arrays(), distance=self.distance)

    def decode(self, codes: Integer[Array, "*b level"]) -> Float[Array, "*b dim"]:
        return residual_decode(codes, self._arrays())

    def initialize(self, x: Float[Array, "items dim"], *, iterations: int, key: PRNGKeyArray) -> None:
        """Set all codebooks by residual k-means on the latents of all items, and reset `usage`."""
        fitted = fit_codebooks(x, level_sizes=self.level_sizes, iterations=iterations, key=key, distance=self.distance)
        for codebook, usage, centroids in zip(self.codebooks, self.usage, fitted, strict=True):
            codebook[...] = centroids
            usage[...] = jnp.full_like(usage[...], 1 / len(centroids))

    def _arrays(self) -> tuple[Float[Array, "_ dim"], ...]:
        return tuple(jnp.asarray(codebook[...]) for codebook in self.codebooks)  # a trained model may hold NumPy arrays
