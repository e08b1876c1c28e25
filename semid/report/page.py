"""`write_report`: one self-contained HTML file from the result files of runs. No model is loaded, no network needed.

A run is a folder. It must hold `metrics.json`; every `metrics_*.json` (validation, seen items excluded) adds its rows;
`examples.json`, `dataset/`, `catalog/` and every subfolder with a `history.jsonl` add their sections if they are there.
A subfolder with a `request.json` holds the checkpoints of a training that goes on; any other must be an artifact.
The template says how things look, this module what is shown.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from semid import artifacts
from semid.catalog import CATALOG_FILE, SemanticCatalog
from semid.errors import SemidError
from semid.report.catalog import Items, comparison, learned, safe, tree, usage

if TYPE_CHECKING:
    import jinja2

MAX_TILES = 3_000  # these two are of all runs together: they keep the page quick and the file below 6 MB
MAX_IMAGE_BYTES = 3_000_000
MAX_CURVE_POINTS = 400
MAX_EXAMPLES = 12
MAX_HISTORY = 12
_NO_CURVES = {"stage", "step", "epoch", "seconds", "time", "elapsed"}
_IN_HEADINGS = {"dataset", "split", "exclude_seen"}  # of each table: a run may hold rows of both kinds
_WORDS = {"ndcg": "NDCG", "mrr": "MRR", "code_recall": "Code-level recall", "code_ndcg": "Code-level NDCG"}


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of `runs` to the HTML file `out` and return its path.

    Raises SemidError for no run, a run without `metrics.json`, an unreadable file, or a damaged artifact.
    """
    if not runs:
        raise SemidError("report: expected at least one run folder, got none; name folders that hold metrics.json")
    out = artifacts.try_file(out)
    plotly_js = _plotly()
    sections = [_section(name, artifacts.fetched(run), len(runs)) for name, run in zip(_names(runs), runs, strict=True)]
    page = _template().render(
        title=", ".join(dict.fromkeys(section["dataset"] for section in sections)),
        runs=sections,
        tables=_tables(sections),
        learned=_learned(sections),
        plotly_js=plotly_js,
    )
    return _write(out, page)


