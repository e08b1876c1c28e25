"""Versions of a catalogue: its artifact never changes, `changes/000001.parquet` and so on make later versions of it.

Each change is one small file that says which version it makes of which (by digest, as commits do), so that a replica
that applies the files in order has the same catalogue, and a file that was edited, lost or brought twice is found. An
item's codes never change: what is removed keeps row and codes as a tombstone, and gets them back if it returns.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from semid import artifacts
from semid.arrow import to_matrix, write_parquet
from semid.artifacts import Kind, Origin
from semid.catalog.catalog import CATALOG_FILE, TOKENIZER_FILE, SemanticCatalog
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


@dataclass(frozen=True)
class Version:
    """One version of a catalogue."""

    number: int
    digest: str
    catalog: SemanticCatalog
    tokenizer: str
    """sha256 of the tokenizer's file; empty: codes were imported."""


class Entry(NamedTuple):
    """A line of the history; `items` is how many a change appended or removed, `alive` how many the version has."""

    version: int
    kind: str
    items: int
    alive: int
    digest: str
    created: str


@dataclass(frozen=True)
class Difference:
    """Difference of two catalogues: items that came and went, and codes of the others that changed."""

    appended: list[str]
    removed: list[str]
    common: int
    """Items of both."""
    changed: float
    """Share of these whose codes are others."""
    changed_by_level: tuple[float, ...]
    """Share of these whose code at a level is another; 1 at levels that only one of the two has."""


def current(folder: str | Path, version: int | None = None) -> Version:
    """Read the current, or a given, version of a catalogue folder, with number and digest.

    Raises SemidError naming a file that does not fit.
    """
    folder = Path(folder)
    base = _base(folder)
    changes = list(_changes(folder, base, version, ("item_id", "codes")))
    last = changes[-1].header if changes else None
    catalog = _replayed(base.catalog, changes)
    return Version(last.version if last else 0, last.digest if last else base.digest, catalog, base.tokenizer)


def history(folder: str | Path) -> list[Entry]:
    """All versions, the artifact itself first. Reads no items."""
    folder = Path(folder)
    base = _base(folder)
    made = artifacts.read_manifest(folder)
    alive = base.catalog.num_alive
    entries = [Entry(0, "tokenize" if base.tokenizer else "import-codes", alive, alive, base.digest, made.created)]
    for change in _changes(folder, base, None, ()):
        header = change.header
        alive += header.items if header.kind == ChangeKind.APPEND.value else -header.items
        entries.append(Entry(header.version, header.kind, header.items, alive, header.digest, header.created))
    return entries


def verify(folder: str | Path) -> Version:
    """Read every byte of every version. Raises SemidError naming the first file that does not fit: edited, missing, of
    another catalogue or tokenizer, with codes out of range, an item twice or moved, or codes of two items."""
    folder = Path(folder)
    base = _base(folder)
    for _ in _changes(folder, base, None, None):
        pass
    found = current(folder)
    if found.catalog.tie_break:
        codes = found.catalog.codes
        order = np.lexsort(codes.T[::-1])
        same = np.flatnonzero((codes[order][1:] == codes[order][:-1]).all(axis=1))
        if len(same):
            one, other = (found.catalog.item_ids[int(row)] for row in order[same[0] : same[0] + 2])
            raise SemidError(f"{folder}: items {one} and {other} have the same codes; tokenize again")
    return found


def commit(folder: str | Path, before: Version, kind: ChangeKind, items: pa.Table) -> Version:
    """Write the change that makes the next version of `before`, whole or not at all.

    Raises SemidError where it does not fit, where another process came first, and where the disk does not take it.
    """
    columns = {name: _column_digest(items[name]) for name in items.column_names}
    created, sizes = datetime.now(UTC).isoformat(timespec="seconds"), before.catalog.level_sizes
    header = Header(
        before.number + 1, kind.value, before.digest, sizes, before.tokenizer, items.num_rows, columns, created
    )
    return _publish(Path(folder), before, header, items)


def apply(folder: str | Path, file: str | Path) -> Version:
    """Make a replica's next version of the file of a change that was made elsewhere.

    Raises SemidError, naming the version that is expected, for a file that was applied before, that comes too early,
    or that belongs to another catalogue.
    """
    folder, file = Path(folder), Path(file)
    before, change = current(folder), _read_change(file, None)
    header, expected = change.header, before.number + 1
    where = f"{folder} is at version {before.number} and expects version {expected}"
    if header.tokenizer != before.tokenizer or header.level_sizes != before.catalog.level_sizes:
        raise SemidError(f"{file}: made with another tokenizer ({header.tokenizer[:12]}) than that of {folder} "
                         f"({before.tokenizer[:12]}); apply it to a copy of its own catalogue")  # fmt: skip
    if header.version < expected:
        own = current(folder, header.version).digest == header.digest
        what = "was applied before" if own else "is another change than the one that stands here: the copies parted"
        raise SemidError(f"{file}: version {header.version} {what}; {where}")
    if header.version > expected:
        raise SemidError(f"{file}: makes version {header.version}, out of order; {where}: apply that first")
    if header.parent != before.digest:
        raise SemidError(
            f"{file}: follows a version {before.number} of digest {header.parent[:12]}, but that of {folder} is "
            f"{before.digest[:12]}: another catalogue, or the copies parted"
        )
    return _publish(folder, before, header, change.items)


