"""Items ranked by a score of every item: removed items, masks of requests, the k best."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seq_models.types import ItemTables, RequestBatch, TopK


def active_log_probs(logits: Float[Array, "b items"], tables: ItemTables) -> Float[Array, "b items"]:
    """Log-probabilities over the active items, -inf of all other rows."""
    logits = logits if tables.active is None else jnp.where(tables.active[None], logits, -jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


def best_allowed(scores: Float[Array, "b items"], requests: RequestBatch, k: int) -> TopK:
    """The k best items that each request allows."""
    scores = _only_allowed(scores, requests)
    values, rows = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    missing = ((0, 0), (0, k - rows.shape[1]))
    rows = jnp.pad(jnp.where(values == -jnp.inf, -1, rows), missing, constant_values=-1)
    return TopK(rows, jnp.pad(values, missing, constant_values=-jnp.inf))


def scatter_rows(rows: Int[Array, "b n"], size: int) -> Int[Array, "b n"]:
    """Item rows as indices of a scatter that drops what lies outside: -1 (no item) moves behind the last row."""
    return jnp.where(rows < 0, size, rows)


def _only_allowed(scores: Float[Array, "b items"], requests: RequestBatch) -> Float[Array, "b items"]:
    if requests.allowed is not None:
        scores = jnp.where(requests.allowed, scores, -jnp.inf)
    if requests.denied is not None:
        user = jnp.arange(scores.shape[0])[:, None]
        scores = scores.at[user, scatter_rows(requests.denied, scores.shape[1])].set(-jnp.inf, mode="drop")
    return scores