def _plotly() -> str:
    """Source of plotly.js. Raises SemidError where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise SemidError(f"the report's charts need plotly ({error}): pip install 'semid[report]'") from None
    return get_plotlyjs()


def _template() -> jinja2.Template:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    # Titles come from anywhere: everything is escaped, and a name that the template misspells is an error.
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")


def _write(out: Path, page: str) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    with artifacts.replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # JSON can hold halves of characters
    return out


def _names(runs: Sequence[str | Path]) -> list[str]:
    """Folder names, or the paths as given where two folders have the same name."""
    names = [artifacts.resolved(run).name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _section(name: str, run: Path, num_runs: int) -> dict[str, Any]:
    """All that the page shows of one run."""
    first = _result(run / "metrics.json")
    others = [_result(file) for file in sorted(run.glob("metrics_*.json"))]
    for other in others:  # what differs is all that is worth saying again
        stated = other["provenance"].items()
        other["provenance"] = {key: value for key, value in stated if first["provenance"].get(key) != value}
    examples = _verified(run / "examples.json", [result["files"] for result in (first, *others)])
    made = _artifacts(run, first["models"])
    named = (entry["manifest"].config.get("name") for entry in made if entry["manifest"].kind == "dataset")
    items, codes = Items.read(run / "dataset" / "items.parquet"), run / "catalog" / CATALOG_FILE
    catalog = SemanticCatalog.read(codes) if codes.is_file() else None
    health_file = run / "catalog" / "health.json"
    health = artifacts.read_json(health_file) if health_file.is_file() else {}
    return {
        "name": name,
        "dataset": first["dataset"] or _plain(next(named, None) or name),
        "results": [first, *others],
        "curves": _curves(run),
        "levels": usage(health, tie_break=catalog.tie_break) if catalog else [],
        "health": _health(health),
        "learned": learned(health),
        "tree": tree(catalog, items, MAX_TILES // num_runs) if catalog else None,
        "examples": _examples(examples, catalog, items, MAX_IMAGE_BYTES // num_runs),
        "artifacts": made,
    }


def _result(file: Path) -> dict[str, Any]:
    """The rows of one file, of what they are, and how they were measured."""
    metrics = _metrics(file)
    provenance = dict(metrics.get("provenance") or {})
    return {
        "file": file.name,
        "dataset": _plain(provenance.get("dataset", "")),
        "split": _plain(metrics.get("split", "")),
        "rows": metrics["rows"],
        "files": metrics.get("files") or {},
        "models": _folders(provenance.get("models")),
        "provenance": {key.replace("_", " "): _plain(v) for key, v in provenance.items() if key not in _IN_HEADINGS},
    }


def _folders(models: Any) -> list[str]:
    """Names of the folders of measured models, whose digests stand by their paths."""
    return [name for path in models if (name := Path(path).name)] if isinstance(models, dict) else []


def _metrics(file: Path) -> dict[str, Any]:
    if not file.is_file():
        command = f"semid evaluate --model {file.parent / 'model'} --dataset {file.parent / 'dataset'} --split test"
        raise SemidError(f"{file}: no such file; `{command}` writes it")
    metrics = artifacts.read_sealed(file)
    rows = metrics.get("rows") if isinstance(metrics, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "model" in row for row in rows):
        raise SemidError(f'{file}: expected {{"split": ..., "rows": [{{"model": ..., metrics}}, ...]}}; evaluate again')
    if not all(isinstance(metrics.get(name) or {}, dict) for name in ("provenance", "files")):
        raise SemidError(f"{file}: expected objects under provenance and files; evaluate again")
    return metrics


def _tables(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table for each dataset, split and treatment of seen items: figures of two kinds never meet in one column."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for section, result in ((run, result) for run in sections for result in run["results"]):
        for row in result["rows"]:
            dataset, seen = result["dataset"] or section["dataset"], str(row.get("seen", "included"))
            rows = groups.setdefault((dataset, result["split"], seen), [])
            values = {key: value for key, value in row.items() if key not in ("model", "seen")}
            same = next((r for r in rows if (r["model"], r["values"]) == (row["model"], values)), None)
            if same is None:
                rows.append({"model": row["model"], "values": values, "runs": [section["name"]]})
            elif section["name"] not in same["runs"]:  # a baseline that several runs share is shown once
                same["runs"].append(section["name"])
    return [_table(*key, rows) for key, rows in groups.items()]


def _table(dataset: str, split: str, seen: str, rows: list[dict]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in rows for key in row["values"]))
    ranking = next((c for start in ("ndcg@10", "ndcg@", "recall@") for c in columns if c.startswith(start)), "")
    rows.sort(key=lambda row: (row["model"] == "oracle", -_value(row, ranking, default=0.0)))
    models = [row for row in rows if row["model"] != "oracle"]
    ceiling = max((_value(row, ranking) for row in rows if row["model"] == "oracle"), default=math.nan)
    ranked = [c for c in columns if re.match("recall|ndcg|mrr|hit", c)]
    best = {c: max((_value(row, c, default=-math.inf) for row in models), default=None) for c in ranked}
    runs = {run for row in rows for run in row["runs"]}
    for row in rows:
        share = _value(row, ranking) / ceiling if ceiling > 0 else math.nan
        row["label"] = _label(row, runs)
        row["best"] = bool(ranking) and row in models[:1]
        row["share"] = share if share >= 0 else None
        is_best = {c: row in models and _value(row, c) == best.get(c) for c in columns}
        row["cells"] = [(_format(row["values"].get(c)), is_best[c]) for c in columns]
    return {
        "heading": ", ".join(filter(None, (dataset, split and f"{split} split", f"seen items {seen}"))),
        "columns": [_words(c) for c in columns],
        "rows": rows,
        "ranking": _words(ranking),
        "has_oracle": ceiling > 0,
        "summary": _summary(models, ranking),
        "figures": [_bars(rows, c) for c in columns if re.fullmatch(r"(recall|ndcg)@\d+", c)],
        "wide": any(len(row["label"]) > 12 for row in rows),
    }


def _label(row: dict, runs: set[str]) -> str:
    """The model's name, with its run where the table's runs differ in it."""
    if set(row["runs"]) == runs:
        return str(row["model"])
    return f"{row['model']} ({row['runs'][0] if len(row['runs']) == 1 else str(len(row['runs'])) + ' runs'})"


def _summary(models: Sequence[dict], ranking: str) -> str:
    """One sentence: which model leads, and by how much."""
    if not models or not _value(models[0], ranking, default=0.0):
        return ""
    first, second = models[0], models[1] if len(models) > 1 else None
    text = f"{first['label']} leads with {_words(ranking)} {_format(first['values'][ranking])}"
    if first["share"] is not None:
        text += f", {first['share']:.0%} of what the oracle reaches"
    if second and (rival := _value(second, ranking, default=0.0)):
        text += f", {_value(first, ranking) / rival - 1:.0%} above {second['label']}"
    return text + "."


def _bars(rows: Sequence[dict], column: str) -> dict[str, Any]:
    shown = [row for row in reversed(rows) if _value(row, column) >= 0]  # plotly draws from below
    kinds = ["oracle" if row["model"] == "oracle" else "best" if row["best"] else "other" for row in shown]
    return {
        "kind": "bars",
        "title": _words(column),
        "labels": [safe(row["label"]) for row in shown],
        "values": [_value(row, column) for row in shown],
        "kinds": kinds,
    }


def _curves(run: Path) -> list[dict[str, Any]]:
    """The panels of each subfolder that has a `history.jsonl`, and of each stage that its records name."""
    found = []
    for file in sorted(run.glob("*/history.jsonl")):
        stages: dict[str, list[dict[str, Any]]] = {}
        for record in _read_history(file):
            stages.setdefault(record.get("stage", ""), []).append(record)
        for stage, records in stages.items():
            name = f"{file.parent.name} (unfinished)" if _goes_on(file.parent) else file.parent.name
            title = f"{name}: {stage}" if stage else name
            found.append({"title": title, "figures": _panels(records)})
    return found


def _panels(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses share one panel, ranking metrics on validation another, the levels of one quantity a third."""
    keys = dict.fromkeys(key for record in records for key in record if key not in _NO_CURVES)
    panels: dict[str, list[dict[str, Any]]] = {"Loss": [], "Validation metrics": []}
    for key in keys:
        if points := [(r.get("step", n), r[key]) for n, r in enumerate(records) if _number(r.get(key)) is not None]:
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
    return _words(re.sub(r"[/_]?(level)?[/_]?\d+$", "", quantity))


