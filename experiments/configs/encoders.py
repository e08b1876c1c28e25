"""Encoders trained by a contrast of consecutive items, by the recommendation loss, by both, or not at all.

    python -m experiments encoders item-graph --dataset ../shared/data/amazon14_beauty

Items come as vectors of a pretrained encoder. A residual layer on them, which starts as the identity, is trained; so
`frozen` has the vectors as they come. All variants have the same number of epochs of the generator, and each is
measured without and with the item graph at ranking.

    frozen          tokenizer and generator alone, as most generative recommenders are built
    contrast        the layer is trained by contrast of consecutive items first (`end-to-end.staged` is the same)
    end-to-end      joint steps whose recommendation loss reaches the layer, then tokenizer and generator again
    both            the contrast, then the joint steps
    held            as `both`, with the contrast as a term of the joint steps (LEMUR's objective)
    stopped         as `both`, gradients stopped at the layer

`held` against `frozen` tests the claim of LEMUR (arXiv 2511.10962). `both` against `contrast` shows what the joint
steps add to a warm-up, and against `stopped` which part of that is due to their gradient. Expected on Beauty over
`frozen` (Recall@10): `contrast` +.0032, `held` +.0024, `end-to-end` -.0019, `both` and `stopped` nothing.
"""

from dataclasses import replace

from experiments.configs.end_to_end import TOGETHER, training
from experiments.experiment import CONTENT, Experiment
from quantizers import Schedule
from semid.encoders import ContentConfig, FusionConfig
from semid.joint import JointConfig, Reach
from semid.training import TrainingConfig

# MiniLM's width.
ENCODERS = ContentConfig(text=None, vectors=(CONTENT,), fusion=FusionConfig(dim=384, hidden=128, identity=True))
_GENERATOR, _JOINT, _FINETUNE = 6, 2, 16


def _stage(epochs: float, batch_size: int, learning_rate: float, **rates: float) -> TrainingConfig:
    """A stage that is validated at its end."""
    return replace(training(epochs, batch_size, learning_rate, **rates), validate_every=epochs)


BOTH = replace(
    TOGETHER,
    encoder=_stage(2, 256, 1e-3),
    generator=replace(TOGETHER.generator, training=_stage(_GENERATOR, 64, 3e-3)),
    joint=tuple(replace(phase, training=_stage(_JOINT, 256, 1e-3, autoencoder=0.0)) for phase in TOGETHER.joint),
    finetune=_stage(_FINETUNE, 64, 1e-3),
)


def config() -> dict[str, Experiment]:
    (phase,) = BOTH.joint
    alone = replace(BOTH, joint=(), finetune=_stage(_JOINT + _GENERATOR + _FINETUNE, 64, 1e-3))
    stopped = replace(phase, step=replace(phase.step, reach=Reach.TOKENIZER))
    held = replace(phase, step=replace(phase.step, objective=replace(phase.step.objective, contrast=Schedule(1.0))))
    return {
        "frozen": _variant("frozen encoder", replace(alone, encoder=None)),
        "contrast": _variant("contrast", alone),
        "end-to-end": _variant("end to end", replace(BOTH, encoder=None)),
        "both": _variant("contrast, then end to end", BOTH),
        "held": _variant("contrast, then end to end with it", replace(BOTH, joint=(held,))),
        "stopped": _variant("contrast, then stopped at the encoder", replace(BOTH, joint=(stopped,))),
    }


def _variant(title: str, model: JointConfig) -> Experiment:
    return Experiment(title, model, encoders=ENCODERS, graph="item-graph", beam_size=20, paper="after arXiv 2511.10962")
