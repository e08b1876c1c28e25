"""Beam search over a code trie: every beam it returns is an item that exists, and one that the request may return.

A model takes part through one function, `step(cache, prefixes) -> (logits, cache)` (`seq_models.codes`), called once
per level: levels are unrolled, since their vocabularies differ. At level 0 each user has a single beam. `logits`,
`Float[batch beam level_sizes[level]]`, are those of the next code of each beam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seq_models.masks import ItemMask
from seq_models.mixture import PrefixMasses
from seq_models.noise import GumbelNoise
from seq_models.sharing import take_beams, top_k
from seq_models.trie import Children, CodeTrie
from seq_models.types import Cache, Prefixes, Size, SoftmaxOver

Step = Callable[[Cache, Prefixes], tuple[Float[Array, "batch beam size"], Cache]]


class Beams(NamedTuple):
    """Items, best first. Where not `valid`: row and codes -1, log-probability -inf."""

    rows: Int[Array, "batch beam"]
    codes: Int[Array, "batch beam level"]
    log_probs: Float[Array, "batch beam"]
    valid: Bool[Array, "batch beam"]


class _Live(NamedTuple):
    """Prefixes still in the search, best first; a score of -inf where there is none."""

    nodes: Int[Array, "batch beam"]
    prefixes: Prefixes
    log_probs: Float[Array, "batch beam"]
    """Under the model."""
    scores: Float[Array, "batch beam"]
    """Under the mixture, if there is one."""
    drawn: Float[Array, "batch beam"] | None = None
    """Perturbed, where items are drawn."""


def beam_search(
    step: Step,
    cache: Cache,
    trie: CodeTrie,
    *,
    batch: Size,
    beam_size: int,
    num_results: int | None = None,
    softmax_over: SoftmaxOver = SoftmaxOver.VOCABULARY,
    mask: ItemMask | None = None,
    mixture: PrefixMasses | None = None,
    noise: GumbelNoise | None = None,
) -> Beams:
    """The items that beam search finds most probable, per user; to be called inside jit, trie and mask as arguments.

    A level keeps min(beam_size, nodes of the level) prefixes, of those that lead to an item the `mask` allows; the
    mask changes no probability. Ties keep the order of their prefixes, then of their codes. Items of the same codes
    have the same log-probability and come in the trie's order. `num_results` (beam_size unless given) items are
    returned; if fewer are found (of probability above zero), the last are not valid.

    With a `mixture`, prefixes are ranked by their mass under it, and each item has its own probability there, the
    model's part of which is the leaf's divided by its number of items. What the mixture closes
    (`MixtureTerms.closed`), the mask has to deny.

    With `noise`, beams are kept and items returned in the order of their perturbed log-probabilities: a draw without
    replacement (`seq_models.noise`), exact where the beam holds all prefixes; at temperature 1 over the children of a
    trie without mask, whatever its width. Items of one leaf have equal shares of its probability.

    Raises ValueError for numbers out of range and for logits of another shape than the trie's levels.
    """
    num_results = beam_size if num_results is None else num_results
    _check_numbers(beam_size, num_results)
    start = jnp.zeros((batch, 1), jnp.int32)
    nothing = start.astype(jnp.float32)
    live = _Live(start, no_prefixes(batch), nothing, nothing)
    for level, size in enumerate(trie.level_sizes):
        logits, cache = step(cache, live.prefixes)
        logits = checked_logits(logits, (*live.nodes.shape, size), level)
        children = trie.children(live.nodes, level=level)
        total = log_total(logits, children if softmax_over is SoftmaxOver.CHILDREN else None)
        log_probs = normalized(at_tokens(logits, children.tokens), total[..., None])
        scores = live.log_probs[..., None] + log_probs
        if mixture is not None:
            scores = mixture.of_children(scores, live.nodes, children.nodes, level=level)
        open_ = children.valid & (live.scores != -jnp.inf)[..., None]
        if mask is not None:
            open_ = mask.left(open_, live.nodes, children.nodes, level=level)
        # enough candidates: either beam_size parents with a child each, or all parents and so all nodes of the level
        num_beams = min(beam_size, trie.tokens[level].shape[0])
        scores, drawn = jnp.where(open_, scores, -jnp.inf), None
        if noise is not None:
            below = trie.item_counts(live.nodes, level=level), trie.item_counts(children.nodes, level=level + 1)
            drawn = noise.of_children(live.drawn, live.scores, scores, step=level, below=below)
        before, live = live, _extend(live, trie, children, scores, num_beams, drawn)
        if mixture is not None:
            live = live._replace(log_probs=_log_probs(before, live.prefixes, logits, total))
    return _items(live, trie, mask, num_results, mixture, noise)


def no_prefixes(batch: Size) -> Prefixes:
    """The single empty prefix with which each user's search begins."""
    none = jnp.zeros((batch, 1, 0), jnp.int32)
    return Prefixes(none, none)


def extend_prefixes(prefixes: Prefixes, places: Int[Array, "batch n"], tokens: Int[Array, "batch n"]) -> Prefixes:
    """The prefixes at `places`, each with one of `tokens` added."""
    codes, ancestors = take_beams(prefixes, places)
    return Prefixes(
        *(jnp.concatenate([old, new[..., None]], -1) for old, new in ((codes, tokens), (ancestors, places)))
    )


def checked_logits(logits: Array, expected: tuple[Size, ...], level: int) -> Float[Array, "batch beam size"]:
    """Logits in float32; raises ValueError where they are not [batch, beam, level size]."""
    if logits.shape != expected:
        raise ValueError(
            f"step must return logits [batch, beam, level size] = {expected} at level {level}, got {logits.shape}"
        )
    return logits.astype(jnp.float32)


