"""Texts, pictures and vectors of a dataset's items as arrays, and the encoders that read them, chosen by one config."""

from __future__ import annotations

import abc
import functools
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx

from semid import artifacts
from semid.config import from_dict, to_dict
from semid.data import Dataset, joined_texts
from semid.encoders.adapters import Backbone, Encoder, SideAdapters, SideTower, Tuning, cached_states, tuned
from semid.encoders.content import FeatureRows, ImageRows, Rows, TextRows, arrays_digest, named_variables
from semid.encoders.fusion import Content, FeatureEncoder, FusionConfig, ItemEncoder
from semid.encoders.image import ImageConfig, ImageEncoder, image_rows, load_image_encoder
from semid.encoders.transformer import TextEncoder, TextEncoderConfig, load_text_encoder
from semid.encoders.vocabulary import Tokenizer, Vocabulary
from semid.encoders.weights import find_folder, folder_digest
from semid.errors import SemidError

CONFIG_FILE, VOCABULARY_FILE = "content.json", "vocabulary.model"


class Modality(abc.ABC):
    """One modality of items: its rows, read from a dataset, and an encoder of them."""

    @abc.abstractmethod
    def rows(self, dataset: Dataset, *, cache: Path) -> Rows:
        """Content of the dataset's items; states of a frozen encoder are kept in `cache`."""

    @abc.abstractmethod
    def encoder(self, rngs: nnx.Rngs) -> Encoder:
        """A new encoder of the rows."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write what the config does not have: files into `folder`; JSON values are returned."""
        return {}


class Source(abc.ABC):
    """Config that builds a modality."""

    @abc.abstractmethod
    def fit(self, dataset: Dataset) -> Modality:
        """Build the modality, fitted to this dataset."""

    @abc.abstractmethod
    def load(self, folder: Path, written: dict[str, Any]) -> Modality:
        """Read the modality that `Modality.write` wrote."""

    def weights_digest(self) -> str | None:
        """Digest of the pretrained weights, if there are any."""
        return None

    def located(self, digest: str | None, *, reader: str) -> Source:
        """The source with the folder where the pretrained weights of this digest are now (see `find_folder`)."""
        return self


class TextSource(Source):
    """Config of an encoder of texts."""


class ImageSource(Source):
    """Config of an encoder of pictures."""


@dataclass(frozen=True)
class _Pretrained(Source):
    """Config of a modality whose encoder is read from a folder of the Hugging Face layout."""

    folder: str
    tuning: Tuning = SideAdapters()
    """Parameters that are trained."""

    @abc.abstractmethod
    def fit(self, dataset: Dataset) -> Modality:
        """Read the encoder; nothing of it is fitted to the dataset."""

    def weights_digest(self) -> str:
        return folder_digest(self.folder)

    def located(self, digest: str | None, *, reader: str) -> Source:
        return replace(self, folder=str(find_folder(self.folder, digest, reader=reader)))


@dataclass(frozen=True)
class TextFromScratch(TextSource):
    """Train a small transformer over a subword vocabulary of the dataset's own texts."""

    name: ClassVar[str] = "scratch"

    encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """The transformer."""
    vocabulary: int = 4000
    """Largest number of subwords."""

    def fit(self, dataset: Dataset) -> Modality:
        vocabulary = Vocabulary.train(dataset.texts(), size=self.vocabulary)
        return _ScratchText(self.encoder, vocabulary, dataset.text_inputs())

    def load(self, folder: Path, written: dict[str, Any]) -> Modality:
        vocabulary = Vocabulary((folder / VOCABULARY_FILE).read_bytes())
        return _ScratchText(self.encoder, vocabulary, _written_columns(written))


@dataclass(frozen=True)
class PretrainedText(_Pretrained, TextSource):
    """Start from a BERT, MiniLM, E5 or sentence-T5 model in a folder of the Hugging Face layout."""

    name: ClassVar[str] = "pretrained"

    folder: str
    """config.json, safetensors and the tokenizer's files."""
    max_length: int = 64
    """Maximum tokens of a text; fewer if the model reads fewer."""

    def fit(self, dataset: Dataset) -> Modality:
        return self._build(dataset.text_inputs())

    def load(self, folder: Path, written: dict[str, Any]) -> Modality:
        return self._build(_written_columns(written))

    def _build(self, columns: tuple[str, ...] | None) -> Modality:
        backbone, tokenizer = load_text_encoder(self.folder)
        longest = min(self.max_length, backbone.config.max_length)
        read = functools.partial(_text_rows, tokenizer=tokenizer, max_length=longest, columns=columns)
        return _Tuned(backbone, self.tuning, read, columns=columns)


