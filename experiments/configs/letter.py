"""LETTER (CIKM 2024, arXiv 2405.07314): TIGER on codes whose quantized vectors find their own collaborative vectors.

    python -m experiments letter tiger --dataset ../shared/data/amazon14_beauty --budget cpu

The published tokenizer aligns 32-d codes with SASRec's item embeddings by unnormalized inner products, spreads its
codes by a diversity loss, and assigns the last level by Sinkhorn. Here the cosines have a temperature and go both ways
through a linear head, so that the teacher may have any width. Published on Beauty (2014): TIGER .0610, LETTER .0672
Recall@10, about +10%. `alignment.letter` compares it with other codes at a small budget. Not measured with this
generator yet.
"""

from experiments.configs import tiger
from experiments.experiment import TEACHER, Experiment
from semid.graphs import VectorColumn
from semid.tokenizers import LetterConfig, RQVaeConfig, TokenizerConfig

PAPER = "CIKM 2024, arXiv 2405.07314"


def tokenizer(method: RQVaeConfig) -> TokenizerConfig:
    """The method, which spreads its codes, aligned with the teacher."""
    return TokenizerConfig(method, alignment=(LetterConfig(),), signal=VectorColumn(TEACHER))


def config() -> Experiment:
    method = RQVaeConfig(level_sizes=(256,) * 4, diversity=1e-4, training=tiger.CODES)
    return Experiment(
        "LETTER",
        tiger.GENERATOR,
        tokenizer(method),
        teacher="recipe.sasrec-text",
        cpu=tiger.CPU,
        paper=PAPER,
        expected="R@10 +5% or more over tiger (published: .0672 against .0610)",
    )
