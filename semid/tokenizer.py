"""`SemanticTokenizer`: content vectors to codes; and `tokenize`, which makes a dataset's catalogue."""

from __future__ import annotations

import functools
import hashlib
import itertools
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from quantizers import (
    Quantized,
    ResidualKMeans,
    ResidualQuantizer,
    code_counts,
    health,
    reseed_dead_codes,
    residual_codes,
    tie_break,
)
from semid import artifacts
from semid.artifacts import Manifest
from semid.catalog import FILE as CATALOG_FILE
from semid.catalog import SemanticCatalog
from semid.config import from_dict, to_dict
from semid.data.batches import batches
from semid.data.dataset import Dataset
from semid.data.features import Standardizer, content_blocks
from semid.errors import SemidError
from semid.training import (
    OptimizerConfig,
    TrainingConfig,
    TrainState,
    discard_checkpoints,
    fitting_batch,
    make_mesh,
    named_leaves,
    replace_leaves,
    train,
    with_params,
)
from semid.training.tracking import HISTORY

KIND = "catalog"
# Items encoded at once: bounds memory, and compiles one shape.
_BLOCK = 8192


def _check_sizes(level_sizes: tuple[int, ...], *widths: int) -> None:
    if not level_sizes or min(*level_sizes, *widths, 1) < 1:
        raise SemidError(f"expected at least one level, and sizes of at least 1, got {level_sizes} and {widths}")


@dataclass(frozen=True)
class RQVaeConfig:
    """Autoencoder with a residual quantizer in the middle (TIGER's tokenizer, arXiv 2305.05065)."""

    level_sizes: tuple[int, ...] = (256, 256, 256)
    """Codebook size of each level."""
    hidden: tuple[int, ...] = (512, 256, 128)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    latent: int = 32
    """Dimensions of the quantized vector."""
    commitment: float = 0.25
    """Weight of the commitment loss."""
    kmeans_iterations: int = 25
    """Lloyd iterations of the codebooks' initialization on all items."""
    training: TrainingConfig = TrainingConfig(
        epochs=100, batch_size=1024, validate_every=10, optimizer=OptimizerConfig(learning_rate=1e-3)
    )

    def __post_init__(self) -> None:
        _check_sizes(self.level_sizes, *self.hidden, self.latent)


@dataclass(frozen=True)
class RQKmeansConfig:
    """Residual k-means on the content vectors: no training, nearly the same quality."""

    level_sizes: tuple[int, ...] = (256, 256, 256)
    """Codebook size of each level."""
    iterations: int = 25
    """Lloyd iterations a level."""

    def __post_init__(self) -> None:
        _check_sizes(self.level_sizes)


@dataclass(frozen=True)
class TokenizerConfig:
    """How content becomes codes."""

    method: RQVaeConfig | RQKmeansConfig = RQVaeConfig()
    """RQ-VAE, or its training-free sibling."""
    columns: tuple[str, ...] | None = None
    """Vector columns to tokenize; none given: all of the dataset's."""


class RQVAE(nnx.Module):
    """MLP encoder, residual quantizer, MLP decoder."""

    def __init__(self, config: RQVaeConfig, *, dim: int, rngs: nnx.Rngs) -> None:
        widths = (dim, *config.hidden, config.latent)
        self.encoder = _mlp(widths, rngs)
        self.quantizer = ResidualQuantizer(config.level_sizes, dim=config.latent, rngs=rngs)
        self.decoder = _mlp(widths[::-1], rngs)

    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]:
        """Codes of standardized vectors."""
        return self.quantizer.encode(_through(self.encoder, x))

    def decode(self, codes: Int[Array, "*b level"]) -> Float[Array, "*b dim"]:
        """Standardized vectors reconstructed from codes."""
        return _through(self.decoder, self.quantizer.decode(codes))

    def __call__(self, x: Float[Array, "*b dim"]) -> tuple[Float[Array, "*b dim"], Quantized]:
        """Reconstruction of `x`, and how its latent was quantized."""
        quantized = self.quantizer(_through(self.encoder, x))
        return _through(self.decoder, quantized.vectors), quantized


