"""One evaluator for every model: rank the full catalogue, measure, and say how it was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from semid.artifacts import write_json
from semid.data.dataset import Dataset
from semid.data.histories import Histories
from semid.data.splits import Examples
from semid.errors import SemidError
from semid.evaluation import metrics
from semid.evaluation.metrics import MetricState

TIE_RULE = "interactions of equal time in source order; items of equal code tuple in expectation over their order"


@runtime_checkable
class Ranker(Protocol):
    """What `evaluate` measures.

    `item_ids` gives the model's own row order; `codes` is None for a model without codes; `tie_break` says that the
    last level only tells colliding items apart. `rank(histories, *, k, exclude_seen, **options)` gives the `k` best of
    its item rows for each history, Int [n, k], best first, -1 where there are fewer.
    """

    @property
    def item_ids(self) -> pa.Array: ...
    @property
    def codes(self) -> Int[np.ndarray, "items level"] | None: ...
    @property
    def tie_break(self) -> bool: ...
    @property
    def rank(self) -> Callable[..., Int[np.ndarray, "n k"]]: ...  # models differ in their options


@dataclass(frozen=True)
class Metrics:
    """Means by name, the accuracies of each example in the split's order (for `paired_bootstrap`), and provenance.

    Names: `recall@K` (equal to the hit rate: one target an example), `ndcg@K`, `mrr` (0 below rank max K);
    `code_recall@K`, `code_ndcg@K` for models with codes; `valid`, `coverage@K`, `gini@K`, `popularity_rank@K` of the
    lists; `ndcg@K/activity_*` by the length of the history, `ndcg@K/popularity_*` by the target's training count.
    """

    values: dict[str, float]
    per_example: dict[str, Float[np.ndarray, " n"]]
    provenance: dict[str, Any]

    def row(self, model: str) -> dict[str, str | float]:
        """One row of `metrics.json`."""
        return {"model": model, **self.values}


def evaluate(
    ranker: Ranker,
    dataset: Dataset,
    *,
    split: str = "test",
    ks: Sequence[int] = (5, 10),
    exclude_seen: bool = False,
    batch_size: int = 1024,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Metrics:
    """Measure `ranker` on every example of the split, against its full catalogue.

    `options` go to `ranker.rank` (a Recommender takes `beam_size`); `progress(done, total)` is called after each
    batch. Raises SemidError if the ranker does not know an item of the split, or lists an item twice, one that does
    not exist or, under `exclude_seen`, one of the history.
    """
    _check_arguments(ranker, ks, batch_size)
    task = _task(ranker, dataset, split, ks)
    state, per_example = MetricState({}, np.zeros(len(task.groups), np.int64), max(ks)), []
    for start in range(0, len(task.examples), batch_size):
        window = slice(start, start + batch_size)
        histories = task.examples.histories.take(window)
        ranked = np.asarray(ranker.rank(histories, k=max(ks), exclude_seen=exclude_seen, **options))
        _check_lists(ranked, histories, max(ks), ranker, exclude_seen)
        batch, values = _measure(task, window, ranked, ks, exclude_seen)
        state += batch
        per_example.append(values)
        if progress:
            progress(min(start + batch_size, len(task.examples)), len(task.examples))
    return Metrics(
        values=state.compute(),
        per_example={name: np.concatenate([part[name] for part in per_example]) for name in per_example[0]},
        provenance=_provenance(dataset, task, split, ks, exclude_seen, options),
    )


@dataclass(frozen=True)
class _Task:
    """A split in the ranker's item rows, and all that does not depend on what the ranker answers."""

    examples: Examples
    groups: Int[np.ndarray, " items"]
    code_groups: Int[np.ndarray, " items"] | None
    popularity: Float[np.ndarray, " items"]
    segments: dict[str, Bool[np.ndarray, " n"]]
    bounds: dict[str, list[int]]


def _task(ranker: Ranker, dataset: Dataset, split: str, ks: Sequence[int]) -> _Task:
    examples, counts = in_rows_of(ranker, dataset, split)
    codes = None if ranker.codes is None else np.asarray(ranker.codes)
    groups = np.arange(len(counts)) if codes is None else metrics.group_ids(codes)
    code_groups = groups if codes is not None else None
    if codes is not None and ranker.tie_break:
        code_groups = metrics.group_ids(codes[:, :-1])
    lengths, wanted = examples.histories.lengths, counts[examples.targets]
    activity, warm = metrics.terciles(lengths), metrics.terciles(counts[counts > 0])
    thirds = ("low", "mid", "high")
    k = 10 if 10 in ks else max(ks)
    segments = {f"ndcg@{k}/activity_{n}": np.searchsorted(activity, lengths) == i for i, n in enumerate(thirds)}
    segments |= {
        f"ndcg@{k}/popularity_{n}": (np.searchsorted(warm, wanted) == i) & (wanted > 0) for i, n in enumerate(thirds)
    }
    segments[f"ndcg@{k}/popularity_cold"] = wanted == 0
    bounds = {"activity": activity.tolist(), "popularity": warm.tolist()}
    return _Task(examples, groups, code_groups, metrics.popularity_ranks(counts), segments, bounds)


