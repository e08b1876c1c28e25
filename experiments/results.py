"""Datasets and measurements of experiments: written once, read again, and refused where the request is another."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from experiments.layout import read_layout
from semid.artifacts import MANIFEST, read_json, try_file, write_json
from semid.data import Dataset, SourceOrder, TieRule
from semid.data.simulated import SimulatedConfig, simulate
from semid.errors import SemidError
from semid.evaluation import Ranker, baselines, compare
from semid.graphs import ItemGraph
from semid.recommender import Recommender
from semid.stage import run_recorded, store_dataset
from semid.training import on_first

T = TypeVar("T")

SEEN = ("included", "excluded")
COLUMNS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")


def folder_of(experiment: str, out: Path | None, dataset: Path | None, *, ties: TieRule = SourceOrder()) -> Path:
    """Folder for an experiment's results, tried: `out`, or else one named after experiment, dataset and tie rule."""
    name = dataset.resolve().name if dataset else "simulated"
    if ties != SourceOrder():
        name += f"_{ties.description.replace(' ', '_')}"
    return try_file((out or Path("runs") / experiment / name) / "metrics.json").parent


def stored_dataset(
    source: Path | None, path: Path, world: SimulatedConfig, *, ties: TieRule = SourceOrder()
) -> Dataset:
    """The dataset of a folder that `semid prepare` wrote, of a layout folder, or of a simulated world, as an artifact.

    Raises SemidError if `path` holds the dataset of another source, and where `ties` cannot be put in order any more.
    """

    def read() -> Dataset:
        if source is not None and not (source / MANIFEST).is_file():
            return read_layout(source, ties=ties)
        dataset = simulate(world).dataset if source is None else Dataset.load(source)
        if ties not in (SourceOrder(), dataset.ties):
            raise SemidError(f"{source or 'simulated'}: ties are {dataset.ties.description}; prepare it with --ties")
        return dataset

    on_first(lambda: store_dataset(read(), path) and None)
    return Dataset.load(path)


class Minutes:
    """Runs the stages of one seed, each into `out/NAME_SEED`, and keeps the minutes that they took when they ran."""

    def __init__(self, out: Path, seed: int) -> None:
        self._out, self._seed, self._record = out, seed, out / f"minutes_{seed}.json"
        self.minutes: dict[str, float] = read_json(self._record) if self._record.exists() else {}

    def __call__(self, name: str, stage: Callable[[Path], T]) -> T:
        """Run a stage, which skips what is there: it keeps its first time."""
        started = time.monotonic()
        result = stage(self._out / f"{name}_{self._seed}")
        self.minutes.setdefault(name, (time.monotonic() - started) / 60)
        on_first(lambda: write_json(self._record, self.minutes))
        return result


def measure(
    models: Mapping[str, Recommender | ItemGraph], data: Dataset, out: Path, *, seed: int, beam_size: int
) -> dict[str, dict[str, Any]]:
    """Test metrics of models and baselines by name, seen items included and excluded, each kept in a file of `out`.

    An entry has `values` by `SEEN`, the `recall` of every user (seen items included) and `provenance`.
    """
    rankers: dict[str, Ranker] = {**models, **baselines(data)}
    measured = {}
    for name, ranker in rankers.items():
        request = {"dataset": data.digest, "seed": seed, "beam_size": beam_size}
        request["model"] = ranker.digest if isinstance(ranker, Recommender | ItemGraph) else name
        file = out / "measured" / f"{name.replace(' ', '-')}_{seed}.json"
        measured[name] = run_recorded(request, file, functools.partial(_metrics, ranker, data, beam_size))
    return measured


def _metrics(ranker: Ranker, data: Dataset, beam_size: int) -> dict[str, Any]:
    found = {"included": compare({"": ranker}, data, beam_size=beam_size)[""]}
    if getattr(ranker, "repeats", True):
        found["excluded"] = compare({"": ranker}, data, beam_size=beam_size, exclude_seen=True)[""]
    else:  # it leaves them out by itself
        found["excluded"] = found["included"]
    included = found["included"]
    return {
        "values": {seen: metrics.values for seen, metrics in found.items()},
        "recall": included.per_example["recall@10"].tolist(),
        "provenance": included.provenance,
    }


def summarize(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Mean, deviation and values over seeds of every model, seen items included and excluded."""
    entries = []
    for seen in SEEN:
        for name in runs[0]:
            values = [run[name]["values"][seen] for run in runs]
            mean = {key: float(np.mean([value[key] for value in values])) for key in values[0]}
            deviation = {key: float(np.std([value[key] for value in values])) for key in values[0]}
            entries.append({"model": name, "seen": seen, "mean": mean, "std": deviation, "seeds": values})
    return entries


def metrics_rows(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `metrics.json`: the means."""
    return [
        {"model": entry["model"], **entry["mean"], **({"seen": "excluded"} if entry["seen"] == "excluded" else {})}
        for entry in entries
    ]


def print_tables(entries: Sequence[Mapping[str, Any]], *, head: str, seeds: int) -> None:
    """Print the tables of docs/results.md, `head` naming the first column."""
    for seen in SEEN:
        print(f"\nseen items {seen}, mean and standard deviation over {seeds} seeds\n")
        print(f"| {head} | R@5 | N@5 | R@10 | N@10 |\n|---|---|---|---|---|")
        for entry in (entry for entry in entries if entry["seen"] == seen):
            cells = [f"{entry['mean'][key]:.4f} ± {entry['std'][key]:.4f}" for key in COLUMNS]
            print(f"| {entry['model']} | {' | '.join(cells)} |")
