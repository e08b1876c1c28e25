"""The memory bank: the latest vector of every item, so that a step encodes a few items and reads the others.

After LEMUR (arXiv 2511.10962): items encoded in a step are written, all others read as constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from semid.errors import SemidError
from semid.training import ShardedByRows

# A bank's capacity is a multiple of this, and so divides among the devices.
_ROWS = 64
_PERCENTILES = (50, 90, 99)


class Bank(ShardedByRows):
    """Variable that steps write and no gradient moves, split by items over the devices."""


class Fresh(NamedTuple):
    """Items to encode, each once; where not `real`, a row is padding.

    `place` is the index in `rows` of each item that they were drawn from, -1 if it was left out.
    """

    rows: Int[Array, " size"]
    real: Bool[Array, " size"]
    place: Int[Array, "*b"]


class BankHealth(NamedTuple):
    """Shares of items, and ages in writes: 0 is the latest."""

    coverage: Float[Array, ""]
    age_50: Float[Array, ""]
    age_90: Float[Array, ""]
    age_99: Float[Array, ""]


class MemoryBank(nnx.Module):
    """A vector per item, the number of the write that stored it (from 1; -1: none), and a vector for unknown items."""

    def __init__(self, num_items: int, *, dim: int, rngs: nnx.Rngs) -> None:
        if num_items < 1 or dim < 1:
            raise SemidError(f"expected num_items and dim of at least 1, got {num_items} and {dim}")
        self.num_items, capacity = num_items, _capacity(num_items)
        self.vectors = Bank(jnp.zeros((capacity, dim)))
        self.written = Bank(jnp.full((capacity,), -1, jnp.int32))
        self.writes = Bank(jnp.zeros((), jnp.int32))
        self.unknown = nnx.Param(dim**-0.5 * jax.random.normal(rngs.params(), (dim,)))

    def knows(self, rows: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """True for items that were ever written."""
        return self.written[...][rows] >= 0

    def read(self, rows: Int[Array, "*b"]) -> Float[Array, "*b dim"]:
        """The items' vectors, constants; the learned vector, with its gradient, where none was written."""
        stored = jax.lax.stop_gradient(self.vectors[...][rows])
        unknown = self.unknown[...].reshape((1,) * rows.ndim + (-1,))
        return jnp.where(self.knows(rows)[..., None], stored, unknown)

    def read_or(
        self, rows: Int[Array, "*b"], place: Int[Array, "*b"], encoded: Float[Array, "size dim"]
    ) -> Float[Array, "*b dim"]:
        """The encoded vector where an item has a `place` among the fresh ones, with its gradient; else `read`."""
        return jnp.where((place >= 0)[..., None], encoded[jnp.maximum(place, 0)], self.read(rows))

    def write(
        self, rows: Int[Array, " n"], vectors: Float[Array, "n dim"], *, mask: Bool[Array, " n"]
    ) -> Float[Array, ""]:
        """Store vectors of items, each row at most once, where `mask` holds. Returns their agreement with the old ones.

        In a step, write before you read: to keep what a write replaces, XLA would copy the bank.
        """
        stored, written, writes = self.vectors[...][rows], self.written[...][rows], self.writes[...] + 1
        target = jnp.where(mask, rows, len(self.written[...]))  # outside, and so dropped
        # Dropped rows carry their old value, so that the write depends on the reads above, and needs no copy either.
        kept = jnp.where(mask[:, None], jax.lax.stop_gradient(vectors), stored)
        self.vectors[...] = self.vectors[...].at[target].set(kept, mode="drop")
        self.written[...] = self.written[...].at[target].set(jnp.where(mask, writes, written), mode="drop")
        self.writes[...] = writes
        return agreement(kept, stored, mask=mask & (written >= 0))

    def select_items(self, rows: Int[np.ndarray, " items"]) -> None:
        """Keep the items of these rows, in this order; -1 adds an item that was never written."""
        padded = np.pad(rows, (0, _capacity(len(rows)) - len(rows)), constant_values=-1)
        kept, source = jnp.asarray(padded >= 0), jnp.asarray(np.maximum(padded, 0))
        self.num_items = len(rows)
        self.vectors = Bank(jnp.where(kept[:, None], self.vectors[...][source], 0.0))
        self.written = Bank(jnp.where(kept, self.written[...][source], -1))

    def health(self) -> BankHealth:
        """Coverage of the catalogue, and percentiles of the ages of what was written (0 if nothing was).

        Sorts all items: now and then, not in every step.
        """
        written = self.written[...]
        age = jnp.where(written >= 0, (self.writes[...] - written).astype(jnp.float32), jnp.nan)
        ages = jnp.nanpercentile(age, jnp.asarray(_PERCENTILES, jnp.float32))
        coverage = (written >= 0).sum().astype(jnp.float32) / self.num_items
        return BankHealth(coverage, *jnp.nan_to_num(ages, nan=0.0))

    def coverage(self, rows: Int[Array, "*b"], *, mask: Bool[Array, "*b"]) -> Float[Array, ""]:
        """Share of the rows where `mask` holds whose items were ever written; 0 if there are none."""
        return _mean(self.knows(rows).astype(jnp.float32), mask)


