"""Encoder-decoder over codes, as in TIGER (Rajput et al., NeurIPS 2023).

The encoder reads the codes of a history bidirectionally, one token per code or, for histories as sets (MMGRec, arXiv
2404.16555), one per item without positions. The decoder generates the codes of the next item. Keys and values of the
cross-attention are computed once per user and shared by all beams. Differences from TIGER's T5: rotary positions
instead of position buckets, SwiGLU, and an embedding table and a head per level.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from seq_models.attention import KeyValue, Past, append_level, attend_past, gather_ancestors, rotate
from seq_models.backbones import Transformer, attend_within
from seq_models.codes import CodeConfig, CodeModel
from seq_models.layers import (
    Attend,
    Block,
    TransformerConfig,
    dropout,
    fused,
    linear,
    norm,
    split_key,
)
from seq_models.types import Decoded, Inputs, Layout, Prefixes


@dataclass(frozen=True)
class EncoderDecoderConfig(CodeConfig):
    """TIGER: an encoder over all codes of a history, and a decoder with cross-attention; for comparison with papers.

    The decoder has the width of the encoder (`backbone`).
    """

    name: ClassVar[str] = "encoder-decoder"
    title: ClassVar[str] = "encoder-decoder (TIGER)"

    decoder_layers: int = 2
    """Blocks of the decoder."""
    # "later": added after configs were stored, which omit the field at its default.
    order_free: bool = field(default=False, metadata={"later": True})
    """Histories are sets (MMGRec): the encoder reads one position per item, the sum of its codes, and no order."""

    def __post_init__(self) -> None:
        if self.decoder_layers < 1:
            raise ValueError(f"expected decoder_layers of at least 1, got {self.decoder_layers}")

    def build(
        self, *, level_sizes: tuple[int, ...], num_items: int, num_features: int, rngs: nnx.Rngs
    ) -> EncoderDecoder:
        """An EncoderDecoder with fresh parameters."""
        return EncoderDecoder(self, level_sizes=level_sizes, num_features=num_features, num_items=num_items, rngs=rngs)


class Memory(NamedTuple):
    """Inputs of cross-attention: keys and values for every block of the decoder, and a mask of the real tokens."""

    blocks: tuple[KeyValue, ...]
    real: Bool[Array, "batch tokens"]


class CrossAttention(nnx.Module):
    """Attention from the decoder's states to the encoder's."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.heads = config.heads
        self.q = linear(config, config.dim, config.dim, rngs)
        self.kv = fused(config, config.dim, (2, config.kv_heads or config.heads, config.dim // config.heads), rngs)
        self.out = linear(config, config.dim, config.dim, rngs)

    def remember(self, states: Float[Array, "b t dim"]) -> KeyValue:
        """Keys and values of the encoder's states."""
        return KeyValue(*jnp.moveaxis(self.kv(states), -3, 0))

    def __call__(
        self, x: Float[Array, "b n dim"], memory: KeyValue, real: Bool[Array, "b t"]
    ) -> Float[Array, "b n dim"]:
        q = self.q(x).reshape((*x.shape[:-1], self.heads, -1))
        return self.out(jax.nn.dot_product_attention(q, *memory, mask=real[:, None, None, :]).reshape(x.shape))


class DecoderBlock(nnx.Module):
    """A pre-norm block with cross-attention between its halves."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.rate = config.rate
        self.block = Block(config, rngs=rngs)
        self.norm_cross = norm(config, rngs)
        self.cross = CrossAttention(config, rngs=rngs)

    def __call__(
        self, x: Array, attend: Attend, memory: KeyValue, real: Array, key: Key[Array, ""] | None
    ) -> tuple[Array, KeyValue]:
        first, second, third = split_key(key, 3)
        x, kept = self.block.mix(x, attend, first)
        x = x + dropout(self.cross(self.norm_cross(x), memory, real), self.rate, second)
        return self.block.feed_forward(x, third), kept


class EncoderDecoder(CodeModel):
    """Autoregressive model of the next item's codes given the codes of a history. See RQTransformer for arguments."""

    layout = Layout.SINGLE

    def __init__(
        self,
        config: EncoderDecoderConfig,
        *,
        level_sizes: tuple[int, ...],
        num_features: int = 0,
        num_items: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, level_sizes=level_sizes, num_features=num_features, num_items=num_items, rngs=rngs)
        self.order_free, dim = config.order_free, config.backbone.dim
        self.encoder = Transformer(config.backbone, causal=False, rotary=not config.order_free, rngs=rngs)
        self.begin = nnx.Param(nnx.initializers.normal(dim**-0.5)(rngs.params(), (dim,)))
        self.decoder = nnx.List([DecoderBlock(config.backbone, rngs=rngs) for _ in range(config.decoder_layers)])
        self.norm = norm(config.backbone, rngs)
        self.add_heads(rngs)

    def decode(
        self,
        inputs: Inputs,
        segments: Int[Array, "b t"],
        targets: Int[Array, "b level"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Decoded:
        """Teacher-forced logits of every level of the item after each history, and the decoder's first states."""
        encoder_key, decoder_key = split_key(key, 2)
        memory = self._memory(inputs, segments, encoder_key)
        written = [self._decoder_input(targets[:, None], level) for level in range(len(self.level_sizes))]
        x = jnp.concatenate(written, axis=1)
        attend = attend_within(jnp.ones(x.shape[:2], jnp.int32), causal=True)
        x, _ = self._decode(x, [attend] * len(self.decoder), memory, decoder_key)
        states = [x[:, level] for level in range(len(self.level_sizes))]
        return Decoded(tuple(self.head(state, level) for level, state in enumerate(states)), states[0])

    def encode_history(self, inputs: Inputs, segments: Int[Array, "b t"]) -> Memory:
        """Encode rows with one history each."""
        return self._memory(inputs, segments, None)

    def init_cache(self, context: Memory) -> tuple[Past, ...]:
        """The empty cache."""
        return ((),) * len(self.decoder)

    def decode_step(
        self, context: Memory, cache: tuple[Past, ...], prefixes: Prefixes
    ) -> tuple[Float[Array, "batch beam size"], tuple[Past, ...]]:
        """Logits of the prefixes' next level, and the cache with this step's keys and values."""
        attends = [_attend_after(gather_ancestors(past, prefixes.ancestors)) for past in cache]
        x, new = self._decode(self._decoder_input(prefixes.codes, prefixes.level), attends, context, None)
        return self.head(x, prefixes.level), append_level(cache, new)

    def _memory(self, inputs: Inputs, segments: Int[Array, "b t"], key: Key[Array, ""] | None) -> Memory:
        if self.order_free:
            tokens, of_tokens = self.item_states(inputs), segments
        else:
            tokens, of_tokens = self.token_states(inputs), jnp.repeat(segments, len(self.level_sizes), axis=1)
        states = self.encoder(tokens, of_tokens, key=key)
        return Memory(tuple(block.cross.remember(states) for block in self.decoder), of_tokens != 0)

    def _decoder_input(self, codes: Int[Array, "b beam level"], level: int) -> Float[Array, "b beam dim"]:
        """Input of the decoder at `level`: the embedding of the code before it."""
        if level:
            return self.tables[level - 1](codes[..., level - 1])
        begin = self.begin[...]
        return jnp.broadcast_to(begin[None, None], (*codes.shape[:2], len(begin)))

    def _decode(
        self, x: Float[Array, "b n dim"], attends: list[Attend], memory: Memory, key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "b n dim"], list[KeyValue]]:
        """The decoder's states, and the keys and values of its self-attention."""
        config, new = self.config.backbone, []
        input_key, *block_keys = split_key(key, len(self.decoder) + 1)
        x = dropout(x.astype(config.dtype.value), config.rate, input_key)
        for block, attend, kv, block_key in zip(self.decoder, attends, memory.blocks, block_keys, strict=True):
            run = functools.partial(block, attend=attend, real=memory.real, key=block_key)
            x, kept = config.remat(run)(x, memory=kv)
            new.append(kept)
        return self.norm(x), new


def _attend_after(past: Past) -> Attend:
    """Self-attention of one query per beam, at the position after its past."""

    def attend(q: Array, kv: KeyValue) -> tuple[Array, KeyValue]:
        position = jnp.full((1, 1), len(past))
        kv = KeyValue(rotate(kv.keys, position), kv.values)
        return attend_past(rotate(q, position), (*past, kv)), kv

    return attend
