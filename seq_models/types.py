"""Integers in, integers out: the inputs of a model's positions, tables of items, requests, and the items found."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple, SupportsInt

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from seq_models.conditions import Conditions, Times, after_histories
from seq_models.limits import GroupLimits
from seq_models.noise import GumbelNoise
from seq_models.sequences import Sequences

# All that the beams of a user share, a pytree of arrays [batch, ...]; never repeated per beam.
Context = Any
# Results of earlier search steps, a pytree of arrays [batch, beam of that step, ...]; never re-gathered.
Cache = Any
# Size of an axis: an int, or a symbolic dimension of `jax.export`.
Size = SupportsInt


class Inputs(NamedTuple):
    """Inputs of the positions of a history. Absent ones are None; a model adds up the embeddings of the others.

    `mixtures`, one array per level, replace the codes where given: a level's embedding is the mean under its mixture.
    `events` say what was done with the items, from 1, 0 unknown; `times` when; `conditions` are those on the items that
    follow; `sequences` are the items' further code sequences.
    """

    codes: Int[Array, "b t level"]
    dense: Float[Array, "b t feature"] | None = None
    ids: Int[Array, "b t"] | None = None
    mixtures: tuple[Float[Array, "b t _"], ...] | None = None
    events: Int[Array, "b t"] | None = None
    conditions: Conditions | None = None
    sequences: Sequences | None = None
    times: Times | None = None


class Decoded(NamedTuple):
    """Teacher-forced logits, one array per level, and the states that the items' first codes are decoded from."""

    logits: tuple[Float[Array, "*n _"], ...]
    states: Float[Array, "*n dim"]


class Prefixes(NamedTuple):
    """Live beams of a search before `level` codes are chosen, best first.

    `ancestors[..., l]` is the index, among the beams that were live at step `l`, of the beam this one descends from:
    the cache entry that step `l` wrote for it is found there.
    """

    codes: Int[Array, "batch beam level"]
    ancestors: Int[Array, "batch beam level"]

    @property
    def level(self) -> int:
        """The level whose codes come next."""
        return self.codes.shape[-1]


class Layout(enum.Enum):
    """Arrangement of training histories in rows, which decides the positions that teacher-forced logits are of."""

    PACKED = "packed"  # several histories per row; every position predicts the item after it
    CLOSED = "closed"  # packed, and behind each history its last target, which predicts nothing
    SINGLE = "single"  # one history and one target per row


class SoftmaxOver(enum.Enum):
    """Set over which a level's probabilities sum to one; it should be the same in training and in search."""

    VOCABULARY = "vocabulary"  # the level's whole vocabulary: the model's own probability
    CHILDREN = "children"  # the children of the prefix in the trie: the probability given that the item exists


class ItemTables(NamedTuple):
    """Per item row, on the device: codes, dense input (None: there is none), and membership in the training set.

    Rows behind the last item's are spare capacity. `active` marks rows whose item may be recommended; None: all. What
    an item is as the answer to a condition: the `groups` it is in, from 1, 0 behind them, and the vector of its text.
    `sequences` are its further code sequences, -1 where it has none, which a model reads that knows some. `vectors`, of
    length 1 or 0, are those that training pulls states to (`ItemModel.state_terms`); `item_vectors` the model's own, of
    requests alone: computed once for all of them (`ItemModel.item_vectors`); None: each batch computes them.
    """

    codes: Int[Array, "items level"]
    features: Float[Array, "items feature"] | None
    known: Bool[Array, " items"]
    active: Bool[Array, " items"] | None = None
    groups: Int[Array, "items m"] | None = None
    texts: Float[Array, "items text"] | None = None
    sequences: Sequences | None = None
    vectors: Float[Array, "items dim"] | None = None
    item_vectors: Float[Array, "items dim"] | None = None

    @classmethod
    def from_arrays(
        cls,
        codes: Int[np.ndarray, "items level"],
        features: Float[np.ndarray, "items feature"] | None,
        train_counts: Int[np.ndarray, " items"],
        *,
        active: Bool[np.ndarray, " items"] | None = None,
        groups: Int[np.ndarray, "items m"] | None = None,
        texts: Float[np.ndarray, "items text"] | None = None,
        sequences: tuple[Int[np.ndarray, "items _"], ...] = (),
        rows: int | None = None,
    ) -> ItemTables:
        """Tables on the default device; with `rows`, so many in all, zeros (and False) behind the items'."""

        def put(values: np.ndarray) -> Array:
            spare = 0 if rows is None else rows - len(values)
            return jax.device_put(np.pad(values, ((0, spare), *((0, 0),) * (values.ndim - 1))) if spare else values)

        def maybe(values: np.ndarray | None) -> Array | None:
            return None if values is None else put(values)

        return cls(
            put(codes),
            maybe(features),
            put(train_counts > 0),
            maybe(active),
            maybe(groups),
            maybe(texts),
            tuple(map(put, sequences)) or None,
        )

    def inputs(self, rows: Int[Array, "b t"]) -> Inputs:
        """Inputs of positions that hold these item rows."""
        dense = None if self.features is None else self.features[rows]
        further = None if self.sequences is None else tuple(codes[rows] for codes in self.sequences)
        return Inputs(self.codes[rows], dense, rows, sequences=further)

    def conditions(
        self, rows: Int[Array, "*n"], events: Int[Array, "*n"] | None, *, key: Key[Array, ""] | None = None
    ) -> Conditions:
        """Conditions that these items meet, with these events; any for row -1.

        Of an item in several groups, one: with a key a drawn one, else the first.
        """
        some, at = rows >= 0, jnp.maximum(rows, 0)
        event = None if events is None else jnp.where(some, events, 0)
        group = None if self.groups is None else jnp.where(some, _one_of(self.groups[at], key), 0)
        text = None if self.texts is None else jnp.where(some[..., None], self.texts[at], 0.0)
        return Conditions(event, group, text)


