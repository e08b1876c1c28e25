"""Item tables as input of a tokenizer: vectors, stored or computed by content encoders, read in blocks of rows."""

from __future__ import annotations

import contextlib
import posixpath
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float

from semid.arrow import are_vectors, is_vector
from semid.artifacts import sha256_json
from semid.data import storage
from semid.data.content import ContentEncoder
from semid.data.faults import Faults, raise_faults
from semid.data.ids import read_ids
from semid.data.tables import COMPRESSED, SUFFIXES, read_table, with_own_names, with_partitions
from semid.errors import SemidError


class Block(NamedTuple):
    """Consecutive rows of one file, from row `first`: ids, and concatenated vector columns, float16 or float32."""

    file: VectorFile
    first: int
    item_ids: pa.Array
    vectors: Float[np.ndarray, "n dim"]


def output_name(path: str) -> str:
    """Name of the Parquet file written for an input file: the same name with suffix `.parquet`, after the names of its
    partition folders, if any."""
    folders = path.split("/")[-1 - len(storage.partitions(path)) : -1]
    name = "-".join([*folders, posixpath.basename(path)])
    return f"{name.removesuffix(suffix)}.parquet" if (suffix := _text_suffix(name)) else name


def _text_suffix(path: str) -> str:
    """Suffix of a CSV, TSV or JSONL file, compressed or not; empty for Parquet."""
    plain = [suffix for kind in ("csv", "jsonl") for suffix in SUFFIXES[kind]]
    suffixes = [*plain, *(suffix + end for suffix in plain for end in COMPRESSED)]
    return next((path[-len(suffix) :] for suffix in suffixes if path.lower().endswith(suffix)), "")


