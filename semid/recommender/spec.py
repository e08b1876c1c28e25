"""The models that `semid train` knows: a config each, what it takes to build one anew, and what it reads of an item."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from semid import artifacts, config
from semid.catalog import SemanticCatalog
from seq_models import (
    DenseConfig,
    DenseTransformer,
    EncoderDecoder,
    EncoderDecoderConfig,
    FlatDecoder,
    FlatDecoderConfig,
    HybridConfig,
    HybridTransformer,
    Inputs,
    Normalization,
    RQTransformer,
    RQTransformerConfig,
)

SPEC_FILE = "config.json"

CodeModelConfig = RQTransformerConfig | FlatDecoderConfig | EncoderDecoderConfig | HybridConfig
ModelConfig = CodeModelConfig | DenseConfig
Model = RQTransformer | FlatDecoder | EncoderDecoder | HybridTransformer | DenseTransformer

_CODE_MODELS = {
    RQTransformerConfig: RQTransformer,
    FlatDecoderConfig: FlatDecoder,
    EncoderDecoderConfig: EncoderDecoder,
    HybridConfig: HybridTransformer,
}


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build the model anew, and to search with it as it was trained."""

    model: ModelConfig
    """The family and its sizes."""
    level_sizes: tuple[int, ...]
    """Codebook sizes of the catalogue."""
    num_items: int
    """Items of the catalogue."""
    num_features: int
    """Width of the dense input; 0: none."""
    max_history: int
    """Items of a history that it reads, the latest."""
    normalization: Normalization = Normalization.VOCABULARY
    """What the probabilities of codes sum to one over, in training and in search."""
    catalog: str = ""
    """Digest of the catalogue whose codes it speaks; empty: not known."""
    columns: tuple[str, ...] = ()
    """Vector columns of the dense input, side by side; empty: none, or not known."""

    @property
    def knows_rows(self) -> bool:
        """Whether the model has a table by item row."""
        return isinstance(self.model, DenseConfig) or self.model.id_embedding


class ItemTables(NamedTuple):
    """Per item row, on the device: the codes, the dense input if there is one, and whether training has the item.

    Rows behind the last item's are room for more. `alive` says which rows hold an item that may be recommended; None:
    all.
    """

    codes: Int[Array, "items level"]
    features: Float[Array, "items feature"] | None
    known: Bool[Array, " items"]
    alive: Bool[Array, " items"] | None = None

    @classmethod
    def of(
        cls,
        codes: Int[np.ndarray, "items level"],
        features: Float[np.ndarray, "items feature"] | None,
        train_counts: Int[np.ndarray, " items"],
        *,
        alive: Bool[np.ndarray, " items"] | None = None,
        rows: int | None = None,
    ) -> ItemTables:
        """On the default device; with `rows`, so many in all, zeros (and False) behind the items'."""

        def put(values: np.ndarray) -> Array:
            free = 0 if rows is None else rows - len(values)
            return jnp.asarray(np.pad(values, ((0, free), *((0, 0),) * (values.ndim - 1))) if free else values)

        dense = None if features is None else put(features)
        return cls(put(codes), dense, put(train_counts > 0), None if alive is None else put(alive))


def build_model(spec: ModelSpec, *, seed: int) -> Model:
    """The model of `spec` with parameters drawn from `seed`."""
    rngs = nnx.Rngs(seed)
    if isinstance(spec.model, DenseConfig):
        return DenseTransformer(spec.model, num_ids=spec.num_items, num_features=spec.num_features, rngs=rngs)
    return _CODE_MODELS[type(spec.model)](
        spec.model, level_sizes=spec.level_sizes, num_features=spec.num_features, num_ids=spec.num_items, rngs=rngs
    )


def read_spec(folder: Path) -> ModelSpec:
    """Of a model's folder."""
    return config.from_dict(ModelSpec, artifacts.read_json(folder / SPEC_FILE), where=str(folder / SPEC_FILE))


def misfit(spec: ModelSpec, own: SemanticCatalog, later: SemanticCatalog) -> str:
    """What keeps a model of the catalogue `own` from recommending from `later`; empty where nothing does."""
    if fault := own.continued_by(later):
        return fault
    new = later.num_alive - int(later.alive[later.rows(own.item_ids)].sum())
    if new and spec.knows_rows:
        return f"it learned a vector of each of its {len(own)} items and has none for the {new} appended"
    return ""


def inputs_at(tables: ItemTables, rows: Int[Array, "b t"]) -> Inputs:
    """What the generator reads at positions that hold these item rows."""
    dense = None if tables.features is None else tables.features[rows]
    return Inputs(tables.codes[rows], dense, rows)
