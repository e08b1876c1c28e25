"""RQ-Transformer (Lee et al., CVPR 2022): one position per item, and a small causal decoder over its levels.

The backbone reads a history with each item as one position, the sum of its code embeddings. The depth decoder generates
the codes of the next item level by level, conditioned on the backbone's state: its input for level `l` is
`state + sum_{j<l} e_j(c_j) + p_l` (eq. 9 there, but with the state added at every level, not only the first). In search
the backbone runs once per user, and only the depth decoder runs per beam and level.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.attention import KeyValue, Past, append_level, attend_past, gather_ancestors
from seq_models.codes import CodeConfig, embedding, spread
from seq_models.layers import Attend, Block, dropout, norm, products, split_key
from seq_models.losses import item_cross_entropy, teacher_shift
from seq_models.mixture import ItemShares, Mixture, dense_shares
from seq_models.ranking import active_log_probs
from seq_models.state_decoder import StateDecoder
from seq_models.types import ItemTables, Prefixes, RequestBatch, TrainingBatch


@dataclass(frozen=True)
class RQTransformerConfig(CodeConfig):
    """One position per item, and a small depth decoder over the levels of the next item: the model to start with."""

    name: ClassVar[str] = "rq-transformer"
    title: ClassVar[str] = "RQ-Transformer"
    decodes_from_state: ClassVar[bool] = True

    depth_layers: int = 1
    """Blocks of the depth decoder, which has the backbone's width."""
    depth_dropout: float = 0.0
    """Dropout in the depth decoder."""
    # "later": added after configs were stored, which omit the field at its default.
    depth_hidden: int | None = field(default=None, metadata={"later": True})
    """Width inside the SwiGLUs of the depth decoder, which combine state and earlier codes; None: the backbone's."""
    scaled_codes: bool = field(default=False, metadata={"later": True})
    """Multiply the embeddings of earlier codes by the square root of dim where the depth decoder reads them (Vaswani et
    al. 2017, section 3.4), so that they are as large as the state."""
    dense_share: float = field(default=0.0, metadata={"later": True})
    """Share of a dense head in the probabilities of items: inner products of the state with the inputs of each item
    other than its codes, as in SASRec, trained by a cross-entropy over all items. It needs the id embedding."""

    def __post_init__(self) -> None:
        if not 0 <= self.dense_share < 1:
            raise ValueError(f"expected a dense_share of at least 0 and below 1, got {self.dense_share}")
        if self.dense_share and not self.id_embedding:
            raise ValueError("the dense head knows items by the embeddings of their ids; set id_embedding too")
        if self.depth_hidden is not None and self.depth_hidden < 1:
            raise ValueError(f"expected depth_hidden of at least 1, got {self.depth_hidden}")
        if self.depth_layers < 0:
            raise ValueError(f"expected depth_layers of at least 0, got {self.depth_layers}")
        if not 0.0 <= self.depth_dropout < 1.0:
            raise ValueError(f"depth_dropout {self.depth_dropout} must lie in [0, 1)")

    @property
    def has_dense_head(self) -> bool:
        """True with a `dense_share`."""
        return self.dense_share > 0

    def build(
        self, *, level_sizes: tuple[int, ...], num_items: int, num_features: int, rngs: nnx.Rngs
    ) -> RQTransformer:
        """An RQTransformer with fresh parameters."""
        return RQTransformer(self, level_sizes=level_sizes, num_features=num_features, num_items=num_items, rngs=rngs)


DepthCache = tuple[Past, ...]  # one per block of the depth decoder


