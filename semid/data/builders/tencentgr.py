"""TencentGR-1M and -10M of the Tencent Advertising Algorithm Challenge 2025 (Pan et al., arXiv 2604.04976).

Sequences and item features use numbers as ids, embeddings the original ids (`anonymous_cid`). The map between the two
is published only as `indexer.pkl`. A pickle runs code when it is opened, so semid never opens it: embeddings need the
map as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float, Int

from semid import artifacts
from semid.arrow import is_vector, to_lists
from semid.config import check_seed
from semid.data.builders.tables import TableBuilder, read_dataset
from semid.data.dataset import Dataset
from semid.data.splits import LeaveOneOut, SplitRule
from semid.data.storage import open_parquet
from semid.data.tables import read_table
from semid.data.ties import SourceOrder, TieRule
from semid.errors import SemidError

RELEASES = {each: f"https://huggingface.co/datasets/TAAC2025/TencentGR-{each.upper()}" for each in ("1m", "10m")}
ACTIONS = ("exposure", "click", "conversion")  # by action_type
FEATURES = ("100", "101", "102", "112", "114", "115", "116", "117", "118", "119", "120", "121", "122")
_ROWS = 4096  # rows of a Parquet file per batch
_NOTHING = np.iinfo(np.int64).min  # marks a field without a value


@dataclass(eq=False)
class TencentConfig(tfds.core.BuilderConfig):
    """A release, and the part of it to read."""

    release: str = "1m"
    users: int | None = None
    seed: int = 0
    embeddings: tuple[int, ...] = ()
    item_ids: Path | None = None


class TencentGR(TableBuilder):
    """TencentGR: one history per user, each interaction an exposure, click or conversion; items are those in histories.

    Files are read in batches: memory holds one batch, and the data of the chosen users.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the folders seq, item_feat and mm_emb of one of these into the manual folder:\n"
        + ("\n".join(RELEASES.values()))
    )

    @property
    def _features(self) -> dict[str, Any]:
        tensor = tfds.features.Tensor
        if self._holds_items:
            vector = tensor(shape=(None,), dtype=np.float32)  # the width is known only from the files
            numbers = {
                "item_id": tensor(shape=(), dtype=np.int64),
                "features": tensor(shape=(len(FEATURES),), dtype=np.int64),
            }
            return numbers | dict.fromkeys(map(_column, self.builder_config.embeddings), vector)
        return {
            "user_id": tfds.features.Text(),
            "item_id": tensor(shape=(None,), dtype=np.int64),
            "timestamp": tensor(shape=(None,), dtype=np.int64),
            "event": tfds.features.Sequence(tfds.features.ClassLabel(names=ACTIONS)),
        }

    def _located(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Path]:
        page = RELEASES[self.builder_config.release]
        try:
            folder = Path(dl_manager.manual_dir)
        except AssertionError as error:  # TFDS raises it for a folder that is missing or empty
            raise SemidError(f"{str(error).split('. ')[0]}; put the files of {page} there") from None
        for name in self._folders:
            if len({file.parent for file in folder.glob(f"{name}/*.parquet")}) != 1:
                raise SemidError(f"{folder}: expected Parquet files in one folder {name}; download them from {page}")
        return self.present(folder)

    @property
    def _folders(self) -> list[str]:
        """Patterns of the folders that this table is read from."""
        return ["seq", *(["item_feat", *map(_folder, self.builder_config.embeddings)] if self._holds_items else [])]

    def present(self, folder: Path) -> dict[str, Path]:
        files = [file for name in self._folders for file in sorted(folder.glob(f"{name}/*.parquet"))]
        paths = {file.relative_to(folder).as_posix(): file for file in files}
        config = self.builder_config
        if self._holds_items and config.embeddings and config.item_ids is not None:
            paths[config.item_ids.name] = config.item_ids
        return paths

    def _generate_records(self, paths: Mapping[str, Path]) -> Iterator[dict]:
        return self._items(paths) if self._holds_items else self._histories(paths)

    def item_table(self, records: list[dict]) -> pa.Table:
        """Fields as words, e.g. `100_4` in `feature_100`, null without a value, and vectors."""
        values = np.array([record["features"] for record in records])
        columns = {"item_id": pa.array([record["item_id"] for record in records], pa.int64()).cast(pa.string())}
        for name, numbers in zip(FEATURES, values.T, strict=True):
            words = pa.array(numbers, mask=numbers == _NOTHING).cast(pa.string())
            columns[f"feature_{name}"] = pc.binary_join_element_wise(name, words, "_")
        for name in map(_column, self.builder_config.embeddings):
            columns[name] = to_lists(np.stack([record[name] for record in records]))
        return pa.table(columns)

    def _histories(self, paths: Mapping[str, Path]) -> Iterator[dict]:
        config, nulls, none = self.builder_config, 0, 0
        for batch in _sequences(_under(paths, "seq"), users=config.users, seed=config.seed):
            nulls, none = nulls + batch.null_actions, none + batch.without_item
            ends = np.cumsum(batch.lengths)
            columns = (np.split(each, ends[:-1]) for each in (batch.item, batch.time, batch.action))
            for user, item, time, action in zip(batch.users.to_pylist(), *columns, strict=True):
                if len(item):
                    yield {"user_id": user, "item_id": item, "timestamp": 1000 * time, "event": action}
        counts = {"null action types, read as exposures": nulls, "records without an item, left out": none}
        self.info.metadata["counts"] = counts

    def _items(self, paths: Mapping[str, Path]) -> Iterator[dict]:
        config = self.builder_config
        batches = _sequences(_under(paths, "seq"), users=config.users, seed=config.seed)
        items = np.unique(np.concatenate([np.unique(batch.item) for batch in batches]))
        features, known = _item_features(_under(paths, "item_feat"), items)
        counts, vectors = {"items without features": int((~known).sum())}, {}
        originals = None if config.item_ids is None else _original_ids(config.item_ids, items)
        for number in config.embeddings:
            files = [path for path in paths.values() if path.parent.match(_folder(number))]
            vectors[_column(number)], found = _vectors(files, originals)
            counts[f"items without {_column(number)}, zeros there"] = len(items) - found
        self.info.metadata["counts"] = counts
        for row, item in enumerate(items):
            yield {"item_id": item, "features": features[row], **{name: each[row] for name, each in vectors.items()}}


