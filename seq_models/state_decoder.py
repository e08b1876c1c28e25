"""Generators of codes that decode an item from one state per history: one position per item, packed rows."""

from __future__ import annotations

import abc
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.backbones import Backbone, build_backbone
from seq_models.codes import CodeConfig, CodeModel, code_loss_terms
from seq_models.layers import last_state, split_key
from seq_models.trie import CodeTrie
from seq_models.types import Decoded, Inputs, ItemTables, Layout, RequestBatch, TrainingBatch


class StateDecoder(CodeModel):
    """A generator whose backbone reads a history with each item as one position, the sum of its code embeddings.

    A family adds its layers, the logits of an item's codes given a state (`depth_logits`), and the same one level at a
    time (`init_cache`, `decode_step`). The state is the context of a search.
    """

    layout = Layout.PACKED

    def __init__(
        self, config: CodeConfig, *, level_sizes: tuple[int, ...], num_features: int, num_items: int, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, level_sizes=level_sizes, num_features=num_features, num_items=num_items, rngs=rngs)
        self.backbone = build_backbone(config.backbone, rngs=rngs)

    def start_from(self, backbone: Backbone, items: Float[Array, "items dim"]) -> None:
        """Initialize from another model: copy the parameters of its backbone, and use `items`, its inputs for each
        item, as id embeddings. At first the dense input then contributes nothing, codes little.

        Raises ValueError without an id embedding.
        """
        if self.ids is None:
            raise ValueError("the other model's items become id embeddings, and this model has none; set id_embedding")
        nnx.update(self.backbone, jax.tree.map(jnp.copy, nnx.state(backbone)))
        self.ids.embedding[...] = items
        if self.project is not None:
            self.project.kernel[...] = jnp.zeros_like(self.project.kernel[...])

    @abc.abstractmethod
    def depth_logits(
        self, states: Float[Array, "*n dim"], targets: Int[Array, "*n level"], *, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "*n _"], ...]:
        """Logits of every level of the item after each of the given states, given the target's codes before it."""

    def states(
        self, inputs: Inputs, segments: Int[Array, "b t"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "b t dim"]:
        """States from which items are decoded: entry `t` depends on its segment up to and including position `t`."""
        return self.modulated(self.history_states(inputs, segments, key=key), inputs.conditions)

    def history_states(
        self, inputs: Inputs, segments: Int[Array, "b t"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "b t dim"]:
        """Backbone states: `states` before conditions modulate them."""
        times = None if self.conditioning is None else self.conditioning.time_bias(inputs.times)
        return self.backbone(self.item_states(inputs), segments, times=times, key=key)

    def decode(
        self,
        inputs: Inputs,
        segments: Int[Array, "b t"],
        targets: Int[Array, "b t level"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Decoded:
        """Teacher-forced logits of every level given the codes before it, after the states of histories."""
        backbone_key, depth_key = split_key(key, 2)
        states = self.states(inputs, segments, key=backbone_key)
        return Decoded(self.depth_logits(states, targets, key=depth_key), states)

    def loss_terms(
        self,
        tables: ItemTables,
        batch: TrainingBatch,
        *,
        trie: CodeTrie | None = None,
        smoothing: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Loss terms of codes and states and, with an event head, of the targets' events."""
        if self.event_head is None:
            return super().loss_terms(tables, batch, trie=trie, smoothing=smoothing, key=key)
        backbone_key, depth_key = split_key(key, 2)
        inputs, codes = self.training_inputs(tables, batch, key), batch.target_codes(tables)
        history = self.history_states(inputs, batch.segments, key=backbone_key)
        states = self.modulated(history, inputs.conditions)
        logits = self.depth_logits(states, codes, key=depth_key)
        terms = code_loss_terms(logits, tables, batch, trie=trie, smoothing=smoothing)
        terms |= self.event_terms(history, self.code_sums(codes), batch, inputs.conditions, key)
        return terms | self.state_terms(states, tables, batch)

    def event_log_probs(
        self, tables: ItemTables, requests: RequestBatch, rows: Int[Array, "b n"]
    ) -> Float[Array, "b n event"]:
        """Event log-probabilities from the items' code embeddings and the state after the history."""
        states = self.history_states(requests.inputs(tables), requests.segments)
        items = self.code_sums(tables.codes[jnp.maximum(rows, 0)])
        return self.events_after(last_state(states, requests.segments), items)

    def code_sums(self, codes: Int[Array, "*n level"]) -> Float[Array, "*n dim"]:
        """Sums of the embeddings of items' codes."""
        return functools.reduce(jnp.add, [table(codes[..., level]) for level, table in enumerate(self.tables)])

    def encode_history(self, inputs: Inputs, segments: Int[Array, "b t"]) -> Float[Array, "b dim"]:
        """The state after each history, for rows with one history each."""
        return last_state(self.states(inputs, segments), segments)
