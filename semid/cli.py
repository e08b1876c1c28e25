"""The command line: `semid prepare | tokenize | train | evaluate | recommend | catalog | export | export-program |
import-codes | package | report`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from jaxtyping import Bool
from rich import box
from rich.table import Table

from semid import artifacts, catalog_log
from semid.catalog import KIND as CATALOG
from semid.cli_catalog import Catalog, read_item_ids
from semid.cli_export import Export, ExportProgram, ImportCodes
from semid.cli_package import Package
from semid.cli_tokenize import Tokenize
from semid.data.dataset import KIND as DATASET
from semid.data.dataset import Dataset
from semid.errors import SemidError
from semid.generator import GeneratorConfig, train_generator
from semid.prepare import Prepare, console, print_statistics
from semid.recommender import KIND as MODEL
from semid.recommender import Recommender
from semid.training import MeshConfig, join_processes, make_mesh
from seq_models import DenseConfig, EncoderDecoderConfig, FlatDecoderConfig, HybridConfig, RQTransformerConfig


@dataclass(frozen=True)
class _Generator(GeneratorConfig):
    """A GeneratorConfig whose models have their usual names as subcommands."""

    model: (
        Annotated[RQTransformerConfig, tyro.conf.subcommand("rq-transformer")]
        | Annotated[EncoderDecoderConfig, tyro.conf.subcommand("encoder-decoder")]
        | Annotated[FlatDecoderConfig, tyro.conf.subcommand("flat")]
        | Annotated[HybridConfig, tyro.conf.subcommand("hybrid")]
        | Annotated[DenseConfig, tyro.conf.subcommand("sasrec")]
    ) = RQTransformerConfig()
    """Generators of codes: RQ-Transformer, encoder-decoder (TIGER), flat decoder, hybrid (LIGER: a dense head ranks,
    cold items included); or SASRec with full-softmax cross-entropy."""


@dataclass(frozen=True)
class Train:
    """Train a generator (or, with the subcommand sasrec, SASRec) on the dataset's training histories.

    Options of a model follow its name, after all others; `semid train sasrec --help` lists them. Interrupted runs go
    on from their last checkpoint when the same command is given again, on whatever devices there are. On several
    hosts, give each the same command and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """

    dataset: Path
    """Dataset folder."""
    catalog: Path
    """Catalogue folder of the same dataset."""
    out: Path
    """Model folder to write."""
    config: tyro.conf.OmitArgPrefixes[_Generator] = _Generator()
    seed: int = 0
    """Seed of parameters, shuffling and dropout."""
    teacher: Path | None = None
    """Folder of a SASRec model of the same dataset, whose ranking the generator hears (see objective.distillation)."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work."""

    def run(self) -> None:
        parents = {
            "dataset": artifacts.read_artifact(self.dataset, DATASET),
            "catalog": artifacts.read_artifact(self.catalog, CATALOG),
        }
        dataset = Dataset.load(self.dataset)
        print_statistics(dataset)
        catalog = catalog_log.of_items(self.catalog, dataset.item_ids)
        teacher = None
        if self.teacher is not None:
            parents["teacher"] = artifacts.read_artifact(self.teacher, MODEL)
            teacher = Recommender.from_pretrained(self.teacher)
        config, mesh = GeneratorConfig(**vars(self.config)), make_mesh(config=self.mesh)
        train_generator(
            dataset,
            catalog,
            config,
            out=self.out,
            parents=parents,
            seed=self.seed,
            teacher=teacher,
            mesh=mesh,
            tokenizer=self.catalog,
        )
        console.print(f"model: {self.out}")


@dataclass(frozen=True)
class Evaluate:
    """Measure models beside popularity and bigram (and the oracle, where the dataset is simulated)."""

    model: tuple[Path, ...]
    """Model folders."""
    dataset: Path
    """Dataset folder."""
    split: Literal["validation", "test"] = "test"
    """Which examples. Choose by validation; read test once."""
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
    """File to write, with examples.json beside it. None given: metrics.json beside the first model's folder; the name
    gains _validation and _seen_excluded with those options, and no examples are written then."""

    def run(self) -> None:
        from semid.evaluation import write_metrics
        from semid.evaluation.comparison import against_exact, baselines, compare, example_users

        if not self.model:
            raise SemidError("evaluate: expected at least one model folder after --model, got none")
        out = self.out or self.model[0].parent / f"metrics{self._suffix}.json"
        if out.is_dir():
            raise SemidError(f"{out}: is a folder; name the file to write")
        provenance = self._provenance()
        dataset = Dataset.load(self.dataset)
        print_statistics(dataset)
        models = {
            _name(path, self.model): Recommender.from_pretrained(path, catalog=self.catalog) for path in self.model
        }
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
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.out or not self._suffix:  # a folder's examples are those of its metrics.json
            users = example_users(
                models[first], dataset, split=self.split, beam_size=self.beam_size, exclude_seen=self.exclude_seen
            )
            artifacts.write_json(out.with_name("examples.json"), users)
        provenance |= {"beam_against_exact": searched}
        write_metrics(out, self.split, rows, measured[first].provenance | provenance)
        console.print(metrics_table(rows, self.ks))
        for name, search in searched.items():
            share = f"{search['exact_top_10_found']:.2%} of the exact top 10 ({search['users']} users)"
            console.print(f"{name}: a beam of {self.beam_size} finds {share}")
        console.print(f"wrote {out}")

    @property
    def _suffix(self) -> str:
        """What sets the figures apart from those of test with seen items included."""
        return "_validation" * (self.split == "validation") + "_seen_excluded" * self.exclude_seen

    def _provenance(self) -> dict[str, Any]:
        """The models' digests; raises SemidError for a model of another dataset, unless that is asked for."""
        dataset = artifacts.read_artifact(self.dataset, DATASET)
        models = {str(path): artifacts.read_artifact(path, MODEL) for path in self.model}
        other = {path: m.parents.get("dataset", "unknown") for path, m in models.items()}
        other = {path: digest for path, digest in other.items() if digest != dataset.digest}
        if other and not self.other_dataset:
            path, digest = next(iter(other.items()))
            raise SemidError(
                f"{path}: trained on dataset digest {digest[:16]}, not on {self.dataset} of {dataset.digest[:16]};"
                " name the one that it was trained on, or measure on this one all the same with --other-dataset"
            )
        digests = {"models": {path: manifest.digest for path, manifest in models.items()}}
        return digests | ({"trained_on_other_dataset": other} if other else {})


