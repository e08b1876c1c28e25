"""The weight of an item graph next to a trained model, chosen on validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from semid.data import Dataset
from semid.errors import SemidError
from semid.graphs import ItemGraph
from semid.progress import LOG, show_progress
from semid.recommender import Recommender

_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def with_chosen_weight(
    recommender: Recommender, graph: ItemGraph, score: Callable[[Recommender], Mapping[str, float]]
) -> Recommender:
    """The recommender mixed with the graph at the weight of the highest NDCG@10 by `score`, of 0, .1, ... .9."""
    scores: dict[float, float] = {}
    with show_progress("weighing the item graph", total=len(_WEIGHTS), unit="weights") as progress:
        progress.say("compiling ...")
        for weight in _WEIGHTS:
            scores[weight] = score(recommender.with_graph(graph, weight=weight))["ndcg@10"]
            progress.advance(len(scores), f"{weight}: NDCG@10 {scores[weight]:.4f}")
    best = max(scores, key=lambda weight: scores[weight])
    LOG.info("item graph: weight %.1f, validation NDCG@10 %.4f (without: %.4f)", best, scores[best], scores[0.0])
    return recommender.with_graph(graph, weight=best)


def check_graph(graph: ItemGraph, dataset: Dataset) -> None:
    """Raise SemidError for a graph that was fitted to another dataset."""
    if graph.dataset != dataset.digest and (graph.origin is None or dataset.other_source(graph.origin)):
        where = "the item graph" if graph.origin is None else str(graph.origin.folder)
        raise SemidError(
            f"{where}: fitted to dataset digest {graph.dataset[:16]}, not to this one of {dataset.digest[:16]}; "
            "what is test here may have been counted there; fit a graph to this dataset (`semid graph`)"
        )
