"""Masks of the items that a request may return: any subset, per user, over the same trie.

Allowed items are marked at every node, so that a search reads the marks next to the tokens. A list of denied items
closes only few nodes, those whose allowed items are all denied. They are computed once, from the items upwards, and
looked up among the parents that a search extends, so that the cost of a denied item hardly depends on the catalogue.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seq_models.trie import CodeTrie, windows


class Closed(NamedTuple):
    """Closed members of one level, nodes or items, and their parents; -1 marks an unused entry."""

    members: Int[Array, "users n"]
    parents: Int[Array, "users n"]


class ItemMask(NamedTuple):
    """Items of a trie that are allowed to each user, or to all users: a pytree.

    Both fields have an entry per level, and one for the items by position. If all nodes of a level have one child, the
    level shares its array with the next.
    """

    allowed: tuple[Bool[Array, "users members"], ...] | None
    """True at members with an allowed item; None: all are allowed."""
    denied: tuple[Closed, ...] | None
    """Allowed members whose allowed items are all denied."""

    @classmethod
    def from_items(
        cls,
        trie: CodeTrie,
        *,
        allowed: Bool[Array | np.ndarray, "masks items"] | None = None,
        denied: Int[Array | np.ndarray, "users n"] | None = None,
        codes: Int[Array | np.ndarray, "rows level"] | None = None,
    ) -> ItemMask:
        """The `allowed` items (a mask by item row; default: all) without the `denied` ones (item rows, padded with -1).

        Each has one row per user, or a single one for all. The cost of `allowed` is proportional to the catalogue, so a
        mask that many requests share (in stock, by country) is best built once; the cost of `denied` is proportional to
        its length, and it needs the `codes` that the trie was built from. Raises ValueError if `allowed` does not have
        the trie's number of items (its capacity), for codes of another shape than the trie's, and for denied rows
        outside the catalogue if they are a numpy array.
        """
        open_ = None
        if allowed is not None:
            _check_allowed(allowed, trie)
            open_ = _allowed(trie, jnp.asarray(allowed))
        if denied is None:
            return cls(open_, None)
        return cls(open_, _denied(trie, _checked_denied(denied, trie), _checked_codes(codes, trie), open_))

    def filter_members(
        self,
        valid: Bool[Array, "batch beam n"],
        parents: Int[Array, "batch beam"],
        members: Int[Array, "batch beam n"],
        *,
        level: int,
    ) -> Bool[Array, "batch beam n"]:
        """The mask `valid` of members of parents (children at `level`, or items) without those that lead to no item
        which the user may get."""
        if self.allowed is not None:
            valid &= _open(self.allowed[level], members)
        return valid if self.denied is None else _without(valid, parents, members, self.denied[level])

    def allows(self, positions: Int[Array, "batch n"]) -> Bool[Array, "batch n"]:
        """Mask of the item positions that the user may get; arbitrary for positions without an item."""
        allows = jnp.ones(positions.shape, bool)
        if self.allowed is not None:
            allows = _open(self.allowed[-1], positions[..., None])[..., 0]
        if self.denied is not None:
            positions_closed = jnp.where(self.denied[-1].parents < 0, -1, self.denied[-1].members)
            allows &= (positions[:, :, None] != positions_closed[:, None, :]).all(axis=-1)
        return allows


def locate_members(
    members: Int[Array, "#users n"],
    parents: Int[Array, "#users n"],
    beams: Int[Array, "users beam"],
    of_beams: Int[Array, "users beam width"],
) -> tuple[Int[Array, "users n"], Int[Array, "users n"]]:
    """Indices of members among the members of beams: the beam of their parent, and the place in its row. The place is
    the row's width if no beam is the parent."""
    count = beams.shape[1]
    here = parents[:, :, None] == beams[:, None, :]
    first = jnp.where(here, jnp.arange(count)[None, None], count).min(axis=-1)  # a few times faster than argmax
    beam = jnp.minimum(first, count - 1)
    firsts = jnp.take_along_axis(of_beams[..., 0], beam, axis=-1)
    return beam, jnp.where(first < count, members - firsts, of_beams.shape[-1])


def _without(valid: Array, parents: Array, members: Array, closed: Closed) -> Bool[Array, "batch beam n"]:
    """`valid` without the few closed members; those whose parent is no beam have no place in it."""
    beam, place = locate_members(closed.members, closed.parents, parents, members)
    return jax.vmap(lambda v, b, p: v.at[b, p].set(False, mode="drop"))(valid, beam, place)


def _open(allowed: Bool[Array, "users members"], members: Int[Array, "batch *b n"]) -> Bool[Array, "batch *b n"]:
    """Mask of contiguous members that are allowed to their user."""
    if len(allowed) == 1:
        return windows(allowed[0], members)
    return jax.vmap(windows)(allowed, members)


@jax.jit
def _allowed(trie: CodeTrie, allowed: Bool[Array, "users items"]) -> tuple[Bool[Array, "users members"], ...]:
    levels = [allowed.at[:, trie.item_rows].get(mode="fill", fill_value=False)]
    for start in (trie.leaf_start, *reversed(trie.child_start[1:])):
        levels.insert(0, levels[0] if start is None else _any_of(levels[0], start))
    return tuple(levels)


def _any_of(
    members: Bool[Array, "users members"], start: Int[Array, " parents_plus_1"]
) -> Bool[Array, "users parents"]:
    before = jnp.pad(jnp.cumsum(members, axis=-1, dtype=jnp.int32), ((0, 0), (1, 0)))[:, start]
    return before[:, 1:] > before[:, :-1]


