"""MMGRec's tokenizer (arXiv 2404.16555): a narrow RQ-VAE, and a last code that ranks colliding items by popularity.

    python -m experiments mmgrec --dataset ../shared/data/amazon14_beauty
    python -m experiments mmgrec --model.model.backbone.relation    # with its relation term, on a simulated world

Three levels of 128 codes over a latent of 4 dimensions; the last code of the most popular item of a group is always the
first. The published tokenizer reads vectors of a graph network over users and items, and its recommender reads those of
an unordered history; here it reads content and a SASRec's vectors side by side, and the recommender, of the published
size (2 + 2 layers, width 64), reads the sum of each item's codes, in no order. The released figure (Recall@10 .1269)
is of sample data that is cut at random. Measured here on the simulated shop of docs/results.md: .1040.
"""

from experiments.experiment import CONTENT, TEACHER, Experiment
from semid.catalog import Collisions
from semid.generators import GeneratorConfig
from semid.tokenizers import RQVaeConfig, TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import EncoderDecoderConfig, TransformerConfig


def config() -> Experiment:
    optimizer = OptimizerConfig(learning_rate=1e-3, weight_decay=1e-4)
    method = RQVaeConfig((128,) * 3, hidden=(16,), latent=4, training=TrainingConfig(60, 1024, optimizer=optimizer))
    backbone = TransformerConfig(dim=64, layers=2, heads=4, hidden=256, dropout=0.2)
    training = TrainingConfig(12, 256, 8, OptimizerConfig(learning_rate=1e-3))
    return Experiment(
        "MMGRec's tokenizer",
        GeneratorConfig(
            EncoderDecoderConfig(backbone, decoder_layers=2, order_free=True), features=(), training=training
        ),
        TokenizerConfig(method, (CONTENT, TEACHER), Collisions.POPULARITY),
        teacher="recipe.sasrec-text",
        paper="arXiv 2404.16555",
    )
