"""Tokenizers side by side: for every seed a teacher, the codes of each arm, and the same generator on all of them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.amazon import COLUMNS, TEXT, sasrec, saved_layout
from semid import Dataset, GeneratorConfig, Recommender, SemanticCatalog, TokenizerConfig, tokenize, train_generator
from semid.artifacts import Kind, Manifest, load_tensors, read_artifact, read_json, save_tensors, write_json
from semid.data.simulated import SimulatedConfig, simulate
from semid.evaluation import baselines, compare, paired_bootstrap, write_metrics
from semid.tokenizers import RQVaeConfig
from semid.training import join_processes, on_first

# Columns that every arm may use beside the content: the teacher's item vectors, noise, and other items' vectors.
TEACHER, RANDOM, SHUFFLED = "teacher", "random", "shuffled"
# Arms that are also compared with the one named concatenation.
ALIGNED = ("letter", "distill", "das", "joint")

Arm = Callable[[tuple[str, ...]], TokenizerConfig]  # from the content columns


def run(
    arms: Mapping[str, Arm],
    dataset: Path | None,
    out: Path,
    *,
    seeds: Sequence[int],
    teachers: Path | None = None,
    budget: float = 1.0,
    beam_size: int = 50,
) -> None:
    """Train all arms for all seeds, skipping what is finished, and write `arms.json` and `metrics.json` into `out`.

    Without a `dataset` every seed is a simulated world of its own, and the table has the oracle. `teachers` is a folder
    of experiments.amazon on the same dataset, whose sasrec-text models need not be trained again. What a seed measured
    is kept in `arms_SEED.json` and `.safetensors`, so that seeds may run side by side and be put together in the end.
    Several processes train together (see `semid train`); each measures, and the first writes.
    """
    join_processes()
    runs = []
    for seed in seeds:
        record = out / f"arms_{seed}.json"
        if not on_first(functools.partial(_measured, record, arms)):
            data = out / ("dataset" if dataset else f"dataset_{seed}")
            on_first(functools.partial(_make_dataset, dataset, data, seed))
            stage = _Stages(data, Dataset.load(data), out, seed, budget)
            teacher = None if teachers is None else teachers / f"sasrec-text_{seed}"
            _measure(stage, arms, teacher, beam_size, record)
        runs.append({**read_json(record), "recall": load_tensors(record.with_suffix(".safetensors"))})
    on_first(lambda: _report(tuple(arms), runs, out))


def _measured(record: Path, arms: Mapping[str, Arm]) -> bool:
    """Whether a seed's record is of these arms."""
    return record.exists() and set(read_json(record)["health"]) == set(arms)


class _Stages:
    """The stages of one seed, each an artifact of its own, and the minutes that they took when they ran."""

    def __init__(self, path: Path, data: Dataset, out: Path, seed: int, budget: float) -> None:
        self.data, self.out, self.seed, self.budget = data, out, seed, budget
        self.parents = {"dataset": read_artifact(path, Kind.DATASET)}
        self.simulated = TEXT not in data.vector_columns
        self.content = tuple(data.vector_columns) if self.simulated else (TEXT,)
        self._record = out / f"minutes_{seed}.json"
        self.minutes: dict[str, float] = read_json(self._record) if self._record.exists() else {}

    def path(self, name: str) -> Path:
        return self.out / f"{name}_{self.seed}"

    def timed(self, name: str, make: Callable[[Path], Any]) -> Any:
        started = time.monotonic()
        result = make(self.path(name))
        self.minutes.setdefault(name, (time.monotonic() - started) / 60)
        on_first(lambda: write_json(self._record, self.minutes))
        return result

    def teacher(self) -> Recommender:
        """SASRec reads no codes: item numbers stand for them."""
        items = self.data.num_items
        numbers = SemanticCatalog(self.data.item_ids, np.arange(items, dtype=np.int32)[:, None], (items,))
        config = self._budgeted(sasrec(self.content, epochs=36 if self.simulated else 20))
        return self.timed(
            TEACHER,
            lambda to: train_generator(self.data, numbers, config, out=to, parents=self.parents, seed=self.seed),
        )

    def codes(self, name: str, taught: Dataset, config: TokenizerConfig, teacher: Manifest) -> SemanticCatalog:
        known = {**self.parents, TEACHER: teacher}
        if isinstance(config.method, RQVaeConfig):
            config = replace(config, method=self._budgeted(config.method))
        return self.timed(f"codes-{name}", lambda to: tokenize(taught, config, out=to, parents=known, seed=self.seed))

    def generator(self, name: str, codes: SemanticCatalog) -> Recommender:
        known = {**self.parents, "catalog": read_artifact(self.path(f"codes-{name}"), Kind.CATALOG)}
        config = GeneratorConfig(features=self.content)
        if not self.simulated:
            config = replace(config, training=replace(config.training, epochs=10, validate_every=5))
        config = self._budgeted(config)
        return self.timed(
            f"generator-{name}",
            lambda to: train_generator(self.data, codes, config, out=to, parents=known, seed=self.seed),
        )

    def _budgeted(self, config: Any) -> Any:
        return replace(config, training=replace(config.training, epochs=config.training.epochs * self.budget))


def _make_dataset(source: Path | None, path: Path, seed: int) -> None:
    if source:
        saved_layout(source, path)
    elif not path.exists():
        simulate(SimulatedConfig(seed=seed)).dataset.save(path)


