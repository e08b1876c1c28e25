"""Vectors of texts or pictures by a pretrained encoder, whose files stay in their folder: the recipe has a digest."""

from __future__ import annotations

import abc
import functools
import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from flax import nnx
from jaxtyping import Float, Int

from semid import artifacts
from semid.data import Dataset, StoredEncoder, check_column, joined_texts
from semid.encoders.content import ImageRows, TextRows, take
from semid.encoders.content_encoders import ContentEncoderConfig
from semid.encoders.image import ImageEncoder, image_rows, load_image_encoder
from semid.encoders.transformer import TextEncoder, load_text_encoder
from semid.encoders.weights import Settings, find_folder, folder_digest, read_modules
from semid.errors import SemidError
from semid.progress import show_progress

_TEXTS, _PICTURES = ("bert", "t5"), ("vit", "clip", "clip_vision_model", "dinov2")
# Modules of sentence-transformers that the built-in reader implements.
_MODULES = ("Transformer", "Pooling", "Normalize")
_BATCH = 64
_IMAGE, _BYTES = "image", (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)
_EXTRA = "sentence_transformers"

Reader = Literal["text", "image", "sentence-transformers"]


@dataclass(frozen=True)
class PretrainedVectorsConfig(ContentEncoderConfig):
    """A frozen encoder in the Hugging Face layout: BERT, MiniLM, E5 or T5 for texts; ViT, CLIP or DINOv2 for pictures;
    or, with the extra `sentence-transformers`, any text model of that package."""

    name: ClassVar[str] = "pretrained"

    encoder: str
    """Folder, or org/name of the Hugging Face hub (extra `hub`)."""
    column: str = ""
    """Vector column to make; none given: text_ or image_ and the encoder's name."""
    max_length: int | None = None
    """Maximum tokens of a text; none given: by sentence_bert_config.json, else as many as the encoder reads."""
    revision: str | None = None
    """Commit of a repository of the hub."""
    reader: Reader | None = None
    """Reader of the folder. It, `weights`, `width`, `pooling` and `normalize` are set in the resolved recipe."""
    weights: str | None = None
    """sha256 of the folder's settings, tokenizer and weights."""
    width: int | None = None
    """Dimensions of a vector."""
    pooling: str | None = None
    """Reduction of the states to a vector."""
    normalize: bool | None = None
    """Vectors of unit length."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise SemidError(f"expected at least 1 token for texts, got {self.max_length}")
        if self.column:
            check_column(self.column)

    def resolved(self) -> PretrainedVectorsConfig:
        """The config with column, revision, digest and the folder's settings filled in.

        Raises SemidError naming what is missing in the folder, or the extra that would read it.
        """
        folder = artifacts.local_folder(self.encoder, revision=self.revision)
        if not folder.is_dir():
            hub = "; a name of the hub needs an extra: pip install 'semid[hub]'" if "/" in self.encoder else ""
            raise SemidError(f"encoder {self.encoder}: no such folder{hub}")
        config = replace(
            self,
            reader=_reader_of(folder),
            revision=folder.name if artifacts.is_repository(self.encoder) else None,
            weights=folder_digest(folder),
        )
        encoder = config.open(folder)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(self.encoder.rstrip("/")).name)
        kind = _IMAGE if config.reader == _IMAGE else "text"
        return replace(
            config,
            column=self.column or f"{kind}_{name}",
            width=encoder.width,
            max_length=encoder.max_length,
            pooling=encoder.pooling,
            normalize=encoder.normalize,
        )

    def open(self, folder: Path) -> _Vectors:
        """Open the encoder in the folder."""
        if self.reader == "sentence-transformers":
            return _SentenceTransformer(folder, self.max_length)
        return _Pictures(folder) if self.reader == _IMAGE else _Texts(folder, self.max_length)

    def fit(self, dataset: Dataset) -> PretrainedEncoder:
        """The encoder for the dataset's texts or pictures. Raises SemidError if there are none, or if its column would
        replace one that holds no vectors."""
        if self.column in dataset.items.column_names and self.column not in dataset.vector_columns:
            raise SemidError(
                f"dataset {dataset.name!r}: column {self.column!r} is there and holds no vectors; choose another name "
                f"for those of {self.encoder}"
            )
        if self.reader != _IMAGE:
            return PretrainedEncoder(self, dataset.text_inputs())
        if _IMAGE not in dataset.items.column_names:
            raise SemidError(f"dataset {dataset.name!r} has no column 'image' of pictures for {self.encoder} to read")
        return PretrainedEncoder(self, (_IMAGE,))

    def restore(self, stored: StoredEncoder) -> PretrainedEncoder:
        return PretrainedEncoder(self, stored.inputs)


@dataclass(frozen=True, eq=False)
class PretrainedEncoder:
    """A pretrained encoder of a resolved config; its folder is read when items are first encoded, and must then hold
    the recipe's files."""

    config: PretrainedVectorsConfig
    inputs: tuple[str, ...]

    @property
    def column(self) -> str:
        """Name of the vector column."""
        return self.config.column

    @property
    def width(self) -> int:
        """Dimensions of a vector."""
        return self.config.width or 0

    def encode(self, items: pa.Table) -> Float[np.ndarray, "n width"]:
        """Vectors of items by their texts or pictures, zeros where an item has none.

        Raises SemidError if the encoder's folder is missing or holds other files than those of the recipe.
        """
        return self._vectors(items, self.inputs)

    def tensors(self) -> dict[str, np.ndarray]:
        """None: the weights stay in their folder."""
        return {}

    @functools.cached_property
    def _vectors(self) -> _Vectors:
        return self.config.open(self._folder())

    def _folder(self) -> Path:
        config, column = self.config, f"column {self.column!r}"
        return find_folder(
            config.encoder, config.weights, revision=config.revision, reader=column, remedy=f", or bring the {column}"
        )


