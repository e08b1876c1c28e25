"""`SemanticCatalog`: external item ids and their codes, kept together."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from semid import artifacts
from semid.arrow import read_parquet, to_lists, to_matrix, write_parquet
from semid.artifacts import Kind, Origin
from semid.catalog.changes import STATE_COLUMNS, BaseVersion, Change, ItemCodes, read_changes, replay
from semid.config import is_whole
from semid.data import Id, as_ids, is_encoder_file
from semid.errors import SemidError
from semid.notebooks import Facts, as_pandas

CATALOG_FILE = "catalog.parquet"
# Files of the tokenizer that made the codes: its arrays and, in the folder of a model, its config.
TOKENIZER_FILE = "tokenizer.safetensors"
TOKENIZER_CONFIG = "tokenizer.config.json"
_SOURCE_COLUMNS = "semid.source_columns"  # key in the metadata of `CATALOG_FILE`
# Fewer ids than 1 / _FEW of the items are looked up in a cached dict.
_FEW = 64


class CatalogPath(NamedTuple):
    """A catalogue's folder and one of its versions; None: the current one."""

    folder: Path
    version: int | None

    @classmethod
    def parse(cls, name: str | Path, version: int | None = None) -> CatalogPath:
        """Parse FOLDER or FOLDER@VERSION; an existing folder of that whole name takes precedence. Raises SemidError if
        two different versions are given."""
        folder, at, number = str(name).rpartition("@")
        if not at or "/" in number or artifacts.place(name).exists():
            return cls(artifacts.fetched(name), version)
        if not number.isdecimal():
            raise SemidError(f"{name}: expected FOLDER or FOLDER@VERSION, such as catalog@3")
        if version not in (None, int(number)):
            raise SemidError(f"{name}: names version {number}, and version {version} is asked for; name one")
        return cls(artifacts.fetched(folder), int(number))

    @classmethod
    def writable(cls, name: str | Path, *, because: str = "a new version follows the current one") -> Path:
        """The folder, to write its next version or to read all. Raises SemidError if a version is named."""
        found = cls.parse(name)
        if found.version is not None:
            raise SemidError(f"{name}: {because}; leave out @{found.version}")
        return found.folder


def copy_tokenizer_files(origin: Origin, folder: Path) -> None:
    """Copy the files of a catalogue's tokenizer and content encoders, without the config, into a folder."""
    for name in origin.manifest.files:
        if name == TOKENIZER_FILE or is_encoder_file(name):
            origin.copy_file(name, folder)


