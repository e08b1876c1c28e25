"""Updates of a catalogue after its tokenizer was fitted: adding items never changes existing codes."""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from semid import artifacts
from semid.arrow import to_lists
from semid.catalog.catalog import TOKENIZER_FILE, SemanticCatalog
from semid.catalog.changes import STATE_COLUMNS, ChangeKind
from semid.catalog.collisions import Collisions, Residuals, place
from semid.catalog.versions import Version, commit, open_for_change
from semid.config import enum_member
from semid.data import Block, ContentEncoder, Id, VectorFile, as_ids, as_mapped_table, log_unused, storage
from semid.errors import SemidError, refuse_path

# Rows that are read at once.
_ROWS = 8192


@runtime_checkable
class Encoder(Protocol):
    """A fitted tokenizer: what `append` needs of one."""

    @property
    def dim(self) -> int: ...
    @property
    def input_columns(self) -> tuple[str, ...]: ...
    @property
    def content_encoders(self) -> Mapping[str, ContentEncoder]: ...
    @property
    def level_sizes(self) -> tuple[int, ...]: ...
    @property
    def collisions(self) -> Collisions: ...
    @property
    def is_residual(self) -> bool: ...
    def encode(self, vectors: Float[np.ndarray, "n dim"]) -> Int[np.ndarray, "n level"]: ...
    def last_residuals(self, vectors: Float[np.ndarray, "n dim"], codes: Int[np.ndarray, "n level"]) -> Residuals: ...
    def tensors(self) -> dict[str, np.ndarray]: ...


class Known(enum.Enum):
    """Treatment of items that are in the catalogue already."""

    ERROR = "error"
    """The whole call fails."""
    SKIP = "skip"
    """They are skipped and counted."""
    UPDATE = "update"
    """They get the given vectors and keep their codes."""


class Appended(NamedTuple):
    """Result of `append`: the new version, or the previous one if there was nothing to append.

    `moved` of the `new` items did not get their nearest codes; `restored` is the number of removed items that are
    active again. `applied` files had been appended before, by the given versions, and were skipped.
    """

    version: Version
    new: int
    restored: int
    moved: int
    skipped: int
    updated: int
    applied: dict[str, int]


def append(
    folder: str | Path,
    inputs: str | Path | Sequence[str | Path],
    *,
    tokenizer: Encoder,
    id_column: str = "item_id",
    columns: str | Sequence[str] | None = None,
    known: Known | str = Known.ERROR,
) -> Appended:
    """Append the items of files (Parquet, CSV, TSV or JSONL), or of folders of parts, to a catalogue, as its next
    version.

    `tokenizer` must be the one that made the catalogue's codes. `columns` are its vector columns, as in `encode_files`;
    its content encoders compute those that a file lacks from raw columns. All other vectors, stored or computed, are
    kept for models that read them. Columns have the names of the dataset, or of its source tables (the catalogue's
    `source_columns`). The frozen tokenizer gives the codes; if another item, even a removed one, has them, the
    catalogue's collision policy chooses others for the new item, in input order. A removed item is restored with its
    old codes. A file that was appended before, by its sha256, is skipped while any of its items is active.
    Raises SemidError naming file, column and row of an item that cannot be read or encoded, is repeated, is in the
    catalogue (unless `known` allows it), or for which no codes are left; and for a `tokenizer` that did not make the
    catalogue's codes.
    """
    known, columns = enum_member(Known, known, "known"), [columns] if isinstance(columns, str) else columns
    refuse_path(tokenizer, "SemanticTokenizer.from_pretrained")
    folder, before = open_for_change(folder)
    _check_tokenizer(folder, tokenizer)
    files = storage.find_all(inputs)
    names = before.catalog.source_columns
    digests = {file: _digest(file) for file in files}
    again = {file: before.sources[digest] for file, digest in digests.items() if digest in before.sources}
    applied = {
        file: version
        for file, version in again.items()
        if _are_active(before.catalog, _item_ids(file, id_column, names)).any()
    }
    left = [file for file in files if file not in applied]
    given = _Given.read(left, tokenizer, id_column=id_column, columns=columns, names=names)
    if not len(given.item_ids) and not applied:
        raise SemidError(f"{', '.join(files) or 'no file'}: no item to append")
    rows, is_known = before.catalog.find_rows(given.item_ids)
    active, kept = _are_active(before.catalog, given.item_ids), np.arange(len(given.item_ids))
    skipped = 0
    if known is Known.SKIP:
        skip = active | given.repeated(kept)
        skipped, kept = int(skip.sum()), kept[~skip]
    given.check_new(kept, active if known is Known.ERROR else np.zeros_like(active))
    if not len(kept):
        return Appended(before, 0, 0, 0, skipped, 0, applied)
    codes, moved = _placed(before.catalog, tokenizer, given, kept[~is_known[kept]])
    codes[is_known] = before.catalog.codes[rows[is_known]]
    table = pa.table({"item_id": given.item_ids, "codes": to_lists(codes)})
    for name, vectors in given.vectors.items():
        table = table.append_column(name, to_lists(vectors))
    updated = int(active[kept].sum())
    kind = ChangeKind.UPDATE if updated else ChangeKind.APPEND
    after = commit(folder, before, kind, table.take(pa.array(kept)), sources=[digests[file] for file in left])
    new = int((~is_known[kept]).sum())
    return Appended(after, new, len(kept) - new - updated, moved, skipped, updated, applied)


