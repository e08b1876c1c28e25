"""Device arrays of the item graph that is mixed with a model, and of a request's boosts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Float

from semid.catalog import SemanticCatalog
from semid.data import Id, as_ids
from semid.errors import SemidError
from semid.graphs import ItemGraph
from seq_models import Boosts, ItemNeighbors, Mixture


def check_graph(graph: ItemGraph, item_ids: pa.Array) -> None:
    """Raise SemidError for a graph of other items than those of a catalogue, in its order."""
    if not graph.item_ids.equals(item_ids):
        raise SemidError(
            f"the item graph is of other items ({len(graph.item_ids):,}) than the catalogue ({len(item_ids):,}); "
            "fit it to the dataset that the catalogue was made from"
        )


def check_graph_weight(weight: float) -> None:
    """Raise SemidError for a weight outside 0..1."""
    if not 0 <= weight <= 1:
        raise SemidError(f"expected a graph_weight from 0 (the model alone) to 1 (the graph alone), got {weight}")


def build_mixture(graph: ItemGraph | None, *, weight: float, repeat_factor: float, rows: int) -> Mixture | None:
    """Build the mixture for tables of `rows` rows, on the device; None: the model's own probabilities."""
    if graph is None:
        return None if repeat_factor == 1 else Mixture.from_numbers(repeat_factor=repeat_factor)
    edges = graph.edges
    spare = ((0, rows - len(edges.rows)), (0, 0))
    neighbors = np.pad(edges.rows, spare, constant_values=-1), np.pad(edges.weights, spare)
    device = ItemNeighbors(*jax.device_put(neighbors))
    decay, window = graph.config.recency, graph.config.window
    return Mixture.from_numbers(device, weight=weight, decay=decay, window=window, repeat_factor=repeat_factor)


def build_boosts(boosts: Mapping[Id, float], catalog: SemanticCatalog, *, skip_unknown: bool) -> Boosts:
    """Build the factors of items for all requests alike, padded to few shapes. Raises SemidError for unknown ids and
    bad factors."""
    ids = as_ids(boosts)
    if again := next((item for item, times in Counter(ids.to_pylist()).items() if times > 1), None):
        raise SemidError(f"boosts: item {again!r} is given twice, as text and as a number; keep one of the two")
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
    """Logs of the factors, for every item of the catalogue."""
    factors, (rows, given) = np.ones(num_items, np.float32), (np.asarray(x)[0] for x in boosts)
    factors[rows[rows >= 0]] = given[rows >= 0]
    with np.errstate(divide="ignore"):
        return np.log(factors)