def _column(embedding: int) -> str:
    return f"emb_{embedding}"


def _folder(embedding: int) -> str:
    """Pattern of an embedding's folder, whose name ends with the width, which differs between releases."""
    return f"mm_emb/emb_{embedding}_*"


def _under(paths: Mapping[str, Path], folder: str) -> list[Path]:
    return [path for name, path in paths.items() if name.startswith(f"{folder}/")]


class _Kind(NamedTuple):
    """Check of a column's type, and a description of the types it admits."""

    admits: Callable[[pa.DataType], bool]
    expected: str


def _is_id(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)


def _is_sequence(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    return all(name in fields and _is_number(fields[name]) for name in ("item_id", "action_type", "timestamp"))


_ID = _Kind(_is_id, "integers or strings")
_INTEGER = _Kind(pa.types.is_integer, "integers")
_NUMBER = _Kind(_is_number, "numbers")
_SEQUENCE = _Kind(_is_sequence, "list<struct<item_id, action_type, timestamp>> of numbers")
_VECTOR = _Kind(is_vector, "lists of numbers")


@dataclass(frozen=True)
class _Sequences:
    """Interactions of some users: user after user, each in file order."""

    users: pa.Array
    lengths: Int[np.ndarray, " users"]
    item: Int[np.ndarray, " n"]
    time: Int[np.ndarray, " n"]
    action: Int[np.ndarray, " n"]
    null_actions: int
    without_item: int


def _sequences(files: Sequence[Path], *, users: int | None, seed: int) -> Iterator[_Sequences]:
    """Interactions in batches: of all users, or of `users` rows of the files drawn by `seed`."""
    chosen, first = _chosen_rows(files, users, seed), 0
    for path, batch in _batches(files, {"user_id": _ID, "seq": _SEQUENCE}):
        rows = np.arange(len(batch))
        if chosen is not None:
            start, stop = np.searchsorted(chosen, [first, first + len(batch)])
            rows = chosen[start:stop] - first
        if len(rows):
            yield _flat(path, batch.take(pa.array(rows)))
        first += len(batch)


def _chosen_rows(files: Sequence[Path], users: int | None, seed: int) -> Int[np.ndarray, " rows"] | None:
    """Ascending numbers of the chosen rows, counted through the files; None: all."""
    if users is None:
        return None
    total = 0
    for path in files:
        with open_parquet(str(path)) as file:
            total += file.metadata.num_rows
    if not 1 <= users <= total:
        raise SemidError(f"{files[0].parent}: expected users of 1 to {total}, as many as there are, got {users}")
    return np.sort(np.random.default_rng(seed).choice(total, users, replace=False, shuffle=False))


def _flat(path: Path, batch: pa.RecordBatch) -> _Sequences:
    sequences = batch.column("seq")
    records = sequences.flatten()
    item, action, time = (pc.struct_field(records, name) for name in ("item_id", "action_type", "timestamp"))
    real = item.is_valid().to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(batch)), pc.fill_null(pc.list_value_length(sequences), 0).to_numpy())[real]
    item, action, time = (each.filter(pa.array(real)) for each in (item, action, time))
    if time.null_count or batch.column("user_id").null_count:
        name = "seq.timestamp" if time.null_count else "user_id"
        raise SemidError(f"{path}: column {name!r}: {max(time.null_count, 1)} values are null; download the file again")
    numbers = pc.fill_null(action, ACTIONS.index("exposure")).cast(pa.int64()).to_numpy()
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(ACTIONS):
        odd = numbers[(numbers < 0) | (numbers >= len(ACTIONS))][0]
        raise SemidError(
            f"{path}: column 'seq.action_type': expected 0, 1, 2 ({', '.join(ACTIONS)}) or null, got {odd}"
        )
    return _Sequences(
        users=batch.column("user_id").cast(pa.string()),
        lengths=np.bincount(owner, minlength=len(batch)),
        item=item.cast(pa.int64()).to_numpy(),
        time=time.cast(pa.int64()).to_numpy(),
        action=numbers,
        null_actions=action.null_count,
        without_item=int((~real).sum()),
    )


