"""ETEGRec (SIGIR 2025, arXiv 2409.05546): tokenizer and generator alternate, epoch by epoch, under two alignments.

    python -m experiments etegrec --dataset ../shared/data/amazon14_beauty

Terms, weights and the alternation are the paper's. Items come as content vectors, not as SASRec's; unigrec.py lists the
other differences. In UniGRec's harness on Beauty: Recall@10 .0809, NDCG@10 .0448. Measured here on the simulated shop
of docs/results.md: .2313 and .1371.
"""

from experiments.configs.unigrec import GENERATOR, NONE, training
from experiments.experiment import Experiment
from quantizers import Schedule
from semid.joint import JointConfig, Objective, Phase, Reach, Refresh, StepConfig
from semid.tokenizers import RQVaeConfig


def config() -> Experiment:
    aligned = {"sequence_item": Schedule(1e-4), "preference": Schedule(3e-4)}
    of_tokenizer = Objective(generation=NONE, entropy=NONE, **aligned)
    of_generator = Objective.only(generation=Schedule(1.0), **aligned)
    model = JointConfig(
        encoder=None,
        tokenizer=RQVaeConfig(level_sizes=(256, 256, 256), hidden=(512, 256), latent=128),
        generator=GENERATOR,
        joint=(
            Phase(
                training(1, 512, 1e-4, generator=0.0, encoder=0.0),
                StepConfig(of_tokenizer, reach=Reach.TOKENIZER, window=0),
            ),
            Phase(
                training(1, 512, 3e-3, autoencoder=0.0, encoder=0.0),
                StepConfig(of_generator, reach=Reach.TOKENIZER, window=0),
            ),
        ),
        cycles=2,
        codes=Refresh(0.25),
        finetune=training(12, 64, 5e-4),
    )
    return Experiment(
        "ETEGRec",
        model,
        paper="SIGIR 2025, arXiv 2409.05546",
        expected="R@10 .0809, N@10 .0448 (published by UniGRec)",
    )
