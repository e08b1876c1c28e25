"""LC-Rec's tokenizer (ICDE 2024, arXiv 2311.09049): Sinkhorn in the last level and among items that collide.

    python -m experiments lc-rec tiger --dataset ../shared/data/amazon14_beauty --budget cpu

Four levels of 256 codes behind a deep MLP; in training the last level is assigned by the balanced plan of the batch
(epsilon .003, 50 iterations), and afterwards items of equal codes are re-assigned by it within their group, so that no
level is added. The paper tunes a language model of 7 billion parameters on these codes; here TIGER's encoder-decoder
reads them. Expected of the codes: at most 1% of the items left colliding on Beauty. Not measured yet.
"""

from experiments.configs import tiger
from experiments.experiment import Experiment
from quantizers import Nearest, Sinkhorn
from semid.catalog import Collisions
from semid.tokenizers import RQVaeConfig, TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig


def config() -> Experiment:
    method = RQVaeConfig(
        level_sizes=(256,) * 4,
        hidden=(2048, 1024, 512, 256, 128, 64),
        assignments=(Nearest(), Nearest(), Nearest(), Sinkhorn(epsilon=0.003, iterations=50)),
        training=TrainingConfig(
            10_000, 1024, optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=1e-4), validate_every=1_000
        ),
    )
    return Experiment(
        "LC-Rec's tokenizer",
        tiger.GENERATOR,
        TokenizerConfig(method, collisions=Collisions.SINKHORN),
        cpu=tiger.CPU,
        paper="ICDE 2024, arXiv 2311.09049",
        expected="at most 1% of the items colliding",
    )
