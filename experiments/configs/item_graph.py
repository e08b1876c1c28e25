"""Item graph: counted transitions and content neighbors, their constants chosen on validation.

    python -m experiments item-graph --dataset ../shared/data/amazon14_beauty

Nothing is trained, and on Beauty it finds more than every published row. A model that does not beat it has learned
nothing useful; the worth of a model is what it adds to the graph.
"""

from experiments.experiment import Experiment
from semid.graphs import ItemGraphConfig


def config() -> Experiment:
    return Experiment("item graph", ItemGraphConfig(), expected="R@10 .110, N@10 .068", minutes=0.2)
