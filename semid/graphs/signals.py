"""Signals: sources of collaborative item vectors, which tokenizers are aligned with."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from semid.config import choices
from semid.data import Dataset, Standardizer
from semid.errors import SemidError, did_you_mean
from semid.graphs.cooccurrence import ppmi_vectors


class Signal(abc.ABC):
    """A source of collaborative item vectors, as a config block."""

    @abc.abstractmethod
    def item_vectors(self, dataset: Dataset, *, seed: int) -> Float[np.ndarray, "items signal"]:
        """Item vectors from training interactions alone. Raises SemidError naming what the dataset lacks."""

    def lacks_content(self, dataset: Dataset) -> bool:
        """True if some items lack the content that it trains on: stages that read it then have another version."""
        del dataset
        return False


@dataclass(frozen=True)
class PpmiConfig(Signal):
    """Item vectors from co-occurrence: PPMI and truncated SVD (Levy, Goldberg & Dagan, 2015)."""

    dim: int = 64
    """Dimensions of the vectors."""
    window: int = 5
    """Positions of a history within which two items co-occur."""
    name = "ppmi"

    def item_vectors(self, dataset: Dataset, *, seed: int) -> Float[np.ndarray, "items signal"]:
        histories, items = dataset.splits.train, dataset.num_items
        return ppmi_vectors(histories, num_items=items, dim=self.dim, window=self.window, seed=seed)


@dataclass(frozen=True)
class VectorColumn(Signal):
    """Item vectors that the dataset has as a column, such as those of a trained SASRec."""

    name: str
    """The column."""

    def item_vectors(self, dataset: Dataset, *, seed: int) -> Float[np.ndarray, "items signal"]:
        del seed
        if self.name not in dataset.vector_columns:
            others = [name for name, cls in choices(Signal).items() if cls is not VectorColumn]
            hint = did_you_mean(self.name, [*dataset.vector_columns, *others], cutoff=0.3)
            columns = ", ".join(dataset.vector_columns) or "none"
            raise SemidError(
                f"dataset {dataset.name!r} has no vector column {self.name!r} (it has {columns}), nor is that another "
                f"signal ({', '.join(others)}){hint}"
            )
        return dataset.vectors(self.name)


def vector_column(dataset: Dataset, name: str) -> tuple[str, Float[np.ndarray, "items dim"]]:
    """Name and vectors of a column; "" is the dataset's only one.

    Raises SemidError, for "", if there is no column or a choice of several.
    """
    columns = dataset.vector_columns
    if not name and not columns:
        raise SemidError(
            f"dataset {dataset.name!r} has no vector column to read; add one, such as one of texts (`semid prepare`, "
            "or semid.encoders.with_text_vectors(dataset))"
        )
    if not name and len(columns) != 1:
        raise SemidError(
            f"dataset {dataset.name!r} has vector columns {', '.join(columns)}; name the one to read (`column`: "
            "--column of `semid vectors`, --freedom.column and the like of `semid tokenize --signal freedom`)"
        )
    name = name or columns[0]
    return name, dataset.vectors(name)


def has_content(x: Float[np.ndarray, "n dim"]) -> Bool[np.ndarray, " n"]:
    """True at rows with content; rows of zeros are items without."""
    return np.linalg.norm(x, axis=1) > 0


def content_scale(x: Float[np.ndarray, "items dim"]) -> Standardizer:
    """Standardizer fitted to the rows with content, if there are any."""
    present = has_content(x)
    return Standardizer.fit([x[present] if present.any() and not present.all() else x])


def standardize_content(x: Float[np.ndarray, "n dim"], scale: Standardizer) -> Float[np.ndarray, "n dim"]:
    """Standardized rows; those without content stay zero."""
    return np.where(has_content(x)[:, None], scale(x), np.float32(0))


def standardize_known(vectors: Float[np.ndarray, "n dim"], known: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
    """Zero mean and unit variance by dimension over the known rows, zero for the others.

    Without centering, vectors around a common mean have cosines near 1.
    """
    deviation = vectors[known].std(0)
    scaled = (vectors - vectors[known].mean(0)) / np.where(deviation > 1e-8, deviation, np.inf)
    return np.where(known[:, None], scaled, 0)
