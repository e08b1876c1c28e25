"""A learned gate between a model and its item graph, compared with the constant weight.

    python -m experiments.benchmarks.gate --dataset ../shared/data/ml1m --model runs/ml1m/sasrec-text_0 \
        --out runs/gate/ml1m-sasrec.json

The gate gives each history a weight of its own: a logistic function of what is known before anything is ranked. It is
fitted to the likelihood of the next items of one half of the validation users, its shift and scale (0 among them) to
their NDCG@10, and measured on the other half; then the halves are exchanged. So is the constant. Weights are 0, .1, ...
1, at each of which all users are ranked once. Test is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from jaxtyping import Array, Float, Int
from scipy.optimize import minimize

from experiments.layout import read_layout
from semid.data import Dataset, Examples
from semid.evaluation import accuracy, group_ids, item_places, paired_bootstrap
from semid.graphs import ItemGraph
from semid.recommender import Recommender
from semid.stage import run_recorded

Rows = Int[np.ndarray, " _"]

_WEIGHTS = np.arange(11) / 10
# Tried of a gate's logits by NDCG; penalty of its coefficients; items of a model whose probability is asked for.
_SHIFTS, _SCALES, _RIDGE, _LISTED = np.arange(-12, 13) / 4, (0.0, 0.25, 0.5, 1.0), 1e-4, 50


def main(dataset: Path, model: Path, out: Path, users: int | None = None, seed: int = 0) -> None:
    """Measure, and print.

    Args:
        dataset: Folder of research data (see `experiments.layout`).
        model: A recommender with its item graph, trained on these data.
        out: JSON file of features and NDCG by user; it is read if it exists.
        users: Number of random validation users; none given: all.
        seed: Seed of the users and of the halves.
    """
    request = {"model": Recommender.from_pretrained(model).digest, "dataset": dataset.name, "users": users}
    measured = run_recorded(request, out, partial(_measured, dataset, model, users))
    ndcg, features = np.array(measured["ndcg"]), {name: np.array(x) for name, x in measured["features"].items()}
    of_target = np.array(measured["of_target"])
    halves = np.array_split(np.random.default_rng(seed).permutation(len(ndcg)), 2)
    arms = {"gate": [name for name in features if name != "age"]}
    if "age" in features:
        arms["gate, with age"] = list(features)
    constant = _exchanged(halves, lambda fitted, asked: np.full(len(asked), ndcg[fitted].mean(axis=0).argmax()))
    of_constant = _at(ndcg, constant)
    print(f"{model}, {len(ndcg):,} validation users; of one weight each, NDCG@10 {ndcg.mean(axis=0).round(4).tolist()}")
    print(f"constant {_WEIGHTS[constant].mean():.2f}: NDCG@10 {of_constant.mean():.4f}")
    print(f"the best weight of each user, in hindsight: NDCG@10 {ndcg.max(axis=1).mean():.4f}")
    for arm, names in arms.items():
        x = np.column_stack([features[name] for name in names])
        chosen = _exchanged(halves, partial(_gated, x, ndcg, of_target))
        gain = paired_bootstrap(_at(ndcg, chosen), of_constant)
        print(f"{arm} ({', '.join(names)}): NDCG@10 {_at(ndcg, chosen).mean():.4f}, gain {gain}")
        print(f"  weights {np.quantile(_WEIGHTS[chosen], [0.05, 0.5, 0.95]).tolist()} at 5, 50, 95%")


def _measured(folder: Path, model: Path, users: int | None) -> dict[str, Any]:
    """Features of validation histories, and their NDCG@10 by weight of the graph."""
    dataset, recommender = read_layout(folder), Recommender.from_pretrained(model)
    examples = dataset.splits.examples("validation")
    if users is not None:
        examples = examples.take(np.sort(np.random.default_rng(0).permutation(len(examples))[:users]))
    groups = np.arange(dataset.num_items) if recommender.codes is None else group_ids(recommender.codes)
    columns = []
    for weight in _WEIGHTS:
        ranked = recommender.rank(examples.histories, k=10, exclude_seen=False, graph_weight=weight)
        columns.append(accuracy(item_places(ranked, examples.targets, groups), (10,))["ndcg@10"])
        print(f"weight {weight}: NDCG@10 {columns[-1].mean():.4f}", flush=True)
    features, of_target = _features(recommender, examples)
    features |= _ages(folder, dataset, examples)
    return {
        "ndcg": np.stack(columns, axis=1).round(6).tolist(),
        "of_target": of_target.tolist(),
        "features": {name: x.tolist() for name, x in features.items()},
    }


def _features(
    recommender: Recommender, examples: Examples
) -> tuple[dict[str, Float[np.ndarray, " n"]], Float[np.ndarray, "n 2"]]:
    """Features of each history before the mixture ranks; and the target's probability by model and by graph.

    The model's, of items that it does not list, is their share of what is left.
    """
    histories, graph = examples.histories, recommender.graph
    assert graph is not None
    ids = [recommender.item_ids.take(pa.array(histories[index])).to_pylist() for index in range(len(histories))]
    found = recommender.recommend(ids, k=_LISTED, graph_weight=0)
    probs, ranked = np.exp(found.scores), [recommender.catalog.rows(items) for items in found.item_ids]
    target = np.array(
        [(rows == at) @ own[: len(rows)] for rows, at, own in zip(ranked, examples.targets, probs, strict=True)]
    )
    rest = np.maximum(1 - probs.sum(axis=1), 1e-6) / len(recommender.item_ids)
    q = graph.distribution(histories)
    owner = np.repeat(np.arange(len(histories)), np.diff(q.indptr))
    of_graph = np.bincount(owner, np.where(q.indices == examples.targets[owner], q.data, 0), len(histories))
    of_graph_items = graph.rank(histories, k=10)
    common = [len(np.intersect1d(rows[:10], own)) for rows, own in zip(ranked, of_graph_items, strict=True)]
    last = np.array([histories[index][-1] for index in range(len(histories))])
    features = {
        "length": np.log(histories.lengths),
        "popularity of the last item": np.log1p(graph.train_counts[last]),
        "transitions of the history": np.log1p(_evidence(graph, examples)),
        "largest share of the graph": q.max(axis=1).toarray().ravel(),
        "entropy of the graph": np.bincount(owner, -q.data * np.log(np.maximum(q.data, 1e-30)), len(histories)),
        "largest probability of the model": np.log(probs[:, 0]),
        "ten largest probabilities": np.log(probs[:, :10].sum(axis=1)),
        "lists in common": np.array(common) / 10,
    }
    return features, np.stack([np.where(target > 0, target, rest), of_graph], axis=1)


def _evidence(graph: ItemGraph, examples: Examples) -> Float[np.ndarray, " n"]:
    """Counted transitions from the items of each history, weighted towards the latest."""
    rows, real = examples.histories.padded(graph.config.window)
    ages = real.sum(axis=1, keepdims=True) - 1 - np.arange(rows.shape[1])
    degrees = np.asarray(graph.counts.sum(axis=1))
    return (np.where(real, graph.config.recency ** np.maximum(ages, 0), 0) * degrees[rows]).sum(axis=1)


def _ages(folder: Path, dataset: Dataset, examples: Examples) -> dict[str, Float[np.ndarray, " n"]]:
    """Log of the days between the history's end and its target, if the data have times."""
    table = pq.read_table(folder / "interactions.parquet")
    if "rel_time" not in table.column_names:
        return {}
    names, order = ("user_id", "position", "rel_time"), dataset.users.to_pylist()
    times = {(str(user), place): time for user, place, time in zip(*(table[x].to_pylist() for x in names), strict=True)}
    asked = zip(examples.histories.users.tolist(), examples.histories.lengths.tolist(), strict=True)
    seconds = [times[order[user], place] - times[order[user], place - 1] for user, place in asked]
    return {"age": np.log1p(np.array(seconds) / 86400)}


