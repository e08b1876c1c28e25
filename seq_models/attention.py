"""Attention's mathematics: over packed rows, over the few codes of a prefix, over a history that all beams share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Queries that attend at once: the scores of longer rows are never all held.
_QUERIES = 512


class KeyValue(NamedTuple):
    """Keys and values of attention; each group of `heads / kv_heads` query heads shares one head of these."""

    keys: Float[Array, "*b kv_heads width"]
    values: Float[Array, "*b kv_heads width"]


Past = tuple[KeyValue, ...]  # one per level so far


def rotate(x: Float[Array, "b t heads width"], positions: Int[Array, "#b #t"]) -> Float[Array, "b t heads width"]:
    """Rotary position embedding (Su et al. 2021, RoFormer eq. 15), halves convention; computed in float32."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * rates[None, None, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def segment_positions(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each entry within its segment, from 0."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[-1])[None], segments.shape)
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def attend_rows(
    q: Float[Array, "b t heads width"], kv: KeyValue, segments: Int[Array, "b t"], *, causal: bool
) -> Float[Array, "b t heads width"]:
    """Attention within segments; causal: to no later position. Padding sees padding, so no query is without keys.

    Long rows go by blocks of queries, whose scores the backward pass computes again: memory grows with the length,
    not with its square.
    """
    length = q.shape[1]
    if length <= _QUERIES:
        return _attend_block(q, kv, segments, start=0, causal=causal)
    blocks = [
        jax.checkpoint(functools.partial(_attend_block, start=start, causal=causal))(
            q[:, start : start + _QUERIES], kv, segments
        )
        for start in range(0, length, _QUERIES)
    ]
    return jnp.concatenate(blocks, axis=1)


def _attend_block(q: Array, kv: KeyValue, segments: Array, *, start: int, causal: bool) -> Array:
    """Queries from `start` on over all keys that any of them sees."""
    stop = start + q.shape[1]
    last = stop if causal else segments.shape[1]
    sees = segments[:, start:stop, None] == segments[:, None, :last]
    if causal:
        sees &= (jnp.arange(start, stop)[:, None] >= jnp.arange(last)[None])[None]
    return jax.nn.dot_product_attention(q, kv.keys[:, :last], kv.values[:, :last], mask=sees[:, None])


def attend_past(q: Float[Array, "*b heads width"], past: Past) -> Float[Array, "*b heads width"]:
    """One query over a handful of levels, by sums of products: XLA fuses them, and would not fuse tiny matmuls."""
    past = _for_every_head(past, q)
    return _mix(_scores(q, past), [kv.values for kv in past])


def attend_history(
    q: Float[Array, "b beam heads width"], history: KeyValue, real: Bool[Array, "b t"], past: Past
) -> Float[Array, "b beam heads width"]:
    """Each beam's query over the history of its user, held once for all beams, and over the beam's own past.

    The result of attention over the history joins the levels of the past as one more value, scored by the logarithm
    of its summed powers.
    """
    read, score = jax.nn.dot_product_attention(q, *history, mask=real[:, None, None, :], return_residual=True)
    past = _for_every_head(past, q)
    scores = jnp.concatenate([score.astype(jnp.float32)[None], _scores(q, past)])
    return _mix(scores, [read, *(kv.values for kv in past)])


def _for_every_head(past: Past, q: Float[Array, "*b heads width"]) -> Past:
    """Keys and values of groups repeated for each of their heads: of a few levels, that costs nothing."""
    group = q.shape[-2] // past[0].keys.shape[-2]
    return past if group == 1 else jax.tree.map(lambda x: jnp.repeat(x, group, axis=-2), past)


def _scores(q: Float[Array, "*b heads width"], past: Past) -> Float[Array, "level *b heads"]:
    products = [jnp.sum(q * kv.keys, axis=-1, dtype=jnp.float32) for kv in past]
    return jnp.stack(products) * (q.shape[-1] ** -0.5)


def _mix(scores: Float[Array, "n *b heads"], values: list[Array]) -> Float[Array, "*b heads width"]:
    shares = jax.nn.softmax(scores, axis=0).astype(values[0].dtype)
    return functools.reduce(jnp.add, [share[..., None] * value for share, value in zip(shares, values, strict=True)])


def gather_ancestors(past: Past, ancestors: Int[Array, "b beam level"]) -> Past:
    """Gather each live beam's own past from the results of every step, which are of the beams that were live then."""
    return tuple(
        jax.tree.map(lambda kept, at=ancestors[..., step]: jax.vmap(lambda beams, i: beams[i])(kept, at), kv)
        for step, kv in enumerate(past)
    )


def append_level(pasts: Sequence[Past], new: Sequence[KeyValue]) -> tuple[Past, ...]:
    """Append a level's keys and values to the past of every block."""
    return tuple((*past, kv) for past, kv in zip(pasts, new, strict=True))
