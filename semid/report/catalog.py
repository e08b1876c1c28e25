"""The report's parts about a catalogue: its items, codebook usage, collaborative information in the codes, and the tree
of codes."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from semid.catalog import SemanticCatalog, level_name
from semid.data import tag_lists, usual_tag_column
from semid.report.text import DASH, safe

TILE_COLORS = 8
MAJORITY = 0.4  # share of a tile's items that gives the tile its color
MAX_ROWS = 8  # levels of a run in the comparison of what codes know; of more: the first, second, fourth, ..., last
_LEARNED = {  # of health.json: what the report calls it, and whether it is a share
    "neighbors_sharing": ("Neighbors sharing codes", True),
    "popularity_explained": ("Popularity explained", False),
    "usage": ("Codes in use", True),
    "gini": ("Gini", False),
}
_MINUS, _TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
Learned = Mapping[str, Mapping[str, list[float]]]  # "codes" and "content_only": values per level
_IMAGE_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Items:
    """Titles and categories in the dataset's row order; no rows for a run without a dataset."""

    file: Path | None = None
    item_ids: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    titles: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    categories: list[str | None] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Items:
        if not file.is_file():
            return cls()
        schema = pq.read_schema(file)
        texts = [f.name for f in schema if pa.types.is_string(f.type) and f.name != "item_id"]
        title = next((name for name in ("title", "name", "text", *texts) if name in texts), "item_id")
        category = usual_tag_column(schema)
        table = pq.read_table(file, columns=list({"item_id", title, category or title}))
        categories = _dividing(tag_lists(table, category).to_pylist() if category else [None] * table.num_rows)
        return cls(file, table["item_id"].combine_chunks(), table[title].combine_chunks(), categories)

    def rows(self, item_ids: pa.Array) -> list[int | None]:
        """The row of each item, None for unknown ones."""
        return pc.index_in(item_ids, self.item_ids).to_pylist()

    def title(self, row: int | None) -> str | None:
        """The title, shortened."""
        text = " ".join((self.titles[row].as_py() or "").split()) if row is not None else ""
        return (text if len(text) <= 72 else text[:71].rstrip() + "…") or None

    def images(self, item_ids: Sequence[str], limit: int) -> dict[str, str]:
        """Data URIs of the items that have a PNG or JPEG, in the given order, up to `limit` bytes in total."""
        if not item_ids or self.file is None or "image" not in pq.read_schema(self.file).names:
            return {}
        table = pq.read_table(self.file, columns=["item_id", "image"], filters=[("item_id", "in", item_ids)])
        stored = dict(zip(table["item_id"].to_pylist(), table["image"].to_pylist(), strict=True))
        images = {}
        for item_id in item_ids:
            data = stored.get(item_id) or b""
            kind = next((kind for magic, kind in _IMAGE_TYPES.items() if data.startswith(magic)), None)
            if kind and len(data) <= limit:
                limit -= len(data)
                images[item_id] = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        return images


def usage(health: Mapping[str, Any], *, tie_break: bool) -> list[dict[str, Any]]:
    """Sorted item counts, codes in use and perplexity of each level, from `health.json`."""
    levels, found = [], health.get("levels", [])
    for level, entry in enumerate(found):
        size, last = entry["size"], tie_break and level == len(found) - 1
        name = f"Level {level_name(level)}" + (" (tie-break)" if last else "")
        figure = {"kind": "usage", "title": f"{name}: items per code", "size": size, "even": health["items"] / size}
        numbers = {key: entry[key] for key in ("size", "used", "perplexity")}
        levels.append({"name": name, "figure": figure | _steps(np.sort(entry["counts"])[::-1])} | numbers)
    return levels