class _ItemRows(NamedTuple):
    """A tokenizer's batch: item rows, the vectors being gathered on the device."""

    rows: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class SemanticTokenizer:
    """Frozen inputs' statistics and a fitted quantizer: encodes any vectors of the columns it was fitted to."""

    config: TokenizerConfig
    standardizer: Standardizer
    model: RQVAE | ResidualKMeans

    @classmethod
    def fit(
        cls, dataset: Dataset, config: TokenizerConfig, *, seed: int, folder: Path, mesh: Mesh | None = None
    ) -> SemanticTokenizer:
        """Fit to all of the dataset's items. Checkpoints and `history.jsonl` of a trained method go to `folder`."""
        if config.columns == ():
            raise SemidError("no column was chosen; name some after --columns, or leave it out to take all")
        blocks = content_blocks(dataset, config.columns)
        if not blocks:
            raise SemidError(
                f"dataset {dataset.name!r} has no vector columns to tokenize; add one, or make text vectors with "
                "semid.encoders.text.with_text_vectors(dataset)"
            )
        standardizer = Standardizer.fit(blocks)
        x = jnp.asarray(standardizer(np.concatenate(blocks, axis=1)))
        if not np.any(x):
            raise SemidError(f"dataset {dataset.name!r}: all items have the same vector; nothing tells them apart")
        method, key = config.method, jax.random.key(seed)
        if isinstance(method, RQKmeansConfig):
            fitted = ResidualKMeans.fit(x, level_sizes=method.level_sizes, iterations=method.iterations, key=key)
            return cls(config, standardizer, fitted)
        model = RQVAE(method, dim=x.shape[1], rngs=nnx.Rngs(seed))
        latents = _blocks(functools.partial(_through, model.encoder), x)
        model.quantizer.initialize(jnp.asarray(latents), iterations=method.kmeans_iterations, key=key)
        return cls(config, standardizer, _trained(model, x, method, seed=seed, folder=folder, mesh=mesh))

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Codebook size of each level."""
        return self.config.method.level_sizes

    def encode(self, vectors: Float[np.ndarray, "n dim"]) -> Int[np.ndarray, "n level"]:
        """Codes of raw content vectors (the fitted columns side by side). Raises SemidError for another width."""
        return _blocks(self.model.encode, jnp.asarray(self.standardizer(vectors)))

    def explained(self, vectors: Float[np.ndarray, "n dim"]) -> float:
        """Share of the standardized vectors' variance that their codes reconstruct (1 - MSE / variance)."""
        x = self.standardizer(vectors)
        reconstructed = _blocks(self.model.decode, jnp.asarray(self.encode(vectors)))
        return _explained(x, reconstructed)

    def write(self, folder: Path) -> None:
        """Write `tokenizer.safetensors` into an artifact under construction."""
        named = {f"standardizer/{name}": value for name, value in asdict(self.standardizer).items()}
        named |= {f"model/{name}": value for name, value in jax.device_get(named_leaves(self._parameters())).items()}
        artifacts.save_tensors(folder / "tokenizer.safetensors", named)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SemanticTokenizer:
        """Load the tokenizer of a catalogue artifact, every file verified."""
        path = Path(path)
        made = artifacts.read_artifact(path, KIND).config
        if "tokenizer" not in made:
            raise SemidError(f"{path}: its codes were imported, there is no tokenizer; encode with what made them")
        config = from_dict(TokenizerConfig, made["tokenizer"], where=str(path))
        file = path / "tokenizer.safetensors"
        tensors = artifacts.load_tensors(file)
        standardizer = Standardizer(tensors.pop("standardizer/mean"), tensors.pop("standardizer/scale"))
        named = {name.removeprefix("model/"): value for name, value in tensors.items()}
        if isinstance(config.method, RQKmeansConfig):
            codebooks = [jnp.asarray(named[str(level)]) for level in range(len(config.method.level_sizes))]
            return cls(config, standardizer, ResidualKMeans(tuple(codebooks)))
        model = RQVAE(config.method, dim=len(standardizer.mean), rngs=nnx.Rngs(0))
        params = replace_leaves(nnx.state(model, nnx.Param), named, where=str(file))
        return cls(config, standardizer, with_params(model, params))

    def _parameters(self) -> Any:
        return self.model.codebooks if isinstance(self.model, ResidualKMeans) else nnx.state(self.model, nnx.Param)


def tokenize(
    dataset: Dataset, config: TokenizerConfig, *, out: Path, parents: dict[str, Manifest], seed: int = 0
) -> SemanticCatalog:
    """Fit a tokenizer, encode every item, tell colliding items apart, and write the catalogue artifact `out`.

    It holds `catalog.parquet`, `tokenizer.safetensors`, `health.json` and, if it was trained, `history.jsonl`. Where
    the same request was answered before, that catalogue is read and nothing is done.
    """
    settings, folder = {"tokenizer": to_dict(config)}, out.with_name(f"{out.name}.checkpoints")
    trained = isinstance(config.method, RQVaeConfig)
    if artifacts.is_current(out, kind=KIND, config=settings, parents=parents, seed=seed):
        if trained:  # a kill may have come between the artifact and this
            discard_checkpoints(folder)
        return SemanticCatalog.read(out / CATALOG_FILE)
    tokenizer = SemanticTokenizer.fit(dataset, config, seed=seed, folder=folder)
    vectors = np.concatenate(content_blocks(dataset, config.columns), axis=1)
    codes = tokenizer.encode(vectors)
    broken = tie_break(codes)
    sizes = (*tokenizer.level_sizes, broken.level_size)
    catalog = SemanticCatalog(dataset.item_ids, broken.codes.astype(np.int32), sizes, tie_break=True)
    with artifacts.write_artifact(out, kind=KIND, config=settings, parents=parents, seed=seed) as temporary:
        catalog.write(temporary / CATALOG_FILE)
        tokenizer.write(temporary)
        report = _health(codes, catalog, tokenizer.explained(vectors))
        artifacts.write_json(temporary / "health.json", report)
        if trained:
            shutil.copy(folder / HISTORY, temporary / HISTORY)
    if trained:
        discard_checkpoints(folder)
    return catalog


