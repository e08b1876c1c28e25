"""Metrics of code assignments: usage, fidelity to vectors, information about targets. Deterministic, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import LinearOperator, cg

from quantizers.collisions import collision_groups

_BLOCK_ENTRIES = 2**25  # distances per block: 128 MiB
_TIE = 1e-5  # squared distances that differ by less than this share of the mean squared norm are equal in float32
_FOLDS = 5
_RIDGES = (1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class LevelHealth:
    """Usage of the codes of one level.

    `usage`: share of codes in use; `dead`: number of unused codes; `entropy` in nats; `perplexity`: exp(entropy).

    `gini`: inequality of the item counts over all codes, from 0 (all equal) to 1 - 1 / size (all items on one code).
    """

    size: int
    usage: float
    dead: int
    entropy: float
    perplexity: float
    gini: float


@dataclass(frozen=True)
class CodeHealth:
    """Usage of all levels, and collisions. `dataclasses.asdict` gives JSON types.

    `collision_rate`: share of items that share all codes with another item.
    """

    items: int
    levels: tuple[LevelHealth, ...]
    collision_rate: float
    largest_group: int


def health(codes: Integer[np.ndarray, "items level"], level_sizes: Sequence[int]) -> CodeHealth:
    """Usage and collisions of a code assignment.

    Raises ValueError for no items, a wrong number of levels, or a code outside its level.
    """
    _check(codes, level_sizes, where="health")
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


def neighbor_preservation(
    x: Float[np.ndarray, "items dim"], reconstruction: Float[np.ndarray, "items dim"], *, k: int, sample: int, seed: int
) -> float:
    """Share of an item's `k` nearest neighbors that are also its `k` nearest in the reconstruction.

    Averaged over `sample` random items (at most all); neighbors are among all items. Items that tie for the last
    places, as many do under colliding codes, count in equal parts. Costs sample * items * dim.
    """
    if x.ndim != 2 or x.shape != reconstruction.shape or not 1 <= k < len(x) or sample < 1:
        raise ValueError(
            "neighbor_preservation: expected two equal shapes [items, dim], 1 <= k < items and sample >= 1, "
            f"got {x.shape}, {reconstruction.shape}, {k} and {sample}"
        )
    spaces = [_centered(x), _centered(reconstruction)]
    rows = np.random.default_rng(seed).permutation(len(x))[:sample]
    kept = 0.0
    for block in np.array_split(rows, -(-len(rows) * len(x) // _BLOCK_ENTRIES)):
        kept += float(np.minimum(*(_among_nearest(space, block, k) for space in spaces)).sum(dtype=np.float64))
    return kept / (k * len(rows))


def neighbor_prefix_overlap(
    codes: Integer[np.ndarray, "items level"], neighbors: Integer[np.ndarray, "items k"]
) -> Float[np.ndarray, " level"]:
    """Share of the pairs of an item and its neighbors (rows; -1: none) with the same first 1, 2, ... codes."""
    if codes.ndim != 2 or neighbors.ndim != 2 or len(codes) != len(neighbors):
        raise ValueError(
            f"neighbor_prefix_overlap: expected codes [items, level] and neighbors [items, k], got {codes.shape} and "
            f"{neighbors.shape}"
        )
    if neighbors.max(initial=-1) >= len(codes) or (neighbors < 0).all():
        raise ValueError(
            f"neighbor_prefix_overlap: expected neighbors below {len(codes)}, and at least one that is not -1"
        )
    same, shared = neighbors >= 0, []
    pairs = same.sum()
    for level in codes.T:
        same = same & (level[neighbors] == level[:, None])
        shared.append(same.sum() / pairs)
    return np.array(shared)


def linear_probe_r2(
    codes: Integer[np.ndarray, "items level"], target: Float[np.ndarray, " items"], *, level_sizes: Sequence[int]
) -> Float[np.ndarray, " level"]:
    """Held-out R^2 of a linear probe of `target` (say log-popularity) from one-hot codes of levels 1..l, for each l.

    Ridge regression in 5 fixed folds, compared with the mean of the other four folds, with the best of 4 penalties, so
    that uninformative codes score about 0 however many there are. Raises ValueError for a constant target.
    """
    _check(codes, level_sizes, where="linear_probe_r2")
    if target.shape != (len(codes),) or len(codes) < _FOLDS or not np.isfinite(target).all() or np.ptp(target) == 0:
        raise ValueError(
            f"linear_probe_r2: expected {len(codes)} (at least {_FOLDS}) finite values that vary, one per item, "
            f"got {target.dtype} {target.shape}"
        )
    one_hot, target = _one_hot(codes, level_sizes), target.astype(np.float64)
    fold = np.random.default_rng(0).permutation(len(codes)) % _FOLDS
    ends = np.cumsum(level_sizes)
    errors = np.stack([_probe_errors(one_hot, target, fold == held, ends) for held in range(_FOLDS)])
    best = (errors.sum(0) - errors).argmin(-1, keepdims=True)  # choose a fold's penalty by the errors of other folds
    missed = np.take_along_axis(errors, best, axis=-1)[..., 0].sum(0)
    return 1 - missed[1:] / missed[0]


def _level_health(codes: Integer[np.ndarray, " items"], size: int) -> LevelHealth:
    counts = np.bincount(codes, minlength=size)
    shares = counts[counts > 0] / len(codes)
    entropy = float(-(shares * np.log(shares)).sum()) + 0.0  # no -0.0
    return LevelHealth(size, len(shares) / size, size - len(shares), entropy, float(np.exp(entropy)), _gini(counts))


def _gini(counts: Int[np.ndarray, " codes"]) -> float:
    size, weights = len(counts), 2 * np.arange(len(counts)) + 1 - len(counts)
    return float(weights @ np.sort(counts) / (size * counts.sum()))


def _check(codes: Integer[np.ndarray, "items level"], level_sizes: Sequence[int], *, where: str) -> None:
    if codes.ndim != 2 or codes.shape[1] != len(level_sizes) or len(codes) == 0:
        raise ValueError(f"{where}: expected codes of shape [items >= 1, {len(level_sizes)}], got {codes.shape}")
    outside = np.argwhere((codes < 0) | (codes >= np.asarray(level_sizes)))
    if len(outside):
        row, level = outside[0]
        found = codes[row, level]
        raise ValueError(f"{where}: code {found} of row {row}, level {level} lies outside 0..{level_sizes[level] - 1}")


def _centered(x: Float[np.ndarray, "items dim"]) -> Float[np.ndarray, "items dim"]:
    """In float32; the expanded distance loses digits far from the origin."""
    bad = ~np.isfinite(x).all(-1)
    if bad.any():
        raise ValueError(f"neighbor_preservation: expected finite vectors, got NaN or infinity in row {bad.argmax()}")
    return x.astype(np.float32) - x.mean(0, dtype=np.float64).astype(np.float32)


def _among_nearest(
    x: Float[np.ndarray, "items dim"], rows: Int[np.ndarray, " n"], k: int
) -> Float[np.ndarray, "n items"]:
    """Part of each item that is among a row's `k` nearest: 1, 0, or a share where items tie for the last places."""
    norms = np.square(x).sum(-1)
    distances = norms - 2 * (x[rows] @ x.T)  # less the rows' own norms
    distances[np.arange(len(rows)), rows] = np.inf
    last = np.partition(distances, k - 1, axis=1)[:, k - 1 : k]
    tie = _TIE * norms.mean()
    inside, tied = distances < last - tie, np.abs(distances - last) <= tie
    share = (k - inside.sum(1)) / tied.sum(1)
    return inside + tied * share.astype(np.float32)[:, None]


