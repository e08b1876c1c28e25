"""Events of a simulated world's interactions: P(event | component that the item comes from), and position bias.

The component of an item is not observed, so `P(event | item, history)` is the mean of `P(event | component)` over the
components that offer the item, by their shares of its probability. With position bias, an item stands at a place of
its list, popular ones above, and is examined with probability `(1 + place) ** -bias`; what is not examined is a mere
exposure.
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

PLACES = 10  # of a list
EXPOSURE = EVENTS.index("exposure")
ANY = -1  # no event is asked for


class Shown(NamedTuple):
    """Places from 0 at which items may stand, and how often each is examined."""

    place: Float[np.ndarray, "items places"]
    """Probability of each place, by item row."""
    examined: Float[np.ndarray, " places"]
    """Probability that what stands there is examined: the propensity of clicks and purchases."""

    @classmethod
    def of(cls, config: SimulatedConfig, popularity: Float[np.ndarray, " items"]) -> Shown:
        """Places of items of this popularity: binomial, the mean from the top for the most popular to the bottom."""
        bias = 0.0 if config.events is None else config.events.position_bias
        rank = np.argsort(np.argsort(-popularity, kind="stable"), kind="stable")
        low = (rank / max(len(rank) - 1, 1))[:, None]
        place = np.arange(PLACES)
        ways = np.array([math.comb(PLACES - 1, each) for each in range(PLACES)])
        return cls(ways * low**place * (1 - low) ** (PLACES - 1 - place), (1.0 + place) ** -bias)

    @property
    def examination(self) -> Float[np.ndarray, " items"]:
        """Probability that an item is examined, over its places."""
        return self.place @ self.examined


class Log(NamedTuple):
    """Record of each interaction."""

    event: pa.Array
    """Names, of `EVENTS`."""
    place: Int[np.ndarray, " n"]
    """Place in the list, 0 the first."""
    weight: Float[np.ndarray, " n"]
    """Inverse propensity: 1 / probability of examination of the place for click and buy, 1 for an exposure."""


def draw_log(
    shown: Shown, items: Int[np.ndarray, " n"], examined: Float[np.ndarray, "n events"], rng: np.random.Generator
) -> Log:
    """Place, event and weight of interactions with `items`, where `examined` has P(event | item, history) of an item
    that is examined."""
    place = _draw(shown.place[items], rng)
    event = np.where(rng.random(len(items)) < shown.examined[place], _draw(examined, rng), EXPOSURE)
    weight = np.where(event == EXPOSURE, 1.0, 1 / shown.examined[place])
    return Log(pa.array(EVENTS).take(pa.array(event)), place, weight)


def _draw(p: Float[np.ndarray, "n choices"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """One column of each row, by probability."""
    ends = np.cumsum(p, axis=1)
    return (ends <= rng.random(len(p))[:, None] * ends[:, -1:]).sum(axis=1)


def event_numbers(event: str | Sequence[str | None], count: int) -> Int[np.ndarray, " n"]:
    """Numbers in `EVENTS` of one name for all or one each, `ANY` for None.

    Raises SemidError for other names, naming the nearest.
    """
    names = [event] * count if isinstance(event, str) else list(event)
    if len(names) != count:
        raise SemidError(f"expected one event or {count}, one per history, got {len(names)}")
    if unknown := {name for name in names if name is not None} - set(EVENTS):
        name = min(unknown)
        raise SemidError(f"the simulator has events {', '.join(EVENTS)}, not {name!r}{did_you_mean(name, EVENTS)}")
    return np.array([ANY if name is None else EVENTS.index(name) for name in names], np.int64)
