"""Health of a code assignment, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from quantizers.collisions import collision_groups


@dataclass(frozen=True)
class LevelHealth:
    """`usage`: share of codes in use; `dead`: number of the others; `entropy` in nats; `perplexity` is its exp."""

    size: int
    usage: float
    dead: int
    entropy: float
    perplexity: float


@dataclass(frozen=True)
class CodeHealth:
    """`collision_rate`: share of items whose codes another item has too. `dataclasses.asdict` gives JSON types."""

    items: int
    levels: tuple[LevelHealth, ...]
    collision_rate: float
    largest_group: int


def health(codes: Int[np.ndarray, "items level"], level_sizes: Sequence[int]) -> CodeHealth:
    """Raises ValueError for no items, a wrong number of levels, or a code outside its level."""
    _check(codes, level_sizes)
    group_sizes = np.bincount(collision_groups(codes))
    return CodeHealth(
        items=len(codes),
        levels=tuple(_level_health(codes[:, level], size) for level, size in enumerate(level_sizes)),
        collision_rate=float(group_sizes[group_sizes > 1].sum() / len(codes)),
        largest_group=int(group_sizes.max()),
    )


def reconstruction_error(x: Float[np.ndarray, "n dim"], reconstruction: Float[np.ndarray, "n dim"]) -> float:
    """Mean squared error over items and dimensions."""
    if x.shape != reconstruction.shape or x.size == 0:
        raise ValueError(
            f"reconstruction_error: expected two equal, non-empty shapes, got {x.shape}, {reconstruction.shape}"
        )
    return float(np.square(np.subtract(x, reconstruction, dtype=np.float64)).mean())


def _level_health(codes: Int[np.ndarray, " items"], size: int) -> LevelHealth:
    counts = np.bincount(codes, minlength=size)
    shares = counts[counts > 0] / len(codes)
    entropy = float(-(shares * np.log(shares)).sum()) + 0.0  # no -0.0
    return LevelHealth(size, len(shares) / size, size - len(shares), entropy, float(np.exp(entropy)))


def _check(codes: Int[np.ndarray, "items level"], level_sizes: Sequence[int]) -> None:
    if codes.ndim != 2 or codes.shape[1] != len(level_sizes) or len(codes) == 0:
        raise ValueError(f"health: expected codes of shape [items >= 1, {len(level_sizes)}], got {codes.shape}")
    outside = np.argwhere((codes < 0) | (codes >= np.asarray(level_sizes)))
    if len(outside):
        row, level = outside[0]
        found = codes[row, level]
        raise ValueError(f"health: code {found} of row {row}, level {level} lies outside 0..{level_sizes[level] - 1}")
