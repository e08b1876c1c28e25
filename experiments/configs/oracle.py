"""Oracle of the simulator: the true distribution of the next item, the ceiling of every model.

    python -m experiments oracle

Expected .45 to .55 Recall@10 by the world (docs/results.md); no model can find more.
"""

from experiments.experiment import Baseline, Experiment


def config() -> Experiment:
    return Experiment("oracle (knows the true distribution)", Baseline.ORACLE, datasets=("simulated",))
