"""Optimized product quantization: unordered codes, one per part of the rotated vector."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from quantizers import ProductKMeans
from semid.config import check_range
from semid.errors import SemidError
from semid.tokenizers.method import FitContext, TokenizerMethod, shrunk_to


@dataclass(frozen=True)
class ProductConfig(TokenizerMethod):
    """Optimized product quantization: many unordered codes, one per part of the rotated vector (RPG)."""

    level_sizes: tuple[int, ...] = ()
    """Codebook size of each code; 4 to 64 codes are usual. None given: 16 codes of the power of two nearest to a
    quarter of the items, from 16 to 256."""
    iterations: int = 25
    """Lloyd iterations."""
    rotations: int = 8
    """Rounds that learn the rotation; 0: plain product quantization."""
    name = "opq"
    default_levels = 16

    def __post_init__(self) -> None:
        check_range(self, "level_sizes", at_least=1)
        check_range(self, "iterations", "rotations", at_least=0)
        if len(set(self.level_sizes)) > 1:
            raise SemidError(f"product codes have one size, got {self.level_sizes}; make all level_sizes the same")

    def fit(self, x: Float[np.ndarray, "items dim"], context: FitContext) -> ProductKMeans:
        dim, number = x.shape[1], len(self.level_sizes)
        if dim % number:
            near = min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - number))
            raise SemidError(
                f"{number} product codes cannot share {dim} content dimensions equally; choose a number of level_sizes "
                f"that divides them, such as {near} (--level-sizes {self.level_sizes[0]} {self.level_sizes[0]} ...)"
            )
        return ProductKMeans.fit(
            jnp.asarray(x),
            level_sizes=shrunk_to(len(x), self).level_sizes,
            iterations=self.iterations,
            rotation_rounds=self.rotations,
            key=jax.random.key(context.seed),
        )

    def build(self, dim: int) -> ProductKMeans:
        parts, codes = len(self.level_sizes), self.level_sizes[0]
        return ProductKMeans(jnp.zeros((parts, codes, dim // parts)), jnp.zeros((dim, dim)))
