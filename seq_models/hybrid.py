"""A generator of codes with a dense head over item vectors (LIGER, arXiv 2411.18814).

Beams of codes propose items, the dense head ranks them beside the items whose codes nobody has learned: it knows an
item by its content alone. Unlike there, the backbone is that of the RQ-Transformer, every position is a query, and
items are known to the head by two layers over their dense input.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seq_models.layers import linear, products
from seq_models.rq_transformer import RQTransformer, RQTransformerConfig


@dataclass(frozen=True)
class HybridConfig(RQTransformerConfig):
    """The generator's, and the dense head's temperature."""

    temperature: float = 0.07
    """Of the cosines between states and item vectors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {self.temperature}")


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
        num_ids: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        if num_features < 1:
            raise ValueError("the dense head knows items by their dense input; give it vector columns as features")
        super().__init__(config, level_sizes=level_sizes, num_features=num_features, num_ids=num_ids, rngs=rngs)
        self.temperature, dim = config.temperature, config.backbone.dim
        self.item_hidden = linear(config.backbone, num_features, 2 * dim, rngs, bias=True)
        self.item_out = linear(config.backbone, 2 * dim, dim, rngs)

    def vectors(self, features: Float[Array, "items feature"]) -> Float[Array, "items dim"]:
        """Item vectors of length 1."""
        return _unit(self.item_out(jax.nn.silu(self.item_hidden(features))))

    def queries(self, states: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        """States such that their inner products with item vectors are logits: cosines over the temperature."""
        return _unit(states) / self.temperature

    def scores(self, states: Float[Array, "b dim"], vectors: Float[Array, "items dim"]) -> Float[Array, "b items"]:
        """Logits of every item."""
        return products(self.queries(states), vectors, self.config.backbone.dtype)


def _unit(x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