def vectors(
    folder: str | Path,
    columns: Sequence[str],
    item_ids: pa.Array,
    version: int | None = None,
    *,
    removed: Bool[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, "n dim"]:
    """Raw vectors of appended items, `columns` side by side, as last given: by the latest change with all `columns`.

    `removed` items may lack vectors: theirs are then zeros, of dim 0 if no item has any.
    Raises SemidError naming a change that lacks a column and has an item that no other gives it, vectors of another
    width, and an item that no change appended.
    """
    folder = Path(folder)
    places, found, lacking = [np.zeros(0, int)], list[np.ndarray](), list[tuple[Change, str]]()
    wanted = pa.table({"item_id": item_ids, "place": np.arange(len(item_ids))})
    for change in reversed(list(_changes(folder, _base(folder), version, ("item_id",)))):
        rows = pc.index_in(wanted["item_id"], change.items["item_id"].combine_chunks())
        here = pc.is_valid(rows)
        if change.header.kind != ChangeKind.APPEND.value or not pc.any(here).as_py():
            continue
        if missing := [name for name in columns if name not in change.header.columns]:
            lacking.append((change, missing[0]))
            continue
        items = _read_change(change.file, columns).items.take(rows.filter(here))
        found.append(np.concatenate([to_matrix(items[name]).astype(np.float32) for name in columns], axis=1))
        if (width := found[-1].shape[1]) != (other := found[0].shape[1]):
            raise SemidError(f"{change.file}: has vectors of {width} dimensions, later changes of {other}; remove its "
                             "items and append them with vectors as wide")  # fmt: skip
        places.append(wanted["place"].filter(here).to_numpy())
        wanted = wanted.filter(pc.invert(here))
    left = wanted["place"].to_numpy()
    for place in (left if removed is None else left[~removed[left]])[:1].tolist():
        raise _no_vectors(folder, item_ids[place], lacking)
    result = np.zeros((len(item_ids), found[0].shape[1] if found else 0), np.float32)
    if found:
        result[np.concatenate(places)] = np.concatenate(found)
    return result


def _no_vectors(folder: Path, item: pa.Scalar, lacking: Sequence[tuple[Change, str]]) -> SemidError:
    """Names the latest of the changes that append the item without a column."""
    for change, column in lacking:
        if pc.index(change.items["item_id"], item).as_py() >= 0:
            return SemidError(
                f"{change.file}: item {item} has no vectors {column!r}, which the model reads; remove it, and append "
                "it with that column"
            )
    return SemidError(
        f"{folder}: no change appended item {item}; its vectors are not known; remove it, or train on a dataset "
        "that has it"
    )


def diff(old: SemanticCatalog, new: SemanticCatalog) -> Difference:
    """Compare two catalogues: versions of one, or those of two tokenizers."""
    before, after = (catalog.item_ids.filter(pa.array(catalog.alive)) for catalog in (old, new))
    common = before.filter(pc.is_in(before, after))
    rows, others = old.rows(common), new.rows(common)
    shared = min(old.num_levels, new.num_levels)
    same = old.codes[rows, :shared] == new.codes[others, :shared]
    one_sided = (1.0,) * (max(old.num_levels, new.num_levels) - shared)
    by_level = (*(1 - same.mean(axis=0)).tolist(), *one_sided) if len(common) else ()
    changed = 1.0 if one_sided else 1 - float(same.all(axis=1).mean()) if len(common) else 0.0
    return Difference(
        after.filter(pc.invert(pc.is_in(after, before))).to_pylist(),
        before.filter(pc.invert(pc.is_in(before, after))).to_pylist(),
        len(common),
        changed,
        by_level,
    )


def _base(folder: Path) -> Version:
    """Version 0: the artifact, every file verified."""
    manifest = artifacts.read_artifact(folder, Kind.CATALOG)
    tokenizer = manifest.files.get(TOKENIZER_FILE, "")
    catalog = SemanticCatalog.read(folder / CATALOG_FILE).with_origin(Origin(folder, manifest))
    return Version(0, manifest.digest, catalog, tokenizer)


def _changes(folder: Path, base: Version, version: int | None, columns: Sequence[str] | None) -> Iterator[Change]:
    """The changes up to a version (None: all) in order, each checked to follow the one before; see `_read_change`."""
    files = [path for path in (folder / FOLDER).glob("*") if _NAME.fullmatch(path.name)]
    last = max((int(path.stem) for path in files), default=0)
    if version is not None and not 0 <= version <= last:
        raise SemidError(f"{folder}: has versions 0 to {last}, and not {version}")
    digest = base.digest
    for number in range(1, (last if version is None else version) + 1):
        file = _file(folder, number)
        change = _read_change(file, columns)
        header = change.header
        if header.version != number or header.parent != digest:
            raise SemidError(
                f"{file}: makes version {header.version} of {header.parent[:12]}, expected version {number} of "
                f"{digest[:12]}: it does not follow the one before; restore {folder / FOLDER} from a copy"
            )
        if header.tokenizer != base.tokenizer or header.level_sizes != base.catalog.level_sizes:
            raise SemidError(f"{file}: made with another tokenizer than that of {folder}; restore it from a copy")
        digest = header.digest
        yield change


def _file(folder: Path, version: int) -> Path:
    return folder / FOLDER / f"{version:06}.parquet"


def _read_change(file: Path, columns: Sequence[str] | None) -> Change:
    """A change with these of its columns (None: all), verified. Raises SemidError naming the file."""
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        header = _header(file, parquet.schema_arrow.metadata or {})
        names = [name for name in header.columns if columns is None or name in columns]
        items = parquet.read(columns=names)
    except FileNotFoundError:
        raise SemidError(f"{file}: is missing; restore it from a copy") from None
    except (OSError, pa.ArrowException) as error:
        raise SemidError(f"{file}: not a readable Parquet file ({error}); restore it from a copy") from None
    for name in names:
        if name not in items.column_names or _column_digest(items[name]) != header.columns[name]:
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


def _publish(folder: Path, before: Version, header: Header, items: pa.Table) -> Version:
    """Write a change and return the version it makes."""
    file = _file(folder, header.version)
    after = _replayed(before.catalog, [Change(file, header, items)])
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
    return Version(header.version, header.digest, after, before.tokenizer)


def _replayed(base: SemanticCatalog, changes: Sequence[Change]) -> SemanticCatalog:
    """`base` after these changes. Raises SemidError naming the file and the item that does not fit."""
    if not changes:
        return base
    touched = pa.chunked_array([chunk for change in changes for chunk in change.items["item_id"].chunks], pa.string())
    in_base = iter(pc.index_in(touched, base.item_ids).to_pylist())
    rows: dict[str, int] = {}  # of items that were appended
    fresh: list[np.ndarray] = []  # their codes
    removed = np.zeros(len(base) + len(touched), bool)
    removed[: len(base)] = ~base.alive
    for change in changes:
        appends = change.header.kind == ChangeKind.APPEND.value
        own = _checked_codes(change, base) if appends else None
        for place, item in enumerate(change.items["item_id"].to_pylist()):
            known = next(in_base)
            row = rows.get(item) if known is None else known
            if row is None and own is not None:
                rows[item] = len(base) + len(rows)
                fresh.append(own[place])
            elif row is None or removed[row] != appends:
                fault = "is not in the catalogue" if row is None or removed[row] else "is in the catalogue already"
                raise SemidError(f"{change.file}: item {item!r} (row {place + 1}) {fault}: no {change.header.kind}")
            else:
                before = base.codes[row] if row < len(base) else fresh[row - len(base)]
                if own is not None and (own[place] != before).any():
                    raise SemidError(f"{change.file}: item {item!r} (row {place + 1}) comes back with other codes")
                removed[row] = not appends
    ids = pa.concat_arrays([base.item_ids, pa.array(list(rows), pa.string())])
    codes = np.concatenate([base.codes, np.reshape(fresh, (-1, base.num_levels)).astype(np.int32)])
    removed = removed[: len(codes)]
    return SemanticCatalog(ids, codes, base.level_sizes, base.tie_break, removed, origin=base.origin)


def _checked_codes(change: Change, base: SemanticCatalog) -> np.ndarray:
    """The codes of an append. Raises SemidError naming the first item whose codes are outside the level sizes."""
    codes = to_matrix(change.items["codes"]).astype(np.int32)
    if codes.shape[1:] != (base.num_levels,):
        raise SemidError(f"{change.file}: expected {base.num_levels} codes an item, got {codes.shape[1]}")
    outside = np.argwhere((codes < 0) | (codes >= np.array(base.level_sizes)[None]))
    if len(outside):
        row, level = outside[0].tolist()
        raise SemidError(
            f"{change.file}: item {change.items['item_id'][row]} (row {row + 1}): code {codes[row, level]} at level "
            f"{level} is outside 0..{base.level_sizes[level] - 1}"
        )
    return codes


def _column_digest(column: pa.ChunkedArray) -> str:
    """sha256 of a column's values, however a file stores them."""
    if pa.types.is_fixed_size_list(column.type):
        total = hashlib.sha256(str([str(column.type.value_type), column.type.list_size]).encode())
        total.update(np.ascontiguousarray(to_matrix(column)).tobytes())
        return total.hexdigest()
    return artifacts.sha256_json(column.to_pylist())