def extend(catalog: SemanticCatalog, item_ids: Iterable[Id], codes: Int[np.ndarray, "new code"]) -> SemanticCatalog:
    """`catalog` with new items, with codes from a tokenizer, after the others.

    With a tie-break level, each item gets the first free number in its group of equal codes; otherwise items may
    collide. Raises SemidError for an item that exists, is repeated, or gets no number, and for codes of another shape.
    """
    refuse_path(catalog, "SemanticCatalog.load")
    ids, levels = as_ids(item_ids), catalog.num_levels - catalog.tie_break
    if codes.shape != (len(ids), levels) or codes.dtype.kind not in "iu":
        got = f"{codes.dtype} {codes.shape}"
        raise SemidError(f"expected codes of shape {(len(ids), levels)} (items, levels) as integers, got {got}")
    _, known = catalog.find_rows(ids)
    for at in np.flatnonzero(known)[:1].tolist():
        raise SemidError(f"item id {ids[at].as_py()!r} (entry {at}) is in the catalogue already; leave it out")

    def full(item: int) -> SemidError:
        return SemidError(
            f"item id {ids[item].as_py()!r} (entry {item}): {catalog.level_sizes[-1]} items have its codes, and no "
            "number is left; fit a new tokenizer with larger levels"
        )

    policy = Collisions.TIE_BREAK if catalog.tie_break else Collisions.ALLOWED
    placed = place(catalog, codes, policy=policy, residuals=None, full=full)
    removed = None if catalog.removed is None else np.pad(catalog.removed, (0, len(ids)))
    return replace(
        catalog,
        item_ids=pa.concat_arrays([catalog.item_ids, ids]),
        codes=np.concatenate([catalog.codes, placed.astype(np.int32)]),
        removed=removed,
    )


def remove(folder: str | Path, item_ids: Iterable[Id]) -> Version:
    """Remove items, as the catalogue's next version: they keep rows and codes.

    Raises SemidError for an id that is unknown, already removed or repeated, and if no item would be left.
    """
    folder, before = open_for_change(folder)
    ids = as_ids(item_ids)
    if not len(ids):
        raise SemidError("expected at least one item to remove, got none")
    rows = before.catalog.rows(ids)
    for at in np.flatnonzero(~before.catalog.active[rows])[:1].tolist():
        raise SemidError(f"item id {ids[at].as_py()!r} (entry {at}) was removed before")
    seen = np.unique(rows, return_index=True)[1]
    for at in np.setdiff1d(np.arange(len(rows)), seen)[:1].tolist():
        raise SemidError(f"item id {ids[at].as_py()!r} (entry {at}) is given twice")
    return commit(folder, before, ChangeKind.REMOVE, pa.table({"item_id": ids}))


