"""Beauty and its like, all models, three seeds: the table of docs/results.md.

    python -m experiments.amazon --dataset ../shared/data/amazon14_beauty --out runs/beauty

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

from experiments.layout import read_layout
from semid import GeneratorConfig, SemanticCatalog, TokenizerConfig, tokenize, train_generator
from semid.artifacts import Kind, Manifest, read_artifact, read_json, write_json
from semid.data import Dataset
from semid.evaluation import against_exact, baselines, compare, example_users, paired_bootstrap, write_metrics
from semid.recommender import Recommender
from semid.tokenizers import RQKmeansConfig, RQVaeConfig
from semid.training import OptimizerConfig, TrainingConfig, join_processes, on_first
from seq_models import DenseConfig, RQTransformerConfig, TransformerConfig

TEXT = "text_minilm"
COLLABORATIVE = "sasrec"
COLUMNS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")


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
    out: Path = Path("runs/beauty"),
    seeds: tuple[int, ...] = (0, 1, 2),
    beam_size: int = 50,
    budget: float = 1.0,
) -> None:
    """Train and measure every model for every seed.

    Args:
        dataset: Folder with items.parquet, interactions.parquet and text_minilm_f16.npy.
        out: Folder for all results.
        seeds: One run each, of tokenizer and models.
        beam_size: Beams per user in evaluation.
        budget: Factor on all numbers of epochs (tokenizer 100, SASRec 20, generators 16 and 12).
    """
    join_processes()
    on_first(lambda: saved_layout(dataset, out / "dataset"))
    data = Dataset.load(out / "dataset")
    runs = []
    for seed in seeds:
        models, minutes = _train(data, out, seed=seed, budget=budget)
        started = time.monotonic()
        measured = {
            seen: compare(models | baselines(data), data, beam_size=beam_size, exclude_seen=seen == "excluded")
            for seen in ("included", "excluded")
        }
        minutes["evaluation"] = (time.monotonic() - started) / 60
        runs.append({"seed": seed, "minutes": minutes, "measured": measured})
    examples = example_users(models["semid-hybrid"], data)
    searched = {name: against_exact(models[name], data, beam_size=beam_size) for name in ("semid-text", "semid-hybrid")}
    on_first(lambda: _report(runs, searched, examples, out))


def saved_layout(source: Path, path: Path) -> None:
    """Make the folder's dataset, unless it was made before."""
    if not path.exists():
        read_layout(source).save(path)


def _train(data: Dataset, out: Path, *, seed: int, budget: float) -> tuple[dict[str, Recommender], dict[str, float]]:
    """All models of one seed, and the minutes that each stage took when it ran."""
    parents = {"dataset": read_artifact(out / "dataset", Kind.DATASET)}
    record = out / f"minutes_{seed}.json"
    minutes: dict[str, float] = read_json(record) if record.exists() else {}

    def timed(name: str, make: Any) -> Any:
        started = time.monotonic()
        result = make(out / f"{name}_{seed}")
        minutes.setdefault(name, (time.monotonic() - started) / 60)  # a skipped stage keeps its first time
        on_first(lambda: write_json(record, minutes))
        return result

    def codes(name: str, of: Dataset, config: TokenizerConfig, teacher: Mapping[str, Manifest]) -> SemanticCatalog:
        return timed(name, lambda path: tokenize(of, config, out=path, parents={**parents, **teacher}, seed=seed))

    def model(
        name: str, of: Dataset, catalog: SemanticCatalog, config: GeneratorConfig, made_from: Mapping[str, Manifest]
    ) -> Recommender:
        known = {**parents, **made_from}
        return timed(name, lambda path: train_generator(of, catalog, config, out=path, parents=known, seed=seed))

    def manifest(name: str, kind: str) -> Manifest:
        return read_artifact(out / f"{name}_{seed}", kind)

    training = replace(RQVaeConfig().training, epochs=RQVaeConfig().training.epochs * budget)
    text_codes = codes("codes-text", data, TokenizerConfig(RQVaeConfig(training=training), columns=(TEXT,)), {})
    by = {"catalog": manifest("codes-text", Kind.CATALOG)}
    models = {
        "sasrec": model("sasrec", data, text_codes, sasrec((), epochs=20 * budget), by),
        "sasrec-text": model("sasrec-text", data, text_codes, sasrec((TEXT,), epochs=20 * budget), by),
    }
    plain = generator((TEXT,), dropout=0.1, epochs=16 * budget, id_embedding=False)
    models["semid-text"] = model("semid-text", data, text_codes, plain, by)
    teacher = {"sasrec-text": manifest("sasrec-text", Kind.MODEL)}
    collaborative, columns = (
        data.with_vectors(COLLABORATIVE, models["sasrec-text"].item_vectors()),
        (TEXT, COLLABORATIVE),
    )
    mixed_codes = codes("codes-hybrid", collaborative, TokenizerConfig(RQKmeansConfig(), columns=columns), teacher)
    hybrid = generator(columns, dropout=0.15, epochs=12 * budget, id_embedding=True)
    by = {**teacher, "catalog": manifest("codes-hybrid", Kind.CATALOG)}
    models["semid-hybrid"] = model("semid-hybrid", collaborative, mixed_codes, hybrid, by)
    return models, minutes