def _capacity(num_items: int) -> int:
    return -(-num_items // _ROWS) * _ROWS


def agreement(
    fresh: Float[Array, "n dim"], stored: Float[Array, "n dim"], *, mask: Bool[Array, " n"]
) -> Float[Array, ""]:
    """Mean cosine of fresh vectors with the stored ones of the same items; 0 if no row counts."""
    lengths = jnp.linalg.norm(fresh, axis=-1) * jnp.linalg.norm(stored, axis=-1)
    return _mean((fresh * stored).sum(-1) / jnp.maximum(lengths, 1e-12), mask)


def bucket_sizes(n: int, *, forward: float, backward: float, parts: int = 1) -> tuple[int, int]:
    """Numbers of items, of at most `n`, that a step encodes and that it differentiates: static, multiples of `parts`
    (the devices that share them).

    Raises SemidError unless 0 <= backward <= forward <= 1 and something is encoded.
    """
    if not (0 <= backward <= forward <= 1 and forward > 0):
        raise SemidError(
            f"expected rates 0 <= backward <= forward <= 1 and forward above 0, got backward {backward} and "
            f"forward {forward}"
        )
    sizes = (math.ceil(round(rate * n / parts, 6)) * parts for rate in (forward, backward))
    return next(sizes), next(sizes)


def unique_rows(rows: Int[Array, "*b"], *, size: int, key: Key[Array, ""]) -> Fresh:
    """The different items among `rows`, `size` of them at random if there are more.

    The order is random, so that any first few are a random choice too.
    """
    unique, inverse = jnp.unique(rows, size=rows.size, fill_value=-1, return_inverse=True)
    order = jnp.argsort(jnp.where(unique >= 0, jax.random.uniform(key, (rows.size,)), 2.0))[:size]
    chosen = unique[order]
    place_of = jnp.full((rows.size,), -1, jnp.int32).at[order].set(jnp.arange(len(order), dtype=jnp.int32))
    padded = jnp.pad(chosen, (0, size - len(chosen)), constant_values=-1)
    return Fresh(jnp.maximum(padded, 0), padded >= 0, place_of[inverse.reshape(rows.shape)])


def encode_fresh(
    encode: Callable[[Int[Array, " n"]], Float[Array, "n dim"]], fresh: Fresh, *, backward: int
) -> Float[Array, "size dim"]:
    """Vectors of the fresh items, the first `backward` of them with a gradient: two programs of fixed size."""
    learning, still = fresh.rows[:backward], fresh.rows[backward:]
    parts = [encode(learning)] if len(learning) else []
    return jnp.concatenate([*parts, jax.lax.stop_gradient(encode(still))] if len(still) else parts)


def _mean(x: Float[Array, "*b"], mask: Bool[Array, "*b"]) -> Float[Array, ""]:
    return jnp.where(mask, x, 0).sum() / jnp.maximum(mask.sum(), 1).astype(jnp.float32)
