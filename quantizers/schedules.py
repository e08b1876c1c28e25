"""Schedules of loss weights, temperatures and scales over training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Schedule:
    """A non-negative number (a weight, temperature or scale) that changes linearly from `initial` to `value` during
    training; constant without `initial`."""

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
        """Values at the start and the end, or the only value if constant; all others lie between them."""
        return (self.value,) if self.initial is None else (self.initial, self.value)

    def __call__(self, progress: Float[Array, ""] | float) -> Float[Array, ""]:
        """Value after the share `progress` (0 to 1) of training."""
        start = self.value if self.initial is None else self.initial
        share = jnp.clip(jnp.asarray(progress, jnp.float32) / self.until, 0, 1)
        return start + share * (self.value - start)
