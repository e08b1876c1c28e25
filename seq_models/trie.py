"""The prefix tree of a catalogue's codes, as flat arrays that live on the device.

Layout after STATIC (arXiv 2602.22647): rows sorted lexicographically, one compressed sparse row per node. Unlike there,
levels have vocabularies of their own, items with equal codes stay apart, and a leaf knows its items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class Children(NamedTuple):
    """Children of nodes, padded to the level's largest fan-out (where not `valid`, with a real node and its token)."""

    nodes: Int[Array, "*b fan_out"]
    tokens: Int[Array, "*b fan_out"]
    valid: Bool[Array, "*b fan_out"]


def _static():
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CodeTrie:
    """Prefix tree over the codes of a catalogue: a pytree, to be passed to jitted functions as an argument.

    Nodes are numbered per level in lexicographic order of their prefixes; the root is node 0 before the first level.
    Node n before `level` has the children `child_start[level][n]` to `child_start[level][n + 1]` (excluded) of `level`,
    and leaf n, a node of the last level, holds `item_rows[leaf_start[n]:leaf_start[n + 1]]`, in row order.

    Two tries of equal static fields and equal array shapes run in the same compiled program.
    """

    tokens: tuple[Int[Array, "nodes"], ...]
    child_start: tuple[Int[Array, "parents_plus_1"], ...]
    leaf_start: Int[Array, "leaves_plus_1"]
    item_rows: Int[Array, "items"]
    level_sizes: tuple[int, ...] = _static()
    fan_outs: tuple[int, ...] = _static()  # per level: most children of any one parent
    max_leaf_items: int = _static()

    @classmethod
    def from_codes(cls, codes: Int[np.ndarray, "items level"], level_sizes: Sequence[int]) -> CodeTrie:
        """Build from codes whose row index is the item row; raises ValueError for codes outside `level_sizes`."""
        codes = np.asarray(codes)
        level_sizes = tuple(int(size) for size in level_sizes)
        _check(codes, level_sizes)
        item_rows = np.lexsort(codes.T[::-1])  # stable: equal codes stay in row order
        codes = codes[item_rows]
        tokens, child_start = [], []
        parents = np.zeros(1, np.int64)  # sorted position of each node's first item; the root's is 0
        opens = np.zeros(len(codes), bool)
        opens[0] = True
        for column in codes.T:
            opens[1:] |= column[1:] != column[:-1]  # a node opens where any column so far changes
            nodes = np.flatnonzero(opens)
            child_start.append(np.append(np.searchsorted(nodes, parents), len(nodes)))
            tokens.append(column[nodes])
            parents = nodes
        leaf_start = np.append(parents, len(codes))
        return cls(
            tokens=tuple(map(_int32, tokens)),
            child_start=tuple(map(_int32, child_start)),
            leaf_start=_int32(leaf_start),
            item_rows=_int32(item_rows),
            level_sizes=level_sizes,
            fan_outs=tuple(int(np.diff(start).max()) for start in child_start),
            max_leaf_items=int(np.diff(leaf_start).max()),
        )

    @property
    def num_items(self) -> int:
        return self.item_rows.shape[0]

    def children(self, nodes: Int[Array, "*b"], *, level: int) -> Children:
        """The children, at `level`, of nodes of the level before (of the root, node 0, for level 0)."""
        index, valid = _expand(self.child_start[level], nodes, width=self.fan_outs[level])
        return Children(index, self.tokens[level][index], valid)

    def items(self, leaves: Int[Array, "*b"]) -> tuple[Int[Array, "*b group"], Bool[Array, "*b group"]]:
        """Item rows of leaves, padded to the largest leaf, and which of them are valid."""
        index, valid = _expand(self.leaf_start, leaves, width=self.max_leaf_items)
        return self.item_rows[index], valid


def _int32(values: np.ndarray) -> Int[Array, "n"]:
    return jnp.asarray(values, jnp.int32)


def _expand(start: Int[Array, "n_plus_1"], nodes: Int[Array, "*b"], *, width: int) -> tuple[Array, Array]:
    """Positions `start[node]` to `start[node + 1]` of every node, padded to `width` by the last, and their validity."""
    offsets = jax.lax.broadcasted_iota(jnp.int32, (*nodes.shape, width), nodes.ndim)
    last = start[nodes + 1][..., None] - 1
    index = start[nodes][..., None] + offsets
    return jnp.minimum(index, last), index <= last


def _check(codes: np.ndarray, level_sizes: tuple[int, ...]) -> None:
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes must be integers [items, level], got {codes.dtype} {codes.shape}")
    if codes.shape[0] == 0 or codes.shape[1] == 0:
        raise ValueError(f"codes must hold at least one item and one level, got shape {codes.shape}")
    if codes.shape[1] != len(level_sizes):
        raise ValueError(f"codes have {codes.shape[1]} levels but level_sizes {level_sizes} has {len(level_sizes)}")
    outside = (codes < 0) | (codes >= np.array(level_sizes))
    if outside.any():
        row, level = (int(i) for i in np.argwhere(outside)[0])
        raise ValueError(
            f"code {codes[row, level]} at row {row}, level {level} is outside 0..{level_sizes[level] - 1}"
            f" (level_sizes {level_sizes}; {int(outside.sum())} such codes in all)"
        )
