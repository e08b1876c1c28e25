"""Choice of an item graph's weight, and of the factor on repeated items, for a trained model on validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from jaxtyping import Float

from semid.graphs import ItemGraph
from semid.progress import LOG, show_progress
from semid.recommender import Recommender

# Candidates in order of trial; of equal scores the first wins.
_FACTORS = (0.0, 0.25, 0.5, 2.0, 4.0)
_WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8)

Score = Callable[[Recommender], Mapping[str, float]]


def with_best_graph_weight(recommender: Recommender, graph: ItemGraph, score: Score) -> Recommender:
    """Mix the recommender with the graph at the weight of the highest NDCG@10 by `score`.

    Tries 0, .2, ... .8, then the two weights at .1 from the best of these.
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


def with_best_repeat_factor(
    recommender: Recommender, ndcg: Callable[[Recommender], Float[np.ndarray, " n"]]
) -> Recommender:
    """Set the factor on the probabilities of the history's items that is best by NDCG@10 per validation example.

    A factor must beat the best so far, at first 1, by more than the standard error of the paired difference, so that
    few examples change nothing.
    """
    best, best_ndcg = recommender, ndcg(recommender)
    with show_progress("choosing the repeat factor", total=len(_FACTORS), unit="values") as progress:
        for done, factor in enumerate(_FACTORS, 1):
            candidate = recommender.with_repeat_factor(factor)
            candidate_ndcg = ndcg(candidate)
            gain = candidate_ndcg - best_ndcg
            if gain.mean() > gain.std() / np.sqrt(len(gain)):
                best, best_ndcg = candidate, candidate_ndcg
            progress.advance(done, f"{factor}: NDCG@10 {candidate_ndcg.mean():.4f}")
    LOG.info("repeat factor: %s, validation NDCG@10 %.4f", best.spec.repeat_factor, best_ndcg.mean())
    return best
