"""Registry of content encoders, by `name`: configs that fit one to a dataset, or restore it from stored values."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from semid.arrow import to_lists
from semid.config import from_dict, to_dict
from semid.data import ContentEncoder, Dataset, StoredEncoder


@runtime_checkable
class FittedEncoder(ContentEncoder, Protocol):
    """A content encoder that can be stored."""

    def tensors(self) -> Mapping[str, np.ndarray]:
        """All fitted arrays, by name: with config and `inputs`, the whole encoder."""


class ContentEncoderConfig(abc.ABC):
    """Settings of a content encoder; a subclass is a frozen dataclass with a `name`."""

    name: ClassVar[str]

    def resolved(self) -> ContentEncoderConfig:
        """The config with all that the vectors depend on, as the recipe records it."""
        return self

    @abc.abstractmethod
    def fit(self, dataset: Dataset) -> FittedEncoder:
        """Fit to all of the dataset's items. Raises SemidError where they lack what it needs."""

    def fitted(self, dataset: Dataset) -> tuple[FittedEncoder, Float[np.ndarray, "items width"]]:
        """The encoder, and vectors of the dataset's own items, which may depend on more than their content."""
        encoder = self.fit(dataset)
        return encoder, encoder.encode(dataset.items)

    @abc.abstractmethod
    def restore(self, stored: StoredEncoder) -> FittedEncoder:
        """Restore the fitted encoder from its stored values."""


def with_content_vectors(dataset: Dataset, config: ContentEncoderConfig) -> Dataset:
    """`dataset` with the vector column of a newly fitted encoder, which is stored with it, as is its recipe."""
    config = config.resolved()
    (encoder, vectors), recipe = config.fitted(dataset), to_dict(config)
    stored = StoredEncoder(encoder.column, encoder.inputs, recipe, encoder.tensors())
    extended, source = dataset.with_vectors(encoder.column, vectors), {**(dataset.source or {}), encoder.column: recipe}
    return extended.replace(source=source, encoders=(*extended.encoders, stored))


def restore_encoders(stored: Iterable[StoredEncoder]) -> dict[str, ContentEncoder]:
    """Content encoders by the column that each makes, from raw columns: one that reads another's column calls that one.

    Raises SemidError for one of an unknown config.
    """
    encoders: dict[str, ContentEncoder] = {
        one.column: from_dict(
            ContentEncoderConfig,  # type: ignore[type-abstract]  # read by the type that it names
            one.settings,
            where=f"encoder of column {one.column!r}",
        ).restore(one)
        for one in stored
    }
    return {column: _Chain.of(encoder, encoders) for column, encoder in encoders.items()}


@dataclass(frozen=True)
class _Chain:
    """An encoder, and the encoders that make the vector columns it reads."""

    last: ContentEncoder
    first: tuple[ContentEncoder, ...]

    @classmethod
    def of(cls, encoder: ContentEncoder, others: Mapping[str, ContentEncoder]) -> ContentEncoder:
        """Chain `encoder` to those whose columns it reads; it stays as it is if it reads raw columns only."""
        first = tuple(cls.of(others[name], others) for name in encoder.inputs if name in others)
        return cls(encoder, first) if first else encoder

    @property
    def column(self) -> str:
        return self.last.column

    @property
    def width(self) -> int:
        return self.last.width

    @property
    def inputs(self) -> tuple[str, ...]:
        """Raw columns that any of them reads."""
        derived = {encoder.column for encoder in self.first}
        raw = [name for name in self.last.inputs if name not in derived]
        return tuple(dict.fromkeys([*raw, *(name for encoder in self.first for name in encoder.inputs)]))

    def encode(self, items: pa.Table) -> Float[np.ndarray, "n width"]:
        """Vectors of items by their raw columns."""
        for encoder in self.first:
            vectors = to_lists(encoder.encode(items))
            items = items.drop_columns([encoder.column]) if encoder.column in items.column_names else items
            items = items.append_column(encoder.column, vectors)
        return self.last.encode(items)
