"""SASRec by ids with the settings that a sweep of 20 trials found best on the simulated catalogue's validation.

    semid tokenize --dataset data/simulated --out runs/codes rq-kmeans
    semid sweep --space experiments/sasrec_space.yaml --out runs/sweep --trials 20
    python -m experiments swept sasrec --dataset data/simulated

The space has width, layers, dropout, learning rate and weight decay; the schedule is that of `sasrec`. The values are
the best trial's, rounded; a sweep never reads test. Figures: docs/results.md.
"""

from dataclasses import replace

from experiments.configs import recipe
from experiments.experiment import Experiment
from semid.training import OptimizerConfig
from seq_models import DenseConfig, TransformerConfig


def config() -> Experiment:
    model = recipe.sasrec(features=(), epochs=20)
    backbone = TransformerConfig(dim=64, layers=2, dropout=0.49)
    optimizer = OptimizerConfig(learning_rate=8e-3, weight_decay=5e-3)
    swept = replace(model, model=DenseConfig(backbone), training=replace(model.training, optimizer=optimizer))
    return Experiment("SASRec-CE, ids, swept", swept, datasets=("simulated",), paper="Kang & McAuley, ICDM 2018")
