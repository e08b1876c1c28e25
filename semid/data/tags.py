"""Tags of items: values of a column such as brand, category or genre; an item may have several."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from semid.arrow import decoded, is_list, is_string
from semid.errors import SemidError, did_you_mean

_USUAL = re.compile(r"(?i:categor|genre|(?<![a-z])tags?(?![a-z]))|(?<=[a-z])Tags?(?![a-z])")  # no percenTAGe
_STEP = " > "


@dataclass(frozen=True, eq=False)
class Tags:
    """Tags by item row: item `i` has the tags `names[numbers[bounds[i]:bounds[i + 1]]]`, sorted and without repeats."""

    column: str
    names: pa.Array
    numbers: Int[np.ndarray, " total"]
    bounds: Int[np.ndarray, " bounds"]

    @classmethod
    def from_column(cls, items: pa.Table, column: str) -> Tags:
        """Tags from a column of strings, whole numbers, booleans, or lists of them; nulls and empty strings are no tag.

        A path such as `Beauty > Hair Care > Shampoos` is split into one tag per step. A tag that all tagged items
        share, such as the root of all paths, is left out, as it distinguishes nothing.
        Raises SemidError for an unknown column, naming the nearest one, and for a column of another type.
        """
        lists = tag_lists(items, column)
        kept = pc.fill_null(pc.not_equal(lists.flatten(), ""), False)
        values = lists.flatten().filter(kept)
        distinct = pc.unique(values).sort()
        owner = pc.list_parent_indices(lists).filter(kept).to_numpy().astype(np.int64)
        width = max(len(distinct), 1)
        owner, numbers = np.divmod(np.unique(owner * width + pc.index_in(values, distinct).to_numpy()), width)
        counts, tagged = np.bincount(numbers, minlength=width), len(np.unique(owner))
        not_shared = (counts < tagged)[numbers]
        names = np.flatnonzero((counts > 0) & (counts < tagged))
        bounds = np.concatenate([[0], np.cumsum(np.bincount(owner[not_shared], minlength=len(lists)))])
        numbers = np.searchsorted(names, numbers[not_shared])
        return cls(column, distinct.take(pa.array(names)), numbers.astype(np.int32), bounds.astype(np.int64))

    def __len__(self) -> int:
        """Number of different tags."""
        return len(self.names)

    @property
    def counts(self) -> Int[np.ndarray, " items"]:
        """Number of tags per item."""
        return np.diff(self.bounds)

    def take(self, rows: Int[np.ndarray, " n"]) -> Tags:
        """Tags of the items `rows`; none for -1."""
        numbers, owner = self._gather(rows)
        bounds = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(rows)))])
        return Tags(self.column, self.names, numbers, bounds.astype(np.int64))

    def padded(self) -> Int[np.ndarray, "items width"]:
        """Tags of each item as one row, right-padded with -1."""
        counts = self.counts
        places = np.full((len(counts), max(int(counts.max(initial=0)), 1)), -1, np.int32)
        places[np.arange(places.shape[1]) < counts[:, None]] = self.numbers
        return places

    def shares(
        self, rows: Int[np.ndarray, " n"], owner: Int[np.ndarray, " n"], *, owners: int
    ) -> Float[np.ndarray, "owners tags"]:
        """Distribution of tags over the items of each owner: p(g | u), the mean over the owner's items i of p(g | i),
        which is 1 / (number of i's tags) for each tag of i (Steck, RecSys 2018, eq. 2). Zeros for an owner without
        tagged items; rows of -1 are skipped."""
        numbers, entry = self._gather(rows)
        weights = 1 / np.bincount(entry, minlength=len(rows))[entry]
        keys = owner[entry].astype(np.int64) * len(self) + numbers
        sums = np.bincount(keys, weights=weights, minlength=owners * len(self)).reshape(owners, len(self))
        return sums / np.maximum(sums.sum(axis=1, keepdims=True), 1e-12)

    def _gather(self, rows: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """All tags of the items `rows`, and for each tag the index in `rows` of its item."""
        real = np.maximum(rows, 0)
        starts, lengths = self.bounds[real], np.where(rows < 0, 0, self.counts[real])
        owner = np.repeat(np.arange(len(rows)), lengths)
        before = np.cumsum(lengths) - lengths
        return self.numbers[np.arange(len(owner)) + (starts - before)[owner]], owner


def usual_tag_column(schema: pa.Schema) -> str | None:
    """The first column of tags whose name contains category, genre or tag; None if there is none."""
    return next((field.name for field in schema if _USUAL.search(field.name) and _taggable(field.type)), None)


def usual_tags(items: pa.Table) -> Tags | None:
    """Tags of the `usual_tag_column`; None if there is no such column, or no tag that distinguishes items."""
    column = usual_tag_column(items.schema)
    tags = None if column is None else Tags.from_column(items, column)
    return tags if tags is not None and len(tags) else None


def tag_lists(items: pa.Table, column: str) -> pa.ListArray:
    """The values of a column as one list of strings per item."""
    if column not in items.column_names:
        hint = did_you_mean(column, items.column_names)
        raise SemidError(f"no column {column!r} among the items' {items.column_names}{hint}")
    values = decoded(items[column].combine_chunks())
    if not _taggable(values.type):
        raise SemidError(
            f"column {column!r}: expected strings, whole numbers or lists of such as tags, got {values.type}"
        )
    if is_list(values.type):
        return values.cast(pa.list_(pa.string()))
    return pc.split_pattern(values.cast(pa.string()), pattern=_STEP)


def _taggable(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    kind = kind.value_type if is_list(kind) and not pa.types.is_fixed_size_list(kind) else kind
    return is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
