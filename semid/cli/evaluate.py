"""The command `semid evaluate`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from rich import box
from rich.table import Table

from semid import artifacts
from semid.catalog import SemanticCatalog
from semid.cli.choices import PathOrUrl, condition_of, folders_of, load_ranker, load_recommender
from semid.cli.console import console
from semid.data import Dataset, Tags
from semid.errors import SemidError
from semid.evaluation import Metrics, TargetValues
from semid.graphs import ItemGraph
from semid.recommender import Recommender
from seq_models import RQTransformerConfig

# The family that `semid train` trains unless another is named.
_DEFAULT_FAMILY = RQTransformerConfig.name
# Baselines that a model should not fall below, and advice if it does.
_FLOORS = ("popularity", "bigram", "item graph")
_TRY = "try more --epochs, more --dropout or a smaller --dim"
_TRY_OF_GRAPH = "mix it with the graph (`semid train --graph`), or "
_TRY_OF_CODES = "larger --level-sizes of `semid tokenize` where many items share codes, or `semid train sasrec`"
_TRY_OF_DENSE = "or other --features"
# Short names of the metrics of lists, so that all fit 80 characters.
_LISTS = {
    "novelty": "novel",
    "diversity": "divers",
    "code_diversity": "codes",
    "tag_entropy": "tags",
    "calibration_kl": "calib",
    "serendipity": "seren",
    "worst_group": "worst",
    "weak_users": "weak",
}
# Value of a condition that asks for each target's own event, group or text.
_OWN = "own"
# Raise it when the same request comes to give other figures, so that older files are measured again.
_VERSION = 4


@dataclass(frozen=True)
class Evaluate:
    """Measure models, their parts, popularity and bigram (and the oracle, if the dataset is simulated).

    If the file to write already has the metrics of the same models, dataset and options, they are only printed.
    """

    model: tuple[str, ...]
    """Folders of models or item graphs, or org/name of the Hugging Face hub (extra `hub`; then --out is needed)."""
    dataset: PathOrUrl
    """Dataset folder."""
    split: Literal["validation", "test"] = "test"
    """Split to measure on. Choose by validation; read test once."""
    ks: tuple[int, ...] = (5, 10)
    """Cut-offs of the metrics."""
    beam_size: int = 50
    """Beams per user in the search."""
    exclude_seen: bool = False
    """Never recommend an item of the history. These figures are not comparable with others."""
    condition: tuple[str, ...] = ()
    """Condition on the recommended items: event=NAME, group=NAME or text=WORDS, or each target's own: event=own. These
    figures are not comparable with others. None given: no condition."""
    catalog: PathOrUrl | None = None
    """Catalogue folder of the models, to recommend from its current version (FOLDER@3: version 3), without removed
    items."""
    sequences: tuple[str, ...] = ()
    """Catalogue folders of the models' further code sequences, NAME=FOLDER each, that have codes of appended items."""
    tags: str | None = None
    """Column of the items' tags (category, brand, genre), for metrics of lists; none given: the first whose name
    contains category, genre or tag."""
    event_values: dict[str, float] = field(default_factory=dict)
    """Values of the targets' events, EVENT NUMBER, for scores by value (weighted_*, value_*); other events count 0.
    None given: exposure 0, click 1, conversion 2.5, if the dataset has no other events."""
    other_dataset: bool = False
    """Allow a dataset other than the one the model was trained on; its test targets may have been trained on."""
    out: PathOrUrl | None = None
    """File to write, with examples and every user's accuracies next to it: examples.json and users.parquet for
    metrics.json, examples_NAME.json and users_NAME.parquet for NAME.json. None given: metrics.json next to the first
    model's folder; with options that change the figures the name gets a suffix (_validation, _seen_excluded, _catalog,
    _other_dataset, _asked_event-own), and no examples are written."""

    def run(self) -> None:
        from semid.evaluation import examples_file, target_values, users_file

        _ = self._asked  # raises for wrong conditions before any work
        if not self.model:
            raise SemidError("evaluate: expected at least one model folder after --model, got none")
        out = artifacts.try_file(self.out or self._folder() / f"metrics{self._suffix}.json")
        examples = artifacts.try_file(examples_file(out)) if self.out or not self._suffix else None
        companions = [artifacts.try_file(users_file(out)), *([examples] if examples else [])]
        dataset = Dataset.load(self.dataset)
        if self.tags is not None:
            Tags.from_column(dataset.items, self.tags)  # raises for a wrong column before any work
        valued = target_values(dataset, split=self.split, values=self.event_values or None)
        loaded = {path: self._load(path) for path in self.model}
        provenance = self._provenance(dataset, loaded)
        models = {name: loaded[path] for path, name in _names(loaded).items()}
        if self.catalog is not None:
            provenance["catalog"] = next(m.catalog.digest for m in models.values() if isinstance(m, Recommender))
        if self.sequences:
            folders = folders_of(self.sequences)
            provenance["sequences"] = {name: SemanticCatalog.load(folder).digest for name, folder in folders.items()}
        provenance["request"] = self._request(dataset, provenance)
        if before := _measured(out, provenance["request"], companions):
            self._print(before, models, dataset)
            console.print(
                f"{artifacts.shown(str(out))}: measured before, of the same models, dataset and options; skipped"
            )
            return
        self._measure(models, dataset, provenance, out, examples, valued)
        console.print(f"wrote {artifacts.shown(str(out))}")

    def _measure(
        self,
        models: dict[str, Recommender | ItemGraph],
        dataset: Dataset,
        provenance: dict[str, Any],
        out: Path,
        examples: Path | None,
        valued: TargetValues | None,
    ) -> None:
        """Measure, print, write the examples of the first model and then the metrics."""
        from semid.evaluation import (
            against_exact,
            baselines,
            compare,
            compare_lists,
            compare_values,
            half_width,
            main_cutoff,
            user_table,
            write_metrics,
        )

        own, condition = self._asked
        shared: dict[str, Any] = {
            "split": self.split,
            "beam_size": self.beam_size,
            "own": own,
            "condition": condition,
        }
        rankers = {**models, **_parts(models), **baselines(dataset, asked=(*own, *condition))}
        catalog = next((m.catalog for m in models.values() if isinstance(m, Recommender)), None)
        measured = compare(
            rankers,
            dataset,
            **shared,
            ks=self.ks,
            exclude_seen=self.exclude_seen,
            other_dataset=self.other_dataset,
            item_ids=None if catalog is None else catalog.item_ids.filter(pa.array(catalog.active)),
        )
        about = {"seen": "excluded"} if self.exclude_seen else {}
        about |= {"asked": " ".join(sorted(self.condition))} if self.condition else {}
        about |= {"catalog": provenance["catalog"][:12]} if self.catalog is not None else {}
        rows = [{**metrics.row(name), **about} for name, metrics in measured.items()]
        searched = {
            name: against_exact(model, dataset, **shared) for name, model in models.items() if model.codes is not None
        }
        k = main_cutoff(self.ks)
        lists = compare_lists(measured, rankers, dataset, split=self.split, k=k, tags=self.tags)
        values = None if valued is None else compare_values(measured, valued, k=k)
        compared = _accuracies((k,)).values()
        of_user = dataset.splits.examples(self.split).histories.users
        accuracies = {name: measured[name].per_example for name in models}
        half = {
            name: {key: half_width(own[key], users=of_user) for key in compared} for name, own in accuracies.items()
        }
        provenance |= {"beam_against_exact": searched, "half_width_95": half}
        self._print({"rows": rows, "lists": lists, "values": values, "provenance": provenance}, models, dataset)
        first = next(iter(models))
        shown = self._examples(models[first], first, measured, dataset, shared) if examples else None
        provenance = {k: v for k, v in measured[first].provenance.items() if k != "model"} | provenance
        users = user_table(measured, dataset, split=self.split)
        write_metrics(out, self.split, rows, provenance, examples=shown, users=users, lists=lists, values=values)

    def _examples(
        self,
        model: Recommender | ItemGraph,
        name: str,
        measured: Mapping[str, Metrics],
        dataset: Dataset,
        options: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Examples of random users, and of those for whom the model gains or loses most against the best other one."""
        from semid.evaluation import example_users, largest_differences, main_cutoff

        metric = f"ndcg@{main_cutoff(self.ks)}"
        others = [other for other in measured if other not in (name, f"{name} alone", "oracle")]
        rival = max(others, key=lambda other: measured[other].values[metric])
        values = [measured[one].per_example[metric] for one in (name, rival)]
        also = np.concatenate(largest_differences(*values))
        examples = example_users(model, dataset, **options, exclude_seen=self.exclude_seen, also=also.tolist())
        for example, row in zip(examples[len(examples) - len(also) :], also, strict=True):
            ours, theirs = (float(value[row]) for value in values)
            example["against"] = {"model": rival, "metric": metric, "ours": ours, "theirs": theirs}
        return examples

    def _print(
        self,
        content: Mapping[str, Any],
        models: Mapping[str, Recommender | ItemGraph],
        dataset: Dataset,
    ) -> None:
        rows, provenance = content["rows"], content["provenance"]
        console.print(metrics_table(rows, self.ks))
        console.print(lists_table(content["lists"]))
        if values := content.get("values"):
            console.print(values_table(values))
        if unseen := [name for name, model in models.items() if not model.repeats]:
            share = f"{100 * dataset.repeats.share:.3g}% of the training targets stand in their own history"
            console.print(f"{', '.join(unseen)}: items of the history are left out ({share})")
        for name, half in provenance["half_width_95"].items():
            (row,) = (row for row in rows if row["model"] == name)
            named = {short: key for short, key in _accuracies(self.ks).items() if key in half}
            figures = (f"{short} {row[key]:.4f} ± {half[key]:.4f}" for short, key in named.items())
            console.print(f"{name}: {', '.join(figures)} (95% over users)")
        for name, search in provenance["beam_against_exact"].items():
            share = f"{search['exact_top_10_found']:.2%} of the exact top 10 ({search['users']} users)"
            console.print(f"{name}: a beam of {self.beam_size} finds {share}")
        for hint in hints(rows, self.ks):
            console.print(hint)

    def _load(self, path: str) -> Recommender | ItemGraph:
        given = self.catalog is not None or self.sequences
        return load_recommender(path, self.catalog, self.sequences) if given else load_ranker(path)

    def _folder(self) -> Path:
        """The parent folder of the first model. Raises SemidError for a model of the hub."""
        if artifacts.is_repository(self.model[0]):
            raise SemidError(f"{self.model[0]}: a model of the hub has no folder here; name a file with --out")
        return artifacts.place(self.model[0]).absolute().parent

    def _request(self, dataset: Dataset, provenance: Mapping[str, Any]) -> str:
        """Digest of everything that determines the figures."""
        given = {name: getattr(self, name) for name in ("model", "split", "ks", "beam_size", "exclude_seen", "tags")}
        given |= {"event_values": self.event_values} if self.event_values else {}
        # A new key: files written when the request did not include the beam and examples are measured again.
        given |= {"asked": self._asked} if self.condition else {}
        of_models = {name: provenance.get(name) for name in ("models", "catalog")}
        of_models |= {"sequences": provenance["sequences"]} if self.sequences else {}
        return artifacts.sha256_json({"version": _VERSION, "dataset": dataset.digest, **of_models, **given})

    @property
    def _suffix(self) -> str:
        """Suffix of the file's name, unless the figures are those of test with seen items included."""
        chosen = {
            "_validation": self.split == "validation",
            "_seen_excluded": self.exclude_seen,
            "_catalog": self.catalog is not None,
            "_other_dataset": self.other_dataset,
        }
        asked = "".join(f"_{self._slug(word)}" for word in sorted(self.condition))
        return "".join(name for name, is_so in chosen.items() if is_so) + (f"_asked{asked}" if asked else "")

    @staticmethod
    def _slug(word: str) -> str:
        """PART=VALUE as letters, digits and hyphens, with a digest of the word if that loses information."""
        slug = re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:40]
        return slug if slug == word.replace("=", "-", 1) else f"{slug}-{artifacts.sha256_json(word)[:8]}"

    @property
    def _asked(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """Parts of the condition that are each target's own, and the parts that are the same for all."""
        asked = condition_of(self.condition)
        own = tuple(part for part, value in asked.items() if value == _OWN)
        if own and len(own) < len(asked):
            words = " ".join(self.condition)
            raise SemidError(f"--condition {words}: give =own for all parts, or for none")
        return own, {} if own else asked

    def _provenance(self, dataset: Dataset, models: dict[str, Recommender | ItemGraph]) -> dict[str, Any]:
        """The models' digests. Raises SemidError for a model of another dataset, unless --other-dataset allows it."""
        from semid.evaluation import other_datasets

        other = other_datasets(models, dataset, other_dataset=self.other_dataset)
        digests = {"models": {path: model.origin.digest for path, model in models.items() if model.origin is not None}}
        return digests | ({"trained_on_other_dataset": other} if other else {})


def _accuracies(ks: Sequence[int]) -> dict[str, str]:
    """Keys of the accuracies by their short names, R@10 and N@10."""
    return {f"{label}@{k}": f"{name}@{k}" for k in ks for label, name in (("R", "recall"), ("N", "ndcg"))}


def metrics_table(rows: Sequence[dict], ks: Sequence[int]) -> Table:
    """Table of models (rows) and main metrics (columns)."""
    shown = _accuracies(ks)
    shown |= {"MRR": "mrr", f"cover@{max(ks)}": f"coverage@{max(ks)}", "valid": "valid"}
    table = Table("model", *shown, box=box.SIMPLE)  # narrow, so that eight columns fit 80 characters
    for row in rows:
        table.add_row(str(row["model"]), *(f"{row[name]:.4f}" if name in row else "" for name in shown.values()))
    return table


def lists_table(lists: Mapping[str, Any]) -> Table:
    """Table of models (rows) and the list metrics that any model has (columns)."""
    shown = {key: short for key, short in _LISTS.items() if any(key in row for row in lists["rows"])}
    table = Table(f"lists of {lists['k']}", *shown.values(), box=box.SIMPLE)
    for row in lists["rows"]:
        table.add_row(row["model"], *(f"{row[key]['value']:.3f}" if key in row else "" for key in shown))
    return table


def values_table(values: Mapping[str, Any]) -> Table:
    """Table of models (rows) and scores by the value of events (columns), weighted_* and value_*."""
    shown = [f"{reading}_{name}" for reading in ("weighted", "value") for name in ("recall", "ndcg", "score")]
    short = [name.replace("weighted", "w").replace("recall", "R").replace("ndcg", "N") for name in shown]
    worth = ", ".join(f"{event} {value:g}" for event, value in values["values"].items())
    table = Table(f"value@{values['k']}", *short, box=box.SIMPLE, title=f"targets by value: {worth}")
    for row in values["rows"]:
        table.add_row(row["model"], *(f"{row[name]:.4f}" for name in shown))
    return table


def hints(rows: Sequence[dict], ks: Sequence[int]) -> list[str]:
    """One line of advice per model that is below popularity, bigram or an item graph by NDCG@10 (or at the largest
    cut-off)."""
    metric = f"ndcg@{10 if 10 in ks else max(ks)}"
    floors = {str(row["model"]): row[metric] for row in rows if row["model"] in _FLOORS}
    mixed = {row["model"].removesuffix(" alone") for row in rows if row["model"].endswith(" alone")}
    lines = []
    for row in rows:
        above = [f"{name} ({floor:.4f})" for name, floor in floors.items() if row[metric] < floor]
        if above and row["model"] not in (*_FLOORS, "oracle"):
            has_codes = any(name.startswith("code_") for name in row)
            advice = f"{_TRY}, {_TRY_OF_CODES if has_codes else _TRY_OF_DENSE}"
            if row[metric] < floors.get("item graph", 0) and row["model"].removesuffix(" alone") not in mixed:
                advice = _TRY_OF_GRAPH + advice
            lines.append(f"{row['model']}: {metric.upper()} {row[metric]:.4f} is below {' and '.join(above)}; {advice}")
    return lines


def _names(models: Mapping[str, Recommender | ItemGraph]) -> dict[str, str]:
    """Names for tables, by path: the model's kind; if that is ambiguous, the folder's name; else the path."""
    words = {path: (_label(model), Path(path).name) for path, model in models.items()}
    names = {}
    for path, own in words.items():
        others = {word for other, theirs in words.items() if other != path for word in theirs}
        names[path] = next((word for word in own if word not in others | {*_FLOORS[:2], "oracle"}), path)
    return names


def _parts(models: Mapping[str, Recommender | ItemGraph]) -> dict[str, Recommender | ItemGraph]:
    """Parts of models with an item graph: the model without the graph, and the graph alone."""
    mixed = {name: model for name, model in models.items() if isinstance(model, Recommender) and model.graph}
    graphs = {model.graph.digest: model.graph for model in mixed.values() if model.graph is not None}
    given = [model.edges for model in models.values() if isinstance(model, ItemGraph)]
    graphs = {
        digest: graph
        for digest, graph in graphs.items()
        if not any(all(map(np.array_equal, graph.edges, edges)) for edges in given)
    }
    one = len(graphs) == 1 and "item graph" not in models
    alone = {"item graph" if one else f"item graph {digest[:8]}": graph for digest, graph in graphs.items()}
    return {f"{name} alone": model.with_graph(None) for name, model in mixed.items()} | alone


def _label(model: Recommender | ItemGraph) -> str:
    """`semid` for the default family, else the family's name; sasrec-content is SASRec with content vectors."""
    if isinstance(model, ItemGraph):
        return "item graph"
    spec = model.spec
    return "semid" if spec.model.name == _DEFAULT_FAMILY else spec.model.label(num_features=spec.num_features)


def _measured(file: Path, request: str, companions: Sequence[Path]) -> dict[str, Any] | None:
    """The content of a metrics file, if it has this request and the files next to it belong to it; else None."""
    if not file.is_file():
        return None
    try:
        content = artifacts.read_sealed(file)
        if any(artifacts.sha256(other) != content["files"][other.name] for other in companions):
            return None
        complete = "half_width_95" in content["provenance"] and "lists" in content
        return content if complete and content["provenance"]["request"] == request else None
    except (SemidError, OSError, KeyError, TypeError):  # written by something else, or by an earlier version
        return None
