"""`write_report`: one self-contained HTML file from the result files of runs. No model is loaded, no network needed.

A run is a folder. It must hold `metrics.json`; `examples.json`, `dataset/`, `catalog/` and every subfolder with a
`history.jsonl` add their section if they are there.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.offline
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from semid import artifacts
from semid.errors import SemidError

MAX_TREE_NODES = 3_000  # of all runs together: browsers stay quick, the file small
MAX_IMAGE_BYTES = 3_000_000  # of all runs together, before base64
MAX_CURVE_POINTS = 400
MAX_EXAMPLES = 12
MAX_HISTORY = 12
TILE_COLORS = 8
MAJORITY = 0.4  # share of a tile's items that gives the tile its color
_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_NOT_CURVES = {"step", "epoch", "seconds", "time", "elapsed"}
_WORDS = {
    "ndcg": "NDCG",
    "mrr": "MRR",
    "recall": "Recall",
    "code_recall": "Code-level recall",
    "code_ndcg": "Code-level NDCG",
}

Figure = dict[str, Any]  # plotly's JSON; colors are CSS variables, resolved by the page for its color scheme


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of `runs` to the HTML file `out` and return its path.

    Raises SemidError for no run, a run without `metrics.json`, an unreadable file, or a damaged artifact.
    """
    if not runs:
        raise SemidError("report: expected at least one run folder, got none; name the folders that hold metrics.json")
    out = Path(out)
    if out.is_dir():
        raise SemidError(f"{out}: is a folder; name an HTML file to write, such as {out / 'report.html'}")
    sections = [_section(name, Path(path), len(runs)) for name, path in zip(_names(runs), runs, strict=True)]
    datasets = list(dict.fromkeys(section["dataset"] for section in sections))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(
        title=", ".join(datasets), runs=sections, tables=_tables(sections), plotly_js=plotly.offline.get_plotlyjs()
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.writing-{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)
    return out


def _names(runs: Sequence[Path]) -> list[str]:
    """Folder names, or the paths as given where two folders have the same name."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _section(name: str, path: Path, num_runs: int) -> dict[str, Any]:
    """All that the page shows of one run."""
    metrics = _metrics(path)
    provenance = {key: _plain(value) for key, value in (metrics.get("provenance") or {}).items()}
    manifests = _manifests(path)
    items = _Items.read(path)
    catalog = _Catalog.read(path, manifests)
    examples = _examples(path, catalog, items, MAX_IMAGE_BYTES // num_runs)
    return {
        "name": name,
        "dataset": provenance.get("dataset")
        or next((m["config"]["name"] for m in manifests if m["kind"] == "dataset" and "name" in m["config"]), name),
        "split": str(metrics.get("split", "")),
        "rows": metrics["rows"],
        "provenance": provenance,
        "curves": _curves(path),
        "codebook": _codebook(path, catalog) if catalog else None,
        "tree": _tree(catalog, items, MAX_TREE_NODES // num_runs) if catalog else None,
        "examples": examples,
        "artifacts": manifests,
        "pictures": any(
            card["image"] for e in examples for card in (e["target"], *e["history"], *e["recommendations"])
        ),
    }


# ---------------------------------------------------------------------------------------------------------- metrics


def _metrics(path: Path) -> dict[str, Any]:
    file = path / "metrics.json"
    if not file.is_file():
        command = f"semid evaluate --model {path / 'model'} --dataset {path / 'dataset'} --split test"
        raise SemidError(f"{file}: no such file; `{command}` writes it")
    metrics = artifacts.read_json(file)
    rows = metrics.get("rows") if isinstance(metrics, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "model" in row for row in rows):
        raise SemidError(f'{file}: expected {{"split": ..., "rows": [{{"model": ..., metrics}}, ...]}}; evaluate again')
    return metrics


def _tables(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table for each dataset, split and treatment of seen items: figures of two kinds never meet in one column."""
    groups: dict[tuple, list[dict]] = {}
    for section in sections:
        for row in section["rows"]:
            key = (section["dataset"], section["split"], str(row.get("seen", "included")))
            values = {k: v for k, v in row.items() if k not in ("model", "seen")}
            same = [r for r in groups.get(key, []) if r["model"] == row["model"] and r["values"] == values]
            if same:  # a baseline that several runs share is shown once
                same[0]["runs"].append(section["name"])
            else:
                groups.setdefault(key, []).append({"model": row["model"], "runs": [section["name"]], "values": values})
    return [_table(*key, rows) for key, rows in groups.items()]


def _table(dataset: str, split: str, seen: str, rows: list[dict]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in rows for key in row["values"]))
    runs = {run for row in rows for run in row["runs"]}
    primary = _primary(columns)
    oracle = next((row for row in rows if row["model"] == "oracle"), None)
    rows = sorted(rows, key=lambda row: (row is oracle, -(_number(row["values"].get(primary)) or 0.0)))
    models = [row for row in rows if row is not oracle]
    best = {
        c: max((_number(r["values"].get(c)) or -math.inf for r in models), default=None) for c in columns if _rank(c)
    }
    for row in rows:
        row["label"] = _label(row, runs)
        row["share"] = _share(row, oracle, primary)
        row["best"] = bool(primary) and row is models[0] if models else False
        row["cells"] = [
            (_format(row["values"].get(c)), row is not oracle and row["values"].get(c) == best.get(c, ""))
            for c in columns
        ]
    return {
        "dataset": dataset,
        "split": split,
        "seen": seen,
        "columns": [_words(c) for c in columns],
        "rows": rows,
        "wide": any(len(row["label"]) > 12 for row in rows),
        "primary": _words(primary) if primary else "",
        "has_oracle": bool(oracle and primary),
        "summary": _summary(models, primary),
        "figures": [_bars(rows, c, oracle) for c in columns if re.fullmatch(r"(recall|ndcg)@\d+", c)],
    }


