"""The weight of an item graph next to a trained model, and the factor of what repeats, chosen on validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from jaxtyping import Float

from semid.graphs import ItemGraph
from semid.progress import LOG, show_progress
from semid.recommender import Recommender

# Tried one after another; of equal scores the first is taken.
_FACTORS = (0.0, 0.25, 0.5, 2.0, 4.0)
_WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8)

Score = Callable[[Recommender], Mapping[str, float]]


def mixed(recommender: Recommender, graph: ItemGraph, score: Score) -> Recommender:
    """The recommender mixed with the graph at the weight of the highest NDCG@10 by `score`.

    Of 0, .2, ... .8, then of the best one and those .1 from it.
    """
    scores: dict[float, float] = {}
    with show_progress("choosing the weight of the item graph", total=len(_WEIGHTS) + 2, unit="values") as progress:
        progress.say("compiling ...")

        def best_of(weights: Iterable[float]) -> float:
            for weight in weights:
                scores[weight] = score(recommender.with_graph(graph, weight=weight))["ndcg@10"]
                progress.advance(len(scores), f"{weight}: NDCG@10 {scores[weight]:.4f}")
            return max(scores, key=lambda weight: scores[weight])

        coarse = best_of(_WEIGHTS)
        best = best_of(round(weight, 1) for weight in (coarse - 0.1, coarse + 0.1) if weight > 0)
    LOG.info("weight of the item graph: %s, validation NDCG@10 %.4f (with 0: %.4f)", best, scores[best], scores[0.0])
    return recommender.with_graph(graph, weight=best)


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
