"""Interface of all model families: a config builds its model; the model computes its losses and ranks items.

A family is one file with its config, whose name is also its command-line name, and its model. `seq_models.codes` has
the base of generators of codes, `seq_models.dense` a model that scores every item at once.
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

# Folded into a step's key for independent draws that leave its other uses unchanged: dropped conditions, ...
_DROP = 0x70_1D
# ... dropout of the event head, ...
_EVENTS = 0x70_1E
# ... and dropped times.
_DROP_TIMES = 0x70_1F
# Temperature of the cosines between states and the vectors that they learn (UNGER's, arXiv 2502.06269).
_STATE_TEMPERATURE = 0.07


class ModelConfig(abc.ABC):
    """Architecture and sizes of a model; a frozen dataclass per family."""

    name: ClassVar[str]
    """Name of the family on the command line."""
    title: ClassVar[str]
    """Name of the family in texts."""
    has_codes: ClassVar[bool]
    """The model reads and generates codes, and ranks items by a search over the catalogue's trie."""
    decodes_from_state: ClassVar[bool] = False
    """An item's codes are decoded from one state per history, as end-to-end training requires."""

    @property
    def has_dense_head(self) -> bool:
        """True if a generator of codes also scores all items from its state, with a loss of its own."""
        return False

    @property
    @abc.abstractmethod
    def has_item_embeddings(self) -> bool:
        """True if the model learns a vector per item row; items added later have none."""

    @abc.abstractmethod
    def build(self, *, level_sizes: tuple[int, ...], num_items: int, num_features: int, rngs: nnx.Rngs) -> ItemModel:
        """A freshly initialized model for a catalogue of these sizes; `num_features`: width of the dense input."""

    def with_dropout(self, rate: float) -> ModelConfig:
        """The config with dropout `rate`, unless it sets one."""
        del rate
        return self

    def label(self, *, num_features: int) -> str:
        """Name of the model in tables of results, which may depend on whether it has a dense input."""
        return self.name


class ItemModel(nnx.Module):
    """A model of the next item of a history. Inputs and outputs are item rows; everything else comes from `tables`.

    Rows of a batch hold histories numbered by `segments` from 1, 0 is padding. Histories do not see each other, and the
    position of padding does not matter.
    """

    layout: ClassVar[Layout]
    conditioning: ConditionEncoder | None = None
    """Embeddings of the conditions that the model supports; None: it supports none."""
    event_head: EventHead | None = None
    """Probabilities of events given item and history; None: not learned."""
    state_head: nnx.Linear | None = None
    """Map from states to the item vectors that they learn, used only in training; None: no such loss."""

    def add_conditions(self, sizes: ConditionSizes, *, rngs: nnx.Rngs) -> None:
        """Add support of conditions on the next item. Raises ValueError if the family has none."""
        raise ValueError(f"{type(self).__name__} knows no conditions; give another family, or no conditions")

    def add_sequences(self, sizes: SequenceSizes, *, rngs: nnx.Rngs) -> None:
        """Add further code sequences of the items as inputs. Raises ValueError if the family reads none."""
        raise ValueError(f"{type(self).__name__} reads no codes, and so no further sequences of them")

    def add_state_head(self, width: int, *, rngs: nnx.Rngs) -> None:
        """Add the head of `state_terms`. Raises ValueError if the family does not decode items from a state."""
        raise ValueError(f"{type(self).__name__} has no state that an item is decoded from; leave out its vectors")

    def training_conditions(
        self, tables: ItemTables, batch: TrainingBatch, key: Key[Array, ""] | None
    ) -> tuple[Int[Array, "b t"] | None, Conditions | None]:
        """Events of a training step's histories, and conditions on the items that follow; None if not supported.

        With a key, a share of them is dropped, so that the model also learns to rank without them.
        """
        if self.conditioning is None:
            return None, None
        choice, drop = split_key(None if key is None else jax.random.fold_in(key, _DROP), 2)
        return self.conditioning.drop(batch.events, batch.conditions(tables, key=choice), drop)

    def modulated(self, states: Float[Array, "b t dim"], conditions: Conditions | None) -> Float[Array, "b t dim"]:
        """States after histories, modulated by the conditions (FiLM) if the model reads them so, else unchanged."""
        return states if self.conditioning is None else self.conditioning.modulate(states, conditions)

    def training_times(self, batch: TrainingBatch, key: Key[Array, ""] | None) -> Times | None:
        """Times of a training step's histories, if the model reads them; with a key, some are dropped."""
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
        targets; empty without an event head. Targets count if their event is known and was not an input condition."""
        if self.event_head is None or batch.target_events is None:
            return {}
        condition = None if conditions is None else conditions.event
        learned = (batch.targets >= 0) & (batch.target_events > 0)
        if condition is not None and self.conditioning is not None and self.conditioning.reads_event:
            learned &= condition == 0
        key = None if key is None else jax.random.fold_in(key, _EVENTS)
        each = cross_entropy(self.event_head(states, items, key=key), jnp.maximum(batch.target_events - 1, 0))
        return {"loss/event": weighted_mean(each, learned.astype(jnp.float32))}

    def state_terms(
        self, states: Float[Array, "*n dim"], tables: ItemTables, batch: TrainingBatch
    ) -> dict[str, Float[Array, ""]]:
        """Cross-entropy of the targets (`loss/state`) under a softmax of cosines between states, mapped by the state
        head, and the vectors of all items; empty without that head. After UNGER's distillation (arXiv 2502.06269, stage
        2), which compares with the items of a batch only."""
        if self.state_head is None or tables.vectors is None:
            return {}
        queries = unit(self.state_head(states.astype(jnp.float32))) / _STATE_TEMPERATURE
        loss = item_cross_entropy(queries, tables.vectors, batch.targets, batch.weights, seen=batch.seen)
        return {"loss/state": loss}

    def event_log_probs(
        self, tables: ItemTables, requests: RequestBatch, rows: Int[Array, "b n"]
    ) -> Float[Array, "b n event"]:
        """Log of p(event | item, history) for every event and these items (arbitrary for row -1).

        Call it inside jit. Raises ValueError for a model that has not learned these probabilities.
        """
        raise ValueError(f"{type(self).__name__} knows no probabilities of events")

    def events_after(self, states: Float[Array, "b dim"], items: Float[Array, "b n dim"]) -> Float[Array, "b n event"]:
        """`event_log_probs` from states after histories and embeddings of items."""
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

        With a `trie`, a level's softmax is over the children of the target's prefix. `smoothing` is the share of label
        smoothing. Dropout is applied if there is a key.
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
        """The k best items per history; a search keeps `beam_size` beams, at least k. Call it inside jit.

        With a `mixture` or boosts in the requests, probabilities are those of `seq_models.mixture`, also below.
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
        """Exact log-probabilities of item rows. Call it inside jit."""

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
        """Exact log-probabilities of all items. Call it inside jit, with the `leaf_blocks` as a static argument."""

    def item_vectors(self, tables: ItemTables) -> Float[Array, "items dim"] | None:
        """Vectors of all items that score requests, if they are computed from the tables; None: there are none, or they
        are plain parameters."""
        return None

    def leaf_blocks(self, trie: CodeTrie | None) -> LeafBlocks | None:
        """Blocks of the trie for `catalog_log_probs`; None: it does not use the trie."""
        return None
