"""RPG's tokenizer (KDD 2025, arXiv 2506.05781): many unordered product codes of the rotated text vector.

    python -m experiments rpg --dataset ../shared/data/amazon14_beauty

Sixteen codes of 256 by optimized product quantization (the paper has 32 on Beauty, of vectors eight times as wide).
The published generator predicts all codes at once by parallel heads; `seq_models` has none, so the RQ-Transformer
writes them one after the other. Published on Beauty: Recall@10 .0809, NDCG@10 .0464; at item level, tuned by cornac,
.0789 / .0454. This is no reproduction of these figures. Not measured yet.
"""

from experiments.experiment import Experiment
from semid.generators import GeneratorConfig
from semid.tokenizers import ProductConfig, TokenizerConfig


def config() -> Experiment:
    return Experiment(
        "RPG's tokenizer",
        GeneratorConfig(),
        TokenizerConfig(ProductConfig(level_sizes=(256,) * 16)),
        paper="KDD 2025, arXiv 2506.05781",
    )
