"""`write_report`: one self-contained HTML file from the result files of runs. No model is loaded, no network needed.

A run is a folder. It must hold `metrics.json` or a `metrics_*.json` (validation, seen items excluded), whose rows are
all shown; `users.parquet`, `examples.json`, `dataset/`, `catalog/` and every subfolder with a `history.jsonl` add their
sections if they are there.
A subfolder with a `request.json` holds the checkpoints of a training that goes on; any other must be an artifact.
The template says how things look, this module what is shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from semid import artifacts
from semid.catalog import CATALOG_FILE, SemanticCatalog
from semid.errors import SemidError
from semid.evaluation import users_file
from semid.report.catalog import Items, comparison, learned, tree, usage
from semid.report.curves import curves, goes_on, is_hidden
from semid.report.map import item_map
from semid.report.metrics import metric_tables
from semid.report.text import DASH, formatted, number, plain, words
from semid.report.users import read_users

if TYPE_CHECKING:
    import jinja2

MAX_TILES = 3_000  # these two are of all runs together: they keep the page quick and the file below 6 MB
MAX_IMAGE_BYTES = 3_000_000
MAX_EXAMPLES = 14
MAX_HISTORY = 12
MAX_DIFFERENCES = 60
_RESULTS = (".json", ".jsonl", ".parquet")  # suffixes of the files that it reads
_IN_HEADINGS = {"dataset", "split", "exclude_seen"}  # of each table: a run may hold rows of both kinds
# Datasets of one name that differ in one of these are shown apart.
_IDENTITY = ("users", "items", "interactions", "split_rule", "tie_rule")


def write_report(
    runs: str | Path | Sequence[str | Path], out: str | Path, *, dataset: str | Path | None = None
) -> Path:
    """Write the report of `runs`, or of one run, to the HTML file `out` and return its path.

    Titles, pictures and categories of items are those of a run's folder `dataset`, for runs without one of `dataset`.

    Raises SemidError for no run, a run without metrics, an unreadable file, a damaged artifact, and for an `out` with
    the suffix of a result file.
    """
    runs = [runs] if isinstance(runs, str | Path) else runs
    if not runs:
        raise SemidError("report: expected at least one run folder, got none; name folders that hold metrics.json")
    out = artifacts.try_file(out)
    if out.suffix in _RESULTS:
        raise SemidError(
            f"{out}: the report is an HTML page, and would replace a result file; name it such as report.html"
        )
    plotly_js, folder = _plotly(), None
    if dataset is not None:
        artifacts.read_artifact(folder := artifacts.fetched(dataset), artifacts.Kind.DATASET)
    places = [(name, artifacts.fetched(run)) for name, run in zip(_names(runs), runs, strict=True)]
    sections = [_section(name, run, folder, len(runs)) for name, run in places]
    title = ", ".join(dict.fromkeys(section["dataset"] for section in sections))
    _tell_datasets_apart(sections)
    page = _template().render(
        title=title,
        runs=sections,
        tables=metric_tables(sections),
        learned=_learned(sections),
        differences=_differences(sections),
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
    """Folder names, or the given paths if two folders have the same name."""
    names = [artifacts.resolved(run).name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _tell_datasets_apart(sections: Sequence[dict[str, Any]]) -> None:
    """Add the runs' names to the name of a dataset if several datasets have it."""
    found: dict[str, dict[tuple[str, ...], dict[str, None]]] = {}
    for section, result in ((run, result) for run in sections for result in run["results"]):
        found.setdefault(result["dataset"], {}).setdefault(result["identity"], {})[section["name"]] = None
    for section, result in ((run, result) for run in sections for result in run["results"]):
        if len(datasets := found[result["dataset"]]) > 1:
            names = list(datasets[result["identity"]])
            shared = sum(section["name"] in runs for runs in datasets.values()) > 1  # one run, several datasets
            words = [f"{section['name']}/{result['file']}"] if shared else names
            result["dataset"] += f" ({', '.join(words)})"
    for section in sections:
        section["dataset"] = section["results"][0]["dataset"]


