"""The commands `semid export`, `semid export-program` and `semid import-codes`: conversion of formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from semid import artifacts
from semid.artifacts import Kind
from semid.catalog import CATALOG_FILE, Format, SemanticCatalog, export, read_tokens
from semid.catalog.versions import current
from semid.cli.choices import PathOrUrl, load_recommender
from semid.cli.console import console
from semid.data import Dataset
from semid.errors import SemidError
from semid.stage import Request, run_stage
from semid.tokenizers import HEALTH_FILE, level_health


@dataclass(frozen=True)
class Export:
    """Write a catalogue in another format."""

    catalog: PathOrUrl
    """Catalogue folder: its current version (FOLDER@3: version 3) is written, without removed items."""
    format: Literal["parquet", "json", "tsv", "hf-tokens", "hf-tokenizer", "trie"]
    """parquet: codes as lists, and token strings; json: index.json of LC-Rec and MiniOneRec; tsv: item id and token
    string; hf-tokens: token strings and added tokens; hf-tokenizer: a Hugging Face tokenizer.json with the code tokens
    added; trie: the prefix tree's arrays as safetensors."""
    out: PathOrUrl
    """File to write."""
    base: PathOrUrl | None = None
    """hf-tokenizer: the tokenizer.json (or a folder with one) to add the code tokens to. None given: code tokens
    alone, with <pad>, <bos>, <eos> and <unk>."""

    def run(self) -> None:
        found = current(self.catalog)
        export(found.catalog, Format(self.format), self.out, base=self.base, version=found.number, digest=found.digest)
        console.print(f"wrote {self.out}: version {found.number}, {found.catalog.num_active} items")


@dataclass(frozen=True)
class ExportProgram:
    """Write a trained recommender as StableHLO with its arrays, which JAX loads without semid."""

    model: str
    """Model folder, or org/name of the Hugging Face hub (extra `hub`)."""
    out: PathOrUrl
    """Folder to write."""
    catalog: PathOrUrl | None = None
    """Catalogue folder of the model: its current version (FOLDER@3: version 3), with appended items."""
    sequences: tuple[str, ...] = ()
    """Catalogue folders of the model's further code sequences, NAME=FOLDER each, that have codes of appended items."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Number of items to recommend."""
    beam_size: int = 50
    """Beams of the search."""
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """Platforms that it will run on."""

    def run(self) -> None:
        from semid.recommender import export_program

        export_program(
            load_recommender(self.model, self.catalog, self.sequences),
            self.out,
            k=self.k,
            beam_size=self.beam_size,
            platforms=self.platforms,
        )
        console.print(f"program: {self.out}")


@dataclass(frozen=True)
class ImportCodes:
    """Make a catalogue from codes of other tools: an index.json of LC-Rec or MiniOneRec, by the dataset's item ids."""

    codes: PathOrUrl
    """The index.json, or a .tsv file with item id and token string."""
    dataset: PathOrUrl
    """Dataset folder of the items."""
    out: PathOrUrl
    """Catalogue folder to write."""
    tie_break: bool = False
    """The last level is a tie-break, without meaning, that distinguishes colliding items."""
    level_sizes: tuple[int, ...] = ()
    """Codebook sizes. None given: one more than the largest code of each level."""

    def run(self) -> None:
        dataset = Dataset.load(self.dataset)
        found = read_tokens(self.codes, level_sizes=self.level_sizes or None, tie_break=self.tie_break)
        rows, known = found.find_rows(dataset.item_ids)
        if len(missing := np.flatnonzero(~known)):
            raise SemidError(
                f"{self.codes}: has no codes for {len(missing):,} of the dataset's {len(known):,} items, such as "
                f"{dataset.item_ids[int(missing[0])].as_py()!r}; add them, or prepare a dataset without these items"
            )
        codes = found.codes[rows]
        if len(found) > len(codes):
            console.print(f"left out {len(found) - len(codes)} items of {self.codes} that the dataset does not have")
        catalog = SemanticCatalog(
            dataset.item_ids, codes, found.level_sizes, self.tie_break, source_columns=dataset.source_columns
        )
        settings = {"imported": artifacts.sha256(artifacts.fetched(self.codes)), "tie_break": self.tie_break}
        settings |= {"level_sizes": list(self.level_sizes)} if self.level_sizes else {}
        run_stage(
            Request(Kind.CATALOG, settings, dataset.parents),
            self.out,
            load=SemanticCatalog.load,
            work=lambda _: catalog,
            write=_write_imported,
        )
        console.print(f"catalogue: {self.out}")


def _write_imported(catalog: SemanticCatalog, folder: Path) -> None:
    catalog.write(folder / CATALOG_FILE)
    artifacts.write_json(folder / HEALTH_FILE, level_health(catalog))
