"""The RQ-VAE: an autoencoder trained with its residual quantizer, with or without alignments."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from quantizers import Distance, balanced_kmeans, code_counts, health, reseed_dead_codes, residual_codes, unit_vectors
from semid.catalog import Residuals
from semid.config import check_range, to_dict
from semid.errors import SemidError
from semid.tokenizers.alignment import Alignment, read_signals
from semid.tokenizers.autoencoder import RQVAE, AutoencoderConfig, Tables, autoencoder_loss
from semid.tokenizers.blocks import BLOCK, map_blocks
from semid.tokenizers.method import (
    FitContext,
    TokenizerMethod,
    explained_variance,
    last_residuals,
    shrunk_to,
)
from semid.training import (
    OptimizerConfig,
    RunFolder,
    StepContext,
    Task,
    TrainingConfig,
    TrainState,
    bound_loss,
    edit_moments,
    edit_variables,
    train,
    with_variables,
)


@dataclass(frozen=True)
class RQVaeConfig(AutoencoderConfig, TokenizerMethod):
    """Autoencoder with a residual quantizer in the middle (TIGER's tokenizer, arXiv 2305.05065)."""

    reseed: bool = True
    """After each epoch but the last, set codes that no item uses to random residuals; else codebooks may collapse."""
    training: TrainingConfig = TrainingConfig(
        epochs=50, batch_size=256, validate_every=10, optimizer=OptimizerConfig(learning_rate=1e-3)
    )
    name = "rq-vae"
    is_residual = True
    can_align = True

    def __post_init__(self) -> None:
        check_range(self, "level_sizes", "hidden", "latent", at_least=1)
        if len(self.assignments) not in (1, self.num_levels):
            raise SemidError(f"expected 1 or {self.num_levels} assignments, got {len(self.assignments)}")
        check_range(self, "kmeans_iterations", at_least=0)
        check_range(self, "reconstruction", "commitment", "entropy", "diversity", at_least=0)
        check_range(self, "decay", at_least=0, below=1)
        if self.decay is not None and self.diversity:
            raise SemidError(
                "diversity is a loss of codebooks learned by gradient, and with decay they are moving averages; "
                "leave one of the two out"
            )

    def fit(self, x: Float[np.ndarray, "items dim"], context: FitContext) -> RQVAE:
        """Initialize on all items and train, with alignments if there are any."""
        config, seed, dim = shrunk_to(len(x), self), context.seed, x.shape[1]
        model = RQVAE(config, dim=dim, rngs=nnx.Rngs(seed))
        model.initialize(x, iterations=config.kmeans_iterations, seed=seed)
        drawn = context.co_consumption
        signals = read_signals(context.dataset, context.alignment, context.signal, x, seed=seed, co_consumption=drawn)
        alignments = [one.build(config, dim=dim, signals=signals, seed=seed) for one in context.alignment]
        return train_autoencoder(
            AlignedRQVAE(model, alignments),
            x,
            config,
            signals=signals,
            request={"alignment": to_dict(tuple(context.alignment))},
            seed=seed,
            folder=context.folder,
            mesh=context.mesh,
        )

    def build(self, dim: int) -> RQVAE:
        return RQVAE(self, dim=dim, rngs=nnx.Rngs(0))

    def last_residuals(self, model: Any, x: Float[np.ndarray, "n dim"], codes: Int[np.ndarray, "n level"]) -> Residuals:
        residuals = last_residuals(model.quantizer, map_blocks(model.exact_latents, x), codes)
        if self.metric is not Distance.COSINE:
            return residuals
        return Residuals(*(np.asarray(unit_vectors(vectors)) for vectors in residuals))


class AlignedRQVAE(nnx.Module):
    """An RQ-VAE with the alignments of its training, which are dropped afterwards."""

    def __init__(self, autoencoder: RQVAE, alignments: Sequence[Alignment]) -> None:
        self.autoencoder = autoencoder
        self.alignments = nnx.List(alignments)


class ItemRows(NamedTuple):
    """A batch of item rows; vectors are gathered on the device."""

    rows: Int[Any, " n"]


def joint_loss(
    model: AlignedRQVAE, batch: ItemRows, tables: Tables, context: StepContext, *, config: RQVaeConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Sum of the losses of autoencoder and alignments."""
    search_key, *keys = jax.random.split(context.key, 1 + len(model.alignments))
    passed = model.autoencoder(tables.x[batch.rows], key=search_key, progress=context.progress)
    loss, metrics = autoencoder_loss(model.autoencoder, config, passed)
    for align, key in zip(model.alignments, keys, strict=True):
        term, logged = align(model.autoencoder, batch.rows, passed, tables, context._replace(key=key))
        loss, metrics = loss + term, metrics | logged
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
    inputs: str | None = None,
) -> RQVAE:
    """Train an initialized `model` on all items to the last step, as there is no held-out score to stop by.

    Checkpoints are identified by `inputs`, a digest of what `x` and `signals` were computed from, so that a machine on
    which their last bits differ can resume; None: by a digest of the arrays.
    """
    rows = ItemRows(np.arange(len(x), dtype=np.int32))
    tables = Tables(jnp.asarray(x), signals)
    if config.diversity:
        for book, clusters in zip(model.autoencoder.quantizer.codebooks, model.autoencoder.clusters, strict=True):
            clusters[...] = _code_clusters(book[...], seed=seed)

    def validate(candidate: AlignedRQVAE) -> dict[str, float]:
        codes = map_blocks(candidate.autoencoder.encode, x)
        reconstructed = map_blocks(candidate.autoencoder.decode, codes)
        levels = health(codes, config.level_sizes).levels
        usage = {f"usage/level_{level}": found.usage for level, found in enumerate(levels)}
        return {"explained": explained_variance(x, reconstructed), **usage}

    task = Task(
        model,
        bound_loss(joint_loss, config=config),
        rows,
        tables=tables,
        validate=validate,
        hooks=lambda steps_per_epoch: [maintain_codebooks(model, tables.x, config, every=steps_per_epoch, seed=seed)],
    )
    owner = {**request, "config": to_dict(config), "seed": seed, "tables": inputs or _digest(tables)}
    run = RunFolder(folder, owner, title="training the tokenizer")
    return train(task, config.training, run=run, seed=seed, mesh=mesh).autoencoder


def reseeding(
    model: Any, config: RQVaeConfig, *, seed: int
) -> Callable[[TrainState, Float[Array, "items dim"]], TrainState]:
    """A function of a train state and all items' vectors that re-seeds dead codes of the model's `autoencoder`.

    A dead code becomes a random residual, and its optimizer moments zero.
    """

    @jax.jit
    def reseed(state: TrainState, x: Float[Array, "items dim"]) -> TrainState:
        current = with_variables(model, state.params, state.rest).autoencoder
        books = tuple(book[...] for book in current.quantizer.codebooks)

        def search(row: Float[Array, " dim"]) -> tuple[Int[Array, " level"], Float[Array, "level latent"]]:
            return residual_codes(current.exact_latents(row), books, distance=config.metric)[:2]

        codes, residuals = jax.lax.map(search, x, batch_size=BLOCK)  # no table of all items' distances
        counts = code_counts(codes, level_sizes=current.quantizer.level_sizes)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        fresh = reseed_dead_codes(books, counts, residuals=residuals, key=key)

        def replace(current: Any) -> None:
            for book, vectors in zip(current.autoencoder.quantizer.codebooks, fresh.codebooks, strict=True):
                book[...] = vectors

        def reset(moments: Any) -> None:
            levels = zip(moments.autoencoder.quantizer.codebooks, fresh.codebooks, fresh.replaced, strict=True)
            for moment, book, dead in levels:
                if np.shape(moment.get_value()) == book.shape:  # some optimizers keep factors, or nothing
                    moment[...] = jnp.where(dead[:, None], 0, moment[...])

        return edit_variables(model, edit_moments(model, state, reset), replace)

    return reseed


def maintain_codebooks(
    model: AlignedRQVAE, x: Float[Array, "items dim"], config: RQVaeConfig, *, every: int, seed: int
) -> Callable[[int, TrainState, dict[str, Any]], TrainState]:
    """A hook that, after each epoch of `every` steps, re-seeds dead codes and clusters codes for the diversity loss.

    None is re-seeded at the last step: nothing would train it.
    """
    reseed, last = reseeding(model, config, seed=seed), round(config.training.num_epochs * every)

    def cluster(state: TrainState) -> TrainState:
        def refresh(current: AlignedRQVAE) -> None:
            autoencoder = current.autoencoder
            for book, clusters in zip(autoencoder.quantizer.codebooks, autoencoder.clusters, strict=True):
                clusters[...] = jax.device_put(_code_clusters(book[...], seed=seed), clusters[...].sharding)

        return edit_variables(model, state, refresh)

    def hook(at: int, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        if at % every == 0 and at < last and config.reseed:
            state = reseed(state, x)
        return cluster(state) if at % every == 0 and config.diversity else state

    return hook


def _code_clusters(codebook: Float[Array, "codes dim"], *, seed: int) -> Int[Array, " codes"]:
    """LETTER's balanced clusters of codes: 10, or fewer so that each has two codes."""
    clusters = max(min(10, len(codebook) // 2), 1)
    local = jnp.asarray(np.asarray(codebook))  # off the mesh, whose other processes would have to take part
    return balanced_kmeans(local, num_codes=clusters, iterations=10, key=jax.random.key(seed)).assignments


def _digest(tree: Any) -> str:
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()
