"""Assignment of inputs to the codes of one level.

An assignment is a frozen dataclass: hashable, so that a compiled function can depend on it. Its logits are
`-distance / temperature`, in training and everywhere: the nearer the code, the larger its logit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from quantizers.distances import first_argmin
from quantizers.schedules import Schedule

_ANNEALED = 0.3  # share of Sinkhorn's iterations in which epsilon falls to its value


class AssignedCodes(NamedTuple):
    """Codes, and the softmax of the code logits, which is differentiable, and under jit not computed if not used."""

    codes: Int[Array, " n"]
    probabilities: Float[Array, "n codes"]


@runtime_checkable
class Assignment(Protocol):
    """A rule that assigns inputs to codes.

    `mask`: rows that count; `usage`: recent share of inputs on each code; without `key` there is no noise.
    """

    def __call__(
        self,
        distances: Float[Array, "n codes"],
        *,
        mask: Bool[Array, " n"],
        usage: Float[Array, " codes"],
        key: PRNGKeyArray | None,
        progress: Float[Array, ""] | float,
    ) -> AssignedCodes: ...


@dataclass(frozen=True)
class Nearest:
    """Assign the nearest code; the lowest index wins a tie."""

    temperature: Schedule = Schedule(1.0)

    def __post_init__(self) -> None:
        _check_temperature(self)

    def __call__(
        self,
        distances: Float[Array, "n codes"],
        *,
        mask: Bool[Array, " n"],
        usage: Float[Array, " codes"],
        key: PRNGKeyArray | None,
        progress: Float[Array, ""] | float,
    ) -> AssignedCodes:
        return AssignedCodes(first_argmin(distances), _softmax(-distances, self.temperature(progress)))


@dataclass(frozen=True)
class Sinkhorn:
    """Assign the code with the largest share in the balanced plan of the whole batch (LC-Rec, arXiv 2311.09049)."""

    epsilon: float = 0.003
    """Weight of the plan's entropy, relative to half the range of the distances; small values approach `Nearest`."""
    iterations: int = 50
    """Rounds that balance the plan."""
    temperature: Schedule = Schedule(1.0)

    def __post_init__(self) -> None:
        if not self.epsilon > 0 or self.iterations < 1:
            raise ValueError(f"Sinkhorn: expected epsilon > 0 and iterations >= 1, got {self}")
        _check_temperature(self)

    def __call__(
        self,
        distances: Float[Array, "n codes"],
        *,
        mask: Bool[Array, " n"],
        usage: Float[Array, " codes"],
        key: PRNGKeyArray | None,
        progress: Float[Array, ""] | float,
    ) -> AssignedCodes:
        costs = _scaled(distances, mask)
        prices = _code_prices(costs, mask, epsilon=self.epsilon, iterations=self.iterations)
        return AssignedCodes(first_argmin(costs - prices[None, :]), _softmax(-distances, self.temperature(progress)))


@dataclass(frozen=True)
class Gumbel:
    """Assign the largest of -distance + scale * Gumbel noise, also in the probabilities (DIGER, arXiv 2601.19711)."""

    scale: Schedule = Schedule(1.0)
    temperature: Schedule = Schedule(1.0)

    def __post_init__(self) -> None:
        _check_temperature(self)

    def __call__(
        self,
        distances: Float[Array, "n codes"],
        *,
        mask: Bool[Array, " n"],
        usage: Float[Array, " codes"],
        key: PRNGKeyArray | None,
        progress: Float[Array, ""] | float,
    ) -> AssignedCodes:
        noisy = distances - self.scale(progress) * _gumbel(key, distances)
        return AssignedCodes(first_argmin(noisy), _softmax(-noisy, self.temperature(progress)))


