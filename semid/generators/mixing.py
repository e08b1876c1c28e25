"""The weight of an item graph next to a trained model, and the factor of what repeats, chosen on validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from semid.graphs import ItemGraph
from semid.progress import LOG, show_progress
from semid.recommender import Recommender

# Tried one after another; of equal scores the first is taken.
_FACTORS = (1.0, 0.0, 0.25, 0.5, 2.0, 4.0)
_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Score = Callable[[Recommender], Mapping[str, float]]


def mixed(recommender: Recommender, graph: ItemGraph, score: Score) -> Recommender:
    """The recommender mixed with the graph at the weight of the highest NDCG@10 by `score`, of 0, .1, ... .9."""
    by_weight = {weight: recommender.with_graph(graph, weight=weight) for weight in _WEIGHTS}
    return _best("weight of the item graph", by_weight, score)


def with_fitted_repeats(recommender: Recommender, score: Score) -> Recommender:
    """The recommender with the factor of its probability of items in the history that has the highest NDCG@10."""
    by_factor = {factor: recommender.with_repeat_factor(factor) for factor in _FACTORS}
    return _best("repeat factor", by_factor, score)


def _best(what: str, candidates: Mapping[float, Recommender], score: Score) -> Recommender:
    """The candidate of the highest NDCG@10."""
    scores: dict[float, float] = {}
    with show_progress(f"choosing the {what}", total=len(candidates), unit="values") as progress:
        progress.say("compiling ...")
        for value, candidate in candidates.items():
            scores[value] = score(candidate)["ndcg@10"]
            progress.advance(len(scores), f"{value}: NDCG@10 {scores[value]:.4f}")
    best, (first, *_) = max(scores, key=lambda value: scores[value]), scores
    LOG.info("%s: %s, validation NDCG@10 %.4f (with %s: %.4f)", what, best, scores[best], first, scores[first])
    return candidates[best]
