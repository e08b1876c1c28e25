"""One evaluator for all models: rank the full catalogue, measure, and record how it was measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from semid import artifacts
from semid.arrow import write_parquet
from semid.artifacts import Origin
from semid.config import is_whole
from semid.data import Dataset, Examples, Histories, SourceOrder, TieRule, as_ids, as_masks
from semid.errors import SemidError
from semid.evaluation import metrics
from semid.evaluation.held_out import EvaluationSet, examples_from_table
from semid.evaluation.metrics import ItemGroups, MetricState


@runtime_checkable
class Ranker(Protocol):
    """Anything that `evaluate` can measure.

    `item_ids` defines the model's item rows; `codes` is None for a model without codes; `tie_break` tells whether the
    last level is a tie-break. `rank(histories, *, k, exclude_seen, **options)` returns the `k` best item rows for each
    history, Int [n, k], best first, padded with -1. Optional attributes:

    `active`: mask of the item rows that it recommends; others are not part of the catalogue that it is measured on.
    `repeats`: if False, it never recommends an item of the history, whatever `exclude_seen` is.
    `user_ids`: the `users` of histories are then indices into these, -1 for unknown ones.
    `origin` (its artifact) or `dataset` (digest of its training dataset): other datasets are refused by default.
    """

    @property
    def item_ids(self) -> pa.Array: ...
    @property
    def codes(self) -> Int[np.ndarray, "items level"] | None: ...
    @property
    def tie_break(self) -> bool: ...
    @property
    def rank(self) -> Callable[..., Int[np.ndarray, "n k"]]: ...  # models differ in their options


# Groups of examples: thirds by history length, and by the training count of the target (cold: a count of 0).
GROUPS = {"activity": ("low", "mid", "high"), "popularity": ("low", "mid", "high", "cold")}


@dataclass(frozen=True)
class Metrics:
    """Means by name, the accuracies of each example in the split's order (for `paired_bootstrap`), and provenance.

    Names: `recall@K` (equal to the hit rate, as an example has one target), `ndcg@K`, `mrr` (0 below rank max K);
    `code_recall@K`, `code_ndcg@K` for models with codes; `valid`, `coverage@K`, `gini@K`, `popularity_rank@K` of the
    lists; `ndcg@K/activity_*` by the length of the history, `ndcg@K/popularity_*` by the target's training count.
    """

    values: dict[str, float]
    per_example: dict[str, Float[np.ndarray, " n"]]
    provenance: dict[str, Any]
    ranked: Int[np.ndarray, "n k"] = field(repr=False)
    """The lists, in the ranker's item rows, of the largest K."""
    groups: dict[str, Int[np.ndarray, " n"]] = field(default_factory=dict)
    """Number of each example's group in `GROUPS`."""

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.values.items() if name in self.per_example)
        source = "/".join(str(self.provenance[name]) for name in ("dataset", "split") if name in self.provenance)
        return f"Metrics({shown}; {self.provenance.get('examples', 0):,} examples{f' of {source}' if source else ''})"

    def row(self, model: str) -> dict[str, str | float]:
        """One row of `metrics.json`."""
        return {"model": model, **self.values}