def _label(row: dict, runs: set[str]) -> str:
    """The model's name, with its run where the table's runs differ."""
    if runs == set(row["runs"]):
        return row["model"]
    return f"{row['model']} ({row['runs'][0] if len(row['runs']) == 1 else str(len(row['runs'])) + ' runs'})"


def _primary(columns: Sequence[str]) -> str:
    """The metric that ranks models: NDCG@10, or the nearest thing to it."""
    return next((c for p in ("ndcg@10$", "ndcg@", "recall@", "") for c in columns if p and re.match(p, c)), "")


def _rank(column: str) -> bool:
    return re.match(r"(recall|ndcg|mrr|hit)", column) is not None


def _share(row: dict, oracle: dict | None, metric: str) -> float | None:
    ceiling = _number(oracle["values"].get(metric)) if oracle else None
    value = _number(row["values"].get(metric))
    return value / ceiling if ceiling and value is not None else None


def _summary(models: Sequence[dict], metric: str) -> str:
    """One sentence: who leads, by how much."""
    values = [_number(row["values"].get(metric)) for row in models]
    if not values or values[0] is None:
        return ""
    text = f"{models[0]['label']} leads with {_words(metric)} {_format(values[0])}"
    if models[0]["share"] is not None:
        text += f", {models[0]['share']:.0%} of what the oracle reaches"
    if len(values) > 1 and values[1]:
        text += f", and {values[0] / values[1] - 1:.0%} above {models[1]['label']}"
    return text + "."


