"""Content encoders: they compute a vector column from raw columns of items, e.g. LSA vectors from texts.

An encoder is fitted once and stored in plain values (`StoredEncoder`) in every dataset, tokenizer and model that needs
its vectors; `semid.encoders` fits and restores it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from semid import artifacts
from semid.arrow import decoded, is_list, is_text
from semid.errors import SemidError

_FOLDER, _HEADER = "encoders", "semid.encoder"
_COLUMN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def check_column(name: str) -> None:
    """Raise SemidError for a vector column's name that cannot be a file name."""
    if not _COLUMN.fullmatch(name):
        raise SemidError(f"column {name!r}: expected letters, digits, _, - and dots; choose another name")


@runtime_checkable
class ContentEncoder(Protocol):
    """A fitted encoder of items' content."""

    @property
    def column(self) -> str:
        """Name of its vector column."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Raw columns that it reads."""

    @property
    def width(self) -> int:
        """Dimensions of a vector."""

    def encode(self, items: pa.Table) -> Float[np.ndarray, "n width"]:
        """Vectors of items, from a table with its `inputs`; zeros for items without known content."""


@dataclass(frozen=True, eq=False)
class StoredEncoder:
    """A fitted content encoder in plain values: input and output columns, settings and arrays."""

    column: str
    inputs: tuple[str, ...]
    settings: dict[str, Any]
    """JSON form of the config that fitted it."""
    tensors: Mapping[str, np.ndarray] = field(repr=False)

    def __post_init__(self) -> None:
        check_column(self.column)

    @property
    def digest(self) -> str:
        """sha256 of everything that its vectors depend on."""
        arrays = {name: [str(array.dtype), *array.shape] for name, array in sorted(self.tensors.items())}
        total = hashlib.sha256(json.dumps([self.column, self.inputs, self.settings, arrays]).encode())
        for name in arrays:
            total.update(np.ascontiguousarray(self.tensors[name]).data)
        return total.hexdigest()

    def write(self, folder: Path) -> None:
        """Write one safetensors file, with the settings in its header, into an artifact under construction."""
        (folder / _FOLDER).mkdir(exist_ok=True)
        header = {"column": self.column, "inputs": self.inputs, "settings": self.settings}
        metadata = {_HEADER: json.dumps(header)}
        artifacts.save_tensors(folder / _FOLDER / f"{self.column}.safetensors", self.tensors, metadata=metadata)


def is_encoder_file(name: str) -> bool:
    """Tell whether `name`, relative to an artifact, is the file of a content encoder."""
    return Path(name).parent == Path(_FOLDER)


def read_encoders(folder: Path, files: Iterable[str]) -> tuple[StoredEncoder, ...]:
    """The content encoders among the files of an artifact. Raises SemidError naming a file that is not readable."""
    return tuple(_read(folder / name) for name in sorted(files) if is_encoder_file(name))


def _read(file: Path) -> StoredEncoder:
    tensors, metadata = artifacts.load_tensors(file), artifacts.load_metadata(file)
    try:
        header = artifacts.parse_json(metadata[_HEADER], where=file)
        return StoredEncoder(header["column"], tuple(header["inputs"]), header["settings"], tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise SemidError(f"{file}: not a content encoder of semid ({error!r}); write the artifact again") from None


def joined_texts(items: pa.Table, columns: Sequence[str]) -> list[str]:
    """One text per item: its non-empty text columns joined.

    Raises SemidError naming a column that is missing or of another type.
    """
    for name in columns:
        if name not in items.column_names:
            raise SemidError(f"column {name!r} is missing; found {', '.join(items.column_names)}; add it, empty or not")
        kind = decoded(items[name]).type
        if not (is_text(kind) or pa.types.is_null(kind.value_type if is_list(kind) else kind)):
            raise SemidError(f"column {name!r}: expected texts, got {kind}; convert it to strings")
    rows = zip(*(items[name].to_pylist() for name in columns), strict=True)
    return [". ".join(_as_text(value) for value in map(_without_nulls, row) if value) for row in rows]


def _without_nulls(value: str | list[str | None] | None) -> str | list[str] | None:
    return [part for part in value if part is not None] if isinstance(value, list) else value


def _as_text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " > ".join(value)