def evaluate(
    ranker: Ranker,
    data: Dataset | str | Path | pa.Table | Any,
    *,
    split: str = "test",
    ks: Sequence[int] = (5, 10),
    exclude_seen: bool = False,
    allowed: Bool[np.ndarray, " items"] | Bool[np.ndarray, "n items"] | None = None,
    item_ids: pa.Array | None = None,
    drop_unknown: bool = False,
    other_dataset: bool = False,
    own: Sequence[str] = (),
    batch_size: int = 1024,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Metrics:
    """Measure `ranker` on every example of a dataset's split, or of a table, against its full catalogue.

    A table has the columns `history` (item ids, oldest first) and `target`; see `examples_from_table` for the files
    and frames that it may be, and for `drop_unknown`:

        recommender = Recommender.from_pretrained("handed_over")
        in_stock = recommender.allow(["i1", "i2", "i5"])
        metrics = evaluate(recommender, "held_out.parquet", ks=(5, 10), beam_size=100, allowed=in_stock)
        print(metrics.values["recall@10"], metrics.provenance["targets_out_of_reach"])

    `allowed` is a mask by the ranker's item rows of what may be recommended, for all examples or one for each. Targets
    that cannot be recommended (not allowed, or in their history under `exclude_seen` or for a model that leaves the
    history out) are misses, and the provenance has their number.
    `item_ids` is the common catalogue of several models: a ranker recommends only these items, and those that it does
    not know count in coverage, Gini and popularity ranks. None: the ranker's own catalogue.
    `other_dataset` allows a ranker trained on another dataset, whose training part may contain this test part; the
    provenance records it.
    `own` gives a model with conditions each target's own: ("event",) tells it whether the user bought or looked. Such
    figures are not comparable with others, and the provenance says so.
    `options` go to `ranker.rank` (a Recommender takes `beam_size`, `condition`, `sample`). With a condition per example
    each batch gets its part; `beam_size` goes only to rankers with codes. `progress(done, total)` is called with 0
    before the first batch and then after each.
    Raises SemidError if the ranker does not know an item of the data, was trained on another dataset, or lists an item
    that is repeated, unknown or not allowed; and for `item_ids` with repeats, or none of the ranker's items.
    """
    ks, exclude_seen = _checked_ks(ranker, ks, batch_size), bool(exclude_seen)
    item_ids = _checked_item_ids(item_ids, options)
    options = search_options(ranker, options)
    evaluation_set = _evaluation_set(ranker, data, split, drop_unknown, other_dataset)
    task = _task(ranker, evaluation_set, ks, allowed, exclude_seen, item_ids)
    state, per_example, lists = MetricState({}, np.zeros(len(task.popularity), np.int64), max(ks)), [], []
    out_of_reach = 0
    progress = progress or _silent
    if "sample" in options:  # draws depend on a history's number in the call, so there is only one batch
        batch_size = max(len(task.examples), 1)
    progress(0, len(task.examples))
    for start in range(0, len(task.examples), batch_size):
        part = task.part(slice(start, start + batch_size))
        condition = _select_conditions(options.get("condition"), evaluation_set, part.window)
        conditions = condition_option(ranker, task.examples.take(part.window), own, condition)
        arguments = {**part.mask, **options, **conditions}
        ranked = np.asarray(ranker.rank(part.histories, k=max(ks), exclude_seen=exclude_seen, **arguments))
        _check_lists(ranked, part, max(ks), ranker)
        batch, values = _measure(task, part, ranked, ks)
        state += batch
        out_of_reach += int((~metrics.reachable(part.targets, seen=part.seen, allowed=part.allowed)).sum())
        per_example.append(values)
        lists.append(ranked)
        progress(min(start + batch_size, len(task.examples)), len(task.examples))
    recommended = np.concatenate([state.recommended[task.active], np.zeros(task.unknown, np.int64)])
    active_state = MetricState(state.totals, recommended, state.k)
    provenance = _provenance(task, ks, exclude_seen, options, out_of_reach) | _model(ranker)
    return Metrics(
        values=active_state.compute(),
        per_example={name: np.concatenate([part[name] for part in per_example]) for name in per_example[0]},
        provenance=provenance | ({"own_conditions": list(own)} if own else {}),
        ranked=np.concatenate(lists),
        groups=task.members,
    )


def search_options(ranker: Ranker, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a ranker's call, without `beam_size` for rankers without codes."""
    return {name: value for name, value in options.items() if name != "beam_size" or ranker.codes is not None}


def condition_option(ranker: Ranker, examples: Examples, own: Sequence[str], condition: Any = None) -> dict[str, Any]:
    """The option `condition` for a ranker: each target's `own` event, group or text, or a given condition."""
    if not own:
        return {} if condition is None else {"condition": condition}
    if condition is not None:
        raise SemidError("`own` is each target's own condition, and `condition` another one; give one of them")
    conditions = getattr(ranker, "own_conditions", None)
    if conditions is None:
        raise SemidError(f"{type(ranker).__name__} knows no conditions; leave `own` out")
    return {"condition": conditions(examples.targets, examples.target_events, own)}


def _select_conditions(given: Any, evaluation_set: EvaluationSet, window: slice) -> Any:
    """The conditions of a window of examples, if there is one per example (a list, or arrays by part); else `given`."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        return given
    rows, is_arrays = evaluation_set.rows[window], hasattr(given, "_fields")
    for part in given if is_arrays else [given]:
        if part is not None and len(part) != evaluation_set.asked:
            each = f"one for each of {evaluation_set.asked} examples"
            raise SemidError(f"expected one condition, or {each}, got {len(part)}")
    if is_arrays:
        return type(given)(*(None if part is None else np.asarray(part)[rows] for part in given))
    return [given[row] for row in rows]


def _model(ranker: Ranker) -> dict[str, Any]:
    """Digests of a model's artifact (None without one) and its catalogue, which identify the model of the figures."""
    digests = {name: getattr(getattr(ranker, name, None), "digest", None) for name in ("origin", "catalog")}
    return {"model": digests} if digests["catalog"] else {}


def _silent(done: int, total: int) -> None:
    del done, total


@dataclass(frozen=True)
class _Task:
    """Examples in the ranker's item rows, and everything that does not depend on the ranker's lists."""

    examples: Examples
    source: dict[str, Any]
    groups: ItemGroups
    code_groups: Int[np.ndarray, " items"] | None
    popularity: Float[np.ndarray, " items"]
    members: dict[str, Int[np.ndarray, " n"]]
    segments: dict[str, Bool[np.ndarray, " n"]]
    bounds: dict[str, list[int]]
    active: Bool[np.ndarray, " items"]
    unknown: int
    """Number of items of the catalogue that the ranker does not know."""
    allowed: Bool[np.ndarray, "masks items"] | None
    unseen: bool
    """Lists must not contain items of the history."""

    def part(self, window: slice) -> _Part:
        """Some of the examples."""
        masks = self.allowed
        if masks is not None and len(masks) > 1:
            masks = masks[window]
        some = self.examples.take(window)
        return _Part(window, some.histories, some.targets, masks, some.histories if self.unseen else None)


@dataclass(frozen=True)
class _Part:
    """A batch of examples, and what may be recommended for them."""

    window: slice
    histories: Histories
    targets: Int[np.ndarray, " n"]
    allowed: Bool[np.ndarray, "masks items"] | None
    seen: Histories | None

    @property
    def mask(self) -> dict[str, Any]:
        """The ranker's option `allowed`, left out if there is no mask, as some rankers do not take it."""
        return {} if self.allowed is None else {"allowed": self.allowed[0] if len(self.allowed) == 1 else self.allowed}


def other_datasets(rankers: Mapping[str, Ranker], dataset: Dataset, *, other_dataset: bool) -> dict[str, str]:
    """Datasets (digests) of the rankers that were trained on another dataset than this one, by ranker's name.

    A ranker's item graph counts, too. Raises SemidError for the first such ranker unless `other_dataset` is set.
    """
    parts = [(name, part) for name, ranker in rankers.items() for part in (ranker, getattr(ranker, "graph", None))]
    trained = [(name, _trained_on(part)) for name, part in parts]
    found = {name: digest for name, made in trained if made and (digest := dataset.other_source(made)) is not None}
    if found and not other_dataset:
        (name, digest), *_ = found.items()
        here = f"dataset {dataset.name!r}" if dataset.origin is None else dataset.origin.folder
        raise SemidError(
            f"{name}: trained on dataset digest {digest[:16]}, not on {here} of {dataset.digest[:16]}, and what is test"
            " here may have been training there; name the dataset that it was trained on, or allow this one with"
            " other_dataset=True (--other-dataset)"
        )
    return found


def _trained_on(ranker: Any) -> Origin | str | None:
    """The artifact of a ranker, or the digest of the dataset that it was trained on; None or empty if unknown."""
    known = getattr(ranker, "origin", None) or getattr(ranker, "dataset", None)
    return known if isinstance(known, Origin | str) else None


def _evaluation_set(ranker: Ranker, data: Any, split: str, drop_unknown: bool, other_dataset: bool) -> EvaluationSet:
    if not isinstance(data, Dataset):
        if split != "test":
            raise SemidError(f"a table has no split {split!r}; leave it out, all its rows are examples")
        return examples_from_table(ranker, data, drop_unknown=drop_unknown)
    if drop_unknown:
        raise SemidError("drop_unknown is for tables; a dataset's items are those that its catalogue was made from")
    origin = getattr(ranker, "origin", None)
    name = type(ranker).__name__ if origin is None else str(origin.folder)
    trained_on = other_datasets({name: ranker}, data, other_dataset=other_dataset)
    examples, counts = examples_for_ranker(ranker, data, split)
    provenance = {
        "dataset": data.name,
        "users": data.num_users,
        "items": data.num_items,
        "interactions": len(data.item),
        "split": split,
        "split_rule": data.config["split_rule"],
        "repeat_share": data.repeats.share,
        "tie_rule": _tie_rule(data.ties),
        **({"trained_on_other_dataset": trained_on} if trained_on else {}),
    }
    return EvaluationSet(examples, counts, provenance, np.arange(len(examples)), len(examples))


def _task(
    ranker: Ranker,
    evaluation_set: EvaluationSet,
    ks: Sequence[int],
    allowed: Bool[np.ndarray, "..."] | None,
    exclude_seen: bool,
    item_ids: pa.Array | None,
) -> _Task:
    examples, counts = evaluation_set.examples, evaluation_set.counts
    codes = None if ranker.codes is None else np.asarray(ranker.codes)
    groups = ItemGroups(np.arange(len(counts)) if codes is None else metrics.group_ids(codes))
    code_groups = groups.numbers if codes is not None else None
    if codes is not None and ranker.tie_break:
        code_groups = metrics.group_ids(codes[:, :-1])
    active, unknown = getattr(ranker, "active", np.ones(len(counts), bool)), 0
    if item_ids is not None:
        active = active & pc.is_in(ranker.item_ids, item_ids).to_numpy(zero_copy_only=False)
        if not active.any():
            raise SemidError(
                f"{type(ranker).__name__} recommends none of the {len(item_ids):,} item_ids; give some of its items, "
                "or leave item_ids out"
            )
        unknown = len(item_ids) - int(active.sum())
    lengths, target_counts = examples.histories.lengths, counts[examples.targets]
    activity, warm = metrics.terciles(lengths), metrics.terciles(counts[active & (counts > 0)])
    cold = GROUPS["popularity"].index("cold")
    members = {
        "activity": np.searchsorted(activity, lengths),
        "popularity": np.where(target_counts > 0, np.searchsorted(warm, target_counts), cold),
    }
    named = ((group, i, name) for group, names in GROUPS.items() for i, name in enumerate(names))
    segments = {f"ndcg@{main_cutoff(ks)}/{group}_{name}": members[group] == i for group, i, name in named}
    bounds = {"activity": activity.tolist(), "popularity": warm.tolist()}
    masks = _masks(allowed, active, evaluation_set)
    popularity = np.zeros(len(counts))
    ranks = metrics.popularity_ranks(np.append(counts[active], np.zeros(unknown, np.int64)))
    popularity[active] = ranks[: active.sum()]
    source = {**evaluation_set.provenance, "leaves_out_history": not getattr(ranker, "repeats", True)}
    unseen = exclude_seen or source["leaves_out_history"]
    return _Task(
        examples, source, groups, code_groups, popularity, members, segments, bounds, active, unknown, masks, unseen
    )


def check_cutoff(measured: Mapping[str, Metrics], k: int) -> None:
    """Raise SemidError naming a model that was not measured at this K."""
    for name, model_metrics in measured.items():
        if f"recall@{k}" not in model_metrics.per_example:
            there = ", ".join(key for key in model_metrics.per_example if key.startswith("recall@"))
            raise SemidError(f"{name} was measured at {there}, not at {k}; give a k of these, or ks with {k}")


def check_examples(measured: Mapping[str, Metrics], dataset: Dataset, split: str) -> None:
    """Raise SemidError naming a model that was measured on another dataset or split, so on other users."""
    expected = {"dataset": dataset.name, "split": split, "examples": len(dataset.splits.examples(split))}
    for name, model_metrics in measured.items():
        found = {key: model_metrics.provenance.get(key, value) for key, value in expected.items()}
        found["examples"] = len(model_metrics.ranked)
        if found != expected:
            there, here = ("{examples:,} examples of {dataset}/{split}".format(**one) for one in (found, expected))
            raise SemidError(f"{name} was measured on {there}, not on the {here}; measure all on one split")


def main_cutoff(ks: Sequence[int]) -> int:
    """The cut-off by which models are compared: 10, or the largest."""
    return 10 if 10 in ks else max(ks)


def _masks(
    allowed: Any, active: Bool[np.ndarray, " items"], evaluation_set: EvaluationSet
) -> Bool[np.ndarray, "masks items"] | None:
    """One mask for all examples, or one for each; warns of targets that cannot be recommended."""
    if allowed is None and active.all():
        return None
    given = active[None]
    if allowed is not None:
        given = as_masks(allowed, num_items=len(active), num_histories=evaluation_set.asked, of="examples")
    masks = (given if len(given) == 1 else given[evaluation_set.rows]) & active[None]
    targets = evaluation_set.examples.targets
    if missed := int((~metrics.reachable(targets, seen=None, allowed=masks)).sum()):
        what = "not allowed, or removed from the catalogue"
        warnings.warn(f"{missed} of {len(targets)} targets are {what}: each counts as a miss", stacklevel=4)
    return masks


def examples_for_ranker(ranker: Ranker, dataset: Dataset, split: str) -> tuple[Examples, Int[np.ndarray, " items"]]:
    """The split's examples, and the training counts of all items, in the ranker's item rows."""
    examples, train = _with_known_events(dataset.splits.examples(split), dataset, ranker), dataset.splits.train
    examples = _with_known_users(examples, dataset, ranker)
    counts = train.popularity(dataset.num_items)
    if dataset.item_ids.equals(ranker.item_ids):
        return examples, counts
    rows = pc.fill_null(pc.index_in(dataset.item_ids, ranker.item_ids), -1).to_numpy().astype(np.int32)
    _check_known(rows, examples, dataset, split)
    own_counts = np.zeros(len(ranker.item_ids), np.int64)
    own_counts[rows[rows >= 0]] = counts[rows >= 0]
    histories = replace(examples.histories, items=rows[examples.histories.items])
    return replace(examples, histories=histories, targets=rows[examples.targets]), own_counts


def _with_known_events(examples: Examples, dataset: Dataset, ranker: Ranker) -> Examples:
    """The examples with events numbered as in the ranker's `conditions.events`, if it reads events; 0 for others."""
    names = getattr(getattr(ranker, "conditions", None), "events", ())
    if not names or examples.histories.events is None or examples.target_events is None or names == dataset.events:
        return examples
    places = np.array([0, *(names.index(name) + 1 if name in names else 0 for name in dataset.events)], np.int32)
    histories = replace(examples.histories, events=places[examples.histories.events])
    return replace(examples, histories=histories, target_events=places[examples.target_events])


def _with_known_users(examples: Examples, dataset: Dataset, ranker: Ranker) -> Examples:
    """The examples with users numbered as in the ranker's `user_ids`, if it has any; -1 for others."""
    known = getattr(ranker, "user_ids", None)
    if known is None or dataset.users.equals(known):
        return examples
    places = pc.fill_null(pc.index_in(dataset.users, known), -1).to_numpy().astype(np.int32)
    histories = replace(examples.histories, users=places[examples.histories.users])
    return replace(examples, histories=histories)


def _check_known(rows: Int[np.ndarray, " items"], examples: Examples, dataset: Dataset, split: str) -> None:
    old, length = examples.histories, len(examples.histories.items) + 1
    # Histories are overlapping windows: position i is used if more windows have started than ended before it.
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
    task: _Task, part: _Part, ranked: Int[np.ndarray, "n k"], ks: Sequence[int]
) -> tuple[MetricState, dict[str, Float[np.ndarray, " n"]]]:
    places = task.groups.places(ranked, part.targets, seen=part.seen, allowed=part.allowed)
    per_example = metrics.accuracy(places, ks)
    values = dict(per_example)
    if task.code_groups is not None:
        by_code = metrics.accuracy(metrics.code_places(ranked, part.targets, task.code_groups), ks)
        values |= {f"code_{name}": value for name, value in by_code.items() if name != "mrr"}
    for name, members in task.segments.items():
        values[name] = per_example[name.split("/")[0]][members[part.window]]
    available = metrics.num_candidates(len(part.targets), len(task.popularity), seen=part.seen, allowed=part.allowed)
    return metrics.measure(values, ranked, available=available, popularity=task.popularity), per_example


def _checked_ks(ranker: Ranker, ks: Sequence[int], batch_size: int) -> tuple[int, ...]:
    """Cut-offs as Python integers, as JSON takes them. Raises SemidError for wrong arguments of `evaluate`."""
    if not isinstance(ranker, Ranker):
        raise SemidError(f"expected a ranker with item_ids, codes, tie_break and rank(), got {type(ranker).__name__}")
    if not isinstance(ks, Sequence) or not all(is_whole(k) for k in ks):
        raise SemidError(f"expected ks as a list of whole numbers, such as (5, 10), got {ks!r}")
    if not ks or min(ks) < 1 or not is_whole(batch_size) or batch_size < 1:
        raise SemidError(f"expected ks and batch_size of at least 1, got ks {tuple(ks)} and batch_size {batch_size}")
    return tuple(int(k) for k in ks)


def _checked_item_ids(item_ids: Any, options: Mapping[str, Any]) -> pa.Array | None:
    """The ids as strings, checked to be distinct."""
    if "catalog" in options or not isinstance(item_ids, pa.Array | pa.ChunkedArray | None):
        got = "catalog=" if "catalog" in options else f"a {type(item_ids).__name__}"
        raise SemidError(
            f"expected item_ids as a pyarrow array, got {got}; another catalogue is for the model to take: "
            "Recommender.from_pretrained(model, catalog=...)"
        )
    if item_ids is None:
        return None
    ids = as_ids(item_ids)
    if again := len(ids) - len(ids.unique()):
        raise SemidError(f"item_ids name {again:,} of {len(ids):,} items again; give item_ids.unique()")
    return ids


def _check_lists(ranked: Int[np.ndarray, "n k"], part: _Part, k: int, ranker: Ranker) -> None:
    model, num_items = type(ranker).__name__, len(ranker.item_ids)
    if ranked.shape != (len(part.targets), k) or not np.issubdtype(ranked.dtype, np.integer):
        raise SemidError(
            f"expected integers [{len(part.targets)}, {k}] from {model}.rank, got {ranked.dtype} {ranked.shape}"
        )
    if ranked.min(initial=0) < -1 or ranked.max(initial=0) >= num_items:
        raise SemidError(f"{model}.rank listed rows {ranked.min()} to {ranked.max()}; expected -1 to {num_items - 1}")
    faults = {"twice in one list": metrics.repeated(ranked) & (ranked >= 0)}
    if part.seen is not None:
        faults["of the history, which is left out"] = metrics.in_history(ranked, part.seen)
    if part.allowed is not None:
        faults["that are not allowed"] = ~np.take_along_axis(part.allowed, ranked, axis=1) & (ranked >= 0)
    for what, wrong in faults.items():
        if wrong.any():
            first = ranker.item_ids[int(ranked[wrong][0])].as_py()
            raise SemidError(f"{model}.rank listed items {what}: {wrong.sum()} entries of a batch, the first {first!r}")


def _provenance(
    task: _Task, ks: Sequence[int], exclude_seen: bool, options: Mapping[str, Any], out_of_reach: int
) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    active = int(task.active.sum())
    allowed = active if task.allowed is None else float(task.allowed.sum(axis=1).mean())
    masked = {} if allowed == active else {"allowed_items": allowed}
    return {
        "tie_rule": _tie_rule(SourceOrder()),  # a table's histories are in its own order
        **task.source,
        "catalogue_items": active + task.unknown,
        "examples": len(task.examples),
        "exclude_seen": exclude_seen,
        **masked,
        "targets_out_of_reach": out_of_reach,
        "ks": list(ks),
        "options": {name: value if isinstance(value, plain) else str(value) for name, value in options.items()},
        "tercile_bounds": task.bounds,
        "segment_examples": {name.split("/")[1]: int(members.sum()) for name, members in task.segments.items()},
    }


def _tie_rule(ties: TieRule) -> str:
    ordered = f"interactions of equal time {ties.description}"
    return f"{ordered}; items of equal code tuple in expectation over their order"


def examples_file(metrics: Path) -> Path:
    """File of the examples next to a file of metrics: examples.json for metrics.json, examples_m.json for m.json."""
    return metrics.with_name("examples.json" if metrics.name == "metrics.json" else f"examples_{metrics.name}")


def users_file(metrics: Path) -> Path:
    """File of every user's accuracies: users.parquet for metrics.json, users_m.parquet for m.json."""
    return metrics.with_name("users.parquet" if metrics.name == "metrics.json" else f"users_{metrics.stem}.parquet")


def write_metrics(
    path: str | Path,
    split: str,
    rows: Sequence[Mapping[str, str | float]],
    provenance: Mapping[str, Any],
    *,
    examples: Sequence[Mapping[str, Any]] | None = None,
    users: pa.Table | None = None,
    lists: Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Write `metrics.json`: split, one row per model, metrics of lists (see `compare_lists`), scores by the value of
    events (see `compare_values`), and how they were measured.

    `examples` of recommendations (see `example_users`) go to `examples_file` and accuracies of `users` (see
    `user_table`) to `users_file`, both next to it, and it records their digests.
    """
    path = artifacts.place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"split": split, "rows": [dict(row) for row in rows], "provenance": dict(provenance)}
    content |= {name: dict(part) for name, part in (("lists", lists), ("values", values)) if part is not None}
    written = []
    if examples is not None:
        artifacts.write_json(examples_file(path), examples)
        written.append(examples_file(path))
    if users is not None:
        with artifacts.replacing(users_file(path)) as file:
            write_parquet(users, file)
        written.append(users_file(path))
    if written:
        content["files"] = {file.name: artifacts.sha256(file) for file in written}
    artifacts.write_json(path, artifacts.sealed(content))
