"""Differentiable codes: the generator reads them instead of integers, so that its loss reaches the tokenizer."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from quantizers import Distance, ResidualCodes, distances, straight_through


class Relaxation(enum.Enum):
    """Relaxation of a chosen code to a mixture of its level's codes. Temperature and noise are the assignment's."""

    SOFT_BACKWARD = "soft_backward"
    """The code itself; its gradient is that of softmax(-d / temperature). On `Nearest` with a falling temperature,
    after UniGRec (arXiv 2601.17438); on `Gumbel`, DIGER's (arXiv 2601.19711)."""
    SOFT = "soft"
    """softmax(-d / temperature), value and gradient: UniGRec's own."""
    STRAIGHT_THROUGH = "straight_through"
    """The code itself; its gradient is passed to -d unchanged (Bengio et al., arXiv 1308.3432). A control: codes
    collapse."""


def code_mixtures(
    found: ResidualCodes,
    codebooks: Sequence[Float[Array, "_ dim"]],
    *,
    relaxation: Relaxation = Relaxation.SOFT_BACKWARD,
    distance: Distance = Distance.EUCLIDEAN,
) -> tuple[Float[Array, "*b _"], ...]:
    """Mixtures of codes, one per level, of a quantizer's search; the generator reads `mixture @ table` as embedding."""
    if relaxation is Relaxation.SOFT:
        return found.probabilities
    soft_codes = found.probabilities
    if relaxation is Relaxation.STRAIGHT_THROUGH:
        soft_codes = level_logits(found, codebooks, distance=distance)
    sizes = (len(book) for book in codebooks)
    chosen = (jax.nn.one_hot(found.codes[..., level], size) for level, size in enumerate(sizes))
    return tuple(straight_through(soft, hard) for soft, hard in zip(soft_codes, chosen, strict=True))


def level_logits(
    found: ResidualCodes, codebooks: Sequence[Float[Array, "_ dim"]], *, distance: Distance = Distance.EUCLIDEAN
) -> tuple[Float[Array, "*b _"], ...]:
    """-d of every code of every level: the nearer the code, the larger."""
    levels = enumerate(codebooks)
    return tuple(-distances(found.residuals[..., level, :], book, distance=distance) for level, book in levels)