def _report(
    runs: Sequence[Mapping[str, Any]], searched: Mapping[str, Any], examples: list[dict[str, Any]], out: Path
) -> None:
    """Write examples.json, metrics.json (means over seeds) and seeds.json (all values), print the table for
    docs/results.md."""
    write_json(out / "examples.json", examples)
    rows, each = [], []
    for seen in ("included", "excluded"):
        for name in runs[0]["measured"][seen]:
            values = [run["measured"][seen][name].values for run in runs]
            mean = {key: float(np.mean([value[key] for value in values])) for key in values[0]}
            deviation = {key: float(np.std([value[key] for value in values])) for key in values[0]}
            rows.append({"model": name, **mean, **({"seen": seen} if seen == "excluded" else {})})
            each.append({"model": name, "seen": seen, "mean": mean, "std": deviation, "seeds": values})
    first = runs[0]["measured"]["included"]["semid-text"].provenance
    provenance = {**first, "seeds": [run["seed"] for run in runs], "minutes": [run["minutes"] for run in runs]}
    provenance |= {"beam_against_exact": searched}
    write_metrics(out / "metrics.json", "test", rows, provenance)
    write_json(out / "seeds.json", {"models": each, "comparisons": _comparisons(runs), "provenance": provenance})
    for seen in ("included", "excluded"):
        print(f"\nseen items {seen}, mean and standard deviation over {len(runs)} seeds\n")
        print("| model | R@5 | N@5 | R@10 | N@10 |\n|---|---|---|---|---|")
        for entry in (entry for entry in each if entry["seen"] == seen):
            cells = [f"{entry['mean'][key]:.4f} ± {entry['std'][key]:.4f}" for key in COLUMNS]
            print(f"| {entry['model']} | {' | '.join(cells)} |")
    for run in runs:
        print(f"seed {run['seed']} minutes: " + ", ".join(f"{name} {m:.1f}" for name, m in run["minutes"].items()))
    for name, search in searched.items():
        print(f"{name}: beam {search['beam_size']} finds {search['exact_top_10_found']:.2%} of the exact top 10")


def _comparisons(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Paired bootstrap of Recall@10 over users, each user's value averaged over seeds (seen items included)."""

    def recall(name: str) -> np.ndarray:
        return np.mean([run["measured"]["included"][name].per_example["recall@10"] for run in runs], axis=0)

    pairs = [("semid-hybrid", "semid-text"), ("semid-hybrid", "sasrec-text"), ("sasrec-text", "sasrec")]
    return {f"{a} - {b}": paired_bootstrap(recall(a), recall(b))._asdict() for a, b in pairs}


if __name__ == "__main__":
    tyro.cli(main)
