"""Tables and plots of metrics: one per dataset, split and way of measuring, with all runs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semid.evaluation import GROUPS, main_cutoff
from semid.report.lists import About, list_sections
from semid.report.text import formatted, number, number_of, safe, words
from semid.report.users import error, paired

# Main columns, by which models are compared; the others are in a collapsed table.
_MAIN = r"(recall|ndcg|hit)@\d+|mrr|coverage@\d+|gini@\d+"
_GROUP_TITLES = {"activity": "by length of the history", "popularity": "by training count of the target"}
MAX_SERIES = 6  # models in the figures of groups: the best
# Keys about how a row was measured; rows that differ in them are in separate tables.
_MEASURED = {"seen": "seen items {}", "asked": "asked for {}", "catalog": "catalogue {}"}


def metric_tables(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table per dataset, split and way of measuring, so that a column has only comparable figures."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for section, result in ((run, result) for run in sections for result in run["results"]):
        for row in result["rows"]:
            measured = [text.format(row[name]) for name, text in _MEASURED.items() if name in row]
            measured += ["with models trained on another dataset"] * result["other_dataset"]
            key = (result["dataset"], result["split"] and f"{result['split']} split", *measured)
            rows = groups.setdefault(key, [])
            values = {key: value for key, value in row.items() if key != "model" and key not in _MEASURED}
            same = next((r for r in rows if (r["model"], r["values"]) == (row["model"], values)), None)
            if same is None:
                same = {"model": row["model"], "values": values, "runs": [], "file": Path(result["file"]).stem}
                same |= {"users": result["users"].get(row["model"]), "lists": {}}
                rows.append(same)
            if section["name"] not in same["runs"]:  # a baseline of several runs is shown once
                same["runs"].append(section["name"])
            if of_lists := next((r for r in result["lists"]["rows"] if r["model"] == row["model"]), None):
                same["lists"].setdefault(About.read(result["lists"]), of_lists)
    return [_table(", ".join(filter(None, key)), rows) for key, rows in groups.items()]


def _ranking(columns: Sequence[str]) -> str:
    """The column that models are ranked by: NDCG, else recall, at the main cut-off; "" if there is neither."""
    for metric in ("ndcg", "recall"):
        if ks := [int(match[1]) for c in columns if (match := re.fullmatch(rf"{metric}@(\d+)", c))]:
            return f"{metric}@{main_cutoff(ks)}"
    return ""


def _table(heading: str, rows: list[dict]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in rows for key in row["values"]))
    ranking = _ranking(columns)
    rows.sort(key=lambda row: (row["model"] == "oracle", -_value(row, ranking, default=0.0)))
    models = [row for row in rows if row["model"] != "oracle"]
    ceiling = max((_value(row, ranking) for row in rows if row["model"] == "oracle"), default=math.nan)
    runs = {run for row in rows for run in row["runs"]}
    labels = Counter(_label(row, runs) for row in rows)
    for row in rows:
        share = _value(row, ranking) / ceiling if ceiling > 0 else math.nan
        row["label"] = _label(row, runs, by_file=labels[_label(row, runs)] > 1)
        row["best"] = bool(ranking) and row in models[:1]
        row["share"] = share if share >= 0 else None
    shown = [c for c in columns if re.fullmatch(_MAIN, c)]
    others = [c for c in columns if c not in shown and "/" not in c]
    return {
        "heading": heading,
        "main": _cells(rows, shown, models),
        "others": _cells(rows, others, models) if others else None,
        "ranking": words(ranking),
        "has_oracle": ceiling > 0,
        "summary": _summary(models, ranking),
        "paired": _paired(models, ranking),
        "figures": [_dots(rows, c) for c in columns if re.fullmatch(r"(recall|ndcg)@\d+", c)],
        "lists": list_sections(rows),
        "groups": [figure for group in GROUPS if (figure := _groups(rows, columns, group))],
        "wide": any(len(row["label"]) > 12 for row in rows),
    }


def _cells(rows: Sequence[dict], columns: Sequence[str], models: Sequence[dict]) -> dict[str, Any]:
    """A table's head and cells; the best value of a ranking metric is marked."""
    ranked = [c for c in columns if re.match("recall|ndcg|mrr|hit", c)]
    best = {c: max((_value(row, c, default=-math.inf) for row in models), default=None) for c in ranked}
    lines = [
        [(formatted(row["values"].get(c)), row in models and _value(row, c) == best.get(c)) for c in columns]
        for row in rows
    ]
    return {"columns": [words(c) for c in columns], "rows": list(zip(rows, lines, strict=True))}


