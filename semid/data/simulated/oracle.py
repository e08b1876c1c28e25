"""Latent state of a simulated world, the true distribution of the next item, and the ranker that uses it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from semid.data.histories import Histories
from semid.data.simulated.config import COMPONENTS, EVENTS, SimulatedConfig
from semid.data.simulated.events import ANY, EXPOSURE, Log, Shown, draw_log, event_numbers
from semid.errors import SemidError

RECENT = 3  # last items of a history whose other variants may come next
DENSE_ENTRIES = 1 << 24  # maximum of rows x items in one block of dense probabilities


@dataclass(frozen=True)
class World:
    """Latent state of the items. A `slot` is a position in the order by cell and popularity; item rows are shuffled.

    A *group* is a run of slots: groups below `config.num_cells` are cells, the others are families of variants.
    """

    config: SimulatedConfig
    cell: Int[np.ndarray, " items"]
    family: Int[np.ndarray, " items"]  # group of the item's variants, itself among them
    share: Float[np.ndarray, " items"]  # of the item in its cell
    per_others: Float[np.ndarray, " items"]  # 1 / share of the other variants in the family, 0 if there are none
    release: Int[np.ndarray, " items"]  # seconds
    successors: Int[np.ndarray, "items s"]
    next_kinds: Int[np.ndarray, "kinds m"]
    cell_share: Float[np.ndarray, " cells"]
    row_of_slot: Int[np.ndarray, " items"]
    start: Int[np.ndarray, " groups"]  # first slot
    stop: Int[np.ndarray, " groups"]  # slot after the last
    group_share: Float[np.ndarray, " groups"]  # sum of `share`: 1 for a cell
    cumulative: Float[np.ndarray, " items+1"]  # of `share` by slot, from 0

    def draw_from_groups(self, groups: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Draw one item row from each group, by share."""
        start, stop = self.start[groups], self.stop[groups]
        low, high = self.cumulative[start], self.cumulative[stop]
        slot = np.searchsorted(self.cumulative, low + rng.random(len(groups)) * (high - low), side="right") - 1
        # The clip only corrects rounding of the cumulative sum.
        return self.row_of_slot[np.clip(slot, start, stop - 1)]

    def draw(self, choices: Choices, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Draw one item row from each mixture, even if seen or not yet released."""
        ends = np.cumsum(choices.weights, axis=1)
        column = (ends <= rng.random(len(ends))[:, None] * ends[:, -1:]).sum(axis=1)
        last = choices.values.shape[1]  # the column of popularity, which has a weight and no value
        value = choices.values[np.arange(len(ends)), np.minimum(column, last - 1)]
        popular = np.searchsorted(np.cumsum(self.cell_share)[:-1], rng.random(len(ends)), side="right")
        is_item = (column >= choices.num_groups) & (column < last)
        groups = np.where(column >= last, popular, np.where(is_item, 0, value))
        return np.where(is_item, value, self.draw_from_groups(groups, rng)).astype(np.int32)

    def dense(
        self,
        choices: Choices,
        time: Int[np.ndarray, " n"],
        *,
        seen: Int[np.ndarray, " total"],
        owner: Int[np.ndarray, " total"],
    ) -> Float[np.ndarray, "n items"]:
        """Probabilities of the next item at `time`, if row `owner[i]` has seen item `seen[i]`."""
        return self.possible(self.masses(choices), time, seen=seen, owner=owner)

    def possible(
        self,
        masses: Float[np.ndarray, "n items"],
        time: Int[np.ndarray, " n"],
        *,
        seen: Int[np.ndarray, " total"],
        owner: Int[np.ndarray, " total"],
    ) -> Float[np.ndarray, "n items"]:
        """Normalize masses to probabilities, without items that are seen or not released at `time`."""
        p = masses
        p[self.release > time[:, None]] = 0
        p[owner, seen] = 0
        p /= np.maximum(p.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        return p

    def masses(self, choices: Choices) -> Float[np.ndarray, "n items"]:
        """Unnormalized weight of each item in each mixture, even if seen or unreleased; linear in mixture weights."""
        row = np.arange(len(choices.weights))
        weight = np.zeros((len(row), len(self.group_share)))
        weight[:, : len(self.cell_share)] = choices.weights[:, -1:] * self.cell_share
        for column in range(choices.num_groups):
            weight[row, choices.values[:, column]] += choices.weights[:, column]
        weight /= self.group_share
        p = weight[:, self.cell]
        p += weight[:, self.family]
        p *= self.share
        for column in range(choices.num_groups, choices.values.shape[1]):
            p[row, choices.values[:, column]] += choices.weights[:, column]
        return p

    def masses_by_choice(self, choices: Choices, items: Int[np.ndarray, "n k"]) -> Float[np.ndarray, "n k choices"]:
        """Contribution of each choice to the masses of some items; summed over choices, it is their `masses`."""
        groups, rows = np.split(choices.values[:, None], [choices.num_groups], axis=2)
        item, share = items[..., None], self.share[items][..., None]
        inside = (groups == self.cell[item]) | (groups == self.family[item])
        of_groups = inside * share / self.group_share[groups]
        popular = self.cell_share[self.cell[item]] * share
        return choices.weights[:, None] * np.concatenate([of_groups, rows == item, popular], axis=2)

    @functools.cached_property
    def event_of_choice(self) -> Float[np.ndarray, "choices events"]:
        """P(event | component of each choice). Raises SemidError for a world without events."""
        config, events = self.config, self.config.events
        if events is None:
            raise SemidError("this simulated world has no events; simulate it with SimulatedConfig(events=Events())")
        counts = (2 * config.favourites, config.next_kinds, RECENT, config.successors, 1)
        return np.repeat([getattr(events, name) for name in COMPONENTS], counts, axis=0)

    @functools.cached_property
    def shown(self) -> Shown:
        """Places of the items in lists, by overall popularity."""
        return Shown.by_popularity(self.config, self.cell_share[self.cell] * self.share)


class Choices(NamedTuple):
    """Mixtures of sources of the next item: `num_groups` columns of groups, then items; the last weight is popularity.

    Weights need not sum to 1.
    """

    values: Int[np.ndarray, "n choices-1"]
    weights: Float[np.ndarray, "n choices"]
    num_groups: int

    def take(self, index: Int[np.ndarray, " m"]) -> Choices:
        return Choices(self.values[index], self.weights[index], self.num_groups)

    def scaled(self, factor: Float[np.ndarray, "*n choices"]) -> Choices:
        """Copy with weights multiplied by a factor."""
        return self._replace(weights=self.weights * factor)


@dataclass(frozen=True)
class People:
    """Latent state of the users: favourite cells at the start and at the end, and times of interactions."""

    early: Int[np.ndarray, "users f"]
    late: Int[np.ndarray, "users f"]
    offsets: Int[np.ndarray, " bounds"]
    time: Int[np.ndarray, " n"]

    @property
    def lengths(self) -> Int[np.ndarray, " users"]:
        return np.diff(self.offsets)

    def time_of(self, users: Int[np.ndarray, " n"], steps: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Time of the user's interaction number `steps`; beyond the last one, its time."""
        return self.time[np.minimum(self.offsets[users] + steps, self.offsets[users + 1] - 1)]


def mixtures(
    world: World,
    people: People,
    *,
    users: Int[np.ndarray, " n"],
    steps: Int[np.ndarray, " n"],
    recent: Int[np.ndarray, "n recent"],
) -> Choices:
    """Mixture from which the next item is drawn at a user's step. `recent` are the last items, latest first, -1 for
    none."""
    config, weights = world.config, world.config.mixture
    age = np.minimum(steps / np.maximum(people.lengths[users] - 1, 1), 1.0)[:, None]
    last, has_last = recent[:, 0], recent[:, :1] >= 0
    cell = world.cell[last]
    following = world.next_kinds[cell // config.styles] * config.styles + (cell % config.styles)[:, None]
    favourite, transition, successor = (
        weight * _halving(count)[None]
        for weight, count in (
            (weights.taste, config.favourites),
            (weights.transition, config.next_kinds),
            (weights.successor, config.successors),
        )
    )
    variant = weights.variant * _halving(RECENT) * (recent >= 0) * world.per_others[recent]
    popularity = np.full((len(users), 1), weights.popularity)
    taste = [(1 - age) * favourite, age * favourite]
    columns = [*taste, has_last * transition, variant, has_last * successor, popularity]
    values = [people.early[users], people.late[users], following, world.family[recent], world.successors[last]]
    return Choices(np.hstack(values), np.hstack(columns), 2 * config.favourites + config.next_kinds + RECENT)


class OracleConditions(NamedTuple):
    """Conditions on the next item that the oracle supports, in the form of a model's: sorted event names."""

    events: tuple[str, ...]


@dataclass(frozen=True)
class Oracle:
    """Ranker that knows each user's latent state: in expectation no model recommends better.

    The length of a history is taken as the user's step, its last items as those the next depends on. For histories
    with items left out (held-out items), the ranking is therefore no upper bound.

    With an `event` of the next item (one for all histories or one each, None for any), it ranks by Bayes' rule:
    `p(item | history, event)` is proportional to the sum over components of `P(event | component) p(component, item |
    history)`.
    """

    world: World
    people: People
    item_ids: pa.Array
    log: Log | None = None
    """Events, places and weights of the dataset's interactions, if the world has events."""
    codes: ClassVar[None] = None
    tie_break: ClassVar[bool] = False
    repeats: ClassVar[bool] = False

    def probabilities(
        self,
        histories: Histories,
        *,
        event: str | Sequence[str | None] | None = None,
        allowed: Bool[np.ndarray, "*n items"] | None = None,
    ) -> Float[np.ndarray, "n items"]:
        """True distribution of the next item, given its `event` and a mask of `allowed` items.

        Rows sum to 1, or to 0 if no allowed item is possible. Raises SemidError for users or items that are not of this
        world, and for unknown events.
        """
        choices, time = self._mixtures(histories)
        masses = self.world.masses(choices) if event is None else self._masses_of_event(choices, event)
        seen, owner = histories.flat()
        return self.world.possible(masses if allowed is None else masses * allowed, time, seen=seen, owner=owner)

    def event_probabilities(
        self, histories: Histories, items: Int[np.ndarray, "n k"]
    ) -> Float[np.ndarray, "n k events"]:
        """P(event | item, history) over `EVENTS`, for each of `items` as the next item; sums to 1 over events."""
        p, examination = self._events_if_examined(histories, items), self.world.shown.examination[items]
        p *= examination[..., None]
        p[..., EXPOSURE] += 1 - examination
        return p

    def _events_if_examined(
        self, histories: Histories, items: Int[np.ndarray, "n k"]
    ) -> Float[np.ndarray, "n k events"]:
        masses = self.world.masses_by_choice(self._mixtures(histories)[0], items)
        return (masses @ self.world.event_of_choice) / masses.sum(axis=2, keepdims=True)

    def _masses_of_event(self, choices: Choices, event: str | Sequence[str | None]) -> Float[np.ndarray, "n items"]:
        """Masses of each item together with the history's event."""
        number, examination = event_numbers(event, len(choices.weights)), self.world.shown.examination
        likelihood = np.vstack([self.world.event_of_choice.T, np.ones(len(self.world.event_of_choice))])  # last: any
        masses = self.world.masses(choices.scaled(likelihood[number]))
        masses *= np.where((number == ANY)[:, None], 1, examination)
        shown = number == EXPOSURE
        masses[shown] += self.world.masses(choices.take(np.flatnonzero(shown))) * (1 - examination)
        return masses

    @property
    def conditions(self) -> OracleConditions | None:
        """Conditions that `rank` supports; None if the world has no events."""
        return None if self.world.config.events is None else OracleConditions(tuple(sorted(EVENTS)))

    def own_conditions(
        self, rows: Int[np.ndarray, " n"], events: Int[np.ndarray, " n"] | None, parts: Sequence[str]
    ) -> list[dict[str, str]]:
        """Conditions that ask for the items' own `events`, numbered from 1 as in `conditions`; 0: any."""
        if self.conditions is None or events is None or list(parts) != ["event"]:
            raise SemidError(f"the oracle knows its world's events alone, and cannot be asked for {', '.join(parts)}")
        return [{"event": self.conditions.events[code - 1]} if code else {} for code in events]

    def rank(
        self,
        histories: Histories,
        *,
        k: int,
        exclude_seen: bool = False,
        condition: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        allowed: Bool[np.ndarray, "*n items"] | None = None,
    ) -> Int[np.ndarray, "n k"]:
        """The `k` likeliest item rows, best first, padded with -1. Seen items have probability zero in any case.

        `condition` asks for an event of the next item, `{"event": "buy"}`, for all histories or one each; `allowed` is
        as in `probabilities`.
        """
        events = None if condition is None else _events(condition, len(histories))
        ranked = np.full((len(histories), k), -1, np.int32)
        for block in blocks(np.arange(len(histories)), self.world.config.num_items):
            block_events = None if events is None else [events[row] for row in block]
            masks = allowed[block] if allowed is not None and allowed.ndim == 2 else allowed
            p = self.probabilities(histories.take(block), event=block_events, allowed=masks)
            best = np.argpartition(-p, min(k, p.shape[1]) - 1, axis=1)[:, :k]
            value = np.take_along_axis(p, best, axis=1)
            order = np.lexsort((best, -value))  # equal probabilities: the lower row first
            best, value = (np.take_along_axis(a, order, axis=1) for a in (best, value))
            ranked[block, : best.shape[1]] = np.where(value > 0, best, -1)
        return ranked

    def _mixtures(self, histories: Histories) -> tuple[Choices, Int[np.ndarray, " n"]]:
        """Mixture and time of the next item of each history."""
        self._check(histories)
        users, steps = histories.users, histories.lengths
        recent = np.full((len(histories), RECENT), -1)
        for back in range(RECENT):
            some = steps > back
            recent[some, back] = histories.items[histories.ends[some] - 1 - back]
        choices = mixtures(self.world, self.people, users=users, steps=steps, recent=recent)
        return choices, self.people.time_of(users, steps)

    def draw_log(self, items: Int[np.ndarray, " n"], rng: np.random.Generator) -> Log:
        """Draw places, events and weights of all interactions; `items` are sorted by user."""
        offsets, lengths, at = self.people.offsets, self.people.lengths, np.arange(len(items))
        users = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        histories = Histories(users, items, offsets[users], at)
        examined = [
            self._events_if_examined(histories.take(block), items[block, None])[:, 0]
            for block in blocks(at, len(self.world.event_of_choice))
        ]
        return draw_log(self.world.shown, items, np.concatenate(examined), rng)

    def _check(self, histories: Histories) -> None:
        users, (items, _) = histories.users, histories.flat()
        num_users, num_items = len(self.people.early), self.world.config.num_items
        if len(users) and not (users.min() >= 0 and users.max() < num_users):
            raise SemidError(
                f"the oracle knows users 0 to {num_users - 1} of its own world, got {users.min()} to {users.max()};"
                " use the histories of the dataset it was simulated with"
            )
        if len(items) and not (items.min() >= 0 and items.max() < num_items):
            raise SemidError(
                f"the oracle knows item rows 0 to {num_items - 1}, got {items.min()} to {items.max()};"
                " use the dataset it was simulated with"
            )


def _events(condition: Mapping[str, str] | Sequence[Mapping[str, str]], number: int) -> list[str | None]:
    """Event in each history's condition; None: any."""
    conditions = [condition] * number if isinstance(condition, Mapping) else list(condition)
    if len(conditions) != number or any(set(one) - {"event"} for one in conditions):
        raise SemidError(f"the oracle takes one condition {{'event': NAME}}, or one per history, got {condition}")
    return [one.get("event") for one in conditions]


def _halving(count: int) -> Float[np.ndarray, " count"]:
    """Weights that halve at each step and sum to 1."""
    return normalized(0.5 ** np.arange(count))


def normalized(weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return weights / weights.sum()


def blocks(index: Int[np.ndarray, " n"], num_items: int) -> list[Int[np.ndarray, " m"]]:
    size = max(1, DENSE_ENTRIES // num_items)
    return [index[i : i + size] for i in range(0, len(index), size)]
