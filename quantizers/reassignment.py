"""Collision policies that give colliding items other codes of the last level. Deterministic, on the host, in float64.

Both change only the last level, and only groups with a collision. They keep no state but the codes: run again on their
result, they continue from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from scipy.optimize import linear_sum_assignment

from quantizers.collisions import collision_groups

_BLOCK_ENTRIES = 2**16  # distances per block: half a MiB, which stays in the cache during the iterations
_TIE = 1e-6  # shares of a code that differ by less, relatively, are equal: rounding must not choose codes
_TINY = 1e-300
_PATIENCE = 5  # rounds of Sinkhorn without fewer collisions; in crowded groups every other round has more of them


class Reassignment(NamedTuple):
    """Codes after a policy. `moved`: items whose last code changed; `colliding`: items that still share all codes."""

    codes: Integer[np.ndarray, "items level"]
    moved: int
    colliding: int


def sinkhorn_reassign(
    codes: Integer[np.ndarray, "items level"],
    *,
    residuals: Float[np.ndarray, "items dim"],
    codebook: Float[np.ndarray, "codes dim"],
    rounds: int = 20,
    epsilon: float = 0.003,
    iterations: int = 50,
) -> Reassignment:
    """Spread each group of items with equal codes over the last level by Sinkhorn on its own distance table.

    `residuals` are the inputs of the last level, `codebook` its code vectors. As an item may move to a code that
    another item has, this is repeated: the round with the fewest colliding items counts, and rounds end early when
    nothing collides or five in a row were no better. Items with equal residuals are never separated. After LC-Rec
    (arXiv 2311.09049), which uses the last round. If an item's largest share is on several codes, it gets the nearest.
    """
    residuals, codebook = _checked(codes, residuals, codebook)
    if rounds < 0 or iterations < 1 or not epsilon > 0:
        raise ValueError(
            "sinkhorn_reassign: expected rounds >= 0, iterations >= 1 and epsilon > 0, "
            f"got {rounds}, {iterations} and {epsilon}"
        )

    def spread(rows: Int[np.ndarray, "group item"]) -> Int[np.ndarray, "group item"]:
        distances = _squared_distances(residuals[rows], codebook)
        return _sinkhorn_codes(distances, epsilon=epsilon, iterations=iterations)

    current, prefix = codes.copy(), _prefix_groups(codes)
    best, tried = _reassigned(codes, codes.copy(), prefix), 0
    for _ in range(rounds):
        if not best.colliding or tried == _PATIENCE:
            break
        groups = _groups_within(prefix, current[:, -1])
        _choose(current, _stacks(groups, np.bincount(groups) > 1, row_entries=len(codebook)), spread)
        result, tried = _reassigned(codes, current.copy(), prefix), tried + 1
        if result.colliding < best.colliding:
            best, tried = result, 0
    return best


def min_cost_reassign(
    codes: Integer[np.ndarray, "items level"],
    *,
    residuals: Float[np.ndarray, "items dim"],
    codebook: Float[np.ndarray, "codes dim"],
) -> Reassignment:
    """Make all rows unique with the least sum of squared distances between residuals and last code vectors.

    Every group of items that share all codes but the last, if it contains a collision, is assigned again, one item per
    code (linear sum assignment). Raises ValueError for such a group with more items than the codebook has codes.
    """
    residuals, codebook = _checked(codes, residuals, codebook)
    result, prefix = codes.copy(), _prefix_groups(codes)
    groups = _groups_within(prefix, codes[:, -1])
    collides = np.zeros(prefix.max(initial=-1) + 1, bool)
    collides[prefix[(np.bincount(groups) > 1)[groups]]] = True
    _check_capacity(prefix, collides, size=len(codebook))

    def assign(rows: Int[np.ndarray, "group item"]) -> Int[np.ndarray, "group item"]:
        return np.stack([linear_sum_assignment(table)[1] for table in _squared_distances(residuals[rows], codebook)])

    _choose(result, _stacks(prefix, collides, row_entries=len(codebook)), assign)
    return _reassigned(codes, result, prefix)


def _prefix_groups(codes: Integer[np.ndarray, "items level"]) -> Int[np.ndarray, " items"]:
    """Dense numbers of the groups that share all codes but the last."""
    return collision_groups(codes[:, :-1]) if codes.shape[1] > 1 else np.zeros(len(codes), np.int64)


def _groups_within(prefix: Int[np.ndarray, " items"], last: Int[np.ndarray, " items"]) -> Int[np.ndarray, " items"]:
    """Dense numbers of the groups that share all codes."""
    return collision_groups(np.column_stack([prefix, last.astype(np.int64)]))


def _stacks(
    groups: Int[np.ndarray, " items"], chosen: Bool[np.ndarray, " groups"], *, row_entries: int
) -> Iterator[Int[np.ndarray, "group item"]]:
    """Rows of the chosen groups, those of equal size stacked, in blocks with a distance table of bounded size."""
    sizes, order = np.bincount(groups), np.argsort(groups, kind="stable")
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes[chosen]):
        of_size = starts[chosen & (sizes == size)]
        step = max(1, _BLOCK_ENTRIES // (int(size) * row_entries))
        for at in range(0, len(of_size), step):
            yield order[of_size[at : at + step, None] + np.arange(size)]


def _choose(
    codes: Integer[np.ndarray, "items level"],
    stacks: Iterator[Int[np.ndarray, "group item"]],
    last: Callable[[Int[np.ndarray, "group item"]], Int[np.ndarray, "group item"]],
) -> None:
    """Set the last codes of each stack of rows to the result of `last`; stacks are independent and run in threads."""
    every = list(stacks)
    with ThreadPoolExecutor() as pool:
        for rows, chosen in zip(every, pool.map(last, every), strict=True):
            codes[rows, -1] = chosen


def _squared_distances(
    x: Float[np.ndarray, "group item dim"], codebook: Float[np.ndarray, "codes dim"]
) -> Float[np.ndarray, "group item codes"]:
    """One product per group, which keeps a group's table independent of the groups it is stacked with."""
    x = x.astype(np.float64)
    return np.square(x).sum(-1)[..., None] + np.square(codebook).sum(-1) - 2 * (x @ codebook.T)


