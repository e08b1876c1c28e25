"""Conditions on the next item: additional inputs of the positions of a history.

Position `t` of a row carries the condition on item `t + 1`: in training what that item was (its event, its group, its
text), in a request what is asked for. Each part is embedded and either added to the input of the position, or scales
and shifts the state from which the next item is decoded (FiLM, Perez et al., AAAI 2018). Training drops parts at
random, so that "any" is learned, too. All embeddings are initialized to zero: a new model ignores conditions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from seq_models.layers import TransformerConfig, dropout, norm

# Number of buckets of seconds: one per binary digit of a 32-bit number.
_GAPS = 31


class Conditions(NamedTuple):
    """Conditions on the items that follow, one per position or per request; a part that is None is "any" everywhere.

    Events and groups are numbered from 1, with 0 for "any"; a zero vector stands for any text.
    """

    event: Int[Any, "*n"] | None = None
    group: Int[Any, "*n"] | None = None
    text: Float[Any, "*n dim"] | None = None


class Times(NamedTuple):
    """Times of the positions of histories, which `segments` numbers: seconds since any fixed moment per history, -1 if
    unknown."""

    seconds: Int[Any, "b t"]
    segments: Int[Any, "b t"]

    def gaps(self) -> Int[Array, "b t"]:
        """Buckets of the seconds since the item before (`gap_buckets`); 0 for the first item of a history."""
        before, same = jnp.roll(self.seconds, 1, axis=1), self.segments == jnp.roll(self.segments, 1, axis=1)
        later = jnp.arange(self.seconds.shape[1])[None] > 0
        return gap_buckets(self.seconds, jnp.where(same & later, before, -1))


class TimeBias(NamedTuple):
    """Bias of attention by the time between items: a number per head and bucket of seconds (`gap_buckets`)."""

    table: Float[Array, "buckets heads"]
    times: Times

    def between(self, start: int, stop: int, last: int) -> Float[Array, "b heads q k"]:
        """Bias of attention scores between queries from `start` to `stop` and keys up to `last`."""
        seconds = self.times.seconds
        gaps = gap_buckets(seconds[:, start:stop, None], seconds[:, None, :last])
        return jnp.moveaxis(self.table[gaps], -1, 1)

    def before(self) -> Float[Array, "b t heads"]:
        """Bias between each item and the one before it in its history; 0 if the time between them is unknown."""
        gaps = self.times.gaps()
        return jnp.where(gaps[..., None] > 0, self.table[gaps], 0.0)


@dataclass(frozen=True)
class ConditionSizes:
    """Sizes of a model's conditions: numbers of events and groups, width of texts; 0: no such condition."""

    event: int = 0
    """Number of events as conditions on the next item."""
    group: int = 0
    """Number of groups as conditions on the next item."""
    text: int = 0
    """Dimensions of a text's vector."""
    inputs: int = 0
    """Number of events as inputs of the history's items."""
    film: bool = False
    """Conditions scale and shift the state before the next item is decoded, instead of being added to the input."""
    drop: float = 0.1
    """Share of the conditions that training drops."""
    head: int = 0
    """Number of events whose probabilities, given item and history, are learned."""
    time_inputs: bool = False
    """The time since the item before is an input."""
    time_bias: bool = False
    """Attention has a bias by the time between two items; in a state-space backbone it changes the decay."""

    def __post_init__(self) -> None:
        if min(self.event, self.group, self.text, self.inputs, self.head) < 0 or not 0 <= self.drop < 1:
            raise ValueError(f"expected sizes of at least 0 and drop in [0, 1), got {self}")


