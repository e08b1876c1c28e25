"""Where a recommendation's probability comes from: the model or the item graph, and which items of the history."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from semid.graphs import ItemGraph


@dataclass(frozen=True)
class Explanation:
    """A recommended item, its log-probability, and the item graph's share of its probability.

    `sources` are the history's items with edges to it and their shares of the graph's part, largest first.
    """

    item_id: str
    log_prob: float
    graph_share: float
    sources: tuple[tuple[str, float], ...]


def explanations(
    graph: ItemGraph,
    history: Int[np.ndarray, " n"],
    rows: Int[np.ndarray, " items"],
    *,
    item_ids: pa.Array,
    weight: float,
    mixed: Float[np.ndarray, " items"],
    alone: Float[np.ndarray, " items"],
) -> list[Explanation]:
    """Explanations of items by row, from their log-probabilities mixed with the graph at this weight, and without it.

    `item_ids` are those of the whole catalogue.
    """
    explained = []
    for row, log_prob, of_model in zip(rows.tolist(), mixed, alone, strict=True):
        shares = edge_shares(graph, history, row)
        # The mixture is weight * graph + (1 - weight) * model; without edges from the history, the model alone.
        of_graph = 1 - (1 - weight) * np.exp(of_model - log_prob) if shares and log_prob > -np.inf else 0.0
        item_id, *names = item_ids.take(pa.array([row, *shares], pa.int32())).to_pylist()
        sources = tuple(zip(names, shares.values(), strict=True))
        explained.append(Explanation(item_id, float(log_prob), float(of_graph), sources))
    return explained


def edge_shares(graph: ItemGraph, history: Int[np.ndarray, " n"], row: int) -> dict[int, float]:
    """Shares of the history's items, by row, in the graph's score of an item; empty if no edge leads to it."""
    latest = history[-graph.config.window :]
    shares: dict[int, float] = {}
    for age, source in enumerate(latest[::-1].tolist()):
        edge = graph.edges.weights[source][graph.edges.rows[source] == row].sum()
        if edge > 0:
            shares[source] = shares.get(source, 0.0) + float(graph.config.recency**age * edge)
    total = sum(shares.values())
    return {source: share / total for source, share in sorted(shares.items(), key=lambda one: -one[1])}