class RQTransformer(StateDecoder):
    """Autoregressive model of the next item's codes given a history of items.

    `level_sizes` are the codebook sizes; `num_features` is the width of the dense input (0: none); `num_items` the
    number of items, used only for an id embedding.
    """

    def __init__(
        self,
        config: RQTransformerConfig,
        *,
        level_sizes: tuple[int, ...],
        num_features: int = 0,
        num_items: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, level_sizes=level_sizes, num_features=num_features, num_items=num_items, rngs=rngs)
        hidden = config.depth_hidden or config.backbone.hidden
        self.depth_config = replace(config.backbone, dropout=config.depth_dropout, hidden=hidden)
        self.scale = config.backbone.dim**0.5 if config.scaled_codes else 1.0
        self.dense_share = config.dense_share
        self.levels = embedding(len(level_sizes), config.backbone.dim, rngs)
        self.depth = nnx.List([Block(self.depth_config, rngs=rngs) for _ in range(config.depth_layers)])
        self.norm = norm(config.backbone, rngs)
        self.add_heads(rngs)

    def depth_logits(
        self, states: Float[Array, "*n dim"], targets: Int[Array, "*n level"], *, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "*n _"], ...]:
        """Teacher-forced logits of the item after each of the given states.

        Computed level by level, as in search: on a CPU this is faster than one array of all levels, as it saves copies.
        """
        summed, past, logits = states.reshape(-1, states.shape[-1]), self._no_past(), []
        codes = targets.reshape(len(summed), -1)
        for level, level_key in enumerate(split_key(key, len(self.level_sizes))):
            x, new = self._decode(summed, level, past, level_key)
            past = append_level(past, new)
            logits.append(self.head(x, level).reshape(*states.shape[:-1], -1))
            summed = summed + self._read(level, codes[:, level])
        return tuple(logits)

    def state_terms(
        self, states: Float[Array, "*n dim"], tables: ItemTables, batch: TrainingBatch
    ) -> dict[str, Float[Array, ""]]:
        """The base's terms and, with a dense head, its cross-entropy over all items (`loss/dense`): to the target or,
        with a teacher, half to the target and half to the teacher's items."""
        terms = super().state_terms(states, tables, batch)
        if not self.dense_share:
            return terms
        arguments = (states, self._item_vectors(tables), batch.targets, batch.weights)
        dense = item_cross_entropy(*arguments, seen=batch.seen)
        if batch.teacher is not None:
            rows, scores = batch.teacher
            dense += teacher_shift(*arguments, teacher_rows=rows, teacher_scores=scores) / 2
        return terms | {"loss/dense": dense}

    def dense_items(self, mixture: Mixture | None, requests: RequestBatch, tables: ItemTables) -> ItemShares | None:
        """The dense head's items, with shares that sum to `dense_share`."""
        if not self.dense_share:
            return None
        states = self.encode_history(requests.inputs(tables), requests.segments)
        vectors = self._item_vectors(tables) if tables.item_vectors is None else tables.item_vectors
        scores = products(states, vectors, self.config.backbone.dtype)
        return dense_shares(active_log_probs(scores, tables), mixture, requests, tables, total=self.dense_share)

    def item_vectors(self, tables: ItemTables) -> Float[Array, "items dim"] | None:
        """Vectors of all items in the dense head, if they are more than the embeddings of ids."""
        content = self.project is not None and tables.features is not None
        return self._item_vectors(tables) if self.dense_share and content else None

    def _item_vectors(self, tables: ItemTables) -> Float[Array, "items dim"]:
        """Vectors from the inputs of each item other than its codes, scaled as in SASRec."""
        assert self.ids is not None
        spare = len(tables.known) - self.ids.num_embeddings
        read = jnp.pad(self.ids.embedding[...], ((0, spare), (0, 0)))
        if self.project is not None and tables.features is not None:
            read = read + self.project(tables.features).astype(read.dtype)
        return read / read.shape[-1] ** 0.5

    def init_cache(self, context: Float[Array, "batch dim"]) -> DepthCache:
        """The empty cache."""
        return self._no_past()

    def decode_step(
        self, context: Float[Array, "batch dim"], cache: DepthCache, prefixes: Prefixes
    ) -> tuple[Float[Array, "batch beam size"], DepthCache]:
        """Logits of the prefixes' next level, and the cache with this level's keys and values added."""
        embedded = [self._read(level, prefixes.codes[..., level]) for level in range(prefixes.level)]
        x = functools.reduce(jnp.add, embedded, context[:, None, :])
        x, new = self._decode(x, prefixes.level, [gather_ancestors(past, prefixes.ancestors) for past in cache], None)
        return self.head(x, prefixes.level), append_level(cache, new)

    def _read(self, level: int, codes: Int[Array, "*n"]) -> Float[Array, "*n dim"]:
        """Embeddings of codes in the depth decoder."""
        embedded = self.tables[level](codes)
        return embedded if self.scale == 1 else embedded * self.scale

    def _no_past(self) -> DepthCache:
        return ((),) * len(self.depth)

    def _decode(
        self, x: Float[Array, "*b dim"], level: int, pasts: DepthCache | list[Past], key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "*b dim"], list[KeyValue]]:
        """The depth decoder's output at `level`, and this level's keys and values in every block."""
        input_key, *block_keys = split_key(key, len(self.depth) + 1)
        x = x + spread(self.levels.embedding[level], x.ndim)
        x = dropout(x.astype(self.depth_config.dtype.value), self.depth_config.rate, input_key)
        new = []
        for block, past, block_key in zip(self.depth, pasts, block_keys, strict=True):
            x, kv = self.depth_config.remat(functools.partial(block, attend=_attend_after(past), key=block_key))(x)
            new.append(kv)
        return self.norm(x), new


def _attend_after(past: Past) -> Attend:
    def attend(q: Array, kv: KeyValue) -> tuple[Array, KeyValue]:
        return attend_past(q, (*past, kv)), kv

    return attend
