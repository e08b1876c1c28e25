"""Base of the generators of codes: embeddings of items by their codes, logits per level, losses and search."""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.conditions import ConditionEncoder, ConditionSizes, EventHead
from seq_models.layers import TransformerConfig, linear, products
from seq_models.losses import child_cross_entropy, code_cross_entropy, distillation
from seq_models.masks import ItemMask
from seq_models.mixture import ItemShares, Mixture, MixtureTerms, PrefixMasses, is_mixed, mixed_catalog
from seq_models.models import ItemModel, ModelConfig
from seq_models.ranking import first_within
from seq_models.scoring import LeafBlocks, catalog_log_probs, item_log_probs
from seq_models.search import Step, beam_search
from seq_models.sequences import SequenceEncoder, SequenceSizes
from seq_models.trie import CodeTrie
from seq_models.types import (
    Cache,
    Context,
    Decoded,
    Inputs,
    ItemTables,
    Prefixes,
    RequestBatch,
    SoftmaxOver,
    TopK,
    TrainingBatch,
)

# Folded into a step's key to draw dropped sequences without changing its other uses.
_DROP_SEQUENCES = 0x5E_05
# Leaves per block when the whole catalogue is scored: their logits fit into a CPU's cache.
_LEAVES = 512


@dataclass(frozen=True)
class CodeConfig(ModelConfig):
    """Settings that all generators of codes share."""

    has_codes: ClassVar[bool] = True

    backbone: TransformerConfig = TransformerConfig(dropout=None)
    """Reads the history."""
    tied_heads: bool = True
    """Score a level's codes with the input's embeddings; if not, with separate tables."""
    id_embedding: bool = False
    """Add a learned embedding of the item's row to the input. A hybrid: items added later have none."""

    @property
    def has_item_embeddings(self) -> bool:
        """True with `id_embedding`."""
        return self.id_embedding

    def with_dropout(self, rate: float) -> CodeConfig:
        backbone = self.backbone
        return replace(self, backbone=replace(backbone, dropout=rate)) if backbone.dropout is None else self


