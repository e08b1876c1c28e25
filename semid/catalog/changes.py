"""Changes of a catalogue: the files `changes/000001.parquet` and so on in its folder, replayed in order.

Each is a small file with its version number and the digest of the version before, like a commit, so that a replica that
applies the files in order has the same catalogue, and an edited, lost or repeated file is detected. An item's codes
never change: a removed item keeps its row and codes, and is active again if it returns.

Two more files are optional: `snapshots/000100.parquet` merges all changes up to that version and is read instead of
them; `head.json` names the last version, so that the loss of its file is detected.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from semid import artifacts
from semid.arrow import to_matrix, write_parquet
from semid.errors import SemidError

SCHEMA_VERSION = 2
FOLDER, _SNAPSHOTS = "changes", "snapshots"
_HEADER = b"semid.change"
_HEAD = "head.json"
_NAME = re.compile(r"[0-9]{6,}\.parquet")
# Columns of the items' ids and states in a change; all others are vectors.
STATE_COLUMNS = ("item_id", "codes", "active")


class ChangeKind(enum.Enum):
    """Kinds of changes."""

    APPEND = "append"
    """Add items that are new or were removed."""
    REMOVE = "remove"
    """Remove active items."""
    UPDATE = "update"
    """Add items or replace their content; they may be active."""
    REVERT = "revert"
    """Set which known items are active."""
    SNAPSHOT = "snapshot"
    """No change: the merged state of all items that the changes up to a version touched."""

    @property
    def has_codes(self) -> bool:
        """Its items have codes, and may be new."""
        return self not in (ChangeKind.REMOVE, ChangeKind.REVERT)


@dataclass(frozen=True)
class Header:
    """Header of a change's file."""

    version: int
    """Number of the new version."""
    kind: str
    """A `ChangeKind`."""
    parent: str
    """Digest of the version before; for version 0, the artifact's."""
    level_sizes: tuple[int, ...]
    tokenizer: str
    """sha256 of the tokenizer's file; empty: codes were imported."""
    items: int
    """Number of items."""
    columns: dict[str, str]
    """sha256 of each column: item_id, and codes, vectors and active if it has them."""
    created: str
    """Time of the change, in UTC."""
    schema_version: int = SCHEMA_VERSION
    active: int | None = None
    """Number of active items in the new version; None in schema 1."""
    sources: dict[str, int] = field(default_factory=dict)
    """sha256 of the files that were appended, and by which version."""
    stands_for: str = ""
    """Digest of the version that a snapshot represents; empty for a change."""

    @property
    def record(self) -> dict[str, Any]:
        """JSON form, without the fields that its schema version lacks."""
        return {name: value for name, value in asdict(self).items() if name in _fields(self.schema_version)}

    @property
    def digest(self) -> str:
        """Digest of the new version: of this header, and through its parent of all versions before."""
        return artifacts.sha256_json(self.record)

    @property
    def change_kind(self) -> ChangeKind:
        return ChangeKind(self.kind)


def _fields(schema_version: int) -> set[str]:
    """Names of a header's fields."""
    later = {"active", "sources", "stands_for"} if schema_version < 2 else set()
    return {one.name for one in fields(Header)} - later


class Change(NamedTuple):
    """A header and its items, or some of their columns; `file` is its path, for messages."""

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
    """Items with their codes, and a mask of the removed ones."""

    item_ids: pa.Array
    codes: Int[np.ndarray, "items level"]
    removed: Bool[np.ndarray, " items"]


def change_file(folder: Path, version: int) -> Path:
    """File of the change that makes a version."""
    return folder / FOLDER / f"{version:06}.parquet"


def snapshot_file(folder: Path, version: int) -> Path:
    """File of the snapshot of a version."""
    return folder / _SNAPSHOTS / f"{version:06}.parquet"


class Files(NamedTuple):
    """Versions of a catalogue's folder: the `last` one by its changes and head, and those with a snapshot."""

    last: int
    snapshots: list[int]


def list_files(folder: Path) -> Files:
    """The versions of a folder. Raises SemidError if the head is not readable."""

    def versions(of: str) -> list[int]:
        return sorted(int(path.stem) for path in (folder / of).glob("*") if _NAME.fullmatch(path.name))

    return Files(max([0, *versions(FOLDER), _read_head(folder)]), versions(_SNAPSHOTS))


def finish_killed(folder: Path) -> None:
    """Remove unfinished changes of killed processes, and update the head to the last version that they finished."""
    for name in (FOLDER, _SNAPSHOTS):
        artifacts.remove_dead(folder / name, "@.writing.@")
    last = list_files(folder).last
    if last > _read_head(folder):
        _write_head(folder, last)


