"""Items that come and go after a tokenizer was fitted: encoded by it as it is, with codes that move nobody else's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from semid.bulk.storage import open_parquet
from semid.bulk.vectors import Block, VectorFile, is_vector
from semid.catalog import SemanticCatalog
from semid.catalog_log import Kind, Version, commit, current
from semid.errors import SemidError
from semid.tokenizer import Collisions, ProductConfig, SemanticTokenizer

# Rows that are read at once.
_ROWS = 8192


class Appended(NamedTuple):
    """The version that came of it, and how many items are new, came back, and did not get their nearest codes."""

    version: Version
    new: int
    restored: int
    moved: int


class Residuals(NamedTuple):
    """What the last level quantizes of items, and its codebook: what another last code costs."""

    vectors: Float[np.ndarray, "n dim"]
    codebook: Float[np.ndarray, "codes dim"]

    def nearest(self, item: int) -> Iterator[int]:
        """Last codes of an item, the nearest first."""
        distances = np.square(self.vectors[item].astype(np.float64) - self.codebook.astype(np.float64)).sum(axis=1)
        return iter(np.argsort(distances, kind="stable").tolist())


def append(
    folder: str | Path,
    inputs: Sequence[str | Path],
    *,
    id_column: str = "item_id",
    columns: Sequence[str] | None = None,
) -> Appended:
    """Append the items of Parquet files of vectors to a catalogue, as its next version.

    `columns` are the vectors that the tokenizer reads, as in `encode_files`; all other lists of floats, each column of
    one width, are kept beside them, for models that read them. Codes are those of the frozen tokenizer; where another
    item, or a tombstone, has them, the catalogue's own collision policy finds others for the newcomer, in the order of
    the input. An item that was removed comes back with its old codes.
    Raises SemidError naming file, column and row of what cannot be read or encoded, of an id that is given twice or is
    in the catalogue, and of an item for which no codes are left.
    """
    folder = Path(folder)
    before, tokenizer = current(folder), SemanticTokenizer.from_pretrained(folder)
    given = _Given.read([str(path) for path in inputs], tokenizer, id_column=id_column, columns=columns)
    rows, known = before.catalog.find_rows(given.item_ids)
    given.check_new(known & before.catalog.alive[rows])
    codes, moved = _placed(before.catalog, tokenizer, given, np.flatnonzero(~known))
    codes[known] = before.catalog.codes[rows[known]]
    flat = pa.array(codes.reshape(-1))
    table = pa.table({"item_id": given.item_ids, "codes": pa.FixedSizeListArray.from_arrays(flat, codes.shape[1])})
    for name, vectors in given.vectors.items():
        lists = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])
        table = table.append_column(name, lists)
    after = commit(folder, before, Kind.APPEND, table)
    return Appended(after, int((~known).sum()), int(known.sum()), moved)


def remove(folder: str | Path, item_ids: Sequence[str]) -> Version:
    """Remove items, as the catalogue's next version: tombstones that keep rows and codes.

    Raises SemidError for an id that is unknown, removed already or given twice, and where no item would be left.
    """
    before = current(folder)
    if not len(item_ids):
        raise SemidError("expected at least one item to remove, got none")
    rows = before.catalog.rows(item_ids)
    for at in np.flatnonzero(~before.catalog.alive[rows])[:1]:
        raise SemidError(f"item id {item_ids[at]!r} (entry {at}) was removed before")
    seen = np.unique(rows, return_index=True)[1]
    for at in np.setdiff1d(np.arange(len(rows)), seen)[:1]:
        raise SemidError(f"item id {item_ids[at]!r} (entry {at}) is given twice")
    return commit(folder, before, Kind.REMOVE, pa.table({"item_id": pa.array(item_ids, pa.string())}))


@dataclass(frozen=True)
class _Given:
    """What the input files hold, and which row of which file an item is."""

    item_ids: pa.Array
    inputs: list[str]
    """Columns that the tokenizer reads."""
    vectors: dict[str, Float[np.ndarray, "n _"]]
    files: list[tuple[int, VectorFile]]
    """Each file with the place of its first item."""

    @classmethod
    def read(
        cls, paths: Sequence[str], tokenizer: SemanticTokenizer, *, id_column: str, columns: Sequence[str] | None
    ) -> _Given:
        """Raises SemidError naming file, column and row of what is wrong with it."""
        ids: list[pa.Array] = []
        found: list[dict[str, np.ndarray]] = []
        files: list[tuple[int, VectorFile]] = []
        inputs: list[str] = []
        for path in paths:
            file = VectorFile.open(path, tokenizer, id_column=id_column, columns=columns)
            inputs = inputs or list(file.widths)
            whole = replace(file, widths=file.widths | _others(path, file))
            if files and whole.widths != files[0][1].widths:
                raise SemidError(f"{path}: has vectors {whole.widths}, but {paths[0]} has {files[0][1].widths}")
            files.append((sum(map(len, ids)), whole))
            for block in whole.blocks(_ROWS):
                ids.append(block.item_ids)
                found.append(_by_column(block))
        if not sum(map(len, ids)):
            raise SemidError(f"{', '.join(paths) or 'no file'}: no item to append")
        vectors = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
        return cls(pa.concat_arrays(ids), inputs, vectors, files)

    @property
    def encoded(self) -> Float[np.ndarray, "n dim"]:
        """The vectors that the tokenizer reads, side by side."""
        return np.concatenate([self.vectors[name] for name in self.inputs], axis=1)

    def at(self, item: int) -> str:
        """File, column, row and id of an item, for messages."""
        first, file = next((first, file) for first, file in reversed(self.files) if first <= item)
        return f"{file.at(file.id_column, item - first)}: item {self.item_ids[item].as_py()!r}"

    def check_new(self, alive: np.ndarray) -> None:
        """Raises SemidError for items that are in the catalogue, or twice in the input."""
        for item in np.flatnonzero(alive)[:1].tolist():
            raise SemidError(f"{self.at(item)} is in the catalogue already; its codes never change, leave it out")
        codes = self.item_ids.dictionary_encode().indices.to_numpy()
        first = np.unique(codes, return_index=True)[1]
        for item in np.setdiff1d(np.arange(len(codes)), first)[:1].tolist():
            raise SemidError(f"{self.at(item)} is given twice, before as {self.at(int(first[codes[item]]))}")


def _others(path: str, file: VectorFile) -> dict[str, int]:
    """Vector columns that the tokenizer does not read; where the type has no width, that of the first row counts.

    Raises SemidError where the first row has none."""
    with open_parquet(path) as opened:
        others = [field for field in opened.schema_arrow if is_vector(field.type) and field.name not in file.widths]
        free = [field.name for field in others if not pa.types.is_fixed_size_list(field.type)]
        first = next(opened.iter_batches(1, columns=free), None) if free else None
    widths = {field.name: field.type.list_size for field in others if field.name not in free}
    for name in free:
        vector = first.column(name)[0].as_py() if first else None
        if not vector:
            raise SemidError(f"{file.at(name, 0)}: expected a vector, got nothing; leave the item or the column out")
        widths[name] = len(vector)
    return {field.name: widths[field.name] for field in others}


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
    catalog: SemanticCatalog, tokenizer: SemanticTokenizer, given: _Given, new: Int[np.ndarray, " new"]
) -> tuple[Int[np.ndarray, "n level"], int]:
    """Codes for the `new` items (of the others, any), and how many of them got others than their nearest."""
    vectors = given.encoded[new]
    nearest = tokenizer.encode(vectors).astype(np.int32) if len(new) else np.zeros((0, len(tokenizer.level_sizes)), int)
    policy = tokenizer.config.collisions
    residuals = None
    if not isinstance(tokenizer.config.method, ProductConfig):
        residuals = functools.cache(lambda: Residuals(*tokenizer.last_residuals(vectors, nearest)))
    fault = functools.partial(_full, given, new, catalog)
    own = place(catalog, nearest, policy=policy, residuals=residuals, full=fault)
    codes = np.zeros((len(given.item_ids), catalog.num_levels), np.int32)
    codes[new] = own
    return codes, int((own[:, : nearest.shape[1]] != nearest).any(axis=1).sum())


def _full(given: _Given, new: np.ndarray, catalog: SemanticCatalog, item: int) -> SemidError:
    where = given.at(int(new[item]))
    return SemidError(
        f"{where}: no codes are left beside those of the items like it (level sizes {catalog.level_sizes}, tombstones "
        "keep theirs); fit a tokenizer anew (semid tokenize) with larger levels"
    )


def place(
    catalog: SemanticCatalog,
    nearest: Int[np.ndarray, "n code"],
    *,
    policy: Collisions,
    residuals: Callable[[], Residuals] | None,
    full: Callable[[int], Exception],
) -> Int[np.ndarray, "n level"]:
    """Codes of newcomers, one after the other, beside those of all rows of a catalogue, which stay.

    With a last level that tells items apart, the first free number of the group of equal codes or, where the group is
    full, that of the nearest last code whose group is not. Where the last code itself moves, the nearest that is free
    among items of equal prefix; where none is, the item collides (sinkhorn) or cannot be placed. `residuals` (None:
    there are none, so last codes cannot move) are those of the newcomers; `full` makes the error for one of them.
    """
    if policy is Collisions.ALLOWED:
        return nearest
    breaks, levels = policy.adds_level, nearest.shape[1]
    taken: dict[tuple[int, ...], set[int]] = {}
    for codes in catalog.codes[_sharing(catalog.codes, nearest, levels - 1)].tolist():
        taken.setdefault(tuple(codes[:-1]), set()).add(codes[-1])
    room = catalog.level_sizes[-1] if breaks else 1
    placed = np.empty((len(nearest), catalog.num_levels), np.int32)
    for item, codes in enumerate(nearest.tolist()):
        prefix, last = tuple(codes[:-1]), codes[-1]

        def free(code: int, prefix: tuple[int, ...] = prefix) -> bool:
            if breaks:
                return len(taken.get((*prefix, code), ())) < room
            return code not in taken.get(prefix, ())

        found = last if free(last) else None
        if found is None and residuals is not None:
            found = next(filter(free, residuals().nearest(item)), None)
        if found is None and policy is not Collisions.SINKHORN:
            raise full(item)
        group = (*prefix, last if found is None else found)
        if breaks:
            numbers = taken.setdefault(group, set())
            group = (*group, next(number for number in range(room) if number not in numbers))
        taken.setdefault(group[:-1], set()).add(group[-1])
        placed[item] = group
    return placed


def _sharing(
    codes: Int[np.ndarray, "items level"], others: Int[np.ndarray, "n code"], levels: int
) -> Int[np.ndarray, " rows"]:
    """Rows whose first `levels` codes are those of one of the others, and perhaps a few more: by a hash of them."""
    factors = np.random.default_rng(0).integers(1 << 62, size=levels, dtype=np.int64).astype(np.uint64) | np.uint64(1)

    def hashed(of: np.ndarray) -> np.ndarray:
        return (of[:, :levels].astype(np.uint64) * factors[None]).sum(axis=1, dtype=np.uint64)

    return np.flatnonzero(np.isin(hashed(codes), hashed(others)))
