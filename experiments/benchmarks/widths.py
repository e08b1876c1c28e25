"""SASRec that serves at a width chosen after training (fMRLRec, arXiv 2409.16627), beside one trained at each width.

    python -m experiments.benchmarks.widths --dataset ../shared/data/amazon14_beauty --out runs/widths

All are of ids alone, in the settings of the experiment `sasrec`. Validation NDCG@10 of all users; test is not read.
What was interrupted goes on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tyro

from experiments.configs.recipe import sasrec
from experiments.data import read_dataset
from experiments.runner import item_numbers
from semid.data import Dataset
from semid.evaluation import evaluate
from semid.generators import train
from semid.recommender import Recommender
from seq_models import DenseConfig, TransformerConfig


def main(dataset: Path, out: Path, widths: tuple[int, ...] = (16, 32, 64), epochs: float = 20, seed: int = 0) -> None:
    """Train, and print the NDCG@10 at each width of both.

    Args:
        dataset: Dataset folder, or one in the layout of the development data.
        out: Folder for the trainings.
        widths: Widths to serve at; the largest is the backbone's.
        epochs: Passes over the training data.
        seed: Of all trainings.
    """
    data = read_dataset(dataset)
    together = _trained(data, max(widths), epochs, seed, out / "together", nested=widths)
    for width in sorted(widths):
        served, alone = (
            _measured(model, data)
            for model in (together.with_width(width), _trained(data, width, epochs, seed, out / str(width)))
        )
        print(f"width {width}: served {served:.4f}, trained {alone:.4f}, ratio {served / alone:.3f}")


def _trained(
    data: Dataset, width: int, epochs: float, seed: int, out: Path, *, nested: tuple[int, ...] = ()
) -> Recommender:
    backbone = TransformerConfig(dim=width, hidden=2 * width, dropout=0.4)
    model = DenseConfig(backbone, widths=tuple(one for one in nested if one < width))
    config = replace(sasrec(features=(), epochs=epochs), model=model)
    return train(data, item_numbers(data), config, out=out, seed=seed)


def _measured(model: Recommender, data: Dataset) -> float:
    return evaluate(model, data, split="validation").values["ndcg@10"]


if __name__ == "__main__":
    tyro.cli(main)
