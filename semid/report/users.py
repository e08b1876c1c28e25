"""Every user's accuracies, written by `semid evaluate`: intervals of means, and paired comparisons of models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from semid.arrow import read_parquet
from semid.errors import SemidError
from semid.evaluation import GROUPS, half_width, paired_bootstrap
from semid.report.text import signed


@dataclass(frozen=True)
class UserFigures:
    """Accuracies of one model on every example of a split."""

    examples: pa.Table
    """User and target of each."""
    groups: dict[str, Int[np.ndarray, " n"]]
    """Number of its group in `GROUPS`."""
    values: dict[str, Float[np.ndarray, " n"]]
    """By metric."""

    @cached_property
    def users(self) -> Int[np.ndarray, " n"]:
        """Number of the user of each example."""
        return self.examples["user"].combine_chunks().dictionary_encode().indices.to_numpy()


def read_users(file: Path) -> dict[str, UserFigures]:
    """The figures of each model by name; empty without the file. Raises SemidError for another kind of file."""
    if not file.is_file():
        return {}
    table = read_parquet(file)
    named = [match for name in table.column_names if (match := re.fullmatch(r"((?:recall|ndcg)@\d+):(.+)", name))]
    missing = {"user", "target"} - set(table.column_names)
    if missing or not named:
        lacking = f"the column {sorted(missing)[0]!r}" if missing else "columns such as ndcg@10:MODEL"
        raise SemidError(f"{file}: lacks {lacking}; evaluate again")
    groups = {name: _numbers(table[name], GROUPS[name], file) for name in GROUPS if name in table.column_names}
    models: dict[str, dict[str, Float[np.ndarray, " n"]]] = {}
    for match in named:
        models.setdefault(match[2], {})[match[1]] = table[match[0]].to_numpy().astype(np.float64)
    examples = table.select(["user", "target"])
    return {model: UserFigures(examples, groups, values) for model, values in models.items()}


def _numbers(column: pa.ChunkedArray, names: tuple[str, ...], file: Path) -> Int[np.ndarray, " n"]:
    if not set(column.unique().to_pylist()) <= set(names):
        raise SemidError(f"{file}: expected groups {', '.join(names)}; evaluate again")
    return np.array([names.index(name) for name in column.to_pylist()], np.int64)


def error(figures: UserFigures | None, metric: str, some: Bool[np.ndarray, " n"] | None = None) -> float | None:
    """Half the 95% interval of a model's mean over all or some examples; None if every user's figures are unknown."""
    if figures is None or metric not in figures.values:
        return None
    rows = slice(None) if some is None else some
    return half_width(figures.values[metric][rows], users=figures.users[rows])


def paired(ours: UserFigures, theirs: UserFigures, metrics: tuple[str, ...]) -> dict[str, Any] | None:
    """Differences of two models on the same users, with 95% intervals, and the numbers of users that gain and lose;
    None if they were measured on different users, or by other metrics."""
    if not ours.examples.equals(theirs.examples) or not set(metrics) <= ours.values.keys() & theirs.values.keys():
        return None
    cells, users = [], ours.users
    for metric in metrics:
        found = paired_bootstrap(ours.values[metric], theirs.values[metric], users=users, samples=2_000)
        cells.append(f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]")
    difference = np.bincount(users, ours.values[metrics[-1]] - theirs.values[metrics[-1]])
    return {"cells": cells, "gain": int((difference > 0).sum()), "lose": int((difference < 0).sum())}
