"""Gain of ranking by expected value, and calibration of event heads, on simulated shops with an exact oracle.

    python -m experiments.benchmarks.values --out runs/values --seeds 0 1 2 3 4

Of each seed the shop of `experiments.benchmarks.conditions` and one model with an event head, which reads the history's
events. All users' test items, clicks of value 1 and purchases of 2.5: NDCG@10 weighed by value, of lists by probability
and by expected value; mean negative logarithm of the probability of what was done, given the item, in nats; and the
calibration error, the mean over events of |share that did it - mean probability| over ten bins of the probability by
their sizes, which sampling alone keeps above 0 for the oracle. `calibrated` is the same head with biases fitted on the
validation split (`--calibrate-events`), which its figures of that split have seen. What is finished is read.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from jaxtyping import Float, Int

from experiments.benchmarks.conditions import FAMILIES, mean_and_error
from semid.data import Examples
from semid.data.simulated import EVENTS, Events, Oracle, SimulatedConfig, simulate
from semid.evaluation import accuracy, group_ids, item_places, target_values, value_scores
from semid.generators import ConditionsConfig, GeneratorConfig, train, with_calibrated_events
from semid.recommender import Recommender
from semid.stage import run_recorded
from semid.tokenizers import RQKmeansConfig, TokenizerConfig, tokenize
from seq_models import ModelConfig

VALUES = {"exposure": 0.0, "click": 1.0, "buy": 2.5}
_BINS, _BLOCK = 10, 256


def main(
    out: Path = Path("runs/values"),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    world: tyro.conf.OmitArgPrefixes[SimulatedConfig] = SimulatedConfig(
        num_items=1_000, num_users=3_000, images=False, events=Events()
    ),
    family: Literal["sasrec", "rq-transformer"] = "sasrec",
    epochs: float = 36,
    on_event: bool = False,
    split: Literal["validation", "test"] = "test",
) -> None:
    """Train, measure, and print means over the seeds with standard errors.

    Args:
        out: Folder of a JSON file and a model per seed.
        seeds: A shop and its model each.
        world: The shop.
        family: Model to train.
        epochs: Passes over the training data.
        on_event: The model can be asked for an event too, by FiLM.
        split: Targets.
    """
    measured = []
    for seed in seeds:
        shop = replace(world, seed=seed)
        request = {"world": asdict(shop), "family": family, "epochs": epochs, "on_event": on_event, "split": split}
        work = partial(_measured, shop, FAMILIES[family], epochs, on_event, split, out / f"model-{seed}")
        measured.append(run_recorded(request, out / f"{seed}.json", work))
        print(seed, {name: round(value, 4) for name, value in measured[-1].items()}, flush=True)
    rows = {name: np.array([one[name] for one in measured]) for name in measured[0]}
    rows["value NDCG@10, by value - by probability"] = rows["value NDCG@10, by value"] - rows["value NDCG@10"]
    for name, values in rows.items():
        print(f"| {name} | {mean_and_error(values)} |")


def _measured(
    shop: SimulatedConfig, model: ModelConfig, epochs: float, on_event: bool, split: str, out: Path
) -> dict[str, float]:
    made = simulate(shop)
    dataset, examples = made.dataset, made.dataset.splits.examples(split)
    catalog = tokenize(dataset, TokenizerConfig(RQKmeansConfig()), seed=shop.seed)
    conditions = ConditionsConfig(event_head=True, event_inputs=True, on_event=on_event, film=on_event)
    config = GeneratorConfig(model, validation_users=512, conditions=conditions)
    config = replace(config, training=replace(config.training, epochs=epochs, validate_every=4))
    trained = train(dataset, catalog, config, out=out, seed=shop.seed)
    fitted = with_calibrated_events(trained, dataset.splits.examples("validation"))

    done, rows = np.asarray(examples.target_events) - 1, np.arange(len(examples))
    shares = np.bincount(np.asarray(dataset.splits.train.events), minlength=len(dataset.events) + 1)[1:]
    of_model, of_fitted = (_event_probs(one, examples) for one in (trained, fitted))
    of_oracle = made.oracle.event_probabilities(examples.histories, examples.targets[:, None])[:, 0]
    of_oracle = of_oracle[:, [EVENTS.index(name) for name in dataset.events]]
    items, values = np.arange(dataset.num_items), target_values(dataset, split=split, values=VALUES)
    groups = items if trained.codes is None else group_ids(trained.codes)
    assert values is not None

    def scored(ranked: Int[np.ndarray, "n k"], groups: Int[np.ndarray, " items"]) -> float:
        found = accuracy(item_places(ranked, examples.targets, groups), (10,))
        return value_scores(found["recall@10"], found["ndcg@10"], values.values, rows)["value_ndcg"]

    def ask(model: Recommender, **options: Any) -> Int[np.ndarray, "n k"]:
        return model.rank(examples.histories, k=10, exclude_seen=False, **options)

    return {
        "loss of events, shares": float(-np.log(shares / shares.sum())[done].mean()),
        "loss of events": float(-np.log(of_model[rows, done]).mean()),
        "loss of events, calibrated": float(-np.log(of_fitted[rows, done]).mean()),
        "loss of events, oracle": float(-np.log(of_oracle[rows, done]).mean()),
        "calibration error": calibration_error(of_model, done),
        "calibration error, calibrated": calibration_error(of_fitted, done),
        "calibration error, oracle": calibration_error(of_oracle, done),
        "value NDCG@10": scored(ask(trained), groups),
        "value NDCG@10, by value": scored(ask(trained, values=VALUES, beam_size=100), groups),
        "value NDCG@10, by value, calibrated": scored(ask(fitted, values=VALUES, beam_size=100), groups),
        "value NDCG@10, oracle": scored(made.oracle.rank(examples.histories, k=10), items),
        "value NDCG@10, oracle by value": scored(_by_value(made.oracle, examples), items),
    }


def _event_probs(model: Recommender, examples: Examples) -> Float[np.ndarray, "n events"]:
    """Probabilities of the events of the targets."""
    return np.exp(model.event_log_probs(examples.histories, examples.targets[:, None]))[:, 0]


def _by_value(oracle: Oracle, examples: Examples) -> Int[np.ndarray, "n 10"]:
    """The oracle's lists by expected value."""
    ranked, weights = [], np.array([VALUES[name] for name in EVENTS])
    for block in np.array_split(np.arange(len(examples)), -(-len(examples) // _BLOCK)):
        histories = examples.histories.take(block)
        p = oracle.probabilities(histories)
        events = oracle.event_probabilities(histories, np.broadcast_to(np.arange(p.shape[1]), p.shape))
        ranked.append(np.argsort(-p * (np.nan_to_num(events) @ weights), axis=1, kind="stable")[:, :10])
    return np.concatenate(ranked).astype(np.int32)


def calibration_error(p: Float[np.ndarray, "n events"], done: Int[np.ndarray, " n"]) -> float:
    """Mean over events of the calibration error: |share - mean probability| of ten bins, by the bins' sizes."""
    bins = np.minimum((p * _BINS).astype(int), _BINS - 1)
    happened = done[:, None] == np.arange(p.shape[1])
    gaps = [np.abs(np.where(bins == each, happened - p, 0.0).sum(axis=0)) for each in range(_BINS)]
    return float(np.mean(np.sum(gaps, axis=0) / len(p)))


if __name__ == "__main__":
    tyro.cli(main)
