"""Text vectors without a pretrained model: latent semantic analysis of the items' own words."""

from __future__ import annotations

import functools
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy.sparse import csr_array

from semid.data import Dataset, StoredEncoder, joined_texts
from semid.encoders.content_encoders import ContentEncoderConfig, with_content_vectors
from semid.encoders.factors import truncated_svd
from semid.errors import SemidError

COLUMN = "text_lsa"
_WORD = re.compile(r"\w\w+")


@dataclass(frozen=True)
class LatentSemanticsConfig(ContentEncoderConfig):
    """Truncated SVD of tf-idf (Deerwester et al. 1990).

    The `vocabulary` most frequent of the words that are in two texts or more are kept. There are fewer than `dim`
    dimensions if there are too few texts or words.
    """

    name: ClassVar[str] = "lsa"
    dim: int = 128
    vocabulary: int = 50_000

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise SemidError(f"expected at least 1 dimension for text vectors, got {self.dim}")
        if self.vocabulary < 2:
            raise SemidError(f"expected a vocabulary of at least 2 words, got {self.vocabulary}")

    def fit(self, dataset: Dataset) -> LatentSemantics:
        """Fit to the texts of the dataset's items. Raises SemidError if too few words are in two of them."""
        inputs = dataset.text_inputs()
        return LatentSemantics.fit(joined_texts(dataset.items, inputs), self, inputs=inputs)

    def restore(self, stored: StoredEncoder) -> LatentSemantics:
        tensors = stored.tensors
        words = tensors["words"].tobytes().decode().split("\n")
        return LatentSemantics(stored.inputs, tuple(words), tensors["idf"], tensors["basis"])


@dataclass(frozen=True, eq=False)
class LatentSemantics:
    """Fitted latent semantic analysis: unit vectors of texts, zero for texts without known words.

    A text's tf-idf is projected onto the right singular vectors of that of the fitted texts: this folds new texts in,
    and gives the fitted ones `U S`, before normalization.
    """

    inputs: tuple[str, ...]
    words: tuple[str, ...]
    idf: Float[np.ndarray, " words"]
    basis: Float[np.ndarray, "words width"]

    @classmethod
    def fit(
        cls, texts: Sequence[str], config: LatentSemanticsConfig, *, inputs: tuple[str, ...] = ()
    ) -> LatentSemantics:
        """Fit to texts. Raises SemidError if there are fewer than 3, or they share fewer than 2 words."""
        frequency = Counter(word for text in texts for word in set(_words_of(text)))
        shared = sorted((word for word, n in frequency.items() if n > 1), key=lambda w: (-frequency[w], w))
        words = tuple(shared[: config.vocabulary])
        if len(words) < 2 or len(texts) < 3:
            raise SemidError(
                f"expected at least 3 texts that share 2 words, got {len(texts)} with {len(words)} shared words; "
                "give a vector column before tokenizing"
            )
        idf = np.log(len(texts) / np.array([frequency[word] for word in words])) + 1
        weights = _tf_idf(texts, _places_of(words), idf)
        rank = min(config.dim, min(weights.shape) - 1)
        start = np.random.default_rng(0).standard_normal(min(weights.shape)).astype(np.float32)
        basis = truncated_svd(weights, rank=rank, start=start).right.T
        return cls(inputs, words, idf, np.ascontiguousarray(basis, np.float32))

    @property
    def column(self) -> str:
        """Name of the vector column."""
        return COLUMN

    @property
    def width(self) -> int:
        """Dimensions of a vector."""
        return self.basis.shape[1]

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return _places_of(self.words)

    def encode(self, items: pa.Table) -> Float[np.ndarray, "n width"]:
        """Vectors of items by their text columns. Raises SemidError naming one that is missing or holds no text."""
        return self.encode_texts(joined_texts(items, self.inputs))

    def encode_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n width"]:
        """Vectors of texts, each independent of the others."""
        vectors = _tf_idf(texts, self._places, self.idf) @ self.basis
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-6)

    def tensors(self) -> dict[str, np.ndarray]:
        """Words as UTF-8, one a line; their weights; the singular vectors."""
        words = np.frombuffer("\n".join(self.words).encode(), np.uint8)
        return {"words": words, "idf": self.idf, "basis": self.basis}


def with_text_vectors(dataset: Dataset, *, dim: int = LatentSemanticsConfig.dim) -> Dataset:
    """`dataset` with a vector column `text_lsa` made from its text columns, and the encoder that makes it.

    Raises SemidError if there are none, or too few words are in two items.
    """
    return with_content_vectors(dataset, LatentSemanticsConfig(dim))


def _words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _places_of(words: Sequence[str]) -> dict[str, int]:
    return {word: index for index, word in enumerate(words)}


def _tf_idf(texts: Sequence[str], place: Mapping[str, int], idf: Float[np.ndarray, " words"]) -> csr_array:
    """(1 + log count) * idf of each word in each text, float32, by the words' places."""
    columns, ends = array("i"), array("q", [0])
    for text in texts:
        columns.extend(place[word] for word in _words_of(text) if word in place)
        ends.append(len(columns))
    ones, shape = np.ones(len(columns), np.float32), (len(texts), len(place))
    counts = csr_array((ones, np.array(columns, np.int32), np.array(ends, np.int64)), shape=shape)
    counts.sum_duplicates()
    counts.data = ((1 + np.log(counts.data)) * idf[counts.indices]).astype(np.float32)
    return counts
