"""Distillation: the item's collaborative vector is regressed on its quantized vector."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from quantizers import Schedule, masked_mean
from semid.tokenizers.alignment.base import Alignment, AlignmentConfig, Signals
from semid.tokenizers.autoencoder import RQVAE, AutoencoderConfig, Pass, Tables
from semid.training import StepContext


@dataclass(frozen=True)
class DistillConfig(AlignmentConfig):
    """Regression: each quantized vector, projected, is to equal the item's collaborative vector."""

    weight: Schedule = Schedule(1.0)
    """Weight of the mean squared error; the content's has a weight of 1."""
    name = "distill"
    needs = frozenset({"vectors"})

    def build(self, method: AutoencoderConfig, *, dim: int, signals: Signals, seed: int) -> Distill:
        del dim
        return Distill(self, latent=method.latent, signal=signals.vectors.shape[1], rngs=nnx.Rngs(seed))


class Distill(Alignment):
    """Mean squared error between projected quantized vectors and collaborative vectors."""

    def __init__(self, config: DistillConfig, *, latent: int, signal: int, rngs: nnx.Rngs) -> None:
        self.config = config
        self.head = nnx.Linear(latent, signal, rngs=rngs)

    def __call__(
        self, model: RQVAE, rows: Int[Array, " n"], items: Pass, tables: Tables, context: StepContext
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        signals: Signals = tables.signals
        error = jnp.square(self.head(items.quantized.vectors) - signals.vectors[rows]).mean(-1)
        loss = masked_mean(error, mask=signals.known[rows])
        return self.config.weight(context.progress) * loss, {"alignment/distill": loss}