def _item_features(
    files: Sequence[Path], items: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, "n features"], Bool[np.ndarray, " n"]]:
    """Values of the items' fields, `_NOTHING` where missing, and a mask of the items that the files have."""
    values, known = np.full((len(items), len(FEATURES)), _NOTHING), np.zeros(len(items), bool)
    for path, batch in _batches(files, {"item_id": _INTEGER} | dict.fromkeys(FEATURES, _NUMBER)):
        at = pc.index_in(batch.column("item_id").cast(pa.int64()), value_set=pa.array(items))
        some, rows = batch.filter(at.is_valid()), at.drop_null().to_numpy()
        known[rows] = True
        for place, name in enumerate(FEATURES):
            try:
                numbers = some.column(name).cast(pa.int64())
            except pa.ArrowInvalid as error:
                raise SemidError(f"{path}: column {name!r}: expected whole numbers ({error})") from None
            values[rows, place] = pc.fill_null(numbers, _NOTHING).to_numpy()
    return values, known


def _original_ids(path: Path, items: Int[np.ndarray, " n"]) -> pa.Array:
    """Original id of each item; null if the table lacks it."""
    names = ("item_id", "anonymous_cid")
    table = read_table(path, strings=names)
    for name in names:
        if name not in table.column_names:
            raise SemidError(f"{path}: column {name!r} is missing; found {', '.join(table.column_names)}; add it")
    item, original = (table[name].combine_chunks().cast(pa.string()) for name in names)
    found = original.take(pc.index_in(pa.array(items).cast(pa.string()), value_set=item))
    if found.null_count == len(found):
        raise SemidError(f"{path}: column 'item_id': has none of the {len(items)} items; expected numbers as in seq")
    return found


def _vectors(files: Sequence[Path], originals: pa.Array) -> tuple[Float[np.ndarray, "items width"], int]:
    """Vectors of the items by original ids, zeros where missing, and the number of items that have one."""
    rows = np.flatnonzero(originals.is_valid().to_numpy(zero_copy_only=False))
    known, vectors, found = originals.drop_null(), None, np.zeros(len(originals), bool)
    for path, batch in _batches(files, {"anonymous_cid": _ID, "emb": _VECTOR}):
        batch = batch.filter(batch.column("emb").is_valid())
        lengths = pc.list_value_length(batch.column("emb")).to_numpy()
        if vectors is None and len(batch):
            vectors = np.zeros((len(originals), lengths[0]), np.float32)
        at = pc.index_in(batch.column("anonymous_cid").cast(pa.string()), value_set=known, skip_nulls=True)
        some = at.is_valid().to_numpy(zero_copy_only=False)
        if vectors is None or not some.any():
            continue
        width = vectors.shape[1]
        if (lengths[some] != width).any():
            odd = lengths[some][lengths[some] != width][0]
            raise SemidError(f"{path}: column 'emb': vector of {odd} numbers, expected {width} as in the first row")
        values = batch.column("emb").filter(pa.array(some)).flatten()
        to = rows[at.drop_null().to_numpy()]
        vectors[to] = values.cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(-1, width)
        found[to] = True
    if vectors is None:
        raise SemidError(f"{files[0].parent}: column 'emb': has no vectors; download the files again")
    return vectors, int(found.sum())


