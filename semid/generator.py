"""Training a `seq_models` model on a dataset and its catalogue: what a step learns, how a run is validated."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from semid import artifacts
from semid.artifacts import Manifest
from semid.catalog import SemanticCatalog
from semid.config import to_dict
from semid.data.batches import PackedRows, batches, pack
from semid.data.dataset import Dataset
from semid.data.features import Standardizer, content_blocks
from semid.data.splits import Examples
from semid.errors import SemidError
from semid.evaluation.metrics import accuracy, group_ids, item_places
from semid.recommender import KIND, ItemTables, ModelConfig, ModelSpec, Recommender, build_model, inputs_at
from semid.training import (
    OptimizerConfig,
    StepContext,
    TrainingConfig,
    discard_checkpoints,
    fitting_batch,
    make_mesh,
    train,
)
from semid.training.loop import Validate
from semid.training.tracking import HISTORY
from seq_models import DenseConfig, DenseTransformer, RQTransformer, RQTransformerConfig
from seq_models.losses import softmax_cross_entropy


@dataclass(frozen=True)
class GeneratorConfig:
    """Which model learns from what, and how it is chosen."""

    model: ModelConfig = RQTransformerConfig()
    """RQTransformerConfig (semantic IDs) or DenseConfig (SASRec with full-softmax cross-entropy)."""
    features: tuple[str, ...] | None = None
    """Vector columns that the model reads beside the codes; none given: all of them; empty: none."""
    max_history: int = 20
    """Items of a history that the model sees, the latest."""
    row_length: int = 32
    """Positions of a packed training row."""
    training: TrainingConfig = TrainingConfig(epochs=36, optimizer=OptimizerConfig(learning_rate=3e-3))
    validation_users: int = 2048
    """Validation examples, drawn by the seed, on which NDCG@10 selects the model."""
    validation_beam: int = 20
    """Beam size in validation."""

    def __post_init__(self) -> None:
        for name in ("max_history", "row_length", "validation_users", "validation_beam"):
            if getattr(self, name) < 1:
                raise SemidError(f"expected {name} of at least 1, got {getattr(self, name)}")


def train_generator(
    dataset: Dataset,
    catalog: SemanticCatalog,
    config: GeneratorConfig,
    *,
    out: Path,
    parents: dict[str, Manifest],
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Recommender:
    """Train on the dataset's training histories and write the model artifact `out`.

    Checkpoints live beside it in `<out>.checkpoints` until it is written; an interrupted run of the same request goes
    on from there, and one that was finished is read and not repeated. Raises SemidError if catalogue and dataset have
    other items, or `out` is in use.
    """
    settings, folder = {"generator": to_dict(config)}, out.with_name(f"{out.name}.checkpoints")
    if artifacts.is_current(out, kind=KIND, config=settings, parents=parents, seed=seed):
        discard_checkpoints(folder)  # a kill may have come between the artifact and this
        return Recommender.from_pretrained(out)
    if not catalog.item_ids.equals(dataset.item_ids):
        raise SemidError(
            f"the catalogue's {len(catalog)} items are not the dataset's {dataset.num_items} in the same order; "
            "tokenize this dataset"
        )
    features = content_features(dataset, config.features)
    spec = ModelSpec(
        model=config.model,
        level_sizes=catalog.level_sizes,
        num_items=len(catalog),
        num_features=0 if features is None else features.shape[1],
        max_history=config.max_history,
    )
    packed = pack(dataset.splits.train, max_history=config.max_history, row_length=config.row_length)
    model = build_model(spec, seed=seed)
    untrained = Recommender(model, catalog, spec=spec, features=features, train_counts=training_counts(dataset))
    mesh = make_mesh() if mesh is None else mesh
    size = fitting_batch(config.training.batch_size, rows=len(packed.history), mesh=mesh)
    process = (jax.process_index(), jax.process_count())
    trained = train(
        model,
        dense_loss if isinstance(config.model, DenseConfig) else code_loss,
        lambda num_steps: batches(packed, batch_size=size, num_batches=num_steps, seed=seed, process=process),
        tables=ItemTables(jnp.asarray(catalog.codes), None if features is None else jnp.asarray(features)),
        config=config.training,
        steps_per_epoch=-(-len(packed.history) // size),
        seed=seed,
        folder=folder,
        request={"config": settings, "seed": seed, "parents": {name: p.digest for name, p in parents.items()}},
        title=f"training {out.name}",
        validate=_validation(untrained, dataset, config, seed),
        select="ndcg@10",
        mesh=mesh,
    )
    recommender = untrained.with_model(trained)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    with artifacts.write_artifact(out, kind=KIND, config=settings, parents=parents, seed=seed, devices=devices) as tmp:
        recommender.write(tmp)
        shutil.copy(folder / HISTORY, tmp / HISTORY)
    discard_checkpoints(folder)
    return recommender


def code_loss(
    model: RQTransformer, batch: PackedRows, tables: ItemTables, context: StepContext
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the next item's codes given the codes before, summed over levels, in nats per item."""
    backbone_key, depth_key = jax.random.split(context.key)
    states = model.states(inputs_at(tables, batch.history), batch.segments, key=backbone_key)
    real = (batch.segments.reshape(-1) != 0).astype(states.dtype)
    codes = tables.codes[batch.targets.reshape(-1)]
    logits = model.logits(states.reshape(-1, states.shape[-1]), codes, key=depth_key)
    levels = [_mean_cross_entropy(of_level, codes[:, level], real) for level, of_level in enumerate(logits)]
    return sum(levels, jnp.zeros(())), {f"loss/level_{level}": value for level, value in enumerate(levels)}