def _sinkhorn_codes(
    distances: Float[np.ndarray, "group item codes"], *, epsilon: float, iterations: int
) -> Int[np.ndarray, "group item"]:
    """The code with an item's largest share in its group's transport plan; among equal shares, the nearest code.

    The plan is `u * kernel * v`: every code has mass 1, every item an equal part of the total. As in LC-Rec, the
    iteration ends with `v`, so that the items' shares of a code sum to exactly 1. Distances are scaled per group, to a
    range of 2.
    """
    low, high = distances.min((1, 2), keepdims=True), distances.max((1, 2), keepdims=True)
    scale = epsilon * np.maximum((high - low) / 2, _TINY)
    # Rows are scaled to a maximum of 1, which `u` absorbs. The smallest entry at epsilon .003, exp(-667), fits float64.
    kernel = np.exp((distances.min(-1, keepdims=True) - distances) / scale)
    groups, items, num_codes = distances.shape
    v = np.ones((groups, num_codes))
    for _ in range(iterations):
        u = num_codes / items / np.vecdot(kernel, v[:, None, :])
        v = 1 / np.maximum(np.einsum("gik,gi->gk", kernel, u), _TINY)
    shares = kernel * u[..., None] * v[:, None, :]
    most = shares >= shares.max(-1, keepdims=True) * (1 - _TIE)
    return np.where(most, distances, np.inf).argmin(-1)


def _reassigned(
    before: Int[np.ndarray, "items level"], after: Int[np.ndarray, "items level"], prefix: Int[np.ndarray, " items"]
) -> Reassignment:
    sizes = np.bincount(_groups_within(prefix, after[:, -1]))
    return Reassignment(after, int((before[:, -1] != after[:, -1]).sum()), int(sizes[sizes > 1].sum()))


def _checked(
    codes: Integer[np.ndarray, "items level"],
    residuals: Float[np.ndarray, "items dim"],
    codebook: Float[np.ndarray, "codes dim"],
) -> tuple[Float[np.ndarray, "items dim"], Float[np.ndarray, "codes dim"]]:
    """Residuals and codebook, checked, as arrays on the host, the codebook in float64."""
    residuals, codebook = np.asarray(residuals), np.asarray(codebook, np.float64)
    collision_groups(codes[:1])  # its check of dtype and shape
    if residuals.shape != (len(codes), *codebook.shape[1:]) or codebook.ndim != 2 or 0 in codebook.shape:
        raise ValueError(
            f"reassign: expected residuals [{len(codes)}, dim] and codebook [codes, dim] for codes {codes.shape}, "
            f"got {residuals.shape} and {codebook.shape}"
        )
    for name, values in (("residuals", residuals), ("codebook", codebook)):
        bad = ~np.isfinite(values).all(-1)
        if bad.any():
            raise ValueError(f"reassign: expected finite {name}, got NaN or infinity in row {bad.argmax()}")
    outside = (codes[:, -1] < 0) | (codes[:, -1] >= len(codebook))
    if outside.any():
        row = outside.argmax()
        raise ValueError(f"reassign: last code {codes[row, -1]} of row {row} lies outside 0..{len(codebook) - 1}")
    return residuals, codebook


def _check_capacity(prefix: Int[np.ndarray, " items"], collides: Bool[np.ndarray, " groups"], *, size: int) -> None:
    sizes = np.bincount(prefix, minlength=len(collides)) * collides
    if sizes.max(initial=0) > size:
        row = (prefix == sizes.argmax()).argmax()
        raise ValueError(
            f"min_cost_reassign: {sizes.max()} items share all codes but the last (the first is row {row}), and the "
            f"last level has {size} codes; give it at least {sizes.max()}, or add a level by tie_break"
        )