def _one_hot(codes: Integer[np.ndarray, "items level"], level_sizes: Sequence[int]) -> csr_array:
    items, levels = codes.shape
    columns = codes + (np.cumsum(level_sizes) - level_sizes)
    starts = np.arange(0, items * levels + 1, levels)
    return csr_array((np.ones(codes.size), columns.reshape(-1), starts), shape=(items, sum(level_sizes)))


def _probe_errors(
    one_hot: csr_array,
    target: Float[np.ndarray, " items"],
    held: Bool[np.ndarray, " items"],
    ends: Int[np.ndarray, " level"],
) -> Float[np.ndarray, "level+1 ridge"]:
    """Sums of squared errors on the held-out items without codes, then with the columns up to each of `ends`."""
    train, test = one_hot[~held], one_hot[held]
    mean = target[~held].mean()
    centered, wanted = target[~held] - mean, target[held] - mean
    errors = [[wanted @ wanted] * len(_RIDGES)]
    for end in ends:
        seen, unseen = train[:, :end], test[:, :end]
        weights = [_ridge_weights(seen, centered, ridge=ridge) for ridge in _RIDGES]
        errors.append([float(np.square(wanted - unseen @ found).sum()) for found in weights])
    return np.array(errors)


def _ridge_weights(
    one_hot: csr_array, target: Float[np.ndarray, " items"], *, ridge: float
) -> Float[np.ndarray, " column"]:
    """Weights by conjugate gradients, which needs only products with `one_hot`: the Gram matrix would be dense."""
    transposed = one_hot.T
    normal = LinearOperator(
        (one_hot.shape[1],) * 2, matvec=lambda v: transposed @ (one_hot @ v) + ridge * v, dtype=np.float64
    )
    return cg(normal, transposed @ target, rtol=1e-8, M=diags_array(1 / (one_hot.sum(0) + ridge)))[0]
