"""Residual k-means: the tokenization method without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from quantizers import ResidualKMeans, balanced_kmeans, kmeans
from semid.catalog import Residuals
from semid.config import check_range
from semid.tokenizers.blocks import map_blocks
from semid.tokenizers.method import (
    FitContext,
    TokenizerMethod,
    last_residuals,
)


@dataclass(frozen=True)
class RQKmeansConfig(TokenizerMethod):
    """Residual k-means on the content vectors: no training, nearly the same quality."""

    level_sizes: tuple[int, ...] = ()
    """Codebook size of each level; none given: three levels of the power of two nearest to a quarter of the items, from
    16 to 256."""
    iterations: int = 25
    """Lloyd iterations per level."""
    balanced: bool = False
    """Fit codebooks to clusters of equal size (OneRec). Items then take the nearest code, so usage is more even than
    without, not equal."""
    unit_norm: bool | None = None
    """Scale residuals to norm 1 before each further level, which then uses its whole codebook; else a few items with
    large residuals take most of its codes. None given: no."""
    name = "rq-kmeans"
    is_residual = True

    def __post_init__(self) -> None:
        check_range(self, "level_sizes", at_least=1)
        check_range(self, "iterations", at_least=0)

    def fit(self, x: Float[np.ndarray, "items dim"], context: FitContext) -> ResidualKMeans:
        return fit_kmeans(x, self, seed=context.seed)

    def build(self, dim: int) -> ResidualKMeans:
        norms = jnp.ones(len(self.level_sizes)) if self.unit_norm else None
        return ResidualKMeans(tuple(jnp.zeros((size, dim)) for size in self.level_sizes), norms)

    def last_residuals(self, model: Any, x: Float[np.ndarray, "n dim"], codes: Int[np.ndarray, "n level"]) -> Residuals:
        if self.unit_norm:
            return Residuals(map_blocks(model.last_inputs, x), np.asarray(model.codebooks[-1]))
        return last_residuals(model, x, codes)


def fit_kmeans(x: Float[np.ndarray, "items dim"], config: RQKmeansConfig, *, seed: int) -> ResidualKMeans:
    """Fit residual k-means to vectors in memory."""
    return ResidualKMeans.fit(
        jnp.asarray(x),
        level_sizes=config.level_sizes,
        iterations=config.iterations,
        cluster=balanced_kmeans if config.balanced else kmeans,
        unit_norm=bool(config.unit_norm),
        key=jax.random.key(seed),
    )