class ConditionEncoder(nnx.Module):
    """Embeddings of conditions, and of the events of the history, for states of a transformer's width."""

    def __init__(self, sizes: ConditionSizes, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.sizes, dim = sizes, config.dim
        width = 2 * dim if sizes.film else dim

        def table(size: int, width: int) -> nnx.Embed | None:
            zeros = nnx.initializers.zeros_init()
            return nnx.Embed(size + 1, width, embedding_init=zeros, rngs=rngs) if size else None

        self.inputs = table(sizes.inputs, dim)
        self.event, self.group = table(sizes.event, width), table(sizes.group, width)
        self.text = TextProjection(sizes.text, width) if sizes.text else None
        self.gaps = table(_GAPS, dim) if sizes.time_inputs else None
        self.bias = table(_GAPS, config.heads) if sizes.time_bias else None

    @property
    def reads_event(self) -> bool:
        """True if states depend on the next item's event as a condition: it is added to the input."""
        return self.event is not None and not self.sizes.film

    def add_to_input(
        self,
        x: Float[Array, "b t dim"],
        events: Int[Array, "b t"] | None,
        conditions: Conditions | None,
        *,
        times: Times | None = None,
    ) -> Float[Array, "b t dim"]:
        """Add to the inputs `x` of positions the events of their items, the times since the items before and, unless
        they modulate states, the conditions."""
        if self.inputs is not None:
            x = x + _lookup(self.inputs, events, x).astype(x.dtype)
        if self.gaps is not None:
            x = x + _lookup(self.gaps, None if times is None else times.gaps(), x).astype(x.dtype)
        encoded = None if self.sizes.film else self._encode(x, conditions)
        return x if encoded is None else x + encoded.astype(x.dtype)

    def modulate(self, states: Float[Array, "b t dim"], conditions: Conditions | None) -> Float[Array, "b t dim"]:
        """States scaled and shifted by the conditions if these are FiLM, else unchanged."""
        film = self._encode(states, conditions) if self.sizes.film else None
        if film is None:
            return states
        scale, shift = jnp.split(film, 2, axis=-1)
        return states * (1 + scale).astype(states.dtype) + shift.astype(states.dtype)

    def time_bias(self, times: Times | None) -> TimeBias | None:
        """The bias by the times between items, one table for all blocks; None if there is none or no time is known."""
        return None if self.bias is None or times is None else TimeBias(self.bias.embedding[...], times)

    def drop_times(self, times: Times | None, key: Key[Array, ""] | None) -> Times | None:
        """Times of a training step, if the model reads them, made unknown in a share `drop` of the rows; without a key
        unchanged."""
        if self.gaps is None and self.bias is None:
            return None
        if times is None or key is None or not self.sizes.drop:
            return times
        dropped = jax.random.bernoulli(key, self.sizes.drop, (len(times.seconds), 1))
        return times._replace(seconds=jnp.where(dropped, -1, times.seconds))

    def drop(
        self, events: Int[Array, "b t"] | None, conditions: Conditions, key: Key[Array, ""] | None
    ) -> tuple[Int[Array, "b t"] | None, Conditions]:
        """Events and conditions of a training step, some of them dropped. Without a key, all are kept.

        A share `drop` of the positions loses its condition: half of it in whole rows, half at single positions. Each
        other position keeps a random subset of the parts that the model supports, drawn uniformly, so that each part is
        learned without the others. Of the events, a share `drop` is dropped in the same way.
        """
        if key is None or not self.sizes.drop:
            return events, conditions
        event_key, key, subset_key = jax.random.split(key, 3)
        if events is not None:
            events = jnp.where(_drawn(event_key, self.sizes.drop, events.shape), 0, events)
        tables = (self.event, self.group, self.text)
        parts = [None if table is None else x for x, table in zip(conditions, tables, strict=True)]
        known = [x for x in parts if x is not None]
        if not known:
            return events, Conditions()
        shape = known[0].shape[:2]
        subset = jax.random.randint(subset_key, shape, 1, 2 ** len(known))
        subset = jnp.where(_drawn(key, self.sizes.drop, shape), 0, subset)
        left = [_where((subset >> bit) & 1 == 1, x) for bit, x in enumerate(known)]
        return events, Conditions(*(None if x is None else left.pop(0) for x in parts))

    def _encode(self, x: Float[Array, "b t dim"], conditions: Conditions | None) -> Float[Array, "b t width"] | None:
        """Sum of the embeddings of all parts, for the positions of `x`; None if the model supports none."""
        event, group, text = Conditions() if conditions is None else conditions
        parts: list[Array] = []
        if self.event is not None:
            parts.append(_lookup(self.event, event, x))
        if self.group is not None:
            parts.append(_lookup(self.group, group, x))
        if self.text is not None:
            parts.append(self.text(text, x))
        return functools.reduce(jnp.add, parts) if parts else None


def gap_buckets(times: Int[Array, "*#n"], others: Int[Array, "*#n"]) -> Int[Array, "*n"]:
    """Buckets of the seconds between two times of a history, by powers of two, from 1; 0 if one is unknown (-1).

    Bucket `n` holds from 2^(n-1) - 1 to 2^n - 2 seconds: n is the number of binary digits of the seconds plus one. HSTU
    (arXiv 2402.17152, section 3.1) and TiSASRec (WSDM 2020) use such times in attention.
    """
    seconds = jnp.abs(times - others)
    digits = 32 - jax.lax.clz(jnp.minimum(seconds, jnp.iinfo(jnp.int32).max - 1) + 1)
    return jnp.where((times < 0) | (others < 0), 0, digits)


class EventHead(nnx.Module):
    """Logits of the events of an item, from the state after the history, the item's embedding and their product.

    With the item's probability they give that of item and event (ESMM, Ma et al., SIGIR 2018, eq. 1, for codes):
    p(item, event | history) = p(item | history) p(event | item, history). The elementwise product tells how well the
    item fits the history. A new head gives all events the same probability.
    """

    def __init__(self, size: int, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.state_norm, self.item_norm = norm(config, rngs), norm(config, rngs)
        self.hidden, self.rate = nnx.Linear(3 * config.dim, config.dim, rngs=rngs), config.rate
        zeros = nnx.initializers.zeros_init()
        self.out = nnx.Linear(config.dim, size, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, states: Float[Array, "*n dim"], items: Float[Array, "*n dim"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "*n event"]:
        """Logits from states after histories and embeddings of the items that followed. Dropout needs a key."""
        state, item = self.state_norm(states.astype(jnp.float32)), self.item_norm(items.astype(jnp.float32))
        x = dropout(jnp.concatenate([state, item, state * item], axis=-1), self.rate, key)
        return self.out(jax.nn.silu(self.hidden(x)))


class TextProjection(nnx.Module):
    """Projection of a text's vector to the width of an embedding, and an embedding for "any text"."""

    def __init__(self, size: int, width: int) -> None:
        self.matrix, self.any = nnx.Param(jnp.zeros((size, width))), nnx.Param(jnp.zeros(width))

    def __call__(self, text: Float[Array, "b t text"] | None, x: Float[Array, "b t dim"]) -> Float[Array, "b t width"]:
        """Embeddings at the positions of `x`."""
        anything = jnp.broadcast_to(self.any[...][None, None], (*x.shape[:2], self.any.shape[0]))
        if text is None:
            return anything
        return jnp.where(jnp.any(text != 0, axis=-1, keepdims=True), jnp.matmul(text, self.matrix[...]), anything)


def _lookup(table: nnx.Embed, codes: Int[Array, "b t"] | None, x: Float[Array, "b t dim"]) -> Float[Array, "b t width"]:
    return table(jnp.zeros(x.shape[:2], jnp.int32) if codes is None else codes)


def _drawn(key: Key[Array, ""], share: float, shape: tuple[int, ...]) -> Bool[Array, "b t"]:
    """True at a share of the positions, half of it in whole rows."""
    rows, places = jax.random.split(key)
    return jax.random.bernoulli(rows, share / 2, (shape[0], 1)) | jax.random.bernoulli(places, share / 2, shape)


def _where(kept: Bool[Array, "b t"], x: Array) -> Array:
    return jnp.where(kept.reshape(*kept.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros_like(x))


def after_histories(own: Conditions, last: Conditions, segments: Int[Array, "b t"]) -> Conditions:
    """Conditions at every position of rows with one history each.

    `own` are the conditions that the items meet: position `t` carries those of item `t + 1`. The position of the last
    item carries `last`, the conditions on the next item, one per row.
    """
    if all(part is None for part in (*own, *last)):
        return own
    index = jnp.arange(segments.shape[1])[None]
    at_end = index == jnp.max(jnp.where(segments != 0, index, -1), axis=1, keepdims=True)

    def one(of_items: Array | None, of_next: Array | None) -> Array | None:
        if of_items is None:
            if of_next is None:
                return None
            of_items = jnp.zeros((*segments.shape, *of_next.shape[1:]), of_next.dtype)
        if of_next is None:
            of_next = jnp.zeros_like(of_items[:, 0])
        following = jnp.roll(of_items, -1, axis=1)
        return jnp.where(at_end.reshape(*at_end.shape, *(1,) * (of_next.ndim - 1)), of_next[:, None], following)

    return Conditions(*(one(a, b) for a, b in zip(own, last, strict=True)))
