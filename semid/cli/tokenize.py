"""The command `semid tokenize`: trains a tokenizer on a dataset, or encodes files with a trained one."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from semid import artifacts
from semid.catalog import Collisions
from semid.cli.choices import PathOrUrl, print_chosen, subcommands
from semid.cli.console import console
from semid.config import choices
from semid.data import Dataset
from semid.errors import SemidError
from semid.graphs import AlphaRecConfig, PpmiConfig, Signal, VectorColumn
from semid.progress import show_progress
from semid.recommender import Recommender
from semid.tokenizers import (
    HEALTH_FILE,
    AlignmentConfig,
    RQVaeConfig,
    SemanticTokenizer,
    TokenizerConfig,
    TokenizerMethod,
    tokenize,
)
from semid.training import MeshConfig, TrainingConfig, make_mesh

# Options of training have no prefix (--epochs); those of schedules do (--temperature.value).
tyro.conf.configure(tyro.conf.OmitArgPrefixes)(TrainingConfig)


@dataclass(frozen=True)
class _Tokenizer(TokenizerConfig):
    """A TokenizerConfig with its methods as subcommands."""

    method: Annotated[TokenizerMethod, subcommands(TokenizerMethod, first="rq-vae")] = RQVaeConfig()
    """RQ-VAE, or a method without training."""
    alignment: tyro.conf.Suppress[tyro.conf.Fixed[tuple[AlignmentConfig, ...]]] = ()
    signal: tyro.conf.Suppress[tyro.conf.Fixed[Signal]] = PpmiConfig()


# The column of a teacher's item vectors; never tokenized.
_TEACHER = "teacher"
_ALIGNMENTS = choices(AlignmentConfig)
_SIGNALS = {name: cls for name, cls in choices(Signal).items() if cls is not VectorColumn}
# One field per signal and alignment, named like it, with its options.
_Options: Any = make_dataclass(
    "_Options", [(name, cls, cls()) for name, cls in (_SIGNALS | _ALIGNMENTS).items()], frozen=True
)


@dataclass(frozen=True)
class _Alignment(_Options):
    """Alignments of the RQ-VAE's training, and the signal they use; each has its own options."""

    alignment: tuple[Literal[tuple(_ALIGNMENTS)], ...] = ()  # type: ignore[valid-type]  # all subclasses there are
    """Collaborative losses of the RQ-VAE's training: items find their collaborative vectors (letter), equal them
    (distill) or their latents (match), find co-consumed items (cooccurrence), or the dual views of users and items
    (das)."""
    signal: Literal[(*_SIGNALS, "model")] = PpmiConfig.name  # type: ignore[valid-type]
    """Collaborative vectors for all alignments but cooccurrence: from co-occurrence (ppmi), by a graph model (lightgcn,
    freedom, bm3, mmhcl, cm3), by AlphaRec's map of content, or of the model given by --teacher (model)."""
    teacher: str | None = None
    """Folder (or org/name of the Hugging Face hub) of a model that `semid train sasrec` wrote on this dataset."""

    def blocks(self) -> tuple[AlignmentConfig, ...]:
        """Config blocks of the chosen alignments."""
        return tuple(getattr(self, name) for name in self.alignment)

    def chosen_signal(self) -> Signal:
        """The signal's config. Raises SemidError if a teacher is missing, or a teacher, signal or option is unused."""
        if (self.signal == "model") != (self.teacher is not None):
            raise SemidError("--signal model and --teacher FOLDER go together; give both, or neither")
        option = "--teacher" if self.teacher else f"--signal {self.signal}"
        users = [name for name, cls in _ALIGNMENTS.items() if "vectors" in cls.needs]
        is_read = not set(users).isdisjoint(self.alignment)
        if self.signal != PpmiConfig.name and not is_read:
            raise SemidError(f"{option} is for {', '.join(users)}; name one of them after --alignment")
        in_use = {*self.alignment, self.signal if is_read else ""}
        for name in [name for name in _SIGNALS | _ALIGNMENTS if name not in in_use]:
            if given := _changed(getattr(self, name), getattr(_Options(), name)):
                needed = f"--alignment {name}"
                if name in _SIGNALS:
                    needed = f"--signal {name} with --alignment {'|'.join(users)}"
                raise SemidError(f"--{name}.{given.replace('_', '-')} is for {needed}; give that, or leave it out")
        if self.signal == AlphaRecConfig.name and self.alpharec.seed:
            raise SemidError("--alpharec.seed is for `semid vectors alpharec`; a signal is trained with --seed")
        return VectorColumn(_TEACHER) if self.signal == "model" else getattr(self, self.signal)


