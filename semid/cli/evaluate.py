"""The command `semid evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from semid import artifacts
from semid.cli.console import console
from semid.data import Dataset
from semid.errors import SemidError
from semid.recommender import Recommender, read_spec
from seq_models import RQTransformerConfig

# The family that `semid train` trains unless another is named.
_DEFAULT_FAMILY = RQTransformerConfig.name


@dataclass(frozen=True)
class Evaluate:
    """Measure models, popularity and bigram (and the oracle, where the dataset is simulated)."""

    model: tuple[Path, ...]
    """Model folders."""
    dataset: Path
    """Dataset folder."""
    split: Literal["validation", "test"] = "test"
    """Split to measure on. Choose by validation; read test once."""
    ks: tuple[int, ...] = (5, 10)
    """Cut-offs of the metrics."""
    beam_size: int = 50
    """Beams per user."""
    exclude_seen: bool = False
    """Never recommend an item of the history. Such figures must not be compared with the others."""
    catalog: Path | None = None
    """Catalogue folder of the models: its current version is measured, without what was removed."""
    other_dataset: bool = False
    """Measure on a dataset the model was not trained on; its test targets may have been trained on."""
    out: Path | None = None
    """File to write, with examples.json next to it. None given: metrics.json next to the first model's folder; the name
    gains _validation and _seen_excluded with those options, and no examples are written then."""

    def run(self) -> None:
        from semid.evaluation import against_exact, baselines, compare, example_users, write_metrics

        if not self.model:
            raise SemidError("evaluate: expected at least one model folder after --model, got none")
        out = artifacts.try_file(self.out or self.model[0].absolute().parent / f"metrics{self._suffix}.json")
        examples = artifacts.try_file(out.with_name("examples.json")) if self.out or not self._suffix else None
        dataset = Dataset.load(self.dataset)
        loaded = {path: Recommender.from_pretrained(path, catalog=self.catalog) for path in self.model}
        provenance = self._provenance(dataset, loaded)
        models = {_name(path, self.model): model for path, model in loaded.items()}
        if self.catalog is not None:
            provenance["catalog"] = next(iter(models.values())).catalog.digest
        measured = compare(
            {**models, **baselines(dataset)},
            dataset,
            split=self.split,
            ks=self.ks,
            beam_size=self.beam_size,
            exclude_seen=self.exclude_seen,
        )
        seen = {"seen": "excluded"} if self.exclude_seen else {}
        rows = [{**metrics.row(name), **seen} for name, metrics in measured.items()]
        first = next(iter(models))
        searched = {
            name: against_exact(model, dataset, split=self.split, beam_size=self.beam_size)
            for name, model in models.items()
            if model.codes is not None
        }
        provenance |= {"beam_against_exact": searched}
        console.print(metrics_table(rows, self.ks))
        for name, search in searched.items():
            share = f"{search['exact_top_10_found']:.2%} of the exact top 10 ({search['users']} users)"
            console.print(f"{name}: a beam of {self.beam_size} finds {share}")
        out.parent.mkdir(parents=True, exist_ok=True)
        if examples is not None:  # a folder's examples are those of its metrics.json
            users = example_users(
                models[first], dataset, split=self.split, beam_size=self.beam_size, exclude_seen=self.exclude_seen
            )
            artifacts.write_json(examples, users)
        write_metrics(out, self.split, rows, measured[first].provenance | provenance)
        console.print(f"wrote {out}")

    @property
    def _suffix(self) -> str:
        """Suffix of the file's name for figures other than those of test with seen items included."""
        return "_validation" * (self.split == "validation") + "_seen_excluded" * self.exclude_seen

    def _provenance(self, dataset: Dataset, models: dict[Path, Recommender]) -> dict[str, Any]:
        """The models' digests; raises SemidError for a model of another dataset, unless that is asked for."""
        origins = {str(path): model.origin for path, model in models.items() if model.origin is not None}
        other = {path: origin.manifest.parents.get("dataset", "unknown") for path, origin in origins.items()}
        other = {path: digest for path, digest in other.items() if digest != dataset.digest}
        if other and not self.other_dataset:
            path, digest = next(iter(other.items()))
            raise SemidError(
                f"{path}: trained on dataset digest {digest[:16]}, not on {self.dataset} of {dataset.digest[:16]};"
                " name the one that it was trained on, or measure on this one all the same with --other-dataset"
            )
        digests = {"models": {path: origin.digest for path, origin in origins.items()}}
        return digests | ({"trained_on_other_dataset": other} if other else {})


def metrics_table(rows: Sequence[dict], ks: Sequence[int]) -> Table:
    """Models as lines, the main metrics as columns."""
    shown = {f"{label}@{k}": f"{name}@{k}" for k in ks for label, name in (("R", "recall"), ("N", "ndcg"))}
    shown |= {"MRR": "mrr", f"cover@{max(ks)}": f"coverage@{max(ks)}", "valid": "valid"}
    table = Table("model", *shown, box=box.SIMPLE)  # so that eight columns fit 80 characters
    for row in rows:
        table.add_row(str(row["model"]), *(f"{row[name]:.4f}" for name in shown.values()))
    return table


def _name(path: Path, paths: tuple[Path, ...]) -> str:
    """A model's name in tables: its kind; where two share that, its folder's; else its path."""
    names, folders = [_label(p) for p in paths], [p.name for p in paths]
    own = names[paths.index(path)]
    if names.count(own) == 1:
        return own
    return path.name if folders.count(path.name) == 1 else str(path)


def _label(path: Path) -> str:
    """`semid` for the default family, the family's name for others; sasrec-content is SASRec with content vectors."""
    spec = read_spec(path)
    return "semid" if spec.model.name == _DEFAULT_FAMILY else spec.model.label(num_features=spec.num_features)