def log_total(logits: Float[Array, "batch beam size"], children: Children | None = None) -> Float[Array, "batch beam"]:
    """The logarithm of the softmax's sum: over the vocabulary or, where given, over each beam's children."""
    if children is None:
        return jax.nn.logsumexp(logits, axis=-1)
    return jax.nn.logsumexp(at_tokens(logits, children.tokens), axis=-1, where=children.valid)


def at_tokens(
    logits: Float[Array, "batch beam size"], tokens: Int[Array, "#batch #beam n"]
) -> Float[Array, "batch beam n"]:
    return jnp.take_along_axis(logits, tokens, axis=-1, mode="clip")


def normalized(logits: Float[Array, "*n"], total: Float[Array, "*#n"]) -> Float[Array, "*n"]:
    """Log-probabilities. A step may forbid codes by logits of -inf; where it forbids all, `total` is -inf as well."""
    return jnp.where(logits == -jnp.inf, -jnp.inf, logits - total)


def _extend(
    live: _Live,
    trie: CodeTrie,
    children: Children,
    scores: Float[Array, "batch beam fan_out"],
    num_beams: int,
    drawn: Float[Array, "batch beam fan_out"] | None,
) -> _Live:
    """The best children of the live prefixes, looked up again: cheaper than to keep the nodes of all that are not."""
    level, token = live.prefixes.level, trie.tokens[live.prefixes.level]
    log_probs, best, kept = _best(_flat(scores), num_beams, None if drawn is None else _flat(drawn))
    parents = best // scores.shape[-1]
    nodes = take_beams(children.nodes[..., 0], parents) + best % scores.shape[-1]
    nodes = jnp.minimum(nodes, len(trie.tokens[level]) - 1)
    prefixes = extend_prefixes(live.prefixes, parents, token[nodes].astype(jnp.int32))
    return _Live(nodes, prefixes, log_probs, log_probs, kept)


def _best(
    scores: Float[Array, "batch n"], k: int, drawn: Float[Array, "batch n"] | None
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"], Float[Array, "batch k"] | None]:
    """The best scores and their places, or those drawn, and what they have drawn."""
    if drawn is None:
        return *top_k(scores, k), None
    kept, best = top_k(drawn, k)
    return jnp.take_along_axis(scores, best, axis=-1), best, kept


def _log_probs(
    before: _Live, prefixes: Prefixes, logits: Float[Array, "batch parents size"], total: Float[Array, "batch parents"]
) -> Float[Array, "batch beam"]:
    """The model's log-probabilities of prefixes, where scores are not: looked up, cheaper than to keep those of all."""
    parents, tokens = prefixes.ancestors[..., -1], prefixes.codes[..., -1]
    last = jnp.take_along_axis(_flat(logits), parents * logits.shape[-1] + tokens, axis=-1)
    sums, own = (take_beams(x, parents) for x in (total, before.log_probs))
    return own + normalized(last, sums)


def _items(
    live: _Live,
    trie: CodeTrie,
    mask: ItemMask | None,
    num_results: int,
    mixture: PrefixMasses | None,
    noise: GumbelNoise | None,
) -> Beams:
    """Leaves opened into their items, order kept, cut or padded to `num_results`."""
    rows, positions, valid = trie.items(live.nodes)
    if mask is not None:
        valid = mask.left(valid, live.nodes, positions, level=len(trie.level_sizes))
    log_probs, drawn = live.scores[..., None], None
    if mixture is not None:
        valid &= log_probs != -jnp.inf
        own = jnp.broadcast_to(_shares(live, trie), rows.shape)
        log_probs = mixture.terms.of_items(_flat(own), _flat(rows)).reshape(rows.shape)
    if noise is not None:
        shares = jnp.where(valid, _shares(live, trie) if mixture is None else log_probs, -jnp.inf)
        below = trie.leaf_counts(live.nodes), jnp.ones_like(rows)
        step = len(trie.level_sizes)
        drawn = _flat(noise.of_children(live.drawn, live.scores, shares, step=step, below=below))
    # top_k is stable, so it closes the gaps of padded leaves and, of equal scores, changes no order
    log_probs = _flat(jnp.where(valid, log_probs, -jnp.inf))
    log_probs, best, _ = _best(log_probs, min(num_results, log_probs.shape[-1]), drawn)
    codes = take_beams(live.prefixes.codes, best // trie.max_leaf_items)
    valid = log_probs != -jnp.inf
    missing = ((0, 0), (0, num_results - best.shape[-1]))
    return Beams(
        rows=jnp.pad(jnp.where(valid, take_beams(_flat(rows), best), -1), missing, constant_values=-1),
        codes=jnp.pad(jnp.where(valid[..., None], codes, -1), (*missing, (0, 0)), constant_values=-1),
        log_probs=jnp.pad(log_probs, missing, constant_values=-jnp.inf),
        valid=jnp.pad(valid, missing),
    )


def _shares(live: _Live, trie: CodeTrie) -> Float[Array, "batch beam 1"]:
    """The model's log-probability of each item of a leaf, all of which have the same."""
    return (live.log_probs - jnp.log(trie.leaf_counts(live.nodes).astype(jnp.float32)))[..., None]


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _check_numbers(beam_size: int, num_results: int) -> None:
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, got {beam_size}")
    if not 1 <= num_results <= beam_size:
        raise ValueError(f"num_results must be from 1 to beam_size {beam_size}, got {num_results}")
