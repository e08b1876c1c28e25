"""Training curves from `history.jsonl`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semid import artifacts
from semid.errors import SemidError
from semid.report.text import number, safe, words

MAX_CURVE_POINTS = 400
_NO_CURVES = {"stage", "step", "epoch", "seconds", "time", "elapsed", "targets"}


def curves(run: Path) -> list[dict[str, Any]]:
    """The panels of each subfolder with a `history.jsonl`, and of each stage named in its records."""
    found = []
    for file in sorted(file for file in run.glob("*/history.jsonl") if not is_hidden(file.parent)):
        stages: dict[str, list[dict[str, Any]]] = {}
        for record in _read_history(file):
            stages.setdefault(record.get("stage", ""), []).append(record)
        for stage, records in stages.items():
            name = f"{file.parent.name} (unfinished)" if goes_on(file.parent) else file.parent.name
            title = f"{name}: {stage}" if stage else name
            found.append({"title": title, "figures": _panels(records)})
    return found


def is_hidden(folder: Path) -> bool:
    """Tell whether a folder's name marks it as no artifact, such as one that is being written."""
    return folder.name.startswith(".")


def goes_on(folder: Path) -> bool:
    """Tell whether a folder has the checkpoints of an unfinished training."""
    return (folder / "request.json").is_file()


def _panels(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses share one panel, ranking metrics on validation another, the levels of one quantity a third."""
    keys = dict.fromkeys(key for record in records for key in record if key not in _NO_CURVES)
    panels: dict[str, list[dict[str, Any]]] = {"Loss": [], "Validation metrics": []}
    for key in keys:
        if points := [(r.get("step", n), r[key]) for n, r in enumerate(records) if number(r.get(key)) is not None]:
            panels.setdefault(_panel(key), []).append(_curve(key, points))
    return [
        {
            "kind": "curves",
            "title": title if len(curves) > 1 else curves[0]["name"],
            "log": title == "Loss" and _spread(curves) > 20,
            "curves": curves,
        }
        for title, curves in panels.items()
        if curves
    ]


def _panel(key: str) -> str:
    if "loss" in key:
        return "Loss"
    quantity = key.removeprefix("validation/")
    if quantity != key and "/" not in quantity:
        return "Validation metrics"
    return words(re.sub(r"[/_]?(level)?[/_]?\d+$", "", quantity))


def _curve(key: str, points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    kept = np.unique(np.linspace(0, len(points) - 1, min(len(points), MAX_CURVE_POINTS)).astype(int))
    x, y = zip(*(points[i] for i in kept), strict=True)
    name = words(key) if "loss" in key else words(key.removeprefix("validation/"))
    return {"name": safe(name), "x": x, "y": y}


def _spread(curves: Sequence[dict[str, Any]]) -> float:
    """Largest over smallest value; 0 if they are not all positive."""
    values = [y for curve in curves for y in curve["y"]]
    return max(values) / min(values) if values and min(values) > 0 else 0.0


def _read_history(file: Path) -> list[dict[str, Any]]:
    """The records of a history, without a last line that a killed run left incomplete."""
    lines = file.read_bytes().splitlines()
    records = []
    for at, line in enumerate(lines, start=1):
        try:
            record = artifacts.parse_json(line, where=f"{file}, line {at}")
        except SemidError as error:
            if at < len(lines):
                raise SemidError(f"{error}; delete that line") from None
            break
        if not isinstance(record, dict) or not isinstance(record.get("stage", ""), str):
            raise SemidError(f"{file}, line {at}: not a record of a training log; delete that line")
        records.append(record)
    return records
