"""Weight of items added today in an item graph, and what it costs the other items.

    python -m experiments.benchmarks.new_items --dataset ../shared/data/amazon14_beauty --out runs/new_items/beauty.json

A tenth of the items is taken out of all histories, as if nobody had had them before; validation targets stay as they
are, so about a tenth of them is new. The graph's constants are chosen on the whole data before, as in a shop that adds
items. NDCG@10 of all targets, of the new ones and of the others, by the weight `new_items`; and of the new ones where
new items alone are recommended, beside the nearest items by content. Test is not read.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Bool, Float, Int

from experiments.data import read_dataset
from semid.data import Dataset, Histories
from semid.errors import SemidError
from semid.graphs import ItemGraph, ItemGraphConfig, VectorKNN, tuned
from semid.graphs.item_graph import content_vectors
from semid.stage import run_recorded


def main(
    dataset: Path,
    out: Path,
    weights: tuple[float, ...] = (0, 0.5, 1, 2, 4, 8),
    fraction: float = 0.1,
    users: int | None = None,
    seed: int = 0,
) -> None:
    """Measure, and print.

    Args:
        dataset: Dataset folder, or one in the layout of the development data.
        out: JSON file of the figures; it is read if it exists.
        weights: Values of `new_items`.
        fraction: Share of the items that are new.
        users: Number of random validation users; none given: all.
        seed: Seed of the new items and the users.
    """
    data = read_dataset(dataset)
    request = {"dataset": data.digest, "weights": list(weights), "fraction": fraction, "users": users, "seed": seed}
    rows = run_recorded(request, out, partial(_measured, data, weights, fraction, users, seed))
    print(f"{'':>16}  {'all':>6}  {'new':>6}  {'others':>6}  new among new")
    for name, row in rows.items():
        print(f"{name:>16}  " + "  ".join(f"{row[part]:>6.4f}" for part in ("all", "new", "others", "among new")))


def _measured(
    data: Dataset, weights: tuple[float, ...], fraction: float, users: int | None, seed: int
) -> dict[str, dict[str, float]]:
    rng, examples = np.random.default_rng(seed), data.splits.examples("validation")
    new = np.isin(np.arange(data.num_items), rng.permutation(data.num_items)[: round(fraction * data.num_items)])
    if users is not None:
        examples = examples.take(rng.permutation(len(examples))[:users])
    known, before = (without(histories, new) for histories in (data.splits.train, examples.histories))
    config = tuned(data, replace(ItemGraphConfig(), new_items=0.0))
    vectors = content_vectors(data, config)
    if vectors is None:
        raise SemidError(f"dataset {data.name!r} has no vector columns, by which new items are found (`semid prepare`)")
    rankers: dict[str, Any] = {"nearest content": VectorKNN.fit(data, vectors)}
    for weight in weights:
        chosen = replace(config, new_items=float(weight))
        rankers[f"new_items {weight:g}"] = ItemGraph.from_histories(
            known, data.item_ids, chosen, vectors=vectors, repeats=data.repeats.common
        )
    rows = {}
    for name, ranker in rankers.items():
        found = ndcg(ranker, before, examples.targets, among=np.ones_like(new))
        is_new = new[examples.targets]
        rows_of_new = np.flatnonzero(is_new)
        among = ndcg(ranker, before.take(rows_of_new), examples.targets[rows_of_new], among=new)
        parts = {"all": found, "new": found[is_new], "others": found[~is_new], "among new": among}
        rows[name] = {part: float(values.mean()) for part, values in parts.items()}
    return rows


def without(histories: Histories, gone: Bool[np.ndarray, " items"]) -> Histories:
    """The histories without these items."""
    items, owner = histories.flat()
    kept = ~gone[items]
    bounds = np.searchsorted(owner[kept], np.arange(len(histories) + 1))
    return Histories(histories.users, items[kept], bounds[:-1], bounds[1:])


def ndcg(
    ranker: Any, histories: Histories, targets: Int[np.ndarray, " n"], *, among: Bool[np.ndarray, " items"]
) -> Float[np.ndarray, " n"]:
    """NDCG@10 of each target in its list of these items."""
    found = []
    for start in range(0, len(histories), 256):
        part = slice(start, start + 256)
        ranked = ranker.rank(histories.take(part), k=len(among))  # VectorKNN takes no mask
        listed = (ranked >= 0) & among[ranked]
        place = np.maximum(np.cumsum(listed, axis=1), 1)
        hit = listed & (ranked == targets[part, None]) & (place <= 10)
        found.append(np.where(hit, 1 / np.log2(place + 1.0), 0.0).sum(axis=1))
    return np.concatenate(found)


if __name__ == "__main__":
    tyro.cli(main)
