"""Interface of all model families: a config that builds its model; a model that states its losses and ranks items.

A family is one file: its config, named for the command line, and its model. `seq_models.codes` has what generators of
codes share, `seq_models.dense` a model that scores every item at once.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.conditions import ConditionEncoder, Conditions, ConditionSizes, EventHead, Times
from seq_models.layers import split_key, unit
from seq_models.losses import cross_entropy, item_cross_entropy, weighted_mean
from seq_models.mixture import Mixture
from seq_models.scoring import LeafBlocks
from seq_models.sequences import SequenceSizes
from seq_models.trie import CodeTrie
from seq_models.types import ItemTables, Layout, RequestBatch, SoftmaxOver, TopK, TrainingBatch

# Folded into a step's key, for what is left out of the conditions: the key's other uses stay what they are.
_DROP = 0x70_1D
# ... and for the dropout of the event head.
_EVENTS = 0x70_1E
# ... and for the times that are left out.
_DROP_TIMES = 0x70_1F
# Divides the cosines between states and the vectors that they are pulled to (UNGER's, arXiv 2502.06269).
_STATE_TEMPERATURE = 0.07


class ModelConfig(abc.ABC):
    """Architecture and sizes of a model; a frozen dataclass per family."""

    name: ClassVar[str]
    """The family on the command line."""
    title: ClassVar[str]
    """The family in a text."""
    has_codes: ClassVar[bool]
    """The model reads and generates codes, so that it ranks items by a search over the catalogue's trie."""
    decodes_from_state: ClassVar[bool] = False
    """An item's codes are decoded from one state per history, as end-to-end training needs."""

    @property
    def has_dense_head(self) -> bool:
        """True where a generator of codes scores all items from its state too, by a loss of its own."""
        return False

    @property
    @abc.abstractmethod
    def has_item_embeddings(self) -> bool:
        """True where the model has a learned vector per item row, and so none for items added later."""

    @abc.abstractmethod
    def build(self, *, level_sizes: tuple[int, ...], num_items: int, num_features: int, rngs: nnx.Rngs) -> ItemModel:
        """A model with fresh parameters for a catalogue of these sizes; `num_features`: width of the dense input."""

    def with_dropout(self, rate: float) -> ModelConfig:
        """The config with this dropout where it names none."""
        del rate
        return self

    def label(self, *, num_features: int) -> str:
        """Name of such a model in a table of results, where the dense input may set it apart."""
        return self.name