class _Vectors(abc.ABC):
    """An opened encoder."""

    width: int
    max_length: int | None = None
    pooling: str | None = None
    normalize: bool | None = None

    @abc.abstractmethod
    def __call__(self, items: pa.Table, inputs: Sequence[str]) -> Float[np.ndarray, "n width"]:
        """Vectors of items by their columns `inputs`."""


class _Texts(_Vectors):
    """A text encoder of `load_text_encoder`."""

    def __init__(self, folder: Path, max_length: int | None) -> None:
        encoder, self._tokenizer = load_text_encoder(folder)
        self.width, config = encoder.dim, encoder.config
        self.pooling, self.normalize = config.pooling.value, config.normalize
        self.max_length = min(max_length or _max_length(folder) or config.max_length, config.max_length)
        self._encode = _program(encoder)

    def __call__(self, items: pa.Table, inputs: Sequence[str]) -> Float[np.ndarray, "n width"]:
        texts = joined_texts(items, inputs)
        rows, cut = self._tokenizer.rows(texts, max_length=self.max_length or 0)
        if cut:
            warnings.warn(f"{cut} of {len(texts)} texts are cut to {self.max_length} tokens", stacklevel=2)
        tokens, mask = np.asarray(rows.tokens), np.asarray(rows.mask)
        lengths, vectors = mask.sum(axis=1), np.zeros((len(texts), self.width), np.float32)
        # Padding depends on a text's own length alone: fewer products, and other texts do not change its vector.
        padded = np.minimum(8 << np.maximum(np.ceil(np.log2(np.maximum(lengths, 1) / 8)), 0).astype(int), mask.shape[1])
        with show_progress("encoding texts", total=len(texts), unit="items") as progress:
            for length in np.unique(padded[lengths > 0]):
                for chosen in _batches(np.flatnonzero((padded == length) & (lengths > 0))):
                    batch = _full(chosen)
                    encoded = self._encode(TextRows(*(jnp.asarray(of[batch, :length]) for of in (tokens, mask))))
                    vectors[chosen] = encoded[: len(chosen)]
                    progress.advance(progress.done + len(chosen))
        return vectors


