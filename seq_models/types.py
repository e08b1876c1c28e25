"""Data types of models and search: inputs, item tables, training batches, requests, and results. All are pytrees."""

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

# What all beams of a user share (such as an encoded history): a pytree of arrays [batch, ...], not repeated per beam.
Context = Any
# Results of earlier search steps: a pytree of arrays [batch, beam of that step, ...], kept in the order of that step.
Cache = Any
# Size of an axis: an int, or a symbolic dimension of `jax.export`.
Size = SupportsInt


class Inputs(NamedTuple):
    """Inputs of the positions of a history. A model adds up the embeddings of those that are not None.

    `mixtures`, if given, replace the codes: for each level a distribution over its codes, embedded as the mean of their
    embeddings. `events` are the events of the items, from 1, 0 for unknown; `times` their times; `conditions` are the
    conditions on the items that follow; `sequences` are the items' further code sequences.
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
    """Teacher-forced logits, one array per level, and the states from which the items' first codes are decoded."""

    logits: tuple[Float[Array, "*n _"], ...]
    states: Float[Array, "*n dim"]


class Prefixes(NamedTuple):
    """Live beams of a search before `level` codes are chosen, best first.

    `ancestors[..., l]` is the index, among the beams of step `l`, of the beam that this one descends from, and thus of
    the cache entry that step `l` wrote for it.
    """

    codes: Int[Array, "batch beam level"]
    ancestors: Int[Array, "batch beam level"]

    @property
    def level(self) -> int:
        """The level whose codes come next."""
        return self.codes.shape[-1]


class Layout(enum.Enum):
    """Arrangement of training histories in rows, and with it the positions that have teacher-forced logits."""

    PACKED = "packed"  # several histories per row; every position predicts the item after it
    CLOSED = "closed"  # packed, and each history is followed by its last target, which predicts nothing
    SINGLE = "single"  # one history and one target per row


class SoftmaxOver(enum.Enum):
    """Set over which a level's probabilities sum to one; should be the same in training and search."""

    VOCABULARY = "vocabulary"  # the level's whole vocabulary: the model's own probability
    CHILDREN = "children"  # the children of the prefix in the trie: the probability given that the item exists


class ItemTables(NamedTuple):
    """Device tables by item row: codes, dense input (None: no such input), and membership in the training set.

    Rows after the last item are spare capacity. `active` marks items that may be recommended; None: all. For
    conditions, `groups` has the groups of each item, from 1, padded with 0, and `texts` the vector of its text.
    `sequences` are further code sequences, -1 for a missing one, for models that read them. `vectors`, of norm 1 or 0,
    are targets of states in training (`ItemModel.state_terms`). `item_vectors`, used in requests only, are the model's
    own, computed once for all batches (`ItemModel.item_vectors`); None: each batch computes them.
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
        """Tables on the default device; with `rows`, padded with zeros (and False) to that many rows."""

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
        """Inputs of positions whose items are `rows`."""
        dense = None if self.features is None else self.features[rows]
        further = None if self.sequences is None else tuple(codes[rows] for codes in self.sequences)
        return Inputs(self.codes[rows], dense, rows, sequences=further)

    def conditions(
        self, rows: Int[Array, "*n"], events: Int[Array, "*n"] | None, *, key: Key[Array, ""] | None = None
    ) -> Conditions:
        """Conditions that these items with these events meet; "any" for row -1.

        For an item in several groups, one of them: drawn at random with a key, else the first.
        """
        some, at = rows >= 0, jnp.maximum(rows, 0)
        event = None if events is None else jnp.where(some, events, 0)
        group = None if self.groups is None else jnp.where(some, _choose_group(self.groups[at], key), 0)
        text = None if self.texts is None else jnp.where(some[..., None], self.texts[at], 0.0)
        return Conditions(event, group, text)


def _choose_group(groups: Int[Array, "*n m"], key: Key[Array, ""] | None) -> Int[Array, "*n"]:
    """One of each item's groups, 0 if it has none."""
    if key is None or groups.shape[-1] == 1:
        return groups[..., 0]
    number = jnp.maximum(jnp.sum(groups > 0, axis=-1), 1)
    drawn = jax.random.randint(key, number.shape, 0, number)
    return jnp.take_along_axis(groups, drawn[..., None], axis=-1)[..., 0]