def _bars(rows: Sequence[dict], metric: str, oracle: dict | None) -> Figure:
    rows = [row for row in reversed(rows) if _number(row["values"].get(metric)) is not None]
    values = [row["values"][metric] for row in rows]
    colors = ["rgba(0,0,0,0)" if r is oracle else f"var(--{'accent' if r['best'] else 'bar'})" for r in rows]
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": [_safe(row["label"]) for row in rows],
        "text": [_format(value) for value in values],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": colors, "line": {"color": "var(--bar)", "width": [1 if r is oracle else 0 for r in rows]}},
        "hovertemplate": "%{y}: %{x:.4f}<extra></extra>",
    }
    top = max(values, default=0.0) * 1.4 or 1.0  # room for the value beside the longest bar
    layout = {
        "height": 70 + 30 * len(rows),
        "bargap": 0.35,
        "xaxis": {"title": {"text": _words(metric)}, "range": [0, top], "nticks": 5, "tickangle": 0},
        "yaxis": {"automargin": True, "showgrid": False, "ticksuffix": "  "},
    }
    return {"title": _words(metric), "data": [bar], "layout": layout}


# ----------------------------------------------------------------------------------------------------------- curves


def _curves(path: Path) -> list[dict[str, Any]]:
    files = sorted(path.glob("*/history.jsonl"))
    return [{"folder": file.parent.name, "figures": figures} for file in files if (figures := _curve_figures(file))]


def _curve_figures(file: Path) -> list[Figure]:
    lines = _read_lines(file)
    panels: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for line in lines for key in line if key not in _NOT_CURVES):
        if any(_number(line.get(key)) is not None for line in lines):
            panels.setdefault(_panel(key), []).append(key)
    order = sorted(panels, key=lambda name: ["loss", "validation"].index(name) if name in ("loss", "validation") else 2)
    return [_curve_figure(name, panels[name], lines) for name in order]


def _panel(key: str) -> str:
    """Losses share one panel, ranking metrics on validation another, the levels of one quantity a third."""
    if "loss" in key:
        return "loss"
    return "validation" if key.startswith("validation/") else re.sub(r"[/_]?(level)?[/_]?\d+$", "", key)


