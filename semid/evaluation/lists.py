"""Metrics of recommendation lists beyond accuracy: novelty, diversity, calibration, serendipity, groups of users.

All are means over lists of item rows (-1 for none), except the last two of `compare_lists`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int, Shaped

from semid.data import Dataset, Histories, Tags, usual_tags
from semid.evaluation.evaluator import GROUPS, Metrics, Ranker, check_cutoff, check_examples, examples_for_ranker
from semid.evaluation.metrics import check_samples, user_numbers

# Smoothing of the calibration (Steck, RecSys 2018, eq. 7).
_ALPHA = 0.01
# Maximum numbers in a batch of users or of bootstrap samples.
_BATCH = 1 << 22


@dataclass(frozen=True, eq=False)
class ListTraits:
    """Properties of items for metrics of lists, by item row; metrics of a property that is None are left out.

    `counts` are training interactions; `vectors` are zeros, and `codes` -1, for items without.
    """

    item_ids: pa.Array
    counts: Int[np.ndarray, " items"]
    vectors: Float[np.ndarray, "items dim"] | None = None
    codes: Int[np.ndarray, "items level"] | None = None
    tags: Tags | None = None
    total: int | None = None
    """Sum of all counts plus one each; None: that of these items."""

    @classmethod
    def from_dataset(cls, dataset: Dataset, *, tags: str | None = None, coded: Ranker | None = None) -> ListTraits:
        """Training counts, the first vector column, the column `tags` (by default the first named like categories,
        genres or tags), and the codes of a ranker without its tie-break level.

        Raises SemidError for a column that is not there or holds no tags.
        """
        codes = None
        if coded is not None and coded.codes is not None:
            level = -1 if coded.tie_break and coded.codes.shape[1] > 1 else None
            codes = _at(np.asarray(coded.codes)[:, :level], _rows(coded.item_ids, dataset.item_ids), missing=-1)
        return cls(
            dataset.item_ids,
            dataset.splits.train.popularity(dataset.num_items),
            dataset.vectors(dataset.vector_columns[0]) if dataset.vector_columns else None,
            codes,
            usual_tags(dataset.items) if tags is None else Tags.from_column(dataset.items, tags),
        )

    def for_items(self, item_ids: pa.Array) -> ListTraits:
        """The traits for other item rows; unknown items have no interactions, vector, codes or tags."""
        if item_ids.equals(self.item_ids):
            return self
        rows = _rows(self.item_ids, item_ids)
        return ListTraits(
            item_ids,
            _at(self.counts, rows, missing=0),
            None if self.vectors is None else _at(self.vectors, rows, missing=0),
            None if self.codes is None else _at(self.codes, rows, missing=-1),
            None if self.tags is None else self.tags.take(rows),
            int(self.counts.sum()) + len(self.counts) if self.total is None else self.total,
        )


def list_metrics(
    ranked: Int[np.ndarray, "n k"], histories: Histories, traits: ListTraits
) -> dict[str, Float[np.ndarray, " n"]]:
    """Metrics of each list, by name; NaN if a list or a history is too short.

    `novelty`: mean of -log2 p(i) in bits, p(i) the item's share of the training interactions, each count raised by one.
    `diversity`: 1 minus the mean cosine of all pairs of items with vectors.
    `code_diversity`: mean over all pairs of 1 minus the share of levels in their common prefix: 1 without a common
    first code, 0 for equal codes.
    `tag_entropy`: entropy of the tags q(g) of the list, in bits; an item's tags share its weight equally.
    `calibration_kl`: KL(p || .99 q + .01 p) in bits of the history's tags p from the list's (Steck, RecSys 2018, eq. 6
    and 7); 0 where both have the same.
    """
    parts = [_of_batch(ranked[some], histories.take(some), traits) for some in _batches(ranked, traits)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def compare_lists(
    measured: Mapping[str, Metrics],
    rankers: Mapping[str, Ranker],
    dataset: Dataset,
    *,
    k: int,
    split: str = "test",
    tags: str | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of the lists of `k` of each model that `compare` has measured, as `metrics.json` holds them.

    Each is {value, low, high}, the last two a 95% interval by a bootstrap over users (each with all lists), with the
    same draws for all models. In addition to `list_metrics` there are `serendipity`, the recall of targets that are not
    in the bigram's list; `worst_group`, the lowest NDCG of the thirds of users by history length; and `weak_users`, the
    share of users with a history in the shortest third and an NDCG below the mean (a user with several targets counts
    once per target). All models use the codes of the first ranker that has any.
    """
    check_cutoff(measured, k)
    check_examples(measured, dataset, split)
    check_samples(samples)
    coded = next((name for name, ranker in rankers.items() if ranker.codes is not None), None)
    traits = ListTraits.from_dataset(dataset, tags=tags, coded=None if coded is None else rankers[coded])
    users = user_numbers(dataset.splits.examples(split).histories.users)
    values = {}
    for name, metrics in measured.items():
        histories = examples_for_ranker(rankers[name], dataset, split)[0].histories
        found = list_metrics(metrics.ranked[:, :k], histories, traits.for_items(rankers[name].item_ids))
        if "bigram" in measured:
            surprising = measured["bigram"].per_example[f"recall@{k}"] == 0
            found["serendipity"] = metrics.per_example[f"recall@{k}"] * surprising
        values[name] = _Lists(found, metrics.per_example[f"ndcg@{k}"], metrics.groups["activity"])
    return {
        "k": int(k),
        "tags": None if traits.tags is None else traits.tags.column,
        "vectors": dataset.vector_columns[0] if dataset.vector_columns else None,
        "codes_of": coded,
        "bootstrap": {"samples": samples, "seed": seed},
        "rows": _with_intervals(values, users, samples=samples, seed=seed),
    }


