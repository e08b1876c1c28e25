"""Further code sequences of a model's items: the catalogues that they are of, by name, and their codes by item row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from semid.catalog import SemanticCatalog
from semid.errors import SemidError
from seq_models import SequenceSizes

# Codes of all items, an array for each sequence; -1 where an item has none.
SequenceCodes = tuple[Int[np.ndarray, "items _"], ...]


@dataclass(frozen=True)
class SequencesSpec:
    """Further code sequences of every item that a model reads, next to the one that it generates."""

    names: tuple[str, ...]
    """Their names, such as image."""
    level_sizes: tuple[tuple[int, ...], ...]
    """Codebook sizes of each."""
    catalogs: tuple[str, ...]
    """Digests of their catalogues."""
    drop: float = 0.1
    """Share of the histories for which training hides a sequence, drawn for each sequence."""

    @classmethod
    def of(cls, catalogs: Mapping[str, SemanticCatalog], *, drop: float) -> SequencesSpec | None:
        """The spec of these catalogues; None where there are none."""
        if not catalogs:
            return None
        sizes, digests = zip(*((one.level_sizes, one.digest) for one in catalogs.values()), strict=True)
        return cls(tuple(catalogs), sizes, digests, drop)

    @property
    def sizes(self) -> SequenceSizes:
        """Sizes of the model's embeddings."""
        return SequenceSizes(self.level_sizes, self.drop)

    def appended(
        self, own: SequenceCodes, item_ids: pa.Array, later: Mapping[str, SemanticCatalog]
    ) -> tuple[Int[np.ndarray, "all _"], ...]:
        """Codes of these items, the model's `own` first; `later` versions of the catalogues give missing ones, else -1.

        Raises SemidError for a sequence that the model does not read, and for a catalogue with other codes.
        """
        if unknown := set(later) - set(self.names):
            raise SemidError(
                f"the model reads no code sequence {min(unknown)!r}, but {', '.join(self.names)}; name one of these"
            )
        return tuple(
            _appended(name, codes, item_ids, later.get(name), sizes)
            for name, codes, sizes in zip(self.names, own, self.level_sizes, strict=True)
        )


def sequence_codes(catalogs: Mapping[str, SemanticCatalog], item_ids: pa.Array) -> SequenceCodes:
    """Codes of these items in each of the catalogues. Raises SemidError for a catalogue that has none of them."""
    all_codes = tuple(_codes(catalog, item_ids) for catalog in catalogs.values())
    for (name, catalog), codes in zip(catalogs.items(), all_codes, strict=True):
        if not (codes >= 0).any():
            where = "" if catalog.origin is None else f"{catalog.origin.folder}: "
            raise SemidError(
                f"{where}the code sequence {name!r} has none of the {len(item_ids)} items; give a catalogue of the "
                "same item ids"
            )
    return all_codes


def _codes(catalog: SemanticCatalog, item_ids: pa.Array) -> Int[np.ndarray, "items level"]:
    rows, known = catalog.find_rows(item_ids)
    return np.where(known[:, None], catalog.codes[rows], np.int32(-1))


def _appended(
    name: str,
    own: Int[np.ndarray, "items level"],
    item_ids: pa.Array,
    later: SemanticCatalog | None,
    level_sizes: tuple[int, ...],
) -> Int[np.ndarray, "all level"]:
    padded = np.pad(own, ((0, len(item_ids) - len(own)), (0, 0)), constant_values=-1)
    if later is None:
        return padded
    if later.level_sizes != level_sizes:
        raise SemidError(
            f"the model reads code sequence {name!r} of levels {list(level_sizes)}, got a catalogue of "
            f"{list(later.level_sizes)}; give a later version of its own"
        )
    codes = _codes(later, item_ids)
    both = (padded >= 0).all(axis=1) & (codes >= 0).all(axis=1)
    if differ := int((padded[both] != codes[both]).any(axis=1).sum()):
        raise SemidError(
            f"the code sequence {name!r} has other codes for {differ} of the items that the model knows; give a later "
            "version of its own catalogue"
        )
    return np.where(codes >= 0, codes, padded)
