"""Changes of a catalogue: the files `changes/000001.parquet` and so on of its folder, read in order and replayed.

Each is one small file that says which version it makes of which (by digest, as commits do), so that a replica that
applies the files in order has the same catalogue, and a file that was edited, lost or brought twice is found. An item's
codes never change: a removed item keeps its row and codes, and is active again if it returns.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from semid import artifacts
from semid.arrow import to_matrix, write_parquet
from semid.errors import SemidError

SCHEMA_VERSION = 1
FOLDER = "changes"
_HEADER = b"semid.change"
_NAME = re.compile(r"[0-9]{6,}\.parquet")


class ChangeKind(enum.Enum):
    """Kinds of changes."""

    APPEND = "append"
    REMOVE = "remove"


@dataclass(frozen=True)
class Header:
    """Header of a change's file."""

    version: int
    """Version that it makes."""
    kind: str
    """A `ChangeKind`."""
    parent: str
    """Digest of the version before; of version 0, the artifact's."""
    level_sizes: tuple[int, ...]
    tokenizer: str
    """sha256 of the tokenizer's file; empty: codes were imported."""
    items: int
    """Number of items."""
    columns: dict[str, str]
    """sha256 of each column: item_id, and of an append codes and vectors."""
    created: str
    """When, in UTC."""
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """Digest of the version that it makes: of this header, and through its parent of every version before."""
        return artifacts.sha256_json(asdict(self))


class Change(NamedTuple):
    """A header and its items, or some of their columns; `file` is where it stands, for messages."""

    file: Path
    header: Header
    items: pa.Table


class BaseVersion(NamedTuple):
    """Version 0, the artifact, as the changes of its folder refer to it."""

    folder: Path
    digest: str
    tokenizer: str
    """sha256 of the tokenizer's file; empty: codes were imported."""
    level_sizes: tuple[int, ...]


class ItemCodes(NamedTuple):
    """Items with their codes, and which of them are removed."""

    item_ids: pa.Array
    codes: Int[np.ndarray, "items level"]
    removed: Bool[np.ndarray, " items"]


def change_file(folder: Path, version: int) -> Path:
    """File of the change that makes a version."""
    return folder / FOLDER / f"{version:06}.parquet"


def read_changes(base: BaseVersion, version: int | None, *, columns: Sequence[str] | None) -> Iterator[Change]:
    """The changes up to a version (None: all) in order, each checked to follow the one before; see `read_change`."""
    folder = base.folder
    files = [path for path in (folder / FOLDER).glob("*") if _NAME.fullmatch(path.name)]
    last = max((int(path.stem) for path in files), default=0)
    if version is not None and not 0 <= version <= last:
        raise SemidError(f"{folder}: has versions 0 to {last}, and not {version}")
    digest = base.digest
    for number in range(1, (last if version is None else version) + 1):
        file = change_file(folder, number)
        change = read_change(file, columns)
        header = change.header
        if header.version != number or header.parent != digest:
            raise SemidError(
                f"{file}: makes version {header.version} of {header.parent[:12]}, expected version {number} of "
                f"{digest[:12]}: it does not follow the one before; restore {folder / FOLDER} from a copy"
            )
        if header.tokenizer != base.tokenizer or header.level_sizes != base.level_sizes:
            raise SemidError(f"{file}: made with another tokenizer than that of {folder}; restore it from a copy")
        digest = header.digest
        yield change


def read_change(file: Path, columns: Sequence[str] | None) -> Change:
    """Read a change with these of its columns (None: all), verified. Raises SemidError naming the file."""
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        header = _header(file, parquet.schema_arrow.metadata or {})
        names = [name for name in header.columns if columns is None or name in columns]
        items = parquet.read(columns=names)
        items.validate(full=True)  # text that is not UTF-8
    except FileNotFoundError:
        raise SemidError(f"{file}: is missing; restore it from a copy") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SemidError(f"{file}: not a readable Parquet file ({error}); restore it from a copy") from None
    for name in names:
        if name not in items.column_names or column_digest(items[name]) != header.columns[name]:
            raise SemidError(
                f"{file}: column {name!r} is not what was written (edited by hand?); restore it from a copy"
            )
    return Change(file, header, items)


