"""What a run of end-to-end training is told: its stages, the phases of its joint steps, and how codes follow."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from quantizers import Schedule
from semid.errors import SemidError
from semid.generators import GeneratorConfig
from semid.joint.model import HISTORY_TERMS, Objective, Reach, StepConfig
from semid.tokenizers import RQVaeConfig
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import RQTransformerConfig


class Surgery(enum.Enum):
    """What becomes of a tokenizer's gradient and a recommendation's that oppose each other."""

    NONE = "none"
    """They are added up."""
    PROJECT = "project"
    """The recommendation's gives way, parameter by parameter (BLOGER, arXiv 2510.21242)."""


def _training(epochs: float, batch_size: int, learning_rate: float, **rates: float) -> TrainingConfig:
    optimizer = OptimizerConfig(learning_rate=learning_rate, rates=tuple(rates.items()))
    return TrainingConfig(epochs=epochs, batch_size=batch_size, optimizer=optimizer)


@dataclass(frozen=True)
class Phase:
    """Joint steps of one kind."""

    training: TrainingConfig
    """How many, at which rates; a rate of 0 for `encoder`, `autoencoder` or `generator` freezes it."""
    step: StepConfig = StepConfig()
    """What a step does."""
    surgery: Surgery = Surgery.NONE
    """What becomes of gradients in conflict."""

    def __post_init__(self) -> None:
        step = self.step
        if step.reach is Reach.ENCODER and not step.window and set(step.objective.weights(0.0)) <= HISTORY_TERMS:
            raise SemidError(
                "no loss reaches the encoders: without a window only terms of the target's side do; give a window of "
                "at least 1, or weight to contrast, or choose Reach.TOKENIZER"
            )


@dataclass(frozen=True)
class JointConfig:
    """The stages, in their order."""

    encoder: TrainingConfig | None = _training(2, 256, 1e-3)
    """Encoders learn to tell the next item from the others of a batch; None: they stay as they are given, but for the
    scale and bias that standardize their vectors over the catalogue."""
    tokenizer: RQVaeConfig = RQVaeConfig(hidden=(128,))
    """The RQ-VAE, warmed up on the encoders' vectors."""
    generator: GeneratorConfig = GeneratorConfig(training=_training(12, 64, 3e-3))
    """The generator, warmed up on the first codes, and how candidates are validated."""
    joint: tuple[Phase, ...] = (
        Phase(_training(3, 256, 1e-3, autoencoder=0.0), StepConfig(Objective.only(generation=Schedule(1.0)))),
    )
    """Encoders and generator together; several phases take turns; none is the staged way."""
    cycles: int = 1
    """How often the phases take their turns."""
    refresh: float | None = None
    """Epochs of joint steps after which the whole catalogue's codes are made anew, from the bank; None: joint steps
    hold the codes."""
    refit: bool = True
    """After a cycle the tokenizer is fitted anew, to the vectors that the encoders have come to, and the generator
    trained anew on its codes; else both go on as they are, with the codes that these vectors get."""
    finetune: TrainingConfig = _training(12, 64, 1e-3)
    """The generator alone, on the codes that came out."""
    tie_break: int = 64
    """Size of the last level, which tells items apart that share their codes: how many may."""

    def __post_init__(self) -> None:
        if not isinstance(self.generator.model, RQTransformerConfig):
            raise SemidError(
                f"end-to-end training is of the RQ-Transformer, not of {type(self.generator.model).__name__}"
            )
        if not (self.refresh is None or self.refresh > 0) or min(self.tie_break, self.cycles) < 1:
            raise SemidError(
                "expected refresh above 0 or none, tie_break and cycles of at least 1, "
                f"got {self.refresh}, {self.tie_break} and {self.cycles}"
            )
