"""Text vectors without a pretrained model: latent semantic analysis of the items' own words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from semid.data import Dataset
from semid.errors import SemidError

COLUMN = "text_lsa"
_WORD = re.compile(r"\w\w+")


def with_text_vectors(dataset: Dataset, *, dim: int = 128) -> Dataset:
    """`dataset` with a vector column `text_lsa` made from its text columns, and `dim` noted in its source.

    Raises SemidError if there are none, or too few words stand in two items.
    """
    made = dataset.with_vectors(COLUMN, latent_semantic_vectors(dataset.texts(), dim=dim))
    return made.replace(source={**(dataset.source or {}), COLUMN: {"dim": dim}})


def latent_semantic_vectors(texts: Sequence[str], *, dim: int, vocabulary: int = 50_000) -> Float[np.ndarray, "n dim"]:
    """Truncated SVD of tf-idf (Deerwester et al. 1990), rows of unit length; texts without known words are zero.

    Words that stand in one text alone are left out, and of the others the `vocabulary` most frequent are kept. There
    are fewer than `dim` dimensions where texts or words are too few.
    """
    import scipy.sparse
    import scipy.sparse.linalg

    if dim < 1:
        raise SemidError(f"expected at least 1 dimension for text vectors, got {dim}")
    words = [_WORD.findall(text.lower()) for text in texts]
    frequency = Counter(word for of_text in words for word in set(of_text))
    kept = sorted((word for word, n in frequency.items() if n > 1), key=lambda w: (-frequency[w], w))[:vocabulary]
    if len(kept) < 2 or len(texts) < 3:
        raise SemidError(
            f"expected at least 3 texts that share 2 words, got {len(texts)} with {len(kept)} shared words; "
            "give a vector column before tokenizing"
        )
    column = {word: index for index, word in enumerate(kept)}
    entries = [(row, column[word]) for row, of_text in enumerate(words) for word in of_text if word in column]
    rows, columns = np.array(entries).T
    shape = (len(texts), len(kept))
    counts = scipy.sparse.coo_array((np.ones(len(rows), np.float32), (rows, columns)), shape=shape).tocsr()
    idf = np.log(len(texts) / np.array([frequency[word] for word in kept])) + 1
    counts.data = ((1 + np.log(counts.data)) * idf[counts.indices]).astype(np.float32)
    rank = min(dim, min(shape) - 1)
    start = np.random.default_rng(0).standard_normal(min(shape)).astype(np.float32)
    left, singular, _ = scipy.sparse.linalg.svds(counts, k=rank, v0=start)
    order = np.argsort(-singular)
    vectors = left[:, order] * singular[order]
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-6).astype(np.float32)
