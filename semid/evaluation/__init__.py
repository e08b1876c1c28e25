"""Evaluation: item-level metrics over the full catalogue, one evaluator for every model, baselines."""

from semid.evaluation.baselines import Bigram, Popularity
from semid.evaluation.evaluator import Metrics, Ranker, evaluate, write_metrics
from semid.evaluation.metrics import MetricState, paired_bootstrap

__all__ = [
    "Bigram",
    "MetricState",
    "Metrics",
    "Popularity",
    "Ranker",
    "evaluate",
    "paired_bootstrap",
    "write_metrics",
]
