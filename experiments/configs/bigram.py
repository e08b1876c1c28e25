"""Item bigram: the items that most often came right after the last one, then the most popular.

    python -m experiments bigram --dataset ../shared/data/amazon14_beauty

Nothing is trained. On data whose order is that of a database it is stronger than it should be (docs/results.md).
"""

from experiments.experiment import Baseline, Experiment


def config() -> Experiment:
    return Experiment("item bigram", Baseline.BIGRAM, expected="R@10 .067")
