"""Arrow tables: Parquet with page checksums, and fixed-size lists as matrices."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Shaped

from semid.errors import SemidError

_Column = TypeVar("_Column", pa.Array, pa.ChunkedArray)
# Rows of strings per chunk: a chunk of Arrow strings holds at most 2 GiB.
_CHUNK_ROWS = 1 << 22


def write_parquet(table: pa.Table, path: str | Path) -> None:
    """Write a Parquet file, zstd-compressed, with a checksum on every page."""
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def read_parquet(path: str | Path, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file and verify its checksums. Raises SemidError naming the file if it is missing or damaged."""
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise SemidError(f"{path}: not a readable Parquet file ({error})") from None


def to_lists(matrix: Shaped[np.ndarray, "n width"]) -> pa.FixedSizeListArray:
    """The rows of a matrix as fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).reshape(-1)), matrix.shape[1])


def to_matrix(column: pa.ChunkedArray | pa.FixedSizeListArray) -> Shaped[np.ndarray, "n width"]:
    """A column of fixed-size lists as a matrix."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), column.type.list_size)


def digest(table: pa.Table) -> str:
    """sha256 of a table's schema and values, whatever name Parquet gives the elements of lists."""
    table = table.cast(pa.schema([field.with_type(_unnamed(field.type)) for field in table.schema]))
    table, sink = table.combine_chunks(), _Hash()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.total.hexdigest()


class _Hash(io.RawIOBase):
    """Writable file that hashes what is written instead of storing it."""

    def __init__(self) -> None:
        self.total = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.total.update(data)
        return len(data)


def is_string(kind: pa.DataType) -> bool:
    """One of the string types."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_list(kind: pa.DataType) -> bool:
    """One of the list types."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_text(kind: pa.DataType) -> bool:
    """A string, or a list of strings."""
    return is_string(kind) or (is_list(kind) and is_string(kind.value_type))


def _unnamed(kind: pa.DataType) -> pa.DataType:
    """The type with Arrow's default name for the elements of its lists, if it is a list type."""
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_type, kind.list_size)
    return pa.list_(_unnamed(kind.value_type)) if pa.types.is_list(kind) else kind


def is_vector(kind: pa.DataType) -> bool:
    """Lists of numbers, of a fixed size or not; integers may be quantized vectors."""
    return is_list(kind) and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def are_vectors(values: pa.Array | pa.ChunkedArray) -> bool:
    """Tell whether a column holds vectors: lists of floats, or of integers where all have one length."""
    if not is_vector(values.type) or pa.types.is_floating(values.type.value_type):
        return is_vector(values.type)
    lengths = pc.min_max(pc.list_value_length(values)).as_py()
    return not values.null_count and bool(lengths["max"]) and lengths["min"] == lengths["max"]


def is_storable(kind: pa.DataType) -> bool:
    """A type that Parquet can hold: no struct without fields (JSON's {}), no union, no calendar interval."""
    try:
        pq.ParquetWriter(io.BytesIO(), pa.schema([("column", kind)])).close()
    except pa.ArrowNotImplementedError:
        return False
    return True


def is_fixed_vector(kind: pa.DataType) -> bool:
    """The type of a dataset's vector columns: fixed-size lists of floats."""
    return pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)


def decoded(values: _Column) -> _Column:
    """A column with dictionary-encoded values (pandas, polars or Parquet categories, or lists of them) decoded, and
    string and binary views as plain strings and binaries, since few Arrow functions take views; others unchanged."""
    kind = values.type
    if pa.types.is_string_view(kind):
        return as_strings(values)
    if pa.types.is_binary_view(kind):
        return values.cast(pa.large_binary())
    of_lists = is_list(kind) and pa.types.is_dictionary(kind.value_type)
    if not (of_lists or pa.types.is_dictionary(kind)):
        return values
    if isinstance(values, pa.ChunkedArray):
        chunks = [decoded(piece) for piece in _pieces(values)]
        empty = pa.large_list(kind.value_type.value_type) if of_lists else kind.value_type
        return pa.chunked_array(chunks, None if chunks else empty)
    if of_lists:
        lengths: np.ndarray = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int64))
        return pa.LargeListArray.from_arrays(offsets, decoded(values.flatten()), mask=values.is_null())
    words = values.dictionary
    return (words.cast(pa.string()) if is_string(words.type) else words).take(values.indices)


def as_strings(values: _Column) -> _Column:
    """A column of whole numbers, large strings or the like as strings."""
    if isinstance(values, pa.ChunkedArray):
        return pa.chunked_array([piece.cast(pa.string()) for piece in _pieces(values)], pa.string())
    return values.cast(pa.string())


def _pieces(values: pa.ChunkedArray) -> list[pa.Array]:
    """The chunks of a column, cut to at most `_CHUNK_ROWS` rows."""
    return [chunk.slice(at, _CHUNK_ROWS) for chunk in values.chunks for at in range(0, len(chunk), _CHUNK_ROWS)]
