"""Backbones that read a history: attention, attention with a relation to the user, and a state-space recurrence.

    python -m experiments backbones --dataset ../shared/data/amazon14_beauty --seeds 0 1 2

    attention      the default generator, for 12 epochs
    relation       attention's second product, scaled by the mean of the history (MMGRec, arXiv 2404.16555)
    state-space    a recurrence with input-dependent decays (MMM4Rec, arXiv 2506.02916), reset at each history's start

MMM4Rec reads text and images in two recurrences that exchange their maps, is trained on other domains first, and
reports N@10 .0365 -> .0481 on Pantry; here one recurrence reads the sum of an item's codes. Measured on
the simulated catalogue, where the state space gains, and on Beauty, where no backbone does (docs/results.md).
"""

from dataclasses import replace

from experiments.experiment import Experiment
from semid.generators import GeneratorConfig
from semid.tokenizers import TokenizerConfig
from semid.training import TrainingConfig
from seq_models import Mixer, RQTransformerConfig, TransformerConfig


def config() -> dict[str, Experiment]:
    stack, training = TransformerConfig(dropout=None), TrainingConfig(epochs=12, batch_size=32, validate_every=3)
    plain = GeneratorConfig(RQTransformerConfig(stack), training=training)
    recurrent = replace(plain, model=RQTransformerConfig(replace(stack, mixer=Mixer.STATE_SPACE)))
    return {
        "attention": Experiment("attention", plain, TokenizerConfig()),
        "relation": Experiment(
            "attention with a relation to the user",
            replace(plain, model=RQTransformerConfig(replace(stack, relation=True))),
            TokenizerConfig(),
            paper="arXiv 2404.16555",
        ),
        "state-space": Experiment("state space", recurrent, TokenizerConfig(), paper="arXiv 2506.02916"),
    }
