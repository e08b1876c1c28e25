"""Matching: an autoencoder for content and one for collaborative vectors, whose latents are to be equal."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from quantizers import Schedule, masked_mean
from semid.config import check_range
from semid.tokenizers.alignment.base import Alignment, AlignmentConfig, Signals
from semid.tokenizers.autoencoder import RQVAE, AutoencoderConfig, Pass, Tables
from semid.training import StepContext


@dataclass(frozen=True)
class MatchConfig(AlignmentConfig):
    """Each quantized vector is to equal the latent of the item's collaborative vector, which can be decoded from it
    (the matching autoencoders of A-LLMRec, arXiv 2404.11343)."""

    weight: Schedule = Schedule(1.0)
    """Weight of both mean squared errors; the content's has a weight of 1."""
    reconstruction: float = 0.5
    """Weight of the collaborative vectors' reconstruction, which keeps their latents apart (of the match: 1)."""
    name = "match"
    needs = frozenset({"vectors"})

    def __post_init__(self) -> None:
        check_range(self, "reconstruction", at_least=0)

    def build(self, method: AutoencoderConfig, *, dim: int, signals: Signals, seed: int) -> Match:
        del dim
        return Match(self, latent=method.latent, signal=signals.vectors.shape[1], rngs=nnx.Rngs(seed))


class Match(Alignment):
    """Mean squared errors of the latents and of the decoded collaborative vectors."""

    def __init__(self, config: MatchConfig, *, latent: int, signal: int, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = nnx.Linear(signal, latent, rngs=rngs)
        self.decoder = nnx.Linear(latent, signal, rngs=rngs)

    def __call__(
        self, model: RQVAE, rows: Int[Array, " n"], items: Pass, tables: Tables, context: StepContext
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        signals: Signals = tables.signals
        own, known = signals.vectors[rows], signals.known[rows]
        latent = self.encoder(own)
        match = masked_mean(jnp.square(items.quantized.vectors - latent).mean(-1), mask=known)
        decoded = masked_mean(jnp.square(self.decoder(latent) - own).mean(-1), mask=known)
        loss = match + self.config.reconstruction * decoded
        return self.config.weight(context.progress) * loss, {"alignment/match": match, "alignment/decoded": decoded}