@dataclass(frozen=True)
class _Files:
    """Files of items to encode, of any number and size, and the processes that encode them."""

    catalog: PathOrUrl | None = None
    """Catalogue folder whose tokenizer encodes the files of --input; nothing is trained."""
    input: tuple[str, ...] = ()
    """Files of items, folders of parts, or patterns such as 'items/*.parquet', with the tokenizer's vector columns or
    the raw columns that its encoders read. Parquet by path or any URL of fsspec (s3://...); CSV, TSV and JSONL by local
    path."""
    id_column: str = "item_id"
    """Column of the ids."""
    scheduler: str = "local"
    """Encoding processes: this one (local), or the workers of a Dask cluster, by its scheduler's tcp://HOST:PORT."""
    retries: int = 2
    """Number of retries for a file after a failure of disk or network."""
    new_catalog: PathOrUrl | None = None
    """Catalogue folder to write, with all items sorted by id; DuckDB resolves collisions. Its tie-breaks are new, so
    train a model on it; to extend a catalogue in use, run `semid catalog append` instead."""
    memory_limit: str = "1GiB"
    """Memory of DuckDB, which spills the rest to disk."""

    def encode(self, out: str, *, columns: tuple[str, ...] | None, collisions: Collisions) -> None:
        """Write a file of codes to `out` for each input file, and the catalogue of all with --new-catalog."""
        from semid.bulk import check_catalog, encode_files, write_catalog
        from semid.data.storage import absolute, find_all

        if self.catalog is None or not self.input:
            raise SemidError("--catalog FOLDER (the tokenizer) and --input FILES (the items) go together; give both")
        if not self.new_catalog:
            self._check_no_catalog(collisions)
        resolved: dict[str, Any] = {
            "tokenizer": self.catalog,
            "collisions": collisions,
            "memory_limit": self.memory_limit,
        }
        if self.new_catalog:  # before hours of encoding
            if f"{absolute(out)}/".startswith(f"{absolute(self.new_catalog)}/"):
                what = f"--new-catalog {self.new_catalog}: would hold the files of codes (--out {out})"
                raise SemidError(f"{what}; choose a folder of its own")
            check_catalog(self.new_catalog, **resolved)
        tokenizer = SemanticTokenizer.from_pretrained(self.catalog)
        files = find_all(self.input)
        started, items = time.monotonic(), 0
        with show_progress("encoding", total=len(files), unit="files") as progress:

            def advance(new: int, done: int) -> None:
                nonlocal items
                items += new
                rate = items / (time.monotonic() - started)
                progress.advance(progress.done + done, f"{items:,} items, {rate:,.0f} items/s")

            encoded = encode_files(
                tokenizer,
                files,
                out,
                id_column=self.id_column,
                columns=columns,
                scheduler=self.scheduler,
                retries=self.retries,
                on_progress=advance,
            )
        if encoded.skipped:
            console.print(f"{len(encoded.skipped)} files were encoded before; skipped")
        rate = encoded.items / (time.monotonic() - started)
        console.print(f"{out}: {encoded.items:,} items, {rate:,.0f} items per second")
        if self.new_catalog:
            write_catalog(encoded.outputs, self.new_catalog, **resolved)
            console.print(f"catalogue: {self.new_catalog}")

    def _check_no_catalog(self, collisions: Collisions) -> None:
        """Raise SemidError for an option of --new-catalog without it."""
        given = ["--collisions"] if collisions is not TokenizerConfig.collisions else []
        given += ["--memory-limit"] if self.memory_limit != _Files.memory_limit else []
        if given:
            raise SemidError(f"tokenize: {given[0]} is for --new-catalog; add that, or leave it out")