def _curve_figure(name: str, keys: Sequence[str], lines: Sequence[dict]) -> Figure:
    traces, values = [], []
    for index, key in enumerate(keys):
        points = [(line.get("step", n), y) for n, line in enumerate(lines) if (y := _number(line.get(key))) is not None]
        kept = np.unique(np.linspace(0, len(points) - 1, min(len(points), MAX_CURVE_POINTS)).astype(int))
        x, y = zip(*(points[i] for i in kept), strict=True)
        values += y
        label = _words(key.removeprefix("validation/")) if name == "validation" else _safe(key.replace("_", " "))
        line_style = {"color": f"var(--series-{index % 6})", "width": 1.8}
        traces.append({"type": "scatter", "x": x, "y": y, "name": label, "line": line_style})
        traces[-1]["mode"] = "lines+markers" if len(kept) <= 30 else "lines"
        traces[-1]["marker"] = {"size": 4}
    log = name == "loss" and min(values) > 0 and max(values) > 20 * min(values)
    title = {"loss": "Loss", "validation": "Validation metrics"}.get(name, _words(name)) + (
        " (log scale)" if log else ""
    )
    layout = {
        "height": 290,
        "xaxis": {"title": {"text": "Training step"}, "nticks": 6},
        "yaxis": {
            "title": {"text": _words(keys[0]) if len(keys) == 1 and name != "loss" else title},
            "type": "log" if log else "linear",
        },
        "showlegend": len(keys) > 1,
    }
    return {"title": title, "data": traces, "layout": layout}


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a history. A last line that a killed run left unfinished is left out."""
    text = file.read_text(encoding="utf-8")
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            if number == len(text.splitlines()) and not text.endswith("\n"):
                break
            raise SemidError(
                f"{file}, line {number}: not valid JSON ({error}); delete the line or train again"
            ) from None
    return [line for line in lines if isinstance(line, dict)]


# -------------------------------------------------------------------------------------------------- catalogue, items


@dataclass(frozen=True)
class _Catalog:
    """Item ids and codes `[items, level]` of a run; `labels` names the levels."""

    item_ids: pa.Array
    codes: Int[np.ndarray, "items level"]
    level_sizes: Sequence[int]
    tie_break: bool

    @classmethod
    def read(cls, path: Path, manifests: Sequence[dict]) -> _Catalog | None:
        file = path / "catalog" / "catalog.parquet"
        if not file.is_file():
            return None
        table = pq.read_table(file, columns=["item_id", "codes"])
        codes = table["codes"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
        config = next((m["config"] for m in manifests if m["folder"] == "catalog"), {})
        sizes = config.get("level_sizes") or [int(size) + 1 for size in codes.max(axis=0, initial=0)]
        return cls(table["item_id"].combine_chunks(), codes, sizes, bool(config.get("tie_break", False)))

    @property
    def content_levels(self) -> int:
        """Levels that say something of the item: all but a tie-break level."""
        return self.codes.shape[1] - self.tie_break

    def find(self, item_ids: Sequence[str]) -> dict[str, list[int]]:
        """Codes of those items that the catalogue has."""
        rows = pc.index_in(pa.array(item_ids, pa.string()), self.item_ids).to_pylist()
        return {i: self.codes[row].tolist() for i, row in zip(item_ids, rows, strict=True) if row is not None}


@dataclass(frozen=True)
class _Items:
    """Titles and categories of a run's items, in the dataset's row order; empty without a dataset."""

    file: Path | None = None
    item_ids: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    titles: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    categories: list[str | None] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> _Items:
        file = path / "dataset" / "items.parquet"
        if not file.is_file():
            return cls()
        schema = pq.read_schema(file)
        text = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        title = next(
            name for name in ("title", "name", "text", *text) if name in text and name != "item_id" or text == [name]
        )
        category = next((name for name in schema.names if re.search("categor|genre", name, re.IGNORECASE)), None)
        table = pq.read_table(file, columns=list(dict.fromkeys(["item_id", title, *([category] if category else [])])))
        categories = _informative(table[category].to_pylist()) if category else []
        return cls(file, table["item_id"].combine_chunks(), table[title].combine_chunks(), categories)

    def rows(self, item_ids: pa.Array) -> list[int | None]:
        return pc.index_in(item_ids, self.item_ids).to_pylist()

    def title(self, row: int | None, item_id: str) -> str:
        """The item's title, shortened; its id if there is none."""
        text = self.titles[row].as_py() if row is not None else None
        return _short(text or item_id)

    def images(self, item_ids: Iterable[str], limit: int) -> dict[str, str]:
        """Data URIs of the items' images, in the order given, until `limit` bytes are spent."""
        if self.file is None or "image" not in pq.read_schema(self.file).names:
            return {}
        wanted = list(item_ids)
        table = pq.read_table(self.file, columns=["item_id", "image"], filters=[("item_id", "in", wanted)])
        stored = dict(zip(table["item_id"].to_pylist(), table["image"].to_pylist(), strict=True))
        images = {}
        for item_id in wanted:
            data = stored.get(item_id)
            kind = next((kind for magic, kind in _TYPES.items() if data and data.startswith(magic)), None)
            if data and kind and (limit := limit - len(data)) >= 0:
                images[item_id] = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        return images


def _informative(values: list) -> list[str | None]:
    """One category an item. Of paths such as Beauty > Hair Care > Shampoos: the first step that divides the items."""
    paths = [value if isinstance(value, list) else [value] for value in values]
    for step in range(max((len(path) for path in paths), default=0)):
        column = [path[step] if len(path) > step else None for path in paths]
        if Counter(column).most_common(1)[0][1] < 0.8 * len(column):
            return column
    return [path[-1] if path else None for path in paths]


# --------------------------------------------------------------------------------------------------------- codebook


