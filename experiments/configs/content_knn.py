"""Content kNN: cosines of an item's content vector with the mean of those of the history.

    python -m experiments content-knn --dataset ../shared/data/amazon14_beauty

Nothing is trained and no other user is read, so whatever a model finds beyond it comes from interactions. It is the
baseline for cold items; `python -m experiments.layout ... split-rule:held-out-items` makes a dataset with some.
"""

from experiments.experiment import Baseline, Experiment


def config() -> Experiment:
    return Experiment("content kNN", Baseline.CONTENT_KNN)
