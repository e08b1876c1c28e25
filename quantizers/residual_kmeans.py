"""Residual k-means: the training-free sibling of `ResidualQuantizer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from quantizers.residual import fit_codebooks, residual_codes, residual_decode, residual_quantize
from quantizers.types import Quantized


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidualKMeans:
    """Fixed codebooks, one a level; a pytree."""

    codebooks: tuple[Float[Array, "codes dim"], ...]

    @classmethod
    def fit(
        cls, x: Float[Array, "items dim"], *, level_sizes: Sequence[int], iterations: int, key: PRNGKeyArray
    ) -> ResidualKMeans:
        return cls(fit_codebooks(x, level_sizes=level_sizes, iterations=iterations, key=key))

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return tuple(len(codebook) for codebook in self.codebooks)

    def __call__(self, x: Float[Array, "*b dim"], *, mask: Bool[Array, "*b"] | None = None) -> Quantized:
        return residual_quantize(x, self.codebooks, mask=mask)

    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]:
        return residual_codes(x, self.codebooks).codes

    def decode(self, codes: Int[Array, "*b level"]) -> Float[Array, "*b dim"]:
        return residual_decode(codes, self.codebooks)
