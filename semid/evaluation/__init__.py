"""Evaluation: item-level metrics over the full catalogue, one evaluator for every model, baselines."""

from semid.evaluation.baselines import Bigram, Popularity
from semid.evaluation.comparison import (
    against_exact,
    baselines,
    compare,
    example_users,
    largest_differences,
    user_table,
)
from semid.evaluation.evaluator import (
    GROUPS,
    Metrics,
    Ranker,
    evaluate,
    examples_file,
    main_cutoff,
    other_datasets,
    users_file,
    write_metrics,
)
from semid.evaluation.lists import ListTraits, compare_lists, list_metrics
from semid.evaluation.metrics import (
    MetricState,
    accuracy,
    group_ids,
    half_width,
    item_places,
    paired_bootstrap,
)
from semid.evaluation.values import EVENT_VALUES, TargetValues, compare_values, target_values, value_scores

__all__ = [
    "EVENT_VALUES",
    "GROUPS",
    "Bigram",
    "ListTraits",
    "MetricState",
    "Metrics",
    "Popularity",
    "Ranker",
    "TargetValues",
    "accuracy",
    "against_exact",
    "baselines",
    "compare",
    "compare_lists",
    "compare_values",
    "evaluate",
    "example_users",
    "examples_file",
    "group_ids",
    "half_width",
    "item_places",
    "largest_differences",
    "list_metrics",
    "main_cutoff",
    "other_datasets",
    "paired_bootstrap",
    "target_values",
    "user_table",
    "users_file",
    "value_scores",
    "write_metrics",
]
