"""SASRec (Kang & McAuley, ICDM 2018) with full-softmax cross-entropy: the backbone over ids, tied output."""

from __future__ import annotations

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.layers import Backbone, TransformerConfig, last_state, linear, products


@dataclass(frozen=True)
class DenseConfig:
    """The backbone's size. The item vectors are learned by id, and are the output matrix as well."""

    backbone: TransformerConfig = TransformerConfig(dropout=0.3)


class DenseTransformer(nnx.Module):
    """Scores every id as the next one by the inner product of its vector with the history's state.

    An id's vector is a learned embedding, plus a projection of its dense feature where there is one.
    """

    def __init__(self, config: DenseConfig, *, num_ids: int, num_features: int = 0, rngs: nnx.Rngs) -> None:
        dim, self.dtype = config.backbone.dim, config.backbone.dtype
        self.ids = nnx.Embed(num_ids, dim, embedding_init=nnx.initializers.normal(dim**-0.5), rngs=rngs)
        self.project = linear(config.backbone, num_features, dim, rngs, bias=True) if num_features else None
        self.backbone = Backbone(config.backbone, rngs=rngs)

    def vectors(self, features: Float[Array, "ids feature"] | None) -> Float[Array, "ids dim"]:
        """The vector of every id."""
        table = self.ids.embedding[...]
        return table if self.project is None or features is None else table + self.project(features).astype(table.dtype)

    def states(
        self,
        vectors: Float[Array, "ids dim"],
        history: Int[Array, "b t"],
        segments: Int[Array, "b t"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t dim"]:
        """Backbone states of histories of ids, in the dtype in which they are to be multiplied with the vectors."""
        states = self.backbone(vectors[history] * (vectors.shape[-1] ** 0.5), segments, key=key)
        return states.astype(self.dtype.value)

    def scores(
        self, vectors: Float[Array, "ids dim"], history: Int[Array, "b t"], segments: Int[Array, "b t"]
    ) -> Float[Array, "b ids"]:
        """Logits of every id after the history of each row, padded on either side."""
        return products(last_state(self.states(vectors, history, segments), segments), vectors, self.dtype)