class TeacherItems(NamedTuple):
    """A teacher's best items per target position, and their scores: logits, divided by a temperature if desired.

    Padded with -1 and -inf if there are fewer than k.
    """

    rows: Int[Any, "*n k"]
    scores: Float[Any, "*n k"]


class TrainingBatch(NamedTuple):
    """Histories of item rows and the items that followed, in the model's layout.

    `segments` numbers the histories of a row from 1, 0 is padding; `targets` is -1 at positions without one. `seen` are
    the items left out of a target's softmax, padded with -1. `events` and `times` (see `Times`) belong to the items of
    the history, `target_events` to the targets. `importance` are the targets' weights in means of losses, by event,
    say; None: equal.
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
        """Conditions on the item after each position of the history, met by that item."""
        conditions = tables.conditions(self.targets, self.target_events, key=key)
        if self.targets.ndim == self.history.ndim:
            return conditions
        return after_histories(tables.conditions(self.history, self.events), conditions, self.segments)

    def without_repeats(self) -> TrainingBatch:
        """The batch without repeated items: `seen` is each position's own history, and targets in it are dropped."""
        seen = seen_items(self.history, self.segments, last=self.targets.ndim == 1)
        repeated = jnp.any(seen == self.targets[..., None], axis=-1)
        return self._replace(targets=jnp.where(repeated, -1, self.targets), seen=seen)

    @property
    def weights(self) -> Float[Array, "*n"]:
        """The importance (by default 1) at positions with a target, 0 elsewhere."""
        has_target = (self.targets >= 0).astype(jnp.float32)
        return has_target if self.importance is None else has_target * self.importance

    def target_codes(self, tables: ItemTables) -> Int[Array, "*n level"]:
        """Codes of the targets; those of an arbitrary item at positions without one."""
        return tables.codes[jnp.maximum(self.targets, 0)]


class Boosts(NamedTuple):
    """Factors of the probabilities of some items: freshness, a business rule. One row for all histories, or one each.

    Item rows are distinct, padded with -1; factors are at least 0. Probabilities are multiplied and not renormalized:
    the scores of other items do not change, and those of boosted items may exceed 1.
    """

    rows: Int[Array, "b n"]
    factors: Float[Array, "b n"]


def seen_items(
    history: Int[Array, "b t"], segments: Int[Array, "b t"], *, last: bool
) -> Int[Array, "b t t"] | Int[Array, "b t"]:
    """Items of each position's own segment up to it, else -1; if `last`, only those of the last position, for rows with
    one history each."""
    if last:
        return jnp.where(segments > 0, history, -1)
    position = jnp.arange(history.shape[1])
    own = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    own &= (position[None, :] <= position[:, None])[None]
    return jnp.where(own, history[:, None, :], -1)


class RequestBatch(NamedTuple):
    """Histories of item rows, one per row, the items that may be returned, and factors of items' probabilities.

    `segments` is 1 where `history` holds an item. `allowed` (None: all) has one row for all histories, or one for each;
    `denied` are item rows, padded with -1. `events` and `times` belong to the history's items; `target_conditions`, one
    per history, are the conditions on the recommended items. `limits` bounds the items per group in a list; with
    `noise` the list is a random draw instead of the best items.
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
        """Conditions on the item after each position: those met by the history's next item, last the request's."""
        own = tables.conditions(self.history, self.events)
        return after_histories(
            own, Conditions() if self.target_conditions is None else self.target_conditions, self.segments
        )


class TopK(NamedTuple):
    """Item rows, best first (or as drawn), and their log-probabilities, padded with -1 and -inf."""

    rows: Int[Array, "b k"]
    scores: Float[Array, "b k"]
