"""Evaluation sets: the examples of a dataset's split, or of a user's own table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from semid import arrow
from semid.arrow import is_list, is_string
from semid.data import Examples, Faults, Histories, as_table, log_unused, parse_ids, raise_faults, read_ids
from semid.errors import SemidError

_COLUMNS = {"history": "a list of item ids, oldest first", "target": "the id of the item that came next"}


@dataclass(frozen=True)
class EvaluationSet:
    """Examples in a ranker's item rows, training counts of the items, and the provenance of both.

    `rows` are the numbers of the examples in the source, which had `asked` rows: some may have been dropped.
    """

    examples: Examples
    counts: Int[np.ndarray, " items"]
    provenance: dict[str, Any]
    rows: Int[np.ndarray, " n"]
    asked: int


@runtime_checkable
class Named(Protocol):
    """A ranker's items; it may also have `train_counts`, their counts in training."""

    @property
    def item_ids(self) -> pa.Array: ...


def examples_from_table(ranker: Named, table: str | Path | pa.Table | Any, *, drop_unknown: bool) -> EvaluationSet:
    """The examples of a table with a column `history` (lists of item ids, oldest first) and `target` (item ids).

    `table` is an Arrow table, anything with Arrow's interface (a pandas or polars DataFrame), or the path of a Parquet,
    CSV, TSV or JSONL file. Ids are strings or integers. A history that is text, as in CSV, is a
    JSON list, or ids separated by commas. `drop_unknown` leaves out
    ids of histories that the ranker does not know, and rows whose target it does not know, and counts both.
    Raises SemidError listing every fault with row and column.
    """
    name = str(table) if isinstance(table, (str, Path)) else "table"
    faults = Faults(name)
    read = as_table(table, strings=tuple(_COLUMNS))
    for column, what in _COLUMNS.items():
        if (count := read.column_names.count(column)) == 0:
            faults.column(column, f"missing; expected {what}; there are {read.column_names}")
        elif count > 1:
            faults.column(column, "occurs more than once; rename or drop one")
    raise_faults(faults.lines)
    log_unused(name for name in read.column_names if name not in _COLUMNS)
    if not read.num_rows:
        raise SemidError(f"{name}: no rows; expected one for each example")
    histories, targets = _histories(read["history"], faults), _targets(read["target"], faults)
    raise_faults(faults.lines)
    lengths = pc.list_value_length(histories).to_numpy().astype(np.int64)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    items, wanted = _rows(histories.flatten(), ranker), _rows(targets, ranker)
    if not drop_unknown:
        _check_known(faults, histories.flatten(), owner, items < 0, "history", len(lengths))
        _check_known(faults, targets, np.arange(len(wanted)), wanted < 0, "target", len(lengths))
        raise_faults(faults.lines)
    rows = np.flatnonzero(wanted >= 0)
    if not len(rows):
        raise SemidError(f"{name}: column 'target': none of the {len(wanted)} targets is in the model's catalogue")
    kept = (items >= 0) & (wanted >= 0)[owner]
    ends = np.cumsum(np.bincount(owner[kept], minlength=len(lengths))[rows])
    starts = np.concatenate([[0], ends[:-1]])
    found = Examples(Histories(np.full(len(rows), -1, np.int32), items[kept], starts, ends), wanted[rows])
    provenance = {
        "dataset": Path(name).name,
        "split": "held-out table",
        "table_sha256": _digest(histories, targets),
        "table_rows": len(wanted),
        "dropped": {"unknown_history_items": int((items < 0).sum()), "rows_of_unknown_target": len(wanted) - len(rows)},
    }
    known = getattr(ranker, "train_counts", None)
    counts = found.histories.popularity(len(ranker.item_ids)) if known is None else np.asarray(known)
    provenance["popularity_of"] = "histories of the table" if known is None else "training"
    return EvaluationSet(found, counts, provenance, rows, len(wanted))


def _histories(values: pa.ChunkedArray, faults: Faults) -> pa.ListArray:
    """Lists of ids as strings; other values are added to the faults."""
    if is_string(values.type):
        values = pa.chunked_array([pa.array(_parsed(values, faults), pa.list_(pa.string()))])
    lists = values.combine_chunks()
    ids = read_ids("history", lists.flatten(), Faults(faults.file)) if is_list(lists.type) else lists
    if not is_list(lists.type) or ids.type != pa.string():
        faults.column("history", f"expected lists of strings or integers, got {values.type}; write item ids as strings")
        return pa.array([], pa.list_(pa.string()))
    null = lists.is_null().to_numpy(zero_copy_only=False)
    faults.rows("history", null, "null; expected a list of item ids, empty for who has none (in CSV a comma alone)")
    wrong = pc.fill_null(pc.equal(ids, ""), True).to_numpy(zero_copy_only=False)
    holed = np.isin(np.arange(len(lists)), pc.list_parent_indices(lists).to_numpy()[wrong])
    faults.rows("history", holed, "a null or an empty one among the item ids; leave it out, or write the id")
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)), pa.int32()), ids)


def _parsed(texts: pa.ChunkedArray, faults: Faults) -> list[list[str] | None]:
    """The ids of histories given as text; a text in neither of the two forms is added to the faults."""
    parsed: list[list[str] | None] = []
    for row, text in enumerate(texts.to_pylist()):
        try:
            parsed.append(None if text is None else parse_ids(text))
        except SemidError as error:
            faults.table(f"row {row + 1}, column 'history': {error}")
            parsed.append([])
    return parsed


def _targets(values: pa.ChunkedArray, faults: Faults) -> pa.Array:
    ids = read_ids("target", values, faults)
    return ids.combine_chunks() if ids.type == pa.string() else pa.array([], pa.string())


def _rows(item_ids: pa.Array, ranker: Named) -> Int[np.ndarray, " n"]:
    found = pc.index_in(item_ids, value_set=ranker.item_ids)
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)


def _check_known(
    faults: Faults,
    item_ids: pa.Array,
    owner: Int[np.ndarray, " n"],
    unknown: Bool[np.ndarray, " n"],
    column: str,
    num_rows: int,
) -> None:
    """Add a fault for each row with an unknown id, with its first one."""
    where, first = np.unique(owner[unknown], return_index=True)
    if not len(where):
        return
    named = np.full(num_rows, None, object)
    named[where] = np.array(item_ids.filter(pa.array(unknown)).to_pylist(), object)[first]
    what = "item id {!r} is not in the model's catalogue; correct it, or drop such with drop_unknown=True"
    faults.rows(column, named != None, what, pa.chunked_array([pa.array(named, pa.string())]))  # noqa: E711 - by element


def _digest(histories: pa.ListArray, targets: pa.Array) -> str:
    """sha256 of the examples, independent of the file or frame they came in."""
    return arrow.digest(pa.table({"history": histories, "target": targets}))
