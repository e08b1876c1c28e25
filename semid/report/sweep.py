"""`write_sweep`: one self-contained HTML page about the trials of a sweep."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semid import artifacts
from semid.errors import SemidError
from semid.report.text import safe

_COLUMNS = 3
_BLUE, _GRAY = "#2f6db5", "#9aa5b1"


def write_sweep(
    out: Path, metric: str, trials: Sequence[tuple[int, float, Mapping[str, Any]]], importances: Mapping[str, float]
) -> Path:
    """Write the page: importances of the fields, values in the order of trials, and by the values of each field.

    A trial is its number, its value of `metric` and its fields.
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise SemidError(f"the page's charts need plotly ({error}): pip install 'semid[sweep]'") from None
    fields = sorted(trials[0][2], key=lambda name: -importances.get(name, 0.0))
    rows = 1 + -(-len(fields) // _COLUMNS)
    titles = ["importance", f"{metric}, by trial", *map(_label, fields)]
    shape: list[list[Any]] = [[{}, {"colspan": 2}, None], *([{}] * _COLUMNS for _ in range(rows - 1))]
    figure = make_subplots(rows=rows, cols=_COLUMNS, specs=shape, subplot_titles=titles, vertical_spacing=0.3 / rows)
    _add_importances(figure, importances)
    _add_course(figure, trials)
    for at, name in enumerate(fields):
        _add_field(figure, name, trials, row=2 + at // _COLUMNS, col=1 + at % _COLUMNS)
    best = max(trials, key=lambda trial: trial[1])
    figure.update_layout(
        title=f"{len(trials)} trials; best {metric} {best[1]:.4f} (trial {best[0]})",
        template="plotly_white",
        showlegend=False,
        height=320 * rows,
    )
    with artifacts.replacing(out) as temporary:
        temporary.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")
    return out


def _add_importances(figure: Any, importances: Mapping[str, float]) -> None:
    ranked = sorted(importances.items(), key=lambda one: one[1])  # plotly draws from below
    figure.add_bar(
        x=[value for _, value in ranked],
        y=[_label(name) for name, _ in ranked],
        orientation="h",
        marker_color=_BLUE,
        row=1,
        col=1,
    )
    if not ranked:
        figure.add_annotation(text="too few trials", showarrow=False, row=1, col=1)


def _add_course(figure: Any, trials: Sequence[tuple[int, float, Mapping[str, Any]]]) -> None:
    numbers, values = [number for number, *_ in trials], [value for _, value, _ in trials]
    figure.add_scatter(x=numbers, y=values, mode="markers", marker_color=_GRAY, row=1, col=2)
    best = list(itertools.accumulate(values, max))
    figure.add_scatter(x=numbers, y=best, mode="lines", line={"shape": "hv", "color": _BLUE}, row=1, col=2)


def _add_field(
    figure: Any, name: str, trials: Sequence[tuple[int, float, Mapping[str, Any]]], *, row: int, col: int
) -> None:
    x = [fields[name] for *_, fields in trials]
    marker = {"color": [number for number, *_ in trials], "colorscale": "Blues", "cmin": -len(trials) / 2}
    figure.add_scatter(x=x, y=[value for _, value, _ in trials], mode="markers", marker=marker, row=row, col=col)
    numbers = [value for value in x if isinstance(value, (int, float))]
    if len(numbers) == len(x) and min(numbers) > 0 and max(numbers) / min(numbers) > 20:
        figure.update_xaxes(type="log", row=row, col=col)


def _label(name: str) -> str:
    return safe(name.removeprefix("train."))
