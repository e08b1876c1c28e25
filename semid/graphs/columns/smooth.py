"""Vectors propagated over a graph of items, so that co-consumed items become alike; nothing is trained."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import sparse

from semid.config import check_range
from semid.data import Dataset, StoredEncoder
from semid.graphs.columns.base import ColumnConfig, ColumnEncoder
from semid.graphs.cooccurrence import cooccurrence
from semid.graphs.transitions import scaled_rows


class EdgeWeights(enum.Enum):
    """Normalization of the counts C of co-occurring items, D their row sums."""

    SYMMETRIC = "symmetric"
    """`D^-1/2 C D^-1/2`: popular neighbors count less."""
    ROWS = "rows"
    """`D^-1 C`: a mean of the neighbors by their counts."""


@dataclass(frozen=True)
class SmoothConfig(ColumnConfig):
    """Mean of a column after 0 to `layers` rounds over the graph of items that stand near each other in training
    histories (the propagation before the codes of MMGRec, arXiv 2404.16555, without its parameters).

    Items without edges keep their own vectors, and so do those that are appended later.
    """

    layers: int = 2
    """Rounds of propagation."""
    window: int = 5
    """Positions of a history within which two items co-occur."""
    weights: EdgeWeights = EdgeWeights.SYMMETRIC
    """Normalization of the counts."""
    name = "smooth"

    def __post_init__(self) -> None:
        check_range(self, "layers", at_least=1)

    def lacks_content(self, dataset: Dataset) -> bool:
        return False  # nothing is trained

    def fitted(self, dataset: Dataset) -> tuple[UnchangedVectors, Float[np.ndarray, "items width"]]:
        source, x = self.read(dataset)
        counts = cooccurrence(dataset.splits.train, num_items=dataset.num_items, window=self.window)
        vectors = smoothed(x, item_edges(counts, self.weights), layers=self.layers)
        return UnchangedVectors(source, {"width": np.array([x.shape[1]])}, self.name), vectors

    def restore(self, stored: StoredEncoder) -> UnchangedVectors:
        return UnchangedVectors(stored.inputs[0], stored.tensors, self.name)


@dataclass(frozen=True, eq=False)
class UnchangedVectors(ColumnEncoder):
    """The column's own vectors, for items that have no edges."""

    @property
    def source_width(self) -> int:
        return self.width

    @property
    def width(self) -> int:
        return int(self.arrays["width"][0])

    def from_vectors(self, x: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n dim"]:
        return x


def item_edges(counts: sparse.csr_array, weights: EdgeWeights) -> sparse.csr_array:
    """Float32 weights [items, items] of symmetric counts; an item without any is its own neighbor."""
    degree = np.asarray(counts.sum(axis=1), np.float64).ravel()
    isolated = sparse.diags_array((degree == 0).astype(np.float64))
    scale = np.where(degree > 0, degree, 1.0)
    if weights is EdgeWeights.ROWS:
        edges = scaled_rows(sparse.csr_array(counts, dtype=np.float64), 1 / scale)
    else:
        edges = scaled_rows(sparse.csr_array(counts, dtype=np.float64), scale**-0.5) @ sparse.diags_array(scale**-0.5)
    return sparse.csr_array(edges + isolated, dtype=np.float32)


def smoothed(
    x: Float[np.ndarray, "items dim"], edges: sparse.csr_array, *, layers: int
) -> Float[np.ndarray, "items dim"]:
    """Mean of `x` after 0 to `layers` products with the edges."""
    total = x.astype(np.float32)
    for _ in range(layers):
        x = edges @ x
        total = total + x
    return (total / (layers + 1)).astype(np.float32)