class ItemModel(nnx.Module):
    """A model of the next item of a history. Item rows alone go in and out; all else is read from `tables`.

    Rows of a batch hold histories numbered by `segments` from 1, 0 being padding; no history sees another, and the
    place of padding changes nothing.
    """

    layout: ClassVar[Layout]
    conditioning: ConditionEncoder | None = None
    """Embeddings of the conditions that the model knows; None: it knows none."""
    event_head: EventHead | None = None
    """Probabilities of events given item and history; None: it has not learned them."""
    state_head: nnx.Linear | None = None
    """Map from states to the vectors that they are pulled to, in training alone; None: there are none."""

    def add_conditions(self, sizes: ConditionSizes, *, rngs: nnx.Rngs) -> None:
        """Let the model know conditions on the next item. Raises ValueError where it cannot."""
        raise ValueError(f"{type(self).__name__} knows no conditions; give another family, or no conditions")

    def add_sequences(self, sizes: SequenceSizes, *, rngs: nnx.Rngs) -> None:
        """Let the model read further code sequences of its items. Raises ValueError where it cannot."""
        raise ValueError(f"{type(self).__name__} reads no codes, and so no further sequences of them")

    def add_state_head(self, width: int, *, rngs: nnx.Rngs) -> None:
        """Let training pull states to vectors of the items. Raises ValueError where items have no such state."""
        raise ValueError(f"{type(self).__name__} has no state that an item is decoded from; leave out its vectors")

    def training_conditions(
        self, tables: ItemTables, batch: TrainingBatch, key: Key[Array, ""] | None
    ) -> tuple[Int[Array, "b t"] | None, Conditions | None]:
        """Events of a training step's histories, and conditions on the items that follow; none where it knows none.

        With a key a share of them is left out, so that the model learns to do without.
        """
        if self.conditioning is None:
            return None, None
        choice, drop = split_key(None if key is None else jax.random.fold_in(key, _DROP), 2)
        return self.conditioning.drop(batch.events, batch.conditions(tables, key=choice), drop)

    def asked(self, states: Float[Array, "b t dim"], conditions: Conditions | None) -> Float[Array, "b t dim"]:
        """States after histories as the next items are decoded from them: by FiLM, if the model knows conditions so."""
        return states if self.conditioning is None else self.conditioning.modulate(states, conditions)

    def training_times(self, batch: TrainingBatch, key: Key[Array, ""] | None) -> Times | None:
        """Times of a training step's histories, if the model reads any; with a key some are left out."""
        if self.conditioning is None:
            return None
        times = None if batch.times is None else Times(batch.times, batch.segments)
        return self.conditioning.drop_times(times, None if key is None else jax.random.fold_in(key, _DROP_TIMES))

    def event_terms(
        self,
        states: Float[Array, "*n dim"],
        items: Float[Array, "*n dim"],
        batch: TrainingBatch,
        conditions: Conditions | None,
        key: Key[Array, ""] | None,
    ) -> dict[str, Float[Array, ""]]:
        """Cross-entropy of the targets' events (`loss/event`), given states after histories and embeddings of the
        targets, if it learns them: where the event is known and no condition that the state has read gives it away."""
        if self.event_head is None or batch.target_events is None:
            return {}
        given = None if conditions is None else conditions.event
        learned = (batch.targets >= 0) & (batch.target_events > 0)
        if given is not None and self.conditioning is not None and self.conditioning.reads_event:
            learned &= given == 0
        key = None if key is None else jax.random.fold_in(key, _EVENTS)
        each = cross_entropy(self.event_head(states, items, key=key), jnp.maximum(batch.target_events - 1, 0))
        return {"loss/event": weighted_mean(each, learned.astype(jnp.float32))}

    def state_terms(
        self, states: Float[Array, "*n dim"], tables: ItemTables, batch: TrainingBatch
    ) -> dict[str, Float[Array, ""]]:
        """Cross-entropy (`loss/state`) with which states, mapped to the width of the items' vectors, find that of the
        target among all by cosine, if the model has a head for it: UNGER's distillation (arXiv 2502.06269, stage 2),
        with all items in place of a batch's."""
        if self.state_head is None or tables.vectors is None:
            return {}
        queries = unit(self.state_head(states.astype(jnp.float32))) / _STATE_TEMPERATURE
        loss = item_cross_entropy(queries, tables.vectors, batch.targets, batch.weights, seen=batch.seen)
        return {"loss/state": loss}

    def event_log_probs(
        self, tables: ItemTables, requests: RequestBatch, rows: Int[Array, "b n"]
    ) -> Float[Array, "b n event"]:
        """Logarithms of p(event | item, history) of these items, of which -1 is none in particular, for every event.

        To be called inside jit. Raises ValueError for a model that has not learned them.
        """
        raise ValueError(f"{type(self).__name__} knows no probabilities of events")

    def events_after(self, states: Float[Array, "b dim"], items: Float[Array, "b n dim"]) -> Float[Array, "b n event"]:
        """`event_log_probs` of items by their embeddings, after states of histories."""
        if self.event_head is None:
            raise ValueError("the model has not learned probabilities of events; train it with an event head")
        states = jnp.broadcast_to(states[:, None], items.shape)
        return jax.nn.log_softmax(self.event_head(states, items))

    @abc.abstractmethod
    def loss_terms(
        self,
        tables: ItemTables,
        batch: TrainingBatch,
        *,
        trie: CodeTrie | None = None,
        smoothing: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Losses by name, unweighted means over the targets, in nats; a vector has one entry per level.

        With a `trie`, a level's softmax is over the children of the target's prefix. `smoothing` is the share of each
        code's target that is uniform. With a key: with dropout.
        """

    @abc.abstractmethod
    def top(
        self,
        tables: ItemTables,
        trie: CodeTrie | None,
        requests: RequestBatch,
        *,
        k: int,
        beam_size: int,
        softmax_over: SoftmaxOver,
        mixture: Mixture | None = None,
    ) -> TopK:
        """The k best items per history; a search keeps `beam_size` beams, at least k. To be called inside jit.

        With a `mixture` or the requests' boosts, probabilities are those of `seq_models.mixture`, here and below.
        """

    @abc.abstractmethod
    def log_probs(
        self,
        tables: ItemTables,
        trie: CodeTrie | None,
        requests: RequestBatch,
        rows: Int[Array, " n"],
        *,
        softmax_over: SoftmaxOver,
        mixture: Mixture | None = None,
    ) -> Float[Array, "b n"]:
        """Exact log-probabilities of item rows. To be called inside jit."""

    @abc.abstractmethod
    def catalog_log_probs(
        self,
        tables: ItemTables,
        trie: CodeTrie | None,
        requests: RequestBatch,
        *,
        blocks: LeafBlocks | None,
        softmax_over: SoftmaxOver,
        mixture: Mixture | None = None,
    ) -> Float[Array, "b items"]:
        """Exact log-probabilities of all items. To be called inside jit, `blocks` (`leaf_blocks`) as a static."""

    def item_vectors(self, tables: ItemTables) -> Float[Array, "items dim"] | None:
        """Vectors of all items that requests are scored by, computed from the tables and from no request; None: there
        are none, or they are parameters as they stand."""
        return None

    def leaf_blocks(self, trie: CodeTrie | None) -> LeafBlocks | None:
        """The blocks in which `catalog_log_probs` goes through the trie; None: it does not read the trie."""
        return None
