"""What every model of codes begins and ends with: items embedded by their codes, logits of a level's codes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seq_models.layers import TransformerConfig, linear, products
from seq_models.types import Inputs


@dataclass(frozen=True)
class CodeConfig:
    """What the configs of all models of codes share."""

    backbone: TransformerConfig = TransformerConfig(dropout=0.1)
    """Reads the history."""
    tied_heads: bool = True
    """Score a level's codes by the embeddings that the input uses; if not, by tables of their own."""
    id_embedding: bool = False
    """Add a learned embedding of the item's row to the input. A hybrid: it knows nothing of new items."""


class CodeLayers(nnx.Module):
    """The embedding table and output head of every level, and the other inputs of a position."""

    def __init__(
        self, config: CodeConfig, *, level_sizes: tuple[int, ...], num_features: int, num_ids: int, rngs: nnx.Rngs
    ) -> None:
        self.config, self.level_sizes, dim = config, tuple(level_sizes), config.backbone.dim
        if not self.level_sizes or min(self.level_sizes) < 1:
            raise ValueError(f"expected level_sizes of at least 1, one or more of them, got {self.level_sizes}")
        if config.id_embedding and num_ids < 1:
            raise ValueError(f"id_embedding needs num_ids of at least 1, got {num_ids}")
        self.tables = self._new_tables(rngs)
        self.project = linear(config.backbone, num_features, dim, rngs, bias=True) if num_features else None
        self.ids = embedding(num_ids, dim, rngs) if config.id_embedding else None

    def add_heads(self, rngs: nnx.Rngs) -> None:
        """The output side; apart from the input side, so that a model's own layers may be drawn between them."""
        self.heads = None if self.config.tied_heads else self._new_tables(rngs)
        self.biases = nnx.List([nnx.Param(jnp.zeros((size,))) for size in self.level_sizes])

    def _new_tables(self, rngs: nnx.Rngs) -> nnx.List:
        return nnx.List([embedding(size, self.config.backbone.dim, rngs) for size in self.level_sizes])

    def item_states(self, inputs: Inputs) -> Float[Array, "b t dim"]:
        """One position an item: the sum of everything known of it."""
        return self._with_others(functools.reduce(jnp.add, self._embedded(inputs)), inputs)

    def token_states(self, inputs: Inputs) -> Float[Array, "b tokens dim"]:
        """One position a code, `t * levels` of them. What else is known of an item stands at its last code alone:
        the codes before it are what its own later codes are predicted from."""
        *first, last = self._embedded(inputs)
        tokens = jnp.stack([*first, self._with_others(last, inputs)], axis=2)
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])

    def _embedded(self, inputs: Inputs) -> list[Float[Array, "b t dim"]]:
        if inputs.mixtures is None:
            return [table(inputs.codes[..., level]) for level, table in enumerate(self.tables)]
        # At full precision, so that the mixture of one code is its row of the table.
        mean = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        levels = zip(inputs.mixtures, self.tables, strict=True)
        return [mean(mixture, table.embedding[...]) for mixture, table in levels]

    def _with_others(self, x: Array, inputs: Inputs) -> Array:
        if self.project is not None and inputs.dense is not None:
            x = x + self.project(inputs.dense).astype(x.dtype)
        if self.ids is not None and inputs.ids is not None:
            x = x + self.ids(inputs.ids)
        return x

    def head(self, x: Float[Array, "*b dim"], level: int) -> Float[Array, "*b size"]:
        """Logits of a level's codes."""
        table = self.tables[level] if self.heads is None else self.heads[level]
        return products(x, table.embedding[...], self.config.backbone.dtype) + spread(self.biases[level][...], x.ndim)


def embedding(size: int, dim: int, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(size, dim, embedding_init=nnx.initializers.normal(dim**-0.5), rngs=rngs)


def spread(vector: Float[Array, " dim"], ndim: int) -> Float[Array, "*b dim"]:
    """With leading axes of one, to be added to an array of `ndim` axes."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))
