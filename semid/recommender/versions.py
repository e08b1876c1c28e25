"""Later versions of a model's catalogue: the trie at a fixed capacity, and features of appended items."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from semid.catalog import SemanticCatalog
from semid.data import Standardizer
from semid.errors import SemidError
from seq_models import Capacity, CodeTrie


def build_trie(
    catalog: SemanticCatalog,
    *,
    active: Bool[np.ndarray, " items"] | None,
    popularity: Int[np.ndarray, " items"],
    capacity: Capacity | None,
    capacity_factor: float | None,
) -> tuple[CodeTrie, Capacity | None]:
    """Build the catalogue's trie, and return it with the capacity that its arrays have.

    That is `capacity`, so that programs compiled for it stay in use, unless the catalogue exceeds it: then a new one
    for `capacity_factor` times the items. None if neither is given.
    """

    def build(capacity: Capacity | None) -> CodeTrie:
        sizes = catalog.level_sizes
        return CodeTrie.from_codes(catalog.codes, sizes, popularity=popularity, active=active, capacity=capacity)

    if capacity is not None:
        try:
            return build(capacity), capacity
        except ValueError:  # the catalogue exceeds it
            pass
    trie = build(None)
    if capacity_factor is None:
        return trie, None
    capacity = Capacity.around(trie, factor=capacity_factor)
    if trie.max_leaf_items == 1:  # a policy keeps items apart, and a search of one item per leaf is faster
        capacity = dataclasses.replace(capacity, leaf_items=1)
    return build(capacity), capacity


def standardize_appended(
    standardizer: Standardizer | None,
    vectors: Float[np.ndarray, "new dim"] | None,
    *,
    new: int,
    columns: tuple[str, ...],
) -> Float[np.ndarray, "new feature"]:
    """Features of appended items from their raw vectors. Raises SemidError if these are missing or do not fit."""
    if standardizer is None:
        raise SemidError(
            "the model reads vectors, but it was written without their standardizer, which the vectors of "
            f"{new} appended items need; train it again"
        )
    width, names = len(standardizer.mean), ", ".join(columns) or "as its encoders give them"
    if vectors is None or vectors.shape != (new, width):
        got = "none" if vectors is None else list(vectors.shape)
        raise SemidError(
            f"the model reads {width} dimensions of vectors ({names}) of every item: expected "
            f"[{new}, {width}] of the appended ones, got {got}"
        )
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise SemidError(f"expected finite vectors of appended items, got NaN or infinity in row {row} of {new}")
    return standardizer(vectors)
