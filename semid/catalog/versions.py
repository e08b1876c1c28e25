"""Versions of a catalogue: version 0 is its artifact, and each file of `semid.catalog.changes` makes the next one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from semid import artifacts
from semid.arrow import to_lists
from semid.catalog.catalog import TOKENIZER_FILE, CatalogPath, SemanticCatalog
from semid.catalog.changes import (
    STATE_COLUMNS,
    BaseVersion,
    Change,
    ChangeKind,
    Header,
    change_file,
    column_digest,
    finish_killed,
    given_vectors,
    list_files,
    read_change,
    read_changes,
    read_snapshot,
    snapshot_file,
    write_change,
)
from semid.errors import SemidError


@dataclass(frozen=True)
class Version:
    """One version of a catalogue."""

    number: int
    digest: str
    catalog: SemanticCatalog
    tokenizer: str
    """sha256 of the tokenizer's file; empty: codes were imported."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """sha256 of the files appended so far, each with its version."""


class Entry(NamedTuple):
    """A line of the history: `items` is the number of items in the change, `active` that of active items after it."""

    version: int
    kind: str
    items: int
    active: int
    digest: str
    created: str


@dataclass(frozen=True)
class Difference:
    """Difference of two catalogues: added and removed items, and changed codes of the others."""

    appended: list[str]
    removed: list[str]
    common: int
    """Number of items in both."""
    changed: float
    """Share of these with other codes."""
    changed_by_level: tuple[float, ...]
    """Share of these with another code, per level; 1 at levels that only one of the two has."""


def current(folder: str | Path, version: int | None = None) -> Version:
    """Read the current or a given version of a catalogue folder ("folder@3"), with number and digest.

    Raises SemidError naming a file that is missing or damaged.
    """
    folder, version = CatalogPath.parse(folder, version)
    base = _base(folder)
    return _after(base, list(_changes(folder, base, version, STATE_COLUMNS)))


def _after(base: Version, changes: Sequence[Change]) -> Version:
    """The version after these changes of version 0."""
    if not changes:
        return base
    last = changes[-1].header
    sources = {digest: number for change in changes for digest, number in change.header.sources.items()}
    digest = last.stands_for or last.digest
    return Version(last.version, digest, base.catalog.after(changes), base.tokenizer, sources)


def history(folder: str | Path) -> list[Entry]:
    """All versions, from the artifact on. Reads no items."""
    folder = CatalogPath.writable(folder, because="the history is of all versions")
    base = _base(folder)
    made = artifacts.read_manifest(folder)
    active = base.catalog.num_active
    entries = [Entry(0, "tokenize" if base.tokenizer else "import-codes", active, active, base.digest, made.created)]
    for change in _changes(folder, base, None, (), snapshots=False):
        header = change.header
        if header.active is not None:
            active = header.active
        else:
            active += header.items if header.change_kind is ChangeKind.APPEND else -header.items
        entries.append(Entry(header.version, header.kind, header.items, active, header.digest, header.created))
    return entries


def verify(folder: str | Path) -> Version:
    """Verify every byte of every version. Raises SemidError naming the first bad file: edited, missing, of another
    catalogue or tokenizer, with codes out of range, an item twice or with changed codes, or codes of two items; or a
    snapshot that differs from the merged changes."""
    folder = CatalogPath.writable(folder, because="all versions are verified")
    base, snapshots = _base(folder), list_files(folder).snapshots
    changes = list(_changes(folder, base, None, None if snapshots else STATE_COLUMNS, snapshots=False))
    if not snapshots:  # also verifies the vectors, without holding them all in memory
        for change in changes:
            read_change(change.file, None)
    for number in snapshots:
        _check_snapshot(folder, base, number, changes[:number])
    found = _after(base, changes)
    expected = changes[-1].header.active if changes else None
    if expected not in (None, found.catalog.num_active):
        raise SemidError(f"{changes[-1].file}: {found.catalog.num_active} items are active, expected {expected}; "
                         "restore it from a copy")  # fmt: skip
    if found.catalog.tie_break and (pair := found.catalog.equal_codes()):
        raise SemidError(f"{folder}: items {pair[0]} and {pair[1]} have the same codes; tokenize again")
    return found