@dataclass(frozen=True)
class ImageFromScratch(ImageSource):
    """Train a small vision transformer."""

    name: ClassVar[str] = "scratch"

    encoder: ImageConfig = ImageConfig()
    """The transformer, and the size of its pictures."""

    def fit(self, dataset: Dataset) -> Modality:
        return _ScratchImage(self.encoder)

    def load(self, folder: Path, written: dict[str, Any]) -> Modality:
        return _ScratchImage(self.encoder)


@dataclass(frozen=True)
class PretrainedImage(_Pretrained, ImageSource):
    """Start from a ViT, CLIP or DINOv2 model in a folder of the Hugging Face layout."""

    name: ClassVar[str] = "pretrained"

    folder: str
    """config.json, preprocessor_config.json and safetensors."""

    def fit(self, dataset: Dataset) -> Modality:
        return self._build()

    def load(self, folder: Path, written: dict[str, Any]) -> Modality:
        return self._build()

    def _build(self) -> Modality:
        backbone = load_image_encoder(self.folder)
        return _Tuned(backbone, self.tuning, functools.partial(_image_rows, config=backbone.config))


@dataclass(frozen=True)
class _VectorSource(Source):
    column: str

    def fit(self, dataset: Dataset) -> Modality:
        return _Vectors(self.column, dataset.vectors(self.column).shape[1])

    def load(self, folder: Path, written: dict[str, Any]) -> Modality:
        return _Vectors(self.column, written["dim"])


@dataclass(frozen=True)
class ContentConfig:
    """Content that items are encoded from, and its encoders."""

    text: TextSource | None = TextFromScratch()
    """Encoder of the texts; None: texts are not read."""
    image: ImageSource | None = None
    """Encoder of the pictures in the column `image`; None: pictures are not read."""
    vectors: tuple[str, ...] = ()
    """Columns of ready-made vectors, read as they are."""
    fusion: FusionConfig = FusionConfig()
    """The layer that fuses the vectors of an item's modalities into one."""

    def __post_init__(self) -> None:
        # Of any type, as a caller may give others than the annotated ones.
        kinds: dict[str, tuple[Any, type[Source], str]] = {
            "text": (self.text, TextSource, "Text"),
            "image": (self.image, ImageSource, "Image"),
        }
        vectors: Any = self.vectors
        for name, (given, kind, title) in kinds.items():
            if given is not None and not isinstance(given, kind):
                such = f"{title}FromScratch() or Pretrained{title}(folder)"
                raise SemidError(f"{name}: expected the config of an encoder, such as {such}, or None, got {given!r}")
        if isinstance(vectors, str):
            raise SemidError(f"vectors: expected names of columns, got {vectors!r}; give ({vectors!r},)")
        if not self.sources:
            raise SemidError("expected text, image or vectors to encode items from, got none of them")
        # `items` is a method of the mapping that holds the encoders.
        reserved = {"text", "image", "items", *(["cross"] if self.fusion.cross else [])}
        if clash := sorted(reserved & set(self.vectors)):
            raise SemidError(f"a vector column named {clash[0]!r} cannot be told from a part of the encoder; rename it")

    @property
    def sources(self) -> dict[str, Source]:
        """Configs of the modalities by name."""
        named = {"text": self.text, "image": self.image} | {column: _VectorSource(column) for column in self.vectors}
        return {name: source for name, source in named.items() if source is not None}

    def weights_digests(self) -> dict[str, str]:
        """Digests of the pretrained weights, as parents of what is trained from them."""
        digests = {f"{name}_weights": source.weights_digest() for name, source in self.sources.items()}
        return {name: digest for name, digest in digests.items() if digest is not None}

    def located(self, digests: Mapping[str, str], *, reader: str) -> ContentConfig:
        """The config with the folders where the pretrained weights of these digests are now."""
        named = {"text": self.text, "image": self.image}
        located = {
            name: source.located(digests.get(f"{name}_weights"), reader=reader)
            for name, source in named.items()
            if source is not None
        }
        return replace(self, **located)  # type: ignore[arg-type]

    def without_folders(self) -> ContentConfig:
        """The config without the folders of pretrained weights, which are known by their digests wherever they lie."""
        nowhere = {name: replace(of, folder="") for name, of in self.sources.items() if isinstance(of, _Pretrained)}
        return replace(self, **nowhere)  # type: ignore[arg-type]


