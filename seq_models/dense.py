"""SASRec (Kang & McAuley, ICDM 2018) with full-softmax cross-entropy: the backbone over ids, tied output."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.backbones import build_backbone
from seq_models.conditions import ConditionEncoder, Conditions, ConditionSizes, EventHead, Times
from seq_models.layers import TransformerConfig, last_state, linear, products
from seq_models.losses import item_cross_entropy
from seq_models.mixture import Mixture, mixed_catalog
from seq_models.models import ItemModel, ModelConfig
from seq_models.ranking import active_log_probs, best_allowed
from seq_models.scoring import LeafBlocks
from seq_models.trie import CodeTrie
from seq_models.types import ItemTables, Layout, RequestBatch, SoftmaxOver, TopK, TrainingBatch


@dataclass(frozen=True)
class DenseConfig(ModelConfig):
    """SASRec, dense and without codes: the baseline, the teacher, and good if no items are added between trainings.

    Item vectors are learned by id and serve as the output matrix, too.
    """

    name: ClassVar[str] = "sasrec"
    title: ClassVar[str] = "SASRec"
    has_codes: ClassVar[bool] = False

    backbone: TransformerConfig = TransformerConfig(dropout=0.3)
    # "later": added after configs were stored, which omit these fields at their defaults.
    widths: tuple[int, ...] = field(default=(), metadata={"later": True})
    """Numbers of leading dimensions that can rank items alone: the loss of each is added to that of all (fMRLRec)."""
    width_weight: float = field(default=0.1, metadata={"later": True})
    """Weight of each of these losses: at 1, as in the paper, narrow widths find more and all dimensions find less."""
    width: int | None = field(default=None, metadata={"later": True})
    """Number of leading dimensions that rank items: one of widths, or None for all. Chosen after training."""

    def __post_init__(self) -> None:
        for width in self.widths:
            if not 1 <= width <= self.backbone.dim:
                raise ValueError(f"expected widths of 1 to dim {self.backbone.dim}, got {width}")
        if not 0 < self.width_weight < math.inf:
            raise ValueError(f"expected a width_weight above 0, got {self.width_weight}")
        trained = (*self.widths, self.backbone.dim)
        if self.width is not None and self.width not in trained:
            raise ValueError(f"expected a width that is trained, of {', '.join(map(str, trained))}, got {self.width}")

    @property
    def has_item_embeddings(self) -> bool:
        """True: it represents items by learned vectors."""
        return True

    def build(
        self, *, level_sizes: tuple[int, ...], num_items: int, num_features: int, rngs: nnx.Rngs
    ) -> DenseTransformer:
        """A DenseTransformer, which reads no codes."""
        return DenseTransformer(self, num_items=num_items, num_features=num_features, rngs=rngs)

    def label(self, *, num_features: int) -> str:
        """The family's name, marked if content vectors are added to the ids."""
        return f"{self.name}-content" if num_features else self.name