@jax.jit
def _denied(
    trie: CodeTrie, rows: Int[Array, "users n"], codes: Int[Array, "items level"], allowed: tuple[Array, ...] | None
) -> tuple[Closed, ...]:
    """Closed members of all levels, from the items upwards: a node is closed if all its allowed members are closed."""
    if allowed is not None:
        rows = jnp.broadcast_to(rows, (max(len(rows), len(allowed[0])), rows.shape[1]))
    members, found, _ = sorted_members(trie, rows, codes)
    closed = found & (members[-1] != jnp.pad(members[-1][:, :-1], ((0, 0), (1, 0)), constant_values=-1))
    if allowed is not None:
        closed &= _open(allowed[-1], members[-1][..., None])[..., 0]
    levels: list[Closed] = []
    for level in reversed(range(len(members))):
        parents = members[level - 1] if level else jnp.zeros_like(members[0])
        levels.insert(0, Closed(members[level], jnp.where(closed, parents, -1)))
        sums, of_parent = _run_sums(closed, parents), trie.members(parents, level=level)
        open_ = of_parent.valid if allowed is None else of_parent.valid & _open(allowed[level], of_parent.indices)
        closed = (sums > 0) & (sums == open_.sum(axis=-1, dtype=jnp.int32))
    return tuple(levels)


def sorted_members(
    trie: CodeTrie, rows: Int[Array, "users n"], codes: Int[Array, "items level"]
) -> tuple[tuple[Int[Array, "users n"], ...], Bool[Array, "users n"], Int[Array, "users n"]]:
    """`CodeTrie.members_of_items` sorted by position, and the order that sorts them."""
    members, found = trie.members_of_items(rows, codes)
    order = stable_order(members[-1], most=trie.num_items)
    *ordered, found = (jnp.take_along_axis(x, order, axis=-1) for x in (*members, found))
    return tuple(ordered), found, order


def _run_sums(flags: Bool[Array, "users n"], keys: Int[Array, "users n"]) -> Int[Array, "users n"]:
    """Number of set flags in each run of equal keys, at the run's last entry; elsewhere 0."""
    sums = jnp.cumsum(flags, axis=-1, dtype=jnp.int32)
    changes = keys[:, 1:] != keys[:, :-1]
    first, last = (jnp.pad(changes, ((0, 0), pad), constant_values=True) for pad in ((1, 0), (0, 1)))
    before = jax.lax.cummax(jnp.where(first, sums - flags.astype(jnp.int32), 0), axis=1)
    return jnp.where(last, sums - before, 0)


def stable_order(keys: Int[Array, "users n"], *, most: int) -> Int[Array, "users n"]:
    """Indices that stably sort keys from 0 to `most`. Key and index are packed into 32 bits, which a CPU sorts far
    faster than pairs.

    If both do not fit, keys are sorted by their low bits first, then by the others.
    """
    bits = (keys.shape[1] - 1).bit_length()
    key_bits = 32 - bits
    if most.bit_length() > key_bits:
        low = stable_order(keys & ((1 << key_bits) - 1), most=(1 << key_bits) - 1)
        high = stable_order(jnp.take_along_axis(keys >> key_bits, low, axis=-1), most=most >> key_bits)
        return jnp.take_along_axis(low, high, axis=-1)
    packed = (keys.astype(jnp.uint32) << bits) | jnp.arange(keys.shape[1], dtype=jnp.uint32)[None]
    return (jnp.sort(packed, axis=-1) & ((1 << bits) - 1)).astype(jnp.int32)


def run_sums(values: Float[Array, "users n"], keys: Int[Array, "users n"]) -> Float[Array, "users n"]:
    """Cumulative sums within runs of equal keys. They never subtract two sums, which would lose precision."""
    places = jnp.arange(keys.shape[1], dtype=jnp.int32)[None]

    def doubled(power: Int[Array, ""], sums: Float[Array, "users n"]) -> Float[Array, "users n"]:
        distance = 1 << power
        before, same = jnp.roll(sums, distance, axis=1), jnp.roll(keys, distance, axis=1) == keys
        return sums + jnp.where((places >= distance) & same, before, 0.0)

    return jax.lax.fori_loop(0, (keys.shape[1] - 1).bit_length(), doubled, values)


def _check_allowed(allowed: Array | np.ndarray, trie: CodeTrie) -> None:
    if allowed.ndim != 2 or allowed.shape[1] != trie.num_items or allowed.dtype != bool:
        raise ValueError(
            f"allowed must be booleans [users or 1, {trie.num_items} items], of all the trie has or has capacity for,"
            f" got {allowed.dtype} {allowed.shape}"
        )


def _checked_denied(denied: Array | np.ndarray, trie: CodeTrie) -> Int[Array, "users n"]:
    if denied.ndim != 2 or not jnp.issubdtype(denied.dtype, jnp.integer):
        raise ValueError(f"denied must be item rows [users or 1, n], got {denied.dtype} {denied.shape}")
    if isinstance(denied, np.ndarray) and denied.size and not -1 <= denied.min() <= denied.max() < trie.num_items:
        wrong = denied[(denied < -1) | (denied >= trie.num_items)][0]
        raise ValueError(f"denied row {wrong} is outside the catalogue's 0..{trie.num_items - 1} (-1 for none)")
    return jnp.asarray(denied, jnp.int32)


def _checked_codes(codes: Array | np.ndarray | None, trie: CodeTrie) -> Int[Array, "items level"]:
    levels = len(trie.level_sizes)
    if codes is None or codes.ndim != 2 or codes.shape[1] != levels or len(codes) > trie.num_items:
        got = None if codes is None else codes.shape
        raise ValueError(
            f"denied items need the codes [up to {trie.num_items} items, {levels} levels] of the trie, got {got}"
        )
    return jnp.asarray(codes)
