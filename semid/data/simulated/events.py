"""Events of simulated interactions: P(event | component that the item comes from), and position bias.

The component of an item is not observed, so `P(event | item, history)` is the mean of `P(event | component)` over the
components that offer the item, weighted by their shares of its probability. With position bias, an item is shown at a
place of a list, popular ones near the top, and examined with probability `(1 + place) ** -bias`; an unexamined item is
an exposure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from semid.data.simulated.config import EVENTS, SimulatedConfig
from semid.errors import SemidError, did_you_mean

PLACES = 10  # length of a list
EXPOSURE = EVENTS.index("exposure")
ANY = -1  # any event


class Shown(NamedTuple):
    """Distribution of the items' places in a list, from 0, and probability that each place is examined."""

    place: Float[np.ndarray, "items places"]
    """Probability of each place, by item row."""
    examined: Float[np.ndarray, " places"]
    """Probability that the item there is examined: the propensity of clicks and purchases."""

    @classmethod
    def by_popularity(cls, config: SimulatedConfig, popularity: Float[np.ndarray, " items"]) -> Shown:
        """Binomial places: the mean moves from the top for the most popular item to the bottom for the least."""
        bias = 0.0 if config.events is None else config.events.position_bias
        rank = np.argsort(np.argsort(-popularity, kind="stable"), kind="stable")
        low = (rank / max(len(rank) - 1, 1))[:, None]
        place = np.arange(PLACES)
        ways = np.array([math.comb(PLACES - 1, each) for each in range(PLACES)])
        return cls(ways * low**place * (1 - low) ** (PLACES - 1 - place), (1.0 + place) ** -bias)

    @property
    def examination(self) -> Float[np.ndarray, " items"]:
        """Probability that an item is examined, averaged over its places."""
        return self.place @ self.examined


class Log(NamedTuple):
    """Event, place and weight of each interaction."""

    event: pa.Array
    """Names from `EVENTS`."""
    place: Int[np.ndarray, " n"]
    """Place in the list, 0 the first."""
    weight: Float[np.ndarray, " n"]
    """Inverse propensity: 1 / probability of examination of the place for click and buy, 1 for an exposure."""


def draw_log(
    shown: Shown, items: Int[np.ndarray, " n"], examined: Float[np.ndarray, "n events"], rng: np.random.Generator
) -> Log:
    """Draw place, event and weight of interactions with `items`; `examined` is P(event | item, history) for an item
    that is examined."""
    place = _draw(shown.place[items], rng)
    event = np.where(rng.random(len(items)) < shown.examined[place], _draw(examined, rng), EXPOSURE)
    weight = np.where(event == EXPOSURE, 1.0, 1 / shown.examined[place])
    return Log(pa.array(EVENTS).take(pa.array(event)), place, weight)


def _draw(p: Float[np.ndarray, "n choices"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Draw one column per row, by its probability."""
    ends = np.cumsum(p, axis=1)
    return (ends <= rng.random(len(p))[:, None] * ends[:, -1:]).sum(axis=1)


def event_numbers(event: str | Sequence[str | None], count: int) -> Int[np.ndarray, " n"]:
    """Indices in `EVENTS` of one name for all or one name each; `ANY` for None.

    Raises SemidError for other names, naming the nearest.
    """
    names = [event] * count if isinstance(event, str) else list(event)
    if len(names) != count:
        raise SemidError(f"expected one event or {count}, one per history, got {len(names)}")
    if unknown := {name for name in names if name is not None} - set(EVENTS):
        name = min(unknown)
        raise SemidError(f"the simulator has events {', '.join(EVENTS)}, not {name!r}{did_you_mean(name, EVENTS)}")
    return np.array([ANY if name is None else EVENTS.index(name) for name in names], np.int64)