@dataclass(frozen=True)
class Recommend:
    """Recommend items for one history."""

    model: Path
    """Model folder."""
    history: str
    """Item ids, oldest first, separated by commas. Empty: the most popular items of training."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many items."""
    beam_size: int = 50
    """Beams of the search."""
    exclude_seen: bool = False
    """Leave out items of the history."""
    allow: Path | None = None
    """File of item ids, one a line: no other is recommended (what is in stock, say)."""
    deny: Path | None = None
    """File of item ids, one a line, that are not recommended."""
    skip_unknown: bool = False
    """Drop unknown ids from the history, and say how many, instead of stopping."""
    catalog: Path | None = None
    """Catalogue folder whose current version is recommended from: with items appended, without items removed since."""

    def run(self) -> None:
        recommender = Recommender.from_pretrained(self.model, catalog=self.catalog)
        history = [part.strip() for part in self.history.split(",") if part.strip()]
        if self.skip_unknown:
            unknown = int((~recommender.catalog.find_rows(history)[1]).sum()) if history else 0
            if unknown:
                console.print(f"dropped {unknown} unknown of {len(history)} items of the history")
            if history and unknown == len(history):
                console.print("no known item left: the most popular of training")
        top = recommender.recommend(
            [history],
            k=self.k,
            beam_size=self.beam_size,
            exclude_seen=self.exclude_seen,
            allowed=self._allowed(recommender),
            skip_unknown=self.skip_unknown,
        )
        if not top.item_ids[0]:
            console.print("nothing that may be recommended is left: look at --allow, --deny and --exclude-seen")
            return
        table = Table("rank", "item id", "log-probability", "codes")
        tokens = recommender.catalog.tokens_of(recommender.catalog.rows(top.item_ids[0]))
        for rank, (item_id, score, codes) in enumerate(zip(top.item_ids[0], top.scores[0], tokens, strict=False), 1):
            table.add_row(str(rank), item_id, f"{score:.3f}", "".join(codes))
        console.print(table)

    def _allowed(self, recommender: Recommender) -> Bool[np.ndarray, " items"] | None:
        """What the two files leave, None where neither is given."""
        if self.allow is None and self.deny is None:
            return None
        allowed = np.ones(len(recommender.catalog), bool)
        if self.allow is not None:
            allowed &= recommender.allow(read_item_ids(self.allow))
        if self.deny is not None:
            allowed &= ~recommender.allow(read_item_ids(self.deny))
        return allowed


@dataclass(frozen=True)
class Report:
    """Write one offline HTML page from the result files of runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, each with a metrics.json."""
    out: Path | None = None
    """File to write; none given: report.html in the first run's folder."""

    def run(self) -> None:
        from semid.report import write_report

        if not self.runs:
            raise SemidError("report: expected at least one run folder; name folders that hold a metrics.json")
        console.print(f"wrote {write_report(self.runs, self.out or self.runs[0] / 'report.html')}")


Command = (
    Annotated[tyro.conf.OmitArgPrefixes[Prepare], tyro.conf.subcommand("prepare")]
    | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
    | Annotated[tyro.conf.OmitArgPrefixes[Train], tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Recommend, tyro.conf.subcommand("recommend")]
    | Annotated[Catalog, tyro.conf.subcommand("catalog")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[ExportProgram, tyro.conf.subcommand("export-program")]
    | Annotated[ImportCodes, tyro.conf.subcommand("import-codes")]
    | Annotated[Package, tyro.conf.subcommand("package")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Generative recommendation with semantic IDs: prepare, tokenize, train, evaluate, recommend, export, report."""
    command = tyro.cli(
        Command,
        args=arguments,
        prog="semid",
        description=main.__doc__,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.EnumChoicesFromValues),
    )
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            join_processes()
            command.run()
    except (SemidError, OSError) as error:
        print(f"semid: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"semid: {message}", file=sys.stderr)


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
    names, folders = [_kind(p) for p in paths], [p.name for p in paths]
    own = names[paths.index(path)]
    if names.count(own) == 1:
        return own
    return path.name if folders.count(path.name) == 1 else str(path)


def _kind(path: Path) -> str:
    """semid, or the family; sasrec-content is SASRec that reads content vectors beside its ids."""
    spec = artifacts.read_json(path / "config.json")
    if spec["model"]["type"] != "DenseConfig":
        return _KINDS.get(spec["model"]["type"], "semid")
    return "sasrec-content" if spec["num_features"] else "sasrec"


_KINDS = {"EncoderDecoderConfig": "encoder-decoder", "FlatDecoderConfig": "flat", "HybridConfig": "hybrid"}


if __name__ == "__main__":
    main()
