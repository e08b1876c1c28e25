"""Item data that a model reads, by item row, for the catalogue of its training and for later versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from semid.catalog import SemanticCatalog
from semid.data import Standardizer
from semid.errors import SemidError
from semid.recommender.conditions import ItemConditions
from semid.recommender.sequences import SequenceCodes
from semid.recommender.spec import ModelSpec
from semid.recommender.versions import standardize_appended
from seq_models import ItemTables


class ItemData(NamedTuple):
    """Item data that a model reads, by item row, with the items' training counts.

    `features` are the dense input, which `standardizer` computes from raw vectors; `conditions` are those that the
    items meet, and `sequences` their further code sequences.
    """

    train_counts: Int[np.ndarray, " items"]
    features: Float[np.ndarray, "items feature"] | None = None
    standardizer: Standardizer | None = None
    conditions: ItemConditions = ItemConditions()
    sequences: SequenceCodes = ()

    def appended(
        self,
        catalog: SemanticCatalog,
        spec: ModelSpec,
        *,
        first: int,
        vectors: Float[np.ndarray, "later dim"] | None,
        sequences: Mapping[str, SemanticCatalog],
    ) -> ItemData:
        """The same for a catalogue with more items after these; see `Recommender.with_catalog`.

        `vectors` are those of all items from row `first` on.
        """
        new, features = len(catalog) - len(self.train_counts), self.features
        if features is not None and (new or (vectors is not None and len(catalog) > first)):
            added = standardize_appended(self.standardizer, vectors, new=len(catalog) - first, columns=spec.columns)
            features = np.concatenate([features[:first], added])
        if sequences and spec.sequences is None:
            raise SemidError("the model reads no further code sequences; leave `sequences` out")
        codes = () if spec.sequences is None else spec.sequences.appended(self.sequences, catalog.item_ids, sequences)
        counts = np.pad(self.train_counts, (0, new))
        return ItemData(counts, features, self.standardizer, self.conditions.padded(new), codes)

    def same_inputs_as(self, other: ItemData) -> bool:
        """True if features and further codes equal those of `other`, which has as many items."""
        own, others = ([x for x in (data.features, *data.sequences) if x is not None] for data in (self, other))
        return all(np.array_equal(*pair) for pair in zip(own, others, strict=True))

    def tables(
        self, catalog: SemanticCatalog, *, active: Bool[np.ndarray, " items"] | None, rows: int | None
    ) -> ItemTables:
        """Tables for the model, on the default device, padded to `rows` rows if given."""
        return ItemTables.from_arrays(
            catalog.codes,
            self.features,
            self.train_counts,
            active=active,
            groups=self.conditions.groups,
            texts=self.conditions.texts,
            sequences=self.sequences,
            rows=rows,
        )
