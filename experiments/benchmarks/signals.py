"""Signals and vector columns alone: accuracy of their recommendations, time, and overlap of neighbors.

    python -m experiments.benchmarks.signals --dataset ../shared/data/amazon14_beauty --out runs/signals.json

Each signal ranks the whole catalogue for all users, seen items excluded: models of users and items by the users'
vectors, the others by the mean of the history's. Columns are measured by `neighbor_overlap`: the share of an item's 20
nearest that they share with content and with behavior. Of a column that serves both, the ratio of the two is near 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from experiments.data import read_dataset
from semid.artifacts import try_file, write_json
from semid.data import Dataset, Standardizer
from semid.evaluation import Ranker, evaluate
from semid.graphs import (
    AlphaRecConfig,
    BM3Config,
    CM3Config,
    FreedomConfig,
    FuseConfig,
    GraphConfig,
    LightGCNConfig,
    MMHCLConfig,
    PpmiConfig,
    SmoothConfig,
    UserItemVectors,
    VectorKNN,
    add_column,
    neighbor_overlap,
)


def main(
    dataset: Path,
    out: Path = Path("runs/signals.json"),
    column: str = "text_minilm",
    split: Literal["validation", "test"] = "test",
    seed: int = 0,
    epochs: int = 30,
    only: tuple[str, ...] = (),
) -> None:
    """Measure, print and write JSON.

    Args:
        dataset: Dataset folder, or one in the layout of the development data.
        out: File to write.
        column: Vector column of content.
        split: Examples that are ranked.
        seed: Seed of all training.
        epochs: Passes over the interactions of the models of users and items.
        only: Rows to measure; none given: all.
    """
    out, rows = try_file(out), []
    data = read_dataset(dataset)
    measures = rankers(data, column, seed, epochs) | columns(data, column, seed)
    for name, measure in measures.items():
        if not only or name in only:
            started = time.monotonic()
            made = measure()
            seconds = time.monotonic() - started
            found = made if isinstance(made, dict) else _recalls(made, data, split)
            rows.append({"row": name, "seconds": round(seconds, 1), **found})
            print(rows[-1], flush=True)
            write_json(out, rows)


def rankers(data: Dataset, column: str, seed: int, epochs: int) -> dict[str, Callable[[], Ranker]]:
    """Rankers by each signal."""
    graphs: dict[str, GraphConfig] = {
        "lightgcn": LightGCNConfig(epochs=epochs),
        "freedom": FreedomConfig(epochs=epochs, column=column),
        "bm3": BM3Config(epochs=epochs, column=column),
        "mmhcl": MMHCLConfig(epochs=epochs, column=column),
        "cm3": CM3Config(epochs=epochs, column=column),
        "lightgcn, contrast": LightGCNConfig(epochs=epochs, contrast=0.1, column=column),
    }
    alpharec = AlphaRecConfig(column)
    return {
        "content": lambda: VectorKNN.fit(data, data.vectors(column)),
        "ppmi": lambda: VectorKNN.fit(data, PpmiConfig().item_vectors(data, seed=seed)),
        "alpharec": lambda: VectorKNN.fit(data, alpharec.item_vectors(data, seed=seed)),
        **{name: _fitted(data, config, seed) for name, config in graphs.items()},
    }


def _fitted(data: Dataset, config: GraphConfig, seed: int) -> Callable[[], Ranker]:
    return lambda: UserItemVectors.fit(data, config, seed=seed)


def columns(data: Dataset, column: str, seed: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Overlaps of columns that join content and behavior: concatenated, with equal variance, and as made by semid."""

    def measured(vectors: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> dict[str, Any]:
        content, behavior = data.vectors(column), PpmiConfig().item_vectors(data, seed=seed)
        made = vectors(content, behavior)
        kept = {"of content": neighbor_overlap(content, made), "of behavior": neighbor_overlap(behavior, made)}
        return {**kept, "ratio": kept["of behavior"] / kept["of content"]}

    def standardized(content: np.ndarray, behavior: np.ndarray) -> np.ndarray:
        return Standardizer.fit([content, behavior])(np.concatenate([content, behavior], axis=1))

    fuse, smooth = FuseConfig(column, seed=seed), SmoothConfig(column)
    return {
        "concatenated": lambda: measured(lambda *both: np.concatenate(both, axis=1)),
        "standardized": lambda: measured(standardized),
        "smooth": lambda: measured(lambda *_: add_column(data, smooth).vectors(f"{column}_smooth")),
        "fuse": lambda: measured(lambda *_: add_column(data, fuse).vectors(f"{column}_fuse")),
    }


def _recalls(ranker: Ranker, data: Dataset, split: str) -> dict[str, Any]:
    values = evaluate(ranker, data, split=split, ks=(10, 20), exclude_seen=True).values
    return {name: values[name] for name in ("recall@10", "ndcg@10", "recall@20", "ndcg@20")}


if __name__ == "__main__":
    tyro.cli(main)
