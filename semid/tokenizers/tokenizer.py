"""`SemanticTokenizer`: content vectors to codes."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from quantizers import ProductKMeans, ResidualKMeans, balanced_kmeans, kmeans
from semid import artifacts
from semid.artifacts import Kind
from semid.catalog import CATALOG_FILE, TOKENIZER_CONFIG, TOKENIZER_FILE, Collisions, SemanticCatalog
from semid.config import from_dict, to_dict
from semid.data import Dataset, Standardizer, content_blocks
from semid.errors import SemidError
from semid.tokenizers.alignment import AlignmentConfig, PpmiConfig, Signal, make_alignment, make_signals
from semid.tokenizers.rqvae import (
    RQVAE,
    AlignedRQVAE,
    RQVaeConfig,
    check_iterations,
    check_sizes,
    explained,
    in_blocks,
    train_autoencoder,
)
from semid.training import named_leaves, replace_leaves


@dataclass(frozen=True)
class RQKmeansConfig:
    """Residual k-means on the content vectors: no training, nearly the same quality."""

    level_sizes: tuple[int, ...] = (256, 256, 256)
    """Codebook size of each level."""
    iterations: int = 25
    """Lloyd iterations a level."""
    balanced: bool = False
    """Clusters of equal size (OneRec)."""

    def __post_init__(self) -> None:
        check_sizes(self.level_sizes)
        check_iterations(self.iterations)


@dataclass(frozen=True)
class ProductConfig:
    """Optimized product quantization: many unordered codes, each of its own part of the rotated vector (RPG)."""

    level_sizes: tuple[int, ...] = (256,) * 16
    """Codebook size of each code; 4 to 64 codes are usual."""
    iterations: int = 25
    """Lloyd iterations."""
    rotations: int = 8
    """Rounds that learn the rotation; 0: plain product quantization."""

    def __post_init__(self) -> None:
        check_sizes(self.level_sizes)
        check_iterations(self.iterations, self.rotations)
        if len(set(self.level_sizes)) > 1:
            raise SemidError(f"product codes have one size, got {self.level_sizes}; make all level_sizes the same")


Method = RQVaeConfig | RQKmeansConfig | ProductConfig
_Sized = TypeVar("_Sized", RQVaeConfig, ProductConfig)


@dataclass(frozen=True)
class TokenizerConfig:
    """How content becomes codes."""

    method: Method = RQVaeConfig()
    """RQ-VAE, or its training-free siblings."""
    columns: tuple[str, ...] | None = None
    """Vector columns to tokenize; none given: all of the dataset's."""
    collisions: Collisions = Collisions.TIE_BREAK
    """What becomes of items that share all codes."""
    alignment: tuple[AlignmentConfig, ...] = ()
    """Collaborative losses of the RQ-VAE's training."""
    signal: Signal = PpmiConfig()
    """Collaborative item vectors that all but co-occurrence align with."""

    def __post_init__(self) -> None:
        if self.alignment and not isinstance(self.method, RQVaeConfig):
            raise SemidError(f"{type(self.method).__name__} trains nothing that could be aligned; take the RQ-VAE")
        if self.collisions.moves_last_code and isinstance(self.method, ProductConfig):
            raise SemidError(
                f"collisions {self.collisions.value!r} moves the last residual code, and product codes have none; "
                "take tie-break, popularity or allowed"
            )


_COLUMNS = "columns"  # of tokenizer.safetensors' metadata: a config without columns does not say which a dataset had


