"""Settings of the simulator: sizes, tastes, events and noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from semid.config import check_seed, to_dict
from semid.errors import SemidError

EVENTS = ("exposure", "click", "buy")
COMPONENTS = ("taste", "transition", "variant", "successor", "popularity")


@dataclass(frozen=True)
class Mixture:
    """Weights of the five components of the next-item distribution, renormalized over those that can offer an item."""

    taste: float = 0.54
    transition: float = 0.27
    variant: float = 0.1
    successor: float = 0.045
    popularity: float = 0.045


@dataclass(frozen=True)
class Events:
    """Probabilities of exposure, click and buy for each component that an item may come from, and position bias.

    By default variants of a product and successors are mostly bought, favourites clicked, popular items only shown.
    """

    taste: tuple[float, float, float] = (0.3, 0.6, 0.1)
    transition: tuple[float, float, float] = (0.7, 0.25, 0.05)
    variant: tuple[float, float, float] = (0.1, 0.2, 0.7)
    successor: tuple[float, float, float] = (0.1, 0.2, 0.7)
    popularity: tuple[float, float, float] = (0.95, 0.04, 0.01)
    position_bias: float = 0.0
    """Items are shown in lists of ten places, popular ones near the top. Place r is examined with probability
    `r ** -position_bias`, and an unexamined item is an exposure. The dataset then has inverse-propensity weights. 0:
    everything is examined."""

    def __post_init__(self) -> None:
        for name in COMPONENTS:
            p = getattr(self, name)
            if not (min(p) >= 0 and math.isclose(sum(p), 1, abs_tol=1e-6)):
                raise SemidError(f"events.{name}: expected probabilities of {', '.join(EVENTS)} with sum 1, got {p}")
        if not 0 <= self.position_bias < math.inf:
            raise SemidError(f"events.position_bias: expected 0 (none) or more, got {self.position_bias}")


@dataclass(frozen=True)
class SimulatedConfig:
    """A simulated world. Equal configs give equal datasets, byte for byte. No user takes an item twice."""

    num_items: int = 2_000
    num_users: int = 4_000
    mean_length: float = 10.0
    """Mean number of interactions per user, each within `min_length` and `max_length`."""
    min_length: int = 5
    max_length: int = 50
    taxonomy: tuple[int, int, int] = (4, 3, 3)
    """Departments, categories in each, kinds in each category."""
    styles: int = 2
    favourites: int = 3
    """Favourite kinds of a user at any time."""
    drift: float = 0.3
    """Probability that a favourite is replaced by another over the user's sequence."""
    next_kinds: int = 4
    """Kinds that may follow a kind by transition."""
    successors: int = 2
    """Items that may follow a particular item."""
    family_size: float = 3.0
    """Mean number of variants of a product, a family of near-duplicates. 1: no item has another variant, and the other
    components share the weight of `mixture.variant`."""
    mixture: Mixture = Mixture()
    zipf: float = 1.2
    """Popularity of the r-th item of a cell is `r ** -zipf`."""
    late_items: float = 0.2
    """Share of items released after the start, evenly over the last four fifths of `days`."""
    days: int = 1_000
    content_dim: int = 32
    content_noise: float = 0.7
    """Standard deviation of a product's own part of `content`; those of the taxonomy's parts are 0.6 to 1. Variants of
    a product deviate less from each other."""
    images: bool = True
    seed: int = 0
    events: Events | None = None
    """Events of the interactions. None: the dataset has no events. The interactions are the same either way."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.num_kinds < 2 or min(self.styles, self.favourites, self.next_kinds, self.successors) < 1:
            raise SemidError("expected 2 kinds or more, and styles, favourites, next_kinds and successors of 1 or more")
        if not self.family_size >= 1:
            raise SemidError(f"expected family_size of 1 (no variants) or more, got {self.family_size}")
        if self.num_items < self.num_cells:
            raise SemidError(f"expected {self.num_cells} items or more (kinds by styles), got {self.num_items}")
        if not (1 <= self.min_length <= self.mean_length <= self.max_length and self.num_users > 0):
            raise SemidError("expected num_users of 1 or more and 1 <= min_length <= mean_length <= max_length")
        if self.num_items - self.num_late <= self.max_length:
            raise SemidError(f"max_length {self.max_length} must stay below the items there at the start; lower it")
        mixture = self.mixture
        if not mixture.popularity > 0 <= min(mixture.taste, mixture.transition, mixture.variant, mixture.successor):
            raise SemidError(f"expected mixture weights of 0 or more and popularity above 0, got {mixture}")

    @property
    def num_kinds(self) -> int:
        return math.prod(self.taxonomy)

    @property
    def num_cells(self) -> int:
        return self.num_kinds * self.styles

    @property
    def num_late(self) -> int:
        return round(self.late_items * self.num_items)

    def recorded(self) -> dict:
        """The JSON form, without `events` if they are off, so that it equals records made before events existed."""
        return {name: value for name, value in to_dict(self).items() if value is not None}
