"""Truncated singular value decomposition of a sparse matrix, with the same bits in every process."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh

# ARPACK draws a random vector once it has found all of an invariant subspace, as with equal rows: until SciPy 1.17 by a
# fixed seed, since then from the operating system's entropy, unless it gets a generator, which `svds` does not pass on.
_SEEDED = {"rng": 0} if "rng" in inspect.signature(eigsh).parameters else {}


class Factors(NamedTuple):
    """Singular vectors and values, largest first."""

    left: Float[np.ndarray, "n rank"]
    singular: Float[np.ndarray, " rank"]
    right: Float[np.ndarray, "rank m"]


def truncated_svd(matrix: sparse.csr_array, *, rank: int, start: Float[np.ndarray, " _"]) -> Factors:
    """The `rank` largest singular values, fewer than rows and columns, and their vectors, as by
    `scipy.sparse.linalg.svds`. The vector `start` is as long as the shorter side."""
    operator = aslinearoperator(matrix)
    tall = operator if operator.shape[0] >= operator.shape[1] else operator.H
    squared = LinearOperator(
        shape=(tall.shape[1],) * 2, dtype=tall.dtype, matvec=lambda v: tall.rmatvec(tall.matvec(v))
    )
    _, vectors = eigsh(squared, k=rank, v0=start, **_SEEDED)
    basis, _ = np.linalg.qr(vectors)  # clustered eigenvalues have vectors that are not quite orthonormal
    left, singular, turned = scipy.linalg.svd(tall.matmat(basis), full_matrices=False)
    right = turned @ basis.T
    return Factors(left, singular, right) if tall is operator else Factors(right.T, singular, left.T)
