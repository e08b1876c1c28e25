"""Exact log-probabilities of given items or the whole catalogue, by the same step function as the search."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seq_models.search import (
    Step,
    at_tokens,
    checked_logits,
    extend_prefixes,
    log_total,
    no_prefixes,
    normalized,
)
from seq_models.trie import CodeTrie
from seq_models.types import Cache, Size, SoftmaxOver


def item_log_probs(
    step: Step,
    cache: Cache,
    codes: Int[Array, "batch n level"],
    *,
    trie: CodeTrie | None = None,
    softmax_over: SoftmaxOver = SoftmaxOver.VOCABULARY,
) -> Float[Array, "batch n"]:
    """Exact log-probabilities of given codes, by the `step` of the search; the trie is needed for CHILDREN only.

    Codes outside a level's vocabulary (or, for CHILDREN, outside the trie) have log-probability -inf.
    """
    if softmax_over is SoftmaxOver.CHILDREN and trie is None:
        raise ValueError("SoftmaxOver.CHILDREN needs a trie, got trie=None")
    child_trie = trie if softmax_over is SoftmaxOver.CHILDREN else None
    batch, n, num_levels = codes.shape
    own = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (batch, n))
    total, nodes, prefixes = jnp.zeros((batch, n), jnp.float32), jnp.zeros_like(own), no_prefixes(batch)
    for level in range(num_levels):
        logits, cache = step(cache, prefixes)  # one beam at level 0, then one per item
        logits = jnp.broadcast_to(logits, (batch, n, logits.shape[-1])).astype(jnp.float32)
        target = codes[..., level].astype(jnp.int32)
        token = jnp.clip(target, 0, logits.shape[-1] - 1)
        if child_trie is None:
            log_probs = normalized(at_tokens(logits, token[..., None])[..., 0], log_total(logits))
        else:
            log_probs, nodes = _follow(logits, child_trie, nodes, target, level)
        total += jnp.where(token == target, log_probs, -jnp.inf)
        prefixes = extend_prefixes(prefixes, own if level else jnp.zeros_like(own), token)
    return total


class LeafBlocks(NamedTuple):
    """Blocks of contiguous leaves of a trie: plain integers, a static argument under jit."""

    size: int
    number: int
    widths: tuple[int, ...]
    """Maximum nodes of a block, per level."""

    @classmethod
    def from_trie(cls, trie: CodeTrie, size: int) -> LeafBlocks:
        """Blocks of at most `size` leaves. Reads the trie's arrays: call it outside jit."""
        if size < 1:
            raise ValueError(f"a block must hold at least 1 leaf, got {size}")
        leaves = 1
        for start in trie.child_start:  # the number of leaves without padding
            leaves = leaves if start is None else int(start[leaves])
        first = jnp.arange(0, leaves, size, dtype=jnp.int32)
        last, widths = jnp.minimum(first + size, leaves) - 1, []
        for level in reversed(range(len(trie.level_sizes))):
            widths.append(int((last - first).max()) + 1)
            first, last = (trie.parents(nodes, level=level) for nodes in (first, last))
        return cls(size, len(first), tuple(reversed(widths)))


def catalog_log_probs(
    step: Step,
    cache: Cache,
    trie: CodeTrie,
    *,
    batch: Size,
    blocks: LeafBlocks,
    softmax_over: SoftmaxOver = SoftmaxOver.VOCABULARY,
    divided: bool = False,
) -> Float[Array, "batch items"]:
    """Exact log-probability of every item, by row (-inf for free rows of a capacity). Call it inside jit.

    Leaves are scored in blocks. The nodes above a block are contiguous at every level, so a prefix is computed once per
    block that it is in. Items with equal codes each get the leaf's log-probability or, if `divided`, that of an equal
    share.
    """

    def score(first_leaf: Int[Array, ""]) -> Float[Array, "batch size"]:
        return _block_log_probs(step, cache, trie, first_leaf, batch, blocks.widths, softmax_over)

    by_block = jax.lax.map(score, jnp.arange(blocks.number, dtype=jnp.int32) * blocks.size)
    by_leaf = jnp.moveaxis(by_block, 0, 1).reshape(batch, -1)
    leaves = trie.leaves(jnp.arange(trie.num_items, dtype=jnp.int32))
    by_position = by_leaf[:, leaves]
    if divided:
        by_position -= jnp.log(trie.leaf_counts(leaves).astype(jnp.float32))[None]
    return jnp.full_like(by_position, -jnp.inf).at[:, trie.item_rows].set(by_position, mode="drop")


def _block_log_probs(
    step: Step,
    cache: Cache,
    trie: CodeTrie,
    first_leaf: Int[Array, ""],
    batch: Size,
    widths: tuple[int, ...],
    softmax_over: SoftmaxOver,
) -> Float[Array, "batch size"]:
    """Log-probabilities of the leaves from `first_leaf` on; the results of nodes outside the block are not used."""
    firsts = [first_leaf]
    for level in reversed(range(len(widths))):
        firsts.insert(0, trie.parents(firsts[0], level=level))
    nodes = firsts[0][None]  # the root
    total, prefixes = jnp.zeros((batch, 1), jnp.float32), no_prefixes(batch)
    for level, width in enumerate(widths):
        logits, cache = step(cache, prefixes)
        logits = checked_logits(logits, (batch, len(nodes), trie.level_sizes[level]), level)
        children = trie.children(nodes[None], level=level) if softmax_over is SoftmaxOver.CHILDREN else None
        totals = log_total(logits, children)
        nodes = jnp.minimum(firsts[level + 1] + jnp.arange(width), len(trie.tokens[level]) - 1)
        places = jnp.clip(trie.parents(nodes, level=level) - firsts[level], 0, logits.shape[1] - 1)
        tokens = trie.tokens[level][nodes].astype(jnp.int32)
        total = total[:, places] + normalized(logits[:, places, tokens], totals[:, places])
        places, tokens = (jnp.broadcast_to(x[None], (batch, width)) for x in (places, tokens))
        prefixes = extend_prefixes(prefixes, places, tokens)
    return total


def _follow(
    logits: Float[Array, "batch n size"], trie: CodeTrie, nodes: Int[Array, "batch n"], codes: Array, level: int
) -> tuple[Float[Array, "batch n"], Int[Array, "batch n"]]:
    """Log-probability, among the children of `nodes`, of the child whose token is the code (-inf if none); its node."""
    children = trie.children(nodes, level=level)
    is_code = children.valid & (children.tokens == codes[..., None])
    log_probs = normalized(at_tokens(logits, children.tokens), log_total(logits, children)[..., None])
    place = jnp.argmax(is_code, axis=-1, keepdims=True)
    node = jnp.take_along_axis(children.nodes, place, axis=-1)[..., 0]
    return jnp.where(is_code, log_probs, -jnp.inf).max(axis=-1), node
