"""A generator of codes with a dense head over item vectors (LIGER, arXiv 2411.18814).

A beam search over codes proposes items. The dense head, which knows items only by their content, ranks them together
with the cold items, whose codes were never trained on. Unlike LIGER, the backbone is that of the RQ-Transformer, every
position is a query, and an item's vector is computed by two layers from its dense input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.codes import code_loss_terms
from seq_models.layers import linear, products, split_key, unit
from seq_models.losses import item_cross_entropy
from seq_models.mixture import Mixture, catalog_terms, mixed_catalog
from seq_models.ranking import active_log_probs, best_allowed
from seq_models.rq_transformer import RQTransformer, RQTransformerConfig
from seq_models.scoring import LeafBlocks
from seq_models.sharing import set_items
from seq_models.trie import CodeTrie
from seq_models.types import ItemTables, RequestBatch, SoftmaxOver, TopK, TrainingBatch


@dataclass(frozen=True)
class HybridConfig(RQTransformerConfig):
    """LIGER: the RQ-Transformer with a dense head over content vectors; for catalogues where many items are cold."""

    name: ClassVar[str] = "hybrid"
    title: ClassVar[str] = "hybrid (LIGER)"

    temperature: float = 0.07
    """Temperature: divides the cosines between states and item vectors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense_share:
            raise ValueError("LIGER ranks all candidates by its dense head, without a share; leave dense_share out")
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {self.temperature}")

    @property
    def has_dense_head(self) -> bool:
        """True: it ranks by its dense head."""
        return True

    def build(
        self, *, level_sizes: tuple[int, ...], num_items: int, num_features: int, rngs: nnx.Rngs
    ) -> HybridTransformer:
        """A HybridTransformer with fresh parameters. Raises ValueError without a dense input."""
        sizes = {"num_features": num_features, "num_items": num_items}
        return HybridTransformer(self, level_sizes=level_sizes, **sizes, rngs=rngs)


class HybridTransformer(RQTransformer):
    """An RQTransformer that also scores items by the cosine of its state and a vector of the item's dense input.

    Raises ValueError without a dense input.
    """

    def __init__(
        self,
        config: HybridConfig,
        *,
        level_sizes: tuple[int, ...],
        num_features: int = 0,
        num_items: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        if num_features < 1:
            raise ValueError("the dense head knows items by their dense input; give it vector columns as features")
        super().__init__(config, level_sizes=level_sizes, num_features=num_features, num_items=num_items, rngs=rngs)
        self.temperature, dim = config.temperature, config.backbone.dim
        self.item_hidden = linear(config.backbone, num_features, 2 * dim, rngs, bias=True)
        self.item_out = linear(config.backbone, 2 * dim, dim, rngs)

    def vectors(self, features: Float[Array, "items feature"]) -> Float[Array, "items dim"]:
        """Item vectors of norm 1."""
        return unit(self.item_out(jax.nn.silu(self.item_hidden(features))))

    def queries(self, states: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        """States scaled so that their inner products with item vectors are logits: cosines over the temperature."""
        return unit(states) / self.temperature

    def scores(self, states: Float[Array, "b dim"], vectors: Float[Array, "items dim"]) -> Float[Array, "b items"]:
        """Logits of every item."""
        return products(self.queries(states), vectors, self.config.backbone.dtype)

    def loss_terms(
        self,
        tables: ItemTables,
        batch: TrainingBatch,
        *,
        trie: CodeTrie | None = None,
        smoothing: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Loss terms of the codes and of the dense head over all training items (LIGER, section 3), in one pass."""
        backbone_key, depth_key = split_key(key, 2)
        inputs, codes = self.training_inputs(tables, batch, key), batch.target_codes(tables)
        history = self.history_states(inputs, batch.segments, key=backbone_key)
        states = self.modulated(history, inputs.conditions)
        logits = self.depth_logits(states, codes, key=depth_key)
        terms = code_loss_terms(logits, tables, batch, trie=trie, smoothing=smoothing)
        # An item outside the training set is a constant negative: its zero vector gives logit 0 and no gradient.
        vectors = jnp.where(tables.known[:, None], self.vectors(_required(tables.features)), 0.0)
        queries = self.queries(states)
        if self.event_head is not None:
            terms |= self.event_terms(history, self.code_sums(codes), batch, inputs.conditions, key)
        dense = item_cross_entropy(queries, vectors, batch.targets, batch.weights, seen=batch.seen)
        return terms | {"loss/dense": dense} | self.state_terms(states, tables, batch)

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
        """The best items by the dense head, among those that the beam search finds and those that training never saw.

        A mixture is with the dense head's distribution. Items of the graph's distribution, the history and the boosts
        are then candidates, too, and the beam search uses the codes alone. Limits and noise apply to the candidates.
        """
        log_probs, search = self._log_probs(tables, requests), requests._replace(limits=None, noise=None)
        terms = catalog_terms(log_probs, mixture, requests, tables)
        if terms is not None:
            log_probs = terms.catalog_log_probs(log_probs)
            search = search._replace(denied=terms.closed(requests.denied), boosts=None)
        beams = super().top(tables, trie, search, k=beam_size, beam_size=beam_size, softmax_over=softmax_over).rows
        candidates = jnp.broadcast_to(~tables.known[None], log_probs.shape)
        for rows in (beams, *(() if terms is None else terms.named_rows)):
            candidates = set_items(candidates, rows, True)
        return best_allowed(jnp.where(candidates, log_probs, -jnp.inf), requests, k)

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
        """Log-probabilities of the dense head, by which it ranks."""
        return mixed_catalog(self._log_probs(tables, requests), mixture, requests, tables)[:, rows]

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
        """Log-probabilities of the dense head, by which it ranks, of all items."""
        return mixed_catalog(self._log_probs(tables, requests), mixture, requests, tables)

    def item_vectors(self, tables: ItemTables) -> Float[Array, "items dim"]:
        """Vectors of all items in the dense head."""
        return self.vectors(_required(tables.features))

    def leaf_blocks(self, trie: CodeTrie | None) -> None:
        """None: the dense head reads no trie."""

    def _log_probs(self, tables: ItemTables, requests: RequestBatch) -> Float[Array, "b items"]:
        states = self.encode_history(requests.inputs(tables), requests.segments)
        vectors = self.item_vectors(tables) if tables.item_vectors is None else tables.item_vectors
        return active_log_probs(self.scores(states, vectors), tables)


def _required(features: Float[Array, "items feature"] | None) -> Float[Array, "items feature"]:
    if features is None:
        raise ValueError("the dense head needs the items' dense input, and the tables have none")
    return features
