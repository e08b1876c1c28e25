"""The interface of all quantizers, and their results."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, Integer


class QuantizerLosses(NamedTuple):
    """Unweighted losses: `codebook` moves code vectors to inputs, `commitment` inputs to code vectors (arXiv
    1711.00937, eq. 3)."""

    codebook: Float[Array, ""]
    commitment: Float[Array, ""]


class Quantized(NamedTuple):
    """Codes, the vectors that they decode to (in the input's dtype, differentiable), and losses in float32."""

    codes: Int[Array, "*b level"]
    vectors: Float[Array, "*b dim"]
    losses: QuantizerLosses


@runtime_checkable
class Quantizer(Protocol):
    """A map from vectors to short tuples of codes and back; code `l` lies in `0 .. level_sizes[l] - 1`."""

    @property
    def level_sizes(self) -> tuple[int, ...]: ...

    def __call__(self, x: Float[Array, "*b dim"], *, mask: Bool[Array, "*b"] | None = None) -> Quantized: ...

    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]: ...

    def decode(self, codes: Integer[Array, "*b level"]) -> Float[Array, "*b dim"]: ...
