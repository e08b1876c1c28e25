"""Several models on one split: the rows of `metrics.json`, every user's accuracies, and users to look at."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from semid.config import from_dict
from semid.data import Dataset, Examples, HeldOutItems
from semid.data.simulated import SimulatedConfig, simulate
from semid.errors import refuse_path
from semid.evaluation.baselines import Bigram, Popularity
from semid.evaluation.evaluator import (
    GROUPS,
    Metrics,
    Ranker,
    check_examples,
    condition_option,
    evaluate,
    examples_for_ranker,
    search_options,
)
from semid.progress import show_progress

# Users per batch of scores of all items.
_USERS = 64


def baselines(dataset: Dataset, *, asked: Collection[str] = ()) -> dict[str, Ranker]:
    """Popularity and item bigram, from training histories; for a simulated dataset also the oracle: the ceiling.

    If users do not repeat items, popularity and bigram leave the history out, as models do. There is no oracle for
    held-out items (with gaps in the histories it is no ceiling), if models are `asked` for parts of a condition other
    than the event, and for datasets that this version of the simulator does not reproduce (with a warning).
    """
    refuse_path(dataset, "Dataset.load")
    train, repeats = dataset.splits.train, dataset.repeats.common
    rankers: dict[str, Ranker] = {
        "popularity": Popularity.fit(train, dataset.item_ids, repeats=repeats),
        "bigram": Bigram.fit(train, dataset.item_ids, repeats=repeats),
    }
    source = dataset.source or {}
    no_ceiling = isinstance(dataset.split_rule, HeldOutItems) or not set(asked) <= {"event"}
    if source.get("type") == "simulated" and not no_ceiling:
        world = from_dict(SimulatedConfig, source["config"], where=f"dataset {dataset.name!r}: source.config")
        again = simulate(dataclasses.replace(world, images=False))  # pictures do not change interactions
        if np.array_equal(again.dataset.item, dataset.item):
            rankers["oracle"] = again.oracle
        else:
            warnings.warn(
                f"dataset {dataset.name!r} is not what the simulator makes of its config today, so it has no oracle;"
                " `semid prepare simulated` makes one that has",
                stacklevel=2,
            )
    return rankers


def compare(
    rankers: Mapping[str, Ranker],
    dataset: Dataset,
    *,
    split: str = "test",
    ks: tuple[int, ...] = (5, 10),
    beam_size: int = 50,
    exclude_seen: bool = False,
    own: Sequence[str] = (),
    condition: Mapping[str, str] | None = None,
    item_ids: pa.Array | None = None,
    other_dataset: bool = False,
) -> dict[str, Metrics]:
    """Metrics of each ranker by name, with progress. `beam_size` is for rankers with codes, `own` and `condition` for
    those with conditions. Rankers without `active` are measured on the items `item_ids`, others on their own active
    items. See `evaluate` for `own` and `other_dataset`."""
    refuse_path(dataset, "Dataset.load")
    users = len(dataset.splits.examples(split))

    def measure(name: str, ranker: Ranker) -> Metrics:
        with show_progress(f"evaluating {name}", total=users, unit="users") as progress:

            def show(done: int, total: int) -> None:
                if done:
                    progress.advance(done)
                elif ranker.codes is not None:
                    progress.say("compiling ...")

            return evaluate(
                ranker,
                dataset,
                split=split,
                ks=ks,
                exclude_seen=exclude_seen,
                other_dataset=other_dataset,
                progress=show,
                beam_size=beam_size,
                **_asked(ranker, own, condition),
                item_ids=None if hasattr(ranker, "active") else item_ids,
            )

    return {name: measure(name, ranker) for name, ranker in rankers.items()}


def _asked(ranker: Ranker, own: Sequence[str], condition: Mapping[str, str] | None) -> dict[str, Any]:
    """Options of a model about conditions; none for rankers without conditions, such as popularity."""
    if not hasattr(ranker, "conditions"):
        return {}
    return ({"own": own} if own else {}) | ({"condition": condition} if condition else {})


def _condition(
    ranker: Ranker, examples: Examples, own: Sequence[str], condition: Mapping[str, str] | None
) -> dict[str, Any]:
    """The option `condition` of a model for these targets, as in `compare`."""
    asked = _asked(ranker, own, condition)
    return condition_option(ranker, examples, asked.get("own", ()), asked.get("condition"))


def user_table(measured: Mapping[str, Metrics], dataset: Dataset, *, split: str = "test") -> pa.Table:
    """Every example of a split: user, target, its groups, and Recall@K and NDCG@K of each model (`ndcg@10:semid`).

    Rows are in the split's order. Raises SemidError for a model that was measured on another dataset or split.
    """
    check_examples(measured, dataset, split)
    examples, first = dataset.splits.examples(split), next(iter(measured.values()))
    columns: dict[str, pa.Array] = {
        "user": dataset.users.take(pa.array(examples.histories.users)),
        "target": dataset.item_ids.take(pa.array(examples.targets)),
    }
    for group, members in first.groups.items():
        columns[group] = pa.DictionaryArray.from_arrays(pa.array(members.astype(np.int8)), list(GROUPS[group]))
    for name, metrics in measured.items():
        for metric, values in metrics.per_example.items():
            if "@" in metric:
                columns[f"{metric}:{name}"] = pa.array(values.astype(np.float32))
    return pa.table(columns)


@runtime_checkable
class _Scorer(Ranker, Protocol):
    @property
    def log_probs(self) -> Callable[..., Float[np.ndarray, "histories n"]]: ...  # models differ in their options


@runtime_checkable
class _HasShare(Protocol):
    @property
    def graph_share(self) -> float: ...


@runtime_checkable
class _Explained(Protocol):
    @property
    def graph(self) -> Any: ...
    @property
    def explain_rows(self) -> Callable[..., Sequence[_HasShare]]: ...


@runtime_checkable
class _Searchable(_Scorer, Protocol):
    @property
    def catalog_log_probs(self) -> Callable[..., Float[np.ndarray, "histories items"]]: ...


def against_exact(
    ranker: _Searchable,
    dataset: Dataset,
    *,
    split: str = "test",
    k: int = 10,
    beam_size: int = 50,
    seed: int = 0,
    own: Sequence[str] = (),
    condition: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Beam search compared with exact scoring: the share of the exact k best items that the search finds. Items that
    tie with the k-th count as well; items of probability zero do not count.

    Over random users, as many as 2 million (user, item) pairs allow; conditions as in `compare`.
    """
    examples, _ = examples_for_ranker(ranker, dataset, split)
    users = max(min(len(examples), (1 << 21) // len(ranker.item_ids)), 1)
    examples = examples.take(np.random.default_rng(seed).permutation(len(examples))[:users])
    number = np.zeros(2, np.int64)  # of listed items as good as the exact best, and of the exact best
    with show_progress("comparing the beam with exact scores", total=users, unit="users") as progress:
        progress.say("compiling ...")
        asked = _condition(ranker, examples, own, condition)
        found = ranker.rank(examples.histories, k=k, exclude_seen=False, beam_size=beam_size, **asked)
        for start in range(0, users, _USERS):
            some = slice(start, start + _USERS)
            part = examples.take(some)
            scores = ranker.catalog_log_probs(part.histories, **_condition(ranker, part, own, condition))
            exact = -np.sort(-scores, axis=1)[:, :k]
            possible = np.where(exact > -np.inf, exact, np.inf)
            listed = np.where(found[some] >= 0, np.take_along_axis(scores, found[some], axis=1), -np.inf)
            number += np.array([(listed >= possible.min(axis=1, keepdims=True)).sum(), np.isfinite(possible).sum()])
            progress.advance(min(start + _USERS, users))
    return {"users": users, "beam_size": beam_size, f"exact_top_{k}_found": float(number[0] / max(number[1], 1))}


def largest_differences(
    ours: Float[np.ndarray, " n"], theirs: Float[np.ndarray, " n"], *, count: int = 3, seed: int = 0
) -> tuple[Int[np.ndarray, " gains"], Int[np.ndarray, " losses"]]:
    """Examples with the largest gains and losses of one model's accuracy over another's: at most `count` of each; ties
    are drawn by `seed`."""
    difference = ours - theirs
    order = np.random.default_rng(seed).permutation(len(difference))
    order = order[np.argsort(-difference[order], kind="stable")]
    gains, losses = order[:count], order[::-1][:count]
    return gains[difference[gains] > 0], losses[difference[losses] < 0]


def example_users(
    ranker: _Scorer,
    dataset: Dataset,
    *,
    split: str = "test",
    count: int = 8,
    k: int = 10,
    beam_size: int = 50,
    exclude_seen: bool = False,
    seed: int = 0,
    also: Sequence[int] = (),
    own: Sequence[str] = (),
    condition: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Random users, then the rows `also` of the split: history, target and the k best items with codes and
    log-probability (None for probability 0, as of popular items at the end of an item graph's lists), as external ids.

    If the model is mixed with an item graph, each recommendation has the graph's share of its probability. Conditions
    as in `compare`.
    """
    examples, _ = examples_for_ranker(ranker, dataset, split)
    drawn = np.random.default_rng(seed).permutation(len(examples))[:count]
    examples = examples.take(np.concatenate([np.sort(drawn), np.asarray(also, np.int64)]))

    def ids(rows: Int[np.ndarray, " n"]) -> list[str]:
        return ranker.item_ids.take(pa.array(rows)).to_pylist()

    def one(index: int) -> dict[str, Any]:
        rows, example = ranked[index][ranked[index] >= 0], examples.take(slice(index, index + 1))
        asked = _condition(ranker, example, own, condition)
        scores = ranker.log_probs(example.histories, rows, **asked)[0]
        codes = np.empty((len(rows), 0), np.int32) if ranker.codes is None else ranker.codes[rows]
        found = zip(ids(rows), scores.tolist(), codes.tolist(), strict=True)
        listed: list[dict[str, Any]] = [
            {"item_id": i, "score": s if math.isfinite(s) else None, "codes": c} for i, s, c in found
        ]
        if isinstance(ranker, _Explained) and ranker.graph is not None:
            for entry, explanation in zip(listed, ranker.explain_rows(example.histories, rows, **asked), strict=True):
                entry["graph_share"] = explanation.graph_share
        return {
            "user": dataset.users[int(examples.histories.users[index])].as_py(),
            "history": ids(examples.histories[index][-20:]),
            "target": ids(examples.targets[index : index + 1])[0],
            "recommendations": listed,
        }

    users = []
    with show_progress("listing example users", total=len(examples), unit="users") as progress:
        progress.say("compiling ...")
        options = search_options(ranker, {"beam_size": beam_size}) | _condition(ranker, examples, own, condition)
        ranked = ranker.rank(examples.histories, k=k, exclude_seen=exclude_seen, **options)
        for index in range(len(examples)):
            users.append(one(index))
            progress.advance(index + 1)
    return users
