"""Content vectors as input of models: standardized, with the same total variance for every modality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from semid.data.dataset import Dataset
from semid.errors import SemidError

# Dimensions per float64 chunk when means and deviations are computed.
_CHUNK = 16


@dataclass(frozen=True)
class Standardizer:
    """`(x - mean) / scale` per dimension, with statistics of the items that it was fitted to."""

    mean: Float[np.ndarray, " dim"]
    scale: Float[np.ndarray, " dim"]

    @classmethod
    def fit(cls, blocks: Sequence[Float[np.ndarray, "items _"]]) -> Standardizer:
        """Fit to the vectors of one or more modalities, one block each; the blocks are concatenated.

        Every dimension gets zero mean and unit variance; then each block is scaled so that a modality of few dimensions
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
        """Standardizer that changes nothing, for vectors that need none, such as those of jointly trained encoders."""
        return cls(np.zeros(dim, np.float32), np.ones(dim, np.float32))

    def __call__(self, vectors: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n dim"]:
        """Standardized float32. Raises SemidError for vectors of another width."""
        self.check_width(vectors.shape[1])
        standardized = vectors - self.mean
        standardized /= self.scale
        return standardized.astype(np.float32, copy=False)

    def check_width(self, width: int) -> None:
        """Raise SemidError for vectors of another width."""
        if width != len(self.mean):
            raise SemidError(f"expected content vectors of {len(self.mean)} dimensions, got {width}")


def _parts(blocks: Sequence[Float[np.ndarray, "items _"]]) -> Iterator[Float[np.ndarray, "items _"]]:
    """The concatenated blocks in float64, some columns at a time. No chunk is a single column (unless it is the only
    one): NumPy sums a single column in another order, which changes the last bits."""
    starts = np.cumsum([0, *(block.shape[1] for block in blocks)])
    for columns in np.array_split(np.arange(starts[-1]), -(-starts[-1] // _CHUNK)):
        first, last = columns[[0, -1]]
        cut = [block[:, max(first - at, 0) : max(last + 1 - at, 0)] for block, at in zip(blocks, starts, strict=False)]
        yield np.concatenate(cut, axis=1, dtype=np.float64)


def content_blocks(dataset: Dataset, columns: tuple[str, ...] | None) -> list[Float[np.ndarray, "items _"]]:
    """The named vector columns, all for None. Raises SemidError naming a column that is missing or named twice."""
    named = dataset.vector_columns if columns is None else columns
    if twice := next((column for column in named if named.count(column) > 1), None):
        raise SemidError(f"vector column {twice!r} is named twice and would count twice; name it once")
    return [dataset.vectors(column) for column in named]
