"""Ids of items and users: strings, or integers written in decimal. One rule for all sources."""

from __future__ import annotations

import json
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from semid.arrow import as_strings, decoded, is_string
from semid.data.faults import HALF_CHARACTER, Faults, raise_faults
from semid.data.tables import as_mapped_table, is_table, log_unused, read_text
from semid.errors import SemidError

Id = str | int | np.integer
Allowed = Bool[np.ndarray, " items"] | Bool[np.ndarray, "n items"] | None
_Column = TypeVar("_Column", pa.Array, pa.ChunkedArray)
_ID_COLUMN, _BOOST_COLUMN = "item_id", "boost"
_RULE = "ids are strings or integers"


def read_ids(name: str, values: _Column, faults: Faults) -> _Column:
    """The ids of a column as strings. Invalid ids are added to `faults`; a column of another type is returned as is.

    Invalid are floats (1e16 and 10000000000000001 are the same float), booleans, dates, nulls and empty strings.
    """
    values = decoded(values)
    if not (is_string(values.type) or pa.types.is_integer(values.type) or pa.types.is_null(values.type)):
        row, example = next(((row, value.as_py()) for row, value in enumerate(values) if value.is_valid), (0, None))
        shown = f"{values.type} (row {faults.first + row + 1}: {example!r})"
        faults.column(name, f"expected strings or integers, got {shown}; convert the column to strings")
        return values
    ids = as_strings(values)
    faults.rows(name, ids.is_null().to_numpy(zero_copy_only=False), "is null; fill it in or drop the row")
    empty = pc.fill_null(pc.equal(ids, ""), False).to_numpy(zero_copy_only=False)
    faults.rows(name, empty, "is empty; fill it in or drop the row")
    faults.rows(name, _undecodable(ids), "is not UTF-8; convert the file to UTF-8")
    return ids


