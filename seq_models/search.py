"""Beam search over a code trie: every beam it returns is an item that exists.

A model takes part through one function, `step(cache, codes, level) -> (logits, cache)`:

- `level` is a Python int (levels are unrolled, since their vocabularies differ);
- `codes`, `Int[batch beam]`, are the codes chosen at the level before for each live beam; None at level 0, where each
  user has a single beam;
- `logits`, `Float[batch beam level_sizes[level]]`, are those of this level's codes;
- `cache` is any pytree of arrays `[batch, beam, ...]`, the beams' own state, re-gathered by parent between levels.
  What all beams of a user share is closed over by `step` and never repeated per beam.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seq_models.trie import CodeTrie

Cache = Any
Step = Callable[
    [Cache, Int[Array, "batch beam"] | None, int],
    tuple[Float[Array, "batch beam size"], Cache],
]


class Normalization(enum.Enum):
    """What the log-probabilities of a level sum to one over; it should be the same in training and in search."""

    VOCABULARY = "vocabulary"  # the level's whole vocabulary: the model's own probability
    CHILDREN = "children"  # the children of the prefix in the trie: the probability given that the item exists


class Beams(NamedTuple):
    """Items, best first. Where not `valid`: row and codes -1, log-probability -inf."""

    rows: Int[Array, "batch beam"]
    codes: Int[Array, "batch beam level"]
    log_probs: Float[Array, "batch beam"]
    valid: Bool[Array, "batch beam"]


class _Live(NamedTuple):
    """Prefixes still in the search, best first; a log-probability of -inf only where the step forbids the rest."""

    nodes: Int[Array, "batch beam"]
    codes: Int[Array, "batch beam level"]
    log_probs: Float[Array, "batch beam"]


def beam_search(
    step: Step,
    cache: Cache,
    trie: CodeTrie,
    *,
    beam_size: int,
    normalization: Normalization = Normalization.VOCABULARY,
) -> Beams:
    """The `beam_size` items that beam search finds most probable, per user; to be called inside jit, trie as argument.

    A level keeps min(beam_size, nodes of the level) prefixes; the first runs one beam, on a `cache` of beam axis 1.
    Ties keep the order of their prefixes, then of their codes. Items that share their codes share their log-probability
    too: each gets the leaf's, in row order. Fewer than `beam_size` items (of probability above zero) leave the last
    beams not valid. Raises ValueError for a beam_size below 1 and for logits of another shape than the trie's levels.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, got {beam_size}")
    logits, cache = step(cache, None, 0)
    live = _root(logits.shape[0])
    for level, size in enumerate(trie.level_sizes):
        if level > 0:
            logits, cache = step(cache, live.codes[..., -1], level)
        _check_logits(logits, (*live.nodes.shape, size), level)
        live, parents = _extend(live, logits, trie, level, beam_size, normalization)
        cache = _take_beams(cache, parents)
    return _items(live, trie, beam_size)


def item_log_probs(
    step: Step,
    cache: Cache,
    codes: Int[Array, "batch n level"],
    *,
    trie: CodeTrie | None = None,
    normalization: Normalization = Normalization.VOCABULARY,
) -> Float[Array, "batch n"]:
    """Exact log-probabilities of given codes, by the same `step` as in search; the trie is needed for CHILDREN only.

    Codes outside a level's vocabulary (or, for CHILDREN, outside the trie) have log-probability -inf.
    """
    if normalization is Normalization.CHILDREN and trie is None:
        raise ValueError("Normalization.CHILDREN needs the trie whose children are meant, got trie=None")
    among = trie if normalization is Normalization.CHILDREN else None
    total = jnp.zeros(codes.shape[:2], jnp.float32)
    nodes = jnp.zeros(codes.shape[:2], jnp.int32)
    previous = None
    for level in range(codes.shape[-1]):
        logits, cache = step(cache, previous, level)
        if level == 0:  # from here on every item is a beam of its own
            logits, cache = _take_beams((logits, cache), nodes)
        target = codes[..., level]
        if among is None:
            log_probs = _log_probs(logits, target[..., None], None)[..., 0]
        else:
            log_probs, nodes = _follow(logits, among, nodes, target, level)
        previous = jnp.clip(target, 0, logits.shape[-1] - 1)
        total += jnp.where(previous == target, log_probs, -jnp.inf)
    return total


