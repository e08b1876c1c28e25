"""Registry of content encoders: configs that fit one to a dataset, by `name`, and restore it from plain values."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

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

    @abc.abstractmethod
    def restore(self, stored: StoredEncoder) -> FittedEncoder:
        """The fitted encoder whose plain values these are."""


def with_content_vectors(dataset: Dataset, config: ContentEncoderConfig) -> Dataset:
    """`dataset` with a vector column that a newly fitted encoder makes; the encoder and its recipe go with it."""
    config = config.resolved()
    encoder, recipe = config.fit(dataset), to_dict(config)
    stored = StoredEncoder(encoder.column, encoder.inputs, recipe, encoder.tensors())
    made = dataset.with_vectors(encoder.column, encoder.encode(dataset.items))
    return made.replace(source={**(dataset.source or {}), encoder.column: recipe}, encoders=(*made.encoders, stored))


def restore_encoders(stored: Iterable[StoredEncoder]) -> dict[str, ContentEncoder]:
    """Content encoders by the column that each makes. Raises SemidError for one of an unknown config."""
    return {
        one.column: from_dict(
            ContentEncoderConfig,  # type: ignore[type-abstract]  # read by the type that it names
            one.settings,
            where=f"encoder of column {one.column!r}",
        ).restore(one)
        for one in stored
    }
