"""Validation of item and interaction tables: types are normalized, and one error lists all faults."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from semid.arrow import are_vectors, as_strings, decoded, is_list, is_storable, is_string
from semid.artifacts import first_line
from semid.data.faults import Faults, raise_faults
from semid.data.ids import read_ids
from semid.data.images import image_problem

_LOG = logging.getLogger("semid")
_YEAR_10000 = 253_402_300_800  # seconds since 1970; larger numbers are probably milliseconds
_YEAR_1971, _YEAR_1990 = 31_536_000, 631_152_000
_LARGEST = 2**63 - 1  # of int64
_DAYS_TO_1990 = 7_305  # smaller numbers are counters such as 1, 2, 3
# Numbers of the form YYYYMMDDhhmm and YYYYMMDDhhmmss, 1990 to 2100; as seconds or milliseconds they are far away.
_DIGITS = ((199001010000, 210012312359), (19900101000000, 21001231235959))
_TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_TIME = "seconds since 1970, ISO-8601 text such as 2024-05-31T12:00:00Z, or datetimes"
_NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_ZONE = r"(Z|[+-]\d\d(:?\d\d)?)"
_ISO_8601 = rf"^\d{{4}}-\d\d-\d\d([T ]\d\d(:\d\d(:\d\d(\.\d{{1,9}})?)?)?{_ZONE}?)?$"


def checked_tables(
    items: pa.Table, interactions: pa.Table, item_file: str, interaction_file: str
) -> tuple[pa.Table, pa.Table]:
    """Both tables with normalized types, without columns that are all null or of a type that Parquet lacks.

    Ids become strings, `timestamp` int64 seconds, `position` int64, `weight` float32, lists of floats fixed-size
    lists (float16 stays, anything else becomes float32). Times may be seconds since 1970, ISO-8601 text (UTC unless it
    has a zone), dates or datetimes. If any is finer than a second, a column `ticks` keeps the full times, so that
    truncation to seconds does not lose their order. Other columns of the interactions are dropped.
    Raises one SemidError that lists all faults of both tables, one per line: file, row, column, what to do. Warns of
    times that are probably not in seconds.
    """
    item_faults, interaction_faults = Faults(item_file), Faults(interaction_file)
    items = _items(items, item_faults)
    interactions = _interactions(interactions, interaction_faults)
    if all(_has_string_ids(table) for table in (items, interactions)):
        _check_known(interactions["item_id"], items["item_id"], interaction_faults, item_file)
    raise_faults(item_faults.lines + interaction_faults.lines)
    if "timestamp" in interactions.column_names:
        _warn_of_times(interactions["timestamp"], interaction_file)
    return items, interactions


def checked_items(items: pa.Table, item_file: str) -> pa.Table:
    """Check an items table alone (see `checked_tables`)."""
    faults = Faults(item_file)
    items = _items(items, faults)
    raise_faults(faults.lines)
    return items


_Reader = Callable[[str, pa.ChunkedArray, Faults], pa.ChunkedArray]


def _items(table: pa.Table, faults: Faults) -> pa.Table:
    table = _read_columns(table, {"item_id": read_ids, "image": _images}, _content, ("item_id",), faults)
    if _has_string_ids(table):
        _check_unique(table["item_id"], faults)
    return table.select([field.name for field in table.schema if is_storable(field.type)])


def _interactions(table: pa.Table, faults: Faults) -> pa.Table:
    read = _read_columns(
        table, INTERACTION_READERS, lambda name, values, faults: values, ("user_id", "item_id"), faults
    )
    read = read.select([name for name in read.column_names if name in INTERACTION_READERS])
    if not read.num_rows:
        return read
    if not {"timestamp", "position"} & set(read.column_names):
        remedy = f"found {', '.join(table.column_names)}; add or rename one (--columns timestamp=NAME)"
        faults.table(f"neither column 'timestamp' (seconds) nor 'position' has values; {remedy}")
    return _in_seconds(read)


def _read_columns(
    table: pa.Table, readers: dict[str, _Reader], default: _Reader, required: tuple[str, ...], faults: Faults
) -> pa.Table:
    """Normalize every column by its reader; drop all-null columns that are not required."""
    names = table.column_names
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.column(name, "occurs more than once; rename or drop one")
    for name in (name for name in required if name not in names):
        faults.column(name, f"is missing; found {', '.join(names)}; add or rename it (--columns {name}=NAME)")
    if not table.num_rows:
        faults.table("has no rows; expected at least one")
    if not table.num_rows or len(set(names)) < len(names):
        return pa.table({})
    kept = [name for name in names if name in required or table[name].null_count < table.num_rows]
    return pa.table({name: readers.get(name, default)(name, decoded(table[name]), faults) for name in kept})


def _has_string_ids(table: pa.Table) -> bool:
    return table.num_rows > 0 and "item_id" in table.column_names and table["item_id"].type == pa.string()


def _mask(condition: pa.ChunkedArray) -> Bool[np.ndarray, " n"]:
    """An Arrow condition as a NumPy mask; null counts as false."""
    return condition.fill_null(False).to_numpy()


def _strings(name: str, values: pa.ChunkedArray, faults: Faults) -> pa.ChunkedArray:
    if not (is_string(values.type) or pa.types.is_integer(values.type) or pa.types.is_null(values.type)):
        faults.column(name, f"expected strings or integers, got {values.type}; convert it to strings")
        return values
    return as_strings(values)


def _check_null(name: str, values: pa.ChunkedArray, faults: Faults) -> None:
    if values.null_count:
        faults.rows(name, _mask(values.is_null()), "is null; fill it in or drop the row")


def _check_unique(ids: pa.ChunkedArray, faults: Faults) -> None:
    known = ids.filter(pc.and_(ids.is_valid(), pc.not_equal(ids, "")))
    if pc.count_distinct(known).as_py() == len(known):
        return
    rows = np.flatnonzero(_mask(pc.not_equal(ids, "")))
    codes = known.dictionary_encode().combine_chunks().indices.to_numpy()
    first = np.unique(codes, return_index=True)[1]
    repeated = np.zeros(len(ids), bool)
    repeated[rows[first[codes] != np.arange(len(codes))]] = True
    faults.rows("item_id", repeated, "{!r} occurs in an earlier row too; keep one row per item", ids)


def _check_known(ids: pa.ChunkedArray, known: pa.ChunkedArray, faults: Faults, item_file: str) -> None:
    unknown = _mask(pc.and_(pc.invert(pc.is_in(ids, known)), pc.not_equal(ids, "")))
    faults.rows("item_id", unknown, "item {!r} is not in " + _braces(item_file) + "; add it or drop the row", ids)


def _braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _times(name: str, values: pa.ChunkedArray, faults: Faults) -> pa.ChunkedArray:
    """Times as int64 if they are whole seconds, else as Arrow timestamps."""
    if is_string(values.type):
        values = _parsed(name, values, faults)
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        return _seconds(name, values, faults)
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("s"))
    elif not pa.types.is_timestamp(values.type) and not is_string(values.type):
        faults.column(name, f"expected {_TIME}, got {values.type}; convert it")
    _check_null(name, values, faults)
    return values


def _parsed(name: str, texts: pa.ChunkedArray, faults: Faults) -> pa.ChunkedArray:
    """Texts as numbers of seconds if all are numbers, as timestamps if all are ISO-8601 (UTC unless with a zone)."""
    iso, number = (_mask(pc.match_substring_regex(texts, pattern)) for pattern in (_ISO_8601, _NUMBER))
    bad = ~(iso | number | _mask(texts.is_null()))
    faults.rows(name, bad, "{!r} is no time; expected " + _TIME, texts)
    if iso.any() and number.any():
        fewer, other = (number, "ISO-8601 text") if number.sum() <= iso.sum() else (iso, "a number")
        faults.rows(name, fewer, "{!r}, and other rows are " + other + "; write all alike", texts)
        return texts
    if bad.any():
        return texts
    return _as_numbers(texts) if number.any() else _timestamps(name, texts, faults)


def _timestamps(name: str, texts: pa.ChunkedArray, faults: Faults) -> pa.ChunkedArray:
    """ISO-8601 texts in microseconds; in nanoseconds (only years 1677 to 2262) if one has more than six decimals."""
    is_fine = pc.any(pc.match_substring_regex(texts, r"\.\d{7}")).as_py()
    kind = pa.timestamp("ns" if is_fine else "us")
    zoned = pc.match_substring_regex(texts, rf":.*{_ZONE}$|[T ]\d\d{_ZONE}$")
    nothing = pa.scalar(None, texts.type)
    try:
        local = pc.if_else(zoned, nothing, texts).cast(kind)
        return pc.coalesce(local, pc.if_else(zoned, texts, nothing).cast(pa.timestamp(kind.unit, "UTC")).cast(kind))
    except pa.ArrowInvalid as error:  # such as a month 13
        bad = np.array([text is not None and not _is_date(text) for text in texts.to_pylist()], bool)
        faults.rows(name, bad, "{!r} is no time; expected " + _TIME, texts)
        if not bad.any():
            faults.column(name, f"{first_line(error)}; expected {_TIME}")
        return texts


def _is_date(text: str) -> bool:
    """Tell whether an ISO-8601 text is a valid date and time."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _as_numbers(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts of numbers as int64 if all are whole and fit, else as float64."""
    if pc.all(pc.match_substring_regex(texts, r"^-?\d+$")).as_py():
        with contextlib.suppress(pa.ArrowInvalid):  # more than 64 bits
            return texts.cast(pa.int64())
    return texts.cast(pa.float64())