def _root(batch: int) -> _Live:
    nodes = jnp.zeros((batch, 1), jnp.int32)
    return _Live(nodes, jnp.zeros((batch, 1, 0), jnp.int32), nodes.astype(jnp.float32))


def _extend(
    live: _Live, logits: Array, trie: CodeTrie, level: int, beam_size: int, normalization: Normalization
) -> tuple[_Live, Int[Array, "batch beam"]]:
    """The best children of the live prefixes, and which prefix each descends from."""
    children = trie.children(live.nodes, level=level)
    among = children.valid if normalization is Normalization.CHILDREN else None
    scores = live.log_probs[..., None] + _log_probs(logits, children.tokens, among)
    scores = _flat(jnp.where(children.valid, scores, -jnp.inf))
    # enough real candidates: either beam_size parents with a child each, or all parents and so all nodes of the level
    log_probs, best = jax.lax.top_k(scores, min(beam_size, trie.tokens[level].shape[0]))
    parents = best // trie.fan_outs[level]
    nodes, tokens = _take_beams((_flat(children.nodes), _flat(children.tokens)), best)
    codes = jnp.concatenate([_take_beams(live.codes, parents), tokens[..., None]], axis=-1)
    return _Live(nodes, codes, log_probs), parents


def _log_probs(
    logits: Float[Array, "batch beam size"],
    tokens: Int[Array, "batch beam n"],
    among: Bool[Array, "batch beam n"] | None,
) -> Float[Array, "batch beam n"]:
    """Log-probabilities of `tokens`, normalised over the vocabulary or, where `among` is given, over those tokens."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens, axis=-1, mode="clip")
    if among is None:
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    else:
        total = jax.nn.logsumexp(chosen, axis=-1, keepdims=True, where=among)
    # a step may forbid codes by logits of -inf; where it forbids all of them, total is -inf as well
    return jnp.where(chosen == -jnp.inf, -jnp.inf, chosen - total)


def _follow(
    logits: Float[Array, "batch n size"], trie: CodeTrie, nodes: Int[Array, "batch n"], codes: Array, level: int
) -> tuple[Float[Array, "batch n"], Int[Array, "batch n"]]:
    """Log-probability among the children of `nodes` of the one whose token is the code (-inf if none), and its node."""
    children = trie.children(nodes, level=level)
    is_code = children.valid & (children.tokens == codes[..., None])
    log_probs = jnp.where(is_code, _log_probs(logits, children.tokens, children.valid), -jnp.inf)
    found = jnp.argmax(is_code, axis=-1, keepdims=True)
    return log_probs.max(axis=-1), jnp.take_along_axis(children.nodes, found, axis=-1)[..., 0]


def _items(live: _Live, trie: CodeTrie, beam_size: int) -> Beams:
    """Leaves opened into their items, order kept, cut or padded to `beam_size`."""
    rows, valid = trie.items(live.nodes)
    log_probs = _flat(jnp.where(valid, live.log_probs[..., None], -jnp.inf))
    # top_k is stable, so it closes the gaps of padded leaves and changes no order
    log_probs, best = jax.lax.top_k(log_probs, min(beam_size, trie.num_items))
    rows = _take_beams(_flat(rows), best)
    codes = _take_beams(live.codes, best // trie.max_leaf_items)
    valid = log_probs != -jnp.inf
    missing = ((0, 0), (0, beam_size - best.shape[-1]))
    return Beams(
        rows=jnp.pad(jnp.where(valid, rows, -1), missing, constant_values=-1),
        codes=jnp.pad(jnp.where(valid[..., None], codes, -1), (*missing, (0, 0)), constant_values=-1),
        log_probs=jnp.pad(log_probs, missing, constant_values=-jnp.inf),
        valid=jnp.pad(valid, missing),
    )


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _take_beams(tree: Any, index: Int[Array, "batch n"]) -> Any:
    """Entries `index` along axis 1 of every leaf, for each user their own."""
    return jax.tree.map(lambda leaf: jax.vmap(lambda beams, i: beams[i])(leaf, index), tree)


def _check_logits(logits: Array, expected: tuple[int, ...], level: int) -> None:
    if logits.shape != expected:
        raise ValueError(
            f"step must return logits [batch, beam, level size] = {expected} at level {level}, got {logits.shape}"
        )