def dense_loss(
    model: DenseTransformer, batch: PackedRows, tables: ItemTables, context: StepContext
) -> tuple[Array, dict[str, Array]]:
    """Full-softmax cross-entropy of the next item, in nats per item."""
    vectors = model.vectors(tables.features)
    states = model.states(vectors, batch.history, batch.segments, key=context.key)
    real = (batch.segments.reshape(-1) != 0).astype(states.dtype)
    total = softmax_cross_entropy(states.reshape(-1, states.shape[-1]), vectors, batch.targets.reshape(-1), real)
    return total / jnp.maximum(jnp.sum(real), 1), {}


def _mean_cross_entropy(logits: Float[Array, "n size"], codes: Int[Array, " n"], real: Array) -> Float[Array, ""]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, codes)
    return jnp.sum(losses * real) / jnp.maximum(jnp.sum(real), 1)


def content_features(dataset: Dataset, columns: tuple[str, ...] | None) -> Float[np.ndarray, "items feature"] | None:
    """The named vector columns (None: all) side by side and standardized; None where there are none."""
    blocks = content_blocks(dataset, columns)
    return Standardizer.fit(blocks)(np.concatenate(blocks, axis=1)) if blocks else None


def training_counts(dataset: Dataset) -> Int[np.ndarray, " items"]:
    """How often each item occurs in the training histories."""
    return dataset.splits.train.popularity(dataset.num_items).astype(np.int32)


def _validation(untrained: Recommender, dataset: Dataset, config: GeneratorConfig, seed: int) -> Validate:
    """A function from a model to its Recall@10 and NDCG@10 on a fixed sample of the validation split."""
    examples: Examples = dataset.splits.examples("validation")
    if len(examples) > config.validation_users:
        examples = examples.take(np.random.default_rng(seed).permutation(len(examples))[: config.validation_users])

    groups = np.arange(dataset.num_items) if untrained.codes is None else group_ids(untrained.codes)

    def validate(model: Any) -> dict[str, float]:
        recommender = untrained.with_model(model)
        ranked = recommender.rank(examples.histories, k=10, exclude_seen=False, beam_size=config.validation_beam)
        values = accuracy(item_places(ranked, examples.targets, groups), (10,))
        return {name: float(values[name].mean()) for name in ("ndcg@10", "recall@10")}

    return validate
