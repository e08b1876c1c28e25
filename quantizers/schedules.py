"""A number that changes in the course of training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Schedule:
    """A weight, a temperature or a scale, 0 or more, that goes linearly from `initial`, at the start of training, to
    `value`; constant without `initial`."""

    value: float
    """The value at the end."""
    initial: float | None = None
    """The value at the start."""
    until: float = 1.0
    """Share of the training after which the value no longer changes."""

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"Schedule: expected until, a share of the training, in (0, 1], got {self.until}")
        if not all(0 <= value < math.inf for value in self.ends):
            raise ValueError(f"Schedule: expected value and initial of 0 or more, both finite, got {self}")

    @property
    def ends(self) -> tuple[float, ...]:
        """The values at the start and at the end, one if it is constant; all others lie between them."""
        return (self.value,) if self.initial is None else (self.initial, self.value)

    def __call__(self, progress: Float[Array, ""] | float) -> Float[Array, ""]:
        """Value when the share `progress` (0 to 1) of the training is done."""
        start = self.value if self.initial is None else self.initial
        share = jnp.clip(jnp.asarray(progress, jnp.float32) / self.until, 0, 1)
        return start + share * (self.value - start)