def _codebook(path: Path, catalog: _Catalog) -> dict[str, Any]:
    file = path / "catalog" / "health.json"
    health = artifacts.read_json(file) if file.is_file() else {}
    known = health.get("levels") or []
    facts = {_words(k): _format(v, share="rate" in k) for k, v in health.items() if _number(v) is not None}
    levels = []
    for level, size in enumerate(catalog.level_sizes):
        counts = np.bincount(catalog.codes[:, level], minlength=size)
        shares = counts[counts > 0] / max(1, counts.sum())
        perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
        stated = known[level] if level < len(known) and isinstance(known[level], dict) else {}
        tie_break = catalog.tie_break and level == len(catalog.level_sizes) - 1
        levels.append(
            {
                "name": f"Level {string.ascii_lowercase[level % 26]}" + (" (tie-break)" if tie_break else ""),
                "size": size,
                "used": int((counts > 0).sum()),
                "usage": f"{stated.get('usage', (counts > 0).mean()):.1%}",
                "perplexity": f"{stated.get('perplexity', perplexity):,.1f}",
                "dead": stated.get("dead", int((counts == 0).sum())),
                "figure": _usage(counts),
            }
        )
    return {"levels": levels, "facts": {"Items": f"{len(catalog.codes):,}"} | facts}


def _usage(counts: Int[np.ndarray, " codes"]) -> Figure:
    """Items per code, most used first, beside the even share."""
    ordered = np.sort(counts)[::-1]
    kept = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), MAX_CURVE_POINTS)).astype(int))
    x, y, even = [*kept.tolist(), len(ordered)], [*ordered[kept].tolist(), int(ordered[-1])], float(counts.mean())
    area = {"type": "scatter", "x": x, "y": y, "mode": "lines", "fill": "tozeroy", "name": "items"}
    area |= {
        "line": {"color": "var(--accent)", "width": 1.5, "shape": "hv"},
        "hovertemplate": "%{y} items<extra></extra>",
    }
    line = {"type": "scatter", "x": [0, len(counts)], "y": [even, even], "mode": "lines", "hoverinfo": "skip"}
    line |= {"line": {"color": "var(--muted)", "width": 1, "dash": "dot"}}
    layout = {
        "height": 210,
        "showlegend": False,
        "xaxis": {"title": {"text": "Codes, most used first"}, "nticks": 5, "showgrid": False},
        "yaxis": {"title": {"text": "Items"}, "rangemode": "tozero", "nticks": 4},
    }
    return {"title": "items per code", "data": [area, line], "layout": layout}


# ------------------------------------------------------------------------------------------------- semantic-ID tree


def _tree(catalog: _Catalog, items: _Items, limit: int) -> dict[str, Any] | None:
    if len(catalog.codes) == 0:
        return None
    rows = items.rows(catalog.item_ids)
    colors, legend = _tile_colors([items.categories[r] if r is not None and items.categories else None for r in rows])
    builder = _Treemap(
        catalog,
        colors,
        [entry["name"] for entry in legend],
        lambda row: items.title(rows[row], catalog.item_ids[row].as_py()),
    )
    builder.tile("catalog", "", "All items", np.arange(len(rows)))
    builder.add("catalog", np.arange(len(rows)), level=0, quota=limit - 1)
    return {"figure": builder.figure(), "legend": legend, "note": builder.note()}


def _tile_colors(categories: Sequence[str | None]) -> tuple[Int[np.ndarray, " items"], list[dict[str, Any]]]:
    """A color number for each item: one for each of the most frequent categories, a last one for all others."""
    values, counts = np.unique([value or "" for value in categories], return_counts=True)
    top = [v for v in values[np.argsort(-counts, kind="stable")].tolist() if v][:TILE_COLORS]
    number = {value: index for index, value in enumerate(top)}
    colors = np.asarray([number.get(value or "", len(top)) for value in categories], np.int64)
    return colors, [{"name": _short(v, 40), "color": f"--tile-{i}"} for i, v in enumerate(top)]


