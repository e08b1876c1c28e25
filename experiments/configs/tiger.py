"""TIGER (Rajput et al., NeurIPS 2023, arXiv 2305.05065): RQ-VAE codes and an encoder-decoder over them.

    python -m experiments tiger --dataset ../shared/data/amazon14_beauty                  # the full schedule: a GPU
    python -m experiments tiger --dataset ../shared/data/amazon14_beauty --budget cpu     # 6 of 390 epochs

Sizes, rates, batches and steps (200,000) are those of a recipe that reproduces it. Published on Beauty: Recall@10
.0648, NDCG@10 .0384; at item level .0634 / .0338 (cornac), and a right implementation falls between .060 and .072 /
.032 and .040. As published, the generator reads codes alone and may recommend the history. Here instead: 4 heads of 32,
not 6 of 64; rotary positions for T5's buckets, SwiGLU; MiniLM text vectors for sentence-T5; no user token. Not measured
yet.
"""

from experiments.experiment import Experiment
from semid.generators import GeneratorConfig, ObjectiveConfig
from semid.tokenizers import RQVaeConfig, TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import EncoderDecoderConfig, TransformerConfig

PAPER = "Rajput et al., NeurIPS 2023, arXiv 2305.05065"
CPU = 6 / 390
CODES = TrainingConfig(3000, 1024, validate_every=300, optimizer=OptimizerConfig(learning_rate=1e-3))
TOKENIZER = TokenizerConfig(RQVaeConfig(level_sizes=(256, 256, 256), training=CODES))
GENERATOR = GeneratorConfig(
    EncoderDecoderConfig(TransformerConfig(dim=128, layers=4, heads=4, hidden=1024, dropout=0.1), decoder_layers=4),
    features=(),
    objective=ObjectiveConfig(repeats=True),
    training=TrainingConfig(
        epochs=390,
        batch_size=256,
        accumulate=8,
        optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.035),
        validate_every=5,
        patience=15,
    ),
)


def config() -> Experiment:
    return Experiment("TIGER", GENERATOR, TOKENIZER, cpu=CPU, paper=PAPER, expected="R@10 .060-.072, N@10 .032-.040")
