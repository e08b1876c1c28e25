"""Gradient accumulation over microbatches, to save memory, and learning-rate factors for parts of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from semid.errors import SemidError
from semid.training.mesh import ROWS, row_parts

TARGETS = "targets"
"""The metric with the number of targets that a loss averages over; without it, microbatches have equal weights."""


# Parts of a model, by prefixes of parameter names, and the factors of their learning rates.
Rates = tuple[tuple[str, float], ...]


def rate_of(name: str, rates: Rates) -> float:
    """Factor of a parameter's learning rate: that of the first matching prefix, else 1."""
    return next((share for start, share in rates if name.startswith(start)), 1.0)


class Gradients(NamedTuple):
    """Gradients, scalars to log (including the loss), and the variables that the loss set, from one pass over rows."""

    gradients: nnx.State
    metrics: dict[str, Array]
    rest: nnx.State


# A function of (params, rest, rows of a batch, key).
GradFn = Callable[[nnx.State, nnx.State, Any, Key[Array, ""]], Gradients]


def accumulated(
    grad_fn: GradFn, params: nnx.State, rest: nnx.State, batch: Any, key: Key[Array, ""], *, parts: int, mesh: Mesh
) -> Gradients:
    """Gradients of a batch in `parts` sequential microbatches: means weighted by their numbers of targets."""

    def add(carry: tuple[Any, nnx.State], one: tuple[Any, Array]) -> tuple[tuple[Any, nnx.State], Any]:
        total, rest = carry
        found = grad_fn(params, rest, *one)
        weight = found.metrics.get(TARGETS, jnp.ones(())).astype(jnp.float32)
        total = jax.tree.map(lambda t, g: t + g * weight.astype(g.dtype), total, found.gradients)
        return (total, found.rest), (weight, found.metrics)

    steps = (microbatches(batch, parts, mesh), jax.random.split(key, parts))
    (total, rest), (weights, metrics) = jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, params), rest), steps)
    targets = jnp.sum(weights)
    count = jnp.where(targets == 0, 1, targets)  # not jnp.maximum: weights of targets may sum to less than 1
    means = {name: jnp.sum(values.astype(jnp.float32) * weights) / count for name, values in metrics.items()}
    if TARGETS in metrics:
        means[TARGETS] = targets
    return Gradients(jax.tree.map(lambda t: t / count.astype(t.dtype), total), means, rest)


def microbatches(batch: Any, parts: int, mesh: Mesh) -> Any:
    """Split arrays into `parts` microbatches of every `parts`-th row, so that each device splits its own rows.

    Raises SemidError if the rows do not divide.
    """
    rows, devices = len(jax.tree.leaves(batch)[0]), row_parts(mesh)
    if rows % (parts * devices):
        raise SemidError(
            f"a batch of {rows} rows does not divide into {parts} microbatches for {devices} devices; change either"
        )
    sharding = NamedSharding(mesh, PartitionSpec(None, *ROWS))

    def split(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(rows // parts, parts, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(split, batch)
