"""The weight of an item graph next to a trained model, and the factor of what repeats, chosen on validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from semid.graphs import ItemGraph
from semid.progress import LOG, show_progress
from semid.recommender import Recommender

# Tried one after another; of equal scores the first is taken.
_FACTORS = (0.0, 0.25, 0.5, 2.0, 4.0)
_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Score = Callable[[Recommender], Mapping[str, float]]


def mixed(recommender: Recommender, graph: ItemGraph, score: Score) -> Recommender:
    """The recommender mixed with the graph at the weight of the highest NDCG@10 by `score`, of 0, .1, ... .9."""
    by_weight = {weight: recommender.with_graph(graph, weight=weight) for weight in _WEIGHTS}
    return _best("weight of the item graph", by_weight, score)


def with_fitted_repeats(
    recommender: Recommender, ndcg: Callable[[Recommender], Float[np.ndarray, " n"]]
) -> Recommender:
    """The recommender with a factor of its probability of items in the history, by NDCG@10 per validation example.

    Another factor than 1 is taken where it gains more than the standard error of the paired difference: few examples
    leave it as it is.
    """
    best, of_best = recommender, ndcg(recommender)
    with show_progress("choosing the repeat factor", total=len(_FACTORS), unit="values") as progress:
        for done, factor in enumerate(_FACTORS, 1):
            candidate = recommender.with_repeat_factor(factor)
            of_candidate = ndcg(candidate)
            gain = of_candidate - of_best
            if gain.mean() > gain.std() / np.sqrt(len(gain)):
                best, of_best = candidate, of_candidate
            progress.advance(done, f"{factor}: NDCG@10 {of_candidate.mean():.4f}")
    LOG.info("repeat factor: %s, validation NDCG@10 %.4f", best.spec.repeat_factor, of_best.mean())
    return best


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
