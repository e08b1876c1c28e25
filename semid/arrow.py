"""Arrow tables: Parquet with page checksums, and fixed-size lists as matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped

from semid.errors import SemidError


def write_parquet(table: pa.Table, path: str | Path) -> None:
    """Write a Parquet file, zstd-compressed, with a checksum on every page."""
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def read_parquet(path: str | Path, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file, checksums verified. Raises SemidError naming the file if it is absent or damaged."""
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
    """sha256 of a table's schema and values."""
    table, sink = table.combine_chunks(), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def is_vector(kind: pa.DataType) -> bool:
    """A type of lists of floats, of a fixed size or not."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and pa.types.is_floating(kind.value_type)


def is_text(kind: pa.DataType) -> bool:
    """A type of strings, or of lists of strings."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
