"""Beauty and its like, the recommended recipe and its parts, three seeds: the tables of docs/results.md.

    python -m experiments.amazon --dataset ../shared/data/amazon14_beauty --out runs/amazon/beauty
    python -m experiments.amazon --dataset ../shared/data/amazon14_beauty --ties shuffled    # the items of a day

Any folder that `semid prepare layout` reads will do if it has `text_minilm_f16.npy`. Leave-one-out, 20-item histories,
item level, full catalogue, beam 50; constants, weights and checkpoints are chosen by validation NDCG@10, test is read
once. For each seed (of tokenizer and models):

    item-graph        transitions and content neighbors, constants chosen on validation; the same for all seeds
    sasrec-text       full-softmax cross-entropy over ids and projected text vectors; the teacher of the generators
    semid-text        RQ-VAE codes of the text vectors; the generator reads codes and text vector
    semid-hybrid      residual k-means codes of [text ; vectors of sasrec-text], which the generator reads too, and an
                      item-id embedding (so it knows no cold items)
    ... + graph       mixed with the item graph, inside the search

Generators are taught by sasrec-text and the graph, half each. With --ablations also:

    item-graph-counts      the graph without content edges
    sasrec-text-repeats    sasrec-text whose softmax keeps the items of the history
    semid-hybrid-untaught  semid-hybrid without a teacher

Expected on Beauty (test Recall@10): item-graph .110, semid-hybrid + graph .117. See docs/results.md for all figures,
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
from semid.cli.choices import Ties
from semid.data import Dataset, SourceOrder
from semid.data.simulated import SimulatedConfig
from semid.evaluation import against_exact, example_users, paired_bootstrap, write_metrics
from semid.generators import ObjectiveConfig
from semid.graphs import ItemGraph, fit_graph
from semid.recommender import Recommender
from semid.tokenizers import RQKmeansConfig, RQVaeConfig
from semid.training import OptimizerConfig, TrainingConfig, join_processes, on_first
from seq_models import DenseConfig, RQTransformerConfig, TransformerConfig

TEXT = "text_minilm"
COLLABORATIVE = "sasrec"
# Share of the item graph in what teaches the generators; the rest is SASRec's.
_GRAPH_SHARE = 0.5


def sasrec(features: tuple[str, ...], *, epochs: float) -> GeneratorConfig:
    """SASRec with full-softmax cross-entropy."""
    optimizer = OptimizerConfig(learning_rate=2e-3, weight_decay=0.03)
    return GeneratorConfig(
        model=DenseConfig(TransformerConfig(dropout=0.4)),
        features=features,
        training=TrainingConfig(epochs=epochs, batch_size=16, validate_every=2, patience=4, optimizer=optimizer),
    )


def generator(
    features: tuple[str, ...], *, dropout: float, epochs: float, id_embedding: bool, taught: bool = True
) -> GeneratorConfig:
    """The RQ-Transformer, of twice the default width: at width 64 it underfits these codes."""
    backbone = TransformerConfig(dim=128, heads=4, hidden=256, dropout=dropout)
    optimizer = OptimizerConfig(learning_rate=2e-3)
    return GeneratorConfig(
        model=RQTransformerConfig(backbone, id_embedding=id_embedding),
        features=features,
        objective=ObjectiveConfig(teacher_graph=_GRAPH_SHARE if taught else 0.0),
        training=TrainingConfig(epochs=epochs, batch_size=32, validate_every=2, patience=4, optimizer=optimizer),
    )


def main(
    dataset: Path,
    out: Path | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    beam_size: int = 50,
    budget: float = 1.0,
    ablations: bool = False,
    ties: Ties = SourceOrder(),
) -> None:
    """Train and measure every model for every seed.

    Args:
        dataset: Folder with items.parquet, interactions.parquet and text_minilm_f16.npy.
        out: Folder for all results; none given: runs/amazon/ and the dataset's name, with that of shuffled ties.
        seeds: One run each, of tokenizer and models.
        beam_size: Beams per user in evaluation.
        budget: Factor on all numbers of epochs (tokenizer 100, SASRec 20, generators 16 and 12).
        ablations: Train and measure also what lacks a part.
        ties: Order of a user's interactions of equal time: that of the source, or drawn by a seed (0 if none is given).
    """
    join_processes()
    out = folder_of("amazon", out, dataset, ties=ties)
    data = stored_dataset(dataset, out / "dataset", SimulatedConfig(), ties=ties)
    runs, minutes = [], []
    for seed in seeds:
        models, of_stages = _train(data, out, seed=seed, budget=budget, ablations=ablations)
        started = time.monotonic()
        runs.append(measure(_with_parts(models), data, out, seed=seed, beam_size=beam_size))
        minutes.append(of_stages | {"evaluation": (time.monotonic() - started) / 60})
    examples = example_users(models["semid-hybrid"], data)
    generators = _with_parts({name: models[name] for name in ("semid-text", "semid-hybrid")})
    searched = {
        name: against_exact(model, data, beam_size=beam_size)
        for name, model in generators.items()
        if isinstance(model, Recommender)
    }
    on_first(lambda: _report(runs, seeds, minutes, searched, examples, out))


def _train(
    data: Dataset, out: Path, *, seed: int, budget: float, ablations: bool
) -> tuple[dict[str, Recommender | ItemGraph], dict[str, float]]:
    """All models of one seed, mixed with the item graph, and the minutes that each stage took when it ran."""
    timed = Minutes(out, seed)
    graph = timed("item-graph", lambda _: fit_graph(data, tune=True, out=out / "item-graph"))
    training = replace(RQVaeConfig().training, epochs=RQVaeConfig().training.num_epochs * budget)
    text = TokenizerConfig(RQVaeConfig(training=training), columns=(TEXT,))
    codes = timed("codes-text", lambda path: tokenize(data, text, out=path, seed=seed))

    def model(
        name: str, of: Dataset, catalog: SemanticCatalog, config: GeneratorConfig, teacher: Recommender | None = None
    ) -> Recommender:
        options: dict[str, Any] = {"seed": seed, "graph": graph, "teacher": teacher}
        return timed(name, lambda path: train(of, catalog, config, out=path, **options))

    dense = sasrec((TEXT,), epochs=20 * budget)
    teacher = model("sasrec-text", data, codes, dense)
    plain = generator((TEXT,), dropout=0.1, epochs=16 * budget, id_embedding=False)
    columns = (TEXT, COLLABORATIVE)
    taught = data.with_vectors(COLLABORATIVE, teacher.item_vectors(), origin=teacher.origin)
    mixed = TokenizerConfig(RQKmeansConfig(), columns=columns)
    mixed_codes = timed("codes-hybrid", lambda path: tokenize(taught, mixed, out=path, seed=seed))
    hybrid = generator(columns, dropout=0.15, epochs=12 * budget, id_embedding=True)
    models: dict[str, Recommender | ItemGraph] = {
        "item-graph": graph,
        "sasrec-text": teacher,
        "semid-text": model("semid-text", data, codes, plain, teacher),
        "semid-hybrid": model("semid-hybrid", taught, mixed_codes, hybrid, teacher),
    }
    if ablations:
        counts = replace(graph.config, content=0.0, smoothing=0.0)
        models["item-graph-counts"] = timed(
            "item-graph-counts", lambda _: fit_graph(data, counts, out=out / "item-graph-counts")
        )
        repeats = replace(dense, objective=ObjectiveConfig(repeats=True))
        models["sasrec-text-repeats"] = model("sasrec-text-repeats", data, codes, repeats)
        untaught = generator(columns, dropout=0.15, epochs=12 * budget, id_embedding=True, taught=False)
        models["semid-hybrid-untaught"] = model("semid-hybrid-untaught", taught, mixed_codes, untaught)
    return models, timed.minutes


def _with_parts(models: Mapping[str, Recommender | ItemGraph]) -> dict[str, Recommender | ItemGraph]:
    """Every model without its graph, under its name, and with it."""
    parts: dict[str, Recommender | ItemGraph] = {}
    for name, model in models.items():
        if isinstance(model, Recommender):
            parts |= {name: model.with_graph(None), f"{name} + graph": model}
        else:
            parts[name] = model
    return parts


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

    pairs = [
        ("semid-hybrid", "semid-text"),
        ("semid-hybrid", "sasrec-text"),
        ("semid-hybrid + graph", "item-graph"),
        ("semid-hybrid + graph", "sasrec-text + graph"),
    ]
    return {f"{a} - {b}": paired_bootstrap(recall(a), recall(b))._asdict() for a, b in pairs}


if __name__ == "__main__":
    tyro.cli(main)