def _read_head(folder: Path) -> int:
    """The last version by the head file; 0 without one."""
    file = folder / _HEAD
    if not file.exists():
        return 0
    head = artifacts.read_json(file)
    version = head.get("version") if isinstance(head, dict) else None
    if type(version) is not int or head != _head(version):
        raise SemidError(f"{file}: is not what was written; check the versions (semid catalog history) and delete it")
    return version


def _head(version: int) -> dict[str, Any]:
    return {"version": version, "digest": artifacts.sha256_json(["head", version])}


def _write_head(folder: Path, version: int) -> None:
    """Update the head to the last version. Failures are ignored, as an outdated head does no harm."""
    with contextlib.suppress(OSError):
        artifacts.write_json(folder / _HEAD, _head(version))


def read_changes(
    base: BaseVersion, version: int | None, *, columns: Sequence[str] | None, snapshots: bool = True
) -> Iterator[Change]:
    """The changes up to a version (None: all) in order, each checked to follow the one before; see `read_change`.

    With `snapshots`, the latest snapshot comes first and replaces the changes that it merges.
    """
    folder, found = base.folder, list_files(base.folder)
    if version is not None and not 0 <= version <= found.last:
        raise SemidError(f"{folder}: has versions 0 to {found.last}, and not {version}")
    last, first, digest = found.last if version is None else version, 0, base.digest
    if snapshots and (earlier := [one for one in found.snapshots if one <= last]):
        first = earlier[-1]
        snapshot = read_snapshot(base, first, columns)
        digest = snapshot.header.stands_for
        yield snapshot
    for number in range(first + 1, last + 1):
        file = change_file(folder, number)
        change = read_change(file, columns)
        header = change.header
        if header.version != number or header.parent != digest or header.change_kind is ChangeKind.SNAPSHOT:
            raise SemidError(
                f"{file}: makes version {header.version} of {header.parent[:12]}, expected version {number} of "
                f"{digest[:12]}: it does not follow the one before; restore {folder / FOLDER} from a copy"
            )
        _check_tokenizer(base, change)
        digest = header.digest
        yield change


def read_snapshot(base: BaseVersion, version: int, columns: Sequence[str] | None) -> Change:
    """Read some columns (None: all) of the snapshot of a version, verified against the change itself.

    Raises SemidError naming the file.
    """
    file = snapshot_file(base.folder, version)
    snapshot, made = read_change(file, columns), read_change(change_file(base.folder, version), ())
    header = snapshot.header
    if (header.version, header.parent, header.stands_for) != (version, base.digest, made.header.digest):
        raise SemidError(
            f"{file}: is not a snapshot of version {version} of this catalogue; delete it, and run semid catalog "
            "compact again"
        )
    _check_tokenizer(base, snapshot)
    return snapshot


def _check_tokenizer(base: BaseVersion, change: Change) -> None:
    if change.header.tokenizer != base.tokenizer or change.header.level_sizes != base.level_sizes:
        raise SemidError(
            f"{change.file}: made with another tokenizer than that of {base.folder}; restore it from a copy"
        )


def read_change(file: Path, columns: Sequence[str] | None) -> Change:
    """Read and verify some columns (None: all) of a change. Raises SemidError naming the file."""
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        header = _header(file, parquet.schema_arrow.metadata or {})
        names = [name for name in header.columns if columns is None or name in columns]
        items = parquet.read(columns=names)
        items.validate(full=True)  # text that is not UTF-8
    except FileNotFoundError:
        raise SemidError(f"{file}: is missing; restore it from a copy") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SemidError(f"{file}: not a readable Parquet file ({reason}); restore it from a copy") from None
    for name in names:
        if name not in items.column_names or column_digest(items[name]) != header.columns[name]:
            raise SemidError(
                f"{file}: column {name!r} is not what was written (edited by hand?); restore it from a copy"
            )
    return Change(file, header, items)


def _header(file: Path, metadata: dict[bytes, bytes]) -> Header:
    try:
        data = artifacts.parse_json(metadata[_HEADER], where=file)
        version = data["schema_version"]
        if type(version) is not int:
            raise TypeError
    except (KeyError, ValueError, TypeError):
        raise SemidError(f"{file}: not a change of a catalogue, as semid catalog append or remove writes") from None
    if version > SCHEMA_VERSION:
        raise SemidError(f"{file}: schema version {version} is newer than {SCHEMA_VERSION}; upgrade semid to read it")
    digest = data.pop("digest", None)
    if set(data) != _fields(version) or not isinstance(data["level_sizes"], list):
        raise SemidError(f"{file}: its header is not of schema version {version}; restore it from a copy")
    header = Header(**data | {"level_sizes": tuple(data["level_sizes"])})
    if header.digest != digest or header.kind not in {kind.value for kind in ChangeKind}:
        raise SemidError(f"{file}: its header does not match its digest (edited by hand?); restore it from a copy")
    return header


