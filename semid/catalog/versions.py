"""Versions of a catalogue: its artifact never changes, and each file of `semid.catalog.changes` makes a later one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float

from semid import artifacts
from semid.arrow import to_matrix
from semid.catalog.catalog import TOKENIZER_FILE, SemanticCatalog
from semid.catalog.changes import (
    BaseVersion,
    Change,
    ChangeKind,
    Header,
    change_file,
    column_digest,
    read_change,
    read_changes,
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


class Entry(NamedTuple):
    """A line of the history; `items` is how many a change appended or removed, `active` how many the version has."""

    version: int
    kind: str
    items: int
    active: int
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
    catalog = base.catalog.after(changes)
    return Version(last.version if last else 0, last.digest if last else base.digest, catalog, base.tokenizer)


def history(folder: str | Path) -> list[Entry]:
    """All versions, the artifact itself first. Reads no items."""
    folder = Path(folder)
    base = _base(folder)
    made = artifacts.read_manifest(folder)
    active = base.catalog.num_active
    entries = [Entry(0, "tokenize" if base.tokenizer else "import-codes", active, active, base.digest, made.created)]
    for change in _changes(folder, base, None, ()):
        header = change.header
        active += header.items if header.kind == ChangeKind.APPEND.value else -header.items
        entries.append(Entry(header.version, header.kind, header.items, active, header.digest, header.created))
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
    columns = {name: column_digest(items[name]) for name in items.column_names}
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
    before, change = current(folder), read_change(file, None)
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
        items = read_change(change.file, columns).items.take(rows.filter(here))
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
    before, after = (catalog.item_ids.filter(pa.array(catalog.active)) for catalog in (old, new))
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
    catalog = SemanticCatalog.load(folder, 0)
    manifest = artifacts.read_manifest(folder)
    return Version(0, manifest.digest, catalog, manifest.files.get(TOKENIZER_FILE, ""))


def _changes(folder: Path, base: Version, version: int | None, columns: Sequence[str] | None) -> Iterator[Change]:
    """The changes up to a version (None: all), with these columns (None: all)."""
    origin = BaseVersion(folder, base.digest, base.tokenizer, base.catalog.level_sizes)
    return read_changes(origin, version, columns=columns)


def _publish(folder: Path, before: Version, header: Header, items: pa.Table) -> Version:
    """Write a change and return the version it makes."""
    after = before.catalog.after([Change(change_file(folder, header.version), header, items)])
    write_change(folder, header, items)
    return Version(header.version, header.digest, after, before.tokenizer)