@dataclass(frozen=True)
class SemanticCatalog:
    """Item `i` has the external id `item_ids[i]` and the codes `codes[i]`, level `l` below `level_sizes[l]`.

    `tie_break` tells whether the last level is a tie-break without meaning, which numbers the items that share all
    other codes. `removed` marks removed items (None: none): they keep row and codes, so that histories with them stay
    readable and no other item gets their codes, but they are never found or recommended.
    Raises SemidError for duplicate or invalid ids, codes that are no integers or out of range, arrays of different
    lengths, and a catalogue without active items.
    """

    item_ids: pa.Array
    codes: Int[np.ndarray, "items level"]
    level_sizes: tuple[int, ...]
    tie_break: bool = False
    removed: Bool[np.ndarray, " items"] | None = None
    origin: Origin | None = field(default=None, compare=False, repr=False)
    """The catalogue artifact of which this is a version."""
    source_columns: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Column names in the dataset's source tables, `{"item_id": "asin"}`, which files of items and ids may use."""

    def __repr__(self) -> str:
        sizes = " x ".join(map(str, self.level_sizes)) + (" with tie-break" if self.tie_break else "")
        removed = f", {len(self) - self.num_active:,} removed" if self.num_active < len(self) else ""
        origin = f", from {self.origin.folder}" if self.origin else ""
        return f"SemanticCatalog({len(self):,} items, codes {sizes}{removed}{origin})"

    def _repr_html_(self) -> str:
        counts = {"items": self.num_active, "removed": len(self) - self.num_active}
        sizes = {"level sizes": " x ".join(map(str, self.level_sizes)), "tie-break": self.tie_break}
        place = {} if self.origin is None else {"from": str(self.origin.folder)}
        return Facts("catalogue", {**counts, **sizes, **place})._repr_html_()

    def to_pandas(self) -> Any:
        """A pandas DataFrame of the items: `item_id`, `level_0` and on, `active`."""
        levels = {f"level_{level}": self.codes[:, level] for level in range(self.num_levels)}
        return as_pandas(pa.table({"item_id": self.item_ids, **levels, "active": self.active}))

    @classmethod
    def load(cls, folder: str | Path, version: int | None = None) -> SemanticCatalog:
        """Read the current or a given version of a catalogue folder and verify every file; "folder@3" is version 3.

        Raises SemidError naming a file that is missing or damaged.
        """
        folder, version = CatalogPath.parse(folder, version)
        with artifacts.opened(folder, Kind.CATALOG) as origin:
            catalog = cls.read(folder / CATALOG_FILE).with_origin(origin)
            tokenizer = origin.manifest.files.get(TOKENIZER_FILE, "")
            base = BaseVersion(folder, origin.digest, tokenizer, catalog.level_sizes)
            return catalog.after(list(read_changes(base, version, columns=STATE_COLUMNS)))

    def after(self, changes: Sequence[Change]) -> SemanticCatalog:
        """Catalogue after these changes. Raises SemidError naming the file and item of an invalid change."""
        if not changes:
            return self
        items = replay(ItemCodes(self.item_ids, self.codes, ~self.active), changes, level_sizes=self.level_sizes)
        return replace(self, item_ids=items.item_ids, codes=items.codes, removed=items.removed)

    def with_origin(self, origin: Origin) -> SemanticCatalog:
        """Copy whose origin is the artifact of which it is a version."""
        return replace(self, origin=origin)

    @property
    def provenance(self) -> str:
        """Digest of the artifact of which it is a version, else of its own content."""
        return self.digest if self.origin is None else self.origin.digest

    @property
    def provenance_of_items(self) -> str:
        """`provenance`, and if the version has other items than the artifact also their codes; for results that depend
        only on the codes of these items."""
        origin = self.origin
        if origin is None or len(self) == pq.read_metadata(origin.folder / CATALOG_FILE).num_rows:
            return self.provenance
        return artifacts.sha256_json([origin.digest, replace(self, removed=None).digest])

    def __post_init__(self) -> None:
        object.__setattr__(self, "item_ids", as_ids(self.item_ids))
        object.__setattr__(self, "level_sizes", _checked_sizes(self.level_sizes))
        for name, kind in (("codes", np.ndarray), ("removed", np.ndarray | None)):
            if not isinstance(given := getattr(self, name), kind):
                raise SemidError(f"expected {name} as a NumPy array, got {type(given).__name__}; convert it")
        if not len(self.item_ids):
            raise SemidError("a catalogue needs at least one item; got none")
        if self.removed is not None:
            if self.removed.shape != (len(self),) or self.removed.dtype != bool:
                got = f"{self.removed.dtype} {self.removed.shape}"
                raise SemidError(f"expected removed as booleans, one for each of {len(self)} items, got {got}")
            if self.removed.all():
                raise SemidError(f"a catalogue needs at least one item; all {len(self)} are removed")
            if not self.removed.any():
                object.__setattr__(self, "removed", None)  # equal catalogues are to look equal
        if self.codes.shape != (len(self.item_ids), len(self.level_sizes)):
            expected = (len(self.item_ids), len(self.level_sizes))
            raise SemidError(f"expected codes of shape {expected} (items, levels), got {self.codes.shape}")
        if self.codes.dtype.kind not in "iu":
            raise SemidError(f"expected codes as integers, got {self.codes.dtype}; convert them")
        if self.tie_break and len(self.level_sizes) < 2:
            raise SemidError(
                "tie_break says that the last level only tells items apart, and there is no other; leave it out "
                "(--tie-break), or give codes of two levels or more"
            )
        wrong = np.argwhere((self.codes < 0) | (self.codes >= np.array(self.level_sizes)))
        if len(wrong):
            row, level = wrong[0]
            raise SemidError(
                f"item {self.item_ids[row]} (row {row}): code {self.codes[row, level]} at level {level} is outside "
                f"0..{self.level_sizes[level] - 1}"
            )
        if len(pc.unique(self.item_ids)) != len(self.item_ids):
            repeated = pc.value_counts(self.item_ids).to_pylist()
            name = next(entry["values"] for entry in repeated if entry["counts"] > 1)
            raise SemidError(f"item id {name!r} appears more than once in the catalogue; ids must be unique")

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def num_levels(self) -> int:
        return len(self.level_sizes)

    @property
    def active(self) -> Bool[np.ndarray, " items"]:
        """True at the rows of items that are not removed."""
        return np.ones(len(self), bool) if self.removed is None else ~self.removed

    @property
    def num_active(self) -> int:
        """Items that are not removed."""
        return len(self) - (0 if self.removed is None else int(self.removed.sum()))

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of ids, codes, level sizes and removed items: equal catalogues, equal digests."""
        total = hashlib.sha256(json.dumps([self.item_ids.to_pylist(), list(self.level_sizes)]).encode())
        total.update(self.codes.astype(np.int32).tobytes())
        if self.removed is not None:
            total.update(np.packbits(self.removed).tobytes())
        return total.hexdigest()

    @functools.cached_property
    def _rows_by_id(self) -> dict[str, int]:
        return {item: row for row, item in enumerate(self.item_ids.to_pylist())}

    @functools.cached_property
    def _by_codes(self) -> Mapping[tuple[int, ...], np.ndarray]:
        order = np.lexsort(self.codes.T[::-1])
        order = order[self.active[order]]
        ordered = self.codes[order]
        first = np.flatnonzero(np.r_[True, np.any(ordered[1:] != ordered[:-1], axis=1)])
        groups = np.split(order, first[1:])
        return {tuple(ordered[at].tolist()): np.sort(rows) for at, rows in zip(first, groups, strict=True)}

    def incompatibility_with(self, later: SemanticCatalog) -> str | None:
        """Why `later` is not this catalogue with items appended, removed or reordered; None if it is."""
        if (self.level_sizes, self.tie_break) != (later.level_sizes, later.tie_break):
            return f"levels of {self.level_sizes} codes became {later.level_sizes}"
        rows, known = later.find_rows(self.item_ids)
        if len(missing := np.flatnonzero(~known)):
            return f"{len(missing)} of {len(self)} items are not in it, such as item {self.item_ids[int(missing[0])]}"
        moved = np.flatnonzero((self.codes != later.codes[rows]).any(axis=1))
        if not len(moved):
            return None
        (before,), (after,) = self.tokens_of(moved[:1]), later.tokens_of(rows[moved[:1]])
        return (
            f"{len(moved)} of {len(self)} items have other codes, item {self.item_ids[int(moved[0])]} "
            f"{''.join(after)} instead of {''.join(before)}"
        )

    def rows(self, item_ids: Iterable[Id] | pa.Array) -> Int[np.ndarray, " n"]:
        """Item rows of external ids. Raises SemidError naming the first unknown id."""
        ids = as_ids(item_ids)
        rows, known = self.find_rows(ids)
        for entry in np.flatnonzero(~known)[:1].tolist():
            missing = f"item id {ids[entry].as_py()!r} (entry {entry})"
            raise SemidError(f"{missing} is not among the catalogue's {len(self)} items")
        return rows

    def find_rows(self, item_ids: Iterable[Id] | pa.Array) -> tuple[Int[np.ndarray, " n"], np.ndarray]:
        """Item rows of external ids, -1 if unknown, and a mask of the known ones. Raises SemidError for invalid ids."""
        ids = as_ids(item_ids)
        if len(ids) * _FEW < len(self):  # Arrow's index is built of all items at each call
            rows = np.fromiter((self._rows_by_id.get(one, -1) for one in ids.to_pylist()), np.int32, len(ids))
        else:
            found = pc.index_in(ids, self.item_ids)
            rows = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
        return rows, rows >= 0

    def select(self, item_ids: pa.Array) -> SemanticCatalog:
        """These items, in this order, all of them active. Raises SemidError naming the first unknown one."""
        return replace(self, item_ids=item_ids, codes=self.lookup(item_ids), removed=None)

    def arranged(self, item_ids: pa.Array, *, others: bool = True) -> SemanticCatalog:
        """These items first, in this order, and then the `others` in their own order; removed items stay removed.

        Raises SemidError naming the first unknown one."""
        first = self.rows(item_ids)
        rows = np.concatenate([first, np.setdiff1d(np.arange(len(self)), first)]) if others else first
        if np.array_equal(rows, np.arange(len(self))):
            return self
        removed = None if self.removed is None else self.removed[rows]
        ids = self.item_ids.take(pa.array(rows))
        return replace(self, item_ids=ids, codes=self.codes[rows], removed=removed, origin=None)

    def lookup(self, item_ids: Iterable[Id] | pa.Array) -> Int[np.ndarray, "n level"]:
        """Codes of external ids. Raises SemidError naming the first unknown id."""
        return self.codes[self.rows(item_ids)]

    def find(self, codes: Sequence[int] | Int[np.ndarray, " level"]) -> Int[np.ndarray, " n"]:
        """Rows of the active items with exactly these codes: none, one, or several that collide."""
        return self._by_codes.get(tuple(int(code) for code in codes), np.empty(0, np.int64)).astype(np.int32)

    def equal_codes(self) -> tuple[str, str] | None:
        """Ids of two items, removed or not, that share all codes; None if there are none."""
        order = np.lexsort(self.codes.T[::-1])
        same = np.flatnonzero((self.codes[order][1:] == self.codes[order][:-1]).all(axis=1))
        if not len(same):
            return None
        one, other = (self.item_ids[int(row)].as_py() for row in order[same[0] : same[0] + 2])
        return one, other

    def tokens_of(self, rows: Int[np.ndarray, " n"]) -> list[list[str]]:
        """Codes of item rows as language models spell them, the level's letter first: `<a_12>`, `<b_7>` (LC-Rec)."""
        names = code_tokens(self.level_sizes)
        return [[names[level][code] for level, code in enumerate(row)] for row in self.codes[rows].tolist()]

    def write(self, file: Path) -> None:
        """Write Parquet: item_id, codes (fixed-size list), removed (if any is); everything else is in the metadata."""
        codes = to_lists(self.codes.astype(np.int32))
        table = pa.table({"item_id": self.item_ids, "codes": codes})
        if self.removed is not None:
            table = table.append_column("removed", pa.array(self.removed))
        metadata = file_metadata(self.level_sizes, tie_break=self.tie_break, source_columns=self.source_columns)
        write_parquet(table.replace_schema_metadata(metadata), file)

    @classmethod
    def read(cls, file: Path) -> SemanticCatalog:
        """Read a `catalog.parquet`. Raises SemidError naming the file and what is missing."""
        table = read_parquet(file)
        metadata = table.schema.metadata or {}
        if b"semid.level_sizes" not in metadata or not {"item_id", "codes"} <= set(table.column_names):
            raise SemidError(f"{file}: not a catalogue of semid (item_id, codes and semid.level_sizes expected)")
        sizes = tuple(int(size) for size in metadata[b"semid.level_sizes"].split(b","))
        if not pa.types.is_fixed_size_list(kind := table.schema.field("codes").type):
            raise SemidError(f"{file}: column 'codes': expected fixed-size lists of integers, got {kind}")
        codes = to_matrix(table["codes"])
        tie_break = metadata.get(b"semid.tie_break") == b"1"
        removed = None
        if "removed" in table.column_names:
            removed = table["removed"].to_numpy()
        columns = artifacts.parse_json(metadata.get(_SOURCE_COLUMNS.encode(), b"{}").decode(), where=file)
        return cls(table["item_id"].combine_chunks(), codes, sizes, tie_break, removed, source_columns=columns)


