"""Obedience of lists to a group that is asked for, such as a genre or brand, on the interactions of a real shop.

    python -m experiments.benchmarks.steering --dataset ../shared/data/ml1m --group categories --epochs 4

A generator that was told the next item's group in training, and one of the same codes and settings that was not. Test
users are asked for the first group of their target that not all items share (`own`) or of another user's
(`exchanged`), and by a mask on the generator that was never told, which is what asking can give at most. NDCG@10 is of
all items; obedience is the share of the ten that are in the group of the target.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Bool, Float, Int

from experiments.benchmarks.conditions import ndcg_at_10
from experiments.data import stored_dataset
from semid.artifacts import try_file
from semid.data import Dataset, Examples, SourceOrder, Tags
from semid.data.simulated import SimulatedConfig
from semid.evaluation import group_ids
from semid.generators import ConditionsConfig, GeneratorConfig, train
from semid.recommender import Recommender
from semid.stage import run_recorded
from semid.tokenizers import RQKmeansConfig, TokenizerConfig, tokenize


def main(
    dataset: Path,
    group: str,
    out: Path = Path("runs/steering"),
    epochs: float | None = None,
    users: int = 4096,
    seed: int = 0,
) -> None:
    """Train, measure and print.

    Args:
        dataset: Dataset folder (`semid prepare`), or one that `experiments.layout` reads.
        group: Column of items to ask by.
        out: Folder for data, codes, models and steering.json.
        epochs: Passes over the training data; none given: as `semid train` has them.
        users: Test users, drawn by the seed.
        seed: Seed of codes, models and users.
    """
    out = try_file(out / "steering.json").parent
    data = stored_dataset(dataset, out / "dataset", world=SimulatedConfig(), ties=SourceOrder())
    request = {"dataset": data.digest, "group": group, "epochs": epochs, "users": users, "seed": seed}
    measure = partial(_measured, data, group, epochs, users, seed, out)
    for name, value in run_recorded(request, out / "steering.json", measure).items():
        print(f"{name:30s} {value:.4f}")


def _measured(dataset: Dataset, group: str, epochs: float | None, users: int, seed: int, out: Path) -> dict[str, float]:
    catalog = tokenize(dataset, TokenizerConfig(RQKmeansConfig()), out=out / "catalog", seed=seed)
    plain = GeneratorConfig()
    plain = replace(plain, training=replace(plain.training, epochs=epochs))
    asked = replace(plain, conditions=ConditionsConfig(on_group=group))
    never = train(dataset, catalog, plain, out=out / "never", seed=seed)
    told = train(dataset, catalog, asked, out=out / "told", seed=seed)

    tags, test = Tags.from_column(dataset.items, group), dataset.splits.test
    first = tags.padded()[:, 0]
    test = test.take(np.flatnonzero(first[test.targets] >= 0))  # that can be asked for
    test = test.take(np.random.default_rng(seed).permutation(len(test))[:users])
    own = first[test.targets]
    members = _members(tags, dataset.num_items)
    groups, inside = group_ids(catalog.codes), partial(_obedience, own=own, members=members)
    lists = {
        "never told": _ranked(never, test),
        "never told, masked": _ranked(never, test, allowed=members[own]),
        "any": _ranked(told, test),
        "own": _ranked(told, test, names=[tags.names[number].as_py() for number in own]),
        "exchanged": _ranked(told, test, names=[tags.names[number].as_py() for number in np.roll(own, 1)]),
    }
    found = {f"NDCG@10, {name}": ndcg_at_10(ranked, test, groups) for name, ranked in lists.items()}
    return found | {f"obedience, {name}": inside(ranked) for name, ranked in lists.items()}


def _members(tags: Tags, num_items: int) -> Bool[np.ndarray, "tags items"]:
    places = tags.padded()
    members = np.zeros((len(tags), num_items), bool)
    for column in places.T:
        there = column >= 0
        members[column[there], np.flatnonzero(there)] = True
    return members


def _ranked(
    model: Recommender,
    test: Examples,
    *,
    names: list[str] | None = None,
    allowed: Bool[np.ndarray, "n items"] | None = None,
) -> Int[np.ndarray, "n k"]:
    condition = None if names is None else [{"group": name} for name in names]
    return model.rank(test.histories, k=10, exclude_seen=False, allowed=allowed, condition=condition)


def _obedience(
    ranked: Int[np.ndarray, "n k"], *, own: Int[np.ndarray, " n"], members: Bool[np.ndarray, "tags items"]
) -> float:
    inside: Float[np.ndarray, "n k"] = members[own[:, None], ranked] & (ranked >= 0)
    return float(inside.mean())


if __name__ == "__main__":
    tyro.cli(main)