def _measure(stage: _Stages, arms: Mapping[str, Arm], trained: Path | None, beam_size: int, record: Path) -> None:
    """One seed: what every arm measures, each user's Recall@10, and the health of the codes."""
    teacher = Recommender.from_pretrained(trained) if trained else stage.teacher()
    manifest = read_artifact(trained or stage.path(TEACHER), Kind.MODEL)
    models, health = {"teacher (SASRec)": teacher}, {}
    taught = _taught(stage.data, teacher.item_vectors(), seed=stage.seed)
    for name, arm in arms.items():
        codes = stage.codes(name, taught, arm(stage.content), manifest)
        health[name] = read_json(stage.path(f"codes-{name}") / "health.json")
        models[name] = stage.generator(name, codes)
    rankers = models | baselines(stage.data)
    measured = {
        seen: compare(rankers, stage.data, beam_size=beam_size, exclude_seen=seen == "excluded")
        for seen in ("included", "excluded")
    }
    recall = {name: measured["included"][name].per_example["recall@10"] for name in arms}
    values = {seen: {name: found.values for name, found in of_all.items()} for seen, of_all in measured.items()}
    about = {"seed": stage.seed, "simulated": stage.simulated, "minutes": stage.minutes}
    about |= {"provenance": measured["included"]["teacher (SASRec)"].provenance}

    def write() -> None:
        save_tensors(record.with_suffix(".safetensors"), recall)
        write_json(record, {**about, "values": values, "health": health})

    on_first(write)


def _taught(data: Dataset, vectors: np.ndarray, *, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    columns = {
        TEACHER: vectors,
        RANDOM: rng.normal(size=vectors.shape),
        SHUFFLED: vectors[rng.permutation(len(vectors))],
    }
    for name, values in columns.items():
        data = data.with_vectors(name, values)
    return data


def _report(arms: Sequence[str], runs: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write all values of all seeds, and print the tables of docs/results.md."""
    rows, each = [], []
    for seen in ("included", "excluded"):
        for name in runs[0]["values"][seen]:
            values = [run["values"][seen][name] for run in runs]
            mean = {key: float(np.mean([value[key] for value in values])) for key in values[0]}
            deviation = {key: float(np.std([value[key] for value in values])) for key in values[0]}
            rows.append({"model": name, **mean, **({"seen": seen} if seen == "excluded" else {})})
            each.append({"model": name, "seen": seen, "mean": mean, "std": deviation, "seeds": values})
    provenance = {**runs[0]["provenance"], "seeds": [run["seed"] for run in runs]}
    provenance |= {"minutes": [run["minutes"] for run in runs]}
    write_metrics(out / "metrics.json", "test", rows, provenance)
    comparisons = _comparisons(arms, runs)
    found = {"models": each, "comparisons": comparisons, "health": [run["health"] for run in runs]}
    write_json(out / "arms.json", {**found, "provenance": provenance})
    for seen in ("included", "excluded"):
        print(f"\nseen items {seen}, mean and standard deviation over {len(runs)} seeds\n")
        print("| codes | R@5 | N@5 | R@10 | N@10 |\n|---|---|---|---|---|")
        for entry in (entry for entry in each if entry["seen"] == seen):
            cells = [f"{entry['mean'][key]:.4f} ± {entry['std'][key]:.4f}" for key in COLUMNS]
            print(f"| {entry['model']} | {' | '.join(cells)} |")
    _print_health(arms, runs)
    for pair, found in comparisons.items():
        print(f"{pair}: {found}")


def _print_health(arms: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> None:
    """What the codes are like, in the mean over seeds."""
    print(
        "\n| codes | usage | perplexity | colliding | neighbors sharing 1, 2 codes | popularity explained by 1 code |"
    )
    print("|---|---|---|---|---|---|")
    for name in arms:
        health = [run["health"][name] for run in runs]
        levels = range(len(health[0]["collaborative"]["codes"]["usage"]))
        usage = [np.mean([h["collaborative"]["codes"]["usage"][level] for h in health]) for level in levels]
        perplexity = [np.mean([h["levels"][level]["perplexity"] for h in health]) for level in levels]
        sharing = np.mean([h["collaborative"]["codes"]["neighbors_sharing"] for h in health], axis=0)
        explained = np.mean([h["collaborative"]["codes"]["popularity_explained"] for h in health], axis=0)
        cells = [
            " ".join(f"{share:.3f}" for share in usage),
            " ".join(f"{value:.0f}" for value in perplexity),
            f"{np.mean([h['collision_rate_before'] for h in health]):.1%}",
            " ".join(f"{share:.4f}" for share in sharing[:2]),
            f"{explained[0]:.3f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print()


def _comparisons(arms: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each later arm less the first, and the aligned ones less concatenation: paired bootstrap of Recall@10 over users,
    each user's value averaged over seeds (of the simulator, where each seed has its own users: over all of them)."""
    pairs = [(name, arms[0]) for name in arms[1:]]
    pairs += [(name, "concatenation") for name in arms if "concatenation" in arms and name in ALIGNED]

    def recall(name: str) -> np.ndarray:
        values = [run["recall"][name] for run in runs]
        return np.concatenate(values) if runs[0]["simulated"] else np.mean(values, axis=0)

    found = {}
    for a, b in pairs:
        difference = paired_bootstrap(recall(a), recall(b))._asdict()
        found[f"{a} - {b}"] = difference | {"relative": float(recall(a).mean() / recall(b).mean() - 1)}
    return found