@dataclass(frozen=True)
class _Given:
    """Content of the input files, with the file and row of every item."""

    item_ids: pa.Array
    inputs: list[str]
    """Columns that the tokenizer reads."""
    vectors: dict[str, Float[np.ndarray, "n _"]]
    files: list[tuple[int, VectorFile]]
    """Files, each with the index of its first item."""

    @classmethod
    def read(
        cls,
        paths: Sequence[str],
        tokenizer: Encoder,
        *,
        id_column: str,
        columns: Sequence[str] | None,
        names: Mapping[str, str],
    ) -> _Given:
        """Read the files. Raises SemidError naming file, column and row of an error."""
        ids: list[pa.Array] = []
        found: list[dict[str, np.ndarray]] = []
        files: list[tuple[int, VectorFile]] = []
        inputs: list[str] = []
        for path in paths:
            with _reading(path):
                file = VectorFile.open(
                    path,
                    dim=tokenizer.dim,
                    id_column=id_column,
                    columns=columns or tokenizer.input_columns,
                    encoders=tokenizer.content_encoders,
                    others=True,
                    names=names,
                )
                _check_names(path, file.widths)
                blocks = list(file.blocks(_ROWS))
            inputs = inputs or list(columns or tokenizer.input_columns) or list(file.widths)
            if files and file.widths != files[0][1].widths:
                raise SemidError(f"{path}: has vectors {file.widths}, but {paths[0]} has {files[0][1].widths}")
            files.append((sum(map(len, ids)), file))
            ids += [block.item_ids for block in blocks]
            found += [_by_column(block) for block in blocks]
        log_unused(name for _, file in files for name in file.unused)
        vectors = {name: np.concatenate([one[name] for one in found]) for name in next(iter(found), {})}
        return cls(pa.concat_arrays([pa.array([], pa.string()), *ids]), inputs, vectors, files)

    def repeated(self, kept: Int[np.ndarray, " kept"]) -> Bool[np.ndarray, " kept"]:
        """Mask of the `kept` items that occur earlier among them."""
        codes = self.item_ids.dictionary_encode().indices.to_numpy()[kept]
        return ~np.isin(np.arange(len(codes)), np.unique(codes, return_index=True)[1])

    @property
    def encoded(self) -> Float[np.ndarray, "n dim"]:
        """The concatenated vectors that the tokenizer reads."""
        return np.concatenate([self.vectors[name] for name in self.inputs], axis=1)

    def at(self, item: int) -> str:
        """File, column, row and id of an item, for messages."""
        first, file = next((first, file) for first, file in reversed(self.files) if first <= item)
        return f"{file.at(file.id_column, item - first)}: item {self.item_ids[item].as_py()!r}"

    def check_new(self, kept: Int[np.ndarray, " kept"], active: Bool[np.ndarray, " n"]) -> None:
        """Raise SemidError for `kept` items that are in the catalogue, or repeated."""
        for item in kept[active[kept]][:1].tolist():
            raise SemidError(
                f"{self.at(item)} is in the catalogue already; its codes never change, leave it out (--known skip), or "
                "give it new content (--known update)"
            )
        for twice in kept[self.repeated(kept)][:1].tolist():
            before = next(item for item in kept.tolist() if self.item_ids[item] == self.item_ids[twice])
            raise SemidError(f"{self.at(twice)} is given twice, before as {self.at(before)}")


def _check_names(path: str, columns: Iterable[str]) -> None:
    """Raise SemidError for a vector column with a reserved name of change files."""
    for name in columns:
        if name in STATE_COLUMNS:
            raise SemidError(f"{path}: column {name!r} has the name of a catalogue's own; rename or drop it")


