"""Beam search over a code trie: every returned beam is an existing item that the request allows.

The model is one function, `step(cache, prefixes) -> (logits, cache)` (`seq_models.codes`), called once per level:
levels are unrolled, since their vocabularies differ. At level 0 each user has a single beam. `logits`,
`Float[batch beam level_sizes[level]]`, score the next code of each beam.
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
    """Items, best first. If not `valid`: row and codes -1, log-probability -inf."""

    rows: Int[Array, "batch beam"]
    codes: Int[Array, "batch beam level"]
    log_probs: Float[Array, "batch beam"]
    valid: Bool[Array, "batch beam"]


class _Live(NamedTuple):
    """Prefixes still in the search, best first, padded with scores of -inf."""

    nodes: Int[Array, "batch beam"]
    prefixes: Prefixes
    log_probs: Float[Array, "batch beam"]
    """Under the model."""
    scores: Float[Array, "batch beam"]
    """Under the mixture, if there is one."""
    drawn: Float[Array, "batch beam"] | None = None
    """Perturbed scores, if items are drawn at random."""


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
    """The most probable items per user that beam search finds. Call it inside jit, with trie and mask as arguments.

    Each level keeps the best min(beam_size, nodes of the level) prefixes that lead to an item the `mask` allows; the
    mask changes no probability. Ties are broken by the order of prefixes, then of codes. Items with equal codes have
    the same log-probability and come in the trie's order. `num_results` (default: beam_size) items are returned; if
    fewer have a probability above zero, the last entries are not valid.

    With a `mixture`, prefixes are ranked by their mass under it. The model's probability of a leaf is then divided
    evenly among its items. Items of probability zero (`MixtureTerms.closed`) must be denied by the mask.

    With `noise`, beams and items are ordered by perturbed log-probabilities: a draw without replacement
    (`seq_models.noise`). It is exact if the beam holds all prefixes, and for any beam size at temperature 1 with
    `SoftmaxOver.CHILDREN` and without a mask. The items of a leaf share its probability equally.

    Raises ValueError for numbers out of range and for logits whose shape does not match the trie's levels.
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
            scores = mixture.child_log_masses(scores, live.nodes, children.nodes, level=level)
        open_ = children.valid & (live.scores != -jnp.inf)[..., None]
        if mask is not None:
            open_ = mask.filter_members(open_, live.nodes, children.nodes, level=level)
        # There are enough candidates: beam_size parents with a child each, or all parents, hence all nodes.
        num_beams = min(beam_size, trie.tokens[level].shape[0])
        scores, drawn = jnp.where(open_, scores, -jnp.inf), None
        if noise is not None:
            below = trie.item_counts(live.nodes, level=level), trie.item_counts(children.nodes, level=level + 1)
            drawn = noise.perturb_children(live.drawn, live.scores, scores, step=level, below=below)
        before, live = live, _extend(live, trie, children, scores, num_beams, drawn)
        if mixture is not None:
            live = live._replace(log_probs=_log_probs(before, live.prefixes, logits, total))
    return _items(live, trie, mask, num_results, mixture, noise)


def no_prefixes(batch: Size) -> Prefixes:
    """The single empty prefix with which each user's search begins."""
    none = jnp.zeros((batch, 1, 0), jnp.int32)
    return Prefixes(none, none)


def extend_prefixes(prefixes: Prefixes, places: Int[Array, "batch n"], tokens: Int[Array, "batch n"]) -> Prefixes:
    """The prefixes at indices `places`, each extended by one of `tokens`."""
    codes, ancestors = take_beams(prefixes, places)
    return Prefixes(
        *(jnp.concatenate([old, new[..., None]], -1) for old, new in ((codes, tokens), (ancestors, places)))
    )


def checked_logits(logits: Array, expected: tuple[Size, ...], level: int) -> Float[Array, "batch beam size"]:
    """Logits in float32. Raises ValueError if they are not [batch, beam, level size]."""
    if logits.shape != expected:
        raise ValueError(
            f"step must return logits [batch, beam, level size] = {expected} at level {level}, got {logits.shape}"
        )
    return logits.astype(jnp.float32)