def _checked_sizes(level_sizes: Sequence[int]) -> tuple[int, ...]:
    """Level sizes as Python integers: catalogues of equal sizes are to be equal, and digests are of JSON."""
    if not isinstance(level_sizes, Iterable) or not all(map(is_whole, level_sizes)):
        raise SemidError(f"expected level_sizes as whole numbers, such as (256, 256), got {level_sizes!r}")
    return tuple(int(size) for size in level_sizes)


def file_metadata(level_sizes: Sequence[int], *, tie_break: bool, source_columns: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a `catalog.parquet`."""
    named = {_SOURCE_COLUMNS: json.dumps(dict(source_columns))} if source_columns else {}
    sizes = ",".join(map(str, level_sizes))
    return {"semid.level_sizes": sizes, "semid.tie_break": str(int(tie_break)), **named}


def code_tokens(level_sizes: Sequence[int]) -> list[list[str]]:
    """The tokens of every level, in order of its codes: `<a_0>`, `<a_1>`, ..."""
    return [[f"<{level_name(level)}_{code}>" for code in range(size)] for level, size in enumerate(level_sizes)]


def level_name(level: int) -> str:
    """Name of a level in token strings: a to z, then aa, ab, ... like the columns of a spreadsheet."""
    before, last = divmod(level, 26)
    return (level_name(before - 1) if before else "") + chr(ord("a") + last)
