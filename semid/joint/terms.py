"""Losses between tokenizer and generator, next to the generation loss."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from quantizers import Distance, info_nce, residual_codes
from semid.joint.codes import level_logits


def code_agreement(
    a: Float[Array, "n latent"],
    b: Float[Array, "n latent"],
    codebooks: Sequence[Float[Array, "_ latent"]],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    distance: Distance = Distance.EUCLIDEAN,
    mask: Bool[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """KL(A || B) + KL(B || A) of the codes that two latents of a row take, summed over levels, mean over rows.

    A level's codes have the probabilities softmax(-d / temperature). Of a history's summary and its target item this is
    ETEGRec's sequence-item alignment (arXiv 2409.05546); of a teacher's and the item's own latents, a distillation into
    the tokenizer after UniGRec (arXiv 2601.17438), whose release has the history's summary in place of the item's own.
    (Both releases leave out the minus.) 0 if no row counts.
    """
    each = jnp.zeros(len(a))
    for of_a, of_b in zip(
        *(_log_shares(_kept(x, mask), codebooks, temperature, distance) for x in (a, b)), strict=True
    ):
        each = each + ((jnp.exp(of_a) - jnp.exp(of_b)) * (of_a - of_b)).sum(-1)
    if mask is None:
        return each.mean()
    return jnp.where(mask, each, 0).sum() / jnp.maximum(mask.sum(), 1).astype(jnp.float32)


def symmetric_info_nce(
    a: Float[Array, "n dim"],
    b: Float[Array, "n dim"],
    *,
    items: Int[Array, " n"],
    temperature: float = 0.07,
    mask: Bool[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """Contrast of two vectors of a row, each to find the other; rows of the same target item are no negatives.

    Of the decoder's first state and the tokenizer's reconstruction of the target this is ETEGRec's
    preference-semantic alignment (arXiv 2409.05546); of that state and a teacher's, UniGRec's distillation into the
    generator (arXiv 2601.17438).
    """
    options = {"temperature": temperature, "ids": items, "mask": mask}
    return (info_nce(a, b, **options) + info_nce(b, a, **options)) / 2


def session_contrast(
    anchors: Float[Array, "n dim"],
    targets: Float[Array, "n dim"],
    *,
    items: Int[Array, " n"],
    sessions: Int[Array, " n"],
    temperature: float = 0.02,
    mask: Bool[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """Contrast of queries, or of items seen before, with the items that followed (LEMUR's SQDC, arXiv 2511.10962).

    Other targets of the same session, and the same item elsewhere, are no negatives.
    """
    same = sessions[:, None] == sessions[None, :]
    return info_nce(anchors, targets, temperature=temperature, ids=items, false_negatives=same, mask=mask)


def _log_shares(
    x: Float[Array, "n latent"],
    codebooks: Sequence[Float[Array, "_ latent"]],
    temperature: float | Float[Array, ""],
    distance: Distance,
) -> list[Float[Array, "n _"]]:
    """Logarithms of the probabilities of a latent's codes, one array per level."""
    logits = level_logits(residual_codes(x, codebooks, distance=distance), codebooks, distance=distance)
    return [jax.nn.log_softmax(of_level / temperature) for of_level in logits]


def _kept(x: Float[Array, "n dim"], mask: Bool[Array, " n"] | None) -> Float[Array, "n dim"]:
    """Masked rows zero, before any arithmetic: a NaN there reaches no gradient."""
    return x if mask is None else jnp.where(mask[:, None], x, 0)