def _signed(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whole numbers as int64, clipped to the largest one."""
    if pa.types.is_uint64(values.type):
        values = pc.min_element_wise(values, pa.scalar(_LARGEST, pa.uint64()), skip_nulls=False)
    return values.cast(pa.int64())


def _numbers(name: str, values: pa.ChunkedArray, faults: Faults) -> pa.ChunkedArray | None:
    """A column of numbers, or of texts of numbers; None, and faults, for any other."""
    if is_string(values.type):
        bad = _mask(pc.invert(pc.match_substring_regex(values, _NUMBER)))
        faults.rows(name, bad, "{!r} is no number; correct it or drop the row", values)
        return None if bad.any() else _as_numbers(values)
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        return values
    faults.column(name, f"expected numbers, got {values.type}; convert it to numbers")
    return None


def _seconds(name: str, values: pa.ChunkedArray, faults: Faults) -> pa.ChunkedArray:
    """Numbers of seconds: int64 if all are whole, else timestamps in microseconds."""
    given = values
    if is_float := pa.types.is_floating(values.type):
        values = values.cast(pa.float64())
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    else:
        values = _signed(values)
    _check_null(name, values, faults)
    digits = np.any([_mask(pc.and_(pc.greater_equal(values, a), pc.less_equal(values, b))) for a, b in _DIGITS], axis=0)
    faults.rows(name, digits, "{} reads as the digits of a date and a time; expected " + _TIME, values)
    late = _mask(pc.or_(pc.greater_equal(values, _YEAR_10000), pc.less_equal(values, -_YEAR_10000))) & ~digits
    what = "{} lies beyond the year 9999; timestamps are in seconds: divide milliseconds by 1000"
    faults.rows(name, late, what, given)
    if not is_float or late.any() or digits.any():
        return values
    numbers = values.fill_null(0).to_numpy()
    if (numbers % 1 == 0).all():
        return values.cast(pa.int64())
    return pa.chunked_array([np.floor(numbers * 1e6).astype(np.int64)]).cast(pa.timestamp("us"))


def _warn_of_times(seconds: pa.ChunkedArray, file: str) -> None:
    """Warn if all times lie in 1970 or before (probably days or dates), or a few do in a log that is mostly recent."""
    early, largest = pc.sum(pc.less(seconds, _YEAR_1971)).as_py(), pc.max(seconds).as_py()
    if early == len(seconds) and largest >= _DAYS_TO_1990:
        what = "are they days or hours, or dates such as 20240131? write seconds, or ISO-8601 text (2024-01-31)"
        _LOG.warning("%s: all timestamps lie in 1970 or before, the largest is %d; %s", file, largest, what)
    elif early and 2 * pc.sum(pc.greater_equal(seconds, _YEAR_1990)).as_py() > len(seconds):
        what = "most after 1990; does 0 stand for an unknown time? drop these rows, or give them their times"
        _LOG.warning("%s: %s of %s timestamps lie before 1971, %s", file, f"{early:,}", f"{len(seconds):,}", what)


def _in_seconds(interactions: pa.Table) -> pa.Table:
    """Timestamps truncated to seconds; if any is finer, the full times are added as `ticks`."""
    names = interactions.column_names
    if "timestamp" not in names or not pa.types.is_timestamp(interactions["timestamp"].type):
        return interactions
    ticks_a_second = _TICKS[interactions["timestamp"].type.unit]
    ticks = interactions["timestamp"].cast(pa.int64()).fill_null(0).to_numpy()
    seconds = pa.array(ticks // ticks_a_second)
    interactions = interactions.set_column(names.index("timestamp"), "timestamp", seconds)
    if not (ticks % ticks_a_second).any():
        return interactions
    return interactions.append_column("ticks", pa.array(ticks))


def _whole_numbers(name: str, column: pa.ChunkedArray, faults: Faults) -> pa.ChunkedArray:
    _check_null(name, column, faults)
    values = _numbers(name, column, faults)
    if values is None:
        return column
    if pa.types.is_floating(values.type):
        numbers = values.cast(pa.float64())
        bad = _mask(pc.or_(pc.not_equal(pc.floor(numbers), numbers), pc.greater_equal(pc.abs(numbers), 2.0**63)))
        faults.rows(name, bad, "{} is not a whole number; round it or drop the row", values)
        return values if bad.any() else values.cast(pa.int64(), safe=False)
    numbers = _signed(values)
    if pa.types.is_uint64(values.type):
        late = _mask(pc.greater(values, pa.scalar(_LARGEST, pa.uint64())))
        faults.rows(name, late, "{} takes more than the 63 bits of a position; count from less", values)
    return numbers


def _weights(name: str, column: pa.ChunkedArray, faults: Faults) -> pa.ChunkedArray:
    _check_null(name, column, faults)
    values = _numbers(name, column, faults)
    if values is None:
        return column
    weights = values.cast(pa.float32(), safe=False)
    faults.rows(
        name, _mask(pc.invert(pc.is_finite(weights))), "{} is no finite float32; fix it or drop the row", values
    )
    return weights


def _content(name: str, values: pa.ChunkedArray, faults: Faults) -> pa.ChunkedArray:
    """Texts as strings (large strings beyond 2 GiB), lists of numbers as vectors, anything else unchanged.

    Lists of integers count as (quantized) vectors if all have the same length.
    """
    kind = values.type
    if are_vectors(values):
        return _vectors(name, values, faults)
    if is_list(kind) and is_string(kind.value_type):
        return values.cast(pa.list_(pa.string()))
    if is_string(kind):
        return values.cast(pa.string() if values.nbytes < 2**31 else pa.large_string())
    return values


def _vectors(name: str, values: pa.ChunkedArray, faults: Faults) -> pa.ChunkedArray:
    if values.null_count:
        faults.rows(name, _mask(values.is_null()), "has no vector; give every item one")
        return values
    lengths = pc.list_value_length(values)
    width = lengths[0].as_py()
    ragged = _mask(pc.not_equal(lengths, width))
    faults.rows(name, ragged, f"vector of {{}} numbers, expected {width} as in row 1; make all equal", lengths)
    if not width:
        faults.column(name, "vectors are empty; expected at least one number each")
    if ragged.any() or not width:
        return values
    chunks = [_fixed_size(chunk, width) for chunk in values.chunks if len(chunk)]
    finite = [np.isfinite(chunk.flatten().to_numpy(zero_copy_only=False)) for chunk in chunks]
    bad = np.concatenate([~rows.reshape(-1, width).all(axis=1) for rows in finite])
    faults.rows(name, bad, "vector holds a NaN, infinite or null number; fix it or drop the item")
    return pa.chunked_array(chunks)


def _fixed_size(vectors: pa.Array, width: int) -> pa.FixedSizeListArray:
    numbers = vectors.flatten()
    kind = pa.float16() if pa.types.is_float16(numbers.type) else pa.float32()
    return pa.FixedSizeListArray.from_arrays(numbers.cast(kind, safe=False), width)


def _images(name: str, values: pa.ChunkedArray, faults: Faults) -> pa.ChunkedArray:
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        faults.column(name, f"expected the bytes of PNG or JPEG files, got {values.type}; store them as binary")
        return values
    problems = np.array([image_problem(value.as_py()) for value in values], object)
    for problem in sorted(set(problems) - {""}):
        faults.rows(name, problems == problem, problem)
    return values


# Readers of the columns of interactions, by name; other columns are dropped.
INTERACTION_READERS: dict[str, _Reader] = {
    "user_id": read_ids,
    "item_id": read_ids,
    "timestamp": _times,
    "position": _whole_numbers,
    "event": _strings,
    "weight": _weights,
}