def learned(health: Mapping[str, Any]) -> Learned:
    """Collaborative information in `health.json`, per level: of the run's "codes", and of "content_only" codes (only
    for aligned ones). Empty if the file has none."""
    found = health.get("collaborative") or {}
    if "codes" not in found:
        return {}
    levels = health["levels"][: len(found["codes"]["usage"])]
    gini = [level["gini"] for level in levels if "gini" in level]
    return {"codes": found["codes"] | {"gini": gini}, "content_only": found.get("content_only") or {}}


def comparison(runs: Mapping[str, Learned]) -> dict[str, Any]:
    """Compare runs in a table and in curves. The table is sorted by level, with one row per run."""
    depth = {name: len(run["codes"]["usage"]) for name, run in runs.items()}
    rows = [
        {"level": level_name(level), "run": name, "cells": _cells(run, level)}
        for level in range(max(depth.values()))
        for name, run in runs.items()
        if level in _shown(depth[name])
    ]
    return {
        "rows": rows,
        "columns": [name for name, _ in _LEARNED.values()],
        "aligned": any(run["content_only"] for run in runs.values()),
        "cut": max(depth.values()) > MAX_ROWS,
        "figures": [_lines(runs, key) for key in ("neighbors_sharing", "popularity_explained")],
    }


def _shown(levels: int) -> set[int]:
    every = range(levels)
    return {n for n in every if levels <= MAX_ROWS or n == levels - 1 or (n + 1).bit_count() == 1}


def _cells(run: Learned, level: int) -> list[tuple[str, str, str]]:
    """For each quantity its value for the codes, for content only, and their ratio, as text."""
    cells = []
    for key, (_, is_share) in _LEARNED.items():
        values = [run[side].get(key, ())[level : level + 1] for side in ("codes", "content_only")]
        own, content = (value[0] if value else None for value in values)
        ratio = own / content if own and content and min(own, content) > 0 else None
        cells.append((_text(own, is_share), _text(content, is_share), f"{ratio:.2f}{_TIMES}" if ratio else DASH))
    return cells


def _text(value: float | None, is_share: bool) -> str:
    if value is None:
        return DASH
    text = f"{100 * value:.3g}%" if is_share else f"{value:.3f}"
    return text.replace("-", _MINUS)


def _lines(runs: Mapping[str, Learned], key: str) -> dict[str, Any]:
    """A line for each run over its levels, and one for each different content-only code."""
    lines: list[dict[str, Any]] = []
    for series, (name, run) in enumerate(runs.items()):
        lines.append({"name": safe(name), "series": series, "y": run["codes"][key]})
        content = run["content_only"].get(key)
        if content and not any(line["series"] is None and line["y"] == content for line in lines):
            lines.append({"name": safe(f"{name}: content only"), "series": None, "y": content})
    title, is_share = _LEARNED[key]
    labels = [level_name(level) for level in range(max(len(line["y"]) for line in lines))]
    return {"kind": "levels", "title": title, "is_share": is_share, "labels": labels, "lines": lines}


def tree(catalog: SemanticCatalog, items: Items, limit: int) -> dict[str, Any]:
    """The first two levels of codes, and the items below them, as at most `limit` tiles of a treemap."""
    rows = items.rows(catalog.item_ids)
    names, colors = numbered_categories([items.categories[row] if row is not None else None for row in rows])
    treemap = _Treemap(catalog, items, rows, names, colors)
    treemap.tile("all", "", "All items", np.arange(len(rows)))
    treemap.add("all", np.arange(len(rows)), level=0, quota=limit - 1)
    columns = {key: [tile[key] for tile in treemap.tiles] for key in treemap.tiles[0]}
    figure = {"kind": "tree", "title": "Tree of semantic IDs"} | columns
    return {"figure": figure, "legend": names, "tiles": len(treemap.tiles), "cut": treemap.cut}


