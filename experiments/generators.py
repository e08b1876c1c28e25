"""Families of generators on the same codes: how good, how soon, and how fast.

    python -m experiments.generators --dataset ../shared/data/amazon14_beauty --out runs/generators

Every family reads codes and content vectors of one catalogue (RQ-VAE codes of text, unless `--catalog` names another)
and is trained with its own schedule. A training minute is steps times the median time of a step, measured on the spot
without compilation and validation: what validation costs is a matter of how often one looks. Leave-one-out, 20-item
histories, item level, full catalogue, beam 50; checkpoints are chosen by validation NDCG@10, test is read once.

    rq-transformer    one position an item and a depth decoder (the default)
    encoder-decoder   TIGER: every target is an example of its own
    flat              one causal stack over all codes
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.results import folder_of, stored_dataset
from semid import Dataset, GeneratorConfig, Recommender, SemanticCatalog, TokenizerConfig, tokenize, train
from semid.artifacts import write_json
from semid.data.simulated import SimulatedConfig
from semid.evaluation import evaluate
from semid.generators import LossTables, content_features, generator_loss, training_counts, training_rows
from semid.recommender import ModelSpec
from semid.training import (
    OptimizerConfig,
    TrainingConfig,
    batches,
    create_state,
    join_processes,
    make_mesh,
    make_optimizer,
    make_step,
    on_first,
    put_batch,
)
from seq_models import EncoderDecoderConfig, FlatDecoderConfig, ItemTables, RQTransformerConfig, TransformerConfig

BACKBONE = TransformerConfig(dim=64, layers=2, heads=2, hidden=128, dropout=0.1)
QUALITIES = (0.05, 0.06)


def _training(epochs: float, batch_size: int, accumulate: int) -> TrainingConfig:
    optimizer = OptimizerConfig(learning_rate=3e-3)
    return TrainingConfig(epochs, batch_size, accumulate, optimizer, validate_every=epochs / 12)


# Batches of about 2,000 targets in a packed row's families, 256 where every row is one target; microbatches are what a
# CPU's caches like best.
FAMILIES = {
    "rq-transformer": GeneratorConfig(RQTransformerConfig(BACKBONE), training=_training(36, 64, 4)),
    "encoder-decoder": GeneratorConfig(EncoderDecoderConfig(BACKBONE), training=_training(6, 256, 8)),
    "flat": GeneratorConfig(FlatDecoderConfig(BACKBONE), training=_training(12, 64, 4)),
}


def main(
    dataset: Path,
    out: Path | None = None,
    catalog: Path | None = None,
    families: tuple[str, ...] = tuple(FAMILIES),
    seeds: tuple[int, ...] = (0,),
    budget: float = 1.0,
    steps: int = 20,
) -> None:
    """Train and measure every family, print a table and write `generators.json`.

    Args:
        dataset: Folder that `semid prepare layout` reads.
        out: Folder for all results, where what is finished is skipped; none given: runs/generators/ and the dataset's
            name.
        catalog: Catalogue folder of that dataset.
        families: Which.
        seeds: One run each.
        budget: Factor on all numbers of epochs.
        steps: Training steps of each of the five runs that are timed.
    """
    join_processes()
    out = folder_of("generators", out, dataset)
    data = stored_dataset(dataset, out / "dataset", SimulatedConfig())
    codes = SemanticCatalog.load(catalog) if catalog else tokenize(data, TokenizerConfig(), out=out / "catalog")
    rows = []
    for name in families:
        config = FAMILIES[name]
        config = replace(config, training=replace(config.training, epochs=config.training.num_epochs * budget))
        speed = _speed(config, data, codes, steps=steps)
        for seed in seeds:
            path = out / f"{name}_{seed}"
            model = train(data, codes, config, out=path, seed=seed)
            rows.append({"model": name, "seed": seed, **speed, **_quality(model, data, path, speed["seconds a step"])})
            on_first(lambda: print(json.dumps(rows[-1])))
    on_first(lambda: _report(rows, out))


def _report(rows: list[dict[str, Any]], out: Path) -> None:
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    write_json(out / "generators.json", {"devices": devices, "jax": jax.__version__, "rows": rows})
    print(_table(rows))


def _speed(config: GeneratorConfig, data: Dataset, codes: SemanticCatalog, *, steps: int) -> dict[str, float]:
    """The time of a training step, median over five runs of `steps`, and targets a second."""
    features, counts = content_features(data, config.features), training_counts(data)
    width = 0 if features is None else features.shape[1]
    model = ModelSpec(config.model, codes.level_sizes, len(codes), width, config.max_history).build(seed=0)
    rows: Any = training_rows(data, config, model.layout)
    size, mesh = config.training.batch_size, make_mesh()
    optimizer = make_optimizer(config.training.optimizer, num_steps=6 * steps)
    tables = LossTables(ItemTables.from_arrays(codes.codes, features, counts))
    step = make_step(
        model,
        optimizer,
        functools.partial(generator_loss, objective=config.objective),
        tables=tables,
        seed=0,
        num_steps=6 * steps,
        mesh=mesh,
        accumulate=config.training.accumulate,
    )
    state, seconds, targets = create_state(model, optimizer, mesh), [], 0
    process = (jax.process_index(), jax.process_count())
    stream = batches(rows, batch_size=size, num_batches=6 * steps, seed=0, process=process)
    for _ in range(6):  # the first compiles
        started = time.perf_counter()
        for batch in itertools.islice(stream, steps):
            state, metrics = step(state, put_batch(batch, mesh))
            targets += int(metrics["targets"])
        seconds.append((time.perf_counter() - started) / steps)
    median = float(np.median(seconds[1:]))
    return {"seconds a step": median, "targets a second": targets / len(seconds) / steps / median}


def _quality(model: Recommender, data: Dataset, path: Path, seconds: float) -> dict[str, Any]:
    """Test figures, users searched a second, and the training minutes until validation Recall@10 passed each mark."""
    records = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    looks = [(r["step"], r["validation/recall@10"]) for r in records if "validation/recall@10" in r]
    histories = data.splits.test.histories
    model.rank(histories.take(slice(0, 1024)), k=10, exclude_seen=False)  # compiles
    started = time.perf_counter()
    model.rank(histories.take(slice(0, 4096)), k=10, exclude_seen=False)
    users = min(len(histories), 4096) / (time.perf_counter() - started)
    found = evaluate(model, data, split="test", ks=(5, 10), beam_size=50).values
    reached = {
        f"minutes to {mark}": next((step * seconds / 60 for step, value in looks if value > mark), None)
        for mark in QUALITIES
    }
    figures = {name: found[name] for name in ("recall@5", "ndcg@5", "recall@10", "ndcg@10")}
    best = max(value for _, value in looks)
    minutes = looks[-1][0] * seconds / 60
    return {
        **figures,
        "validation recall@10": best,
        "training minutes": minutes,
        "users a second": users,
        **reached,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    names = ("recall@10", "ndcg@10", "training minutes", *(f"minutes to {m}" for m in QUALITIES))
    names += ("targets a second", "users a second")
    lines = [f"| model | seed | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = ["-" if row[name] is None else f"{row[name]:.4g}" for name in names]
        lines.append(f"| {row['model']} | {row['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
