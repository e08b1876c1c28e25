"""Configuration of end-to-end training: its stages, the phases of its joint steps, and when codes change."""

from __future__ import annotations

import abc
import enum
from dataclasses import dataclass, replace
from typing import ClassVar

from quantizers import Schedule
from semid.config import check_range
from semid.errors import SemidError, did_you_mean
from semid.generators import GeneratorConfig
from semid.joint.model import (
    HISTORY_TERMS,
    PARTS,
    TOKENIZER_TERMS,
    Objective,
    Reach,
    StepConfig,
    joint_loss,
    joint_losses,
)
from semid.tokenizers import RQVaeConfig
from semid.training import Loss, OptimizerConfig, TrainingConfig, bound_loss, rate_of
from seq_models import SoftmaxOver


class Surgery(enum.Enum):
    """Treatment of conflicts between the gradients of tokenizer and recommendation."""

    NONE = "none"
    """The gradients are added up."""
    PROJECT = "project"
    """The recommendation's is projected, parameter by parameter (BLOGER, arXiv 2510.21242)."""


def _training(epochs: float, batch_size: int, learning_rate: float, **rates: float) -> TrainingConfig:
    optimizer = OptimizerConfig(learning_rate=learning_rate, rates=tuple(rates.items()))
    return TrainingConfig(epochs=epochs, batch_size=batch_size, optimizer=optimizer)


@dataclass(frozen=True)
class Phase:
    """Joint steps of one kind."""

    training: TrainingConfig
    """Their number and rates; a rate of 0 for `encoder`, `autoencoder` or `generator` freezes that part."""
    step: StepConfig = StepConfig()
    """Losses of a step, and the parts that they reach."""
    surgery: Surgery = Surgery.NONE
    """Treatment of gradients in conflict."""

    def __post_init__(self) -> None:
        step = self.step
        for start, _ in self.training.optimizer.rates:
            if not any(f"{part}/".startswith(start) or start.startswith(f"{part}/") for part in PARTS):
                raise SemidError(f"rates: the joint model has no part {start!r}{did_you_mean(start, PARTS)}")
        if not step.objective.weights(0.0):
            raise SemidError("no term of the objective has a weight: joint steps would learn nothing; give one to some")
        terms = set(step.objective.weights(0.0))
        if self.surgery is Surgery.PROJECT and not (terms & TOKENIZER_TERMS and terms - TOKENIZER_TERMS):
            raise SemidError(
                "surgery treats the gradients of the tokenizer's terms and of the others, and the objective has those "
                f"of one alone ({', '.join(sorted(terms))}); weigh one of {', '.join(sorted(TOKENIZER_TERMS))} and one "
                "of the others, or leave surgery out"
            )
        if step.reach is Reach.ENCODER and not step.backward and self._rate("encoder/") > 0:
            raise SemidError(
                "no loss reaches the encoders: none of the items is differentiated; give backward above 0, or the "
                "encoder a rate of 0, or choose Reach.TOKENIZER"
            )
        if step.reach is Reach.ENCODER and not step.window and set(step.objective.weights(0.0)) <= HISTORY_TERMS:
            raise SemidError(
                "no loss reaches the encoders: without a window only terms of the target's side do; give a window of "
                "at least 1, or weight to contrast, or choose Reach.TOKENIZER"
            )

    @property
    def trains_codebooks(self) -> bool:
        """The codebooks' rate is above 0."""
        return self._rate("autoencoder/quantizer/codebooks") > 0

    def _rate(self, name: str) -> float:
        """Share of the learning rate that a part of the joint model takes."""
        return rate_of(name, self.training.optimizer.rates)

    def loss(self, generator: GeneratorConfig) -> Loss:
        """Loss of a step that trains this generator; two losses where gradients in conflict are treated."""
        return bound_loss(
            joint_loss if self.surgery is Surgery.NONE else joint_losses,
            config=self.step,
            smoothing=generator.objective.label_smoothing,
            repeats=generator.objective.repeats is not False,
            hold_codebooks=not self.trains_codebooks,
        )


class CodeSchedule(abc.ABC):
    """Schedule by which the catalogue's codes change in end-to-end training."""

    @property
    @abc.abstractmethod
    def refits(self) -> bool:
        """After each cycle of joint steps, tokenizer and generator are trained again from the start."""

    @property
    @abc.abstractmethod
    def refresh_every(self) -> float | None:
        """Epochs of joint steps between refreshes of all codes; None: joint steps hold the codes."""


