"""An item graph next to a model: its edges by item row, its share, its file; and the factors of a request's items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from semid import artifacts
from semid.catalog import SemanticCatalog
from semid.data import Id, as_ids
from semid.errors import SemidError
from seq_models import Boosts, ItemNeighbors, Mixture

_GRAPH = "graph.safetensors"


@dataclass(frozen=True, eq=False)
class GraphEdges:
    """Weighted edges of an item graph between the first rows of a catalogue, and how they enter a recommendation."""

    neighbors: Int[np.ndarray, "items width"]
    """Neighbors' rows, -1 behind the last."""
    weights: Float[np.ndarray, "items width"]
    weight: float
    """Share of the graph's distribution in the recommender's, from 0 to 1."""
    decay: float
    """Factor of an item's edges per item that came after it in the history."""

    def check(self, num_items: int) -> None:
        """Raise SemidError for numbers out of range and for edges between other rows than a catalogue's."""
        rows, weights = self.neighbors, self.weights
        check_graph_weight(self.weight)
        if not 0 <= self.decay <= 1:
            raise SemidError(f"expected a decay of the graph's edges from 0 to 1, got {self.decay}")
        if rows.shape != weights.shape or len(rows) > num_items:
            raise SemidError(
                f"expected neighbors and weights of up to {num_items} items, got {rows.shape} and {weights.shape}"
            )
        if rows.size and not -1 <= rows.min() <= rows.max() < num_items:
            raise SemidError(f"a neighbor's row is outside the catalogue's 0..{num_items - 1} (-1 for none)")
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise SemidError("expected finite weights of at least 0 of the graph's edges")


def check_graph_weight(weight: float) -> None:
    """Raise SemidError for a weight outside 0..1."""
    if not 0 <= weight <= 1:
        raise SemidError(f"expected a graph_weight from 0 (the model alone) to 1 (the graph alone), got {weight}")


def build_mixture(graph: GraphEdges | None, *, repeat_factor: float, rows: int) -> Mixture | None:
    """The mixture for tables of so many rows, on the device; None: the model's own probabilities."""
    if graph is None:
        return None if repeat_factor == 1 else Mixture.from_numbers(repeat_factor=repeat_factor)
    spare = ((0, rows - len(graph.neighbors)), (0, 0))
    neighbors = np.pad(graph.neighbors.astype(np.int32), spare, constant_values=-1)
    edges = ItemNeighbors(*jax.device_put((neighbors, np.pad(graph.weights.astype(np.float32), spare))))
    return Mixture.from_numbers(edges, weight=graph.weight, decay=graph.decay, repeat_factor=repeat_factor)


def build_boosts(boosts: Mapping[Id, float], catalog: SemanticCatalog, *, skip_unknown: bool) -> Boosts:
    """Factors of item ids, for all requests alike, in few shapes. Raises SemidError for unknown ids and bad factors."""
    ids = as_ids(boosts)
    try:
        factors = np.asarray(list(boosts.values()), np.float32)
    except (TypeError, ValueError) as error:
        raise SemidError(f"expected numbers as boosts ({error})") from None
    rows = catalog.find_rows(ids)[0] if skip_unknown else catalog.rows(ids)
    if len(wrong := np.flatnonzero(~(np.isfinite(factors) & (factors >= 0)))):
        item = list(boosts)[wrong[0]]
        raise SemidError(f"expected a finite boost of at least 0 for item {item!r}, got {factors[wrong[0]]}")
    spare = (0, (1 << max(len(rows) - 1, 0).bit_length()) - len(rows))
    padded = np.pad(rows.astype(np.int32), spare, constant_values=-1), np.pad(factors, spare, constant_values=1)
    return Boosts(*(jax.device_put(x[None]) for x in padded))


def log_factors(boosts: Boosts, num_items: int) -> Float[np.ndarray, " items"]:
    """Logs of the factors of all items, for all requests alike."""
    factors, (rows, given) = np.ones(num_items, np.float32), (np.asarray(x)[0] for x in boosts)
    factors[rows[rows >= 0]] = given[rows >= 0]
    with np.errstate(divide="ignore"):
        return np.log(factors)


def write_graph(folder: Path, graph: GraphEdges) -> None:
    """Write the graph into a model's folder."""
    numbers = {"weight": np.float32(graph.weight), "decay": np.float32(graph.decay)}
    edges = {"neighbors": graph.neighbors, "weights": graph.weights}
    artifacts.save_tensors(folder / _GRAPH, edges | {name: np.asarray(value) for name, value in numbers.items()})


def read_graph(folder: Path, *, num_items: int) -> GraphEdges | None:
    """Read what `write_graph` wrote, None where it did not. Raises SemidError for edges that do not fit the items."""
    if not (folder / _GRAPH).exists():
        return None
    tensors = artifacts.load_tensors(folder / _GRAPH)
    numbers = {name: float(tensors[name]) for name in ("weight", "decay")}
    graph = GraphEdges(tensors["neighbors"], tensors["weights"], **numbers)
    try:
        graph.check(num_items)
    except SemidError as error:
        raise SemidError(f"{folder / _GRAPH}: {error}") from None
    return graph
