"""The commands `semid tokenize` and `semid encode`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from semid import artifacts
from semid.alignment import (
    AlignmentConfig,
    CooccurrenceConfig,
    DasConfig,
    DistillConfig,
    LetterConfig,
    PpmiConfig,
    Signal,
    VectorColumn,
)
from semid.artifacts import Manifest
from semid.data.dataset import KIND as DATASET
from semid.data.dataset import Dataset
from semid.errors import SemidError
from semid.lightgcn import LightGCNConfig
from semid.prepare import console
from semid.recommender import KIND as MODEL
from semid.recommender import Recommender
from semid.tokenizer import ProductConfig, RQKmeansConfig, RQVaeConfig, SemanticTokenizer, TokenizerConfig, tokenize
from semid.training import MeshConfig, make_mesh


@dataclass(frozen=True)
class _Tokenizer(TokenizerConfig):
    """A TokenizerConfig whose methods have their usual names as subcommands."""

    method: (
        Annotated[RQVaeConfig, tyro.conf.subcommand("rq-vae")]
        | Annotated[RQKmeansConfig, tyro.conf.subcommand("rq-kmeans")]
        | Annotated[ProductConfig, tyro.conf.subcommand("opq")]
    ) = RQVaeConfig()
    """RQ-VAE, or its training-free siblings."""
    alignment: tyro.conf.Suppress[tuple[AlignmentConfig, ...]] = ()
    signal: tyro.conf.Suppress[Signal] = PpmiConfig()


@dataclass(frozen=True)
class _Alignment:
    """Which alignments, with what; each has its own options."""

    alignment: tuple[Literal["letter", "distill", "cooccurrence", "das"], ...] = ()
    """Collaborative losses of the RQ-VAE's training: items find their collaborative vectors (letter) or equal them
    (distill), find co-consumed items (cooccurrence), or the dual views of users and items (das)."""
    signal: Literal["ppmi", "lightgcn", "model"] = "ppmi"
    """Collaborative vectors for all but cooccurrence: from co-occurrence, by LightGCN, or of the model after
    --teacher."""
    teacher: Path | None = None
    """Folder of a model that `semid train sasrec` wrote on this dataset."""
    ppmi: PpmiConfig = PpmiConfig()
    lightgcn: LightGCNConfig = LightGCNConfig()
    letter: LetterConfig = LetterConfig()
    distill: DistillConfig = DistillConfig()
    cooccurrence: CooccurrenceConfig = CooccurrenceConfig()
    das: DasConfig = DasConfig()

    def blocks(self) -> tuple[AlignmentConfig, ...]:
        """The config blocks of the chosen alignments."""
        return tuple(getattr(self, name) for name in self.alignment)

    def chosen_signal(self) -> Signal:
        """The signal's config. Raises SemidError where a teacher is missing, or has no use."""
        if (self.signal == "model") != (self.teacher is not None):
            raise SemidError("--signal model and --teacher FOLDER go together; give both, or neither")
        if self.teacher and not set(self.alignment) - {"cooccurrence"}:
            raise SemidError("--teacher is for letter, distill and das; name one of them after --alignment")
        signals: dict[str, Signal] = {"ppmi": self.ppmi, "lightgcn": self.lightgcn, "model": VectorColumn(_TEACHER)}
        return signals[self.signal]


# The column of a teacher's item vectors; never tokenized.
_TEACHER = "teacher"


