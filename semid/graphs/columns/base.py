"""Base of vector columns derived from another column and training interactions."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import optax
import pyarrow as pa
from jaxtyping import Array, Float, Key, PRNGKeyArray

from semid.artifacts import Kind
from semid.config import check_range, from_dict, to_dict
from semid.data import Dataset, StoredEncoder
from semid.encoders import ContentEncoderConfig, FittedEncoder, with_content_vectors
from semid.errors import SemidError, refuse_path
from semid.graphs.signals import has_content, vector_column
from semid.progress import show_progress
from semid.stage import STAGE_VERSION, Request, run_stage

_SCAN_STEPS = 50  # training steps per compiled call
_ABSENT_CONTENT_VERSION = 1  # stage version of training with items that lack content; recipes before it have none


def check_training(config: Any, sizes: Sequence[str]) -> None:
    """Raise SemidError for sizes below 1, and for a temperature or rates that are out of range or not finite."""
    check_range(config, *sizes, at_least=1)
    check_range(config, "temperature", "learning_rate", above=0)
    check_range(config, "weight_decay", at_least=0)


@dataclass(frozen=True)
class ColumnConfig(ContentEncoderConfig):
    """Settings of a vector column derived from the vector column `column` and the dataset's training interactions.

    Its name is that of the column it reads, `_` and the config's own. Items that are appended to a catalogue later get
    the vectors that `encode` makes of that column alone.
    """

    column: str = ""
    """Vector column to read; none given: the dataset's only one."""
    version: ClassVar[int] = 0
    """Version of its stage if all items have content."""

    def read(self, dataset: Dataset) -> tuple[str, Float[np.ndarray, "items dim"]]:
        """Name and vectors of the column."""
        return vector_column(dataset, self.column)

    def lacks_content(self, dataset: Dataset) -> bool:
        """True if some items lack the content that it trains on: its stage then has another version."""
        return not has_content(self.read(dataset)[1]).all()

    def fit(self, dataset: Dataset) -> FittedEncoder:
        return self.fitted(dataset)[0]

    @abc.abstractmethod
    def fitted(self, dataset: Dataset) -> tuple[FittedEncoder, Float[np.ndarray, "items width"]]: ...

    @classmethod
    def has_fitted(cls, encoder: StoredEncoder) -> bool:
        """True if a config of this kind fitted the stored encoder, so that its vectors depend on interactions."""
        where = f"encoder of column {encoder.column!r}"
        return isinstance(from_dict(ContentEncoderConfig, encoder.settings, where=where), cls)  # type: ignore[type-abstract]


@dataclass(frozen=True, eq=False)
class ColumnEncoder(abc.ABC):
    """Makes vectors of one column for items without interactions."""

    source: str
    """The column that it reads."""
    arrays: Mapping[str, np.ndarray]
    suffix: str
    """`name` of the config that fitted it."""

    @property
    def column(self) -> str:
        """Name of the column that it makes."""
        return f"{self.source}_{self.suffix}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The column that it reads."""
        return (self.source,)

    @property
    @abc.abstractmethod
    def source_width(self) -> int:
        """Dimensions of a vector of the column that it reads."""

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Dimensions of a vector."""

    @abc.abstractmethod
    def from_vectors(self, x: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n width"]:
        """Vectors of items by those of the column that it reads."""

    def encode(self, items: pa.Table) -> Float[np.ndarray, "n width"]:
        """Vectors of items, from a table with the column that it reads. Raises SemidError where it is not as wide."""
        values = items[self.source].combine_chunks()
        flat, width = values.flatten().to_numpy(zero_copy_only=False), self.source_width
        if len(flat) != len(values) * width:
            raise SemidError(f"column {self.source!r}: expected vectors of {width} dimensions in every row")
        return self.from_vectors(flat.reshape(len(values), width).astype(np.float32))

    def tensors(self) -> Mapping[str, np.ndarray]:
        """All fitted arrays, by name."""
        return self.arrays


def add_column(dataset: Dataset, config: ColumnConfig, *, out: str | Path | None = None) -> Dataset:
    """`dataset` with the vector column that `config` makes, written to the folder `out` if one is given.

    A stage (see `run_stage`): the same column of the same dataset is read where it was written before. Raises
    SemidError if the dataset has a column of that name, which other columns and models may depend on.
    """
    refuse_path(dataset, "Dataset.load")
    column = f"{config.read(dataset)[0]}_{config.name}"
    if column in dataset.vector_columns:
        raise SemidError(
            f"dataset {dataset.name!r} has a column {column!r} already, and others may be made of it; "
            "take the dataset that it was added to"
        )
    version = max(config.version, _ABSENT_CONTENT_VERSION * config.lacks_content(dataset))
    recipe = {**(dataset.source or {}), column: to_dict(config) | ({STAGE_VERSION: version} if version else {})}
    request = Request(Kind.DATASET, dataset.replace(source=recipe).config, dataset.parents)
    work = partial(with_content_vectors, dataset, config)
    return run_stage(request, out, load=Dataset.load, work=lambda _: work(), write=Dataset.write)


def minimize(
    loss: Callable[[Any, Any, PRNGKeyArray], Float[Array, ""]],
    parameters: Any,
    data: Any,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    key: PRNGKeyArray,
    title: str,
) -> tuple[Any, Float[np.ndarray, " steps"]]:
    """Parameters after `steps` of AdamW on `loss(parameters, data, key)`, and the loss of every step.

    Steps are rounded up to a multiple of 50.
    """
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

    def step(state: Any, key: PRNGKeyArray, data: Any) -> tuple[Any, Float[Array, ""]]:
        parameters, moments = state
        value, gradient = jax.value_and_grad(loss)(parameters, data, key)
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction multiplies an integer count
            updates, moments = optimizer.update(gradient, moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), value

    @partial(jax.jit, donate_argnums=0)
    def run_steps(state: Any, keys: Key[Array, " n"], data: Any) -> tuple[Any, Float[Array, " n"]]:
        return jax.lax.scan(lambda state, key: step(state, key, data), state, keys)

    state, values, size = (parameters, optimizer.init(parameters)), [], min(_SCAN_STEPS, steps)
    with show_progress(title, total=steps, unit="steps") as progress:
        progress.say("compiling ...")
        for first in range(0, steps, size):
            state, value = run_steps(state, jax.random.split(jax.random.fold_in(key, first), size), data)
            values.append(np.asarray(value))
            progress.advance(min(first + size, steps))
    return state[0], np.concatenate(values)