def _batches(files: Sequence[Path], columns: Mapping[str, _Kind]) -> Iterator[tuple[Path, pa.RecordBatch]]:
    """Columns of Parquet files in batches. Raises SemidError naming the file and the column that is not as expected."""
    for path in files:
        with open_parquet(str(path)) as file:
            schema = file.schema_arrow
            for name, kind in columns.items():
                if name not in schema.names:
                    raise SemidError(f"{path}: column {name!r} is missing; found {', '.join(schema.names)}")
                if not kind.admits(found := schema.field(name).type):
                    raise SemidError(f"{path}: column {name!r}: expected {kind.expected}, got {found}")
            try:
                for batch in file.iter_batches(_ROWS, columns=list(columns)):
                    yield path, batch
            except (OSError, pa.ArrowException) as error:
                problem = artifacts.first_line(error)
                raise SemidError(f"{path}: damaged or not readable ({problem}); download the file again") from None


def read_tencentgr(
    release: str,
    *,
    manual_dir: str | Path,
    data_dir: str | Path,
    users: int | None = None,
    seed: int = 0,
    embeddings: Sequence[int] = (),
    item_ids: str | Path | None = None,
    name: str | None = None,
    split_rule: SplitRule = LeaveOneOut(),
    ties: TieRule = SourceOrder(),
    checksums: Mapping[str, str] | None = None,
) -> Dataset:
    """TencentGR of `release` "1m" or "10m", from the folders `seq`, `item_feat` and `mm_emb/emb_*` in `manual_dir`;
    with `users`, a random choice of so many by `seed`.

    Items are those of the chosen users by ascending number, with the fields of `item_feat` as words (`feature_100` is
    `100_4`) and the vectors `emb_81` etc. of the chosen `embeddings`. These need `item_ids`, a table with columns
    `item_id` and `anonymous_cid`; an item without a vector gets zeros. Interactions have the events `exposure`, `click`
    and `conversion`; a null action type counts as an exposure. The dataset's `source` records how often each of these
    substitutions was made. Prepared files are kept below `data_dir`. Raises SemidError naming the file and column that
    is not as published.
    """
    check_seed(seed)
    if release not in RELEASES:
        raise SemidError(f"expected release {' or '.join(RELEASES)}, got {release!r}")
    if embeddings and item_ids is None:
        raise SemidError(
            "embeddings are by original ids (anonymous_cid), items by numbers; the map is in indexer.pkl alone, a "
            "pickle, which semid never opens; write it as a table with columns item_id and anonymous_cid, and name it "
            "(--item-ids)"
        )
    manual_dir = artifacts.local_only(manual_dir, "the files are read in place")
    data_dir = artifacts.local_only(data_dir, "TensorFlow Datasets prepares files there")
    table = None if item_ids is None else artifacts.fetched(item_ids)
    known = dict(checksums or {}) | ({} if table is None else {table.name: artifacts.sha256(table)})
    subset = release if users is None else f"{release}-{users}-users-of-seed-{seed}"
    which = "-".join([subset, *(_column(each) for each in embeddings)])
    builders = [
        TencentGR(
            config=TencentConfig(
                name=config, release=release, users=users, seed=seed, embeddings=tuple(embeddings), item_ids=table
            ),
            data_dir=data_dir,
            checksums=known,
        )
        for config in (f"{which}-items", f"{subset}-histories")
    ]
    source = {"type": "tencentgr", "release": release, "users": users, "seed": seed, "embeddings": list(embeddings)}
    name = name or f"tencentgr-{release}"
    return read_dataset(builders, manual_dir=manual_dir, name=name, split_rule=split_rule, ties=ties, source=source)