@dataclass(frozen=True)
class SemanticTokenizer:
    """Frozen inputs' statistics and a fitted quantizer: encodes any vectors of the columns it was fitted to."""

    config: TokenizerConfig
    standardizer: Standardizer
    model: RQVAE | ResidualKMeans | ProductKMeans
    columns: tuple[str, ...] = ()
    """The vector columns it was fitted to, in their order; empty where they are not known."""

    @classmethod
    def fit(
        cls, dataset: Dataset, config: TokenizerConfig, *, seed: int, folder: Path, mesh: Mesh | None = None
    ) -> SemanticTokenizer:
        """Fit to all of the dataset's items. Checkpoints and `history.jsonl` of a trained method go to `folder`.

        Codebooks larger than the number of items shrink to it, with a warning.
        """
        if config.columns == ():
            raise SemidError("no column was chosen; name some after --columns, or leave it out to take all")
        columns = tuple(dataset.vector_columns if config.columns is None else config.columns)
        blocks = content_blocks(dataset, columns)
        if not blocks:
            raise SemidError(
                f"dataset {dataset.name!r} has no vector columns to tokenize; add one, or make text vectors with "
                "semid.encoders.text.with_text_vectors(dataset)"
            )
        standardizer = Standardizer.fit(blocks)
        x = standardizer(np.concatenate(blocks, axis=1))
        if not np.any(x):
            raise SemidError(f"dataset {dataset.name!r}: all items have the same vector; nothing tells them apart")
        method = config.method
        if isinstance(method, RQKmeansConfig):
            return _of_size(config, standardizer, fit_kmeans(x, method, seed=seed), columns)
        if isinstance(method, ProductConfig):
            return _of_size(config, standardizer, _fit_product(x, _shrunk(method, items=len(x)), seed=seed), columns)
        method = _shrunk(method, items=len(x))
        model = _train_rqvae(dataset, x, config, method, seed=seed, folder=folder, mesh=mesh)
        return cls(dataclasses.replace(config, method=method), standardizer, model, columns)

    @property
    def dim(self) -> int:
        """Dimensions of the content vectors, all columns side by side."""
        return len(self.standardizer.mean)

    @property
    def input_columns(self) -> tuple[str, ...]:
        """Vector columns to read, in order; empty where they are not known."""
        return self.columns or self.config.columns or ()

    @property
    def is_residual(self) -> bool:
        """The last level quantizes a residual (see `last_residuals`)."""
        return not isinstance(self.config.method, ProductConfig)

    @property
    def collisions(self) -> Collisions:
        """The policy for items that share all codes."""
        return self.config.collisions

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Codebook size of each level."""
        return self.config.method.level_sizes

    def encode(self, vectors: Float[np.ndarray, "n dim"]) -> Int[np.ndarray, "n level"]:
        """Codes of raw content vectors (the fitted columns side by side). Raises SemidError for another width, and
        naming the first row that is not finite."""
        codes = in_blocks(self.encode_block, vectors)
        bad = np.flatnonzero(codes[:, 0] < 0)
        if len(bad):
            raise SemidError(f"expected finite content vectors, got NaN or infinity in row {bad[0]} of {len(vectors)}")
        return codes

    def encode_block(self, vectors: Float[np.ndarray, "n dim"] | Array) -> Int[Array, "n level"]:
        """`encode` by one program, compiled once for each number of rows; rows that are not finite get codes -1."""
        self.standardizer.check_width(vectors.shape[1])
        return _encode(self.model, self.standardizer.mean, self.standardizer.scale, vectors)

    def explained(self, vectors: Float[np.ndarray, "n dim"]) -> float:
        """Share of the standardized vectors' variance that their codes reconstruct (1 - MSE / variance)."""
        return explained(self.standardizer(vectors), in_blocks(self.model.decode, self.encode(vectors)))

    def last_residuals(
        self, vectors: Float[np.ndarray, "n dim"], codes: Int[np.ndarray, "n level"]
    ) -> tuple[Float[np.ndarray, "n dim"], Float[np.ndarray, "codes dim"]]:
        """What the last level quantizes, and its codebook: what collision policies re-assign by."""
        x = self.standardizer(vectors)
        quantizer = self.model.quantizer if isinstance(self.model, RQVAE) else self.model
        latents = in_blocks(self.model.latents, x) if isinstance(self.model, RQVAE) else x
        book = np.asarray(quantizer.codebooks[-1][...])
        return latents - (in_blocks(quantizer.decode, codes) - book[codes[:, -1]]), book

    def write(self, folder: Path) -> None:
        """Write `tokenizer.safetensors` into an artifact under construction."""
        metadata = {_COLUMNS: json.dumps(self.columns)} if self.columns else None
        artifacts.save_tensors(folder / TOKENIZER_FILE, self.tensors(), metadata=metadata)

    def tensors(self) -> dict[str, np.ndarray]:
        """All that was fitted, by name: with the config and `columns`, the whole tokenizer."""
        statistics = {f"standardizer/{name}": value for name, value in asdict(self.standardizer).items()}
        arrays = jax.device_get(named_leaves(_arrays(self.model)))
        return statistics | {f"model/{name}": np.asarray(value) for name, value in arrays.items()}

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SemanticTokenizer:
        """Load the tokenizer of a catalogue artifact, or that which a model's carries, every file verified."""
        path = Path(path)
        made = artifacts.read_artifact(path, Kind.CATALOG, Kind.MODEL)
        if TOKENIZER_FILE not in made.files or (made.kind == Kind.CATALOG and "tokenizer" not in made.config):
            why = (
                "its codes were imported, there is no tokenizer"
                if made.kind == Kind.CATALOG
                else "no tokenizer came with it"
            )
            raise SemidError(f"{path}: {why}; encode with what made the codes")
        carried = path / TOKENIZER_CONFIG
        settings = made.config["tokenizer"] if made.kind == Kind.CATALOG else artifacts.read_json(carried)
        config = from_dict(TokenizerConfig, settings, where=str(path))
        sizes = SemanticCatalog.read(path / CATALOG_FILE).level_sizes[: len(config.method.level_sizes)]
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, level_sizes=sizes))
        file = path / TOKENIZER_FILE
        tensors, columns = artifacts.load_tensors(file), json.loads(artifacts.load_metadata(file).get(_COLUMNS, "[]"))
        return cls.from_tensors(config, tensors, columns=tuple(columns), where=str(file))

    @classmethod
    def from_tensors(
        cls, config: TokenizerConfig, tensors: dict[str, np.ndarray], *, columns: tuple[str, ...], where: str
    ) -> SemanticTokenizer:
        """The tokenizer of `tensors()`, its config and columns. Raises SemidError naming `where` if they do not fit."""
        tensors = dict(tensors)
        standardizer = Standardizer(tensors.pop("standardizer/mean"), tensors.pop("standardizer/scale"))
        named = {name.removeprefix("model/"): value for name, value in tensors.items()}
        empty = _empty(config.method, dim=len(standardizer.mean))
        if isinstance(empty, RQVAE):
            graph, state = nnx.split(empty)
            return cls(config, standardizer, nnx.merge(graph, replace_leaves(state, named, where=where)), columns)
        return cls(config, standardizer, replace_leaves(empty, named, where=where), columns)