@dataclass(frozen=True)
class OverusedGumbel:
    """Assign by `Gumbel` where the nearest code is over-used, by `Nearest` elsewhere (DIGER's FrqUD).

    Noise goes to all codes of such an input: on the over-used codes alone, its positive mean would favour them.
    """

    threshold: float = 1.5
    """A code is over-used when its share of the inputs exceeds `threshold / codes`."""
    scale: Schedule = Schedule(1.0)
    temperature: Schedule = Schedule(1.0)

    def __post_init__(self) -> None:
        if not 0 < self.threshold < math.inf:
            raise ValueError(f"OverusedGumbel: expected a finite threshold above 0, got {self.threshold}")
        _check_temperature(self)

    def __call__(
        self,
        distances: Float[Array, "n codes"],
        *,
        mask: Bool[Array, " n"],
        usage: Float[Array, " codes"],
        key: PRNGKeyArray | None,
        progress: Float[Array, ""] | float,
    ) -> AssignedCodes:
        overused = (usage > self.threshold / usage.size)[first_argmin(distances)]
        noise = jnp.where(overused[:, None], _gumbel(key, distances), 0)
        noisy = distances - self.scale(progress) * noise
        return AssignedCodes(first_argmin(noisy), _softmax(-noisy, self.temperature(progress)))


@partial(jax.jit, static_argnames="iterations")
def sinkhorn(
    distances: Float[Array, "n codes"],
    *,
    epsilon: float | Float[Array, ""],
    iterations: int,
    mask: Bool[Array, " n"] | None = None,
) -> Float[Array, "n codes"]:
    """Entropic transport plan: rows where `mask` holds sum to 1 / their number, the others to 0, columns to 1 / codes.

    `epsilon` is relative to half the range of the distances, as in LC-Rec. The plan is balanced in log space, so that
    float32 is enough; row sums are exact, column sums are approximate and depend on the number of iterations.
    """
    mask = jnp.ones(len(distances), bool) if mask is None else mask
    costs = _scaled(distances, mask)
    prices = _code_prices(costs, mask, epsilon=epsilon, iterations=iterations)
    plan = jax.nn.softmax((prices[None, :] - costs) / epsilon, axis=-1) / jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    return jnp.where(mask[:, None], plan, 0)


def _scaled(distances: Float[Array, "n codes"], mask: Bool[Array, " n"]) -> Float[Array, "n codes"]:
    """Distances scaled to [-1, 1] by their range over the rows in `mask`; no gradient."""
    costs = jax.lax.stop_gradient(distances)
    real = mask[:, None] & jnp.isfinite(costs)
    high = jnp.max(costs, where=real, initial=-jnp.inf)
    low = jnp.min(costs, where=real, initial=jnp.inf)
    middle = jnp.where(high >= low, (high + low) / 2, 0)
    return (costs - middle) / (jnp.where(high >= low, high - middle, 0) + 1e-5)


def _code_prices(
    costs: Float[Array, "n codes"], mask: Bool[Array, " n"], *, epsilon: float | Float[Array, ""], iterations: int
) -> Float[Array, " codes"]:
    """Dual variables of the codes. Epsilon falls from 1 to its value, since a small one converges slowly at first."""
    num_codes = costs.shape[1]
    costs = jnp.where(mask[:, None], costs, 0)
    log_rows = jnp.where(mask, -jnp.log(jnp.maximum(mask.sum(), 1).astype(jnp.float32)), -jnp.inf)
    annealed = max(int(_ANNEALED * iterations), 1)

    def balance(step: Int[Array, ""], prices: Float[Array, " codes"]) -> Float[Array, " codes"]:
        share = jnp.minimum((step + 1).astype(jnp.float32) / annealed, 1)
        eps = jnp.asarray(epsilon, jnp.float32) ** share
        logits = (prices[None, :] - costs) / eps
        log_plan = jax.nn.log_softmax(logits, axis=-1) + log_rows[:, None]
        excess = jax.nn.logsumexp(log_plan, axis=0) + jnp.log(jnp.float32(num_codes))
        return prices - eps * jnp.where(mask.any(), excess, 0)

    return jax.lax.fori_loop(0, iterations, balance, jnp.zeros(num_codes, jnp.float32))


def _check_temperature(assignment: Nearest | Sinkhorn | Gumbel | OverusedGumbel) -> None:
    if min(assignment.temperature.ends) == 0:
        name, temperature = type(assignment).__name__, assignment.temperature
        raise ValueError(f"{name}: expected temperatures above 0, by which distances are divided, got {temperature}")


def _softmax(logits: Float[Array, "n codes"], temperature: Float[Array, ""]) -> Float[Array, "n codes"]:
    return jax.nn.softmax(logits / temperature, axis=-1)


def _gumbel(key: PRNGKeyArray | None, like: Float[Array, "n codes"]) -> Float[Array, "n codes"]:
    return jnp.zeros_like(like) if key is None else jax.random.gumbel(key, like.shape, like.dtype)