def open_for_change(folder: str | Path) -> tuple[Path, Version]:
    """Folder and current version of a catalogue, after checking that the next version can be written.

    Raises SemidError for FOLDER@VERSION, and if the folder cannot be written.
    """
    folder = CatalogPath.writable(folder)
    before = current(folder)
    artifacts.try_file(change_file(folder, before.number + 1))
    finish_killed(folder)
    return folder, before


def commit(
    folder: str | Path, before: Version, kind: ChangeKind, items: pa.Table, *, sources: Sequence[str] = ()
) -> Version:
    """Write atomically the change that makes the next version after `before`; `sources` are the sha256 of its input
    files.

    Raises SemidError if the change is invalid, another process has made this version, or the disk is full.
    """
    header = _header(before, kind, items, version=before.number + 1, parent=before.digest)
    folder = artifacts.place(folder)
    file = change_file(folder, header.version)
    after = before.catalog.after([Change(file, header, items)])
    made_by = dict.fromkeys(sources, header.version)
    return _publish(folder, before, replace(header, active=after.num_active, sources=made_by), items)


def _header(before: Version, kind: ChangeKind, items: pa.Table, *, version: int, parent: str) -> Header:
    columns = {name: column_digest(items[name]) for name in items.column_names}
    created, sizes = datetime.now(UTC).isoformat(timespec="seconds"), before.catalog.level_sizes
    return Header(version, kind.value, parent, sizes, before.tokenizer, items.num_rows, columns, created)


def revert(folder: str | Path, version: int) -> Version:
    """Make a version with the active items of an earlier one, unless they are the same now; codes never change.

    Raises SemidError if there is no such version.
    """
    folder, before = open_for_change(folder)
    target = current(folder, version).catalog
    active = np.zeros(len(before.catalog), bool)
    active[: len(target)] = target.active  # later versions only append rows
    changed = np.flatnonzero(active != before.catalog.active)
    if not len(changed):
        return before
    ids = before.catalog.item_ids.take(pa.array(changed))
    return commit(folder, before, ChangeKind.REVERT, pa.table({"item_id": ids, "active": active[changed]}))


def compact(folder: str | Path) -> Version:
    """Write a snapshot of the current version next to the changes, which stay, and remove earlier snapshots.

    It is loaded instead of the changes; the snapshot before it stays, as other processes may be reading it.
    Raises SemidError naming a file that is missing or damaged.
    """
    folder = CatalogPath.writable(folder, because="a snapshot is of the current version")
    base, found = _base(folder), list_files(folder)
    is_due = found.last and found.last not in found.snapshots
    if is_due:
        artifacts.try_file(snapshot_file(folder, found.last))
    changes = list(_changes(folder, base, found.last, None))
    after = _after(base, changes)
    if is_due:
        header, items = _snapshot(base, after, changes)
        write_change(folder, header, items)
    for earlier in [number for number in found.snapshots if number < found.last][:-1]:
        artifacts.remove(snapshot_file(folder, earlier))
    return after


def _snapshot(base: Version, after: Version, changes: Sequence[Change]) -> tuple[Header, pa.Table]:
    """Merge changes of version 0: a row for each item that they touch, in the catalogue's order."""
    touched = pa.concat_arrays([change.items["item_id"].combine_chunks() for change in changes])
    rows = np.unique(after.catalog.rows(touched))
    ids, codes, active = after.catalog.item_ids.take(pa.array(rows)), after.catalog.codes, after.catalog.active
    items = pa.table({"item_id": ids, "codes": to_lists(codes[rows].astype(np.int32)), "active": active[rows]})
    names = dict.fromkeys(name for change in changes for name in change.items.column_names if name not in STATE_COLUMNS)
    for name in names:
        items = items.append_column(name, _last_given(name, ids, changes))
    header = _header(after, ChangeKind.SNAPSHOT, items, version=after.number, parent=base.digest)
    return replace(header, active=after.catalog.num_active, sources=dict(after.sources), stands_for=after.digest), items


