"""End-to-end training: the recommendation loss reaches the tokenizer, the encoders, or neither.

    python -m experiments end-to-end --dataset ../shared/data/ml1m --budget cpu --seeds 0 1 2
    python -m experiments end-to-end --dataset ../shared/data/amazon14_beauty --weights models/all-MiniLM-L6-v2
    python -m experiments end-to-end                                                  # a simulated world per seed

Items are encoded from their texts, by a small transformer on a SentencePiece vocabulary of the catalogue, and from
their pictures, if there are any, by a small vision transformer. The variants share their first stages (encoders by
contrast of consecutive items, RQ-VAE on their vectors, generator on its codes) and their last one (the generator
alone). They have the same number of epochs of the generator in all, and differ in what comes between:

    staged      nothing: the last stage gets these epochs
    joint       joint steps whose recommendation loss reaches the tokenizer, codes refreshed; the encoders are frozen
    together    joint steps whose recommendation loss alone reaches the encoders, codes fixed; then tokenizer and
                generator are trained again on the updated vectors
    stopped     the same stages, gradients stopped at the encoders
    sampled     as together, with a fifth of each step's items encoded and differentiated

Expected on simulated worlds: together .02 above staged, .03 above stopped (Recall@10). On MovieLens-1M at a third of
the epochs (`--budget cpu`): .2240, staged .2212, stopped .2157. Each is measured with the item graph, too. One term
more in the joint steps: `--model.joint.0.step.objective.contrast.value .1`.
"""

from dataclasses import replace
from typing import Any

from experiments.experiment import Experiment
from quantizers import Schedule
from semid.encoders import (
    BlocksConfig,
    ContentConfig,
    ImageConfig,
    ImageFromScratch,
    TextEncoderConfig,
    TextFromScratch,
)
from semid.generators import GeneratorConfig
from semid.joint import JointConfig, Objective, Phase, Reach, Refresh, StepConfig
from semid.tokenizers import RQVaeConfig
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import RQTransformerConfig, TransformerConfig

_BLOCKS = BlocksConfig(dim=32, layers=1, heads=2, hidden=64)
ENCODERS = ContentConfig(
    TextFromScratch(TextEncoderConfig(_BLOCKS, max_length=48), vocabulary=1000),
    ImageFromScratch(ImageConfig(size=32, patch=8, blocks=_BLOCKS)),
)


def training(epochs: float, batch_size: int, learning_rate: float, **rates: float) -> TrainingConfig:
    """A stage that is validated four times; `rates` are the parts' shares of the learning rate."""
    optimizer = OptimizerConfig(learning_rate=learning_rate, rates=tuple(rates.items()))
    return TrainingConfig(epochs=epochs, batch_size=batch_size, validate_every=epochs / 4, optimizer=optimizer)


TOGETHER = JointConfig(
    encoder=training(1, 256, 2e-3),
    tokenizer=RQVaeConfig(hidden=(256, 128)),
    generator=GeneratorConfig(
        RQTransformerConfig(TransformerConfig(dim=64, layers=2, heads=2, hidden=128, dropout=0.1)),
        training=training(24, 64, 3e-3),
    ),
    joint=(Phase(training(2, 256, 1e-3, autoencoder=0.0), StepConfig(Objective.only(generation=Schedule(1.0)))),),
    finetune=training(16, 64, 1e-3),
    tie_break=256,
)


def variant(title: str, model: JointConfig, *, paper: str = "", expected: str = "") -> Experiment:
    """An experiment on texts and pictures."""
    datasets = ("simulated", "ml1m", "amazon14_beauty")
    options: dict[str, Any] = {"datasets": datasets, "paper": paper, "expected": expected, "cpu": 1 / 3}
    return Experiment(title, model, encoders=ENCODERS, graph="item-graph", **options)


def with_step(**changes: Any) -> JointConfig:
    """`TOGETHER` with another joint step."""
    (phase,) = TOGETHER.joint
    return replace(TOGETHER, joint=(replace(phase, step=replace(phase.step, **changes)),))


def config() -> dict[str, Experiment]:
    (phase,), finetune = TOGETHER.joint, TOGETHER.finetune
    again, between = TOGETHER.generator.training.num_epochs, phase.training.num_epochs
    staged = replace(finetune, epochs=finetune.num_epochs + again + between)
    refreshed = Phase(training(2, 256, 1e-3, autoencoder=0.03, encoder=0.0), StepConfig(reach=Reach.TOKENIZER))
    joint = replace(
        TOGETHER,
        joint=(refreshed,),
        codes=Refresh(0.25),
        finetune=replace(finetune, epochs=finetune.num_epochs + again),
    )
    return {
        "staged": variant("staged", replace(TOGETHER, joint=(), finetune=staged)),
        "joint": variant("joint: the loss reaches the tokenizer", joint),
        "together": variant("end to end", TOGETHER, expected="R@10 +.02 over staged (simulated)"),
        "stopped": variant("end to end, stopped at the encoders", with_step(reach=Reach.TOKENIZER)),
        "sampled": variant("end to end, a fifth encoded", with_step(forward=0.2, backward=0.2)),
    }