def write_change(folder: Path, header: Header, items: pa.Table) -> None:
    """Write a change or a snapshot atomically.

    Raises SemidError if another process has made this version, or if the file cannot be written.
    """
    is_snapshot = header.change_kind is ChangeKind.SNAPSHOT
    file = (snapshot_file if is_snapshot else change_file)(folder, header.version)
    metadata = {_HEADER: json.dumps({**header.record, "digest": header.digest})}
    table = items.select(list(header.columns)).replace_schema_metadata(metadata)
    try:
        if not file.parent.is_dir():
            file.parent.mkdir(exist_ok=True)
            artifacts.flush(folder)
        with artifacts.write_once(file) as temporary:
            write_parquet(table, temporary)
        if not is_snapshot:
            _write_head(folder, header.version)
    except FileExistsError:
        raise SemidError(f"{file}: another process made this version in the meantime; run this again") from None
    except (OSError, pa.ArrowException) as error:
        stays = "stands, but may not outlive a power failure" if file.exists() else "is not written; nothing changed"
        raise SemidError(f"{file}: {error}: version {header.version} {stays}") from None


def replay(base: ItemCodes, changes: Sequence[Change], *, level_sizes: tuple[int, ...]) -> ItemCodes:
    """Items and codes after these changes. Raises SemidError naming the file and item of an invalid change."""
    touched = pa.chunked_array([chunk for change in changes for chunk in change.items["item_id"].chunks], pa.string())
    in_base = iter(pc.index_in(touched, base.item_ids).to_pylist())
    rows: dict[str, int] = {}  # rows of appended items
    fresh: list[np.ndarray] = []  # codes of appended items
    removed = np.zeros(len(base.item_ids) + len(touched), bool)
    removed[: len(base.item_ids)] = base.removed
    for change in changes:
        kind = change.header.change_kind
        own = _checked_codes(change, level_sizes) if kind.has_codes else None
        active = _active(change)
        for place, item in enumerate(change.items["item_id"].to_pylist()):
            known = next(in_base)
            row = rows.get(item) if known is None else known
            if row is None and own is not None:
                rows[item] = len(base.item_ids) + len(rows)
                fresh.append(own[place])
                removed[rows[item]] = not active[place]
            elif row is None or (kind in _STRICT and removed[row] != active[place]):
                fault = "is not in the catalogue" if row is None or removed[row] else "is in the catalogue already"
                raise SemidError(f"{change.file}: item {item!r} (row {place + 1}) {fault}: no {change.header.kind}")
            else:
                before = base.codes[row] if row < len(base.item_ids) else fresh[row - len(base.item_ids)]
                if own is not None and (own[place] != before).any():
                    raise SemidError(f"{change.file}: item {item!r} (row {place + 1}) comes back with other codes")
                removed[row] = not active[place]
    ids = pa.concat_arrays([base.item_ids, pa.array(list(rows), pa.string())])
    codes = np.concatenate([base.codes, np.reshape(fresh, (-1, len(level_sizes))).astype(np.int32)])
    return ItemCodes(ids, codes, removed[: len(codes)])


_STRICT = (ChangeKind.APPEND, ChangeKind.REMOVE)  # kinds that fail if an item already has the new state


def _active(change: Change) -> list[bool]:
    """Tell for each item of a change whether it is active afterwards."""
    if "active" in change.header.columns:
        return change.items["active"].to_pylist()
    return [change.header.change_kind is not ChangeKind.REMOVE] * change.items.num_rows


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


def given_vectors(change: Change, name: str, places: Sequence[int | None]) -> Iterator[tuple[int, np.ndarray]]:
    """Vectors of a column in a change, float32, with their items' `places`; items with place None are skipped."""
    column = change.items[name].combine_chunks()
    if not pa.types.is_fixed_size_list(column.type):  # snapshots have lists of variable size
        offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
        given = column.is_valid().to_pylist()
        yield from (
            (place, values[offsets[row] : offsets[row + 1]])
            for row, place in enumerate(places)
            if place is not None and given[row]
        )
        return
    matrix = to_matrix(column).astype(np.float32)
    yield from ((place, matrix[row]) for row, place in enumerate(places) if place is not None)


def column_digest(column: pa.ChunkedArray) -> str:
    """sha256 of a column's values, independent of their storage."""
    if pa.types.is_fixed_size_list(column.type):
        total = hashlib.sha256(str([str(column.type.value_type), column.type.list_size]).encode())
        total.update(np.ascontiguousarray(to_matrix(column)).tobytes())
        return total.hexdigest()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):  # a snapshot's, null where there are none
        values = column.combine_chunks()
        lengths = pc.fill_null(pc.list_value_length(values), -1).to_numpy()
        total = hashlib.sha256(str(column.type.value_type).encode() + lengths.astype(np.int64).tobytes())
        total.update(values.flatten().to_numpy().tobytes())
        return total.hexdigest()
    return artifacts.sha256_json(column.to_pylist())
