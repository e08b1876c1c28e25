"""Common parts of the TFDS builders: tables of items and histories in array_record files, read as a `Dataset`.

TFDS features belong to a config, so each table has its own config (`...-items`, `...-histories`), as in TFDS' own
MovieLens. A record of histories is one user. Records keep the order in which they are generated
(`disable_shuffling`), as it gives the item rows and decides ties.
"""

from __future__ import annotations

import abc
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds

from semid import artifacts
from semid.artifacts import sha256
from semid.data.builders.raw import Interactions
from semid.data.dataset import Dataset
from semid.data.splits import SplitRule
from semid.data.ties import TieRule
from semid.errors import SemidError

SPLIT = "full"


@dataclass(frozen=True)
class RawFile:
    """A published file: name, download URL, and the page that describes it."""

    name: str
    url: str
    page: str


class TableBuilder(tfds.core.GeneratorBasedBuilder):
    """Builder of the two tables of a source. The name of a config ends in "-items" or "-histories".

    `checksums` maps names of raw files to their expected sha256; that of other files is only recorded, in the metadata
    of the prepared table.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, checksums: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        self.checksums = dict(checksums or {})
        super().__init__(**{"file_format": "array_record"} | kwargs)

    def present(self, folder: Path) -> dict[str, Path]:
        """The raw files in the manual folder that would be read now, by name; of a fixed list, those that exist."""
        names = [*self.info.metadata["sha256"]]
        return {name: folder / name for name in names if (folder / name).is_file()}

    @abc.abstractmethod
    def _located(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Path]:
        """The raw files of this table by name, found or downloaded."""

    @property
    @abc.abstractmethod
    def _features(self) -> dict[str, Any]:
        """TFDS features of this table's records; times of a history are milliseconds since 1970."""

    @abc.abstractmethod
    def _generate_records(self, paths: Mapping[str, Path]) -> Iterator[dict]:
        """The records of this table."""

    @abc.abstractmethod
    def item_table(self, records: list[dict]) -> pa.Table:
        """The items of a dataset, from this table's records."""

    @property
    def _holds_items(self) -> bool:
        return self.builder_config.name.endswith("items")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(self._features),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        paths = self._located(dl_manager)
        digests = {name: sha256(path) for name, path in paths.items()}
        for name, path in paths.items():
            _check_same(str(path), digests[name], self.checksums.get(name, digests[name]), "download it again")
        self.info.metadata["sha256"] = digests
        return {SPLIT: self._generate_examples(paths)}

    def _generate_examples(self, paths: Mapping[str, Path]) -> Iterator[tuple[int, dict]]:
        yield from enumerate(self._generate_records(paths))


class RatingsBuilder(TableBuilder):
    """Builder for a source with one rating per line, and metadata of the rated items."""

    TEXTS: ClassVar[tuple[str, ...]]  # text columns of the items, next to `item_id` and the list `categories`

    @abc.abstractmethod
    def _interactions(self, paths: Mapping[str, Path]) -> Interactions:
        """All interactions, in file order."""

    @abc.abstractmethod
    def _items(self, paths: Mapping[str, Path], wanted: set[str]) -> dict[str, dict]:
        """Texts and categories of the `wanted` items that have metadata."""

    @property
    def _features(self) -> dict[str, Any]:
        text = tfds.features.Text()
        if self._holds_items:
            return {"item_id": text, **dict.fromkeys(self.TEXTS, text), "categories": tfds.features.Sequence(text)}
        return {
            "user_id": text,
            "item_id": tfds.features.Sequence(text),
            "timestamp": tfds.features.Tensor(shape=(None,), dtype=np.int64),
            "rating": tfds.features.Tensor(shape=(None,), dtype=np.float32),
        }

    def item_table(self, records: list[dict]) -> pa.Table:
        """Texts and lists of texts, null where empty."""
        return pa.table({column: pa.array([_value(record[column]) for record in records]) for column in records[0]})

    def _generate_records(self, paths: Mapping[str, Path]) -> Iterator[dict]:
        interactions = self._interactions(paths)
        return self._item_records(paths, interactions) if self._holds_items else interactions.histories()

    def _item_records(self, paths: Mapping[str, Path], interactions: Interactions) -> Iterator[dict]:
        known = self._items(paths, set(interactions.item_ids))
        blank: dict[str, Any] = {**dict.fromkeys(self.TEXTS, ""), "categories": []}
        for item_id in sorted(interactions.item_ids, key=lambda each: (len(each), each)):  # numeric order of numbers
            yield {"item_id": item_id} | known.get(item_id, blank)


