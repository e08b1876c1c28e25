"""The command `semid catalog`: append, remove, revert, compact, apply, diff, verify, history."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table

from semid import artifacts
from semid.artifacts import Kind
from semid.catalog import CATALOG_FILE, Known, SemanticCatalog, level_name, versions
from semid.cli.choices import PathOrUrl
from semid.cli.console import console
from semid.data import read_id_file
from semid.errors import SemidError
from semid.recommender import read_spec

# Number of ids printed per difference.
_SHOWN = 5


@dataclass(frozen=True)
class Append:
    """Append items, encoded by the catalogue's tokenizer; existing codes never change.

    A file has the vector columns that the tokenizer was fitted to, or the raw columns (texts) to compute them from.
    """

    catalog: PathOrUrl
    """Catalogue folder that `semid tokenize` wrote."""
    input: tuple[str, ...]
    """Parquet, CSV, TSV or JSONL files, folders of parts as Spark writes them, or patterns such as 'new/*.parquet'."""
    id_column: str = "item_id"
    """Column of the ids."""
    columns: tuple[str, ...] = ()
    """Vector columns for the tokenizer, concatenated in this order; none given: those it was fitted to."""
    known: Literal["error", "skip", "update"] = "error"
    """Items that are already in the catalogue: stop with an error, keep them unchanged (skip), or replace their vectors
    and keep their codes (update)."""

    def run(self) -> None:
        from semid.catalog import append
        from semid.tokenizers import SemanticTokenizer

        tokenizer = SemanticTokenizer.from_pretrained(self.catalog)
        made = append(
            self.catalog,
            self.input,
            tokenizer=tokenizer,
            id_column=self.id_column,
            columns=self.columns or None,
            known=Known(self.known),
        )
        for file, version in made.applied.items():
            console.print(f"{file}: appended before, as version {version}; left out")
        note = f", {made.restored:,} back with their old codes" if made.restored else ""
        note += f", {made.updated:,} with new content and their old codes" if made.updated else ""
        note += f", {made.skipped:,} there already and skipped" if made.skipped else ""
        note += f", {made.moved:,} with other codes than their nearest, which were taken" if made.moved else ""
        console.print(f"{_name(self.catalog, made.version)}: {made.new:,} items appended{note}")


@dataclass(frozen=True)
class Remove:
    """Remove items: they are never recommended, stay readable in histories, and their codes are not reused."""

    catalog: PathOrUrl
    """Catalogue folder."""
    items: tuple[str, ...] = ()
    """Item ids."""
    file: PathOrUrl | None = None
    """File of item ids, one id per line, or table with a column item_id."""

    def run(self) -> None:
        from semid.catalog import remove

        ids = list(self.items)
        if self.file is not None:
            ids += read_id_file(self.file, columns=SemanticCatalog.load(self.catalog).source_columns)
        console.print(f"{_name(self.catalog, remove(self.catalog, ids))}: {len(ids):,} items removed")


@dataclass(frozen=True)
class Apply:
    """Apply the change files of a catalogue (CATALOG/changes/000001.parquet, ...) to a copy of it."""

    catalog: PathOrUrl
    """Catalogue folder, a copy of the one with the changes."""
    change: tuple[PathOrUrl, ...]
    """Change files, in order."""

    def run(self) -> None:
        if not self.change:
            raise SemidError("catalog apply: expected at least one file after --change, got none")
        for file in self.change:
            made = versions.apply(self.catalog, file)
            console.print(f"{_name(self.catalog, made)}: applied {file}")


@dataclass(frozen=True)
class Revert:
    """Make a new version with the items of an earlier one: items added since are removed, removed ones are restored.

    Codes never change, and the versions in between stay. Updated content is not reverted.
    """

    catalog: PathOrUrl
    """Catalogue folder."""
    to: int
    """Number of the earlier version."""

    def run(self) -> None:
        before = versions.current(self.catalog).number
        made = versions.revert(self.catalog, self.to)
        has = "" if made.number > before else "nothing to do, has "
        console.print(
            f"{_name(self.catalog, made)}: {has}the items of version {self.to}, {made.catalog.num_active:,} in all"
        )


@dataclass(frozen=True)
class Compact:
    """Merge all changes into one file, which is loaded instead of them; the files of the changes stay."""

    catalog: PathOrUrl
    """Catalogue folder."""

    def run(self) -> None:
        made = versions.compact(self.catalog)
        what = f"one file for {made.number:,} changes" if made.number else "there are no changes"
        console.print(f"{_name(self.catalog, made)}: {what}")


@dataclass(frozen=True)
class Diff:
    """Compare two catalogues: added and removed items, changed codes, models that no longer fit.

    A new tokenizer changes all codes, and models trained on the old ones must be trained again. Between
    versions of one catalogue no code ever changes.
    """

    old: tyro.conf.Positional[str]
    """Catalogue folder; FOLDER@3 is its version 3."""
    new: tyro.conf.Positional[str]
    """Catalogue folder; FOLDER@3 is its version 3."""
    model: tuple[str, ...] = ()
    """Model folders, or org/name of the Hugging Face hub, to check against the new catalogue."""

    def run(self) -> None:
        old, new = SemanticCatalog.load(self.old), SemanticCatalog.load(self.new)
        found = versions.diff(old, new)
        for what, items in (("appended", found.appended), ("removed", found.removed)):
            shown = ": " + ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "") if items else ""
            console.print(f"{what} {len(items):,} items{shown}")
        table = Table("level", "items with another code", title=f"codes of the {found.common:,} items of both")
        for level, share in enumerate(found.changed_by_level):
            table.add_row(level_name(level), f"{share:.1%}")
        table.add_row("any", f"{found.changed:.1%}")
        console.print(table)
        reasons = {path: _incompatibility(path, new) for path in self.model}
        for path, reason in reasons.items():
            console.print(f"{path}: {f'no longer fits: {reason}; train it again' if reason else 'fits'}")
        unfit = f"; {sum(map(bool, reasons.values()))} of {len(reasons)} models no longer fit" if reasons else ""
        console.print(f"{found.changed:.1%} of {found.common:,} items changed codes{unfit}")


@dataclass(frozen=True)
class Verify:
    """Check every byte of every version: digests, order, codes within their level sizes, no item twice, none moved."""

    catalog: PathOrUrl
    """Catalogue folder."""

    def run(self) -> None:
        found = versions.verify(self.catalog)
        removed = len(found.catalog) - found.catalog.num_active
        console.print(
            f"{_name(self.catalog, found)}: whole; {found.catalog.num_active:,} items, {removed:,} removed, digest "
            f"{found.digest[:16]}"
        )


@dataclass(frozen=True)
class History:
    """List the versions of a catalogue."""

    catalog: PathOrUrl
    """Catalogue folder."""

    def run(self) -> None:
        entries = versions.history(self.catalog)
        table = Table("version", "change", "items", "total", "created (UTC)", "digest")
        for entry in entries:
            created = entry.created.removesuffix("+00:00")
            numbers = (str(entry.version), entry.kind, f"{entry.items:,}", f"{entry.active:,}")
            table.add_row(*numbers, created, entry.digest[:12])
        console.print(table)
        console.print(f"{self.catalog}: version {entries[-1].version}, {entries[-1].active:,} items")


@dataclass(frozen=True)
class Catalog:
    """Versions of a catalogue: items are added and removed, and existing codes never change."""

    command: (
        Annotated[Append, tyro.conf.subcommand("append")]
        | Annotated[Remove, tyro.conf.subcommand("remove")]
        | Annotated[Revert, tyro.conf.subcommand("revert")]
        | Annotated[Compact, tyro.conf.subcommand("compact")]
        | Annotated[Apply, tyro.conf.subcommand("apply")]
        | Annotated[Diff, tyro.conf.subcommand("diff")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[History, tyro.conf.subcommand("history")]
    )

    def run(self) -> None:
        self.command.run()


def _name(folder: str | Path, version: versions.Version) -> str:
    return f"{folder}: version {version.number}"


def _incompatibility(name: str, catalog: SemanticCatalog) -> str | None:
    """Why the model of a folder cannot recommend from this catalogue; None if it can."""
    model = artifacts.local_folder(name)
    artifacts.read_artifact(model, Kind.MODEL)
    return read_spec(model).incompatibility(SemanticCatalog.read(model / CATALOG_FILE), catalog)