class DenseTransformer(ItemModel):
    """Scores every item as the next one by the inner product of its vector with the history's state.

    An item's vector is a learned embedding, plus a projection of its dense input if there is one.
    """

    layout = Layout.PACKED

    def __init__(self, config: DenseConfig, *, num_items: int, num_features: int = 0, rngs: nnx.Rngs) -> None:
        dim, self.dtype = config.backbone.dim, config.backbone.dtype
        self.widths, self.width, self.width_weight = config.widths, config.width, config.width_weight
        self.ids = nnx.Embed(num_items, dim, embedding_init=nnx.initializers.normal(dim**-0.5), rngs=rngs)
        self.project = linear(config.backbone, num_features, dim, rngs, bias=True) if num_features else None
        self.backbone = build_backbone(config.backbone, rngs=rngs)

    def vectors(self, features: Float[Array, "items feature"] | None) -> Float[Array, "items dim"]:
        """Vectors of all items."""
        table = self.ids.embedding[...]
        return table if self.project is None or features is None else table + self.project(features).astype(table.dtype)

    def states(
        self,
        vectors: Float[Array, "items dim"],
        history: Int[Array, "b t"],
        segments: Int[Array, "b t"],
        *,
        events: Int[Array, "b t"] | None = None,
        conditions: Conditions | None = None,
        times: Times | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t dim"]:
        """States after histories of item rows, in the dtype of the product with item vectors."""
        inputs: dict[str, Any] = {"events": events, "conditions": conditions, "times": times}
        states = self.history_states(vectors, history, segments, **inputs, key=key)
        return self._queries(states, conditions)

    def history_states(
        self,
        vectors: Float[Array, "items dim"],
        history: Int[Array, "b t"],
        segments: Int[Array, "b t"],
        *,
        events: Int[Array, "b t"] | None = None,
        conditions: Conditions | None = None,
        times: Times | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t dim"]:
        """Backbone states: `states` before conditions modulate them."""
        x = vectors[history] * (vectors.shape[-1] ** 0.5)
        if self.conditioning is not None:
            x = self.conditioning.add_to_input(x, events, conditions, times=times)
        bias = None if self.conditioning is None else self.conditioning.time_bias(times)
        return self.backbone(x, segments, times=bias, key=key)

    def _queries(self, states: Float[Array, "b t dim"], conditions: Conditions | None) -> Float[Array, "b t dim"]:
        return self.modulated(states, conditions).astype(self.dtype.value)

    def scores(
        self,
        vectors: Float[Array, "items dim"],
        history: Int[Array, "b t"],
        segments: Int[Array, "b t"],
        *,
        events: Int[Array, "b t"] | None = None,
        conditions: Conditions | None = None,
        times: Times | None = None,
    ) -> Float[Array, "b items"]:
        """Logits of every item after the history in each row, which may be padded on either side."""
        states = self.states(vectors, history, segments, events=events, conditions=conditions, times=times)
        return products(self.ranked_by(last_state(states, segments)), self.ranked_by(vectors), self.dtype)

    def ranked_by(self, x: Float[Array, "*n dim"]) -> Float[Array, "*n width"]:
        """The leading dimensions of states or vectors whose inner products rank items."""
        return x if self.width is None else x[..., : self.width]

    def add_conditions(self, sizes: ConditionSizes, *, rngs: nnx.Rngs) -> None:
        """Add support of conditions."""
        self.conditioning = ConditionEncoder(sizes, self.backbone.config, rngs=rngs)
        if sizes.head:
            self.event_head = EventHead(sizes.head, self.backbone.config, rngs=rngs)

    def add_state_head(self, width: int, *, rngs: nnx.Rngs) -> None:
        """Add the head of `state_terms`, for item vectors of `width` dimensions."""
        self.state_head = nnx.Linear(self.backbone.config.dim, width, rngs=rngs)

    def loss_terms(
        self,
        tables: ItemTables,
        batch: TrainingBatch,
        *,
        trie: CodeTrie | None = None,
        smoothing: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Full-softmax cross-entropy of the next item, those of `widths` added (`loss/item`), and the terms of events
        and states."""
        vectors = self.vectors(tables.features)
        events, conditions = self.training_conditions(tables, batch, key)
        inputs: dict[str, Any] = {"events": events, "conditions": conditions, "times": self.training_times(batch, key)}
        states = self.history_states(vectors, batch.history, batch.segments, **inputs, key=key)
        queries = self._queries(states, conditions)
        loss = item_cross_entropy(queries, vectors, batch.targets, batch.weights, seen=batch.seen)
        for width in self.widths:
            narrow = (queries[..., :width], vectors[:, :width])
            loss += self.width_weight * item_cross_entropy(*narrow, batch.targets, batch.weights, seen=batch.seen)
        terms = {"loss/item": loss} | self.state_terms(queries, tables, batch)
        if self.event_head is None:
            return terms
        return terms | self.event_terms(states, self._embedded(vectors, batch.targets), batch, conditions, key)

    def item_vectors(self, tables: ItemTables) -> Float[Array, "items dim"] | None:
        """Vectors of all items, if they are more than the learned embeddings."""
        return None if self.project is None or tables.features is None else self.vectors(tables.features)

    def _request_vectors(self, tables: ItemTables) -> Float[Array, "items dim"]:
        return self.vectors(tables.features) if tables.item_vectors is None else tables.item_vectors

    def event_log_probs(
        self, tables: ItemTables, requests: RequestBatch, rows: Int[Array, "b n"]
    ) -> Float[Array, "b n event"]:
        """Event log-probabilities from the items' vectors and the state after the history."""
        vectors = self._request_vectors(tables)
        inputs = _request_inputs(requests, tables)
        states = self.history_states(vectors, requests.history, requests.segments, **inputs)
        return self.events_after(last_state(states, requests.segments), self._embedded(vectors, rows))

    def _embedded(self, vectors: Float[Array, "items dim"], rows: Int[Array, "*n"]) -> Float[Array, "*n dim"]:
        """Vectors of items, scaled like their embeddings in histories."""
        return vectors[jnp.maximum(rows, 0)] * (vectors.shape[-1] ** 0.5)

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
        """The k items with the highest scores, without a search."""
        return best_allowed(self._log_probs(tables, requests, mixture), requests, k)

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
        """Log-probabilities of the given items."""
        return self._log_probs(tables, requests, mixture)[:, rows]

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
        """Log-probabilities of all items."""
        return self._log_probs(tables, requests, mixture)

    def _log_probs(
        self, tables: ItemTables, requests: RequestBatch, mixture: Mixture | None
    ) -> Float[Array, "b items"]:
        inputs = _request_inputs(requests, tables)
        scores = self.scores(self._request_vectors(tables), requests.history, requests.segments, **inputs)
        return mixed_catalog(active_log_probs(scores, tables), mixture, requests, tables)


def _request_inputs(requests: RequestBatch, tables: ItemTables) -> dict[str, Any]:
    """Inputs of the requests' positions besides their items."""
    return {"events": requests.events, "conditions": requests.conditions(tables), "times": requests.own_times}
