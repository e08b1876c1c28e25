"""Gain of conditions on events: simulated shops with exposures, clicks and purchases, and an exact oracle.

    python -m experiments.benchmarks.conditions --out runs/conditions --seeds 0 1 2 3 4

Of each seed a shop, and models of the same settings (and codes): never told events, told those of the history and the
next one's, by FiLM, and told shuffled ones. NDCG@10 of all users' test items, of all items: `any` asks for nothing,
`own` for what the user did, `exchanged` for what another did. The oracle knows the true distribution. Differences are
paired by seed. What is finished is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from jaxtyping import Float, Int

from semid.data import Dataset, Examples
from semid.data.simulated import Events, SimulatedConfig, simulate
from semid.evaluation import accuracy, group_ids, item_places
from semid.generators import ConditionsConfig, GeneratorConfig, train
from semid.recommender import Recommender
from semid.stage import run_recorded
from semid.tokenizers import RQKmeansConfig, TokenizerConfig, tokenize
from seq_models import DenseConfig, ModelConfig, RQTransformerConfig

ASKED = ConditionsConfig(on_event=True, film=True, event_inputs=True)
FAMILIES: dict[str, ModelConfig] = {"sasrec": DenseConfig(), "rq-transformer": RQTransformerConfig()}


def main(
    out: Path = Path("runs/conditions"),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    world: tyro.conf.OmitArgPrefixes[SimulatedConfig] = SimulatedConfig(
        num_items=1_000, num_users=3_000, images=False, events=Events()
    ),
    family: Literal["sasrec", "rq-transformer"] = "sasrec",
    epochs: float = 72,
) -> None:
    """Train, measure, and print means over the seeds with standard errors.

    Args:
        out: Folder of a JSON file per seed.
        seeds: A shop and its models each.
        world: The shop.
        family: Models to train.
        epochs: Passes over the training data.
    """
    measured = []
    for seed in seeds:
        shop = replace(world, seed=seed)
        request = {"world": asdict(shop), "family": family, "epochs": epochs}
        measured.append(run_recorded(request, out / f"{seed}.json", partial(_measured, shop, FAMILIES[family], epochs)))
        print(seed, {name: round(value, 4) for name, value in measured[-1].items()}, flush=True)
    for line in table(measured):
        print(line)


def _measured(shop: SimulatedConfig, model: ModelConfig, epochs: float) -> dict[str, float]:
    made = simulate(shop)
    dataset, test = made.dataset, made.dataset.splits.test
    catalog = tokenize(dataset, TokenizerConfig(RQKmeansConfig()), seed=shop.seed)
    plain = GeneratorConfig(model, validation_users=512)
    plain = replace(plain, training=replace(plain.training, epochs=epochs, validate_every=4))
    fit = partial(train, catalog=catalog, seed=shop.seed)
    never = fit(dataset, config=plain)
    told = fit(dataset, config=replace(plain, conditions=ASKED))
    misled = fit(_shuffled(dataset, shop.seed), config=replace(plain, conditions=ASKED))
    own = np.asarray(test.target_events)
    others, of_oracle = np.roll(own, 1), made.oracle.own_conditions(test.targets, own, ("event",))
    asking: dict[str, Callable[[], Int[np.ndarray, "n k"]]] = {
        "never told": lambda: _ranked(never, test, None),
        "any": lambda: _ranked(told, test, None),
        "own": lambda: _ranked(told, test, own),
        "exchanged": lambda: _ranked(told, test, others),
        "shuffled": lambda: _ranked(misled, test, own),
        "oracle": lambda: made.oracle.rank(test.histories, k=10),
        "oracle, own": lambda: made.oracle.rank(test.histories, k=10, condition=of_oracle),
    }
    items = np.arange(dataset.num_items)
    groups = items if never.codes is None else group_ids(never.codes)
    gains = {name: ndcg_at_10(rank(), test, items if "oracle" in name else groups) for name, rank in asking.items()}
    return {name: float(gain.mean()) for name, gain in gains.items()}


def _shuffled(dataset: Dataset, seed: int) -> Dataset:
    """The dataset with its events shuffled over interactions."""
    order = np.random.default_rng(seed).permutation(len(dataset.item))
    return dataset.replace(event=pc.take(dataset.event, pa.array(order)))


def _ranked(model: Recommender, test: Examples, events: Int[np.ndarray, " n"] | None) -> Int[np.ndarray, "n k"]:
    condition = None if events is None else model.own_conditions(test.targets, events, ("event",))
    return model.rank(test.histories, k=10, exclude_seen=False, condition=condition)


def ndcg_at_10(
    ranked: Int[np.ndarray, "n k"], test: Examples, groups: Int[np.ndarray, " items"]
) -> Float[np.ndarray, " n"]:
    """NDCG@10 of lists of item rows; items of one group are tied."""
    return accuracy(item_places(ranked, test.targets, groups), (10,))["ndcg@10"]


def table(measured: list[dict[str, float]]) -> list[str]:
    """Print means over the seeds, standard errors, and the paired differences of interest."""
    values = {name: np.array([one[name] for one in measured]) for name in measured[0]}
    share = values["own"] / values["oracle, own"] - values["never told"] / values["oracle"]
    pairs = {
        "own - never told": values["own"] - values["never told"],
        "any - never told": values["any"] - values["never told"],
        "shuffled - never told": values["shuffled"] - values["never told"],
        "own - exchanged": values["own"] - values["exchanged"],
        "share of the oracle: own - never told": share,
    }
    lines = ["| model | NDCG@10 |", "|---|---|"]
    return lines + [f"| {name} | {mean_and_error(value)} |" for name, value in (values | pairs).items()]


def mean_and_error(values: Float[np.ndarray, " seeds"]) -> str:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{values.mean():+.4f} ± {error:.4f}"


if __name__ == "__main__":
    tyro.cli(main)
