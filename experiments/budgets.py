"""Budgets of experiments: the full config, a share of its epochs, or a few steps of tiny models."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from experiments.experiment import Experiment
from semid.encoders import BlocksConfig, FusionConfig, PretrainedText, TextEncoderConfig, TextFromScratch
from semid.generators import GeneratorConfig
from semid.joint import JointConfig, Refresh
from semid.tokenizers import ProductConfig, RQKmeansConfig, RQVaeConfig
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import EncoderDecoderConfig, RQTransformerConfig, TransformerConfig

T = TypeVar("T")


class Budget(enum.Enum):
    """Size of a run."""

    SMOKE = "smoke"
    """A few steps of tiny models, to test that it runs."""
    CPU = "cpu"
    """The share of all epochs that the experiment gives for CPUs."""
    FULL = "full"
    """Everything as the experiment says."""


def within(experiment: Experiment, budget: Budget, *, interactions: int) -> Experiment:
    """The experiment at this budget, for a number of training interactions."""
    if budget is Budget.CPU and experiment.cpu != 1:
        return rewritten(experiment, _epochs(experiment.cpu))
    return _tiny(experiment, interactions) if budget is Budget.SMOKE else experiment


def rewritten(value: T, rules: Mapping[type, Callable[[Any], Any]]) -> T:
    """The value with every nested dataclass, innermost first, replaced by the rule of its type, if there is one."""
    if isinstance(value, tuple):
        return type(value)(rewritten(one, rules) for one in value)
    if isinstance(value, dict):
        return type(value)((name, rewritten(one, rules)) for name, one in value.items())
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    changed = {name: new for name, old in parts.items() if (new := rewritten(old, rules)) is not old}
    replaced = dataclasses.replace(value, **changed) if changed else value
    return rules[type(replaced)](replaced) if type(replaced) in rules else replaced


def _epochs(share: float) -> dict[type, Callable[[Any], Any]]:
    def shortened(training: TrainingConfig) -> TrainingConfig:
        if training.epochs is None:
            return training
        every = training.validate_every * share
        return dataclasses.replace(training, epochs=training.epochs * share, validate_every=every)

    return {TrainingConfig: shortened, Refresh: lambda refresh: Refresh(refresh.every * share)}


_SIZES: dict[str, Any] = {"dim": 8, "layers": 1, "heads": 2, "hidden": 8}
_BATCH, _BEAM = 64, 10


def _tiny(experiment: Experiment, interactions: int) -> Experiment:
    epochs = min(2.0, 40 * _BATCH / max(interactions, 1))

    def rule(**changes: Any) -> Callable[[Any], Any]:
        return lambda config: dataclasses.replace(config, **changes)

    def codes(config: RQVaeConfig) -> RQVaeConfig:
        levels = max(2, len(config.assignments))
        return dataclasses.replace(config, level_sizes=(8,) * levels, hidden=(8,), latent=8)

    def depth(config: RQTransformerConfig) -> RQTransformerConfig:
        return dataclasses.replace(config, depth_hidden=config.depth_hidden and 8)

    scratch = TextFromScratch(TextEncoderConfig(BlocksConfig(**_SIZES), max_length=8), vocabulary=200)
    brief = {"epochs": epochs, "batch_size": _BATCH, "accumulate": 1, "validate_every": epochs}
    seen = {"max_history": 5, "row_length": 10, "validation_users": 64, "validation_beam": _BEAM}
    rules = {
        TrainingConfig: rule(**brief),
        OptimizerConfig: rule(learning_rate=1e-3, weight_decay=0.01),  # and dropout: one for all, who share programs
        Refresh: lambda _: Refresh(epochs / 2),
        TransformerConfig: rule(**_SIZES, kv_heads=None, dropout=0.1),
        RQTransformerConfig: depth,
        BlocksConfig: rule(**_SIZES),
        FusionConfig: rule(dim=8, hidden=8, identity=False),
        EncoderDecoderConfig: rule(decoder_layers=1),
        GeneratorConfig: rule(**seen),
        RQVaeConfig: codes,
        RQKmeansConfig: rule(level_sizes=(8, 8)),
        ProductConfig: rule(level_sizes=(8,) * 4, rotations=1),
        TextEncoderConfig: rule(max_length=8),
        TextFromScratch: rule(vocabulary=200),
        PretrainedText: lambda _: scratch,
        JointConfig: rule(tie_break=256, cycles=1),
    }
    return dataclasses.replace(rewritten(experiment, rules), beam_size=_BEAM)
