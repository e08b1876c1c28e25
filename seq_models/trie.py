"""The prefix tree (trie) of a catalogue's codes, as flat arrays on the device.

Layout after STATIC (arXiv 2602.22647): codes sorted lexicographically, one compressed sparse row per node. Unlike
there, each level has its own vocabulary, and a leaf may hold several items of equal codes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, Shaped


class Members(NamedTuple):
    """Children or items of nodes, padded to the most that any node has (with arbitrary indices where not `valid`).

    They are contiguous: a valid entry at place p is `indices[..., 0] + p`.
    """

    indices: Int[Array, "*b width"]
    valid: Bool[Array, "*b width"]


class Children(NamedTuple):
    """Child nodes and their tokens, padded with arbitrary ones where not `valid`."""

    nodes: Int[Array, "*b fan_out"]
    tokens: Int[Array, "*b fan_out"]
    valid: Bool[Array, "*b fan_out"]


class LeafItems(NamedTuple):
    """Items of leaves: their rows (0 where not `valid`), and their positions among the sorted items."""

    rows: Int[Array, "*b group"]
    positions: Int[Array, "*b group"]
    valid: Bool[Array, "*b group"]


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Maximum sizes of a trie. Tries of equal capacity and level sizes run in the same compiled program."""

    items: int
    fan_outs: tuple[int, ...]
    """Maximum children of a parent, per level."""
    leaf_items: int
    """Maximum items of a leaf."""

    @classmethod
    def around(cls, trie: CodeTrie, *, factor: float = 1.5) -> Capacity:
        """A capacity of `factor` times every count of the trie."""
        fan_outs = tuple(
            min(math.ceil(factor * most), size) for most, size in zip(trie.fan_outs, trie.level_sizes, strict=True)
        )
        return cls(math.ceil(factor * trie.num_items), fan_outs, math.ceil(factor * trie.max_leaf_items))

    @property
    def nodes(self) -> tuple[int, ...]:
        """Maximum nodes per level, beginning with the root."""
        return tuple(itertools.accumulate((1, *self.fan_outs), lambda parents, most: min(self.items, parents * most)))


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CodeTrie:
    """Prefix tree over the codes of a catalogue: a pytree, passed to jitted functions as an argument.

    Nodes are numbered per level in lexicographic order of their prefixes; the root is node 0 of the level before the
    first. Its children at `level` are the nodes `child_start[level][n]` to `child_start[level][n + 1]` (excluded) for
    node n of the level before. Leaf n, a node of the last level, holds the items at positions `leaf_start[n]` to
    `leaf_start[n + 1]` (excluded) of the sorted items. If no node has more than one member, starts are None: the member
    of node n is n.

    Tries of equal static fields and array shapes, such as those of one capacity, run in the same compiled program.
    """

    tokens: tuple[Integer[Array, " nodes"], ...]  # in the smallest type that holds the level's size
    child_start: tuple[Int[Array, " parents_plus_1"] | None, ...]
    leaf_start: Int[Array, " leaves_plus_1"] | None
    item_rows: Int[Array, " items"]  # by position; padded with the number of `items` up to the capacity
    level_sizes: tuple[int, ...] = _static()
    fan_outs: tuple[int, ...] = _static()  # per level: maximum children of a parent
    max_leaf_items: int = _static()

    @classmethod
    def from_codes(
        cls,
        codes: Int[np.ndarray, "items level"],
        level_sizes: Sequence[int],
        *,
        popularity: Shaped[np.ndarray, "items"] | None = None,
        active: Bool[np.ndarray, "items"] | None = None,
        capacity: Capacity | None = None,
    ) -> CodeTrie:
        """Build the trie from codes by item row.

        Items of one leaf are ordered by descending popularity, if given, then by row. Items that are not `active` keep
        their row numbers and are left out of the trie. With a capacity, arrays have its maximum sizes. Raises
        ValueError for codes outside `level_sizes`, for `popularity` or `active` of another length, if no item is
        active, and for a catalogue beyond the capacity.
        """
        codes = np.asarray(codes)
        level_sizes = tuple(int(size) for size in level_sizes)
        _check(codes, level_sizes, popularity, active)
        item_rows = _sorted_rows(codes, level_sizes, popularity)
        item_rows = item_rows if active is None else item_rows[active[item_rows]]
        tokens, starts = _ranges(codes, item_rows, level_sizes)
        counts = Capacity(len(codes), tuple(_widest(start) for start in starts[:-1]), _widest(starts[-1]))
        limit = capacity or counts
        _check_fits(counts, limit)
        nodes = tuple(len(start) - 1 for start in starts) if capacity is None else capacity.nodes
        *child_start, leaf_start = (
            _padded(start, n + 1, start[-1]) if most > 1 else None
            for start, n, most in zip(starts, nodes, (*limit.fan_outs, limit.leaf_items), strict=True)
        )
        return cls(
            tokens=tuple(_padded(token, n, 0) for token, n in zip(tokens, nodes[1:], strict=True)),
            child_start=tuple(child_start),
            leaf_start=leaf_start,
            item_rows=_padded(item_rows, limit.items, limit.items),
            level_sizes=level_sizes,
            fan_outs=limit.fan_outs,
            max_leaf_items=limit.leaf_items,
        )

    @property
    def num_items(self) -> int:
        """Number of item rows; with a capacity, its maximum."""
        return self.item_rows.shape[0]

    def children(self, nodes: Int[Array, "*b"], *, level: int) -> Children:
        """The children at `level` of nodes of the level before; for level 0, of the root, node 0."""
        index, valid = self.members(nodes, level=level)
        return Children(index, windows(self.tokens[level], index).astype(jnp.int32), valid)

    def items(self, leaves: Int[Array, "*b"]) -> LeafItems:
        """The items of leaves."""
        index, valid = self.members(leaves, level=len(self.level_sizes))
        return LeafItems(jnp.where(valid, windows(self.item_rows, index), 0), index, valid)

    def members(self, nodes: Int[Array, "*b"], *, level: int) -> Members:
        """Child nodes at `level` or, for the level after the last, positions of the leaves' items."""
        start = (*self.child_start, self.leaf_start)[level]
        if start is None:
            return Members(nodes[..., None], jnp.ones((*nodes.shape, 1), bool))
        length = (*(len(token) for token in self.tokens), self.num_items)[level]
        width = min((*self.fan_outs, self.max_leaf_items)[level], length)
        first, end = (x[..., None] for x in _range(start, nodes))
        offsets = jax.lax.broadcasted_iota(jnp.int32, (*nodes.shape, width), nodes.ndim)
        index = jnp.minimum(first, length - width) + offsets  # a window that never leaves the array
        return Members(jnp.minimum(index, end - 1), (first <= index) & (index < end))

    def path(self, codes: Int[Array, "*b level"]) -> tuple[Int[Array, "*b"], ...]:
        """The node at each level on the path of items' codes; arbitrary nodes for codes that no item has."""
        node, nodes = jnp.zeros(codes.shape[:-1], jnp.int32), []
        for level, (token, most) in enumerate(zip(self.tokens, self.fan_outs, strict=True)):
            first, end = _range(self.child_start[level], node)
            for _ in range((most - 1).bit_length()):  # the last child whose token is not above the code
                middle = (first + end) // 2
                below = token[middle].astype(jnp.int32) <= codes[..., level].astype(jnp.int32)
                first, end = jnp.where(below, middle, first), jnp.where(below, end, middle)
            node = first
            nodes.append(node)
        return tuple(nodes)

    def members_of_items(
        self, rows: Int[Array, "*b"], codes: Int[Array, "items level"]
    ) -> tuple[tuple[Int[Array, "*b"], ...], Bool[Array, "*b"]]:
        """Path of each item row: its node at each level, then its position; and a mask of the rows in the trie.

        `codes` are those that the trie was built from. Rows that are not in it get arbitrary nodes, and the position
        `num_items`.
        """
        path = self.path(codes.at[rows].get(mode="fill", fill_value=0))
        items = self.items(path[-1])
        same = items.valid & (items.rows == rows[..., None])
        found = same.any(axis=-1)
        positions = items.positions[..., 0] + jnp.argmax(same, axis=-1)
        return (*path, jnp.where(found, positions, self.num_items)), found

    def leaf_counts(self, leaves: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """Number of items of each leaf."""
        return self.item_counts(leaves, level=len(self.level_sizes))

    def item_counts(self, nodes: Int[Array, "*b"], *, level: int) -> Int[Array, "*b"]:
        """Number of items below each node of the level before `level`."""
        first, end = nodes, nodes + 1
        for start in (*self.child_start, self.leaf_start)[level:]:
            if start is not None:
                first, end = start[first], start[end]
        return end - first

    def parents(self, nodes: Int[Array, "*b"], *, level: int) -> Int[Array, "*b"]:
        """The parents, on the level before, of nodes of `level`."""
        return _owners(self.child_start[level], nodes)

    def leaves(self, positions: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """The leaves that hold the items at `positions`."""
        return _owners(self.leaf_start, positions)


def windows(table: Shaped[Array, " n"], index: Int[Array, "*b width"]) -> Shaped[Array, "*b width"]:
    """`table[index]` for indices that are contiguous along the last axis: a slice from `index[..., 0]`.

    On a CPU, reading slices is a few times faster than gathering entries.
    """

    def read(first: Int[Array, ""]) -> Shaped[Array, " width"]:
        return jax.lax.dynamic_slice_in_dim(table, first, index.shape[-1])

    for _ in range(index.ndim - 1):
        read = jax.vmap(read)
    return read(index[..., 0])


def _range(start: Int[Array, " n_plus_1"] | None, nodes: Int[Array, "*b"]) -> tuple[Array, Array]:
    return (nodes, nodes + 1) if start is None else (start[nodes], start[nodes + 1])


def _owners(start: Int[Array, " n_plus_1"] | None, members: Int[Array, "*b"]) -> Int[Array, "*b"]:
    return members if start is None else jnp.searchsorted(start, members, side="right").astype(jnp.int32) - 1


# Building, in numpy.


def _sorted_rows(
    codes: Int[np.ndarray, "items level"], level_sizes: tuple[int, ...], popularity: np.ndarray | None
) -> Int[np.ndarray, " items"]:
    """Rows sorted by code sequence, then descending popularity, then row.

    Columns are packed into 64-bit keys, which numpy sorts with vector instructions, 50 times faster than a lexsort of
    the columns. When a key is full, it is replaced by its rank among the keys.
    """
    num_items = len(codes)
    columns = list(zip(codes.T, level_sizes, strict=True))
    if popularity is not None:
        columns.append((np.unique(-np.asarray(popularity, np.float64), return_inverse=True)[1], num_items))
    columns.append((np.arange(num_items, dtype=np.uint32), num_items))  # makes all keys distinct
    key, used = np.zeros(num_items, np.uint64), 0
    for column, size in columns:
        bits = (size - 1).bit_length()
        if used + bits > 64:
            key, used = _dense_ranks(key), (num_items - 1).bit_length()
        key <<= np.uint64(bits)
        key |= column.astype(np.uint64)
        used += bits
    return np.argsort(key)


def _dense_ranks(keys: np.ndarray) -> np.ndarray:
    order = np.argsort(keys)
    keys = keys[order]
    ranks = np.zeros_like(keys)
    np.cumsum(keys[1:] != keys[:-1], out=ranks[1:])
    keys[order] = ranks
    return keys


def _ranges(
    codes: np.ndarray, item_rows: np.ndarray, level_sizes: tuple[int, ...]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens of the nodes per level, and the starts of nodes' children per level, the last those of leaves' items."""
    opens = np.zeros(len(item_rows), bool)
    opens[0] = True
    tokens, starts = [], []
    for column, size in zip(codes.T, level_sizes, strict=True):
        parents, column = opens.copy(), column[item_rows]
        opens[1:] |= column[1:] != column[:-1]  # a new node begins where any column so far changes
        starts.append(_starts(parents[opens]))
        tokens.append(column[opens].astype(_token_type(size)))
    return tokens, [*starts, _starts(opens)]


def _starts(opens: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " ranges_plus_1"]:
    return np.append(np.flatnonzero(opens), len(opens)).astype(np.int32)


def _widest(start: np.ndarray) -> int:
    return int(np.diff(start).max())


def _token_type(size: int) -> type[np.integer]:
    return np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.int32


def _padded(values: np.ndarray, length: int, fill: int | np.integer) -> Integer[Array, " length"]:
    kind = values.dtype if values.dtype.itemsize <= 2 else np.int32
    padded = np.full(length, fill, kind)
    padded[: len(values)] = values
    return jax.device_put(padded)


def _check_fits(counts: Capacity, limits: Capacity) -> None:
    if len(limits.fan_outs) != len(counts.fan_outs):
        raise ValueError(f"codes have {len(counts.fan_outs)} levels but the capacity {len(limits.fan_outs)}")
    rows = [("items", counts.items, limits.items), ("items of one leaf", counts.leaf_items, limits.leaf_items)]
    for level, (count, limit) in enumerate(zip(counts.fan_outs, limits.fan_outs, strict=True)):
        rows.append((f"children of one parent at level {level}", count, limit))
    for what, count, limit in rows:
        if count > limit:
            raise ValueError(
                f"the catalogue has {count} {what}, its trie's capacity is {limit}: build with a larger Capacity"
                " (programs are then compiled again)"
            )


def _check(
    codes: np.ndarray, level_sizes: tuple[int, ...], popularity: np.ndarray | None, active: np.ndarray | None
) -> None:
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes must be integers [items, level], got {codes.dtype} {codes.shape}")
    if codes.shape[0] == 0 or codes.shape[1] == 0:
        raise ValueError(f"codes must hold at least one item and one level, got shape {codes.shape}")
    if codes.shape[1] != len(level_sizes):
        raise ValueError(f"codes have {codes.shape[1]} levels but level_sizes {level_sizes} has {len(level_sizes)}")
    for level, (column, size) in enumerate(zip(codes.T, level_sizes, strict=True)):
        if column.min() < 0 or column.max() >= size:
            outside = np.flatnonzero((column < 0) | (column >= size))
            raise ValueError(
                f"code {column[outside[0]]} at row {outside[0]}, level {level} is outside 0..{size - 1}"
                f" (level_sizes {level_sizes}; {len(outside)} such codes at this level)"
            )
    if popularity is not None and np.shape(popularity) != codes.shape[:1]:
        raise ValueError(f"popularity must have one number for each of {len(codes)} items, got {np.shape(popularity)}")
    if active is not None and (active.shape != codes.shape[:1] or active.dtype != bool or not active.any()):
        got = f"{active.dtype} {active.shape} with {np.count_nonzero(active)} true"
        raise ValueError(f"active must be booleans, one for each of {len(codes)} items, some of them true; got {got}")
