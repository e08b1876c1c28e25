"""Beauty and its like, all models, three seeds: the table of docs/results.md.

    python -m experiments.amazon --dataset ../shared/data/amazon14_beauty --out runs/amazon/beauty

Any folder that `semid prepare layout` reads will do if it has `text_minilm_f16.npy`. Leave-one-out, 20-item histories,
item level, full catalogue, beam 50; checkpoints are chosen by validation NDCG@10, test is read once. For each seed (of
tokenizer and models):

    sasrec            full-softmax cross-entropy, ids alone
    sasrec-text       ... with the text vector projected into the item vectors
    semid-text        RQ-VAE codes of the text vectors; the generator reads codes and text vector
    semid-hybrid      residual k-means codes of [text ; vectors of sasrec-text], which the generator reads too, and an
                      item-id embedding (so it knows no cold items)

Expected on Beauty (test Recall@10, seen items included): .078, .085, .059, .073. See docs/results.md for all figures,
the minutes and the machine. Finished models are skipped when the command is given again. On several hosts that share
the folder, start it on each as `semid train`: they train together, each measures, and the first writes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.results import (
    Minutes,
    folder_of,
    measure,
    metrics_rows,
    print_tables,
    stored_dataset,
    summarize,
)
from semid import GeneratorConfig, SemanticCatalog, TokenizerConfig, tokenize, train
from semid.artifacts import write_json
from semid.data import Dataset
from semid.data.simulated import SimulatedConfig
from semid.evaluation import against_exact, example_users, paired_bootstrap, write_metrics
from semid.recommender import Recommender
from semid.tokenizers import RQKmeansConfig, RQVaeConfig
from semid.training import OptimizerConfig, TrainingConfig, join_processes, on_first
from seq_models import DenseConfig, RQTransformerConfig, TransformerConfig

TEXT = "text_minilm"
COLLABORATIVE = "sasrec"


def sasrec(features: tuple[str, ...], *, epochs: float) -> GeneratorConfig:
    """SASRec with full-softmax cross-entropy."""
    optimizer = OptimizerConfig(learning_rate=2e-3, weight_decay=0.03)
    return GeneratorConfig(
        model=DenseConfig(TransformerConfig(dropout=0.4)),
        features=features,
        training=TrainingConfig(epochs=epochs, batch_size=16, validate_every=2, patience=4, optimizer=optimizer),
    )


def generator(features: tuple[str, ...], *, dropout: float, epochs: float, id_embedding: bool) -> GeneratorConfig:
    """The RQ-Transformer, of twice the default width: at width 64 it underfits these codes."""
    backbone = TransformerConfig(dim=128, heads=4, hidden=256, dropout=dropout)
    optimizer = OptimizerConfig(learning_rate=2e-3)
    return GeneratorConfig(
        model=RQTransformerConfig(backbone, id_embedding=id_embedding),
        features=features,
        training=TrainingConfig(epochs=epochs, batch_size=32, validate_every=2, patience=4, optimizer=optimizer),
    )


def main(
    dataset: Path,
    out: Path | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    beam_size: int = 50,
    budget: float = 1.0,
) -> None:
    """Train and measure every model for every seed.

    Args:
        dataset: Folder with items.parquet, interactions.parquet and text_minilm_f16.npy.
        out: Folder for all results; none given: runs/amazon/ and the dataset's name.
        seeds: One run each, of tokenizer and models.
        beam_size: Beams per user in evaluation.
        budget: Factor on all numbers of epochs (tokenizer 100, SASRec 20, generators 16 and 12).
    """
    join_processes()
    out = folder_of("amazon", out, dataset)
    data = stored_dataset(dataset, out / "dataset", SimulatedConfig())
    runs, minutes = [], []
    for seed in seeds:
        models, of_stages = _train(data, out, seed=seed, budget=budget)
        started = time.monotonic()
        runs.append(measure(models, data, out, seed=seed, beam_size=beam_size))
        minutes.append(of_stages | {"evaluation": (time.monotonic() - started) / 60})
    examples = example_users(models["semid-hybrid"], data)
    searched = {name: against_exact(models[name], data, beam_size=beam_size) for name in ("semid-text", "semid-hybrid")}
    on_first(lambda: _report(runs, seeds, minutes, searched, examples, out))


def _train(data: Dataset, out: Path, *, seed: int, budget: float) -> tuple[dict[str, Recommender], dict[str, float]]:
    """All models of one seed, and the minutes that each stage took when it ran."""
    timed = Minutes(out, seed)
    training = replace(RQVaeConfig().training, epochs=RQVaeConfig().training.num_epochs * budget)
    text = TokenizerConfig(RQVaeConfig(training=training), columns=(TEXT,))
    codes = timed("codes-text", lambda path: tokenize(data, text, out=path, seed=seed))

    def model(name: str, of: Dataset, catalog: SemanticCatalog, config: GeneratorConfig) -> Recommender:
        return timed(name, lambda path: train(of, catalog, config, out=path, seed=seed))

    models = {
        "sasrec": model("sasrec", data, codes, sasrec((), epochs=20 * budget)),
        "sasrec-text": model("sasrec-text", data, codes, sasrec((TEXT,), epochs=20 * budget)),
    }
    plain = generator((TEXT,), dropout=0.1, epochs=16 * budget, id_embedding=False)
    models["semid-text"] = model("semid-text", data, codes, plain)
    teacher, columns = models["sasrec-text"], (TEXT, COLLABORATIVE)
    taught = data.with_vectors(COLLABORATIVE, teacher.item_vectors(), origin=teacher.origin)
    mixed = TokenizerConfig(RQKmeansConfig(), columns=columns)
    mixed_codes = timed("codes-hybrid", lambda path: tokenize(taught, mixed, out=path, seed=seed))
    hybrid = generator(columns, dropout=0.15, epochs=12 * budget, id_embedding=True)
    models["semid-hybrid"] = model("semid-hybrid", taught, mixed_codes, hybrid)
    return models, timed.minutes


def _report(
    runs: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    minutes: Sequence[Mapping[str, float]],
    searched: Mapping[str, Any],
    examples: list[dict[str, Any]],
    out: Path,
) -> None:
    """Write examples.json, metrics.json (means over seeds) and seeds.json (all values), print the table for
    docs/results.md."""
    entries = summarize(runs)
    provenance = {**runs[0]["semid-text"]["provenance"], "seeds": list(seeds), "minutes": list(minutes)}
    provenance |= {"beam_against_exact": searched}
    write_metrics(out / "metrics.json", "test", metrics_rows(entries), provenance, examples=examples)
    write_json(out / "seeds.json", {"models": entries, "comparisons": _comparisons(runs), "provenance": provenance})
    print_tables(entries, head="model", seeds=len(runs))
    for seed, of_stages in zip(seeds, minutes, strict=True):
        print(f"seed {seed} minutes: " + ", ".join(f"{name} {m:.1f}" for name, m in of_stages.items()))
    for name, search in searched.items():
        print(f"{name}: beam {search['beam_size']} finds {search['exact_top_10_found']:.2%} of the exact top 10")


def _comparisons(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Paired bootstrap of Recall@10 over users, each user's value averaged over seeds (seen items included)."""

    def recall(name: str) -> np.ndarray:
        return np.mean([run[name]["recall"] for run in runs], axis=0)

    pairs = [("semid-hybrid", "semid-text"), ("semid-hybrid", "sasrec-text"), ("sasrec-text", "sasrec")]
    return {f"{a} - {b}": paired_bootstrap(recall(a), recall(b))._asdict() for a, b in pairs}


if __name__ == "__main__":
    tyro.cli(main)