def _one_of(groups: Int[Array, "*n m"], key: Key[Array, ""] | None) -> Int[Array, "*n"]:
    """One of each item's groups, 0 where it has none."""
    if key is None or groups.shape[-1] == 1:
        return groups[..., 0]
    number = jnp.maximum(jnp.sum(groups > 0, axis=-1), 1)
    drawn = jax.random.randint(key, number.shape, 0, number)
    return jnp.take_along_axis(groups, drawn[..., None], axis=-1)[..., 0]


class TeacherItems(NamedTuple):
    """A teacher's best items per target position, and their scores: logits, divided by a temperature if desired.

    -1 and -inf where there are fewer than k.
    """

    rows: Int[Any, "*n k"]
    scores: Float[Any, "*n k"]


class TrainingBatch(NamedTuple):
    """Histories of item rows and the items that followed, in the model's layout.

    `segments` numbers the histories of a row from 1, 0 being padding; `targets` is -1 where there is none. `seen` are
    the items that a target cannot be, -1 for none. `events` are those of the history's items, `target_events` those of
    the targets; `importance` weighs the targets in means of losses, by their events, say; None: all alike. `times` are
    those of the history's items (see `Times`).
    """

    history: Int[Array, "b t"]
    segments: Int[Array, "b t"]
    targets: Int[Array, "*n"]
    teacher: TeacherItems | None = None
    seen: Int[Array, "*n t"] | None = None
    events: Int[Array, "b t"] | None = None
    target_events: Int[Array, "*n"] | None = None
    importance: Float[Array, "*n"] | None = None
    times: Int[Array, "b t"] | None = None

    def conditions(self, tables: ItemTables, *, key: Key[Array, ""] | None = None) -> Conditions:
        """The conditions on the item after each position of the history, which that item meets."""
        wanted = tables.conditions(self.targets, self.target_events, key=key)
        if self.targets.ndim == self.history.ndim:
            return wanted
        return after_histories(tables.conditions(self.history, self.events), wanted, self.segments)

    def without_repeats(self) -> TrainingBatch:
        """The batch where no item follows itself: `seen` is each position's own history; a target in it is none."""
        seen = seen_items(self.history, self.segments, last=self.targets.ndim == 1)
        repeated = jnp.any(seen == self.targets[..., None], axis=-1)
        return self._replace(targets=jnp.where(repeated, -1, self.targets), seen=seen)

    @property
    def weights(self) -> Float[Array, "*n"]:
        """1, or their importance, at positions with a target, 0 elsewhere."""
        there = (self.targets >= 0).astype(jnp.float32)
        return there if self.importance is None else there * self.importance

    def target_codes(self, tables: ItemTables) -> Int[Array, "*n level"]:
        """Codes of the targets; of some item where there is none."""
        return tables.codes[jnp.maximum(self.targets, 0)]


class Boosts(NamedTuple):
    """Factors of the probabilities of some items: freshness, a business rule. One row for all histories, or one each.

    Item rows are distinct, -1 for none; factors are at least 0. Probabilities are multiplied and not renormalized: the
    scores of other items stay what they are, those of boosted ones may exceed a probability.
    """

    rows: Int[Array, "b n"]
    factors: Float[Array, "b n"]


def seen_items(
    history: Int[Array, "b t"], segments: Int[Array, "b t"], *, last: bool
) -> Int[Array, "b t t"] | Int[Array, "b t"]:
    """The items of each position's own segment up to it, else -1; of rows with one history each, up to the `last`."""
    if last:
        return jnp.where(segments > 0, history, -1)
    position = jnp.arange(history.shape[1])
    own = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    own &= (position[None, :] <= position[:, None])[None]
    return jnp.where(own, history[:, None, :], -1)


class RequestBatch(NamedTuple):
    """Histories of item rows, one per row, the items that may be returned, and factors of items' probabilities.

    `segments` is 1 where `history` holds an item. `allowed` (None: all) has one row for all histories, or one for each;
    `denied` are item rows, -1 for none. `events` and `times` are those of the history's items, `target_conditions`, one
    per history, those on what is recommended. With `limits`, a list holds no more of a group; with `noise` it is drawn,
    not the best.
    """

    history: Int[Array, "b t"]
    segments: Int[Array, "b t"]
    allowed: Bool[Array, "b items"] | None = None
    denied: Int[Array, "b n"] | None = None
    boosts: Boosts | None = None
    events: Int[Array, "b t"] | None = None
    target_conditions: Conditions | None = None
    limits: GroupLimits | None = None
    noise: GumbelNoise | None = None
    times: Int[Array, "b t"] | None = None

    def inputs(self, tables: ItemTables) -> Inputs:
        """Inputs of the histories' positions."""
        inputs = tables.inputs(self.history)._replace(events=self.events, conditions=self.conditions(tables))
        return inputs._replace(times=self.own_times)

    @property
    def own_times(self) -> Times | None:
        """Times of the histories' positions."""
        return None if self.times is None else Times(self.times, self.segments)

    def conditions(self, tables: ItemTables) -> Conditions:
        """Conditions on the item after each position: those that the history's items meet, and the request's."""
        own = tables.conditions(self.history, self.events)
        return after_histories(
            own, Conditions() if self.target_conditions is None else self.target_conditions, self.segments
        )


class TopK(NamedTuple):
    """Item rows, best first (or as drawn), and their log-probabilities; -1 and -inf where there are fewer than k."""

    rows: Int[Array, "b k"]
    scores: Float[Array, "b k"]
