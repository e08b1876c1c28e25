"""Inputs that the stages of an end-to-end run share, and operations on the joint model that they need."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from quantizers import tie_break
from semid.catalog import SemanticCatalog
from semid.config import to_dict
from semid.data import Dataset, Standardizer
from semid.encoders import Content, ItemEncoder, TextRows, take
from semid.errors import SemidError
from semid.generators import FittedConditions, training_counts
from semid.joint.config import JointConfig
from semid.joint.model import ContentTables, JointModel
from semid.recommender import ItemData, ModelSpec, Recommender
from semid.tokenizers import BLOCK, map_blocks
from semid.training import RunFolder

# The first stages, in order: runs that differ only in later ones may share their results.
WARM_UP = ("encoder", "tokenizer", "generator")


class PreviousRun(NamedTuple):
    """A run to continue: the artifact that `train_end_to_end` wrote, and the dataset that it was trained on."""

    path: str | Path
    dataset: Dataset


@dataclass(frozen=True)
class Context:
    """Inputs of a run that its stages share."""

    dataset: Dataset
    content: Content
    config: JointConfig
    teacher: Float[np.ndarray, "items teacher"] | None
    previous: PreviousRun | None
    request: dict[str, Any]
    """The run's request but for `config`: parents, seed and encoders."""
    folder: Path
    """Folder of the stages' checkpoints."""
    shared: Path | None
    """Folder of those of the warm-up, if other runs share them."""
    title: str
    """Ending of the stages' titles on progress bars."""
    seed: int
    mesh: Mesh | None

    def run_folder(self, stage: str) -> RunFolder:
        """The folder of a stage's checkpoints, with all that its result depends on: its settings, and those of the
        stages before it."""
        settings, folder = to_dict(self.config), self.folder
        if stage in WARM_UP:
            settings = {name: settings[name] for name in (*WARM_UP[: WARM_UP.index(stage) + 1], "tie_break")}
            folder = self.folder if self.shared is None else self.shared
        request = {**self.request, "stage": stage, "config": settings}
        return RunFolder(folder / stage, request, title=f"{stage}{self.title}")

    @functools.cached_property
    def tables(self) -> ContentTables:
        """Content, teacher, and the conditions that items meet, on the device."""
        of_items = self.conditions.of_items
        arrays = (None if x is None else jnp.asarray(x) for x in (self.teacher, of_items.groups, of_items.texts))
        return ContentTables(dict(self.content), *arrays)

    @functools.cached_property
    def conditions(self) -> FittedConditions:
        """Conditions that the generator learns."""
        return self.config.generator.conditions.fit(self.dataset)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Codes of each level, that of the tie-break included."""
        return (*self.config.tokenizer.level_sizes, self.config.tie_break)

    def spec(self, dim: int) -> ModelSpec:
        """Spec of the generator that reads item vectors of width `dim`."""
        generator = self.config.generator
        return ModelSpec(
            generator.model,
            self.level_sizes,
            self.dataset.num_items,
            dim,
            generator.max_history,
            repeat_factor=generator.objective.repeat_factor,
            conditions=self.conditions.spec,
        )

    def recommender(self, model: JointModel) -> Recommender:
        """Package the generator with item vectors from the bank and the codes as they are."""
        codes = np.asarray(model.codes[...])
        names = self.dataset.source_columns
        catalog = SemanticCatalog(self.dataset.item_ids, codes, self.level_sizes, tie_break=True, source_columns=names)
        counts, spec = training_counts(self.dataset), replace(self.spec(model.encoder.dim), catalog=catalog.digest)
        vectors, unchanged = np.asarray(self.item_vectors(model)), Standardizer.identity(model.encoder.dim)
        items = ItemData(counts, vectors, unchanged, self.conditions.of_items)
        return Recommender(model.generator, catalog, spec=spec, items=items, dataset=self.dataset.digest)

    def item_vectors(self, model: JointModel) -> Float[Array, "items dim"]:
        """The bank's vectors of all items."""
        return model.bank.read(jnp.arange(self.dataset.num_items))

    def fill_bank(self, model: JointModel) -> None:
        """Encode every item into the bank, in one pass over the catalogue."""
        vectors = encode_items(model.encoder, self.content)
        rows = jnp.arange(len(vectors))
        model.bank.write(rows, jnp.asarray(vectors), mask=jnp.ones(len(vectors), bool))

    def standardize(self, model: JointModel) -> None:
        """Rescale the encoder's outputs to mean 0 and variance 1 over the catalogue."""
        model.encoder.standardize(jnp.asarray(encode_items(model.encoder, self.content)))

    def codes_from_bank(self, model: JointModel) -> Int[np.ndarray, "items level"]:
        """Encode the bank's vectors with the tokenizer; items that the bank does not hold keep their codes."""
        known = np.asarray(model.bank.knows(jnp.arange(self.dataset.num_items)))[:, None]
        codes = map_blocks(model.autoencoder.encode, self.item_vectors(model))
        return self.with_tie_break(np.where(known, codes, np.asarray(model.codes[...])[:, :-1]))

    def with_tie_break(self, codes: Int[np.ndarray, "items level"]) -> Int[np.ndarray, "items level+1"]:
        """Append a level that tells items of equal codes apart.

        Raises SemidError if more items share codes than it has room for, as when codes collapse.
        """
        broken = tie_break(codes)
        if broken.level_size > self.config.tie_break:
            raise SemidError(
                f"{broken.level_size} items share their codes, and tie_break leaves room for {self.config.tie_break}: "
                "codes collapse; lower the tokenizer's rate, or give tie_break more"
            )
        return broken.codes.astype(np.int32)


# Items with more numbers, such as pictures of 224 pixels or long texts of wide encoders, are encoded few at once: the
# states of a whole block would take tens of gigabytes.
_LARGE_ITEM, _FEW_ITEMS = 64 * 384, 256


def encode_items(
    encoder: ItemEncoder, content: Content, rows: Int[np.ndarray, " items"] | None = None
) -> Float[np.ndarray, "items dim"]:
    """Encode all items, or those in `rows`, a block at a time."""
    rows = np.arange(len(jax.tree.leaves(dict(content))[0])) if rows is None else rows

    graph, variables = nnx.split(encoder)
    size = _FEW_ITEMS if _numbers_per_item(encoder, content) > _LARGE_ITEM else BLOCK
    return map_blocks(lambda block: _encode(graph, variables, block, dict(content)), rows.astype(np.int32), size=size)


def _numbers_per_item(encoder: ItemEncoder, content: Content) -> int:
    """Numbers in an item's largest array, or in the states of its tokens."""
    widths = {name: of.dim if isinstance(content[name], TextRows) else 1 for name, of in encoder.encoders.items()}
    return max(math.prod(x.shape[1:]) * widths[name] for name, of in content.items() for x in of)


# Variables are arguments: XLA takes long to fold them as constants, and on CPUs has given garbage for a layer of zeros.
@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: Any, variables: Any, rows: Int[Array, " n"], content: Content) -> Float[Array, "n dim"]:
    with jax.default_matmul_precision("highest"):  # codes are made of these vectors
        return nnx.merge(graph, variables)({name: take(of, rows) for name, of in content.items()})
