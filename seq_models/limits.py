"""Limits on recommendation lists: a maximum number of items per group (a brand, a category)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class GroupLimits(NamedTuple):
    """Groups of items, for all requests alike, and how many items of one group a list may hold.

    An item may be in several groups; -1 is none. Each column of `groups` has a limit `most`. Columns of the same kind
    (an item's categories) number their groups alike, columns of different kinds (its brand) do not share numbers.
    """

    groups: Int[Array, "items m"]
    most: Int[Array, " m"]

    def select(
        self, values: Float[Array, "b n"], rows: Int[Array, "#b n"], k: int
    ) -> tuple[Int[Array, "b k"], Bool[Array, "b k"]]:
        """Greedy choice: k times the best item that is in no full group. Returns indices, and which of them are items.

        `rows` are the item rows (-1 for none); a value of -inf is no candidate.
        """
        groups = jnp.where((rows < 0)[..., None], -1, self.groups[jnp.maximum(rows, 0)])
        user, (batch, n) = jnp.arange(values.shape[0]), values.shape
        places = jnp.arange(n)[None]

        def choose(step: Int[Array, ""], state: tuple[Array, ...]) -> tuple[Array, ...]:
            left, chosen, found, taken = state
            best = jnp.argmax(left, axis=-1)
            real = left[user, best] != -jnp.inf
            own = jnp.where(real[:, None], groups[user if len(groups) > 1 else 0, best], -1)
            taken = taken.at[:, step].set(own)
            count = (taken[:, :, :, None] == own[:, None, None]).any(axis=2).sum(axis=1)
            full = jnp.where((own >= 0) & (count >= self.most[None]), own, -2)
            closed = (groups[..., None] == full[:, None, None]).any(axis=(2, 3)) | (places == best[:, None])
            return (
                jnp.where(closed, -jnp.inf, left),
                chosen.at[:, step].set(best.astype(jnp.int32)),
                found.at[:, step].set(real),
                taken,
            )

        none = jnp.full((batch, k, len(self.most)), -1, self.groups.dtype)
        start = (values, jnp.zeros((batch, k), jnp.int32), jnp.zeros((batch, k), bool), none)
        _, chosen, found, _ = jax.lax.fori_loop(0, k, choose, start)
        return chosen, found