class _Pictures(_Vectors):
    """An image encoder of `load_image_encoder`."""

    pooling, normalize = "class token", False

    def __init__(self, folder: Path) -> None:
        encoder = load_image_encoder(folder)
        self.width, self._config, self._encode = encoder.dim, encoder.config, _program(encoder)

    def __call__(self, items: pa.Table, inputs: Sequence[str]) -> Float[np.ndarray, "n width"]:
        images = items[inputs[0]]
        if not any(is_kind(images.type) for is_kind in _BYTES):
            what = f"expected the bytes of PNG or JPEG files, got {images.type}; store them as binary"
            raise SemidError(f"column {inputs[0]!r}: {what}")
        named = items["item_id"] if "item_id" in items.column_names else pa.array(range(1, len(images) + 1))
        vectors = np.zeros((len(images), self.width), np.float32)
        present = np.flatnonzero(images.is_valid().to_numpy(zero_copy_only=False))
        with show_progress("encoding pictures", total=len(present), unit="items") as progress:
            for chosen in _batches(present):
                files, ids = images.take(chosen).to_pylist(), map(str, named.take(pa.array(chosen)).to_pylist())
                rows = image_rows(files, item_ids=list(ids), config=self._config)
                vectors[chosen] = self._encode(take(rows, _full(np.arange(len(chosen)))))[: len(chosen)]
                progress.advance(progress.done + len(chosen))
        return vectors


class _SentenceTransformer(_Vectors):
    """A text model of the package sentence-transformers, from safetensors alone."""

    pooling, normalize = "of its modules", None

    def __init__(self, folder: Path, max_length: int | None) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(
            str(folder), device="cpu", local_files_only=True, model_kwargs={"use_safetensors": True}
        )
        if max_length is not None:
            self._model.max_seq_length = max_length
        self.max_length = self._model.max_seq_length
        self.width = int(self._model.get_sentence_embedding_dimension())

    def __call__(self, items: pa.Table, inputs: Sequence[str]) -> Float[np.ndarray, "n width"]:
        texts = joined_texts(items, inputs)
        found = np.asarray(self._model.encode(texts, batch_size=_BATCH, show_progress_bar=False), np.float32)
        return np.where(np.array([bool(text.strip()) for text in texts])[:, None], found, np.float32(0))


def _reader_of(folder: Path) -> Reader:
    """Reader of the folder. Raises SemidError if there is none."""
    config, listed = folder / "config.json", read_modules(folder)
    kind = Settings.read(config).get("model_type") if config.is_file() else None
    others = [module for module in listed if not module.endswith(_MODULES)]
    if kind in _PICTURES:
        return "image"
    if kind in _TEXTS and not others:
        return "text"
    if listed and importlib.util.find_spec(_EXTRA) is not None:
        return "sentence-transformers"
    found = f"modules {', '.join(others)}" if others else f"model_type {kind!r}"
    raise SemidError(
        f"encoder {folder}: expected model_type of {', '.join((*_TEXTS, *_PICTURES))} in config.json, got {found}; a "
        "folder of sentence-transformers is read with an extra: pip install 'semid[sentence-transformers]'"
    )


def _max_length(folder: Path) -> int | None:
    file = folder / "sentence_bert_config.json"
    return Settings.read(file).get("max_seq_length") if file.is_file() else None


def _program(encoder: TextEncoder | ImageEncoder) -> Callable[[TextRows | ImageRows], np.ndarray]:
    graph, state = nnx.split(encoder)
    encode: Any = jax.jit(lambda state, rows: nnx.merge(graph, state)(rows))

    def apply(rows: TextRows | ImageRows) -> np.ndarray:
        with jax.default_matmul_precision("highest"):  # codes are made of these vectors
            return np.asarray(encode(state, rows))

    return apply


def _batches(rows: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " _"]]:
    return [batch for batch in np.split(rows, range(_BATCH, len(rows), _BATCH)) if len(batch)]


def _full(rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " batch"]:
    """The rows, padded to a whole batch by repeating the first: one program for all."""
    return np.concatenate([rows, np.repeat(rows[:1], _BATCH - len(rows))])