@dataclass(frozen=True)
class Tokenize:
    """With --dataset: train a tokenizer on the items' vectors (with --alignment, also on interactions) and write the
    catalogue of their codes. With --catalog and --input: encode files with that catalogue's tokenizer, one file of
    codes for each.

    Options of a method follow its name, after all others; `semid tokenize rq-vae --help` lists them. On several hosts,
    start training like `semid train`, and encode with --scheduler. The same command resumes an interrupted run.
    """

    out: str
    """Catalogue folder to write; with --input, the folder (or URL) for the files of codes."""
    dataset: PathOrUrl | None = None
    """Dataset folder to train on."""
    files: Annotated[_Files, tyro.conf.arg(name="")] = _Files()
    config: Annotated[_Tokenizer, tyro.conf.arg(name="")] = _Tokenizer()
    alignment: Annotated[_Alignment, tyro.conf.arg(name="")] = _Alignment()
    seed: int = 0
    """Seed of initialization and shuffling."""
    mesh: Annotated[MeshConfig, tyro.conf.arg(name="")] = MeshConfig()
    """Mesh of devices for the training of the RQ-VAE."""

    def run(self) -> None:
        if (self.dataset is None) == (self.files.catalog is None):
            raise SemidError(
                "tokenize: expected either --dataset FOLDER to train on, or --catalog and --input to encode"
            )
        if self.dataset is None:
            self._check_no_training()
            self.files.encode(self.out, columns=self.config.columns, collisions=self.config.collisions)
        else:
            self._check_no_files()
            self._train(self.dataset, self.out)

    def _check_no_files(self) -> None:
        """Raise SemidError for an option of files given with --dataset."""
        if given := _changed(self.files, _Files()):
            option = f"--{given.replace('_', '-')}"
            raise SemidError(f"tokenize: {option} is for encoding files with --catalog, not for training on --dataset")

    def _check_no_training(self) -> None:
        """Raise SemidError for an option of training given with --catalog."""
        of_both = _Tokenizer(columns=self.config.columns, collisions=self.config.collisions)
        if given := _changed(self, Tokenize(out=self.out, files=self.files, config=of_both)):
            names = {"config": "a method", "alignment": "an alignment", "mesh": "--fsdp or --tensor"}
            what = names.get(given, f"--{given}")
            raise SemidError(f"tokenize: {what} is for training; the tokenizer of --catalog is trained already")

    def _train(self, folder: str | Path, out: str) -> None:
        signal, teacher = self.alignment.chosen_signal(), self.alignment.teacher
        dataset = Dataset.load(folder)
        config = TokenizerConfig(**{**vars(self.config), "alignment": self.alignment.blocks(), "signal": signal})
        if teacher:
            if _TEACHER in dataset.vector_columns:
                raise SemidError(f"dataset {dataset.name!r}: has a vector column {_TEACHER!r}, the name of those of "
                                 "--teacher; rename it")  # fmt: skip
            config = replace(config, columns=config.columns or tuple(dataset.vector_columns))
            model = Recommender.from_pretrained(teacher)
            dataset = dataset.with_vectors(_TEACHER, model.item_vectors_for(dataset), origin=model.origin)
        given, config = config, config.resolved(dataset.num_items)
        print_chosen(given, config, by=f"{dataset.num_items:,} items")
        tokenize(dataset, config, out=out, seed=self.seed, mesh=make_mesh(config=self.mesh))
        _print_health(out)


def _changed(given: Any, default: Any) -> str | None:
    """The first field that differs from its value in `default`."""
    return next((f.name for f in fields(given) if getattr(given, f.name) != getattr(default, f.name)), None)


def _print_health(folder: str) -> None:
    health = artifacts.read_json(artifacts.resolved(folder) / HEALTH_FILE)
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
        content = f" ({shared['content_only']:.1%} with content only)" if "content_only" in shared else ""
        console.print(f"co-consumed items sharing the first code: {shared['codes']:.1%}{content}")
    console.print(f"catalogue: {folder}")
