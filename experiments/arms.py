"""Tokenizers side by side: for every seed a teacher, the codes of each arm, and the same generator on all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.amazon import TEXT, sasrec
from experiments.results import Minutes, measure, metrics_rows, print_tables, stored_dataset, summarize
from semid import Dataset, GeneratorConfig, Recommender, SemanticCatalog, TokenizerConfig, tokenize, train
from semid.artifacts import read_json, write_json
from semid.data.simulated import SimulatedConfig
from semid.evaluation import paired_bootstrap, write_metrics
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
    of experiments.amazon on the same dataset, whose sasrec-text models need not be trained again. Each measurement is
    kept in a file, so that seeds may run next to each other and be put together in the end. Several processes train
    together (see `semid train`); each measures, and the first writes.
    """
    join_processes()
    runs = []
    for seed in seeds:
        world = SimulatedConfig(family_size=1.0, seed=seed)
        data = stored_dataset(dataset, out / ("dataset" if dataset else f"dataset_{seed}"), world)
        stages = _Stages(data, out, seed, budget)
        trained = None if teachers is None else teachers / f"sasrec-text_{seed}"
        teacher = stages.teacher() if trained is None else Recommender.from_pretrained(trained)
        models, health = {"teacher (SASRec)": teacher}, {}
        taught = _taught(data, teacher, seed=seed)
        for name, arm in arms.items():
            codes = stages.codes(name, taught, arm(stages.content))
            health[name] = read_json(stages.path(f"codes-{name}") / "health.json")
            models[name] = stages.generator(name, codes)
        measured = measure(models, data, out, seed=seed, beam_size=beam_size)
        runs.append(_Run(seed, stages.simulated, stages.minutes, measured, health))
    on_first(lambda: _report(tuple(arms), runs, out))


class _Run(NamedTuple):
    """Measurements of one seed by model, the health of the codes by arm, and the minutes of the stages."""

    seed: int
    simulated: bool
    minutes: dict[str, float]
    measured: dict[str, dict[str, Any]]
    health: dict[str, dict[str, Any]]


class _Stages:
    """The stages of one seed."""

    def __init__(self, data: Dataset, out: Path, seed: int, budget: float) -> None:
        self.data, self.out, self.seed, self.budget = data, out, seed, budget
        self.simulated = TEXT not in data.vector_columns
        self.content = tuple(data.vector_columns) if self.simulated else (TEXT,)
        self._timed = Minutes(out, seed)

    @property
    def minutes(self) -> dict[str, float]:
        return self._timed.minutes

    def path(self, name: str) -> Path:
        return self.out / f"{name}_{self.seed}"

    def teacher(self) -> Recommender:
        """SASRec reads no codes: item numbers stand for them."""
        items = self.data.num_items
        numbers = SemanticCatalog(self.data.item_ids, np.arange(items, dtype=np.int32)[:, None], (items,))
        config = self._budgeted(sasrec(self.content, epochs=36 if self.simulated else 20))
        return self._timed(TEACHER, lambda to: train(self.data, numbers, config, out=to, seed=self.seed))

    def codes(self, name: str, taught: Dataset, config: TokenizerConfig) -> SemanticCatalog:
        if config.method.can_align:
            config = replace(config, method=self._budgeted(config.method))
        return self._timed(f"codes-{name}", lambda to: tokenize(taught, config, out=to, seed=self.seed))

    def generator(self, name: str, codes: SemanticCatalog) -> Recommender:
        config = GeneratorConfig(features=self.content)
        epochs, every = (36, 1) if self.simulated else (10, 5)
        config = self._budgeted(replace(config, training=replace(config.training, epochs=epochs, validate_every=every)))
        return self._timed(f"generator-{name}", lambda to: train(self.data, codes, config, out=to, seed=self.seed))

    def _budgeted(self, config: Any) -> Any:
        return replace(config, training=replace(config.training, epochs=config.training.num_epochs * self.budget))


def _taught(data: Dataset, teacher: Recommender, *, seed: int) -> Dataset:
    """The dataset with columns of the teacher's item vectors, of noise, and of the vectors shuffled."""
    rng, vectors = np.random.default_rng(seed), teacher.item_vectors()
    data = data.with_vectors(TEACHER, vectors, origin=teacher.origin)
    data = data.with_vectors(RANDOM, rng.normal(size=vectors.shape))
    return data.with_vectors(SHUFFLED, vectors[rng.permutation(len(vectors))])


def _report(arms: Sequence[str], runs: Sequence[_Run], out: Path) -> None:
    """Write all values of all seeds, and print the tables of docs/results.md."""
    entries = summarize([run.measured for run in runs])
    provenance = {**runs[0].measured["teacher (SASRec)"]["provenance"], "seeds": [run.seed for run in runs]}
    provenance |= {"minutes": [run.minutes for run in runs]}
    write_metrics(out / "metrics.json", "test", metrics_rows(entries), provenance)
    comparisons = _comparisons(arms, runs)
    found = {"models": entries, "comparisons": comparisons, "health": [run.health for run in runs]}
    write_json(out / "arms.json", {**found, "provenance": provenance})
    print_tables(entries, head="codes", seeds=len(runs))
    _print_health(arms, runs)
    for pair, difference in comparisons.items():
        print(f"{pair}: {difference}")


def _print_health(arms: Sequence[str], runs: Sequence[_Run]) -> None:
    """Print the health of the codes, means over seeds."""
    print(
        "\n| codes | usage | perplexity | colliding | neighbors sharing 1, 2 codes | popularity explained by 1 code |"
    )
    print("|---|---|---|---|---|---|")
    for name in arms:
        health = [run.health[name] for run in runs]
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


def _comparisons(arms: Sequence[str], runs: Sequence[_Run]) -> dict[str, Any]:
    """Each later arm less the first, and the aligned ones less concatenation: paired bootstrap of Recall@10 over users,
    each user's value averaged over seeds (of the simulator, where each seed has its own users: over all of them)."""
    pairs = [(name, arms[0]) for name in arms[1:]]
    pairs += [(name, "concatenation") for name in arms if "concatenation" in arms and name in ALIGNED]

    def recall(name: str) -> np.ndarray:
        values = [np.array(run.measured[name]["recall"]) for run in runs]
        return np.concatenate(values) if runs[0].simulated else np.mean(values, axis=0)

    found = {}
    for a, b in pairs:
        difference = paired_bootstrap(recall(a), recall(b))._asdict()
        found[f"{a} - {b}"] = difference | {"relative": float(recall(a).mean() / recall(b).mean() - 1)}
    return found
