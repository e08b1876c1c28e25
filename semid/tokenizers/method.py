"""The interface of tokenization methods: a config that fits a model, or builds one to load arrays into."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer

from semid.catalog import Residuals
from semid.data import Dataset
from semid.errors import SemidError
from semid.graphs import CoConsumption, Signal
from semid.tokenizers.alignment import AlignmentConfig
from semid.tokenizers.blocks import map_blocks

_Method = TypeVar("_Method", bound="TokenizerMethod")


@runtime_checkable
class CodeModel(Protocol):
    """A fitted model between standardized vectors and codes: an `nnx.Module`, or a pytree of arrays."""

    @property
    def level_sizes(self) -> tuple[int, ...]: ...

    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]: ...

    def decode(self, codes: Integer[Array, "*b level"]) -> Float[Array, "*b dim"]: ...


@dataclass(frozen=True)
class FitContext:
    """Inputs of a fit besides the vectors. Methods without training need only the seed."""

    dataset: Dataset
    seed: int
    folder: Path
    """Folder of checkpoints and `history.jsonl`."""
    alignment: Sequence[AlignmentConfig]
    signal: Signal
    mesh: Mesh | None

    @functools.cached_property
    def co_consumption(self) -> CoConsumption:
        """Co-consumed items, drawn once for alignments and code health."""
        return CoConsumption(self.dataset.splits.train, num_items=self.dataset.num_items, seed=self.seed)


_LARGEST, _SMALLEST = 256, 16


def codebook_size(items: int) -> int:
    """Default codebook size of a level: the power of two nearest to a quarter of the items, at least 16 (or the number
    of items) and at most 256, which is reached at 725 items."""
    nearest = 2 ** round(math.log2(max(items, 1) / 4))
    return min(max(nearest, _SMALLEST), _LARGEST, max(items, 1))


@dataclass(frozen=True)
class TokenizerMethod(abc.ABC):
    """Settings of a tokenization method. A new one is a file here, exported in `semid.tokenizers`."""

    level_sizes: tuple[int, ...]
    """Codebook size of each level; none given: by the number of items (see `resolved`)."""
    name: ClassVar[str]
    """Name on the command line."""
    is_residual: ClassVar[bool] = False
    """Each level quantizes the residual of those before it, so that collision policies can move the last code."""
    can_align: ClassVar[bool] = False
    """It trains, so that alignments can be added to its loss."""
    default_levels: ClassVar[int] = 3
    """Number of levels if no sizes are given."""

    @property
    def num_levels(self) -> int:
        """Number of levels before collisions are resolved."""
        return len(self.level_sizes) or self.default_levels

    def resolved(self: _Method, items: int) -> _Method:
        """Fill in the default level sizes, `codebook_size(items)` for each level."""
        sizes = self.level_sizes or (codebook_size(items),) * self.default_levels
        return dataclasses.replace(self, level_sizes=sizes)

    @abc.abstractmethod
    def fit(self, x: Float[np.ndarray, "items dim"], context: FitContext) -> CodeModel:
        """Fit a model to the standardized vectors of all items.

        Codebooks larger than the number of items shrink to it, with a warning.
        """

    @abc.abstractmethod
    def build(self, dim: int) -> CodeModel:
        """Build a model of the right shapes for vectors of `dim` dimensions, to load arrays into."""

    def last_residuals(self, model: Any, x: Float[np.ndarray, "n dim"], codes: Int[np.ndarray, "n level"]) -> Residuals:
        """Inputs of the last level, for a residual method. Raises SemidError for others."""
        del model, x, codes
        raise SemidError(f"the codes of {self.name} are no residual codes and have no last residual")


def last_residuals(quantizer: Any, latents: Float[np.ndarray, "n dim"], codes: Int[np.ndarray, "n level"]) -> Residuals:
    """Inputs of a residual quantizer's last level, and its codebook, for latents with these codes."""
    book = np.asarray(quantizer.codebooks[-1][...])
    return Residuals(latents - (map_blocks(quantizer.decode, codes) - book[codes[:, -1]]), book)


def shrunk_to(items: int, method: _Method) -> _Method:
    """`method` with no codebook larger than the number of items, with a warning if one was."""
    sizes = tuple(min(size, items) for size in method.level_sizes)
    if sizes != method.level_sizes:
        warnings.warn(f"{items} items cannot fill codebooks of {method.level_sizes} codes: made {sizes}", stacklevel=4)
    return dataclasses.replace(method, level_sizes=sizes)


def explained_variance(x: Float[np.ndarray, "n dim"], reconstructed: Float[np.ndarray, "n dim"]) -> float:
    """1 - MSE / variance of standardized `x`."""
    error = reconstructed - x
    error *= error
    return float(1 - np.mean(error) / max(np.mean(np.square(x)), 1e-12))