def _last_given(name: str, item_ids: pa.Array, changes: Sequence[Change]) -> pa.Array:
    """Vectors of a column by the latest change that has each, float32; null if none does."""
    vectors: list[np.ndarray | None] = [None] * len(item_ids)
    for change, places in zip(changes, _places(changes, item_ids), strict=True):
        if name in change.items.column_names:
            for place, vector in given_vectors(change, name, places):
                vectors[place] = vector
    lengths = [0 if vector is None else len(vector) for vector in vectors]
    values = np.concatenate([vector for vector in vectors if vector is not None])
    missing = pa.array([vector is None for vector in vectors])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return pa.LargeListArray.from_arrays(offsets, pa.array(values), mask=missing)


def _places(changes: Sequence[Change], item_ids: pa.Array) -> list[list[int | None]]:
    """Index of each item of each change in `item_ids`; None if it is missing."""
    if not changes:
        return []
    items = pa.concat_arrays([change.items["item_id"].combine_chunks() for change in changes])
    found = pc.index_in(items, item_ids).to_pylist()
    ends = np.cumsum([0, *(change.items.num_rows for change in changes)]).tolist()
    return [found[first:end] for first, end in itertools.pairwise(ends)]


def _check_snapshot(folder: Path, base: Version, number: int, changes: Sequence[Change]) -> None:
    """Raise SemidError for a snapshot that differs from the merged changes."""
    origin = BaseVersion(folder, base.digest, base.tokenizer, base.catalog.level_sizes)
    found, (expected, _) = read_snapshot(origin, number, None), _snapshot(base, _after(base, changes), changes)
    if replace(found.header, created=expected.created) != expected:
        raise SemidError(f"{found.file}: is not what the changes come to; delete it, and run semid catalog compact")


def apply(folder: str | Path, file: str | Path) -> Version:
    """Make a replica's next version from a change file that was made elsewhere.

    Raises SemidError, naming the expected version, for a file that was applied before, comes too early, or belongs to
    another catalogue.
    """
    folder, before = open_for_change(folder)
    file = artifacts.fetched(file)
    change = read_change(file, None)
    header, expected = change.header, before.number + 1
    where = f"{folder} is at version {before.number} and expects version {expected}"
    if header.tokenizer != before.tokenizer or header.level_sizes != before.catalog.level_sizes:
        raise SemidError(f"{file}: made with another tokenizer ({header.tokenizer[:12]}) than that of {folder} "
                         f"({before.tokenizer[:12]}); apply it to a copy of its own catalogue")  # fmt: skip
    if header.change_kind is ChangeKind.SNAPSHOT:
        raise SemidError(f"{file}: is a snapshot of version {header.version}; apply the changes themselves ({where})")
    if header.version < expected:
        own = read_change(change_file(folder, header.version), ()).header.digest == header.digest
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
    """Raw vectors of appended items, with `columns` concatenated, each from the latest change that has it.

    `removed` items may lack vectors and then get zeros, of dim 0 if no item has any.
    Raises SemidError naming a column that an item has in no change, vectors of different widths, and an item that no
    change appended.
    """
    folder, version = CatalogPath.parse(folder, version)
    changes = list(_changes(folder, _base(folder), version, ("item_id",)))
    found = {name: _vectors(changes, name, item_ids) for name in columns}
    for name, (_, lacking) in found.items():
        for place in (lacking if removed is None else lacking[~removed[lacking]])[:1].tolist():
            raise _no_vectors(folder, item_ids[place], name, changes)
    return np.concatenate([values for values, _ in found.values()], axis=1)