def _exchanged(halves: Sequence[Rows], choose: Callable[[Rows, Rows], Rows]) -> Rows:
    """Indices of weights; the weights of each half are chosen on the other."""
    chosen = np.zeros(sum(map(len, halves)), int)
    for fitted, asked in (halves, halves[::-1]):
        chosen[asked] = choose(fitted, asked)
    return chosen


def _gated(
    x: Float[np.ndarray, "n d"],
    ndcg: Float[np.ndarray, "n w"],
    of_target: Float[np.ndarray, "n 2"],
    fitted: Rows,
    asked: Rows,
) -> Rows:
    """Indices of the weights that the gate, fitted to `fitted`, gives the users `asked`."""
    x = (x - x[fitted].mean(axis=0)) / np.maximum(x[fitted].std(axis=0), 1e-9)
    x = np.column_stack([np.ones(len(x)), x])
    p, q = of_target[fitted].T

    @jax.jit
    def loss(coefficients: Array) -> Array:
        weight = jax.nn.sigmoid(x[fitted] @ coefficients)
        return -jnp.log((1 - weight) * p + weight * q).mean() + _RIDGE * (coefficients[1:] ** 2).sum()

    start = np.zeros(x.shape[1])
    logits = x @ minimize(jax.value_and_grad(loss), start, jac=True, method="L-BFGS-B").x
    logits -= logits[fitted].mean()
    rounded = [_rounded(scale * logits + shift) for scale in _SCALES for shift in _SHIFTS]
    return max(rounded, key=lambda chosen: _at(ndcg, chosen)[fitted].mean())[asked]


def _rounded(logits: Float[np.ndarray, " n"]) -> Rows:
    """Indices of the weights nearest to the logistic function of logits."""
    return np.round((len(_WEIGHTS) - 1) / (1 + np.exp(-logits))).astype(int)


def _at(ndcg: Float[np.ndarray, "n w"], chosen: Rows) -> Float[np.ndarray, " n"]:
    return np.take_along_axis(ndcg, chosen[:, None], axis=1)[:, 0]


if __name__ == "__main__":
    tyro.cli(main)
