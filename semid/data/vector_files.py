"""Files of vectors: which of their columns a tokenizer reads, and their rows, a block at a time."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from semid.arrow import is_vector
from semid.artifacts import sha256_json
from semid.data import storage
from semid.errors import SemidError


class Block(NamedTuple):
    """Rows of one file: the first row's number, ids, and vectors of all columns side by side, float16 or float32."""

    file: VectorFile
    first: int
    item_ids: pa.Array
    vectors: Float[np.ndarray, "n dim"]


@dataclass(frozen=True)
class VectorFile:
    """A Parquet file, its vector columns, and how wide each of them is."""

    path: str
    id_column: str
    widths: dict[str, int]

    @classmethod
    def open(cls, path: str, *, dim: int, id_column: str, columns: Sequence[str]) -> VectorFile:
        """Check the schema. `columns` are the vectors to read, `dim` dimensions in all; none given: the only ones.

        Raises SemidError naming the column that is missing or no list of floats, several of which none is known to be
        the tokenizer's, and widths that do not add up to `dim`.
        """
        with storage.open_parquet(path) as file:
            schema = file.schema_arrow
        wanted = list(columns)
        if not wanted:
            wanted = [f.name for f in schema if is_vector(f.type)]
            if len(wanted) > 1:  # their order would be a guess, and wrong codes look like any others
                shown = ", ".join(wanted)
                raise SemidError(
                    f"{path}: has vector columns {shown}, and the tokenizer does not say which it was fitted to; name "
                    "them after --columns, in the order of its dataset"
                )
        for name in (id_column, *wanted):
            if name not in schema.names:
                raise SemidError(f"{path}: column {name!r} is missing; found {', '.join(schema.names)}")
        for name in wanted:
            if not is_vector(kind := schema.field(name).type):
                raise SemidError(f"{path}: column {name!r}: expected lists of floats, got {kind}")
        free = [name for name in wanted if not pa.types.is_fixed_size_list(schema.field(name).type)]
        if len(free) > 1:
            raise SemidError(f"{path}: columns {free} have no fixed width; write them as fixed-size lists")
        fixed = {name: schema.field(name).type.list_size for name in wanted if name not in free}
        widths = {name: fixed.get(name, dim - sum(fixed.values())) for name in wanted}
        if sum(widths.values()) != dim or min(widths.values(), default=0) < 1:
            shown = ", ".join(f"{name}: {width}" for name, width in fixed.items()) or "none"
            raise SemidError(f"{path}: expected vector columns of {dim} dimensions in all, got {shown}; choose columns")
        return cls(path, id_column, widths)

    def blocks(self, rows: int) -> Iterator[Block]:
        """The file in blocks of at most `rows`; one empty block of an empty file."""
        first = 0
        with storage.open_parquet(self.path) as file:
            for batch in file.iter_batches(rows, columns=[self.id_column, *self.widths]):
                vectors = [self._vectors(batch.column(name), name, first) for name in self.widths]
                joined = vectors[0] if len(vectors) == 1 else np.concatenate(vectors, axis=1)
                yield Block(self, first, self._ids(batch.column(self.id_column), first), joined)
                first += len(batch)
        if not first:
            empty = np.zeros((0, sum(self.widths.values())), np.float32)
            yield Block(self, 0, pa.array([], pa.string()), empty)

    def request(self, tokenizer: str) -> str:
        """Hash of all that the output depends on: the tokenizer's digest, the columns, and the file's version."""
        name = posixpath.basename(self.path)
        return sha256_json([tokenizer, self.id_column, list(self.widths.items()), name, *storage.version(self.path)])

    def at(self, column: str, row: int) -> str:
        """Place of a fault, for messages; rows are counted from 1, as elsewhere in files."""
        return f"{self.path}: column {column!r}, row {row + 1}"

    def _vectors(self, values: pa.Array, name: str, first: int) -> Float[np.ndarray, "n width"]:
        width = self.widths[name]
        lengths = pc.list_value_length(values)
        wrong = pc.fill_null(pc.not_equal(lengths, width), True).to_numpy(zero_copy_only=False)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            got = "nothing" if lengths[row].as_py() is None else f"{lengths[row]}"
            raise SemidError(f"{self.at(name, first + row)}: expected a vector of {width} dimensions, got {got}")
        flat = values.flatten()
        if flat.null_count:
            row = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // width
            raise SemidError(f"{self.at(name, first + row)}: a dimension is null; leave the item out or fill it")
        array = flat.to_numpy().reshape(len(values), width)
        return array if array.dtype == np.float16 else array.astype(np.float32, copy=False)

    def _ids(self, values: pa.Array, first: int) -> pa.Array:
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            raise SemidError(f"{self.at(self.id_column, first + row)}: the id is missing; every item needs one")
        try:
            return values.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise SemidError(f"{self.path}: column {self.id_column!r}: expected strings, got {values.type}") from None