def _section(name: str, run: Path, dataset: Path | None, num_runs: int) -> dict[str, Any]:
    """Everything that the page shows of one run; items are from `dataset` if the run has none."""
    of_test, of_others = run / "metrics.json", sorted(run.glob("metrics_*.json"))
    first, *others = map(_result, [of_test, *of_others] if of_test.is_file() or not of_others else of_others)
    for other in others:  # repeat only what differs
        stated = other["provenance"].items()
        other["provenance"] = {key: value for key, value in stated if first["provenance"].get(key) != value}
    examples = _verified(run / "examples.json", [result["files"] for result in (first, *others)])
    made = _artifacts(run, first["models"])
    for result in (first, *others):
        _check_measured(run, result, made)
    named = (entry["manifest"].config.get("name") for entry in made if entry["manifest"].kind == "dataset")
    first["dataset"] = first["dataset"] or plain(next(named, None) or name)
    for other in others:
        if not other["dataset"]:
            other |= {key: first[key] for key in ("dataset", "identity")}
    own = run / "dataset"
    items = Items.read((own if dataset is None or own.is_dir() else dataset) / "items.parquet")
    catalog = _catalog(run / "catalog")
    of_model = next((_catalog(run / model) for model in first["models"]), None)
    health_file = run / "catalog" / "health.json"
    health = artifacts.read_json(health_file) if health_file.is_file() else {}
    return {
        "name": name,
        "dataset": first["dataset"],
        "results": [first, *others],
        "curves": curves(run),
        "levels": usage(health, tie_break=catalog.tie_break) if catalog else [],
        "health": _health(health),
        "learned": learned(health),
        "tree": tree(catalog, items, MAX_TILES // num_runs) if catalog else None,
        "map": item_map(items, catalog) if catalog else None,
        "examples": _examples(examples, of_model or catalog, items, MAX_IMAGE_BYTES // num_runs),
        "artifacts": made,
    }


def _catalog(folder: Path) -> SemanticCatalog | None:
    """The codes of a catalogue or of a model; None if there are none."""
    file = folder / CATALOG_FILE
    return SemanticCatalog.read(file) if file.is_file() else None


def _result(file: Path) -> dict[str, Any]:
    """The rows of one file, what they are of, and how they were measured."""
    metrics = _metrics(file)
    provenance, files = dict(metrics.get("provenance") or {}), metrics.get("files") or {}
    users = users_file(file)
    return {
        "file": file.name,
        "dataset": plain(provenance.get("dataset", "")),
        "identity": tuple(plain(provenance.get(key, "")) for key in _IDENTITY),
        "split": plain(metrics.get("split", "")),
        "rows": metrics["rows"],
        "files": files,
        "lists": _lists(metrics, file),
        "users": read_users(_verified(users, [files])) if users.name in files else {},
        "models": _folders(provenance.get("models")),
        "other_dataset": bool(provenance.get("trained_on_other_dataset")),
        "provenance": {key.replace("_", " "): plain(v) for key, v in provenance.items() if key not in _IN_HEADINGS},
    }


def _lists(metrics: dict[str, Any], file: Path) -> dict[str, Any]:
    """Metrics of lists; no rows if the file has none."""
    lists = metrics.get("lists") or {"k": 0, "rows": []}
    try:
        for row in lists["rows"]:
            if not _names_model(row):
                raise TypeError("model")
            for key, stated in row.items():
                if key != "model" and not all(isinstance(stated[part], float) for part in ("value", "low", "high")):
                    raise TypeError(key)
        return {**lists, "k": int(lists["k"])}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SemidError(f"{file}: not the metrics of lists of an evaluation ({error!r}); evaluate again") from None


def _names_model(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("model"), str)


def _folders(models: Any) -> dict[str, list[str]]:
    """Digests of the measured models by folder name; the file has them by path."""
    found: dict[str, list[str]] = {}
    for path, digest in models.items() if isinstance(models, dict) else ():
        if name := Path(path).name:
            found.setdefault(name, []).append(digest)
    return found


def _check_measured(run: Path, result: Mapping[str, Any], made: Sequence[Mapping[str, Any]]) -> None:
    """Raise SemidError for a model in the run's folder that is neither the measured one nor its package."""
    for folder, manifest in ((entry["folder"], entry["manifest"]) for entry in made):
        measured = result["models"].get(folder)
        if measured and not {manifest.digest, manifest.parents.get("model")} & set(measured):
            raise SemidError(f"{run / folder}: not the model that {result['file']} measured; evaluate again")


def _metrics(file: Path) -> dict[str, Any]:
    if not file.is_file():
        beside = file.parent / "dataset"
        dataset = beside if beside.is_dir() else "DATASET"
        command = f"semid evaluate --model {file.parent / 'model'} --dataset {dataset} --split test"
        raise SemidError(f"{file}: no such file; `{command}` writes it")
    metrics = artifacts.read_sealed(file)
    rows = metrics.get("rows") if isinstance(metrics, dict) else None
    if not isinstance(rows, list) or not rows or not all(map(_names_model, rows)):
        raise SemidError(f'{file}: expected {{"split": ..., "rows": [{{"model": ..., metrics}}, ...]}}; evaluate again')
    if not all(isinstance(metrics.get(name) or {}, dict) for name in ("provenance", "files")):
        raise SemidError(f"{file}: expected objects under provenance and files; evaluate again")
    return metrics


def _learned(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collaborative information in the codes, for all runs of one dataset."""
    found = [section for section in sections if section["learned"]]
    return [
        {"dataset": name} | comparison({run["name"]: run["learned"] for run in found if run["dataset"] == name})
        for name in dict.fromkeys(run["dataset"] for run in found)
    ]


def _health(health: dict[str, Any]) -> dict[str, str]:
    """The figures of a catalogue's health as a whole, as text."""
    policy = {"Collision policy": health["collisions"]} if "collisions" in health else {}
    numbers = {key: value for key, value in health.items() if number(value) is not None}
    texts = {words(key): f"{value:.1%}" if "rate" in key else formatted(value) for key, value in numbers.items()}
    return policy | texts


def _verified(file: Path, of_metrics: Iterable[Mapping[str, str]]) -> Path:
    """A file that metrics were written with. Raises SemidError if it is missing or has changed."""
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
        share = number(entry.get("graph_share"))
        recommendations.append(card | {"score": number(entry.get("score")), "shared": shared, "graph": share})
    return {
        "user": example["user"],
        "against": _against(example["against"]) if "against" in example else None,
        "rank": next((n for n, card in enumerate(recommendations, start=1) if card["id"] == target["id"]), None),
        "earlier": max(0, len(example["history"]) - MAX_HISTORY),
        "history": [cards[item_id] for item_id in example["history"][-MAX_HISTORY:]],
        "target": target,
        "recommendations": recommendations,
    }


def _against(stated: dict[str, Any]) -> dict[str, Any]:
    """The comparison with another model that is the reason to show a user."""
    ours, theirs = (formatted(number(stated[key])) for key in ("ours", "theirs"))
    better = stated["ours"] > stated["theirs"]
    return {"better": better, "text": f"{words(stated['metric'])} {ours}, {stated['model']} {theirs}"}


def _shared(tokens: Sequence[str], target: Sequence[str]) -> int:
    """Length of the common prefix of the tokens and the target's."""
    pairs = zip(tokens, target, strict=False)
    return next((n for n, (own, wanted) in enumerate(pairs) if own != wanted), min(len(tokens), len(target)))


def _artifacts(run: Path, models: Iterable[str]) -> list[dict[str, Any]]:
    """The artifacts in a run's folder, every file verified: `dataset`, `catalog`, the measured models, and folders with
    a manifest, codes or a finished log."""
    files = [file for name in (artifacts.MANIFEST, CATALOG_FILE, "history.jsonl") for file in run.glob(f"*/{name}")]
    folders = {file.parent for file in files} | {run / name for name in ("dataset", "catalog", *models)}
    folders = {folder for folder in folders if folder.is_dir() and not is_hidden(folder) and not goes_on(folder)}
    found = {
        folder: artifacts.read_artifact(folder, artifacts.read_manifest(folder).kind) for folder in sorted(folders)
    }
    return [{"folder": folder.name, "manifest": manifest} for folder, manifest in found.items()]


def _differences(sections: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Settings and package versions in which the runs' artifacts of one name differ, at most `MAX_DIFFERENCES`."""
    runs = [_settings(section["artifacts"]) for section in sections]
    names = dict.fromkeys(name for settings in runs for name in settings)
    rows = [(name, [settings.get(name, DASH) for settings in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1][:MAX_DIFFERENCES]


def _settings(made: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Every setting of artifacts by its path: model/generator.training.epochs."""
    found: dict[str, str] = {}
    for entry in made:
        manifest = entry["manifest"]
        stated = {**manifest.config, "seed": manifest.seed, "packages": manifest.packages}
        found |= {f"{entry['folder']}/{path}": plain(value) for path, value in _leaves(stated, "")}
    return found


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{path}.{key}" if path else str(key))