def _health(codes: Int[np.ndarray, "items level"], catalog: SemanticCatalog, explained: float) -> dict[str, Any]:
    """Health per level and of collisions, before and after they are resolved, as `health.json` holds it."""
    before = health(codes, catalog.level_sizes[:-1])
    after = health(catalog.codes, catalog.level_sizes)
    counts = code_counts(jnp.asarray(catalog.codes), level_sizes=catalog.level_sizes)
    levels = [
        {"level": level, **asdict(of_level), "used": of_level.size - of_level.dead, "counts": counts[level].tolist()}
        for level, of_level in enumerate(after.levels)
    ]
    return {
        "items": before.items,
        "levels": levels,
        "collision_rate_before": before.collision_rate,
        "largest_group_before": before.largest_group,
        "collision_rate_after": after.collision_rate,
        "explained_variance": explained,
    }


def _trained(
    model: RQVAE, x: Float[Array, "items dim"], config: RQVaeConfig, *, seed: int, folder: Path, mesh: Mesh | None
) -> RQVAE:
    rows = _ItemRows(np.arange(len(x), dtype=np.int32))
    mesh = make_mesh() if mesh is None else mesh
    size = fitting_batch(config.training.batch_size, rows=len(x), mesh=mesh)
    steps_per_epoch, process = -(-len(x) // size), (jax.process_index(), jax.process_count())
    variance = np.asarray(x)

    def validate(candidate: RQVAE) -> dict[str, float]:
        codes = _blocks(candidate.encode, x)
        explained = _explained(variance, _blocks(candidate.decode, jnp.asarray(codes)))
        levels = health(codes, config.level_sizes).levels
        return {"explained": explained} | {f"usage/level_{level}": found.usage for level, found in enumerate(levels)}

    return train(
        model,
        functools.partial(_loss, commitment=config.commitment),
        lambda num_steps: batches(rows, batch_size=size, num_batches=num_steps, seed=seed, process=process),
        tables=x,
        config=config.training,
        steps_per_epoch=steps_per_epoch,
        seed=seed,
        folder=folder,
        request={"config": to_dict(config), "seed": seed, "vectors": hashlib.sha256(variance.tobytes()).hexdigest()},
        title="training the tokenizer",
        validate=validate,
        select="explained",
        care=[_reseed_hook(model, x, every=steps_per_epoch, seed=seed)],
        mesh=mesh,
    )


def _loss(
    model: RQVAE, batch: _ItemRows, x: Float[Array, "items dim"], key: Array, *, commitment: float
) -> tuple[Array, dict[str, Array]]:
    """Reconstruction + codebook + commitment (TIGER, eq. 1-2), means over items and dimensions."""
    target = x[batch.rows]
    reconstructed, quantized = model(target)
    reconstruction = jnp.mean(jnp.square(reconstructed - target))
    loss = reconstruction + quantized.losses.codebook + commitment * quantized.losses.commitment
    terms = {"reconstruction": reconstruction, "codebook": quantized.losses.codebook}
    return loss, {**terms, "commitment": quantized.losses.commitment}


def _reseed_hook(model: RQVAE, x: Float[Array, "items dim"], *, every: int, seed: int) -> Any:
    """Once an epoch, codes that no item uses take a random residual, and their optimizer moments start anew."""

    @jax.jit
    def reseed(state: TrainState, x: Float[Array, "items dim"]) -> TrainState:
        current = with_params(model, state.params)
        books = tuple(book[...] for book in current.quantizer.codebooks)
        found = residual_codes(_through(current.encoder, x), books)
        counts = code_counts(found.codes, level_sizes=current.quantizer.level_sizes)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        fresh = reseed_dead_codes(books, counts, residuals=found.residuals, key=key)
        leaves = named_leaves(state)
        for level, dead in enumerate(fresh.replaced):
            for name, leaf in leaves.items():
                if name.endswith(f"quantizer/codebooks/{level}"):
                    replaced = fresh.codebooks[level] if name.startswith("params/") else jnp.zeros_like(leaf)
                    leaves[name] = jnp.where(dead[:, None], replaced, leaf)
        return replace_leaves(state, leaves, where="re-seeding")

    def hook(at: int, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        return reseed(state, x) if at % every == 0 else state

    return hook


def _mlp(widths: tuple[int, ...], rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])


def _through(layers: nnx.List, x: Float[Array, "*b dim"]) -> Float[Array, "*b out"]:
    for layer in layers[:-1]:
        x = jax.nn.relu(layer(x))
    return layers[-1](x)


def _blocks(function: Any, x: Array) -> np.ndarray:
    """`function` over the rows of `x`, a block at a time, on the host."""
    return np.concatenate([np.asarray(function(x[at : at + _BLOCK])) for at in range(0, len(x), _BLOCK)])


def _explained(x: Float[np.ndarray, "n dim"], reconstructed: Float[np.ndarray, "n dim"]) -> float:
    return float(1 - np.square(x - reconstructed).mean() / np.square(x).mean())