def _vectors(
    changes: Sequence[Change], name: str, item_ids: pa.Array
) -> tuple[Float[np.ndarray, "n dim"], Int[np.ndarray, " lacking"]]:
    """Vectors of one column, zeros of the items that lack it, and the places of these."""
    vectors: dict[int, np.ndarray] = {}
    width = 0
    for change, places in reversed(list(zip(changes, _places(changes, item_ids), strict=True))):
        asked_for = {place for place in places if place is not None}.difference(vectors)
        if name not in change.header.columns or not asked_for:
            continue
        whole = read_change(change.file, ("item_id", name))
        wanted = [place if place in asked_for else None for place in places]  # of the others a later change counts
        for place, vector in given_vectors(whole, name, wanted):
            width = width or len(vector)
            if len(vector) != width:
                raise SemidError(
                    f"{change.file}: has vectors of {len(vector)} dimensions, later changes of {width} ({name!r}); "
                    "append its items again, with vectors as wide (--known update)"
                )
            vectors.setdefault(place, vector)
    result = np.zeros((len(item_ids), width), np.float32)
    for place, vector in vectors.items():
        result[place] = vector
    return result, np.setdiff1d(np.arange(len(item_ids)), np.array(list(vectors), np.int64))


def _no_vectors(folder: Path, item: pa.Scalar, column: str, changes: Sequence[Change]) -> SemidError:
    """Names the latest change that appends the item without a column."""
    for change in reversed(changes):
        if change.header.change_kind.has_codes and pc.index(change.items["item_id"], item).as_py() >= 0:
            return SemidError(
                f"{change.file}: item {item} has no vectors {column!r}, which the model reads; append it with that "
                "column (--known update)"
            )
    return SemidError(
        f"{folder}: no change appended item {item}; its vectors are not known; remove it, or train on a dataset "
        "that has it"
    )


def diff(old: SemanticCatalog, new: SemanticCatalog) -> Difference:
    """Compare two catalogues: versions of one, or those of two tokenizers."""
    before, after = (catalog.item_ids.filter(pa.array(catalog.active)) for catalog in (old, new))
    common = before.filter(pc.is_in(before, after))
    rows, others = old.rows(common), new.rows(common)
    shared = min(old.num_levels, new.num_levels)
    same = old.codes[rows, :shared] == new.codes[others, :shared]
    one_sided = (1.0,) * (max(old.num_levels, new.num_levels) - shared)
    by_level = (*(1 - same.mean(axis=0)).tolist(), *one_sided) if len(common) else ()
    changed = 0.0 if not len(common) else 1.0 if one_sided else 1 - float(same.all(axis=1).mean())
    return Difference(
        after.filter(pc.invert(pc.is_in(after, before))).to_pylist(),
        before.filter(pc.invert(pc.is_in(before, after))).to_pylist(),
        len(common),
        changed,
        by_level,
    )


def _base(folder: Path) -> Version:
    """Version 0: the artifact, every file verified."""
    catalog = SemanticCatalog.load(folder, 0)
    manifest = artifacts.read_manifest(folder)
    return Version(0, manifest.digest, catalog, manifest.files.get(TOKENIZER_FILE, ""))


def _changes(
    folder: Path, base: Version, version: int | None, columns: Sequence[str] | None, *, snapshots: bool = True
) -> Iterator[Change]:
    """The changes up to a version (None: all), with these columns (None: all); see `read_changes`."""
    origin = BaseVersion(folder, base.digest, base.tokenizer, base.catalog.level_sizes)
    return read_changes(origin, version, columns=columns, snapshots=snapshots)


def _publish(folder: Path, before: Version, header: Header, items: pa.Table) -> Version:
    """Write a change and return the version it makes."""
    after = before.catalog.after([Change(change_file(folder, header.version), header, items)])
    write_change(folder, header, items)
    return Version(header.version, header.digest, after, before.tokenizer, {**before.sources, **header.sources})