@dataclass
class _Treemap:
    """Collects tiles. A subtree gets tiles in proportion to its items: the largest groups get one each and the others
    share one, so that the page stays small for any catalogue."""

    catalog: SemanticCatalog
    items: Items
    rows: Sequence[int | None]
    names: Sequence[str]
    colors: Int[np.ndarray, " items"]
    tiles: list[dict[str, Any]] = field(default_factory=list)
    cut: bool = False

    def add(self, parent: str, inside: Int[np.ndarray, " n"], *, level: int, quota: int) -> None:
        """At most `quota` tiles below `parent` for the items `inside`, which share their first `level` codes."""
        depth = min(2, self.catalog.num_levels - self.catalog.tie_break)
        if level > depth:
            return
        key = self.catalog.codes[inside, level] if level < depth else inside
        order = np.argsort(key, kind="stable")
        groups = np.split(inside[order], np.flatnonzero(np.diff(key[order])) + 1)
        groups.sort(key=len, reverse=True)
        kept = len(groups) if len(groups) <= quota else max(0, quota - 1)
        for group in groups[:kept]:
            code = f"{level_name(level)}_{self.catalog.codes[group[0], level]}" if level < depth else f"item-{group[0]}"
            self.tile(f"{parent}/{code}", parent, code if level < depth else self.title(int(group[0])), group)
            self.add(f"{parent}/{code}", group, level=level + 1, quota=(quota - kept) * len(group) // len(inside))
        if kept < len(groups):
            self.cut = True
            if quota:
                self.tile(f"{parent}/more", parent, f"{len(groups) - kept:,} more", np.concatenate(groups[kept:]))

    def tile(self, name: str, parent: str, label: str, inside: Int[np.ndarray, " n"]) -> None:
        counts = np.bincount(self.colors[inside], minlength=len(self.names) + 1)[: len(self.names)]
        top = int(counts.argmax()) if counts.any() else -1
        lines = [f"<b>{safe(label)}</b>", f"{len(inside):,} items"]
        if len(inside) == 1:
            lines[1] = safe("".join(self.catalog.tokens_of(inside)[0]))
        if top >= 0:
            lines.append(f"{safe(self.names[top])}: {counts[top] / len(inside):.0%}")
        if len(inside) > 1:
            lines += [f"· {safe(self.title(row))}" for row in inside[:4].tolist()]
        clear = top >= 0 and counts[top] >= MAJORITY * len(inside)
        color = f"var(--tile-{top})" if clear else "var(--tile-mixed)" if self.names else "var(--tile-0)"
        self.tiles.append(
            {"ids": name, "parents": parent, "labels": safe(label), "values": len(inside)}
            | {"colors": color if parent else "var(--panel)", "hovertext": "<br>".join(lines)}
        )

    def title(self, row: int) -> str:
        return self.items.title(self.rows[row]) or self.catalog.item_ids[row].as_py()


def numbered_categories(values: Sequence[str | None]) -> tuple[list[str], Int[np.ndarray, " items"]]:
    """The most frequent categories, and for each item the number of its own; one past the last for all others."""
    names = [name for name, _ in Counter(value for value in values if value).most_common(TILE_COLORS)]
    number = {name: index for index, name in enumerate(names)}
    return names, np.array([number.get(value or "", len(names)) for value in values], np.int64)


def _dividing(values: Sequence[Sequence[str] | None]) -> list[str | None]:
    """One category per item; of paths such as Beauty > Hair Care > Shampoos, the first step that varies."""
    paths: list[Sequence[str | None]] = [value or [None] for value in values]
    for step in range(max((len(path) for path in paths), default=0)):
        column = [path[step] if len(path) > step else None for path in paths]
        if Counter(column).most_common(1)[0][1] < 0.8 * len(column):
            return column
    return [path[-1] if path else None for path in paths]


def _steps(counts: Int[np.ndarray, " codes"], most: int = 400) -> dict[str, list[int]]:
    """Points of the step curve of sorted counts: rank of the code, items."""
    kept = np.unique(np.linspace(0, len(counts) - 1, min(len(counts), most)).astype(int))
    return {"x": [*kept.tolist(), len(counts)], "y": [*counts[kept].tolist(), int(counts[-1])]}