def _header(file: Path, metadata: dict[bytes, bytes]) -> Header:
    try:
        data = json.loads(metadata[_HEADER])
        version = data["schema_version"]
    except (KeyError, ValueError, TypeError):
        raise SemidError(f"{file}: not a change of a catalogue, as semid catalog append or remove writes") from None
    if version > SCHEMA_VERSION:
        raise SemidError(f"{file}: schema version {version} is newer than {SCHEMA_VERSION}; upgrade semid to read it")
    digest = data.pop("digest", None)
    if set(data) != {field.name for field in fields(Header)}:
        raise SemidError(f"{file}: its header is not of schema version {version}; restore it from a copy")
    header = Header(**data | {"level_sizes": tuple(data["level_sizes"])})
    if header.digest != digest or header.kind not in {kind.value for kind in ChangeKind}:
        raise SemidError(f"{file}: its header does not match its digest (edited by hand?); restore it from a copy")
    return header


def write_change(folder: Path, header: Header, items: pa.Table) -> None:
    """Write a change, whole or not at all.

    Raises SemidError where another process came first, and where the disk does not take it.
    """
    file = change_file(folder, header.version)
    metadata = {_HEADER: json.dumps({**asdict(header), "digest": header.digest})}
    table = items.select(list(header.columns)).replace_schema_metadata(metadata)
    try:
        if not file.parent.is_dir():
            file.parent.mkdir(exist_ok=True)
            artifacts.flush(folder)
        with artifacts.write_once(file) as temporary:
            write_parquet(table, temporary)
    except FileExistsError:
        raise SemidError(f"{file}: another process made this version in the meantime; run this again") from None
    except (OSError, pa.ArrowException) as error:
        stays = "stands, but may not outlive a power failure" if file.exists() else "is not written; nothing changed"
        raise SemidError(f"{file}: {error}: version {header.version} {stays}") from None


def replay(base: ItemCodes, changes: Sequence[Change], *, level_sizes: tuple[int, ...]) -> ItemCodes:
    """Items and codes after these changes. Raises SemidError naming the file and the item that does not fit."""
    touched = pa.chunked_array([chunk for change in changes for chunk in change.items["item_id"].chunks], pa.string())
    in_base = iter(pc.index_in(touched, base.item_ids).to_pylist())
    rows: dict[str, int] = {}  # of items that were appended
    fresh: list[np.ndarray] = []  # their codes
    removed = np.zeros(len(base.item_ids) + len(touched), bool)
    removed[: len(base.item_ids)] = base.removed
    for change in changes:
        appends = change.header.kind == ChangeKind.APPEND.value
        own = _checked_codes(change, level_sizes) if appends else None
        for place, item in enumerate(change.items["item_id"].to_pylist()):
            known = next(in_base)
            row = rows.get(item) if known is None else known
            if row is None and own is not None:
                rows[item] = len(base.item_ids) + len(rows)
                fresh.append(own[place])
            elif row is None or removed[row] != appends:
                fault = "is not in the catalogue" if row is None or removed[row] else "is in the catalogue already"
                raise SemidError(f"{change.file}: item {item!r} (row {place + 1}) {fault}: no {change.header.kind}")
            else:
                before = base.codes[row] if row < len(base.item_ids) else fresh[row - len(base.item_ids)]
                if own is not None and (own[place] != before).any():
                    raise SemidError(f"{change.file}: item {item!r} (row {place + 1}) comes back with other codes")
                removed[row] = not appends
    ids = pa.concat_arrays([base.item_ids, pa.array(list(rows), pa.string())])
    codes = np.concatenate([base.codes, np.reshape(fresh, (-1, len(level_sizes))).astype(np.int32)])
    return ItemCodes(ids, codes, removed[: len(codes)])


def _checked_codes(change: Change, level_sizes: tuple[int, ...]) -> np.ndarray:
    """The codes of an append. Raises SemidError naming the first item whose codes are outside the level sizes."""
    codes = to_matrix(change.items["codes"]).astype(np.int32)
    if codes.shape[1:] != (len(level_sizes),):
        raise SemidError(f"{change.file}: expected {len(level_sizes)} codes an item, got {codes.shape[1]}")
    outside = np.argwhere((codes < 0) | (codes >= np.array(level_sizes)[None]))
    if len(outside):
        row, level = outside[0].tolist()
        raise SemidError(
            f"{change.file}: item {change.items['item_id'][row]} (row {row + 1}): code {codes[row, level]} at level "
            f"{level} is outside 0..{level_sizes[level] - 1}"
        )
    return codes


def column_digest(column: pa.ChunkedArray) -> str:
    """sha256 of a column's values, however a file stores them."""
    if pa.types.is_fixed_size_list(column.type):
        total = hashlib.sha256(str([str(column.type.value_type), column.type.list_size]).encode())
        total.update(np.ascontiguousarray(to_matrix(column)).tobytes())
        return total.hexdigest()
    return artifacts.sha256_json(column.to_pylist())
