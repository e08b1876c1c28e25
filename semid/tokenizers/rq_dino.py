"""RQ-DINO: self-supervised codes of pictures, without reconstruction (MSCGRec, arXiv 2602.03713)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from quantizers import ResidualCodes, ResidualQuantizer


class RqDinoLoss(NamedTuple):
    """Terms of a step, to be added up (commitment with a weight of about .25), the mean of the teacher's logits, and
    codes."""

    agreement: Float[Array, ""]
    """Cross-entropy of the student's classes to the teacher's, over pairs of different crops, in nats."""
    codebook: Float[Array, ""]
    commitment: Float[Array, ""]
    center: Float[Array, " classes"]
    """Mean of the teacher's logits; its moving average over steps (DINO: decay .9) is the next `center`."""
    found: ResidualCodes
    """Codes of all crops, for the quantizer's `update_statistics`, to be called in every step."""


def rq_dino_loss(
    student: Float[Array, "crops n dim"],
    teacher: Float[Array, "large n classes"],
    *,
    quantizer: ResidualQuantizer,
    head: Callable[[Float[Array, "crops n dim"]], Float[Array, "crops n classes"]],
    center: Float[Array, " classes"],
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    key: PRNGKeyArray | None = None,
    progress: Float[Array, ""] | float = 1.0,
) -> RqDinoLoss:
    """DINO's loss (Caron et al., arXiv 2104.14294, eq. 3) with a residual quantizer before the student's head.

    `student` are the student encoder's states of all crops of a batch's pictures, the large ones first. `teacher` are
    the logits of the large crops by the teacher (encoder and head), whose parameters are moving averages of the
    student's and which does not quantize. Each crop's quantized state predicts the teacher's classes of every other
    large crop. A picture's codes are those of the student's state of the whole picture. For `key` and `progress` see
    ResidualQuantizer; a quantizer with `decay` has no codebook loss, so leave out `codebook`.

    For accelerators: with DINO's crops (two of 224 pixels, eight of 96) and a ViT-S/16 of 4.6 billion products a step
    costs about 115 GFLOP per picture (3.5 whole pictures forth and back by the student, two forth by the teacher), so
    that 100 epochs over 4,000 posters are 5 * 10^16: minutes on an accelerator at 10^14 a second, days on two cores.

    Raises ValueError for fewer crops of the student than of the teacher, or only one.
    """
    if not len(teacher) <= len(student) or len(student) < 2:
        raise ValueError(
            f"expected two crops or more, those that the teacher sees first, got {len(student)} and {len(teacher)}"
        )
    found = quantizer.search(student, key=key, progress=progress)
    quantized = quantizer.quantize_found(student, found)
    targets = jax.nn.softmax((jax.lax.stop_gradient(teacher) - center[None, None]) / teacher_temperature)
    log_probs = jax.nn.log_softmax(head(quantized.vectors) / student_temperature)
    pairs = -jnp.einsum("gnc,vnc->gv", targets, log_probs) / student.shape[1]
    others = 1 - jnp.eye(len(teacher), len(student))
    agreement = jnp.sum(pairs * others) / jnp.sum(others)
    losses = quantized.losses
    return RqDinoLoss(agreement, losses.codebook, losses.commitment, jnp.mean(teacher, axis=(0, 1)), found)