@dataclass(frozen=True, eq=False)
class _Lists:
    """Metric values of each list of one model."""

    of_lists: dict[str, Float[np.ndarray, " n"]]
    ndcg: Float[np.ndarray, " n"]
    activity: Int[np.ndarray, " n"]

    def means(self, weights: Float[np.ndarray, "samples n"]) -> dict[str, Float[np.ndarray, " samples"]]:
        """Means of the metrics over weighted lists; metrics that no list has are left out."""
        found = {name: _mean(weights, value) for name, value in self.of_lists.items() if not np.isnan(value).all()}
        groups = [self.activity == number for number in range(len(GROUPS["activity"]))]
        by_group = [_mean(weights, np.where(group, self.ndcg, np.nan)) for group in groups if group.any()]
        found["worst_group"] = np.fmin.reduce(by_group)
        below = self.ndcg < _mean(weights, self.ndcg)[:, None]
        found["weak_users"] = (weights * (below & groups[0])).sum(axis=1) / weights.sum(axis=1)
        return found


def _with_intervals(
    values: Mapping[str, _Lists], users: Int[np.ndarray, " n"], *, samples: int, seed: int
) -> list[dict[str, Any]]:
    """A row per model; the bootstrap draws do not depend on the number of models."""
    point = {name: of.means(np.ones((1, len(users)))) for name, of in values.items()}
    total = int(users.max(initial=-1)) + 1
    drawn: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in values}
    rng = np.random.default_rng(seed)
    for size in _sizes(samples, max(1, _BATCH // len(users))):
        picks = rng.integers(total, size=(size, total)) + np.arange(size)[:, None] * total
        weights = np.bincount(picks.ravel(), minlength=size * total).reshape(size, total).astype(np.float64)
        for name, of in values.items():
            drawn[name].append(of.means(np.take(weights, users, axis=1)))
    rows = []
    for name, means in point.items():
        row: dict[str, Any] = {"model": name}
        for metric, value in means.items():
            low, high = np.nanquantile(np.concatenate([draw[metric] for draw in drawn[name]]), [0.025, 0.975])
            row[metric] = {"value": float(value[0]), "low": float(low), "high": float(high)}
        rows.append(row)
    return rows


def _mean(weights: Float[np.ndarray, "samples n"], values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " samples"]:
    """Weighted means of the values that are not NaN; NaN for a sample without any."""
    there = ~np.isnan(values)
    return _ratio(weights @ np.where(there, values, 0.0), weights @ there.astype(np.float64))


def _sizes(total: int, most: int) -> Iterator[int]:
    for start in range(0, total, most):
        yield min(most, total - start)


def _batches(ranked: Int[np.ndarray, "n k"], traits: ListTraits) -> Iterator[slice]:
    """Batches of users whose vectors, pairs of codes and tags fit into memory."""
    n, k = ranked.shape
    widths = [k]
    widths += [] if traits.vectors is None else [k * traits.vectors.shape[1]]
    widths += [] if traits.codes is None else [k * k * traits.codes.shape[1]]
    widths += [] if traits.tags is None else [len(traits.tags)]
    size = max(1, _BATCH // max(widths))
    for start in range(0, max(n, 1), size):
        yield slice(start, start + size)


def _of_batch(
    ranked: Int[np.ndarray, "n k"], histories: Histories, traits: ListTraits
) -> dict[str, Float[np.ndarray, " n"]]:
    found = {"novelty": _novelty(ranked, traits)}
    if traits.vectors is not None:
        found["diversity"] = _diversity(ranked, traits.vectors)
    if traits.codes is not None:
        found["code_diversity"] = _code_diversity(ranked, traits.codes)
    if traits.tags is not None:
        found |= _of_tags(ranked, histories, traits.tags)
    return found


def _novelty(ranked: Int[np.ndarray, "n k"], traits: ListTraits) -> Float[np.ndarray, " n"]:
    counts = traits.counts
    bits = -np.log2((counts + 1) / (counts.sum() + len(counts) if traits.total is None else traits.total))
    listed = ranked >= 0
    return _ratio(np.where(listed, bits[ranked], 0.0).sum(axis=1), listed.sum(axis=1))


def _diversity(ranked: Int[np.ndarray, "n k"], vectors: Float[np.ndarray, "items dim"]) -> Float[np.ndarray, " n"]:
    """By the identity: the squared norm of a sum of m unit vectors is m plus the cosines of all ordered pairs."""
    found = vectors[ranked].astype(np.float64)
    lengths = np.where(ranked >= 0, np.linalg.norm(found, axis=-1), 0.0)
    count = (lengths > 0).sum(axis=1)
    total = np.einsum("nkd,nk->nd", found, _ratio(lengths > 0, lengths, otherwise=0.0))
    return 1 - _ratio(np.square(total).sum(axis=1) - count, count * (count - 1))


def _code_diversity(ranked: Int[np.ndarray, "n k"], codes: Int[np.ndarray, "items level"]) -> Float[np.ndarray, " n"]:
    found, there = codes[ranked], (ranked >= 0) & (codes[ranked, 0] >= 0)
    same = np.logical_and.accumulate(found[:, :, None] == found[:, None], axis=-1)
    apart = 1 - same.mean(axis=-1)  # 0 of an item and itself
    count = there.sum(axis=1)
    pairs = there[:, :, None] & there[:, None]
    return _ratio(np.where(pairs, apart, 0.0).sum(axis=(1, 2)), count * (count - 1))


def _of_tags(ranked: Int[np.ndarray, "n k"], histories: Histories, tags: Tags) -> dict[str, Float[np.ndarray, " n"]]:
    n, k = ranked.shape
    of_list = tags.shares(ranked.ravel(), np.repeat(np.arange(n), k), owners=n)
    of_history = tags.shares(*histories.flat(), owners=n)
    some, both = of_list.any(axis=1), of_list.any(axis=1) & of_history.any(axis=1)
    smoothed = (1 - _ALPHA) * of_list + _ALPHA * of_history
    surprise = np.log2(_ratio(of_history, smoothed, otherwise=1.0), where=of_history > 0, out=np.zeros(of_list.shape))
    bits = np.log2(of_list, where=of_list > 0, out=np.zeros(of_list.shape))
    return {
        "tag_entropy": np.where(some, -(of_list * bits).sum(axis=1), np.nan),
        "calibration_kl": np.where(both, (of_history * surprise).sum(axis=1), np.nan),
    }


def _ratio(
    value: Shaped[np.ndarray, "*n"], by: Shaped[np.ndarray, "*n"], *, otherwise: float = np.nan
) -> Float[np.ndarray, "*n"]:
    """`value / by`, or `otherwise` where `by` is 0."""
    return np.divide(value, by, where=by != 0, out=np.full(value.shape, otherwise))


def _rows(item_ids: pa.Array, wanted: pa.Array) -> Int[np.ndarray, " n"]:
    """Rows of the wanted items, -1 for unknown ones."""
    return pc.fill_null(pc.index_in(wanted, item_ids), -1).to_numpy().astype(np.int64)


def _at(values: Shaped[np.ndarray, "items ..."], rows: Int[np.ndarray, " n"], *, missing: int) -> np.ndarray:
    """Values at rows; `missing` for row -1."""
    found = values[rows]
    found[rows < 0] = missing
    return found