@dataclass
class _Treemap:
    """The tree of codes as plotly's lists. Every subtree may use tiles in proportion to its items; the largest groups
    are shown and the others merged into one tile, so that the page stays small for any catalogue."""

    catalog: _Catalog
    colors: Int[np.ndarray, " items"]
    names: Sequence[str]
    title: Callable[[int], str]
    tiles: list[dict[str, Any]] = field(default_factory=list)
    merged: int = 0

    def add(self, parent: str, rows: Int[np.ndarray, " n"], *, level: int, quota: int) -> None:
        """Tiles below `parent` for the items `rows`, which share their first `level` codes: at most `quota`."""
        if level == min(2, self.catalog.content_levels):
            return self.add_items(parent, rows, quota)
        codes, index, counts = np.unique(self.catalog.codes[rows, level], return_inverse=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        kept = len(codes) if len(codes) <= quota else max(0, quota - 1)
        for place in order[:kept]:
            inside = rows[index == place]
            code = f"{string.ascii_lowercase[level % 26]}_{codes[place]}"
            self.tile(f"{parent}/{code}", parent, code, inside)
            self.add(f"{parent}/{code}", inside, level=level + 1, quota=(quota - kept) * len(inside) // len(rows))
        self.merged += len(codes) - kept
        if quota > kept < len(codes):
            rest = rows[np.isin(index, order[kept:])]
            self.tile(f"{parent}/rest", parent, f"{len(codes) - kept:,} more groups", rest)

    def add_items(self, parent: str, rows: Int[np.ndarray, " n"], quota: int) -> None:
        kept = len(rows) if len(rows) <= quota else max(0, quota - 1)
        for row in rows[:kept].tolist():
            self.tile(f"{parent}/item-{row}", parent, self.title(row), np.asarray([row]))
        if kept < min(quota, len(rows)):
            self.tile(f"{parent}/rest", parent, f"{len(rows) - kept:,} more items", rows[kept:])

    def tile(self, name: str, parent: str, label: str, rows: Int[np.ndarray, " n"]) -> None:
        counts = np.bincount(self.colors[rows], minlength=len(self.names) + 1)[: len(self.names)]
        top = int(counts.argmax()) if len(counts) else 0
        pure = len(counts) > 0 and counts[top] >= MAJORITY * len(rows)
        plain = not self.names
        lines = [
            f"<b>{_safe(label)}</b>",
            _codes(self.catalog.codes[rows[0]]) if len(rows) == 1 else f"{len(rows):,} items",
        ]
        lines += [f"{_safe(self.names[top])}: {counts[top] / len(rows):.0%}"] if len(counts) and counts[top] else []
        lines += [f"· {_safe(self.title(row))}" for row in rows[:4].tolist()] if len(rows) > 1 else []
        color = "var(--panel)" if not parent else f"var(--tile-{top})" if pure or plain else "var(--tile-mixed)"
        self.tiles.append(
            {
                "id": name,
                "parent": parent,
                "label": _safe(label),
                "value": len(rows),
                "color": color,
                "text": "<br>".join(lines),
            }
        )

    def figure(self) -> Figure:
        trace = {
            "type": "treemap",
            "ids": [t["id"] for t in self.tiles],
            "parents": [t["parent"] for t in self.tiles],
            "labels": [t["label"] for t in self.tiles],
            "values": [t["value"] for t in self.tiles],
            "hovertext": [t["text"] for t in self.tiles],
            "hovertemplate": "%{hovertext}<extra></extra>",
            "marker": {
                "colors": [t["color"] for t in self.tiles],
                "line": {"width": 1, "color": "var(--paper)"},
                "pad": {"t": 17, "l": 1, "r": 1, "b": 1},
            },
            "branchvalues": "total",
            "texttemplate": "%{label}",
            "maxdepth": 3,
            "tiling": {"pad": 1},
            "textfont": {"color": ["var(--ink)"] + ["#fff"] * (len(self.tiles) - 1)},
            "pathbar": {"thickness": 24},
        }
        return {
            "title": "semantic-ID tree",
            "data": [trace],
            "layout": {"height": 560, "margin": {"l": 0, "r": 0, "t": 0, "b": 0}},
        }

    def note(self) -> str:
        if not self.merged:
            return ""
        return f"The largest groups have {len(self.tiles):,} tiles; {self.merged:,} smaller ones are merged into tiles marked “more”."


# --------------------------------------------------------------------------------------------------------- examples


def _examples(path: Path, catalog: _Catalog | None, items: _Items, image_bytes: int) -> list[dict[str, Any]]:
    file = path / "examples.json"
    examples = artifacts.read_json(file)[:MAX_EXAMPLES] if file.is_file() else []
    shown = list(dict.fromkeys(i for example in examples for i in _shown(example)))
    rows = items.rows(pa.array(shown, pa.string()))
    titles = {item_id: items.title(row, item_id) for item_id, row in zip(shown, rows, strict=True)}
    codes = catalog.find(shown) if catalog else {}
    images = items.images(shown, image_bytes)

    def card(item_id: str, target: str, **more: Any) -> dict[str, Any]:
        own, wanted = more.pop("codes", None) or codes.get(item_id, []), codes.get(target, [])
        shared = next(
            (n for n, (a, b) in enumerate(zip(own, wanted, strict=False)) if a != b), min(len(own), len(wanted))
        )
        tokens = [_token(level, code) for level, code in enumerate(own)]
        texts = {"id": item_id, "title": titles[item_id], "image": images.get(item_id, "")}
        return (
            texts
            | {"shared": "".join(tokens[:shared]), "other": "".join(tokens[shared:]), "hit": item_id == target}
            | more
        )

    return [
        {
            "user": example["user"],
            "rank": next(
                (n for n, r in enumerate(example["recommendations"], 1) if r["item_id"] == example["target"]), 0
            ),
            "earlier": max(0, len(example["history"]) - MAX_HISTORY),
            "history": [card(i, "") for i in example["history"][-MAX_HISTORY:]],
            "target": card(example["target"], example["target"]),
            "recommendations": [
                card(r["item_id"], example["target"], codes=r.get("codes"), score=_number(r.get("score")))
                for r in example["recommendations"]
            ],
        }
        for example in examples
    ]


def _shown(example: dict[str, Any]) -> list[str]:
    recommended = [r["item_id"] for r in example["recommendations"]]
    return [*recommended, example["target"], *example["history"][-MAX_HISTORY:]]


# -------------------------------------------------------------------------------------------------------- artifacts


def _manifests(path: Path) -> list[dict[str, Any]]:
    """The artifacts in a run's folder, each verified."""
    found = []
    for file in sorted(path.glob(f"*/{artifacts.MANIFEST}")):
        kind = artifacts.read_json(file).get("kind", "")
        manifest = artifacts.read_artifact(file.parent, kind)
        found.append(
            {
                "folder": file.parent.name,
                "digest": manifest.digest,
                "kind": kind,
                "config": manifest.config,
                "seed": manifest.seed,
                "created": manifest.created,
                "parents": manifest.parents,
                "files": len(manifest.files),
                "devices": manifest.devices,
            }
        )
    return found


# ------------------------------------------------------------------------------------------------------------- text


def _token(level: int, code: int) -> str:
    return f"<{string.ascii_lowercase[level % 26]}_{code}>"


def _codes(codes: Int[np.ndarray, " level"]) -> str:
    return _safe("".join(_token(level, code) for level, code in enumerate(codes.tolist())))


def _safe(text: Any) -> str:
    """Text for plotly, which would read tags in it."""
    return html.escape(str(text), quote=False)


def _short(text: str, length: int = 72) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _words(key: str) -> str:
    name, at, k = key.partition("@")
    return (_WORDS.get(name) or name.replace("_", " ").replace("/", " ").capitalize()) + at + k


def _plain(value: Any) -> str:
    """A value of the provenance as text."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _number(value: Any) -> float | None:
    """The value if it is a finite number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _format(value: Any, *, share: bool = False) -> str:
    if value is None:
        return "–"
    if share:
        return f"{value:.1%}"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
