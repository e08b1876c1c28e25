"""Gradient surgery: where two losses pull a parameter apart, one gives way (PCGrad, arXiv 2001.06782)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Projected(NamedTuple):
    """A gradient without its conflicts with another one, and the share of their common leaves that had one."""

    gradients: Any
    conflicts: Float[Array, ""]


def projected(gradients: Any, against: Any) -> Projected:
    """Remove from each leaf its component along the leaf of `against`, where their inner product is negative.

    BLOGER does so per parameter (arXiv 2510.21242), with the tokenizer's gradient as `against` and the recommendation's
    as the other.
    """
    leaves, structure = jax.tree.flatten(gradients)
    others = jax.tree.leaves(against)
    parts = [_project_leaf(leaf, other) for leaf, other in zip(leaves, others, strict=True)]
    conflicts, shared = (jnp.stack(flags).sum().astype(jnp.float32) for flags in list(zip(*parts, strict=True))[1:])
    return Projected(jax.tree.unflatten(structure, [leaf for leaf, *_ in parts]), conflicts / jnp.maximum(shared, 1.0))


def sum_without_conflict(gradients: Sequence[Any]) -> tuple[Any, dict[str, Array]]:
    """Sum of the gradients of two losses, the second projected; and the share of leaves in conflict, to log."""
    first, second = gradients
    second, conflicts = projected(second, first)
    return jax.tree.map(jnp.add, first, second), {"conflicts": conflicts}


def _project_leaf(x: Array, other: Array) -> tuple[Array, Array, Array]:
    """The leaf without the part that opposes `other`, whether it did, and whether both losses reach it."""
    inner, square = (x * other).sum(), (other * other).sum()
    conflict = inner < 0
    share = jnp.where(conflict, inner / jnp.where(conflict, square, 1), 0)
    return x - share * other, conflict, x.any() & other.any()
