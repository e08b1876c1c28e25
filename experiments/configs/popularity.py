"""Popularity: the items with the most training interactions, the same list for everybody.

    python -m experiments popularity --dataset ../shared/data/amazon14_beauty

Nothing is trained. A model that does not beat it has learned nothing.
"""

from experiments.experiment import Baseline, Experiment


def config() -> Experiment:
    return Experiment("popularity", Baseline.POPULARITY, expected="R@10 .012")