@jax.jit
def _encode(
    model: RQVAE | ResidualKMeans | ProductKMeans,
    mean: Float[Array, " dim"],
    scale: Float[Array, " dim"],
    vectors: Float[Array, "n dim"],
) -> Int[Array, "n level"]:
    codes = model.encode((vectors.astype(jnp.float32) - mean[None]) / scale[None])
    return jnp.where(jnp.isfinite(vectors).all(-1)[:, None], codes, -1)


def _train_rqvae(
    dataset: Dataset,
    x: Float[np.ndarray, "items dim"],
    config: TokenizerConfig,
    method: RQVaeConfig,
    *,
    seed: int,
    folder: Path,
    mesh: Mesh | None,
) -> RQVAE:
    """Initialize on all items and train, with what the alignments read of the users."""
    model = RQVAE(method, dim=x.shape[1], rngs=nnx.Rngs(seed))
    model.initialize(x, iterations=method.kmeans_iterations, seed=seed)
    signals = make_signals(dataset, config.alignment, config.signal, x, seed=seed)
    alignments = [make_alignment(one, method, dim=x.shape[1], signals=signals, seed=seed) for one in config.alignment]
    return train_autoencoder(
        AlignedRQVAE(model, alignments),
        x,
        method,
        signals=signals,
        request={"alignment": to_dict(config.alignment)},
        seed=seed,
        folder=folder,
        mesh=mesh,
    )


def _of_size(
    config: TokenizerConfig,
    standardizer: Standardizer,
    model: ResidualKMeans | ProductKMeans,
    columns: tuple[str, ...],
) -> SemanticTokenizer:
    """The tokenizer of a fitted model, whose codebooks may have come out smaller than was asked for."""
    method = dataclasses.replace(config.method, level_sizes=model.level_sizes)
    return SemanticTokenizer(dataclasses.replace(config, method=method), standardizer, model, columns)


def _shrunk(method: _Sized, *, items: int) -> _Sized:
    """`method` with no codebook larger than the number of items."""
    sizes = tuple(min(size, items) for size in method.level_sizes)
    if sizes != method.level_sizes:
        warnings.warn(f"{items} items cannot fill codebooks of {method.level_sizes} codes: made {sizes}", stacklevel=3)
    return dataclasses.replace(method, level_sizes=sizes)


def fit_kmeans(x: Float[np.ndarray, "items dim"], method: RQKmeansConfig, *, seed: int) -> ResidualKMeans:
    return ResidualKMeans.fit(
        jnp.asarray(x),
        level_sizes=method.level_sizes,
        iterations=method.iterations,
        cluster=balanced_kmeans if method.balanced else kmeans,
        key=jax.random.key(seed),
    )


def _fit_product(x: Float[np.ndarray, "items dim"], method: ProductConfig, *, seed: int) -> ProductKMeans:
    if x.shape[1] % len(method.level_sizes):
        raise SemidError(
            f"{len(method.level_sizes)} product codes cannot share {x.shape[1]} content dimensions equally; "
            "choose a number of level_sizes that divides them"
        )
    return ProductKMeans.fit(
        jnp.asarray(x),
        level_sizes=method.level_sizes,
        iterations=method.iterations,
        rotation_rounds=method.rotations,
        key=jax.random.key(seed),
    )


def _arrays(model: RQVAE | ResidualKMeans | ProductKMeans) -> Any:
    return nnx.state(model) if isinstance(model, RQVAE) else model


def _empty(method: Method, *, dim: int) -> RQVAE | ResidualKMeans | ProductKMeans:
    """A model of the right shapes, to be filled."""
    if isinstance(method, RQVaeConfig):
        return RQVAE(method, dim=dim, rngs=nnx.Rngs(0))
    if isinstance(method, RQKmeansConfig):
        return ResidualKMeans(tuple(jnp.zeros((size, dim)) for size in method.level_sizes))
    parts, codes = len(method.level_sizes), method.level_sizes[0]
    return ProductKMeans(jnp.zeros((parts, codes, dim // parts)), jnp.zeros((dim, dim)))