def _label(row: dict, runs: set[str], *, by_file: bool = False) -> str:
    """The model's name, with its run if there are several in the table, and with its metrics file if `by_file`."""
    of_runs = row["runs"][0] if len(row["runs"]) == 1 else f"{len(row['runs'])} runs"
    parts = [of_runs] * (set(row["runs"]) != runs) + [row["file"]] * by_file
    return f"{row['model']} ({', '.join(parts)})" if parts else str(row["model"])


def _summary(models: Sequence[dict], ranking: str) -> str:
    """One sentence: which model leads, and by how much."""
    if not models or not _value(models[0], ranking, default=0.0):
        return ""
    first, second = models[0], models[1] if len(models) > 1 else None
    text = f"{first['label']} leads with {words(ranking)} {formatted(first['values'][ranking])}"
    if first["share"] is not None:
        text += f", {first['share']:.0%} of what the oracle reaches"
    if second and (rival := _value(second, ranking, default=0.0)):
        text += f", {_value(first, ranking) / rival - 1:.0%} above {second['label']}"
    return text + "."


def _paired(models: Sequence[dict], ranking: str) -> dict[str, Any] | None:
    """The best model compared with each other one on the same users; None if no file has every user's figures."""
    best = models[0] if models else None
    if best is None or best["users"] is None:
        return None
    _, _, cutoff = ranking.partition("@")
    metrics = tuple(c for c in (f"recall@{cutoff}", ranking) if c in best["users"].values)
    found = [(row, paired(best["users"], row["users"], metrics)) for row in models[1:] if row["users"] is not None]
    rows = [difference | {"label": row["label"]} for row, difference in found if difference]
    return {"best": best["label"], "columns": [words(c) for c in metrics], "rows": rows} if rows else None


def _dots(rows: Sequence[dict], column: str) -> dict[str, Any]:
    """A dot per model, with a 95% interval over users if every user's figures are known."""
    shown = [row for row in reversed(rows) if _value(row, column) >= 0]  # plotly draws from below
    kinds = ["oracle" if row["model"] == "oracle" else "best" if row["best"] else "other" for row in shown]
    return {
        "kind": "dots",
        "title": words(column),
        "labels": [safe(row["label"]) for row in shown],
        "values": [_value(row, column) for row in shown],
        "errors": [error(row["users"], column) for row in shown],
        "kinds": kinds,
    }


def _groups(rows: Sequence[dict], columns: Iterable[str], group: str) -> dict[str, Any] | None:
    """Dots of the best models in each group of users."""
    found = [match for c in columns if (match := re.fullmatch(rf"((?:recall|ndcg)@\d+)/{group}_(\w+)", c))]
    if not found:
        return None
    metric = found[0][1]
    names = [match[2] for match in found if match[1] == metric]
    series = []
    for row in rows[:MAX_SERIES]:
        values = [number(row["values"].get(f"{metric}/{group}_{name}")) for name in names]
        errors: list[float | None] = [None] * len(names)
        if row["users"] and group in row["users"].groups:
            members = row["users"].groups[group]
            errors = [error(row["users"], metric, np.equal(members, GROUPS[group].index(n))) for n in names]
        series.append({"name": safe(row["label"]), "values": values, "errors": errors})
    title = f"{words(metric)} {_GROUP_TITLES[group]}"
    return {"kind": "groups", "title": title, "labels": names, "series": series}


def _value(row: dict, column: str, *, default: float = math.nan) -> float:
    return number_of(row["values"], column, default=default)
