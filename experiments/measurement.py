"""Measurement of finished runs: validation, and test once, in one file per run that later calls read."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import numpy as np

from experiments.budgets import Budget
from experiments.provenance import code, command, machine
from experiments.runner import Run
from semid.artifacts import read_json
from semid.config import difference, to_dict
from semid.data import Dataset
from semid.errors import SemidError
from semid.evaluation import Metrics, Ranker, against_exact, compare
from semid.graphs import ItemGraph
from semid.recommender import Recommender
from semid.stage import run_recorded
from semid.training import on_first

RESULTS = "results.json"


def measured(run: Run, data: Dataset, *, budget: str) -> dict[str, Any]:
    """The results of a run: read from `results.json` in its folder, or measured now and written there.

    Test is measured once per finished run: raises SemidError if it was measured by another request.
    """
    file = run.folder / RESULTS
    request = {
        "experiment": run.name,
        "seed": run.seed,
        "dataset": data.digest,
        "model": run.ranker.digest if isinstance(run.ranker, Recommender | ItemGraph) else run.name,
        "beam_size": run.experiment.beam_size,
    }
    on_first(lambda: _check_first(file, request))
    found: dict[str, Any] = run_recorded(request, file, lambda: _measure(run, data, budget))
    return found


def _check_first(file: Any, request: dict[str, Any]) -> None:
    """Raise SemidError if the file has the results of another request."""
    if not file.is_file():
        return
    record = read_json(file)
    if change := difference(record["request"], request):
        when = record["result"]["provenance"]["measured"]
        raise SemidError(
            f"{file}: test was read on {when} by another request ({change}), and is read once per finished run; "
            "choose another --out"
        )


def _measure(run: Run, data: Dataset, budget: str) -> dict[str, Any]:
    started = time.monotonic()
    rows, provenance = {}, {}
    for label, ranker in _parts(run).items():
        row: dict[str, Any] = {}
        for split in ("validation", "test"):
            included = _compared(run, ranker, data, split, exclude_seen=False)
            left_out = not getattr(ranker, "repeats", True)  # the ranker leaves the history out in any case
            excluded = included if left_out else _compared(run, ranker, data, split, exclude_seen=True)
            row[split] = {"included": included.values, "excluded": excluded.values}
        row["recall@10"] = included.per_example["recall@10"].tolist()  # per test example
        if isinstance(ranker, Recommender) and ranker.codes is not None and budget == Budget.FULL.value:
            row["beam"] = against_exact(ranker, data, split="validation", beam_size=run.experiment.beam_size)
        rows[label], provenance = row, included.provenance
    users = data.splits.examples("test").histories.users
    return {
        "rows": rows,
        **({"users": users.tolist()} if len(np.unique(users)) < len(users) else {}),  # per test example, if repeated
        "provenance": {
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command(),
            **code(),
            "machine": machine(),
            "budget": budget,
            "changed": run.changed,
            "stages": run.made,
            "evaluation_minutes": (time.monotonic() - started) / 60,
            "config": to_dict(run.experiment),
            "evaluation": provenance,
        },
    }


def _parts(run: Run) -> dict[str, Ranker]:
    """The model alone and, if it has a graph, mixed with it, by label."""
    if isinstance(run.ranker, Recommender) and run.ranker.graph is not None:
        return {run.name: run.ranker.with_graph(None), f"{run.name} + graph": run.ranker}
    return {run.name: run.ranker}


def _compared(run: Run, ranker: Ranker, data: Dataset, split: str, *, exclude_seen: bool) -> Metrics:
    options: dict[str, Any] = {"split": split, "beam_size": run.experiment.beam_size, "exclude_seen": exclude_seen}
    return compare({run.name: ranker}, data, **options)[run.name]
