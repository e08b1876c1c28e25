"""Row-wise functions applied in blocks, so that memory is bounded and few shapes are compiled."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# Rows of a block.
BLOCK = 8192


def map_blocks(function: Callable[[Array], Array], x: Array | np.ndarray, *, size: int = BLOCK) -> np.ndarray:
    """Apply `function`, which works row by row, to all rows of `x`, a block of `size` at a time; the result is on the
    host.

    A short block is padded to a power of two, so that few shapes are compiled.
    """
    blocks = [x[at : at + size] for at in range(0, len(x), size)] or [x]
    padded = [min(1 << (len(block) - 1).bit_length(), size) for block in blocks]
    results = (function(jnp.asarray(pad_rows(block, rows=rows))) for block, rows in zip(blocks, padded, strict=True))
    return np.concatenate([np.asarray(out)[: len(block)] for out, block in zip(results, blocks, strict=True)])


def pad_rows(x: Array | np.ndarray, *, rows: int) -> Array | np.ndarray:
    """`x` followed by rows of zeros, `rows` in all."""
    if len(x) == rows:
        return x
    full = np.zeros((rows, *x.shape[1:]), x.dtype)
    full[: len(x)] = x
    return full
