"""The items' content as arrays, one row an item: what lies on the device and is gathered by item rows inside a step."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Int, UInt8


class TextRows(NamedTuple):
    """Tokenized texts, padded on the right; `mask` is False at padding, and all False where there is no text."""

    tokens: Int[Array, "items length"]
    mask: Bool[Array, "items length"]


class ImageRows(NamedTuple):
    """Pictures of one size; black where not `present`."""

    pixels: UInt8[Array, "items height width 3"]
    present: Bool[Array, "items"]


class FeatureRows(NamedTuple):
    """Ready-made vectors."""

    vectors: Float[Array, "items dim"]
    present: Bool[Array, "items"]


class HiddenRows(NamedTuple):
    """Pooled states of every layer of a frozen encoder, computed once (side adapters: IISAN, Fu et al. 2024)."""

    states: Float16[Array, "items layer dim"]
    present: Bool[Array, "items"]


Rows = TextRows | ImageRows | FeatureRows | HiddenRows
_R = TypeVar("_R", bound=Rows)


def take(rows: _R, indices: Int[Array, "n"] | Int[np.ndarray, "n"]) -> _R:
    """The content of those items."""
    return jax.tree.map(lambda array: array[indices], rows)


def present_of(rows: Rows) -> Bool[Array, "items"]:
    """Which items have this content at all."""
    return rows.mask.any(axis=-1) if isinstance(rows, TextRows) else rows.present