def _curve(key: str, points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    kept = np.unique(np.linspace(0, len(points) - 1, min(len(points), MAX_CURVE_POINTS)).astype(int))
    x, y = zip(*(points[i] for i in kept), strict=True)
    name = _words(key) if "loss" in key else _words(key.removeprefix("validation/"))
    return {"name": safe(name), "x": x, "y": y}


def _spread(curves: Sequence[dict[str, Any]]) -> float:
    """Largest over smallest value; 0 if they are not all positive."""
    values = [y for curve in curves for y in curve["y"]]
    return max(values) / min(values) if values and min(values) > 0 else 0.0


def _read_history(file: Path) -> list[dict[str, Any]]:
    """The records of a history; a last line that a killed run left unfinished is left out."""
    lines = file.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = artifacts.parse_json(line, where=f"{file}, line {number}")
        except SemidError as error:
            if number < len(lines):
                raise SemidError(f"{error}; delete that line") from None
            break
        if not isinstance(record, dict) or not isinstance(record.get("stage", ""), str):
            raise SemidError(f"{file}, line {number}: not a record of a training log; delete that line")
        records.append(record)
    return records


def _learned(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collaborative information in the codes, all runs of one dataset together."""
    found = [section for section in sections if section["learned"]]
    return [
        {"dataset": name} | comparison({run["name"]: run["learned"] for run in found if run["dataset"] == name})
        for name in dict.fromkeys(run["dataset"] for run in found)
    ]


def _health(health: dict[str, Any]) -> dict[str, str]:
    """The figures of a catalogue's health as a whole, as text."""
    policy = {"Collision policy": health["collisions"]} if "collisions" in health else {}
    numbers = {key: value for key, value in health.items() if _number(value) is not None}
    texts = {_words(key): f"{value:.1%}" if "rate" in key else _format(value) for key, value in numbers.items()}
    return policy | texts


def _verified(file: Path, of_metrics: Iterable[Mapping[str, str]]) -> Path:
    """A file that metrics were written with. Raises SemidError if it is gone, or not what it was then."""
    digests = [files[file.name] for files in of_metrics if file.name in files]
    if digests and not (file.is_file() and artifacts.sha256(file) in digests):
        raise SemidError(f"{file}: not what was written with the metrics next to it; evaluate again")
    return file


def _examples(file: Path, catalog: SemanticCatalog | None, items: Items, image_bytes: int) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    found = artifacts.read_json(file)
    try:
        examples = found[:MAX_EXAMPLES]
        cards = _cards({item_id for example in examples for item_id in _shown(example)}, catalog, items, image_bytes)
        return [_example(example, cards) for example in examples]
    except KeyError as error:
        raise SemidError(f"{file}: an example lacks the key {error}; evaluate again") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise SemidError(f"{file}: not the examples of an evaluation ({error}); evaluate again") from None


def _shown(example: dict[str, Any]) -> list[str]:
    recommended = [entry["item_id"] for entry in example["recommendations"]]
    return [*recommended, example["target"], *example["history"][-MAX_HISTORY:]]


def _cards(
    item_ids: Iterable[str], catalog: SemanticCatalog | None, items: Items, image_bytes: int
) -> dict[str, dict[str, Any]]:
    """Title, image and codes of items, by id."""
    ids = sorted(item_ids)
    tokens = _tokens(ids, catalog) if catalog else {}
    images = items.images(ids, image_bytes)
    rows = zip(ids, items.rows(pa.array(ids, pa.string())), strict=True)
    return {
        i: {"id": i, "title": items.title(row) or i, "image": images.get(i), "tokens": tokens.get(i, [])}
        for i, row in rows
    }


def _tokens(item_ids: Sequence[str], catalog: SemanticCatalog) -> dict[str, list[str]]:
    """Token strings of those items that the catalogue has."""
    rows, known = catalog.find_rows(item_ids)
    return dict(zip(itertools.compress(item_ids, known), catalog.tokens_of(rows[known]), strict=True))


def _example(example: dict[str, Any], cards: dict[str, dict[str, Any]]) -> dict[str, Any]:
    target = cards[example["target"]]
    recommendations = []
    for entry in example["recommendations"]:
        card = cards[entry["item_id"]]
        shared = _shared(card["tokens"], target["tokens"])
        recommendations.append(card | {"score": _number(entry.get("score")), "shared": shared})
    return {
        "user": example["user"],
        "rank": next((n for n, card in enumerate(recommendations, start=1) if card["id"] == target["id"]), None),
        "earlier": max(0, len(example["history"]) - MAX_HISTORY),
        "history": [cards[item_id] for item_id in example["history"][-MAX_HISTORY:]],
        "target": target,
        "recommendations": recommendations,
    }


def _shared(tokens: Sequence[str], target: Sequence[str]) -> int:
    """Number of tokens, from the first on, that are those of the target."""
    pairs = zip(tokens, target, strict=False)
    return next((n for n, (own, wanted) in enumerate(pairs) if own != wanted), min(len(tokens), len(target)))


def _artifacts(run: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """The artifacts in a run's folder, every file verified: `dataset`, `catalog`, the measured models, and what holds a
    manifest, codes or a finished log."""
    files = [file for name in (artifacts.MANIFEST, CATALOG_FILE, "history.jsonl") for file in run.glob(f"*/{name}")]
    folders = {file.parent for file in files} | {run / name for name in ("dataset", "catalog", *models)}
    folders = {folder for folder in folders if folder.is_dir() and not _goes_on(folder)}
    found = {
        folder: artifacts.read_artifact(folder, artifacts.read_manifest(folder).kind) for folder in sorted(folders)
    }
    return [{"folder": folder.name, "manifest": manifest} for folder, manifest in found.items()]


def _goes_on(folder: Path) -> bool:
    """Tell whether a folder holds the checkpoints of a training that is not finished."""
    return (folder / "request.json").is_file()


def _words(key: str) -> str:
    """A metric's key as a reader knows it: ndcg@10 is NDCG@10."""
    name, at, k = key.partition("@")
    return (_WORDS.get(name) or name.replace("_", " ").replace("/", " ").capitalize()) + at + k


def _plain(value: Any) -> str:
    """Any value of a JSON file as text; digests and floats are shortened."""
    if isinstance(value, dict):
        return ", ".join(f"{key} ({_plain(v)})" if _nested(v) else f"{key} {_plain(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ("; " if any(map(_nested, value)) else ", ").join(map(_plain, value))
    if _number(value) is not None:
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    return value[:16] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _number(value: Any) -> float | None:
    """The value if it is a finite number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _value(row: dict, column: str, *, default: float = math.nan) -> float:
    number = _number(row["values"].get(column))
    return default if number is None else number


def _format(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{value:.4f}" if isinstance(value, float) else _plain(value)
