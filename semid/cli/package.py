"""The command `semid package`."""

from __future__ import annotations

from dataclasses import dataclass

from semid.cli.choices import PathOrUrl, load_recommender
from semid.cli.console import console


@dataclass(frozen=True)
class Package:
    """Package a model for others: a folder with its catalogue, tokenizer and card, without training state."""

    model: str
    """Model folder, or org/name of the Hugging Face hub (extra `hub`)."""
    out: PathOrUrl
    """Folder to write; an existing package is replaced."""
    catalog: PathOrUrl | None = None
    """Catalogue folder of the model: its current version is packaged (FOLDER@3: version 3)."""
    sequences: tuple[str, ...] = ()
    """Catalogue folders of the model's further code sequences, NAME=FOLDER each, that have codes of appended items."""
    metrics: PathOrUrl | None = None
    """A metrics.json of `semid evaluate` on this model, for the card."""
    license: str | None = None
    """License of the model as the Hugging Face hub names it, such as apache-2.0. None given: the card names none."""

    def run(self) -> None:
        recommender = load_recommender(self.model, self.catalog, self.sequences)
        recommender.save_pretrained(self.out, metrics=self.metrics, license=self.license)
        console.print(f"wrote {self.out}: README.md says what it is and how to load it")