def in_rows_of(ranker: Ranker, dataset: Dataset, split: str) -> tuple[Examples, Int[np.ndarray, " items"]]:
    """The split's examples, and the training count of every item, in the ranker's rows."""
    examples, train = dataset.splits.examples(split), dataset.splits.train
    counts = train.popularity(dataset.num_items)
    if dataset.item_ids.equals(ranker.item_ids):
        return examples, counts
    rows = pc.fill_null(pc.index_in(dataset.item_ids, ranker.item_ids), -1).to_numpy().astype(np.int32)
    _check_known(rows, examples, dataset, split)
    own_counts = np.zeros(len(ranker.item_ids), np.int64)
    own_counts[rows[rows >= 0]] = counts[rows >= 0]
    old = examples.histories
    return Examples(Histories(old.users, rows[old.items], old.starts, old.ends), rows[examples.targets]), own_counts


def _check_known(rows: Int[np.ndarray, " items"], examples: Examples, dataset: Dataset, split: str) -> None:
    old, length = examples.histories, len(examples.histories.items) + 1
    # Histories are windows that overlap: position i is used where more windows have started than ended.
    depth = np.cumsum(np.bincount(old.starts, minlength=length) - np.bincount(old.ends, minlength=length))
    used = np.union1d(old.items[depth[:-1] > 0], examples.targets)
    unknown = used[rows[used] < 0]
    if len(unknown):
        names = ", ".join(dataset.item_ids.take(pa.array(unknown[:3])).to_pylist())
        raise SemidError(
            f"{len(unknown)} items of the {split} split of dataset {dataset.name!r} are not in the model's catalogue "
            f"({names}{', ...' if len(unknown) > 3 else ''}); evaluate on the dataset that the catalogue was made from"
        )


def _measure(
    task: _Task, window: slice, ranked: Int[np.ndarray, "n k"], ks: Sequence[int], exclude_seen: bool
) -> tuple[MetricState, dict[str, Float[np.ndarray, " n"]]]:
    histories, targets = task.examples.histories.take(window), task.examples.targets[window]
    places = metrics.item_places(ranked, targets, task.groups, seen=histories if exclude_seen else None)
    per_example = metrics.accuracy(places, ks)
    values = dict(per_example)
    if task.code_groups is not None:
        by_code = metrics.accuracy(metrics.code_places(ranked, targets, task.code_groups), ks)
        values |= {f"code_{name}": value for name, value in by_code.items() if name != "mrr"}
    for name, members in task.segments.items():
        values[name] = per_example[name.split("/")[0]][members[window]]
    available = np.full(len(targets), len(task.groups))
    if exclude_seen:
        available -= metrics.distinct_lengths(histories, len(task.groups))
    return metrics.measure(values, ranked, available=available, popularity=task.popularity), per_example


def _check_arguments(ranker: Ranker, ks: Sequence[int], batch_size: int) -> None:
    if not isinstance(ranker, Ranker):
        raise SemidError(f"expected a ranker with item_ids, codes, tie_break and rank(), got {type(ranker).__name__}")
    if not ks or min(ks) < 1 or batch_size < 1:
        raise SemidError(f"expected ks and batch_size of at least 1, got ks {tuple(ks)} and batch_size {batch_size}")


def _check_lists(
    ranked: Int[np.ndarray, "n k"], histories: Histories, k: int, ranker: Ranker, exclude_seen: bool
) -> None:
    model, num_items = type(ranker).__name__, len(ranker.item_ids)
    if ranked.shape != (len(histories), k) or not np.issubdtype(ranked.dtype, np.integer):
        raise SemidError(
            f"expected integers [{len(histories)}, {k}] from {model}.rank, got {ranked.dtype} {ranked.shape}"
        )
    if ranked.min(initial=0) < -1 or ranked.max(initial=0) >= num_items:
        raise SemidError(f"{model}.rank listed rows {ranked.min()} to {ranked.max()}; expected -1 to {num_items - 1}")
    faults = {"twice in one list": metrics.repeated(ranked) & (ranked >= 0)}
    if exclude_seen:
        faults["of the history despite exclude_seen"] = metrics.in_history(ranked, histories)
    for what, wrong in faults.items():
        if wrong.any():
            first = ranker.item_ids[int(ranked[wrong][0])].as_py()
            raise SemidError(f"{model}.rank listed items {what}: {wrong.sum()} entries of a batch, the first {first!r}")


def _provenance(
    dataset: Dataset, task: _Task, split: str, ks: Sequence[int], exclude_seen: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {
        "dataset": dataset.name,
        "users": dataset.num_users,
        "items": dataset.num_items,
        "interactions": len(dataset.item),
        "catalogue_items": len(task.groups),
        "split": split,
        "split_rule": dataset.config["split_rule"],
        "tie_rule": TIE_RULE,
        "examples": len(task.examples),
        "exclude_seen": exclude_seen,
        "ks": list(ks),
        "options": {name: value if isinstance(value, plain) else str(value) for name, value in options.items()},
        "tercile_bounds": task.bounds,
        "segment_examples": {name.split("/")[1]: int(members.sum()) for name, members in task.segments.items()},
    }


def write_metrics(
    path: str | Path, split: str, rows: Sequence[Mapping[str, str | float]], provenance: Mapping[str, Any]
) -> None:
    """Write `metrics.json`: the split, one row a model, and how they were measured."""
    write_json(Path(path), {"split": split, "rows": [dict(row) for row in rows], "provenance": dict(provenance)})