@dataclass(frozen=True)
class Tokenize:
    """Train a tokenizer on the items' vectors (and, aligned, on interactions) and write the catalogue of their codes.

    Options of a method follow its name, after all others; `semid tokenize rq-vae --help` lists them. On several hosts,
    start it as `semid train`.
    """

    dataset: Path
    """Dataset folder."""
    out: Path
    """Catalogue folder to write."""
    config: tyro.conf.OmitArgPrefixes[_Tokenizer] = _Tokenizer()
    alignment: Annotated[_Alignment, tyro.conf.arg(name="")] = _Alignment()
    seed: int = 0
    """Seed of initialization and shuffling."""
    mesh: Annotated[MeshConfig, tyro.conf.arg(name="")] = MeshConfig()
    """How devices share the training of the RQ-VAE."""

    def run(self) -> None:
        signal, teacher = self.alignment.chosen_signal(), self.alignment.teacher
        parents = {"dataset": artifacts.read_artifact(self.dataset, DATASET)}
        dataset = Dataset.load(self.dataset)
        config = TokenizerConfig(**{**vars(self.config), "alignment": self.alignment.blocks(), "signal": signal})
        if teacher:
            parents["teacher"] = _taught_by(teacher, parents["dataset"])
            config = replace(config, columns=config.columns or tuple(dataset.vector_columns))
            model = Recommender.from_pretrained(teacher)
            rows = model.catalog.rows(dataset.item_ids)
            dataset = dataset.with_vectors(_TEACHER, model.item_vectors()[rows])
        tokenize(dataset, config, out=self.out, parents=parents, seed=self.seed, mesh=make_mesh(config=self.mesh))
        _print_health(self.out)


def _taught_by(teacher: Path, dataset: Manifest) -> Manifest:
    """The teacher's manifest. Raises SemidError for one of another dataset: it may know the test items of this one."""
    manifest = artifacts.read_artifact(teacher, MODEL)
    digest = manifest.parents.get("dataset", "unknown")
    if digest != dataset.digest:
        raise SemidError(
            f"{teacher}: trained on dataset digest {digest[:16]}, not on this one of {dataset.digest[:16]}; what is "
            "test here may have been training there; train a teacher on this dataset"
        )
    return manifest


@dataclass(frozen=True)
class Encode:
    """Encode the vectors of Parquet files, of any size, with a catalogue's tokenizer: item_id and codes for each file.

    Items that share all codes stay so. Run again after a stop, it goes on with the files that are missing.
    """

    catalog: Path
    """Catalogue folder that `semid tokenize` wrote."""
    input: tuple[str, ...]
    """Parquet files, or patterns such as 'items/*.parquet'."""
    out: Path
    """Folder to write a file of the same name to, for each."""
    id_column: str = "item_id"
    """Column of the ids."""
    columns: tuple[str, ...] = ()
    """Vector columns, side by side; none given: the tokenizer's, or else all of a file."""

    def run(self) -> None:
        from semid.bulk import count_items, encode_files

        tokenizer = SemanticTokenizer.from_pretrained(self.catalog)
        files = [Path(found) for pattern in self.input for found in sorted(glob(pattern)) or [pattern]]
        started = time.monotonic()
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
            task = progress.add_task("encoding items", total=count_items(files))
            done = encode_files(
                tokenizer,
                files,
                self.out,
                id_column=self.id_column,
                columns=self.columns or None,
                on_items=lambda items: progress.advance(task, items),
            )
        if done.skipped:
            console.print(f"{len(done.skipped)} files were encoded before; skipped")
        rate = done.items / (time.monotonic() - started)
        console.print(f"{self.out}: {done.items:,} items, {rate:,.0f} items per second")


def _print_health(folder: Path) -> None:
    health = artifacts.read_json(folder / "health.json")
    table = Table("level", "codes", "used", "usage", "perplexity", "dead", title="codes")
    for level in health["levels"]:
        numbers = (level["size"], level["used"], f"{level['usage']:.1%}", f"{level['perplexity']:.1f}", level["dead"])
        table.add_row(str(level["level"]), *map(str, numbers))
    console.print(table)
    console.print(
        f"items sharing all codes: {health['collision_rate_before']:.1%} (largest group "
        f"{health['largest_group_before']}), after {health['collisions']} {health['collision_rate_after']:.1%}; "
        f"variance explained {health['explained_variance']:.1%}"
    )
    if shared := {side: of["neighbors_sharing"][0] for side, of in health.get("collaborative", {}).items()}:
        beside = f" ({shared['content_only']:.1%} with content only)" if "content_only" in shared else ""
        console.print(f"co-consumed items sharing the first code: {shared['codes']:.1%}{beside}")
    console.print(f"catalogue: {folder}")
