"""Where a recommendation's probability comes from: the model or the item graph, and which items of the history."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from semid.graphs import ItemGraph


@dataclass(frozen=True)
class Explanation:
    """A recommended item, its log-probability, the item graph's share of that, and whose edges it is made of.

    `sources` are items of the history and their shares of the graph's part, largest first.
    """

    item_id: str
    log_prob: float
    graph_share: float
    sources: tuple[tuple[str, float], ...]


def edge_shares(graph: ItemGraph, history: Int[np.ndarray, " n"], row: int) -> dict[int, float]:
    """Shares of each item of the history, by its row, in the graph's score of an item; empty where no edge leads."""
    latest = history[-graph.config.window :]
    shares: dict[int, float] = {}
    for age, source in enumerate(latest[::-1].tolist()):
        edge = graph.edges.weights[source][graph.edges.rows[source] == row].sum()
        if edge > 0:
            shares[source] = shares.get(source, 0.0) + float(graph.config.recency**age * edge)
    total = sum(shares.values())
    return {source: share / total for source, share in sorted(shares.items(), key=lambda one: -one[1])}
