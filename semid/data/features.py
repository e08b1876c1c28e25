"""Content vectors as models read them: standardized, every modality with the same total variance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from semid.data.dataset import Dataset
from semid.errors import SemidError

# Dimensions whose mean and deviation are found at once, in float64.
_AT_ONCE = 16


@dataclass(frozen=True)
class Standardizer:
    """`(x - mean) / scale` by dimension, frozen on the items it was fitted to."""

    mean: Float[np.ndarray, " dim"]
    scale: Float[np.ndarray, " dim"]

    @classmethod
    def fit(cls, blocks: Sequence[Float[np.ndarray, "items _"]]) -> Standardizer:
        """From vectors of one or more modalities, to stand side by side.

        Zero mean and unit variance by dimension; then each block is weighed so that a modality of few dimensions
        counts as much as one of many. Constant dimensions become 0.
        """
        widths = [block.shape[1] for block in blocks]
        weights = [np.full(width, np.sqrt(sum(widths) / len(blocks) / width)) for width in widths]
        means, deviations = zip(*((part.mean(axis=0), part.std(axis=0)) for part in _parts(blocks)), strict=True)
        deviation = np.concatenate(deviations)
        scale = np.where(deviation > 1e-8, deviation, np.inf) / np.concatenate(weights)
        return cls(np.concatenate(means).astype(np.float32), scale.astype(np.float32))

    @classmethod
    def identity(cls, dim: int) -> Standardizer:
        """Standardizer that changes nothing, for vectors such as those of trained encoders."""
        return cls(np.zeros(dim, np.float32), np.ones(dim, np.float32))

    def __call__(self, vectors: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n dim"]:
        """Standardized float32. Raises SemidError for vectors of another width."""
        self.check_width(vectors.shape[1])
        standardized = vectors - self.mean
        standardized /= self.scale
        return standardized.astype(np.float32, copy=False)

    def check_width(self, width: int) -> None:
        """Raises SemidError for vectors of another width."""
        if width != len(self.mean):
            raise SemidError(f"expected content vectors of {len(self.mean)} dimensions, got {width}")


def _parts(blocks: Sequence[Float[np.ndarray, "items _"]]) -> Iterator[Float[np.ndarray, "items _"]]:
    """The blocks side by side in float64, some columns at a time: never one alone where there are two, since NumPy adds
    up a single column in another order."""
    starts = np.cumsum([0, *(block.shape[1] for block in blocks)])
    for columns in np.array_split(np.arange(starts[-1]), -(-starts[-1] // _AT_ONCE)):
        first, last = columns[[0, -1]]
        cut = [block[:, max(first - at, 0) : max(last + 1 - at, 0)] for block, at in zip(blocks, starts, strict=False)]
        yield np.concatenate(cut, axis=1, dtype=np.float64)


def content_blocks(dataset: Dataset, columns: tuple[str, ...] | None) -> list[Float[np.ndarray, "items _"]]:
    """The named vector columns, None for all. Raises SemidError naming a column that is not there, or named twice."""
    named = dataset.vector_columns if columns is None else columns
    if twice := next((column for column in named if named.count(column) > 1), None):
        raise SemidError(f"vector column {twice!r} is named twice and would count twice; name it once")
    return [dataset.vectors(column) for column in named]
