"""Flat decoder: one causal transformer over the codes of a history, item after item, level after level.

Position `t` of a row holds an item, that is `levels` tokens. The first code of item `t + 1` is predicted from the last
token of item `t`, its code at level `l` from its token at `l - 1`, so that in training the row must contain the target
(`Layout.CLOSED`). In search the keys and values of the history are computed once per user and shared by all beams; a
beam keeps only those of its own codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from seq_models.attention import KeyValue, Past, append_level, attend_history, gather_ancestors, rotate
from seq_models.backbones import Transformer
from seq_models.codes import CodeConfig, CodeModel
from seq_models.layers import Attend, last_state
from seq_models.types import Decoded, Inputs, Layout, Prefixes


@dataclass(frozen=True)
class FlatDecoderConfig(CodeConfig):
    """One causal stack over all codes of a history; for comparison with papers.

    `kv_heads` of the stack determines the memory of a cached token.
    """

    name: ClassVar[str] = "flat"
    title: ClassVar[str] = "flat decoder"

    def build(self, *, level_sizes: tuple[int, ...], num_items: int, num_features: int, rngs: nnx.Rngs) -> FlatDecoder:
        """A FlatDecoder with fresh parameters."""
        return FlatDecoder(self, level_sizes=level_sizes, num_features=num_features, num_items=num_items, rngs=rngs)


class History(NamedTuple):
    """Keys and values of a user's tokens in every block, a mask of the real ones, and the state after the last."""

    blocks: tuple[KeyValue, ...]
    real: Bool[Array, "batch tokens"]
    last: Float[Array, "batch dim"]


class FlatDecoder(CodeModel):
    """Autoregressive model of the next item's codes given the codes of a history. See RQTransformer for arguments."""

    layout = Layout.CLOSED

    def __init__(
        self,
        config: FlatDecoderConfig,
        *,
        level_sizes: tuple[int, ...],
        num_features: int = 0,
        num_items: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, level_sizes=level_sizes, num_features=num_features, num_items=num_items, rngs=rngs)
        if config.backbone.relation:
            raise ValueError(
                "the flat decoder's beams have no relation term; leave relation out, or take another model"
            )
        self.backbone = Transformer(config.backbone, rngs=rngs)
        self.add_heads(rngs)

    def decode(
        self,
        inputs: Inputs,
        segments: Int[Array, "b t"],
        targets: Int[Array, "b t level"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Decoded:
        """Teacher-forced logits of the item after each position, whose codes are read from `inputs`, not `targets`; and
        the states at each position's last code."""
        states = self.backbone(self.token_states(inputs), self._token_segments(segments), key=key)
        by_level = states.reshape(*segments.shape, len(self.level_sizes), -1)
        before = [by_level[:, :, -1], *jnp.moveaxis(jnp.roll(by_level[:, :, :-1], -1, axis=1), 2, 0)]
        return Decoded(tuple(self.head(x, level) for level, x in enumerate(before)), before[0])

    def encode_history(self, inputs: Inputs, segments: Int[Array, "b t"]) -> History:
        """Keys and values of all tokens of rows with one history each."""
        of_tokens = self._token_segments(segments)
        states, blocks = self.backbone.read(self.token_states(inputs), of_tokens)
        return History(blocks, of_tokens != 0, last_state(states, of_tokens))

    def init_cache(self, context: History) -> tuple[Past, ...]:
        """The empty cache."""
        return ((),) * len(self.backbone.blocks)

    def decode_step(
        self, context: History, cache: tuple[Past, ...], prefixes: Prefixes
    ) -> tuple[Float[Array, "batch beam size"], tuple[Past, ...]]:
        """Logits of the prefixes' next level, and the cache with the last code's keys and values."""
        if prefixes.level == 0:  # the history's last token predicts the first code
            return self.head(context.last[:, None, :], 0), cache
        level = prefixes.level - 1
        x = self.tables[level](prefixes.codes[..., level]).astype(self.config.backbone.dtype.value)
        position, new = jnp.sum(context.real, axis=1, keepdims=True) + level, []
        for block, history, past in zip(self.backbone.blocks, context.blocks, cache, strict=True):
            own = gather_ancestors(past, prefixes.ancestors[..., 1:])  # the first step wrote no entry
            x, kv = block(x, _attend_after(history, context.real, own, position), None)
            new.append(kv)
        return self.head(self.backbone.norm(x), prefixes.level), append_level(cache, new)

    def _token_segments(self, segments: Int[Array, "b t"]) -> Int[Array, "b tokens"]:
        return jnp.repeat(segments, len(self.level_sizes), axis=1)


def _attend_after(history: KeyValue, real: Array, past: Past, position: Int[Array, "batch 1"]) -> Attend:
    def attend(q: Array, kv: KeyValue) -> tuple[Array, KeyValue]:
        kv = KeyValue(rotate(kv.keys, position), kv.values)
        return attend_history(rotate(q, position), history, real, (*past, kv)), kv

    return attend