class ContentReader:
    """Reads the content of a dataset's items, and builds the encoder of it."""

    def __init__(self, config: ContentConfig, modalities: dict[str, Modality]) -> None:
        self.config, self.modalities = config, modalities

    @classmethod
    def fit(cls, config: ContentConfig, dataset: Dataset) -> ContentReader:
        """Fit vocabularies to the dataset's texts, and load what is pretrained."""
        return cls(config, {name: source.fit(dataset) for name, source in config.sources.items()})

    @classmethod
    def load(cls, folder: str | Path) -> ContentReader:
        """Read what `write` wrote: the reader of an end-to-end model, for the content of other items.

        Pretrained weights are found by their digest (see `find_folder`).
        Raises SemidError if there is none, or pretrained weights are missing or have changed since.
        """
        folder = artifacts.fetched(folder)
        file = folder / CONFIG_FILE
        if not file.is_file():
            raise SemidError(f"{folder}: expected {CONFIG_FILE}, found none; its encoders were built by the caller")
        record = artifacts.read_json(file)
        config = from_dict(ContentConfig, record["config"], where=str(file))
        config = config.located(record["weights"], reader=str(file))
        written = record["modalities"]
        return cls(config, {name: of.load(folder, written[name]) for name, of in config.sources.items()})

    def write(self, folder: Path) -> None:
        """Write config and vocabularies into an artifact under construction. Pretrained weights stay where they are."""
        written = {name: modality.write(folder) for name, modality in self.modalities.items()}
        record = {"config": to_dict(self.config), "weights": self.config.weights_digests(), "modalities": written}
        artifacts.write_json(folder / CONFIG_FILE, record)

    def read(self, dataset: Dataset, *, cache: str | Path | None = None) -> Content:
        """The content of the dataset's items.

        States that side adapters read of a frozen encoder are computed once and kept in `cache`, if it is given.
        """
        if cache is None:
            with tempfile.TemporaryDirectory() as temporary:
                return self.read(dataset, cache=temporary)
        return {name: of.rows(dataset, cache=Path(cache)) for name, of in self.modalities.items()}

    def encoder(self, *, seed: int = 0) -> ItemEncoder:
        """A new encoder of the content, with initial or pretrained parameters."""
        rngs = nnx.Rngs(seed)
        encoders = {name: modality.encoder(rngs) for name, modality in self.modalities.items()}
        return ItemEncoder(encoders, self.config.fusion, rngs=rngs)


class ItemContent(NamedTuple):
    """Content of all items, the encoder that reads it, and the reader that gave both, if one did."""

    rows: Content
    encoder: ItemEncoder
    reader: ContentReader | None = None

    def digest(self) -> str:
        """Digest of the content and of the encoder's variables."""
        arrays = [(f"{name}.{part}", x) for name, of in self.rows.items() for part, x in of._asdict().items()]
        return arrays_digest("content", [*arrays, *named_variables(self.encoder)])


def read_content(
    dataset: Dataset, config: ContentConfig | None = None, *, seed: int = 0, cache: str | Path | None = None
) -> ItemContent:
    """Read the items' content and build its encoder, as `config` says.

    `seed` draws the encoder's parameters; see `ContentReader.read` for `cache`.
    """
    reader = ContentReader.fit(ContentConfig() if config is None else config, dataset)
    return ItemContent(reader.read(dataset, cache=cache), reader.encoder(seed=seed), reader)


