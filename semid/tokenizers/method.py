"""The interface of tokenization methods: a config that fits a model, and builds an empty one to be loaded."""

from __future__ import annotations

import abc
import dataclasses
import functools
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


@runtime_checkable
class CodeModel(Protocol):
    """A fitted model between standardized vectors and codes: an `nnx.Module`, or a pytree of arrays."""

    @property
    def level_sizes(self) -> tuple[int, ...]: ...

    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]: ...

    def decode(self, codes: Integer[Array, "*b level"]) -> Float[Array, "*b dim"]: ...


@dataclass(frozen=True)
class FitContext:
    """Inputs of a fit next to the vectors. Methods that train nothing need the seed alone."""

    dataset: Dataset
    seed: int
    folder: Path
    """Of checkpoints and `history.jsonl`."""
    alignment: Sequence[AlignmentConfig]
    signal: Signal
    mesh: Mesh | None

    @functools.cached_property
    def co_consumption(self) -> CoConsumption:
        """Draws of co-consumed items, which alignments and the health of codes share."""
        return CoConsumption(self.dataset.splits.train, num_items=self.dataset.num_items, seed=self.seed)


@dataclass(frozen=True)
class TokenizerMethod(abc.ABC):
    """Settings of a tokenization method. A new one is a file here, and its name in `semid.tokenizers`."""

    level_sizes: tuple[int, ...]
    """Codebook size of each level."""
    name: ClassVar[str]
    """Name on the command line."""
    is_residual: ClassVar[bool] = False
    """Each level quantizes the residual of those before it, so that collision policies can move the last code."""
    can_align: ClassVar[bool] = False
    """It trains, so that alignments can join."""

    @abc.abstractmethod
    def fit(self, x: Float[np.ndarray, "items dim"], context: FitContext) -> CodeModel:
        """Fit a model to the standardized vectors of all items.

        Codebooks larger than the number of items shrink to it, with a warning.
        """

    @abc.abstractmethod
    def build(self, dim: int) -> CodeModel:
        """A model of the right shapes for vectors of `dim` dimensions, its arrays to be loaded."""

    def last_residuals(self, model: Any, x: Float[np.ndarray, "n dim"], codes: Int[np.ndarray, "n level"]) -> Residuals:
        """Inputs of the last level, for a residual method. Raises SemidError for others."""
        del model, x, codes
        raise SemidError(f"the codes of {self.name} are no residual codes, so that none of them has a last residual")


def last_residuals(quantizer: Any, latents: Float[np.ndarray, "n dim"], codes: Int[np.ndarray, "n level"]) -> Residuals:
    """Inputs of a residual quantizer's last level for vectors of the given codes."""
    book = np.asarray(quantizer.codebooks[-1][...])
    return Residuals(latents - (map_blocks(quantizer.decode, codes) - book[codes[:, -1]]), book)


_Method = TypeVar("_Method", bound=TokenizerMethod)


def shrunk_to(items: int, method: _Method) -> _Method:
    """`method` with no codebook larger than the number of items, with a warning if one was."""
    sizes = tuple(min(size, items) for size in method.level_sizes)
    if sizes != method.level_sizes:
        warnings.warn(f"{items} items cannot fill codebooks of {method.level_sizes} codes: made {sizes}", stacklevel=4)
    return dataclasses.replace(method, level_sizes=sizes)


def explained_variance(x: Float[np.ndarray, "n dim"], reconstructed: Float[np.ndarray, "n dim"]) -> float:
    """1 - MSE / variance of standardized `x`."""
    return float(1 - np.mean(np.square(reconstructed - x)) / max(np.mean(np.square(x)), 1e-12))


def check_sizes(level_sizes: tuple[int, ...], *widths: int) -> None:
    """Raise SemidError unless there is a level, and every size is at least 1."""
    if not level_sizes or min(*level_sizes, *widths, 1) < 1:
        raise SemidError(f"expected at least one level, and sizes of at least 1, got {level_sizes} and {widths}")


def check_iterations(*iterations: int) -> None:
    """Raise SemidError for a negative number."""
    if min(iterations) < 0:
        raise SemidError(f"expected iterations of 0 or more, got {min(iterations)}")
