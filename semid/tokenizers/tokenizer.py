"""`SemanticTokenizer`: content vectors to codes."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from semid import artifacts
from semid.artifacts import Kind
from semid.catalog import (
    CATALOG_FILE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    CatalogPath,
    Collisions,
    Residuals,
    SemanticCatalog,
)
from semid.config import enum_member, from_dict
from semid.data import (
    ContentEncoder,
    Dataset,
    Standardizer,
    StoredEncoder,
    VectorFile,
    as_table,
    content_blocks,
    read_encoders,
)
from semid.encoders import restore_encoders
from semid.errors import SemidError
from semid.graphs import PpmiConfig, Signal
from semid.tokenizers.alignment import AlignmentConfig
from semid.tokenizers.blocks import BLOCK, map_blocks
from semid.tokenizers.method import CodeModel, FitContext, TokenizerMethod, explained_variance
from semid.tokenizers.rqvae import RQVaeConfig
from semid.training import named_leaves, replace_leaves

_MEAN, _SCALE = "standardizer/mean", "standardizer/scale"


@dataclass(frozen=True)
class TokenizerConfig:
    """Settings of a tokenizer: method, columns, collisions, alignment."""

    method: TokenizerMethod = RQVaeConfig()
    """RQ-VAE, or a method without training."""
    columns: tuple[str, ...] | None = None
    """Vector columns to tokenize; none given: all of the dataset's."""
    collisions: Collisions = Collisions.TIE_BREAK
    """Policy for items that share all codes."""
    alignment: tuple[AlignmentConfig, ...] = ()
    """Collaborative losses of the RQ-VAE's training."""
    signal: Signal = PpmiConfig()
    """Collaborative item vectors to align with (by every alignment but co-occurrence)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "collisions", enum_member(Collisions, self.collisions, "collisions"))
        if self.alignment and not self.method.can_align:
            raise SemidError(
                f"alignment (--alignment) is for a method that trains, and {self.method.name} does not; take "
                f"{RQVaeConfig.name}, or leave it out"
            )
        if self.collisions.moves_last_code and not self.method.is_residual:
            raise SemidError(
                f"collisions {self.collisions.value!r} moves the last residual code, and product codes have none; "
                "take tie-break, popularity or allowed"
            )

    def resolved(self, items: int) -> TokenizerConfig:
        """Fill in default level sizes by the number of items."""
        return dataclasses.replace(self, method=self.method.resolved(items))


@dataclass(frozen=True)
class ContentColumns:
    """Vector columns of a dataset, read and joined once."""

    names: tuple[str, ...]
    widths: tuple[int, ...]
    vectors: Float[np.ndarray, "items dim"]

    @classmethod
    def read(cls, dataset: Dataset, columns: tuple[str, ...] | None) -> ContentColumns:
        """Read the named columns; None: all. Raises SemidError if there are none."""
        if columns == ():
            raise SemidError("no column was chosen; name some as columns (--columns), or leave them out to take all")
        names = tuple(dataset.vector_columns if columns is None else columns)
        blocks = content_blocks(dataset, names)
        if not blocks:
            raise SemidError(
                f"dataset {dataset.name!r} has no vector columns to tokenize; add one, such as one of texts "
                "(`semid prepare`, or semid.encoders.with_text_vectors(dataset))"
            )
        return cls(names, tuple(block.shape[1] for block in blocks), np.concatenate(blocks, axis=1))

    @property
    def blocks(self) -> list[Float[np.ndarray, "items _"]]:
        """The columns apart."""
        return np.split(self.vectors, np.cumsum(self.widths)[:-1], axis=1)


# Metadata of tokenizer.safetensors: a config whose columns are None does not tell which the dataset had.
_COLUMNS = "columns"


@dataclass(frozen=True)
class SemanticTokenizer:
    """A fitted tokenizer: encodes vectors of the columns that it was fitted to, by the standardizer of the fit."""

    config: TokenizerConfig
    standardizer: Standardizer
    model: CodeModel
    columns: tuple[str, ...] = ()
    """Vector columns that it was fitted to, in order; empty: not known."""
    encoders: tuple[StoredEncoder, ...] = ()
    """Content encoders of that dataset, which compute vector columns from raw ones."""
    source_columns: Mapping[str, str] = field(default_factory=dict)
    """Names of columns in the dataset's own tables, `{"item_id": "asin"}`, which items to encode may have too."""

    def __repr__(self) -> str:
        sizes = " x ".join(map(str, self.config.method.level_sizes))
        columns = f", columns {', '.join(self.columns)}" if self.columns else ""
        return f"SemanticTokenizer({type(self.config.method).__name__} {sizes}{columns})"

    @classmethod
    def fit(
        cls, dataset: Dataset, config: TokenizerConfig, *, seed: int, folder: Path, mesh: Mesh | None = None
    ) -> SemanticTokenizer:
        """Fit to all of the dataset's items. Checkpoints and `history.jsonl` of a trained method go to `folder`.

        Codebooks larger than the number of items shrink to it, with a warning.
        """
        context = FitContext(dataset, seed, folder, config.alignment, config.signal, mesh)
        return cls.fit_columns(ContentColumns.read(dataset, config.columns), config, context)

    @classmethod
    def fit_columns(cls, content: ContentColumns, config: TokenizerConfig, context: FitContext) -> SemanticTokenizer:
        """`fit` on columns that are already read."""
        standardizer, columns = Standardizer.fit(content.blocks), content.names
        x = standardizer(content.vectors)
        if not np.any(x):
            name = context.dataset.name
            raise SemidError(f"dataset {name!r}: all items have the same vector; nothing tells them apart")
        config = config.resolved(len(x))
        model = config.method.fit(x, context)
        # A codebook may be smaller than configured.
        method = dataclasses.replace(config.method, level_sizes=model.level_sizes)
        encoders, names = context.dataset.encoders, context.dataset.source_columns
        return cls(dataclasses.replace(config, method=method), standardizer, model, columns, encoders, names)

    @property
    def dim(self) -> int:
        """Dimensions of the content vectors, all columns joined."""
        return len(self.standardizer.mean)

    @property
    def input_columns(self) -> tuple[str, ...]:
        """Vector columns to read, in order; empty: not known."""
        return self.columns or self.config.columns or ()

    @functools.cached_property
    def content_encoders(self) -> Mapping[str, ContentEncoder]:
        """Content encoders by the vector column that each computes."""
        return restore_encoders(self.encoders)

    @property
    def is_residual(self) -> bool:
        """The last level quantizes a residual (see `last_residuals`)."""
        return self.config.method.is_residual

    @property
    def collisions(self) -> Collisions:
        """The policy for items that share all codes."""
        return self.config.collisions

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Codebook size of each level."""
        return self.config.method.level_sizes

    def encode(self, items: Float[np.ndarray, "n dim"] | pa.Table | Any) -> Int[np.ndarray, "n level"]:
        """Codes of items, given as content vectors (the fitted columns side by side) or as a table.

        A table of Arrow, pandas or polars has the fitted columns, or the raw ones that the content encoders read, named
        as in the dataset or in the dataset's own tables. Raises SemidError for vectors of another width, for a missing
        column, and naming the first row that is not finite.
        """
        vectors = items if isinstance(items, np.ndarray | jax.Array) else self.content_vectors(items)
        if vectors.ndim != 2 or vectors.dtype.kind not in "fiubV":  # V: bfloat16
            raise SemidError(
                f"expected content vectors [items, {self.dim}] of numbers, got {vectors.dtype} {list(vectors.shape)}; "
                "give a row per item"
            )
        codes = map_blocks(self.encode_block, vectors)
        bad = np.flatnonzero(codes[:, 0] < 0)
        if len(bad):
            raise SemidError(f"expected finite content vectors, got NaN or infinity in row {bad[0]} of {len(vectors)}")
        return codes

    def content_vectors(self, items: pa.Table | Any) -> Float[np.ndarray, "n dim"]:
        """Content vectors of a table of items (see `encode`). Raises SemidError naming a column that is missing or
        cannot be read."""
        file = VectorFile.from_table(
            as_table(items),
            dim=self.dim,
            columns=self.input_columns,
            encoders=self.content_encoders,
            names=self.source_columns,
        )
        return np.concatenate([block.vectors for block in file.blocks(BLOCK)])

    def encode_block(self, vectors: Float[np.ndarray, "n dim"] | Array) -> Int[Array, "n level"]:
        """`encode` in one program per number of rows; rows that are not finite get codes -1."""
        self.standardizer.check_width(vectors.shape[1])
        return _encode(self.model, self.standardizer.mean, self.standardizer.scale, vectors)

    def explained(
        self, vectors: Float[np.ndarray, "n dim"], *, codes: Int[np.ndarray, "n level"] | None = None
    ) -> float:
        """Share of the standardized vectors' variance that the codes explain (1 - MSE / variance)."""
        codes = self.encode(vectors) if codes is None else codes
        return explained_variance(self.standardizer(vectors), map_blocks(self.model.decode, codes))

    def last_residuals(self, vectors: Float[np.ndarray, "n dim"], codes: Int[np.ndarray, "n level"]) -> Residuals:
        """Vectors that the last level quantizes, and its codebook: from these, policies re-assign colliding codes."""
        return self.config.method.last_residuals(self.model, self.standardizer(vectors), codes)

    def write(self, folder: Path) -> None:
        """Write `tokenizer.safetensors` and the content encoders into an artifact under construction."""
        metadata = {_COLUMNS: json.dumps(self.columns)} if self.columns else None
        artifacts.save_tensors(folder / TOKENIZER_FILE, self.tensors(), metadata=metadata)
        for encoder in self.encoders:
            encoder.write(folder)

    def tensors(self) -> dict[str, np.ndarray]:
        """All fitted arrays, by name; with the config and `columns` they are the whole tokenizer."""
        statistics = {_MEAN: self.standardizer.mean, _SCALE: self.standardizer.scale}
        arrays = jax.device_get(named_leaves(_variables(self.model)))
        return statistics | {f"model/{name}": np.asarray(value) for name, value in arrays.items()}

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SemanticTokenizer:
        """Load the tokenizer of a catalogue or model artifact, every file verified."""
        path = CatalogPath.parse(path).folder
        with artifacts.opened(path, Kind.CATALOG, Kind.MODEL) as origin:
            manifest, is_catalog = origin.manifest, origin.manifest.kind == Kind.CATALOG
            if TOKENIZER_FILE not in manifest.files or (is_catalog and "tokenizer" not in manifest.config):
                why = "its codes were imported, there is no tokenizer" if is_catalog else "no tokenizer came with it"
                raise SemidError(f"{path}: {why}; encode with what made the codes")
            settings = manifest.config["tokenizer"] if is_catalog else artifacts.read_json(path / TOKENIZER_CONFIG)
            config = from_dict(TokenizerConfig, settings, where=str(path))
            catalog = SemanticCatalog.read(path / CATALOG_FILE)
            sizes = catalog.level_sizes[: len(config.method.level_sizes)]
            config = dataclasses.replace(config, method=dataclasses.replace(config.method, level_sizes=sizes))
            file = path / TOKENIZER_FILE
            tensors = artifacts.load_tensors(file)
            columns = artifacts.parse_json(artifacts.load_metadata(file).get(_COLUMNS, "[]"), where=file)
            if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
                raise SemidError(
                    f"{file}: expected names of columns in its header, got {repr(columns)[:80]}; tokenize again"
                )
            encoders = read_encoders(path, manifest.files)
            return cls.from_tensors(
                config,
                tensors,
                columns=tuple(columns),
                encoders=encoders,
                source_columns=catalog.source_columns,
                where=str(file),
            )

    @classmethod
    def from_tensors(
        cls,
        config: TokenizerConfig,
        tensors: dict[str, np.ndarray],
        *,
        columns: tuple[str, ...],
        encoders: tuple[StoredEncoder, ...] = (),
        source_columns: Mapping[str, str] | None = None,
        where: str,
    ) -> SemanticTokenizer:
        """Build the tokenizer from its `tensors()`, config, columns and content encoders.

        Raises SemidError naming `where` if tensors do not fit or are not finite.
        """
        artifacts.check_finite(tensors, where=where, may_be_infinite=(_SCALE,))  # of a constant dimension
        tensors = dict(tensors)
        standardizer = Standardizer(tensors.pop(_MEAN), tensors.pop(_SCALE))
        named = {name.removeprefix("model/"): value for name, value in tensors.items()}
        model = _filled(config.method.build(len(standardizer.mean)), named, where=where)
        return cls(config, standardizer, model, columns, encoders, source_columns or {})


@jax.jit
def _encode(
    model: Any,
    mean: Float[Array, " dim"],
    scale: Float[Array, " dim"],
    vectors: Float[Array, "n dim"],
) -> Int[Array, "n level"]:
    codes = model.encode((vectors.astype(jnp.float32) - mean[None]) / scale[None])
    return jnp.where(jnp.isfinite(vectors).all(-1)[:, None], codes, -1)


def _variables(model: Any) -> Any:
    """The arrays of a model, as a pytree."""
    return nnx.state(model) if isinstance(model, nnx.Module) else model


def _filled(empty: Any, tensors: dict[str, np.ndarray], *, where: str) -> Any:
    """The model with its arrays replaced. Raises SemidError naming `where` and the tensor that does not fit."""
    if not isinstance(empty, nnx.Module):
        return replace_leaves(empty, tensors, where=where)
    graph, state = nnx.split(empty)
    return nnx.merge(graph, replace_leaves(state, tensors, where=where))
