"""Co-occurrence: InfoNCE from each quantized vector to that of a co-consumed item."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from quantizers import Schedule, info_nce
from semid.config import check_range
from semid.tokenizers.alignment.base import Alignment, AlignmentConfig, Signals, draw_entries, is_entry
from semid.tokenizers.autoencoder import RQVAE, AutoencoderConfig, Pass, Tables
from semid.training import StepContext


@dataclass(frozen=True)
class CooccurrenceConfig(AlignmentConfig):
    """Co-consumed items: InfoNCE from each quantized vector to that of an item of the same users, drawn by PPMI."""

    weight: Schedule = Schedule(0.3)
    """Weight of the loss."""
    temperature: float = 0.1
    """Temperature of the cosines."""
    window: int = 5
    """Positions of a history within which two items are co-consumed."""
    name = "cooccurrence"
    needs = frozenset({"partners", "partner_log_share"})

    def __post_init__(self) -> None:
        check_range(self, "temperature", above=0)

    @property
    def co_consumption_window(self) -> int | None:
        return self.window

    def build(self, method: AutoencoderConfig, *, dim: int, signals: Signals, seed: int) -> Cooccurrence:
        del dim, signals
        return Cooccurrence(self, latent=method.latent, rngs=nnx.Rngs(seed))


class Cooccurrence(Alignment):
    """InfoNCE between projected quantized vectors of items and of their co-consumed partners."""

    def __init__(self, config: CooccurrenceConfig, *, latent: int, rngs: nnx.Rngs) -> None:
        self.config = config
        self.head = nnx.Linear(latent, latent, rngs=rngs)

    def __call__(
        self, model: RQVAE, rows: Int[Array, " n"], items: Pass, tables: Tables, context: StepContext
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        signals: Signals = tables.signals
        draw_key, search_key = jax.random.split(context.key)
        partners, mask = draw_entries(signals.partners, rows, draw_key)
        others = model(tables.x[partners], mask=mask, key=search_key, progress=context.progress)
        loss = info_nce(
            self.head(items.quantized.vectors),
            self.head(others.quantized.vectors),
            temperature=self.config.temperature,
            mask=mask,
            ids=partners,
            false_negatives=is_entry(signals.partners[rows], partners) | (rows[:, None] == partners[None, :]),
            log_popularity=signals.partner_log_share[partners],
        )
        return self.config.weight(context.progress) * loss, {"alignment/cooccurrence": loss}
