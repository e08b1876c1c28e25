"""LIGER (TMLR 2025, arXiv 2411.18814): beams of codes propose items, a dense head ranks them with the cold ones.

    python -m experiments liger --dataset ../shared/data/amazon14_beauty

Cross-entropy of the codes and of cosines with all items' content at temperature .07, weighted alike. The published
backbone is T5 of 6 + 6 layers at width 128, trained for 200,000 steps; here it is the RQ-Transformer's, with the
schedule of the default. Published on Beauty: Recall@10 .0745, and .1008 on cold items, of which TIGER finds none.
Measured for seed 0: docs/results.md.
"""

from experiments.experiment import Experiment
from semid.generators import GeneratorConfig
from semid.tokenizers import TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import HybridConfig, TransformerConfig


def config() -> Experiment:
    backbone = TransformerConfig(dim=128, layers=2, heads=4, hidden=256, dropout=0.2)
    training = TrainingConfig(24, 32, optimizer=OptimizerConfig(learning_rate=2e-3), validate_every=2, patience=4)
    return Experiment(
        "LIGER",
        GeneratorConfig(HybridConfig(backbone), training=training),
        TokenizerConfig(),
        graph="item-graph",
        paper="TMLR 2025, arXiv 2411.18814",
        expected="R@10 .083, N@10 cold .028",
    )
