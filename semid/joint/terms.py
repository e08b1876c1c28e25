"""Losses between tokenizer and generator, besides the generation loss."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from quantizers import Distance, info_nce, residual_codes
from semid.joint.codes import level_logits


def code_agreement(
    a: Float[Array, "n latent"],
    b: Float[Array, "n latent"],
    codebooks: Sequence[Float[Array, "_ latent"]],
    *,
    distance: Distance = Distance.EUCLIDEAN,
) -> Float[Array, ""]:
    """KL(A || B) + KL(B || A) of the code probabilities of a row's two latents, summed over levels, mean over rows.

    A level's codes have the probabilities softmax(-d). Between a history's summary and its target item this is
    ETEGRec's sequence-item alignment (arXiv 2409.05546); between a teacher's and the item's own latents, distillation
    into the tokenizer after UniGRec (arXiv 2601.17438), whose release has the history's summary in place of the item's
    own. (Both releases leave out the minus.)
    """
    each = jnp.zeros(len(a))
    for of_a, of_b in zip(*(_log_shares(x, codebooks, distance) for x in (a, b)), strict=True):
        each = each + ((jnp.exp(of_a) - jnp.exp(of_b)) * (of_a - of_b)).sum(-1)
    return each.mean()


def symmetric_info_nce(
    a: Float[Array, "n dim"],
    b: Float[Array, "n dim"],
    *,
    items: Int[Array, " n"],
) -> Float[Array, ""]:
    """InfoNCE between a row's two vectors, in both directions; rows of the same target item are no negatives.

    Between the decoder's first state and the tokenizer's reconstruction of the target this is ETEGRec's
    preference-semantic alignment (arXiv 2409.05546); between that state and a teacher's vector, UniGRec's distillation
    into the generator (arXiv 2601.17438).
    """
    return (info_nce(a, b, temperature=0.07, ids=items) + info_nce(b, a, temperature=0.07, ids=items)) / 2


def session_contrast(
    anchors: Float[Array, "n dim"],
    targets: Float[Array, "n dim"],
    *,
    items: Int[Array, " n"],
    sessions: Int[Array, " n"],
) -> Float[Array, ""]:
    """InfoNCE from queries, or items seen before, to the items that followed (LEMUR's SQDC, arXiv 2511.10962).

    Other targets of the same session, and the same item elsewhere, are no negatives.
    """
    same = sessions[:, None] == sessions[None, :]
    return info_nce(anchors, targets, temperature=0.02, ids=items, false_negatives=same)


def _log_shares(
    x: Float[Array, "n latent"],
    codebooks: Sequence[Float[Array, "_ latent"]],
    distance: Distance,
) -> list[Float[Array, "n _"]]:
    """Logarithms of the probabilities of a latent's codes, one array per level."""
    logits = level_logits(residual_codes(x, codebooks, distance=distance), codebooks, distance=distance)
    return [jax.nn.log_softmax(of_level) for of_level in logits]
