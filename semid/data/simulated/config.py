"""Settings of a simulated world: sizes, tastes and noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from semid.config import check_seed
from semid.errors import SemidError


@dataclass(frozen=True)
class Mixture:
    """Weights of the four components; without a last item taste and popularity share the whole."""

    taste: float = 0.6
    transition: float = 0.3
    successor: float = 0.05
    popularity: float = 0.05


@dataclass(frozen=True)
class SimulatedConfig:
    """A simulated world. Same config, same dataset, byte for byte."""

    num_items: int = 2_000
    num_users: int = 4_000
    mean_length: float = 10.0
    """Interactions of a user on average; none has fewer than `min_length` or more than `max_length`."""
    min_length: int = 5
    max_length: int = 50
    taxonomy: tuple[int, int, int] = (4, 3, 3)
    """Departments, categories in each, kinds in each category."""
    styles: int = 2
    favourites: int = 3
    """Kinds a user has a taste for, at any time."""
    drift: float = 0.3
    """Chance that a favourite has been replaced by another at the end of the user's sequence."""
    next_kinds: int = 4
    """Kinds that may follow a kind by transition."""
    successors: int = 2
    """Items that may follow an item in particular."""
    mixture: Mixture = Mixture()
    zipf: float = 1.2
    """Popularity of the r-th item of a cell is `r ** -zipf`."""
    late_items: float = 0.2
    """Share of items released after the start, evenly over the last four fifths of `days`."""
    days: int = 1_000
    content_dim: int = 32
    content_noise: float = 0.7
    """Deviation of the item's own noise in `content`, next to taxonomy parts of deviation 0.6 to 1."""
    images: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.num_kinds < 2 or min(self.styles, self.favourites, self.next_kinds, self.successors) < 1:
            raise SemidError("expected 2 kinds or more, and styles, favourites, next_kinds and successors of 1 or more")
        if self.num_items < self.num_cells:
            raise SemidError(f"expected {self.num_cells} items or more (kinds by styles), got {self.num_items}")
        if not (1 <= self.min_length <= self.mean_length <= self.max_length and self.num_users > 0):
            raise SemidError("expected num_users of 1 or more and 1 <= min_length <= mean_length <= max_length")
        if self.num_items - self.num_late <= self.max_length:
            raise SemidError(f"max_length {self.max_length} must stay below the items there at the start; lower it")
        if not (
            self.mixture.popularity > 0 <= min(self.mixture.taste, self.mixture.transition, self.mixture.successor)
        ):
            raise SemidError(f"expected mixture weights of 0 or more and popularity above 0, got {self.mixture}")

    @property
    def num_kinds(self) -> int:
        return math.prod(self.taxonomy)

    @property
    def num_cells(self) -> int:
        return self.num_kinds * self.styles

    @property
    def num_late(self) -> int:
        return round(self.late_items * self.num_items)
