"""Evaluation: item-level metrics over the full catalogue, one evaluator for every model, baselines."""

from semid.evaluation.baselines import Bigram, Popularity
from semid.evaluation.comparison import against_exact, baselines, compare, example_users
from semid.evaluation.evaluator import Metrics, Ranker, evaluate, examples_file, write_metrics
from semid.evaluation.metrics import MetricState, accuracy, group_ids, item_places, paired_bootstrap

__all__ = [
    "Bigram",
    "MetricState",
    "Metrics",
    "Popularity",
    "Ranker",
    "accuracy",
    "against_exact",
    "baselines",
    "compare",
    "evaluate",
    "example_users",
    "examples_file",
    "group_ids",
    "item_places",
    "paired_bootstrap",
    "write_metrics",
]
