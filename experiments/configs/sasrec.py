"""SASRec (Kang & McAuley, ICDM 2018) with full-softmax cross-entropy, over ids alone.

    python -m experiments sasrec --dataset ../shared/data/amazon14_beauty

The mandatory baseline: tuned, it beats most published generative results. An independent reproduction on Beauty has
Recall@10 .0859 and NDCG@10 .0503, seen items excluded. With text vectors too it is `recipe.sasrec-text`. Measured
on the simulated catalogue: docs/results.md.
"""

from experiments.configs.recipe import sasrec
from experiments.experiment import Experiment


def config() -> Experiment:
    return Experiment(
        "SASRec-CE, ids",
        sasrec(features=(), epochs=20),
        paper="Kang & McAuley, ICDM 2018",
        expected="R@10 .083-.088 (seen excluded)",
    )
