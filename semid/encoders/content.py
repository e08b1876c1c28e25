"""Content of items as arrays with a row per item, which lie on the device and are gathered inside a step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float16, Int, UInt8


class TextRows(NamedTuple):
    """Tokenized texts, padded on the right; `mask` is False at padding, and all False where there is no text."""

    tokens: Int[Array, "items length"]
    mask: Bool[Array, "items length"]


class ImageRows(NamedTuple):
    """Pictures of one size; black where not `present`."""

    pixels: UInt8[Array, "items height width 3"]
    present: Bool[Array, " items"]


class FeatureRows(NamedTuple):
    """Ready-made vectors."""

    vectors: Float[Array, "items dim"]
    present: Bool[Array, " items"]


class HiddenRows(NamedTuple):
    """Pooled states of every layer of a frozen encoder, computed once (side adapters: IISAN, Fu et al. 2024)."""

    states: Float16[Array, "items layer dim"]
    present: Bool[Array, " items"]


Rows = TextRows | ImageRows | FeatureRows | HiddenRows
_R = TypeVar("_R", bound=Rows)


def take(rows: _R, indices: Int[Array, " n"] | Int[np.ndarray, " n"]) -> _R:
    """Content of the items at these indices."""
    return jax.tree.map(lambda array: array[indices], rows)


def present_of(rows: Rows) -> Bool[Array, " items"]:
    """True for items that have this content at all."""
    return rows.mask.any(axis=-1) if isinstance(rows, TextRows) else rows.present


def row_digests(content: Mapping[str, Rows]) -> list[str]:
    """sha256 of each item's content: equal for items that no encoder can tell apart."""
    parts = [(np.asarray(present_of(rows)), [np.asarray(array) for array in rows]) for rows in content.values()]
    digests = []
    for row in range(len(parts[0][0])):
        hashed = hashlib.sha256(bytes(bool(present[row]) for present, _ in parts))
        for array in (array for present, arrays in parts if present[row] for array in arrays):
            hashed.update(np.ascontiguousarray(array[row]).data)
        digests.append(hashed.hexdigest())
    return digests


def arrays_digest(header: Any, named: Iterable[tuple[str, Any]]) -> str:
    """sha256 of a JSON value and of arrays with their names, types and shapes."""
    hashed = hashlib.sha256(json.dumps(header).encode())
    for name, array in named:
        hashed.update(f"{name} {array.dtype} {array.shape}".encode())
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()


def named_variables(module: Any) -> list[tuple[str, Any]]:
    """The arrays of a module by their paths."""
    return [(".".join(map(str, path)), variable[...]) for path, variable in nnx.to_flat_state(nnx.state(module))]
