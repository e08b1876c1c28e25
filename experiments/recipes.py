"""Published recipes for training tokenizer and generator together: UniGRec, ETEGRec and BLOGER as joint configs.

Terms, weights, alternation, relaxation, rates and surgery are theirs. Ours in all of them are the RQ-Transformer, a
level that tells colliding items apart, the minus in code logits (which two releases leave out), and numbers of epochs
that a small machine bears. The encoders are not trained, as in the papers: items come as vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from quantizers import GradientPath, Nearest, Schedule
from semid.generators import GeneratorConfig
from semid.joint import JointConfig, Objective, Phase, Reach, Refresh, Relaxation, StepConfig, Surgery
from semid.tokenizers import RQVaeConfig
from semid.training import OptimizerConfig, TrainingConfig


def _training(epochs: float, batch_size: int, learning_rate: float, **rates: float) -> TrainingConfig:
    optimizer = OptimizerConfig(learning_rate=learning_rate, weight_decay=0.05, rates=tuple(rates.items()))
    return TrainingConfig(epochs=epochs, batch_size=batch_size, optimizer=optimizer)


_NONE = Schedule(0.0)
_GENERATOR = GeneratorConfig(training=_training(12, 64, 3e-3))

UNIGREC = JointConfig(
    encoder=None,
    tokenizer=RQVaeConfig(
        level_sizes=(256, 256, 256),
        hidden=(512, 256, 128, 64),
        assignments=(Nearest(temperature=Schedule(0.001, initial=0.01)),),
        path=GradientPath.SOFT,
        commitment=0.0,
        entropy=1e-4,
    ),
    generator=_GENERATOR,
    joint=(
        Phase(
            _training(3, 512, 3e-3, autoencoder=4e-5, encoder=0.0),
            StepConfig(
                Objective(
                    reconstruction=Schedule(0.5),
                    codebook=_NONE,
                    commitment=_NONE,
                    entropy=_NONE,
                    teacher_codes=Schedule(0.01),
                    teacher_states=Schedule(0.1),
                ),
                reach=Reach.TOKENIZER,
                relaxation=Relaxation.SOFT,
                window=0,
            ),
        ),
    ),
    codes=Refresh(0.25),
    finetune=_training(12, 64, 4e-4),
)
"""Soft codes of falling temperature, and distillation from SASRec into tokenizer and generator (arXiv 2601.17438)."""

_ALIGNED = {"sequence_item": Schedule(1e-4), "preference": Schedule(3e-4)}

ETEGREC = JointConfig(
    encoder=None,
    tokenizer=RQVaeConfig(level_sizes=(256, 256, 256), hidden=(512, 256), latent=128),
    generator=_GENERATOR,
    joint=(
        Phase(
            _training(1, 512, 1e-4, generator=0.0, encoder=0.0),
            StepConfig(Objective(generation=_NONE, entropy=_NONE, **_ALIGNED), reach=Reach.TOKENIZER, window=0),
        ),
        Phase(
            _training(1, 512, 3e-3, autoencoder=0.0, encoder=0.0),
            StepConfig(Objective.only(generation=Schedule(1.0), **_ALIGNED), reach=Reach.TOKENIZER, window=0),
        ),
    ),
    cycles=2,
    codes=Refresh(0.25),
    finetune=_training(12, 64, 5e-4),
)
"""Tokenizer and generator alternate, epoch by epoch, under two alignments (arXiv 2409.05546)."""

BLOGER = JointConfig(
    encoder=None,
    tokenizer=RQVaeConfig(level_sizes=(256, 256, 256, 256)),
    generator=_GENERATOR,
    joint=(
        Phase(
            _training(3, 256, 5e-4, autoencoder=0.2, encoder=0.0),
            StepConfig(Objective(entropy=_NONE), reach=Reach.TOKENIZER, window=0),
            Surgery.PROJECT,
        ),
    ),
    codes=Refresh(0.25),
    finetune=_training(12, 64, 5e-4),
)
"""The recommendation loss reaches the tokenizer where it does not oppose its own (arXiv 2510.21242).

To first order: the published outer loss is taken after one more step of the generator, ours before it.
"""

RECIPES: Mapping[str, JointConfig] = MappingProxyType({"unigrec": UNIGREC, "etegrec": ETEGREC, "bloger": BLOGER})
