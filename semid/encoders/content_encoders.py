"""Registry of content encoders: configs that fit one to a dataset, by `name`, and restore it from plain values."""

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
    """Settings of a content encoder; a subclass is a frozen dataclass that says its `name`."""

    name: ClassVar[str]

    def resolved(self) -> ContentEncoderConfig:
        """The config with all that the vectors depend on, as the recipe records it."""
        return self

    @abc.abstractmethod
    def fit(self, dataset: Dataset) -> FittedEncoder:
        """Fit to all of the dataset's items. Raises SemidError where they lack what it needs."""

    def fitted(self, dataset: Dataset) -> tuple[FittedEncoder, Float[np.ndarray, "items width"]]:
        """The encoder, and the vectors of the dataset's own items, of which it may know more than their content."""
        encoder = self.fit(dataset)
        return encoder, encoder.encode(dataset.items)

    @abc.abstractmethod
    def restore(self, stored: StoredEncoder) -> FittedEncoder:
        """The fitted encoder whose plain values these are."""


def with_content_vectors(dataset: Dataset, config: ContentEncoderConfig) -> Dataset:
    """`dataset` with a vector column that a newly fitted encoder makes; the encoder and its recipe go with it."""
    config = config.resolved()
    (encoder, vectors), recipe = config.fitted(dataset), to_dict(config)
    stored = StoredEncoder(encoder.column, encoder.inputs, recipe, encoder.tensors())
    made = dataset.with_vectors(encoder.column, vectors)
    return made.replace(source={**(dataset.source or {}), encoder.column: recipe}, encoders=(*made.encoders, stored))


def restore_encoders(stored: Iterable[StoredEncoder]) -> dict[str, ContentEncoder]:
    """Content encoders by the column that each makes; one that reads another's column reads what that one does.

    Raises SemidError for one of an unknown config.
    """
    found: dict[str, ContentEncoder] = {
        one.column: from_dict(
            ContentEncoderConfig,  # type: ignore[type-abstract]  # read by the type that it names
            one.settings,
            where=f"encoder of column {one.column!r}",
        ).restore(one)
        for one in stored
    }
    return {column: _Chain.of(encoder, found) for column, encoder in found.items()}


@dataclass(frozen=True)
class _Chain:
    """An encoder of vectors that other encoders make of raw columns."""

    last: ContentEncoder
    first: tuple[ContentEncoder, ...]

    @classmethod
    def of(cls, encoder: ContentEncoder, others: Mapping[str, ContentEncoder]) -> ContentEncoder:
        """`encoder` itself where it reads raw columns alone."""
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
        """Raw columns that all of them read."""
        made = {encoder.column for encoder in self.first}
        raw = [name for name in self.last.inputs if name not in made]
        return tuple(dict.fromkeys([*raw, *(name for encoder in self.first for name in encoder.inputs)]))

    def encode(self, items: pa.Table) -> Float[np.ndarray, "n width"]:
        """Vectors of items by their raw columns."""
        for encoder in self.first:
            vectors = to_lists(encoder.encode(items))
            items = items.drop_columns([encoder.column]) if encoder.column in items.column_names else items
            items = items.append_column(encoder.column, vectors)
        return self.last.encode(items)