def locate(raw: RawFile, dl_manager: tfds.download.DownloadManager) -> tuple[str, Path]:
    """Name and path of `raw` or its unpacked form in the manual folder, else of the downloaded file.

    Raises SemidError naming the file to put into the folder if neither works.
    """
    try:
        folder = Path(dl_manager.manual_dir)
        for name in (raw.name, raw.name.removesuffix(".gz")):
            if (folder / name).is_file():
                return name, folder / name
        absent = f"no {raw.name} in {folder}"
    except AssertionError as error:  # TFDS raises it for a folder that is missing or empty
        absent = str(error).split(". ")[0]
    try:
        head = urllib.request.Request(raw.url, method="HEAD")
        urllib.request.urlopen(head, timeout=20).close()  # TFDS itself retries an unreachable host for minutes
        return raw.name, Path(dl_manager.download(raw.url))
    except (OSError, tfds.download.DownloadError) as error:
        reason = " ".join(str(error).split())[:200]
        advice = f"download {raw.name} from {raw.page} and put it there"
        raise SemidError(f"{absent}, and {raw.url} cannot be read ({reason}); {advice}") from None


def read_dataset(
    builders: Sequence[TableBuilder],
    *,
    manual_dir: str | Path,
    name: str,
    split_rule: SplitRule,
    ties: TieRule,
    source: dict,
) -> Dataset:
    """The dataset of an items and a histories builder, which are prepared first if needed.

    A line that repeats user, item, time and event of an earlier one is dropped; a user's interactions with an item at
    different times all stay. Ratings are dropped: every rating counts as an interaction.
    """
    items, histories = (_records(builder, artifacts.fetched(manual_dir)) for builder in builders)
    interactions = _interaction_table(histories, builders[1].info.features)
    metadata = [builder.info.metadata for builder in builders]
    files, counts = ({k: v for each in metadata for k, v in each.get(key, {}).items()} for key in ("sha256", "counts"))
    return Dataset.build(
        builders[0].item_table(items),
        interactions,
        name=name,
        split_rule=split_rule,
        ties=ties,
        source=source | {"sha256": files, **counts},
        drop_repeated_lines=True,
    )


def _records(builder: TableBuilder, manual_dir: Path) -> list[dict]:
    if builder.is_prepared():
        _check_unchanged(builder, manual_dir)
    else:
        settings = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
        builder.download_and_prepare(download_config=settings)
    source = builder.as_data_source(split=SPLIT)
    return [source[row] for row in range(len(source))]


def _check_unchanged(builder: TableBuilder, manual_dir: Path) -> None:
    what = f"{builder.data_path}, prepared from"
    fix = "remove that folder to prepare it again, or bring that file back"
    recorded = builder.info.metadata["sha256"]
    for name, digest in recorded.items():
        _check_same(f"{what} {name}", digest, builder.checksums.get(name, digest), fix)
    for name, path in builder.present(manual_dir).items():
        digest = sha256(path)
        if name not in recorded and digest not in recorded.values():  # a renamed file of equal content is fine
            raise SemidError(f"{builder.data_path}: prepared without {path}; remove that folder to prepare it again")
        _check_same(f"{what} {name}", recorded.get(name, digest), digest, fix)


def _check_same(what: str, digest: str, expected: str, fix: str) -> None:
    if digest != expected:
        raise SemidError(f"{what}: expected a file of sha256 {expected}, got {digest}; {fix}")


def _value(value: bytes | list[bytes]) -> str | list[str] | None:
    """Decoded text or texts; None (null in Arrow) if empty."""
    if isinstance(value, bytes):
        return value.decode() or None
    return [each.decode() for each in value] or None


def _interaction_table(histories: list[dict], features: tfds.features.FeaturesDict) -> pa.Table:
    users = pa.array([record["user_id"].decode() for record in histories])
    lengths = [len(record["item_id"]) for record in histories]
    time = np.concatenate([record["timestamp"] for record in histories])
    columns = {
        "user_id": users.take(pa.array(np.repeat(np.arange(len(users)), lengths))),
        "item_id": _ids([record["item_id"] for record in histories]),
        "timestamp": pa.array(time).cast(pa.timestamp("ms")),  # `Dataset.build` keeps the order within a second
    }
    if "event" in features:
        names = pa.array(features["event"].feature.names)
        columns["event"] = names.take(pa.array(np.concatenate([record["event"] for record in histories])))
    return pa.table(columns)


def _ids(values: list) -> pa.Array:
    """Ids, texts or numbers, as strings."""
    if isinstance(values[0], np.ndarray):
        return pa.array(np.concatenate(values)).cast(pa.string())
    return pa.array([each.decode() for value in values for each in value])
