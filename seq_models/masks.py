"""Which items a request may return: any subset, for each user their own, without another trie.

Items lie sorted by their codes, so those below a node are a range, and how many of them are allowed is a difference of
two prefix counts. A list of denied items is a handful of positions, counted by a binary search.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from seq_models.trie import CodeTrie


class ItemMask(NamedTuple):
    """Items allowed to each user, or to all users alike, of one trie: a pytree."""

    counts: Int[Array, "users items_plus_1"] | None
    """How many items before each position are allowed, if not all are; one row for all users, or one for each."""
    denied: Int[Array, "users n"] | None
    """Positions of allowed items that are denied after all, ascending, each once; at the end what counts for none."""

    @classmethod
    def of(
        cls,
        trie: CodeTrie,
        *,
        allowed: Bool[Array | np.ndarray, "users items"] | None = None,
        denied: Int[Array | np.ndarray, "users n"] | None = None,
    ) -> ItemMask:
        """The items that are allowed (by row, all where not given) less those denied (rows, -1 for none).

        Either has one row for each user, or a single one for all. `allowed` takes time and memory in proportion to the
        catalogue, so what many requests share (in stock, by country) is best made once; `denied`, to its own length.
        Raises ValueError for `allowed` of another number of items than the trie has, or has capacity for, and for
        denied rows outside the catalogue where these are a numpy array.
        """
        counts = None
        if allowed is not None:
            _check_allowed(allowed, trie)
            taken = jnp.asarray(allowed)[:, trie.item_rows]
            counts = jnp.pad(jnp.cumsum(taken, axis=-1, dtype=jnp.int32), ((0, 0), (1, 0)))
        if denied is None:
            return cls(counts, None)
        _check_denied(denied, trie)
        return cls(counts, _distinct(_positions(jnp.asarray(denied), trie, counts), trie.num_items))

    def before(self, positions: Int[Array, "batch *n"]) -> Int[Array, "batch *n"]:
        """How many of the items before each position are allowed to each user."""
        allowed = positions if self.counts is None else _per_user(jnp.take, self.counts, positions)
        return allowed if self.denied is None else allowed - _per_user(_smaller, self.denied, positions)

    def among(self, start: Int[Array, "batch *n"], end: Int[Array, "batch *n"]) -> Int[Array, "batch *n"]:
        """How many of the items at positions `start` to `end` (excluded) are allowed to each user."""
        return self.before(end) - self.before(start)


def _positions(rows: Int[Array, "users n"], trie: CodeTrie, counts: Array | None) -> Int[Array, "batch n"]:
    """Positions of item rows, `num_items` for those that are no item's or not allowed anyway."""
    nowhere = trie.num_items
    positions = trie.item_positions.at[rows].get(mode="fill", fill_value=nowhere)
    counted = rows >= 0  # a negative row would count from the end
    if counts is not None:
        positions = jnp.broadcast_to(positions, (max(len(rows), len(counts)), rows.shape[1]))
        counted = counted & (_per_user(jnp.take, counts, positions + 1) > _per_user(jnp.take, counts, positions))
    return jnp.where(counted, positions, nowhere)


def _distinct(positions: Int[Array, "users n"], nowhere: int) -> Int[Array, "users n"]:
    positions = jnp.sort(positions, axis=-1)
    again = jnp.pad(positions[:, 1:] == positions[:, :-1], ((0, 0), (1, 0)))
    return jnp.sort(jnp.where(again, nowhere, positions), axis=-1)


def _smaller(ascending: Int[Array, " n"], positions: Int[Array, "*m"]) -> Int[Array, "*m"]:
    return jnp.searchsorted(ascending, positions, method="scan_unrolled").astype(jnp.int32)


def _per_user(
    function: Callable[[Array, Array], Array], table: Int[Array, "users n"], positions: Int[Array, "batch *m"]
) -> Int[Array, "batch *m"]:
    """`function(table of the user, positions of the user)`, where the table may have one row for all users."""
    if len(table) == 1:
        return function(table[0], positions)
    return jax.vmap(function)(table, positions)


def _check_allowed(allowed: Array | np.ndarray, trie: CodeTrie) -> None:
    if allowed.ndim != 2 or allowed.shape[1] != trie.num_items or allowed.dtype != bool:
        raise ValueError(
            f"allowed must be booleans [users or 1, {trie.num_items} items], of all the trie has or has capacity for,"
            f" got {allowed.dtype} {allowed.shape}"
        )


def _check_denied(denied: Array | np.ndarray, trie: CodeTrie) -> None:
    if denied.ndim != 2 or not jnp.issubdtype(denied.dtype, jnp.integer):
        raise ValueError(f"denied must be item rows [users or 1, n], got {denied.dtype} {denied.shape}")
    if isinstance(denied, np.ndarray) and denied.size and not -1 <= denied.min() <= denied.max() < trie.num_items:
        wrong = denied[(denied < -1) | (denied >= trie.num_items)][0]
        raise ValueError(f"denied row {wrong} is outside the catalogue's 0..{trie.num_items - 1} (-1 for none)")
