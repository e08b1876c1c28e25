"""Scores weighted by the value of the targets' events, as in the Tencent Advertising Algorithm Challenge 2025
(Pan et al., arXiv 2604.04976), in both readings of them.

The paper weighs the targets of a list by their events and then takes a plain mean over lists (`weighted_*`). Where each
list has one target, as in the challenge, its weight cancels: those scores are the plain Recall and NDCG of the targets
of any value. Summed over all lists, before one divides by the sum of weights, it does not cancel (`value_*`): a found
conversion counts for more than a found click.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from semid.data import Dataset
from semid.errors import SemidError, did_you_mean
from semid.evaluation.evaluator import Metrics, check_cutoff

EVENT_VALUES = {"exposure": 0.0, "click": 1.0, "conversion": 2.5}
"""Values of the challenge's second round."""
K = 10
_SCORE = {"recall": 0.31, "ndcg": 0.69}


def value_scores(
    hits: Float[np.ndarray, " targets"],
    gains: Float[np.ndarray, " targets"],
    values: Float[np.ndarray, " targets"],
    lists: Int[np.ndarray, " targets"],
    *,
    k: int = K,
) -> dict[str, float]:
    """Both readings of Recall@K, NDCG@K and the challenge's score, .31 Recall + .69 NDCG.

    `hits` is 1 for a target among the first K of its list and `gains` its 1 / log2(rank + 1), 0 for others, or
    expectations of both; `values` weigh the targets, and `lists` numbers the list that each belongs to, from 0. With
    DCG(l) = sum of value x gain, and IDCG(l) that of the list that has its targets first, by falling value:

        weighted_recall = mean over l of sum(value x hit) / sum(value),   weighted_ndcg = mean of DCG(l) / IDCG(l)
        value_recall    = sum over all of value x hit / sum of value,     value_ndcg = sum of DCG(l) / sum of IDCG(l)

    Lists without a target of any value count for nothing. Raises SemidError for values that are negative or all 0.
    """
    _check(values, f"got {values.min(initial=0)} to {values.max(initial=0)}")
    order = np.lexsort((-values, lists))
    place = np.arange(len(lists)) - np.searchsorted(lists[order], lists[order])
    best = np.where(place < k, values[order] / np.log2(place + 2), 0)
    total, ideal = np.bincount(lists, values), np.bincount(lists[order], best)
    valued = total > 0
    parts = {"recall": (np.bincount(lists, values * hits), total), "ndcg": (np.bincount(lists, values * gains), ideal)}
    weighted = {name: float((found[valued] / most[valued]).mean()) for name, (found, most) in parts.items()}
    summed = {name: float(found.sum() / most.sum()) for name, (found, most) in parts.items()}
    return {
        f"{reading}_{name}": value
        for reading, scores in (("weighted", weighted), ("value", summed))
        for name, value in (scores | {"score": sum(_SCORE[each] * scores[each] for each in scores)}).items()
    }


class TargetValues(NamedTuple):
    """Values of the events of a split's targets."""

    events: dict[str, float]
    """Value of each event of the dataset."""
    targets: dict[str, int]
    """Number of targets per event."""
    values: Float[np.ndarray, " examples"]
    """Value of each example's target; 0 if its event is unknown."""


def target_values(
    dataset: Dataset, *, split: str = "test", values: Mapping[str, float] | None = None
) -> TargetValues | None:
    """Values of the targets of a split, by the given values of events; 0 for other events.

    None given: `EVENT_VALUES`; then None where these are not the events of the dataset, or no target has a value.
    Raises SemidError for an event that the dataset does not have, naming the nearest, and where no target has a value.
    """
    codes = dataset.splits.examples(split).target_events
    if values is None and (dataset.event is None or not set(dataset.event.unique().to_pylist()) <= set(EVENT_VALUES)):
        return None
    if codes is None:
        raise SemidError(f"dataset {dataset.name!r} has no events that could have values; it needs a column 'event'")
    for name in values or ():
        if name not in dataset.events:
            raise SemidError(f"event values: no event {name!r} in the dataset{did_you_mean(name, dataset.events)}")
    events = {event: float((EVENT_VALUES if values is None else values).get(event, 0)) for event in dataset.events}
    of_targets = np.array([0.0, *events.values()])[codes]
    if values is None and not of_targets.any():
        return None
    _check(of_targets, f"the {split} targets' events have the values {events}")
    counts = np.bincount(codes, minlength=len(events) + 1)[1:].tolist()
    return TargetValues(events, dict(zip(events, counts, strict=True)), of_targets)


def compare_values(measured: Mapping[str, Metrics], targets: TargetValues, *, k: int = K) -> dict[str, Any]:
    """Both readings for each model that `compare` has measured on these targets, every example a list with one target,
    as `metrics.json` holds them."""
    check_cutoff(measured, k)
    for name, found in measured.items():
        if (examples := len(found.per_example[f"recall@{k}"])) != len(targets.values):
            there = f"{examples:,} examples, and the values are of {len(targets.values):,}"
            raise SemidError(f"{name} was measured on {there}; take those of its dataset and split")
    lists = np.arange(len(targets.values))
    scores = {
        name: value_scores(found.per_example[f"recall@{k}"], found.per_example[f"ndcg@{k}"], targets.values, lists, k=k)
        for name, found in measured.items()
    }
    rows = [{"model": name, **row} for name, row in scores.items()]
    return {"k": int(k), "values": targets.events, "targets": targets.targets, "rows": rows}


def _check(values: Float[np.ndarray, " targets"], found: str) -> None:
    if not (np.isfinite(values).all() and values.min(initial=0) >= 0 and values.max(initial=0) > 0):
        raise SemidError(f"expected values of 0 or more, one of them above 0; {found}")