def _check_tokenizer(folder: Path, tokenizer: Encoder) -> None:
    """Raise SemidError for a tokenizer whose arrays differ from those of the one that made the catalogue's codes."""
    file = folder / TOKENIZER_FILE
    if not file.exists():  # imported codes: their tokenizer is unknown
        return
    own, given = artifacts.load_tensors(file), tokenizer.tensors()
    if own.keys() != given.keys() or not all(np.array_equal(own[name], given[name]) for name in own):
        raise SemidError(f"{folder}: its codes are not of this tokenizer; append with its own "
                         "(SemanticTokenizer.from_pretrained of the same folder)")  # fmt: skip


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Convert errors of reading a file to SemidErrors that name it."""
    try:
        yield
    except FileNotFoundError:
        raise SemidError(f"{path}: no such file; check the path") from None
    except (OSError, pa.ArrowException) as error:
        raise SemidError(f"{path}: not readable ({artifacts.first_line(error)}); check the file") from None


def _digest(path: str) -> str:
    """sha256 of a file. Raises SemidError naming it if it cannot be read."""
    with _reading(path):
        return storage.sha256(path)


def _item_ids(path: str, id_column: str, names: Mapping[str, str]) -> pa.Array:
    """Ids of a file that was appended before, without its vectors; none if it has no such column."""
    source: str | pa.Table = path
    with _reading(path):
        with contextlib.suppress(SemidError), storage.open_parquet(path) as file:  # fails for text files
            source = file.read(columns=[*{id_column, names.get(id_column, id_column)}])
        table = as_mapped_table(source, names, strings=(id_column,))
    return as_ids(table[id_column]) if id_column in table.column_names else pa.array([], pa.string())


def _are_active(catalog: SemanticCatalog, item_ids: pa.Array) -> Bool[np.ndarray, " n"]:
    """Mask of the items that are active in the catalogue."""
    rows, known = catalog.find_rows(item_ids)
    return known & catalog.active[rows]


def _by_column(block: Block) -> dict[str, Float[np.ndarray, "n _"]]:
    """The block's vectors by column. Raises SemidError for one that is not finite."""
    parts = np.split(block.vectors, np.cumsum(list(block.file.widths.values()))[:-1], axis=1)
    named = dict(zip(block.file.widths, parts, strict=True))
    for name, values in named.items():
        for row in np.flatnonzero(~np.isfinite(values).all(axis=1))[:1].tolist():
            where = block.file.at(name, block.first + row)
            raise SemidError(f"{where}: expected a finite vector, got NaN or infinity; leave the item out")
    return named


def _placed(
    catalog: SemanticCatalog, tokenizer: Encoder, given: _Given, new: Int[np.ndarray, " new"]
) -> tuple[Int[np.ndarray, "n level"], int]:
    """Codes for the `new` items (arbitrary for others), and how many of these did not get their nearest codes."""
    vectors = given.encoded[new]
    nearest = tokenizer.encode(vectors).astype(np.int32) if len(new) else np.zeros((0, len(tokenizer.level_sizes)), int)
    policy = tokenizer.collisions
    residuals = None
    if tokenizer.is_residual:
        residuals = functools.cache(lambda: tokenizer.last_residuals(vectors, nearest))
    fault = functools.partial(_full, given, new, catalog)
    own = place(catalog, nearest, policy=policy, residuals=residuals, full=fault)
    codes = np.zeros((len(given.item_ids), catalog.num_levels), np.int32)
    codes[new] = own
    return codes, int((own[:, : nearest.shape[1]] != nearest).any(axis=1).sum())


def _full(given: _Given, new: np.ndarray, catalog: SemanticCatalog, item: int) -> SemidError:
    where = given.at(int(new[item]))
    return SemidError(
        f"{where}: no codes are left next to those of similar items (level sizes {catalog.level_sizes}, removed "
        "items keep theirs); fit a new tokenizer (semid tokenize) with larger levels"
    )