def as_ids(values: Iterable[Id] | pa.Array | pa.ChunkedArray, *, what: str = "item ids") -> pa.Array:
    """Ids given in Python (list, set, array, pandas or polars series, Arrow array) as an array of strings.

    Raises SemidError naming `what` and the first entry that is no id.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array) and values.type == pa.string() and not values.null_count:
        return values
    if isinstance(values, str):
        raise SemidError(f"expected a list of {what}, got the string {values!r}; put it in a list")
    try:
        entries = values.to_pylist() if isinstance(values, pa.Array) else list(values)
    except TypeError:
        raise SemidError(f"expected a list of {what}, got {values!r}; give an empty list for none") from None
    texts = [entry if type(entry) is str else _as_id(entry) for entry in entries]
    try:
        if None not in texts:
            return pa.array(texts, pa.string())
        wrong = texts.index(None)
    except UnicodeEncodeError as error:
        wrong = next(at for at, text in enumerate(texts) if error.object == text)
        found = f"entry {wrong} {HALF_CHARACTER}: {entries[wrong]!r}"
        raise SemidError(f"{what}: {found}; correct it or leave it out") from None
    found = f"entry {wrong} is {entries[wrong]!r} of type {type(entries[wrong]).__name__}"
    raise SemidError(f"{what}: {found}; {_RULE}: correct it or leave it out")


def parse_ids(text: str) -> list[str]:
    """Ids written in one line: separated by commas, blanks around them removed, or a JSON list of any ids.

    Raises SemidError for text that begins with a bracket and is no JSON list of ids.
    """
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return as_ids(json.loads(text)).to_pylist()
    except (ValueError, RecursionError) as error:  # a SemidError is a ValueError
        raise SemidError(f'expected ids as a JSON list, such as ["i1", "i2"], got {text[:80]!r} ({error})') from None


def as_masks(
    allowed: Any, *, num_items: int, num_histories: int, of: str = "histories"
) -> Bool[np.ndarray, "masks items"]:
    """`allowed` as masks: one for all histories or one per history. Raises SemidError for anything else, e.g. ids."""
    try:
        masks = np.atleast_2d(allowed)
    except ValueError:  # lists of several lengths
        masks = np.zeros((0, 0), object)
    if masks.dtype != bool or masks.shape[1:] != (num_items,) or len(masks) not in (1, num_histories):
        expected = f"booleans [{num_items} items] or [{num_histories} {of}, {num_items} items]"
        got = f"{masks.dtype} {list(np.shape(allowed) if masks.size else masks.shape)}"
        raise SemidError(f"expected allowed as {expected}, got {got}; a Recommender makes it of ids: allow(item_ids)")
    return masks


def read_id_file(path: str | Path, *, columns: Mapping[str, str] | None = None) -> list[str]:
    """The ids of a text file, one per line (blanks are part of an id, empty lines are skipped), or of a table's column
    item_id, which may have the name that `columns` maps it to (see `as_mapped_table`)."""
    if is_table(path):
        return _table_ids(path, columns or {})
    lines = (line.removesuffix("\r") for line in read_text(path).split("\n"))
    return [line for line in lines if line.strip()]


def read_boosts(path: str | Path, *, columns: Mapping[str, str] | None = None) -> dict[str, float]:
    """Boost factors by item id, from the columns item_id (or the name that `columns` maps it to) and boost of a file.

    Raises SemidError naming file, column and row of an invalid factor or a repeated item.
    """
    table, faults = _read(path, columns or {}, (_ID_COLUMN, _BOOST_COLUMN)), Faults(str(path))
    _check_columns(path, table, (_ID_COLUMN, _BOOST_COLUMN), remedy="rename one")
    ids, factors = read_ids(_ID_COLUMN, table[_ID_COLUMN], faults), table[_BOOST_COLUMN]
    try:
        values = factors.cast(pa.float64()).to_numpy()
    except pa.ArrowException:
        raise SemidError(f"{path}: column 'boost': expected numbers, got {factors.type}; write such as 1.5") from None
    wrong = ~(np.isfinite(values) & (values >= 0))
    faults.rows(
        _BOOST_COLUMN, wrong, "expected a finite number of 0 or more, got {}; correct it or drop the row", factors
    )
    if not faults.lines:
        names = ids.to_numpy()
        again = np.ones(len(names), bool)
        again[np.unique(names, return_index=True)[1]] = False
        faults.rows(_ID_COLUMN, again, "{!r} is given twice; keep one row for each item", ids)
    raise_faults(faults.lines)
    log_unused(name for name in table.column_names if name not in (_ID_COLUMN, _BOOST_COLUMN))
    return dict(zip(ids.to_pylist(), values.tolist(), strict=True))


def _table_ids(path: str | Path, columns: Mapping[str, str]) -> list[str]:
    table, faults = _read(path, columns, (_ID_COLUMN,)), Faults(str(path))
    _check_columns(path, table, (_ID_COLUMN,), remedy="rename one, or list ids in .txt")
    ids = read_ids(_ID_COLUMN, table[_ID_COLUMN], faults)
    raise_faults(faults.lines)
    log_unused(name for name in table.column_names if name != _ID_COLUMN)
    return ids.to_pylist()


def _read(path: str | Path, columns: Mapping[str, str], names: Iterable[str]) -> pa.Table:
    """Read a table; the columns `names` may be under the names that `columns` maps them to."""
    return as_mapped_table(path, {name: columns[name] for name in names if name in columns})


def _check_columns(path: str | Path, table: pa.Table, names: Iterable[str], *, remedy: str) -> None:
    for name in names:
        if name not in table.column_names:
            raise SemidError(f"{path}: column {name!r}: missing; found {', '.join(table.column_names)}; {remedy}")
        if table.column_names.count(name) > 1:
            raise SemidError(f"{path}: column {name!r} occurs more than once; rename or drop one")


def _as_id(value: Any) -> str | None:
    """A Python value as an id, or None if it is no valid id."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return str(int(value))


def _undecodable(ids: pa.Array | pa.ChunkedArray) -> Bool[np.ndarray, " n"]:
    """Mask of the strings that are not UTF-8, e.g. from a damaged file."""
    bad = np.zeros(len(ids), bool)
    try:
        ids.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in enumerate(ids.cast(pa.binary())):
            try:
                (value.as_py() or b"").decode()
            except UnicodeDecodeError:
                bad[row] = True
    return bad
