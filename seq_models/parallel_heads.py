"""Parallel heads (RPG, Hou et al., KDD 2025, arXiv 2506.05781): all codes of the next item at once, from one state.

The codes of an item are independent given the history: p(item | history) is the product of the heads' probabilities, so
that the order of the codes does not matter. A head is a residual block (its matrix initialized to zero, as in RPG), and
scores a level's codes by cosines with their embeddings, divided by a temperature.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.codes import CodeConfig
from seq_models.layers import products, unit
from seq_models.state_decoder import StateDecoder
from seq_models.types import Inputs, Prefixes


@dataclass(frozen=True)
class ParallelHeadsConfig(CodeConfig):
    """RPG: one head per level, which reads only the state after the history; for unordered codes (`opq`) and wide
    beams."""

    name: ClassVar[str] = "parallel-heads"
    title: ClassVar[str] = "parallel heads (RPG)"
    decodes_from_state: ClassVar[bool] = True

    temperature: float = 0.03
    """Temperature: divides the cosines between the heads' outputs and the embeddings of codes."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {self.temperature}")

    def build(
        self, *, level_sizes: tuple[int, ...], num_items: int, num_features: int, rngs: nnx.Rngs
    ) -> ParallelHeads:
        """ParallelHeads with fresh parameters."""
        return ParallelHeads(self, level_sizes=level_sizes, num_features=num_features, num_items=num_items, rngs=rngs)


class ParallelHeads(StateDecoder):
    """A model of the next item's codes with one head per level, which reads only the state after the history.

    See RQTransformer for arguments. An item's position is the mean of its code embeddings, not their sum.
    """

    def __init__(
        self,
        config: ParallelHeadsConfig,
        *,
        level_sizes: tuple[int, ...],
        num_features: int = 0,
        num_items: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, level_sizes=level_sizes, num_features=num_features, num_items=num_items, rngs=rngs)
        dim, dtype, zeros = config.backbone.dim, config.backbone.dtype.value, nnx.initializers.zeros_init()
        blocks = [nnx.Linear(dim, dim, kernel_init=zeros, dtype=dtype, rngs=rngs) for _ in self.level_sizes]
        self.temperature, self.blocks = config.temperature, nnx.List(blocks)
        self.heads = None if config.tied_heads else self._new_tables(rngs)

    def item_states(self, inputs: Inputs) -> Float[Array, "b t dim"]:
        """One position per item: the mean of its code embeddings, and the embeddings of its other inputs."""
        mean = functools.reduce(jnp.add, self._embedded(inputs)) / len(self.level_sizes)
        return self._with_others(mean, inputs)

    def head(self, x: Float[Array, "*b dim"], level: int) -> Float[Array, "*b size"]:
        """Logits of a level's codes after a state."""
        table = self.tables[level] if self.heads is None else self.heads[level]
        x = unit(x + jax.nn.silu(self.blocks[level](x))) / self.temperature
        return products(x, unit(table.embedding[...]), self.config.backbone.dtype)

    def depth_logits(
        self, states: Float[Array, "*n dim"], targets: Int[Array, "*n level"], *, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "*n _"], ...]:
        """Logits of every level of the item after each of the given states; they do not depend on `targets`."""
        del targets, key
        return tuple(self.head(states, level) for level in range(len(self.level_sizes)))

    def init_cache(self, context: Float[Array, "batch dim"]) -> tuple[()]:
        """The empty cache; levels share nothing."""
        return ()

    def decode_step(
        self, context: Float[Array, "batch dim"], cache: tuple[()], prefixes: Prefixes
    ) -> tuple[Float[Array, "batch beam size"], tuple[()]]:
        """Logits of the next level, the same for all prefixes of a user."""
        logits = self.head(context, prefixes.level)[:, None]
        return jnp.broadcast_to(logits, (*prefixes.codes.shape[:2], logits.shape[-1])), cache
