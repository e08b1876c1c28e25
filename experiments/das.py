"""DAS (CIKM 2025, arXiv 2508.10584): items and users quantized together, in views of interests rid of popularity.

    python -m experiments.das --dataset ../shared/data/amazon14_beauty --out runs/beauty

The published system has industrial user and advertisement vectors and 3 x 512 codes; its weights are not published.
Here a user's content is the mean of the training items', the click model's interests and properties start from the
teacher's vectors, and all six views (user-item, same entity, co-occurrence, from either side) have one weight.
Published: click AUC .8037 -> .8061; no figure on public data exists. Trains SASRec, the tokenizer with and without
alignment, and a generator on each; measured figures and minutes are in docs/results.md.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from experiments.arms import TEACHER, run
from experiments.results import folder_of
from semid import TokenizerConfig
from semid.graphs import VectorColumn
from semid.tokenizers import DasConfig, RQVaeConfig


def tokenizer(columns: tuple[str, ...], *, teacher: str = TEACHER) -> TokenizerConfig:
    """DAS on the given content, its click model starting from the column `teacher`."""
    return TokenizerConfig(
        method=RQVaeConfig(), columns=columns, alignment=(DasConfig(),), signal=VectorColumn(teacher)
    )


def main(
    dataset: Path | None = None, out: Path | None = None, seeds: tuple[int, ...] = (0,), budget: float = 1.0
) -> None:
    """Train and measure the tokenizer with and without alignment.

    Args:
        dataset: Folder that `semid prepare layout` reads; none given: the simulated catalogue.
        out: Folder for all results; none given: runs/das/ and the dataset's name.
        seeds: One run each, of teacher, tokenizers and generators.
        budget: Factor on all numbers of epochs.
    """
    arms = {"text": lambda columns: TokenizerConfig(columns=columns), "das": tokenizer}
    run(arms, dataset, folder_of("das", out, dataset), seeds=seeds, budget=budget)


if __name__ == "__main__":
    tyro.cli(main)