class TableFile(NamedTuple):
    """A table in memory with the interface of `PartFile`; columns have semid's names."""

    table: pa.Table
    stored: Sequence[str]
    """Original column names."""

    @classmethod
    def named(cls, table: pa.Table, names: Mapping[str, str]) -> TableFile:
        """Rename columns to semid's names; `names` maps these to the names that the table may use."""
        return cls(with_own_names(table, names), table.column_names)

    @property
    def schema_arrow(self) -> pa.Schema:
        return self.table.schema

    def read(self, *, columns: Sequence[str]) -> pa.Table:
        """Some of the columns."""
        return self.table.select(columns)

    def iter_batches(self, rows: int, *, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The columns in batches of at most `rows`."""
        return iter(self.table.select(columns).combine_chunks().to_batches(rows))


class PartFile(NamedTuple):
    """A Parquet file with columns renamed to semid's names and its partition values added as string columns."""

    file: pq.ParquetFile
    partitions: Mapping[str, str | None]
    names: Mapping[str, str]
    """Names that columns may have in the file, by semid's names."""

    @property
    def stored(self) -> Sequence[str]:
        """Original column names."""
        return with_partitions(self.file.schema_arrow.empty_table(), self.partitions).column_names

    @property
    def schema_arrow(self) -> pa.Schema:
        return self._complete(self.file.schema_arrow.empty_table()).schema

    def read(self, *, columns: Sequence[str]) -> pa.Table:
        """Some of the columns."""
        return self._complete(self.file.read(columns=self._stored(columns))).select(columns)

    def iter_batches(self, rows: int, *, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The columns in batches of at most `rows`."""
        for batch in self.file.iter_batches(rows, columns=self._stored(columns)):
            yield from self._complete(pa.Table.from_batches([batch])).select(columns).to_batches()

    def _complete(self, table: pa.Table) -> pa.Table:
        return with_own_names(with_partitions(table, self.partitions), self.names)

    def _stored(self, columns: Sequence[str]) -> list[str]:
        """All names that the columns may have in the file; Parquet skips those that do not exist."""
        return [*columns, *(self.names[name] for name in columns if name in self.names)]


@dataclass(frozen=True)
class VectorFile:
    """A file or table of items with the vector columns to read from it, stored or computed by an encoder."""

    path: str
    """Path or URL of the file; of a table, a name for messages."""
    id_column: str | None
    widths: dict[str, int]
    """Dimensions of each vector column."""
    encoders: Mapping[str, ContentEncoder] = field(default_factory=dict)
    """Encoders of the computed columns."""
    table: TableFile | None = None
    """Content of a table in memory, or of a CSV or JSONL file, which is read whole."""
    unused: tuple[str, ...] = ()
    """Columns that nothing reads."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names that columns may have in the file, by semid's names."""

    @classmethod
    def open(
        cls,
        path: str,
        *,
        dim: int,
        id_column: str,
        columns: Sequence[str],
        encoders: Mapping[str, ContentEncoder] | None = None,
        others: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> VectorFile:
        """Open a file that `read_table` knows. `columns` are the vector columns to read, of `dim` dimensions in total;
        if empty, the file's only one. Columns that the file lacks are computed from raw columns by `encoders`. `names`
        maps semid's column names to those that the file may use (`{"item_id": "asin"}`).

        With `others`, all further vectors are read too: stored columns, and those that the encoders can compute. A
        column of lists without a fixed size is as wide as its first row.

        Raises SemidError naming a column that is missing, named twice, or no list of numbers; if `columns` is empty and
        the file has several; and for widths that do not add up to `dim`.
        """
        encoders, names, table = encoders or {}, names or {}, None
        if _text_suffix(path):
            inputs = [name for encoder in encoders.values() for name in encoder.inputs]
            strings = [id_column, *inputs]
            content = read_table(path, strings=(*strings, *(names[name] for name in strings if name in names)))
            table = TableFile.named(with_partitions(content, storage.partitions(path)), names)
        return cls(path, id_column, {}, {}, table, names=names)._resolved(dim, columns, encoders, others=others)

    @classmethod
    def from_table(
        cls,
        table: pa.Table,
        *,
        dim: int,
        columns: Sequence[str],
        encoders: Mapping[str, ContentEncoder],
        names: Mapping[str, str],
    ) -> VectorFile:
        """Like `open`, for a table in memory, without its ids."""
        content = TableFile.named(table, names)
        return cls("items", None, {}, {}, content, names=names)._resolved(dim, columns, encoders, others=False)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[TableFile | PartFile]:
        """The content, to be read in batches."""
        if self.table is not None:
            yield self.table
            return
        with storage.open_parquet(self.path) as file:
            yield PartFile(file, storage.partitions(self.path), self.names)

    def _resolved(
        self, dim: int, columns: Sequence[str], encoders: Mapping[str, ContentEncoder], *, others: bool
    ) -> VectorFile:
        """Copy with the widths of the columns to read, and the encoders of those to compute."""
        with self._opened() as source:
            schema = source.schema_arrow
            for name, count in Counter(schema.names).items():
                if count > 1:
                    raise SemidError(f"{self.path}: column {name!r} occurs more than once; rename or drop one")
            if twice := next((name for name, count in Counter(columns).items() if count > 1), None):
                raise SemidError(f"{self.path}: vector column {twice!r} is named twice; name it once (--columns)")
            vectors = list(columns) or self._only_vectors(schema)
            computed = {name: encoder for name, encoder in encoders.items() if name not in schema.names}
            self._check_columns(source, vectors, computed)
            widths = self._widths(schema, vectors, computed, dim)
            if others:
                widths |= self._other_widths(source, widths)
                widths |= {name: one.width for name, one in computed.items() if set(one.inputs) <= set(schema.names)}
        used = {name: computed[name] for name in widths if name in computed}
        read = {self.id_column, *widths, *(name for encoder in used.values() for name in encoder.inputs)}
        unused = tuple(theirs for name, theirs in zip(schema.names, source.stored, strict=True) if name not in read)
        return replace(self, widths=widths, encoders=used, unused=unused)

    def _only_vectors(self, schema: pa.Schema) -> list[str]:
        """The only vector column, if there is one."""
        lists = [field for field in schema if is_vector(field.type)]
        names = [field.name for field in lists if pa.types.is_floating(field.type.value_type)]
        names = names or [field.name for field in lists]
        if len(names) > 1:  # their order would be a guess, and wrong codes look like any others
            raise SemidError(
                f"{self.path}: has vector columns {', '.join(names)}, and the tokenizer does not say which it was "
                "fitted to; name them as columns (--columns), in the order of its dataset"
            )
        return names

    def _check_columns(
        self, source: TableFile | PartFile, vectors: Sequence[str], computed: Mapping[str, ContentEncoder]
    ) -> None:
        """Raise SemidError for a column that is missing, and for one that holds no vectors."""
        schema, missing = source.schema_arrow, f"is missing; found {', '.join(source.stored)}"
        if self.id_column is not None and self.id_column not in schema.names:
            raise SemidError(
                f"{self.path}: column {self._shown(self.id_column)} {missing}; name the column of ids (--id-column)"
            )
        for name in (one for one in vectors if one not in computed):
            if name not in schema.names:
                raise SemidError(f"{self.path}: column {self._shown(name)} {missing}; add or rename one")
        for name in vectors:
            for raw in computed[name].inputs if name in computed else ():
                if raw not in schema.names:
                    raise SemidError(
                        f"{self.path}: column {self._shown(raw)}, from which {name!r} is computed, {missing}; add it"
                    )
            if name not in computed and not is_vector(kind := schema.field(name).type):
                raise SemidError(f"{self.path}: column {name!r}: expected lists of numbers, got {kind}")

    def _shown(self, column: str) -> str:
        """A column's name for messages, with its other possible name."""
        return f"{column!r}" + (f" (or {self.names[column]!r})" if column in self.names else "")

    def _widths(
        self, schema: pa.Schema, vectors: Sequence[str], computed: Mapping[str, ContentEncoder], dim: int
    ) -> dict[str, int]:
        """Widths of the columns that the tokenizer reads; one without a fixed size takes what is left of `dim`."""
        fixed = {name: computed[name].width for name in vectors if name in computed}
        stored = [schema.field(name) for name in vectors if name not in computed]
        fixed |= {field.name: field.type.list_size for field in stored if pa.types.is_fixed_size_list(field.type)}
        free = [field.name for field in stored if field.name not in fixed]
        if len(free) > 1:
            raise SemidError(f"{self.path}: columns {free} have no fixed width; write them as fixed-size lists")
        widths = {name: fixed.get(name, dim - sum(fixed.values())) for name in vectors}
        if sum(widths.values()) != dim or min(widths.values(), default=0) < 1:
            shown = ", ".join(f"{name}: {width}" for name, width in fixed.items()) or "none"
            raise SemidError(
                f"{self.path}: expected vector columns of {dim} dimensions in all, got {shown}; choose columns"
            )
        return widths

    def _other_widths(self, source: TableFile | PartFile, read: Container[str]) -> dict[str, int]:
        """Widths of the vector columns that are not in `read`; a list without a fixed size is as wide as its first row.

        Raises SemidError if that row has no vector.
        """
        lists = [field for field in source.schema_arrow if is_vector(field.type) and field.name not in read]
        others = [field for field in lists if are_vectors(source.read(columns=[field.name])[field.name])]
        free = [field.name for field in others if not pa.types.is_fixed_size_list(field.type)]
        first = next(source.iter_batches(1, columns=free), None) if free else None
        widths = {field.name: field.type.list_size for field in others if field.name not in free}
        for name in free:
            vector = first.column(name)[0].as_py() if first else None
            if not vector:
                where = self.at(name, 0)
                raise SemidError(f"{where}: expected a vector, got nothing; leave the item or the column out")
            widths[name] = len(vector)
        return {field.name: widths[field.name] for field in others}

    def blocks(self, rows: int) -> Iterator[Block]:
        """The file in blocks of at most `rows`; an empty file is one empty block."""
        first, raw = 0, [name for encoder in self.encoders.values() for name in encoder.inputs]
        stored = [name for name in self.widths if name not in self.encoders]
        ids = [] if self.id_column is None else [self.id_column]
        unknown = dict.fromkeys(self.encoders, 0)
        with self._opened() as file:
            for batch in file.iter_batches(rows, columns=list(dict.fromkeys([*ids, *stored, *raw]))):
                computed = {name: self._encoded(name, batch) for name in self.encoders}
                vectors = [
                    computed[name] if name in computed else self._vectors(batch.column(name), name, first)
                    for name in self.widths
                ]
                joined = vectors[0] if len(vectors) == 1 else np.concatenate(vectors, axis=1)
                yield Block(self, first, self._ids(batch, first), joined)
                first += len(batch)
                for name, values in computed.items():
                    unknown[name] += int((~values.any(axis=1)).sum())
        if not first:
            empty = np.zeros((0, sum(self.widths.values())), np.float32)
            yield Block(self, 0, pa.array([], pa.string()), empty)
        for name, count in unknown.items():
            if count:
                self._warn(name, count, first)

    def request(self, tokenizer: str) -> str:
        """Hash of everything that the output depends on: the tokenizer's digest, the columns, the file's version."""
        name = posixpath.basename(self.path)
        return sha256_json([tokenizer, self.id_column, list(self.widths.items()), name, *storage.version(self.path)])

    def at(self, column: str | None, row: int) -> str:
        """Location of a fault, for messages; rows are counted from 1."""
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

    def _encoded(self, name: str, batch: pa.RecordBatch) -> Float[np.ndarray, "n width"]:
        """Vectors that the encoder of a column computes from raw columns."""
        try:
            return self.encoders[name].encode(pa.Table.from_batches([batch]))
        except SemidError as error:
            raise SemidError(f"{self.path}: {error}") from None

    def _warn(self, name: str, unknown: int, items: int) -> None:
        inputs = ", ".join(self.encoders[name].inputs)
        what = f"{unknown} of {items} items have nothing in {inputs} that the encoder of {name!r} knows"
        warnings.warn(f"{self.path}: {what}; their vectors are zeros", stacklevel=3)

    def _ids(self, batch: pa.RecordBatch, first: int) -> pa.Array:
        if self.id_column is None:
            return pa.nulls(len(batch), pa.string())
        values = batch.column(self.id_column)
        faults = Faults(self.path, first=first)
        ids = read_ids(self.id_column, values, faults)
        raise_faults(faults.lines[:1])
        return ids
