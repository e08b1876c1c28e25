"""BLOGER (SIGIR 2026, arXiv 2510.21242): the recommendation loss reaches the tokenizer, its own losses first.

    python -m experiments bloger --dataset ../shared/data/amazon14_beauty

To first order: the published outer loss is taken after one more step of the generator, ours before it. unigrec.py lists
the other differences. Published on Beauty, at the level of codes: Recall@10 .0654, NDCG@10 .0361; with frozen codes
.0609, without gradient surgery .0530. Not measured yet.
"""

from experiments.configs.unigrec import GENERATOR, NONE, training
from experiments.experiment import Experiment
from semid.joint import JointConfig, Objective, Phase, Reach, Refresh, StepConfig, Surgery
from semid.tokenizers import RQVaeConfig


def config() -> Experiment:
    step = StepConfig(Objective(entropy=NONE), reach=Reach.TOKENIZER, window=0)
    model = JointConfig(
        encoder=None,
        tokenizer=RQVaeConfig(level_sizes=(256, 256, 256, 256)),
        generator=GENERATOR,
        joint=(Phase(training(3, 256, 5e-4, autoencoder=0.2, encoder=0.0), step, Surgery.PROJECT),),
        codes=Refresh(0.25),
        finetune=training(12, 64, 5e-4),
    )
    return Experiment(
        "BLOGER",
        model,
        paper="SIGIR 2026, arXiv 2510.21242",
        expected="R@10 .0654, N@10 .0361 (published, of codes)",
    )
