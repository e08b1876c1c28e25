"""Splitting interactions into training, validation and test by a declared rule.

A user's interactions are in the dataset's order: by time, then by its tie rule (`semid.data.ties`). Everything that
learns (tokenizer, collaborative signals, popularity, generator) sees only `Splits.train`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from semid.config import check_seed
from semid.data.histories import Histories
from semid.errors import SemidError


@dataclass(frozen=True)
class LeaveOneOut:
    """Each user's last interaction is test, the one before it validation; users with fewer than 3 only train."""


@dataclass(frozen=True)
class GlobalTime:
    """Interactions before the `validation` quantile of all timestamps train; later ones are validation or test targets.

    An interaction exactly at a boundary goes to the later part. A target's history is all that its user did before.
    """

    validation: float = 0.8
    """Quantile of time at which validation begins."""
    test: float = 0.9
    """Quantile of time at which test begins."""

    def __post_init__(self) -> None:
        if not 0 < self.validation < self.test < 1:
            raise SemidError(f"expected 0 < validation < test < 1, got {self.validation} and {self.test}")


@dataclass(frozen=True)
class HeldOutItems:
    """Cold start: a random `fraction` of the items is never trained on; half are validation targets, half test targets.

    Histories hold only the user's earlier warm items.
    """

    fraction: float = 0.1
    """Share of the items held out."""
    seed: int = 0
    """Seed of the random choice."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise SemidError(f"expected a fraction of the items between 0 and 1, got {self.fraction}")
        check_seed(self.seed)


SplitRule = LeaveOneOut | GlobalTime | HeldOutItems
_WHY_EMPTY = {
    LeaveOneOut: "no user has 3 interactions or more",
    GlobalTime: "no interaction of that time follows an earlier one of its user; move the quantiles",
    HeldOutItems: "no interaction with its held-out items follows one with another item; hold out more",
}


@dataclass(frozen=True)
class Examples:
    """Validation or test examples: histories, and the item row that came next in each.

    `target_events` are the events of the targets, coded as in `Histories.events`; None: unknown.
    """

    histories: Histories
    targets: Int[np.ndarray, " n"]
    target_events: Int[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Int[np.ndarray, " m"] | slice) -> Examples:
        """The examples at `index`, in that order."""
        events = None if self.target_events is None else self.target_events[index]
        return Examples(self.histories.take(index), self.targets[index], events)


@dataclass(frozen=True)
class Splits:
    """Training histories (one per user, may be empty), validation and test examples."""

    train: Histories
    validation: Examples
    test: Examples
    rule: SplitRule = LeaveOneOut()

    def examples(self, name: str) -> Examples:
        """The examples of `validation` or `test`. Raises SemidError for another name or an empty split."""
        if name not in ("validation", "test"):
            raise SemidError(f"expected split 'validation' or 'test', got {name!r}")
        examples: Examples = getattr(self, name)
        if not len(examples):
            raise SemidError(f"the {name} split has no examples: {_WHY_EMPTY[type(self.rule)]}")
        return examples


@runtime_checkable
class Interactions(Protocol):
    """Interactions of a dataset to split: consecutive per user, in order of time."""

    @property
    def user(self) -> Int[np.ndarray, " interactions"]: ...
    @property
    def item(self) -> Int[np.ndarray, " interactions"]: ...
    @property
    def time(self) -> Int[np.ndarray, " interactions"]: ...
    @property
    def time_unit(self) -> str: ...
    @property
    def event_codes(self) -> Int[np.ndarray, " interactions"] | None: ...
    @property
    def weight(self) -> Float[np.ndarray, " interactions"] | None: ...
    @property
    def offsets(self) -> Int[np.ndarray, " bounds"]: ...
    @property
    def num_users(self) -> int: ...
    @property
    def num_items(self) -> int: ...


def split(dataset: Interactions, rule: SplitRule) -> Splits:
    """Split the interactions by `rule`. Raises SemidError if it needs timestamps and the dataset has none."""
    if isinstance(rule, LeaveOneOut):
        return _leave_one_out(dataset)
    if isinstance(rule, GlobalTime):
        return _global_time(dataset, rule)
    return _held_out_items(dataset, rule)


def _leave_one_out(dataset: Interactions) -> Splits:
    starts, ends = dataset.offsets[:-1], dataset.offsets[1:]
    enough = np.flatnonzero(ends - starts >= 3)
    until = np.where(ends - starts >= 3, ends - 2, ends)
    train = Histories(
        _users(dataset), dataset.item, starts, until, dataset.event_codes, _times(dataset), dataset.weight
    )
    return Splits(train, _before(dataset, ends[enough] - 2), _before(dataset, ends[enough] - 1))


def _global_time(dataset: Interactions, rule: GlobalTime) -> Splits:
    if dataset.time_unit != "seconds":
        has = "positions alone" if dataset.time_unit == "position" else "each user's own clock"
        raise SemidError(f"the global-time split needs timestamps, this dataset has {has}; use leave-one-out")
    cut = np.quantile(dataset.time, [rule.validation, rule.test])
    early = np.bincount(dataset.user[dataset.time < cut[0]], minlength=dataset.num_users)
    starts = dataset.offsets[:-1]
    until = starts + early
    train = Histories(
        _users(dataset), dataset.item, starts, until, dataset.event_codes, _times(dataset), dataset.weight
    )
    has_history = np.arange(len(dataset.item)) > dataset.offsets[dataset.user]
    in_test = dataset.time >= cut[1]
    in_validation = (dataset.time >= cut[0]) & ~in_test
    return Splits(
        train,
        _before(dataset, np.flatnonzero(in_validation & has_history)),
        _before(dataset, np.flatnonzero(in_test & has_history)),
        rule,
    )


def _held_out_items(dataset: Interactions, rule: HeldOutItems) -> Splits:
    count = round(rule.fraction * dataset.num_items)
    if not 2 <= count < dataset.num_items:
        raise SemidError(f"fraction {rule.fraction} of {dataset.num_items} items holds out {count}; expected 2 or more")
    cold = np.random.default_rng(rule.seed).permutation(dataset.num_items)[:count]
    is_cold = np.zeros(dataset.num_items, bool)
    is_cold[cold] = True
    warm = ~is_cold[dataset.item]
    # Positions in the array of warm interactions: a window of it is a history without cold items.
    position = np.concatenate([[0], np.cumsum(warm)])
    warm_items, starts = dataset.item[warm], position[dataset.offsets[:-1]]
    events = dataset.event_codes
    warm_events, times = None if events is None else events[warm], _times(dataset)
    parallel = warm_events, None if times is None else times[warm]
    weights = None if dataset.weight is None else dataset.weight[warm]
    train = Histories(_users(dataset), warm_items, starts, position[dataset.offsets[1:]], *parallel, weights)

    def examples(items: np.ndarray) -> Examples:
        is_target: Bool[np.ndarray, " n"] = np.isin(dataset.item, items)
        at = np.flatnonzero(is_target & (position[:-1] > starts[dataset.user]))
        users = dataset.user[at]
        histories = Histories(users, warm_items, starts[users], position[at], *parallel)
        return Examples(histories, dataset.item[at], None if events is None else events[at])

    return Splits(train, examples(cold[: count // 2]), examples(cold[count // 2 :]), rule)


def _times(dataset: Interactions) -> Int[np.ndarray, " interactions"] | None:
    """Time of each interaction in seconds; None if the dataset has only positions."""
    return None if dataset.time_unit == "position" else dataset.time


def _users(dataset: Interactions) -> Int[np.ndarray, " users"]:
    return np.arange(dataset.num_users, dtype=np.int32)


def _before(dataset: Interactions, at: Int[np.ndarray, " n"]) -> Examples:
    """Examples whose targets are the interactions `at`, and whose histories are all that the user did before."""
    users, events = dataset.user[at], dataset.event_codes
    histories = Histories(users, dataset.item, dataset.offsets[users], at, events, _times(dataset))
    return Examples(histories, dataset.item[at], None if events is None else events[at])
