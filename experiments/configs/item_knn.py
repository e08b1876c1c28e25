"""Item-kNN (Sarwar et al., WWW 2001): cosines between the sets of users, summed over the history.

    python -m experiments item-knn --dataset ../shared/data/amazon14_beauty

Nothing is trained; 100 neighbors per item. Unlike the item graph it has no direction, recency or content. Measured on
Beauty: docs/results.md.
"""

from experiments.experiment import Baseline, Experiment


def config() -> Experiment:
    return Experiment("item-kNN", Baseline.ITEM_KNN, paper="Sarwar et al., WWW 2001")
