"""Co-occurrence of items in training histories, as sparse counts and as vectors.

Pass `splits.train` only, since the results reach the tokenizer. Rows and columns of sparse matrices are item rows, or
user indices where the shape says users.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from semid.data import Histories
from semid.encoders.factors import truncated_svd
from semid.errors import SemidError

# Rows of pairs that `ppmi` computes at once.
_ROWS = 1 << 12
_DENSE_ROWS = 512  # up to this many rows a dense SVD is as fast


def interactions_matrix(histories: Histories, *, num_items: int, num_users: int) -> sparse.csr_array:
    """Float32[users, items]: 1 where the user has had the item, however often.

    Raises SemidError without any interaction, and for item rows or users outside the dataset.
    """
    items, owner = _interactions(histories, num_items)
    users = histories.users[owner]
    if users.min() < 0 or users.max() >= num_users:
        raise SemidError(
            f"expected users of 0 to {num_users - 1} on all histories with items, got {users.min()} to {users.max()}; "
            "pass the training histories of the dataset"
        )
    matrix = sparse.coo_array((np.ones(len(items), np.float32), (users, items)), shape=(num_users, num_items)).tocsr()
    matrix.data[:] = 1  # repeated pairs have been added up
    return matrix


def cooccurrence(histories: Histories, *, num_items: int, window: int) -> sparse.csr_array:
    """Int32[items, items], symmetric: how often two different items stand at most `window` positions apart.

    Every such pair of positions of one history counts once. Raises SemidError without any interaction.
    """
    if window < 1:
        raise SemidError(f"expected a window of 1 position or more, got {window}")
    items, owner = _interactions(histories, num_items)
    counts = sparse.csr_array((num_items, num_items), dtype=np.int32)
    for distance in range(1, min(window, int(histories.lengths.max()) - 1) + 1):
        left, right = items[:-distance], items[distance:]
        keep = (owner[:-distance] == owner[distance:]) & (left != right)
        pairs = (left[keep], right[keep])
        counts = counts + sparse.coo_array((np.ones(keep.sum(), np.int32), pairs), shape=counts.shape).tocsr()
    return (counts + counts.T).tocsr()


def ppmi(counts: sparse.sparray, *, smoothing: float = 0.75) -> sparse.csr_array:
    """Float64[items, contexts]: positive pointwise mutual information `max(log p(i, j) / (p(i) p'(j)), 0)`.

    `p'` is the contexts' distribution to the power `smoothing`, normalized, so that rare contexts do not win by their
    rarity (Levy, Goldberg & Dagan, TACL 2015, section 3); with smoothing the result of symmetric counts is not
    symmetric.
    """
    rows = np.asarray(counts.sum(1), np.float64)
    contexts = np.asarray(counts.sum(0), np.float64) ** smoothing  # an empty one has no entry that reads it
    total, counts, blocks = contexts[contexts > 0].sum(), sparse.csr_array(counts), []
    for start in range(0, counts.shape[0], _ROWS):
        pairs = counts[start : start + _ROWS].tocoo()
        row, column = pairs.coords
        information = np.log(pairs.data * total / (rows[start + row] * contexts[column]))
        keep = information > 0
        blocks.append(sparse.coo_array((information[keep], (row[keep], column[keep])), shape=pairs.shape).tocsr())
    return sparse.vstack(blocks, format="csr")


def ppmi_vectors(
    histories: Histories, *, num_items: int, dim: int, window: int, seed: int
) -> Float[np.ndarray, "items dim"]:
    """Item vectors `U sqrt(S)` of the truncated SVD of the PPMI matrix, strongest dimension first, in float32.

    Each dimension's largest entry is positive. Items that co-occur with none get zeros. Raises SemidError when no
    items co-occur, or too few for `dim`.
    """
    information = ppmi(cooccurrence(histories, num_items=num_items, window=window))
    known, contexts = np.flatnonzero(np.diff(information.indptr)), np.unique(information.indices)
    most = min(len(known), len(contexts)) - 1
    if not len(known):
        raise SemidError(
            f"no two different items are within {window} positions of one training history: there is nothing that "
            "PPMI could read; take interactions of users with several items, or align with another signal"
        )
    if not 1 <= dim <= most:
        raise SemidError(
            f"expected dim of 1 to {most}, one less than the items that co-occur, got {dim}; "
            "lower dim or take more interactions"
        )
    vectors = np.zeros((num_items, dim), np.float32)
    vectors[known] = _factors(information[known][:, contexts], dim, seed)
    return vectors


def sample_partners(weights: sparse.sparray, *, samples: int = 32, seed: int) -> Int[np.ndarray, "rows samples"]:
    """Columns drawn for each row with replacement, with probability proportional to the row's weights.

    With PPMI weights these are co-occurring items; with `interactions_matrix` items of a user, and with its transpose
    users of an item. Rows without positive weights get -1. Raises SemidError for negative or non-finite weights.
    """
    weights = sparse.csr_array(weights)
    if not (np.isfinite(weights.data) & (weights.data >= 0)).all():
        raise SemidError("expected finite weights of 0 or more to sample partners by")
    total = np.concatenate([[0.0], np.cumsum(weights.data, dtype=np.float64)])
    start, end = total[weights.indptr[:-1], None], total[weights.indptr[1:], None]
    drawn = start + (end - start) * np.random.default_rng(seed).random((weights.shape[0], samples))
    drawn = np.minimum(drawn, np.nextafter(end, 0))  # rounding must not reach into the next row
    empty = np.broadcast_to(start == end, drawn.shape)
    entry = np.searchsorted(total, drawn[~empty], side="right") - 1
    partners = np.full(drawn.shape, -1, np.int32)
    partners[~empty] = weights.indices[entry]
    return partners


def co_consumed(histories: Histories, *, num_items: int, window: int, seed: int) -> Int[np.ndarray, "items sample"]:
    """Items that stand within `window` positions of each item, drawn by PPMI weights; -1 for items without any.

    Raises SemidError when no item has one.
    """
    information = ppmi(cooccurrence(histories, num_items=num_items, window=window))
    partners = sample_partners(information, seed=seed)
    if (partners < 0).all():
        raise SemidError(
            "no training history holds two different items, so no items are co-consumed; align with another signal"
        )
    return partners


class CoConsumption:
    """Co-consumed items of training histories, drawn once per window (see `co_consumed`)."""

    def __init__(self, histories: Histories, *, num_items: int, seed: int) -> None:
        self._draw = functools.partial(co_consumed, histories, num_items=num_items, seed=seed)
        self._partners: dict[int, Int[np.ndarray, "items sample"]] = {}

    def partners(self, window: int) -> Int[np.ndarray, "items sample"]:
        """Partners of every item, -1 for items without any. Raises SemidError when no item has one."""
        if window not in self._partners:
            self._partners[window] = self._draw(window=window)
        return self._partners[window]


def user_vectors(
    histories: Histories, item_vectors: Float[np.ndarray, "items dim"], *, num_users: int
) -> Float[np.ndarray, "users dim"]:
    """Mean vector of the different items of each user, in float32; zeros for users without any."""
    matrix = interactions_matrix(histories, num_items=len(item_vectors), num_users=num_users)
    counts = np.maximum(np.diff(matrix.indptr), 1).astype(np.float32)
    return (matrix @ item_vectors.astype(np.float32)) / counts[:, None]


def _interactions(histories: Histories, num_items: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Item row and history index of every interaction, checked."""
    items, owner = histories.flat()
    if not len(items):
        raise SemidError(
            f"the {len(histories)} training histories hold no interaction, so there is no collaborative signal; "
            "move the split so that interactions remain for training, or tokenize without alignment"
        )
    if items.min() < 0 or items.max() >= num_items:
        raise SemidError(f"expected item rows of 0 to {num_items - 1} in histories, got {items.min()} to {items.max()}")
    return items, owner


def _factors(matrix: sparse.csr_array, dim: int, seed: int) -> Float[np.ndarray, "n dim"]:
    """`U sqrt(S)` for the `dim` largest singular values, largest first, signs fixed."""
    if matrix.shape[0] <= _DENSE_ROWS:
        left, singular, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
    else:
        start = np.random.default_rng(seed).normal(size=min(matrix.shape))
        left, singular, _ = truncated_svd(matrix, rank=dim, start=start)
    left = left[:, :dim] * np.sqrt(singular[:dim])
    return left * np.sign(left[np.abs(left).argmax(0), np.arange(dim)])
