"""Families of generators on the same codes, each with its own schedule.

    python -m experiments families --dataset ../shared/data/amazon14_beauty --out runs/families
    python -m experiments.benchmarks.generators minutes --generators runs/families --out runs/minutes

    rq-transformer    one position per item and a depth decoder (the default)
    encoder-decoder   every target is an example of its own
    flat              one causal stack over all codes: decoder-only

Batches have about 2,000 targets in the packed rows of the first and last, 256 where every row is one target; the sizes
of microbatches suit a CPU's caches. The second command measures the minutes to a mark, and speed. Measured on Beauty
before the history was left out, one seed (docs/benchmarks.md).
"""

from experiments.experiment import Experiment
from semid.generators import GeneratorConfig
from semid.tokenizers import TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import EncoderDecoderConfig, FlatDecoderConfig, ModelConfig, RQTransformerConfig, TransformerConfig

BACKBONE = TransformerConfig(dim=64, layers=2, heads=2, hidden=128, dropout=0.1)


def _family(model: ModelConfig, *, epochs: float, batch: int, parts: int, found: str, took: float) -> Experiment:
    optimizer = OptimizerConfig(learning_rate=3e-3)
    training = TrainingConfig(epochs, batch, parts, optimizer, validate_every=epochs / 12)
    return Experiment(
        model.title,
        GeneratorConfig(model, training=training),
        TokenizerConfig(),
        expected=f"R@10 {found} (history kept)",
        minutes=took,
    )


def config() -> dict[str, Experiment]:
    positions, pairs, flat = RQTransformerConfig(BACKBONE), EncoderDecoderConfig(BACKBONE), FlatDecoderConfig(BACKBONE)
    return {
        "rq-transformer": _family(positions, epochs=36, batch=64, parts=4, found=".0542", took=2.6),
        "encoder-decoder": _family(pairs, epochs=6, batch=256, parts=8, found=".0481", took=8.1),
        "flat": _family(flat, epochs=12, batch=64, parts=4, found=".0389", took=2.7),
    }