class _ScratchText(Modality):
    def __init__(self, config: TextEncoderConfig, vocabulary: Vocabulary, columns: tuple[str, ...] | None) -> None:
        self.config, self.vocabulary, self.columns = config, vocabulary, columns

    def rows(self, dataset: Dataset, *, cache: Path) -> Rows:
        max_length = self.config.max_length
        return _text_rows(dataset, tokenizer=self.vocabulary, max_length=max_length, columns=self.columns)

    def encoder(self, rngs: nnx.Rngs) -> Encoder:
        return TextEncoder(self.config, vocabulary=self.vocabulary.size, rngs=rngs)

    def write(self, folder: Path) -> dict[str, Any]:
        (folder / VOCABULARY_FILE).write_bytes(self.vocabulary.model)
        return _columns_to_write(self.columns)


class _ScratchImage(Modality):
    def __init__(self, config: ImageConfig) -> None:
        self.config = config

    def rows(self, dataset: Dataset, *, cache: Path) -> Rows:
        return _image_rows(dataset, config=self.config)

    def encoder(self, rngs: nnx.Rngs) -> Encoder:
        return ImageEncoder(self.config, rngs=rngs)


class _Tuned(Modality):
    """A pretrained backbone, its tuning, the function that reads its rows, and the text columns that this reads."""

    def __init__(
        self,
        backbone: Backbone,
        tuning: Tuning,
        read: Callable[[Dataset], Rows],
        *,
        columns: tuple[str, ...] | None = None,
    ) -> None:
        self.backbone, self.tuning, self.read, self.columns = backbone, tuning, read, columns

    def rows(self, dataset: Dataset, *, cache: Path) -> Rows:
        """The content or, for side adapters, the frozen states that they read."""
        rows, tuning = self.read(dataset), self.tuning
        return cached_states(cache, self.backbone, rows, config=tuning) if isinstance(tuning, SideAdapters) else rows

    def encoder(self, rngs: nnx.Rngs) -> Encoder:
        if isinstance(self.tuning, SideAdapters):
            return SideTower(self.backbone.dim, self.tuning, rngs=rngs)
        return tuned(nnx.clone(self.backbone), self.tuning, rngs=rngs)

    def write(self, folder: Path) -> dict[str, Any]:
        return _columns_to_write(self.columns)


class _Vectors(Modality):
    def __init__(self, column: str, dim: int) -> None:
        self.column, self.dim = column, dim

    def rows(self, dataset: Dataset, *, cache: Path) -> Rows:
        vectors = dataset.vectors(self.column)
        if vectors.shape[1] != self.dim:
            raise SemidError(
                f"dataset {dataset.name!r}: column {self.column!r}: expected vectors of {self.dim} dimensions, as the "
                f"encoder was trained on, got {vectors.shape[1]}; give those of the same source"
            )
        return FeatureRows(jnp.asarray(vectors), jnp.ones(len(vectors), bool))

    def encoder(self, rngs: nnx.Rngs) -> Encoder:
        return FeatureEncoder(self.dim)

    def write(self, folder: Path) -> dict[str, Any]:
        return {"dim": self.dim}


def _written_columns(written: dict[str, Any]) -> tuple[str, ...] | None:
    """Text columns that a reader was fitted to; None: written before they were recorded."""
    return tuple(written["columns"]) if "columns" in written else None


def _columns_to_write(columns: tuple[str, ...] | None) -> dict[str, Any]:
    return {} if columns is None else {"columns": list(columns)}


def _text_rows(dataset: Dataset, *, tokenizer: Tokenizer, max_length: int, columns: tuple[str, ...] | None) -> TextRows:
    """Tokens of the items' texts: those of `columns` alone, so that a column that came later changes no text; None: all
    that the dataset has."""
    texts = dataset.texts() if columns is None else joined_texts(dataset.items, columns)
    rows, cut = tokenizer.rows(texts, max_length=max_length)
    if cut:
        warnings.warn(f"{cut} of {len(texts)} texts are cut to {max_length} tokens", stacklevel=2)
    return rows


def _image_rows(dataset: Dataset, *, config: ImageConfig) -> ImageRows:
    if "image" not in dataset.items.column_names:
        raise SemidError(f"dataset {dataset.name!r} has no column 'image' of pictures; leave the image encoder out")
    return image_rows(dataset.items["image"].to_pylist(), item_ids=dataset.item_ids.to_pylist(), config=config)
