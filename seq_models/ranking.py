"""Ranking of items by scores of all items: removed items, masks of requests, the k best."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seq_models.limits import GroupLimits
from seq_models.sharing import set_items, share_items, top_items
from seq_models.types import ItemTables, RequestBatch, TopK


def active_log_probs(logits: Float[Array, "b items"], tables: ItemTables) -> Float[Array, "b items"]:
    """Log-probabilities over the active items; -inf for all other rows."""
    logits = share_items(logits)
    logits = logits if tables.active is None else jnp.where(tables.active[None], logits, -jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


def best_allowed(scores: Float[Array, "b items"], requests: RequestBatch, k: int) -> TopK:
    """The k best items that each request allows or, with noise, k drawn from them without replacement."""
    scores = _mask_scores(scores, requests)
    order = scores if requests.noise is None else requests.noise.perturb(scores)
    if requests.limits is not None:
        every = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
        rows, found = requests.limits.select(order, every, k)
        values = jnp.where(found, jnp.take_along_axis(scores, rows, axis=-1), -jnp.inf)
        return TopK(jnp.where(found, rows, -1), values)
    values, rows = top_items(order, min(k, scores.shape[-1]))
    if requests.noise is not None:
        values = jnp.take_along_axis(scores, rows, axis=-1)
    missing = ((0, 0), (0, k - rows.shape[1]))
    rows = jnp.pad(jnp.where(values == -jnp.inf, -1, rows), missing, constant_values=-1)
    return TopK(rows, jnp.pad(values, missing, constant_values=-jnp.inf))


def first_within(found: TopK, limits: GroupLimits | None, k: int) -> TopK:
    """The first k items of longer lists that fit within the limits; without limits, the lists as they are."""
    if limits is None:
        return found
    falling = -jnp.arange(found.rows.shape[1], dtype=jnp.float32)[None]
    places, any_ = limits.select(jnp.where(found.rows < 0, -jnp.inf, falling), found.rows, k)
    rows, scores = (jnp.take_along_axis(x, places, axis=-1) for x in found)
    return TopK(jnp.where(any_, rows, -1), jnp.where(any_, scores, -jnp.inf))


def scatter_rows(rows: Int[Array, "b n"], size: int) -> Int[Array, "b n"]:
    """Item rows as indices of a scatter with mode "drop": -1 (no item) becomes an index beyond the last row."""
    return jnp.where(rows < 0, size, rows)


def _mask_scores(scores: Float[Array, "b items"], requests: RequestBatch) -> Float[Array, "b items"]:
    if requests.allowed is not None:
        scores = jnp.where(requests.allowed, scores, -jnp.inf)
    return scores if requests.denied is None else set_items(scores, requests.denied, -jnp.inf)
