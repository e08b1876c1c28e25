"""Integers in, integers out: the inputs of a model's positions, tables of items, requests, and the items found."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple, SupportsInt

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# All that the beams of a user share, a pytree of arrays [batch, ...]; never repeated per beam.
Context = Any
# Results of earlier search steps, a pytree of arrays [batch, beam of that step, ...]; never re-gathered.
Cache = Any
# Size of an axis: an int, or a symbolic dimension of `jax.export`.
Size = SupportsInt


class Inputs(NamedTuple):
    """Inputs of the positions of a history. Absent ones are None; a model adds up the embeddings of the others.

    `mixtures`, one array per level, replace the codes where given: a level's embedding is the mean under its mixture.
    """

    codes: Int[Array, "b t level"]
    dense: Float[Array, "b t feature"] | None = None
    ids: Int[Array, "b t"] | None = None
    mixtures: tuple[Float[Array, "b t _"], ...] | None = None


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

    Rows behind the last item's are spare capacity. `active` marks rows whose item may be recommended; None: all.
    """

    codes: Int[Array, "items level"]
    features: Float[Array, "items feature"] | None
    known: Bool[Array, " items"]
    active: Bool[Array, " items"] | None = None

    @classmethod
    def from_arrays(
        cls,
        codes: Int[np.ndarray, "items level"],
        features: Float[np.ndarray, "items feature"] | None,
        train_counts: Int[np.ndarray, " items"],
        *,
        active: Bool[np.ndarray, " items"] | None = None,
        rows: int | None = None,
    ) -> ItemTables:
        """Tables on the default device; with `rows`, so many in all, zeros (and False) behind the items'."""

        def put(values: np.ndarray) -> Array:
            spare = 0 if rows is None else rows - len(values)
            return jax.device_put(np.pad(values, ((0, spare), *((0, 0),) * (values.ndim - 1))) if spare else values)

        dense = None if features is None else put(features)
        return cls(put(codes), dense, put(train_counts > 0), None if active is None else put(active))

    def inputs(self, rows: Int[Array, "b t"]) -> Inputs:
        """Inputs of positions that hold these item rows."""
        return Inputs(self.codes[rows], None if self.features is None else self.features[rows], rows)


class TeacherItems(NamedTuple):
    """A teacher's best items per target position, and their scores: logits, divided by a temperature if desired.

    -1 and -inf where there are fewer than k.
    """

    rows: Int[Any, "*n k"]
    scores: Float[Any, "*n k"]


class TrainingBatch(NamedTuple):
    """Histories of item rows and the items that followed, in the model's layout.

    `segments` numbers the histories of a row from 1, 0 being padding; `targets` is -1 where there is none. `seen` are
    the items that a target cannot be, -1 for none.
    """

    history: Int[Array, "b t"]
    segments: Int[Array, "b t"]
    targets: Int[Array, "*n"]
    teacher: TeacherItems | None = None
    seen: Int[Array, "*n t"] | None = None

    def without_repeats(self) -> TrainingBatch:
        """The batch where no item follows itself: `seen` is each position's own history; a target in it is none."""
        seen = seen_items(self.history, self.segments, last=self.targets.ndim == 1)
        repeated = jnp.any(seen == self.targets[..., None], axis=-1)
        return self._replace(targets=jnp.where(repeated, -1, self.targets), seen=seen)

    @property
    def weights(self) -> Float[Array, "*n"]:
        """1 at positions with a target, 0 elsewhere."""
        return (self.targets >= 0).astype(jnp.float32)

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
    `denied` are item rows, -1 for none.
    """

    history: Int[Array, "b t"]
    segments: Int[Array, "b t"]
    allowed: Bool[Array, "b items"] | None = None
    denied: Int[Array, "b n"] | None = None
    boosts: Boosts | None = None


class TopK(NamedTuple):
    """Item rows, best first, and their log-probabilities; -1 and -inf where there are fewer than k."""

    rows: Int[Array, "b k"]
    scores: Float[Array, "b k"]