class CodeModel(ItemModel):
    """A model of the next item's codes, level by level, given a history of items.

    A family adds its layers and computes logits in two ways: of all levels at once, given the target (`decode`), and of
    one level at a time for the beams of a search (`encode_history`, `init_cache`, `decode_step`). Losses, search and
    exact scores are built on these.
    """

    sequences: SequenceEncoder | None = None
    """Embeddings of the items' further code sequences; None: it reads none."""

    def __init__(
        self, config: CodeConfig, *, level_sizes: tuple[int, ...], num_features: int, num_items: int, rngs: nnx.Rngs
    ) -> None:
        self.config, self.level_sizes, dim = config, tuple(level_sizes), config.backbone.dim
        if not self.level_sizes or min(self.level_sizes) < 1:
            raise ValueError(f"expected level_sizes of at least 1, one or more of them, got {self.level_sizes}")
        if config.id_embedding and num_items < 1:
            raise ValueError(f"id_embedding needs num_items of at least 1, got {num_items}")
        self.tables = self._new_tables(rngs)
        self.project = linear(config.backbone, num_features, dim, rngs, bias=True) if num_features else None
        self.ids = embedding(num_items, dim, rngs) if config.id_embedding else None

    def add_conditions(self, sizes: ConditionSizes, *, rngs: nnx.Rngs) -> None:
        """Add support of conditions. Raises ValueError for FiLM, a bias by time or an event head if the family does not
        decode an item from one state."""
        if sizes.film and not self.config.decodes_from_state:
            raise ValueError(f"FiLM needs one state that an item is decoded from, which {self.config.title} lacks")
        if sizes.time_bias and not self.config.decodes_from_state:
            raise ValueError(f"a bias by time is between items, and {self.config.title} attends to codes")
        if sizes.head and not self.config.decodes_from_state:
            raise ValueError(
                f"an event head needs one state that an item is decoded from, which {self.config.title} lacks"
            )
        self.conditioning = ConditionEncoder(sizes, self.config.backbone, rngs=rngs)
        if sizes.head:
            self.event_head = EventHead(sizes.head, self.config.backbone, rngs=rngs)

    def add_sequences(self, sizes: SequenceSizes, *, rngs: nnx.Rngs) -> None:
        """Add further code sequences of the items as inputs."""
        self.sequences = SequenceEncoder(sizes, self.config.backbone.dim, rngs=rngs)

    def add_state_head(self, width: int, *, rngs: nnx.Rngs) -> None:
        """Add the head of `state_terms`, for item vectors of `width` dimensions."""
        self.state_head = nnx.Linear(self.config.backbone.dim, width, rngs=rngs)

    def add_heads(self, rngs: nnx.Rngs) -> None:
        """Add the output tables. Separate from `__init__`, so that families initialize their own layers before them."""
        self.heads = None if self.config.tied_heads else self._new_tables(rngs)
        self.biases = nnx.List([nnx.Param(jnp.zeros((size,))) for size in self.level_sizes])

    def _new_tables(self, rngs: nnx.Rngs) -> nnx.List:
        return nnx.List([embedding(size, self.config.backbone.dim, rngs) for size in self.level_sizes])

    @abc.abstractmethod
    def decode(
        self,
        inputs: Inputs,
        segments: Int[Array, "b t"],
        targets: Int[Array, "*n level"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Decoded:
        """Logits of every level given the codes before it; `*n` is `b t`, or `b` for SINGLE.

        Dropout is applied if there is a key. Logits at positions without a target are undefined.
        """

    @abc.abstractmethod
    def encode_history(self, inputs: Inputs, segments: Int[Array, "b t"]) -> Context:
        """The context of a search, from rows with one history each."""

    @abc.abstractmethod
    def init_cache(self, context: Context) -> Cache:
        """The cache before the first step."""

    @abc.abstractmethod
    def decode_step(
        self, context: Context, cache: Cache, prefixes: Prefixes
    ) -> tuple[Float[Array, "batch beam size"], Cache]:
        """Logits of the next level for every live beam, and the cache with the results of this step added."""

    def loss_terms(
        self,
        tables: ItemTables,
        batch: TrainingBatch,
        *,
        trie: CodeTrie | None = None,
        smoothing: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Cross-entropy of each level's code (`loss/level`), with a teacher that of its codes, summed over levels
        (`loss/distillation`), and the terms of `state_terms`."""
        inputs, codes = self.training_inputs(tables, batch, key), batch.target_codes(tables)
        logits, states = self.decode(inputs, batch.segments, codes, key=key)
        terms = code_loss_terms(logits, tables, batch, trie=trie, smoothing=smoothing)
        return terms | self.state_terms(states, tables, batch)

    def training_inputs(self, tables: ItemTables, batch: TrainingBatch, key: Key[Array, ""] | None) -> Inputs:
        """Inputs of a training step's positions."""
        events, conditions = self.training_conditions(tables, batch, key)
        inputs = tables.inputs(batch.history)._replace(events=events, conditions=conditions)
        inputs = inputs._replace(times=self.training_times(batch, key))
        if self.sequences is None or inputs.sequences is None:
            return inputs
        key = None if key is None else jax.random.fold_in(key, _DROP_SEQUENCES)
        return inputs._replace(sequences=self.sequences.drop(inputs.sequences, batch.segments, key))

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
        """The k best items that a beam search finds; with limits, the first k of the beams' items within them."""
        trie, mask, masses, denied = _required(trie), None, None, requests.denied
        steps = self._steps(tables, requests)
        terms = self._terms(steps, mixture, requests, tables, trie, softmax_over)
        if terms is not None:
            denied = terms.closed(denied)
        if requests.allowed is not None or denied is not None:
            mask = ItemMask.from_items(trie, allowed=requests.allowed, denied=denied, codes=tables.codes)
        if terms is not None:
            masses = PrefixMasses.from_terms(terms, trie, tables.codes, mask=mask)
        beams = beam_search(
            *steps,
            trie,
            batch=requests.history.shape[0],
            beam_size=beam_size,
            num_results=k if requests.limits is None else beam_size,
            softmax_over=softmax_over,
            mask=mask,
            mixture=masses,
            noise=requests.noise,
        )
        return first_within(TopK(beams.rows, beams.log_probs), requests.limits, k)

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
        """Exact log-probabilities of the items' codes or, with a mixture or boosts, of the items."""
        steps = self._steps(tables, requests)
        rows_per_user = jnp.broadcast_to(rows[None], (requests.history.shape[0], len(rows)))
        terms = self._terms(steps, mixture, requests, tables, trie, softmax_over)
        if terms is None:
            return item_log_probs(*steps, tables.codes[rows_per_user], trie=trie, softmax_over=softmax_over)
        return terms.item_log_probs(
            _item_shares(steps, tables, _required(trie), softmax_over, rows_per_user), rows_per_user
        )

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
        """Exact log-probabilities of all items: each prefix of codes is computed once for all items that share it."""
        trie = _required(trie)
        if blocks is None:
            raise ValueError("a pass over all items needs the blocks of the trie: pass leaf_blocks(trie)")
        steps, dense = self._steps(tables, requests), self.dense_items(mixture, requests, tables)
        log_probs = catalog_log_probs(
            *steps,
            trie,
            batch=len(requests.history),
            blocks=blocks,
            softmax_over=softmax_over,
            divided=is_mixed(mixture, requests, dense),
        )
        return mixed_catalog(log_probs, mixture, requests, tables, dense)

    def leaf_blocks(self, trie: CodeTrie | None) -> LeafBlocks | None:
        """Blocks of leaves whose logits fit into a CPU's cache."""
        return LeafBlocks.from_trie(_required(trie), _LEAVES)

    def _steps(self, tables: ItemTables, requests: RequestBatch) -> tuple[Step, Cache]:
        """The step function of a search for these requests, and its initial cache."""
        context = self.encode_history(requests.inputs(tables), requests.segments)
        return functools.partial(self.decode_step, context), self.init_cache(context)

    def _terms(
        self,
        steps: tuple[Step, Cache],
        mixture: Mixture | None,
        requests: RequestBatch,
        tables: ItemTables,
        trie: CodeTrie | None,
        softmax_over: SoftmaxOver,
    ) -> MixtureTerms | None:
        """Changes by a mixture, boosts or a dense head to the probabilities of items; None: there are none."""
        dense = self.dense_items(mixture, requests, tables)
        if not is_mixed(mixture, requests, dense):
            return None
        score = functools.partial(_item_shares, steps, tables, _required(trie), softmax_over)
        return MixtureTerms.from_requests(mixture, requests, tables, score=score, dense=dense)

    def dense_items(self, mixture: Mixture | None, requests: RequestBatch, tables: ItemTables) -> ItemShares | None:
        """Items of a dense head with their shares of the model's distribution; None: there is no such head."""
        return None

    def item_states(self, inputs: Inputs) -> Float[Array, "b t dim"]:
        """One position per item: the sum of the embeddings of all its inputs."""
        return self._with_others(functools.reduce(jnp.add, self._embedded(inputs)), inputs)

    def token_states(self, inputs: Inputs) -> Float[Array, "b tokens dim"]:
        """One position per code, `t * levels` in total. An item's other inputs are added only at its last code, since
        its later codes are predicted from the positions before and must not see them."""
        *first, last = self._embedded(inputs)
        tokens = jnp.stack([*first, self._with_others(last, inputs)], axis=2)
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])

    def _embedded(self, inputs: Inputs) -> list[Float[Array, "b t dim"]]:
        if inputs.mixtures is None:
            return [table(inputs.codes[..., level]) for level, table in enumerate(self.tables)]
        # Full precision, so that a mixture of a single code gives exactly its row of the table.
        mean = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        levels = zip(inputs.mixtures, self.tables, strict=True)
        return [mean(mixture, table.embedding[...]) for mixture, table in levels]

    def _with_others(self, x: Array, inputs: Inputs) -> Array:
        if self.project is not None and inputs.dense is not None:
            x = x + self.project(inputs.dense).astype(x.dtype)
        if self.ids is not None and inputs.ids is not None:
            x = x + self.ids(inputs.ids)
        if self.sequences is not None:
            x = x + self.sequences(inputs.sequences).astype(x.dtype)
        if self.conditioning is None:
            return x
        return self.conditioning.add_to_input(x, inputs.events, inputs.conditions, times=inputs.times)

    def head(self, x: Float[Array, "*b dim"], level: int) -> Float[Array, "*b size"]:
        """Logits of a level's codes."""
        table = self.tables[level] if self.heads is None else self.heads[level]
        return products(x, table.embedding[...], self.config.backbone.dtype) + spread(self.biases[level][...], x.ndim)


def code_loss_terms(
    logits: tuple[Float[Array, "*n _"], ...],
    tables: ItemTables,
    batch: TrainingBatch,
    *,
    trie: CodeTrie | None,
    smoothing: float,
) -> dict[str, Float[Array, "..."]]:
    """Loss terms of teacher-forced logits: `loss/level` and, with a teacher, `loss/distillation`."""
    codes, weights = batch.target_codes(tables), batch.weights
    if trie is None:
        levels = code_cross_entropy(logits, codes, weights, smoothing=smoothing)
    else:
        levels = child_cross_entropy(logits, codes, weights, trie=trie, smoothing=smoothing)
    if batch.teacher is None:
        return {"loss/level": levels}
    rows, scores = batch.teacher
    taught = distillation(logits, codes, weights, teacher_codes=tables.codes[rows], teacher_scores=scores, trie=trie)
    return {"loss/level": levels, "loss/distillation": taught.sum()}


def _item_shares(
    steps: tuple[Step, Cache],
    tables: ItemTables,
    trie: CodeTrie,
    softmax_over: SoftmaxOver,
    rows: Int[Array, "b n"],
) -> Float[Array, "b n"]:
    """Log-probabilities of items, each an equal share of its leaf's; -inf for rows that are not in the trie."""
    (*_, leaves, _), found = trie.members_of_items(rows, tables.codes)
    leaf = item_log_probs(*steps, tables.codes[rows], trie=trie, softmax_over=softmax_over)
    return jnp.where(found, leaf - jnp.log(trie.leaf_counts(leaves).astype(jnp.float32)), -jnp.inf)


def _required(trie: CodeTrie | None) -> CodeTrie:
    if trie is None:
        raise ValueError("a model of codes ranks items by a search over the catalogue's trie; got trie=None")
    return trie


def embedding(size: int, dim: int, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(size, dim, embedding_init=nnx.initializers.normal(dim**-0.5), rngs=rngs)


def spread(vector: Float[Array, " dim"], ndim: int) -> Float[Array, "*b dim"]:
    """A vector with leading axes of one, to be added to an array of `ndim` axes."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))
