"""Ranking metrics over the full catalogue, at item level, with states that merge by addition.

An example has one target, so Recall@K and HitRate@K are the same number. Items with equal code tuples have the same
score: they form a group in arbitrary order, and a metric is the expectation over that order (groups as in arXiv
2605.25330). With p = 1 + the number of items in all groups ranked before, and g the size of the target's group, the
target has each of the ranks p..p+g-1 with probability 1/g, so for a gain per rank

    metric@K = (1/g) sum_{j=p}^{min(K, p+g-1)} gain(j)

    gain(j) = 1 (Recall), 1/log2(j+1) (NDCG), 1/j (reciprocal rank)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from semid.data import Histories
from semid.errors import SemidError


class Places(NamedTuple):
    """Places of targets: `first` is p (1 = best; 0 = not in the list), `size` is g."""

    first: Int[np.ndarray, " n"]
    size: Int[np.ndarray, " n"]


class Difference(NamedTuple):
    """Mean of a - b, its 95% bootstrap interval, and the two-sided p-value of "no difference"."""

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def group_ids(codes: Int[np.ndarray, "items level"]) -> Int[np.ndarray, " items"]:
    """Dense group numbers of the items, equal for equal code tuples."""
    order = np.lexsort(codes.T[::-1])
    changes = (np.diff(codes[order], axis=0) != 0).any(axis=1)
    groups = np.zeros(len(codes), np.int64)
    groups[order[1:]] = np.cumsum(changes)
    return groups


def item_places(
    ranked: Int[np.ndarray, "n k"],
    targets: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " items"],
    *,
    seen: Histories | None = None,
    allowed: Bool[np.ndarray, "masks items"] | None = None,
) -> Places:
    """Places of `targets` among all items, given lists of item rows (best first, -1 for none).

    A group has the rank of its first listed member and counts with all its members, listed or not, as a list may be cut
    inside a group. Items in `seen` (each history's own), and items outside `allowed` (one mask for all, or one each),
    are no candidates: they count in no group, and such a target is not found.
    """
    return ItemGroups(groups).places(ranked, targets, seen=seen, allowed=allowed)


@dataclass(frozen=True, eq=False)
class ItemGroups:
    """The group of each item, and the members of each group, sorted once for all batches."""

    numbers: Int[np.ndarray, " items"]

    @functools.cached_property
    def sizes(self) -> Int[np.ndarray, " groups"]:
        """Number of members of each group."""
        return np.bincount(self.numbers)

    @functools.cached_property
    def members(self) -> tuple[Int[np.ndarray, " items"], Int[np.ndarray, " groups"]]:
        """Item rows sorted by group, and where each group starts among them."""
        return np.argsort(self.numbers, kind="stable"), np.cumsum(self.sizes) - self.sizes

    def places(
        self,
        ranked: Int[np.ndarray, "n k"],
        targets: Int[np.ndarray, " n"],
        *,
        seen: Histories | None = None,
        allowed: Bool[np.ndarray, "masks items"] | None = None,
    ) -> Places:
        """`item_places` in these groups."""
        listed, wanted = np.where(ranked >= 0, self.numbers[ranked], -1), self.numbers[targets]
        if seen is None and allowed is None:
            return _places(listed, wanted, self.sizes[listed], self.sizes[wanted])
        counts = _candidates(np.column_stack([listed, wanted]), self, seen=seen, allowed=allowed)
        places = _places(listed, wanted, counts[:, :-1], counts[:, -1])
        found = reachable(targets, seen=seen, allowed=allowed)
        return Places(np.where(found, places.first, 0), np.maximum(places.size, 1))


def reachable(
    targets: Int[np.ndarray, " n"], *, seen: Histories | None, allowed: Bool[np.ndarray, "masks items"] | None
) -> Bool[np.ndarray, " n"]:
    """Mask of the targets that may be recommended at all."""
    found = np.ones(len(targets), bool) if allowed is None else allowed[_mask_rows(allowed, len(targets)), targets]
    return found if seen is None else found & ~in_history(targets[:, None], seen)[:, 0]


def num_candidates(
    n: int, num_items: int, *, seen: Histories | None, allowed: Bool[np.ndarray, "masks items"] | None
) -> Int[np.ndarray, " n"]:
    """Number of items that may be recommended to each of `n` histories."""
    counts = np.full(n, num_items)
    if allowed is not None:
        counts = np.broadcast_to(allowed.sum(axis=1), n)
    if seen is not None:
        counts = counts - np.bincount(_distinct(seen, num_items, allowed)[0], minlength=n)
    return counts


def _candidates(
    wanted: Int[np.ndarray, "n m"],
    groups: ItemGroups,
    *,
    seen: Histories | None,
    allowed: Bool[np.ndarray, "masks items"] | None,
) -> Int[np.ndarray, "n m"]:
    """Number of members of each wanted group that may be recommended; entries of group -1 mean nothing."""
    num_groups, counts = len(groups.sizes), groups.sizes[wanted]
    if allowed is not None and len(allowed) == 1:
        counts = np.bincount(groups.numbers[allowed[0]], minlength=num_groups)[wanted]
    elif allowed is not None:
        order, starts = groups.members
        mask, of_size, counts = np.arange(len(wanted))[:, None], counts, np.zeros_like(counts)
        for member in range(of_size.max(initial=0)):
            inside = member < of_size
            counts += inside & allowed[mask, order[np.where(inside, starts[wanted] + member, 0)]]
    if seen is not None:
        owner, item = _distinct(seen, len(groups.numbers), allowed)
        keys, gone = np.unique(owner * num_groups + groups.numbers[item], return_counts=True)
        counts = counts - _lookup(keys, gone, np.arange(len(wanted))[:, None] * num_groups + wanted)
    return counts


def _mask_rows(allowed: Bool[np.ndarray, "masks items"], n: int) -> Int[np.ndarray, " n"]:
    """Row of the mask of each example."""
    return np.arange(n) if len(allowed) > 1 else np.zeros(n, np.int64)


def code_places(
    ranked: Int[np.ndarray, "n k"], targets: Int[np.ndarray, " n"], groups: Int[np.ndarray, " items"]
) -> Places:
    """Places of the targets' codes among the distinct codes in the lists: any item of the group is a hit.

    What most published tables score; never below the item level, and above it wherever items collide.
    """
    listed = np.where(ranked >= 0, groups[ranked], -1)
    return _places(listed, groups[targets], np.ones_like(listed), np.ones_like(targets))


def _places(
    listed: Int[np.ndarray, "n k"],
    wanted: Int[np.ndarray, " n"],
    weights: Int[np.ndarray, "n k"],
    size: Int[np.ndarray, " n"],
) -> Places:
    counted = np.where((listed >= 0) & ~repeated(listed), weights, 0)
    before = np.cumsum(counted, axis=1) - counted
    match = listed == wanted[:, None]
    at = match.argmax(axis=1)[:, None]  # the group's first entry
    first = 1 + np.take_along_axis(before, at, axis=1)[:, 0]
    return Places(np.where(match.any(axis=1), first, 0), size)


def accuracy(places: Places, ks: Sequence[int]) -> dict[str, Float[np.ndarray, " n"]]:
    """Expected Recall@K and NDCG@K for each K, and the reciprocal rank (0 below rank max K) as `mrr`, per example."""
    values = {f"recall@{k}": _expected(places, np.ones(k)) for k in ks}
    values |= {f"ndcg@{k}": _expected(places, 1 / np.log2(np.arange(2, k + 2))) for k in ks}
    return values | {"mrr": _expected(places, 1 / np.arange(1, max(ks) + 1))}


def _expected(places: Places, gains: Float[np.ndarray, " k"]) -> Float[np.ndarray, " n"]:
    total = np.concatenate([[0.0], np.cumsum(gains)])
    start, end = np.clip([places.first - 1, places.first + places.size - 1], 0, len(gains))
    return np.where(places.first > 0, (total[end] - total[start]) / places.size, 0.0)


@dataclass(frozen=True)
class MetricState:
    """Sums, counts and a histogram of what was recommended: states of any parts of a test set add up to the whole's.

    `totals[name]` is (sum, count) of a mean; `recommended[i]` how often item row `i` stands in a list of `k`.
    """

    totals: Mapping[str, tuple[float, int]]
    recommended: Int[np.ndarray, " items"]
    k: int

    def __add__(self, other: MetricState) -> MetricState:
        if self.k != other.k or len(self.recommended) != len(other.recommended):
            raise SemidError(
                f"expected metric states of one k and catalogue, got k {self.k} and {other.k} over "
                f"{len(self.recommended)} and {len(other.recommended)} items; measure both parts alike"
            )
        totals = dict(self.totals)
        for name, (value, count) in other.totals.items():
            mine = totals.get(name, (0.0, 0))
            totals[name] = (mine[0] + value, mine[1] + count)
        return MetricState(totals, self.recommended + other.recommended, self.k)

    def compute(self) -> dict[str, float]:
        """Means by name (left out without examples), then `coverage@k` and `gini@k`."""
        means = {name: value / count for name, (value, count) in self.totals.items() if count}
        coverage = float((self.recommended > 0).mean())
        return means | {f"coverage@{self.k}": coverage, f"gini@{self.k}": gini(self.recommended)}


def measure(
    values: Mapping[str, Float[np.ndarray, " _"]],
    ranked: Int[np.ndarray, "n k"],
    *,
    available: Int[np.ndarray, " n"],
    popularity: Float[np.ndarray, " items"],
) -> MetricState:
    """The state of one batch: named values to average, and the recommended items.

    `valid` is the share of real items among the possible entries of lists, min(k, `available`) each.
    `popularity_rank@k` averages `popularity` (1 = most popular) over the listed items.
    """
    k, items = ranked.shape[1], ranked[ranked >= 0]
    totals = {name: (float(value.sum()), len(value)) for name, value in values.items()}
    totals["valid"] = (float(len(items)), int(np.minimum(k, available).sum()))
    totals[f"popularity_rank@{k}"] = (float(popularity[items].sum()), len(items))
    return MetricState(totals, np.bincount(items, minlength=len(popularity)), k)


def gini(counts: Int[np.ndarray, " items"]) -> float:
    """Gini coefficient of `counts`: 0 where all are equal, 1 - 1/n where one of n has everything; 0 for no counts."""
    if not counts.sum():
        return 0.0
    ranks = 2 * np.arange(1, len(counts) + 1) - len(counts) - 1
    return float((ranks * np.sort(counts)).sum() / (len(counts) * counts.sum()))


def popularity_ranks(counts: Int[np.ndarray, " items"]) -> Float[np.ndarray, " items"]:
    """Rank of each item by descending count, 1 = most popular; equal counts share the mean of their ranks."""
    _, inverse, ties = np.unique(-counts, return_inverse=True, return_counts=True)
    return (np.cumsum(ties) - (ties - 1) / 2)[inverse]


def terciles(values: Int[np.ndarray, " n"]) -> Int[np.ndarray, "2"]:
    """The two bounds of the lower, middle and upper third: a value that equals a bound belongs below it."""
    return np.quantile(values, [1 / 3, 2 / 3], method="inverted_cdf") if len(values) else np.zeros(2, np.int64)


def in_history(rows: Int[np.ndarray, "n k"], histories: Histories) -> Bool[np.ndarray, "n k"]:
    """Mask of the entries of each list of item rows (-1 for none) that stand in the history of the same index."""
    items, owner = histories.flat()
    width = 1 + max(rows.max(initial=0), items.max(initial=0))
    keys = np.arange(len(rows))[:, None] * width + rows
    return np.isin(keys, owner * width + items) & (rows >= 0)


def repeated(rows: Int[np.ndarray, "n k"]) -> Bool[np.ndarray, "n k"]:
    """Mask of the entries of each list that occur earlier in it."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    again = np.zeros(rows.shape, bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return again


def _distinct(
    histories: Histories, num_items: int, allowed: Bool[np.ndarray, "masks items"] | None = None
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Indices of histories, and the different items of each (those allowed)."""
    items, owner = histories.flat()
    keys = np.unique(owner * num_items + items)
    owner, items = keys // num_items, keys % num_items
    if allowed is None:
        return owner, items
    kept = allowed[_mask_rows(allowed, len(histories))[owner], items]
    return owner[kept], items[kept]


def _lookup(
    keys: Int[np.ndarray, " m"], values: Int[np.ndarray, " m"], wanted: Int[np.ndarray, "*b"]
) -> Int[np.ndarray, "*b"]:
    """`values` at `wanted` among sorted `keys`, 0 where absent."""
    at = np.searchsorted(keys, wanted)
    found = np.append(keys, -1)[at] == wanted
    return np.where(found, np.append(values, 0)[at], 0)


def user_numbers(users: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Dense numbers of the users of examples; an example without one (-1) counts as a user of its own."""
    own = users.max(initial=0) + 1 + np.arange(len(users))
    return np.unique(np.where(users >= 0, users, own), return_inverse=True)[1]


def half_width(values: Float[np.ndarray, " n"], *, users: Int[np.ndarray, " n"] | None = None) -> float:
    """Half of the 95% interval of a mean over examples (normal approximation); 0 for fewer than two users.

    `users` are the numbers of the examples' users (None: each has its own): other users might have been drawn, with
    all their examples.
    """
    deviations = _user_sums(values - values.sum() / max(len(values), 1), users)
    return 1.96 * float(np.sqrt(np.square(deviations).sum())) / len(values) if len(deviations) > 1 else 0.0


def check_samples(samples: int) -> None:
    """Raise SemidError for fewer than one sample of a bootstrap."""
    if samples < 1:
        raise SemidError(f"expected samples of the bootstrap of at least 1, got {samples}")


def _user_sums(values: Float[np.ndarray, " n"], users: Int[np.ndarray, " n"] | None) -> Float[np.ndarray, " users"]:
    return values if users is None else np.bincount(user_numbers(users), values)


def paired_bootstrap(
    a: Float[np.ndarray, " n"],
    b: Float[np.ndarray, " n"],
    *,
    users: Int[np.ndarray, " n"] | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Does A beat B? Per-example values of two models on the same examples, resampled together, by `users` (the numbers
    of the examples' users; None: each has its own): a user is drawn with all examples.

    Drawing with replacement is a multinomial draw over the users' distinct sums of differences and counts of examples,
    of which ranking metrics have few; a drawn mean is the sum of the drawn sums by that of the drawn counts. The
    p-value is 2 min(P(mean* <= 0), P(mean* >= 0)), with one added to counts so that it is never 0.
    Raises SemidError if the arrays are not of one length, and without samples.
    """
    if a.shape != b.shape or not len(a):
        raise SemidError(f"expected two equally long arrays of values per example, got {a.shape} and {b.shape}")
    if users is not None and users.shape != a.shape:
        raise SemidError(f"expected the user of each of {len(a)} examples, got users {users.shape}")
    check_samples(samples)
    sums, examples = _user_sums(a - b, users), _user_sums(np.ones(len(a)), users)
    pairs, counts = np.unique(sums + 1j * examples, return_counts=True)
    rng = np.random.default_rng(seed)
    chunks = np.array_split(np.arange(samples), 1 + samples * len(counts) // 2**22)  # bounds the memory of a draw
    draws = (rng.multinomial(len(sums), counts / len(sums), size=len(chunk)) for chunk in chunks)
    means = np.concatenate([drawn @ pairs.real / (drawn @ pairs.imag) for drawn in draws])
    tail = min((means <= 0).sum(), (means >= 0).sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float((a - b).mean()), float(low), float(high), min(1.0, 2 * float(tail + 1) / (samples + 1)))