def log_total(logits: Float[Array, "batch beam size"], children: Children | None = None) -> Float[Array, "batch beam"]:
    """Log of the softmax's denominator: over the vocabulary or, if given, over each beam's children."""
    if children is None:
        return jax.nn.logsumexp(logits, axis=-1)
    return jax.nn.logsumexp(at_tokens(logits, children.tokens), axis=-1, where=children.valid)


def at_tokens(
    logits: Float[Array, "batch beam size"], tokens: Int[Array, "#batch #beam n"]
) -> Float[Array, "batch beam n"]:
    return jnp.take_along_axis(logits, tokens, axis=-1, mode="clip")


def normalized(logits: Float[Array, "*n"], total: Float[Array, "*#n"]) -> Float[Array, "*n"]:
    """Log-probabilities. A step may forbid codes by logits of -inf; if it forbids all, `total` is -inf, too."""
    return jnp.where(logits == -jnp.inf, -jnp.inf, logits - total)


def _extend(
    live: _Live,
    trie: CodeTrie,
    children: Children,
    scores: Float[Array, "batch beam fan_out"],
    num_beams: int,
    drawn: Float[Array, "batch beam fan_out"] | None,
) -> _Live:
    """The best children of the live prefixes. Their nodes are computed again, which is cheaper than keeping all."""
    level, token = live.prefixes.level, trie.tokens[live.prefixes.level]
    log_probs, best, drawn = _best(_flat(scores), num_beams, None if drawn is None else _flat(drawn))
    parents = best // scores.shape[-1]
    nodes = take_beams(children.nodes[..., 0], parents) + best % scores.shape[-1]
    nodes = jnp.minimum(nodes, len(trie.tokens[level]) - 1)
    prefixes = extend_prefixes(live.prefixes, parents, token[nodes].astype(jnp.int32))
    return _Live(nodes, prefixes, log_probs, log_probs, drawn)


def _best(
    scores: Float[Array, "batch n"], k: int, drawn: Float[Array, "batch n"] | None
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"], Float[Array, "batch k"] | None]:
    """Scores, indices and perturbed scores of the k best: by `drawn`, the perturbed scores, if given, else by score."""
    if drawn is None:
        return *top_k(scores, k), None
    drawn, best = top_k(drawn, k)
    return jnp.take_along_axis(scores, best, axis=-1), best, drawn


def _log_probs(
    before: _Live, prefixes: Prefixes, logits: Float[Array, "batch parents size"], total: Float[Array, "batch parents"]
) -> Float[Array, "batch beam"]:
    """The model's log-probabilities of prefixes whose scores are a mixture's, computed again for the kept ones only."""
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
    """The items of the leaves in the same order, cut or padded to `num_results`."""
    rows, positions, valid = trie.items(live.nodes)
    if mask is not None:
        valid = mask.filter_members(valid, live.nodes, positions, level=len(trie.level_sizes))
    log_probs, drawn = live.scores[..., None], None
    if mixture is not None:
        valid &= log_probs != -jnp.inf
        own = jnp.broadcast_to(_shares(live, trie), rows.shape)
        log_probs = mixture.terms.item_log_probs(_flat(own), _flat(rows)).reshape(rows.shape)
    if noise is not None:
        shares = jnp.where(valid, _shares(live, trie) if mixture is None else log_probs, -jnp.inf)
        below = trie.leaf_counts(live.nodes), jnp.ones_like(rows)
        step = len(trie.level_sizes)
        drawn = _flat(noise.perturb_children(live.drawn, live.scores, shares, step=step, below=below))
    # top_k is stable: it moves padding to the end and keeps the order of equal scores.
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
    """The model's log-probability of each item of a leaf, the same for all of them."""
    return (live.log_probs - jnp.log(trie.leaf_counts(live.nodes).astype(jnp.float32)))[..., None]


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _check_numbers(beam_size: int, num_results: int) -> None:
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, got {beam_size}")
    if not 1 <= num_results <= beam_size:
        raise ValueError(f"num_results must be from 1 to beam_size {beam_size}, got {num_results}")
