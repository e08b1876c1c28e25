"""The RQ-VAE: MLP encoder, residual quantizer, MLP decoder, and the step that trains them, aligned or not."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from quantizers import (
    Distance,
    GradientPath,
    Gumbel,
    Nearest,
    OverusedGumbel,
    Quantized,
    ResidualCodes,
    ResidualQuantizer,
    Sinkhorn,
    balanced_kmeans,
    code_counts,
    diversity_loss,
    health,
    reseed_dead_codes,
    residual_codes,
    usage_entropy_loss,
)
from semid.config import to_dict
from semid.errors import SemidError
from semid.training import (
    OptimizerConfig,
    RunFolder,
    StepContext,
    Task,
    TrainingConfig,
    TrainState,
    edit_moments,
    edit_variables,
    train,
    with_variables,
)

# Items encoded at once: bounds memory, and compiles one shape.
BLOCK = 8192


def check_sizes(level_sizes: tuple[int, ...], *widths: int) -> None:
    """Raises SemidError unless there is a level, and every size is at least 1."""
    if not level_sizes or min(*level_sizes, *widths, 1) < 1:
        raise SemidError(f"expected at least one level, and sizes of at least 1, got {level_sizes} and {widths}")


def check_iterations(*iterations: int) -> None:
    """Raises SemidError for a negative number."""
    if min(iterations) < 0:
        raise SemidError(f"expected iterations of 0 or more, got {min(iterations)}")


@dataclass(frozen=True)
class RQVaeConfig:
    """Autoencoder with a residual quantizer in the middle (TIGER's tokenizer, arXiv 2305.05065)."""

    level_sizes: tuple[int, ...] = (256, 256, 256)
    """Codebook size of each level."""
    hidden: tuple[int, ...] = (512, 256, 128)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    latent: int = 32
    """Dimensions of the quantized vector."""
    assignments: tuple[Nearest | Sinkhorn | Gumbel | OverusedGumbel, ...] = (Nearest(),)
    """How codes are chosen in training, one for all levels or one a level; the catalogue's are the nearest."""
    path: GradientPath = GradientPath.STRAIGHT_THROUGH
    """How gradients pass the quantizer."""
    metric: Distance = Distance.EUCLIDEAN
    """What makes a code the nearest."""
    decay: float | None = None
    """Codebooks as moving averages of their inputs with this decay; none given: learned by gradient."""
    reconstruction: float = 1.0
    """Weight of the content's reconstruction; less of it leaves an alignment more of the codes."""
    commitment: float = 0.25
    """Weight of the commitment loss."""
    entropy: float = 0.0
    """Weight of the loss that spreads each batch over the codes (UniGRec: 1e-4)."""
    diversity: float = 0.0
    """Weight of the loss that spreads clusters of codes in space (LETTER: 1e-4)."""
    kmeans_iterations: int = 25
    """Lloyd iterations of the codebooks' initialization on all items; 0: random codebooks, which may collapse."""
    reseed: bool = True
    """Once an epoch, give codes that no item uses a random residual; without, codebooks may collapse."""
    training: TrainingConfig = TrainingConfig(
        epochs=50, batch_size=256, validate_every=10, optimizer=OptimizerConfig(learning_rate=1e-3)
    )

    def __post_init__(self) -> None:
        check_sizes(self.level_sizes, *self.hidden, self.latent)
        if len(self.assignments) not in (1, len(self.level_sizes)):
            raise SemidError(f"expected 1 or {len(self.level_sizes)} assignments, got {len(self.assignments)}")
        check_iterations(self.kmeans_iterations)
        if self.decay is not None and not 0 <= self.decay < 1:
            raise SemidError(f"expected decay in [0, 1), got {self.decay}; leave it out to learn codebooks by gradient")


class Pass(NamedTuple):
    """What the autoencoder makes of `x`: latents, what the search found for them, quantized and reconstructed."""

    x: Float[Array, "n dim"]
    latents: Float[Array, "n latent"]
    found: ResidualCodes
    quantized: Quantized
    reconstruction: Float[Array, "n dim"]


class RQVAE(nnx.Module):
    """MLP encoder, residual quantizer, MLP decoder; all vectors standardized."""

    def __init__(self, config: RQVaeConfig, *, dim: int, rngs: nnx.Rngs) -> None:
        widths = (dim, *config.hidden, config.latent)
        each = config.assignments if len(config.assignments) > 1 else config.assignments[0]
        self.encoder = _mlp(widths, rngs)
        self.quantizer = ResidualQuantizer(
            config.level_sizes,
            dim=config.latent,
            rngs=rngs,
            assignment=each,
            path=config.path,
            distance=config.metric,
            decay=config.decay,
        )
        self.decoder = _mlp(widths[::-1], rngs)
        # Cluster of each code, for the diversity loss.
        self.clusters = nnx.List([nnx.Variable(jnp.zeros(size, jnp.int32)) for size in config.level_sizes])

    def latents(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b latent"]:
        """What the quantizer is given."""
        return _through(self.encoder, x)

    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]:
        """Codes of standardized vectors."""
        return self.quantizer.encode(self.latents(x))

    def decode(self, codes: Int[Array, "*b level"]) -> Float[Array, "*b dim"]:
        """Standardized vectors reconstructed from codes."""
        return _through(self.decoder, self.quantizer.decode(codes))

    def __call__(
        self, x: Float[Array, "n dim"], *, key: PRNGKeyArray | None = None, progress: Float[Array, ""] | float = 1.0
    ) -> Pass:
        """One pass; `key` and `progress` are the assignment's (see ResidualQuantizer)."""
        latents = self.latents(x)
        found = self.quantizer.search(latents, key=key, progress=progress)
        quantized = self.quantizer.quantize_found(latents, found)
        return Pass(x, latents, found, quantized, _through(self.decoder, quantized.vectors))

    def initialize(self, x: Float[np.ndarray, "items dim"], *, iterations: int, seed: int) -> None:
        """Codebooks by residual k-means on the latents of all items; without iterations they stay random."""
        if not iterations:
            return
        latents = jnp.asarray(in_blocks(self.latents, x))
        self.quantizer.initialize(latents, iterations=iterations, key=jax.random.key(seed))


class Tables(NamedTuple):
    """What no step changes: standardized content of all items, and what the alignments read."""

    x: Float[Array, "items dim"]
    signals: Any


class Alignment(nnx.Module):
    """A loss that joins reconstruction and quantization in the same step, and what it trains along."""

    def __call__(
        self, model: RQVAE, rows: Int[Array, " n"], items: Pass, tables: Tables, context: StepContext
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The weighted loss for the items `rows`, which `model` passed as `items`, and metrics to log."""
        raise TypeError(f"{type(self).__name__} does not say how it aligns")


class AlignedRQVAE(nnx.Module):
    """An RQ-VAE and the alignments that are trained with it, and left behind."""

    def __init__(self, autoencoder: RQVAE, alignments: Sequence[Alignment]) -> None:
        self.autoencoder = autoencoder
        self.alignments = nnx.List(alignments)


class ItemRows(NamedTuple):
    """A tokenizer's batch: item rows, the vectors being gathered on the device."""

    rows: Int[Any, " n"]


def autoencoder_loss(model: RQVAE, config: RQVaeConfig, passed: Pass) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Reconstruction + codebook + commitment (TIGER, eq. 1-2), means over rows and dimensions, and codebook care."""
    reconstruction = jnp.mean(jnp.square(passed.reconstruction - passed.x))
    losses = passed.quantized.losses
    loss = config.reconstruction * reconstruction + config.commitment * losses.commitment
    if config.decay is None:
        loss += losses.codebook
    if config.entropy:
        loss += config.entropy * usage_entropy_loss(passed.found.probabilities)
    if config.diversity:
        levels = zip(model.quantizer.codebooks, model.clusters, strict=True)
        for level, (book, clusters) in enumerate(levels):
            loss += config.diversity * diversity_loss(book[...], clusters[...], codes=passed.found.codes[..., level])
    return loss, {"reconstruction": reconstruction, **losses._asdict()}


def joint_loss(
    model: AlignedRQVAE, batch: ItemRows, tables: Tables, context: StepContext, *, config: RQVaeConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The autoencoder's loss and all alignments', in one step."""
    search_key, *keys = jax.random.split(context.key, 1 + len(model.alignments))
    passed = model.autoencoder(tables.x[batch.rows], key=search_key, progress=context.progress)
    loss, metrics = autoencoder_loss(model.autoencoder, config, passed)
    for align, key in zip(model.alignments, keys, strict=True):
        term, found = align(model.autoencoder, batch.rows, passed, tables, context._replace(key=key))
        loss, metrics = loss + term, metrics | found
    model.autoencoder.quantizer.update_statistics(passed.found)
    return loss, metrics


def train_autoencoder(
    model: AlignedRQVAE,
    x: Float[np.ndarray, "items dim"],
    config: RQVaeConfig,
    *,
    signals: Any,
    request: dict[str, Any],
    seed: int,
    folder: Path,
    mesh: Mesh | None,
) -> RQVAE:
    """Train on all items from the initialized `model`, to the last step: no held-out score would choose another."""
    rows = ItemRows(np.arange(len(x), dtype=np.int32))
    tables = Tables(jnp.asarray(x), signals)
    if config.diversity:
        for book, clusters in zip(model.autoencoder.quantizer.codebooks, model.autoencoder.clusters, strict=True):
            clusters[...] = _code_clusters(book[...], seed=seed)

    def validate(candidate: AlignedRQVAE) -> dict[str, float]:
        codes = in_blocks(candidate.autoencoder.encode, x)
        reconstructed = in_blocks(candidate.autoencoder.decode, codes)
        levels = health(codes, config.level_sizes).levels
        usage = {f"usage/level_{level}": found.usage for level, found in enumerate(levels)}
        return {"explained": explained(x, reconstructed), **usage}

    task = Task(
        model,
        functools.partial(joint_loss, config=config),
        rows,
        tables=tables,
        validate=validate,
        hooks=lambda steps_per_epoch: [maintain_codebooks(model, tables.x, config, every=steps_per_epoch, seed=seed)],
    )
    owner = {**request, "config": to_dict(config), "seed": seed, "tables": _digest(tables)}
    run = RunFolder(folder, owner, title="training the tokenizer")
    return train(task, config.training, run=run, seed=seed, mesh=mesh).autoencoder


def reseeding(
    model: Any, config: RQVaeConfig, *, seed: int
) -> Callable[[TrainState, Float[Array, "items dim"]], TrainState]:
    """A function from the state of a model with an `autoencoder`, and all items' vectors, to a state in which dead
    codes have taken a random residual, their optimizer moments starting anew."""

    @jax.jit
    def reseed(state: TrainState, x: Float[Array, "items dim"]) -> TrainState:
        current = with_variables(model, state.params, state.rest).autoencoder
        books = tuple(book[...] for book in current.quantizer.codebooks)
        latents = jax.lax.map(current.latents, x, batch_size=BLOCK)
        found = residual_codes(latents, books, distance=config.metric)
        counts = code_counts(found.codes, level_sizes=current.quantizer.level_sizes)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        fresh = reseed_dead_codes(books, counts, residuals=found.residuals, key=key)

        def replace(current: Any) -> None:
            for book, vectors in zip(current.autoencoder.quantizer.codebooks, fresh.codebooks, strict=True):
                book[...] = vectors

        def forget(moments: Any) -> None:
            levels = zip(moments.autoencoder.quantizer.codebooks, fresh.codebooks, fresh.replaced, strict=True)
            for moment, book, dead in levels:
                if np.shape(moment.get_value()) == book.shape:  # an optimizer may keep less: factors, or nothing
                    moment[...] = jnp.where(dead[:, None], 0, moment[...])

        return edit_variables(model, edit_moments(model, state, forget), replace)

    return reseed


def maintain_codebooks(
    model: AlignedRQVAE, x: Float[Array, "items dim"], config: RQVaeConfig, *, every: int, seed: int
) -> Callable[[int, TrainState, dict[str, Any]], TrainState]:
    """A hook that every `every` steps re-seeds dead codes, and clusters codes again for the diversity loss."""
    reseed = reseeding(model, config, seed=seed)

    def cluster(state: TrainState) -> TrainState:
        def refresh(current: AlignedRQVAE) -> None:
            autoencoder = current.autoencoder
            for book, clusters in zip(autoencoder.quantizer.codebooks, autoencoder.clusters, strict=True):
                clusters[...] = jax.device_put(_code_clusters(book[...], seed=seed), clusters[...].sharding)

        return edit_variables(model, state, refresh)

    def hook(at: int, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        if at % every == 0 and config.reseed:
            state = reseed(state, x)
        return cluster(state) if at % every == 0 and config.diversity else state

    return hook


def explained(x: Float[np.ndarray, "n dim"], reconstructed: Float[np.ndarray, "n dim"]) -> float:
    """1 - MSE / variance; `x` is standardized."""
    return float(1 - np.mean(np.square(reconstructed - x)) / max(np.mean(np.square(x)), 1e-12))


def in_blocks(function: Callable[[Array], Array], x: Array | np.ndarray) -> np.ndarray:
    """`function`, which works row by row, over all rows of `x`, a block at a time, on the host.

    A short block is padded to a power of two, so that few shapes are compiled.
    """
    blocks = [x[at : at + BLOCK] for at in range(0, len(x), BLOCK)]
    sizes = [min(1 << (len(block) - 1).bit_length(), BLOCK) for block in blocks]
    made = (function(jnp.asarray(padded(block, rows=size))) for block, size in zip(blocks, sizes, strict=True))
    return np.concatenate([np.asarray(out)[: len(block)] for out, block in zip(made, blocks, strict=True)])


def padded(x: Array | np.ndarray, *, rows: int) -> Array | np.ndarray:
    """`x` with rows of zeros behind it, `rows` in all."""
    if len(x) == rows:
        return x
    full = np.zeros((rows, *x.shape[1:]), x.dtype)
    full[: len(x)] = x
    return full


def _code_clusters(codebook: Float[Array, "codes dim"], *, seed: int) -> Int[Array, " codes"]:
    """LETTER's balanced clusters of codes: 10, or fewer where a cluster would have no two codes."""
    clusters = max(min(10, len(codebook) // 2), 1)
    alone = jnp.asarray(np.asarray(codebook))  # not of a mesh, whose other processes would have to take part
    return balanced_kmeans(alone, num_codes=clusters, iterations=10, key=jax.random.key(seed)).assignments


def _digest(tree: Any) -> str:
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def _mlp(widths: tuple[int, ...], rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])


def _through(layers: nnx.List, x: Float[Array, "*b dim"]) -> Float[Array, "*b out"]:
    for layer in layers[:-1]:
        x = jax.nn.relu(layer(x))
    return layers[-1](x)