@dataclass(frozen=True)
class HoldThenRefit(CodeSchedule):
    """Codes stay fixed during the joint steps. Then the tokenizer is refitted to the updated vectors and the generator
    retrained on the new codes."""

    name: ClassVar[str] = "hold-then-refit"

    refits = True
    refresh_every = None


@dataclass(frozen=True)
class Refresh(CodeSchedule):
    """All codes are recomputed from the memory bank during the joint steps, with the tokenizer as it is by then."""

    name: ClassVar[str] = "refresh"

    every: float = 0.25
    """Epochs of joint steps between refreshes."""

    refits = False

    def __post_init__(self) -> None:
        check_range(self, "every", above=0)

    @property
    def refresh_every(self) -> float:
        """Epochs of joint steps between refreshes of all codes."""
        return self.every


@dataclass(frozen=True)
class JointConfig:
    """Settings of the stages, in their order."""

    encoder: TrainingConfig | None = _training(2, 256, 1e-3)
    """Warm-up of the encoders, which learn to tell the next item from the others of a batch. None: only their last
    scale and bias change, to standardize their vectors over the catalogue."""
    tokenizer: RQVaeConfig = RQVaeConfig(hidden=(128,))
    """The RQ-VAE, warmed up on the encoders' vectors."""
    generator: GeneratorConfig = GeneratorConfig(training=_training(12, 64, 3e-3))
    """The generator, warmed up on the first codes, and the validation of candidates."""
    joint: tuple[Phase, ...] = (
        Phase(_training(3, 256, 1e-3, autoencoder=0.0), StepConfig(Objective.only(generation=Schedule(1.0)))),
    )
    """Joint steps of encoders and generator; several phases follow one another; none: staged training."""
    cycles: int = 1
    """Repetitions of the sequence of phases."""
    codes: CodeSchedule = HoldThenRefit()
    """When the catalogue's codes change."""
    finetune: TrainingConfig = _training(12, 64, 1e-3)
    """Last training of the generator alone, on the final codes."""
    tie_break: int = 64
    """Size of the last level, which tells items that share their codes apart: at most so many may."""

    def resolved(self, *, items: int, interactions: int, repeats: bool) -> JointConfig:
        """Fill in level sizes and epochs by the numbers of items and training interactions, and what depends on whether
        items repeat."""
        generator = self.generator.resolved(interactions, repeats=repeats)
        return replace(self, tokenizer=self.tokenizer.resolved(items), generator=generator)

    def __post_init__(self) -> None:
        if not self.generator.model.decodes_from_state:
            raise SemidError(
                f"end-to-end training is of the RQ-Transformer, not of {type(self.generator.model).__name__}"
            )
        if self.generator.model.has_dense_head:
            raise SemidError(
                "joint steps train no dense head; take the RQ-Transformer without dense_share, or `semid train`"
            )
        if self.generator.start_from_teacher:
            raise SemidError("end-to-end training starts from no teacher; leave start_from_teacher out (`semid train`)")
        if self.generator.features is not None:
            raise SemidError("end-to-end training reads what its encoders make; leave features out (`semid train`)")
        objective = self.generator.objective
        if objective.distillation or objective.teacher_graph:
            raise SemidError(
                "end-to-end training distills from no teacher's ranking; leave distillation and teacher_graph out "
                "(`semid train`)"
            )
        if objective.normalization is not SoftmaxOver.VOCABULARY:
            raise SemidError(
                "joint steps normalize over the vocabulary, not over children; leave normalization out (`semid train`)"
            )
        for name in ("event_weights", "interaction_weights", "state_column"):
            if getattr(objective, name):
                raise SemidError(
                    f"joint steps weigh targets alike and pull states to no vectors; leave {name} out (`semid train`)"
                )
        if self.codes.refresh_every is not None and any(phase.step.dropout for phase in self.joint):
            raise SemidError(
                "codes are refreshed from the bank, which holds noisy vectors under dropout; leave dropout of the step "
                "out, or choose HoldThenRefit"
            )
        trainings = {"encoder": self.encoder, "tokenizer.training": self.tokenizer.training, "finetune": self.finetune}
        trainings |= {f"joint.{number}.training": phase.training for number, phase in enumerate(self.joint)}
        for name, training in trainings.items():
            if training is not None and training.epochs is None:
                raise SemidError(f"expected a number of epochs for {name}, got none; name one")
        check_range(self, "tie_break", "cycles", at_least=1)
