"""LETTER: InfoNCE between each quantized vector and the item's collaborative vector."""

from __future__ import annotations

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float, Int

from quantizers import Schedule, info_nce
from semid.config import check_range
from semid.tokenizers.alignment.base import Alignment, AlignmentConfig, Signals
from semid.tokenizers.autoencoder import RQVAE, AutoencoderConfig, Pass, Tables
from semid.training import StepContext


@dataclass(frozen=True)
class LetterConfig(AlignmentConfig):
    """InfoNCE between projected quantized vectors and the items' collaborative vectors (LETTER, arXiv 2405.07314)."""

    weight: Schedule = Schedule(1.0)
    """Weight of the loss."""
    temperature: float = 0.5
    """Temperature of the cosines. A low one makes codes tell single items apart, at the cost of what groups share."""
    name = "letter"
    needs = frozenset({"vectors"})

    def __post_init__(self) -> None:
        check_range(self, "temperature", above=0)

    def build(self, method: AutoencoderConfig, *, dim: int, signals: Signals, seed: int) -> Letter:
        del dim
        return Letter(self, latent=method.latent, signal=signals.vectors.shape[1], rngs=nnx.Rngs(seed))


class Letter(Alignment):
    """InfoNCE, in both directions, between projected quantized vectors and collaborative vectors."""

    def __init__(self, config: LetterConfig, *, latent: int, signal: int, rngs: nnx.Rngs) -> None:
        self.config = config
        self.head = nnx.Linear(latent, signal, rngs=rngs)

    def __call__(
        self, model: RQVAE, rows: Int[Array, " n"], items: Pass, tables: Tables, context: StepContext
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        signals: Signals = tables.signals
        quantized, own = self.head(items.quantized.vectors), signals.vectors[rows]
        options = {"temperature": self.config.temperature, "ids": rows, "mask": signals.known[rows]}
        loss = (info_nce(quantized, own, **options) + info_nce(own, quantized, **options)) / 2
        return self.config.weight(context.progress) * loss, {"alignment/letter": loss}
