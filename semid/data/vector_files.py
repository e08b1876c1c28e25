"""Tables of items: the vectors that a tokenizer reads, given or made of raw columns, and their rows, block by block."""

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
    """Rows of one file: the first row's number, ids, and vectors of all columns side by side, float16 or float32."""

    file: VectorFile
    first: int
    item_ids: pa.Array
    vectors: Float[np.ndarray, "n dim"]


def output_name(path: str) -> str:
    """Name of a Parquet file that is made of a table's file: its own, or with the suffix of Parquet; that of a part of
    partitions begins with theirs."""
    folders = path.split("/")[-1 - len(storage.partitions(path)) : -1]
    name = "-".join([*folders, posixpath.basename(path)])
    return f"{name.removesuffix(suffix)}.parquet" if (suffix := _text_suffix(name)) else name


def _text_suffix(path: str) -> str:
    """Suffix of a CSV, TSV or JSONL file, compressed or not; empty: it is Parquet."""
    plain = [suffix for kind in ("csv", "jsonl") for suffix in SUFFIXES[kind]]
    suffixes = [*plain, *(suffix + end for suffix in plain for end in COMPRESSED)]
    return next((path[-len(suffix) :] for suffix in suffixes if path.lower().endswith(suffix)), "")


class TableFile(NamedTuple):
    """A table in memory, read as a Parquet file is, by its own names of columns or those that they have in semid."""

    table: pa.Table
    stored: Sequence[str]
    """Its own names of the columns."""

    @classmethod
    def named(cls, table: pa.Table, names: Mapping[str, str]) -> TableFile:
        """With the names that columns have in semid; `names` says which others they may have."""
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
    """A Parquet file whose columns may have other names; the values of its partitions are columns of strings."""

    file: pq.ParquetFile
    partitions: Mapping[str, str | None]
    names: Mapping[str, str]
    """Names that columns may have in the file, by their own."""

    @property
    def stored(self) -> Sequence[str]:
        """The file's own names of the columns."""
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
        """Columns by all names that they may have; those that are not there are not read."""
        return [*columns, *(self.names[name] for name in columns if name in self.names)]


@dataclass(frozen=True)
class VectorFile:
    """A file or table of items, and how wide each of its vector columns is, given or made by an encoder."""

    path: str
    """Name in messages, of a file also its path or URL."""
    id_column: str | None
    widths: dict[str, int]
    encoders: Mapping[str, ContentEncoder] = field(default_factory=dict)
    """Encoders of the columns that are made."""
    table: TableFile | None = None
    """A table in memory, and the content of CSV and JSONL files, which are read whole."""
    unused: tuple[str, ...] = ()
    """Columns that nothing reads."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names that columns may have in the file, by their own."""

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
        """Open a Parquet file, or one that `read_table` knows. `columns` are the vectors to read, `dim` dimensions in
        all; none given: the only ones. Those that the file lacks `encoders` make of its raw columns. Columns may have
        the names of the dataset's own tables, as `names` say (`{"item_id": "asin"}`).

        With `others`, all further vectors are read too: columns that hold them, where the type has no width as wide as
        the first row's, and what encoders can make.

        Raises SemidError naming the column that is missing or no list of numbers, several of which none is known to be
        the tokenizer's, and widths that do not add up to `dim`.
        """
        encoders, names, table = encoders or {}, names or {}, None
        if _text_suffix(path):
            inputs = [name for encoder in encoders.values() for name in encoder.inputs]
            strings = [id_column, *inputs]
            content = read_table(path, strings=(*strings, *(names[name] for name in strings if name in names)))
            table = TableFile.named(with_partitions(content, storage.partitions(path)), names)
        return cls(path, id_column, {}, {}, table, names=names)._resolved(dim, columns, encoders, others=others)

    @classmethod
    def of_table(
        cls,
        table: pa.Table,
        *,
        dim: int,
        columns: Sequence[str],
        encoders: Mapping[str, ContentEncoder],
        names: Mapping[str, str],
    ) -> VectorFile:
        """A table in memory, whose ids are not read; see `open`."""
        content = TableFile.named(table, names)
        return cls("items", None, {}, {}, content, names=names)._resolved(dim, columns, encoders, others=False)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[TableFile | PartFile]:
        """The content, to be read piece by piece."""
        if self.table is not None:
            yield self.table
            return
        with storage.open_parquet(self.path) as file:
            yield PartFile(file, storage.partitions(self.path), self.names)

    def _resolved(
        self, dim: int, columns: Sequence[str], encoders: Mapping[str, ContentEncoder], *, others: bool
    ) -> VectorFile:
        """With the widths of the columns to read, and the encoders of those that are made."""
        with self._opened() as source:
            schema = source.schema_arrow
            for name, count in Counter(schema.names).items():
                if count > 1:
                    raise SemidError(f"{self.path}: column {name!r} occurs more than once; rename or drop one")
            wanted = list(columns) or self._only_vectors(schema)
            made = {name: encoder for name, encoder in encoders.items() if name not in schema.names}
            self._check_columns(source, wanted, made)
            widths = self._widths(schema, wanted, made, dim)
            if others:
                widths |= self._other_widths(source, widths)
                widths |= {name: one.width for name, one in made.items() if set(one.inputs) <= set(schema.names)}
        used = {name: made[name] for name in widths if name in made}
        read = {self.id_column, *widths, *(name for encoder in used.values() for name in encoder.inputs)}
        unused = tuple(theirs for name, theirs in zip(schema.names, source.stored, strict=True) if name not in read)
        return replace(self, widths=widths, encoders=used, unused=unused)

    def _only_vectors(self, schema: pa.Schema) -> list[str]:
        """The column of vectors, if there is one."""
        lists = [field for field in schema if is_vector(field.type)]
        found = [field.name for field in lists if pa.types.is_floating(field.type.value_type)]
        found = found or [field.name for field in lists]
        if len(found) > 1:  # their order would be a guess, and wrong codes look like any others
            raise SemidError(
                f"{self.path}: has vector columns {', '.join(found)}, and the tokenizer does not say which it was "
                "fitted to; name them as columns (--columns), in the order of its dataset"
            )
        return found

    def _check_columns(
        self, source: TableFile | PartFile, wanted: Sequence[str], made: Mapping[str, ContentEncoder]
    ) -> None:
        """Raise SemidError for a column that is missing, and for one that holds no vectors."""
        schema, found = source.schema_arrow, f"is missing; found {', '.join(source.stored)}"
        if self.id_column is not None and self.id_column not in schema.names:
            raise SemidError(
                f"{self.path}: column {self._named(self.id_column)} {found}; name that of the ids (--id-column)"
            )
        for name in (one for one in wanted if one not in made):
            if name not in schema.names:
                raise SemidError(f"{self.path}: column {self._named(name)} {found}; add or rename one")
        for name in wanted:
            for raw in made[name].inputs if name in made else ():
                if raw not in schema.names:
                    raise SemidError(
                        f"{self.path}: column {self._named(raw)}, of which {name!r} is made, {found}; add it"
                    )
            if name not in made and not is_vector(kind := schema.field(name).type):
                raise SemidError(f"{self.path}: column {name!r}: expected lists of numbers, got {kind}")

    def _named(self, column: str) -> str:
        """A column's name, and the other that it may have."""
        return f"{column!r}" + (f" (or {self.names[column]!r})" if column in self.names else "")

    def _widths(
        self, schema: pa.Schema, wanted: Sequence[str], made: Mapping[str, ContentEncoder], dim: int
    ) -> dict[str, int]:
        """Widths of the columns that the tokenizer reads; one that the schema leaves open is what is left of `dim`."""
        fixed = {name: made[name].width for name in wanted if name in made}
        given = [schema.field(name) for name in wanted if name not in made]
        fixed |= {field.name: field.type.list_size for field in given if pa.types.is_fixed_size_list(field.type)}
        free = [field.name for field in given if field.name not in fixed]
        if len(free) > 1:
            raise SemidError(f"{self.path}: columns {free} have no fixed width; write them as fixed-size lists")
        widths = {name: fixed.get(name, dim - sum(fixed.values())) for name in wanted}
        if sum(widths.values()) != dim or min(widths.values(), default=0) < 1:
            shown = ", ".join(f"{name}: {width}" for name, width in fixed.items()) or "none"
            raise SemidError(
                f"{self.path}: expected vector columns of {dim} dimensions in all, got {shown}; choose columns"
            )
        return widths

    def _other_widths(self, source: TableFile | PartFile, read: Container[str]) -> dict[str, int]:
        """Widths of the vector columns that are not `read` yet; where the type has none, that of the first row counts.

        Raises SemidError where the first row has none.
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
        """The file in blocks of at most `rows`; one empty block of an empty file."""
        first, raw = 0, [name for encoder in self.encoders.values() for name in encoder.inputs]
        given = [name for name in self.widths if name not in self.encoders]
        ids = [] if self.id_column is None else [self.id_column]
        unknown = dict.fromkeys(self.encoders, 0)
        with self._opened() as file:
            for batch in file.iter_batches(rows, columns=list(dict.fromkeys([*ids, *given, *raw]))):
                made = {name: self._made(name, batch) for name in self.encoders}
                vectors = [
                    made[name] if name in made else self._vectors(batch.column(name), name, first)
                    for name in self.widths
                ]
                joined = vectors[0] if len(vectors) == 1 else np.concatenate(vectors, axis=1)
                yield Block(self, first, self._ids(batch, first), joined)
                first += len(batch)
                for name, values in made.items():
                    unknown[name] += int((~values.any(axis=1)).sum())
        if not first:
            empty = np.zeros((0, sum(self.widths.values())), np.float32)
            yield Block(self, 0, pa.array([], pa.string()), empty)
        for name, count in unknown.items():
            if count:
                self._warn(name, count, first)

    def request(self, tokenizer: str) -> str:
        """Hash of all that the output depends on: the tokenizer's digest, the columns, and the file's version."""
        name = posixpath.basename(self.path)
        return sha256_json([tokenizer, self.id_column, list(self.widths.items()), name, *storage.version(self.path)])

    def at(self, column: str | None, row: int) -> str:
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

    def _made(self, name: str, batch: pa.RecordBatch) -> Float[np.ndarray, "n width"]:
        """Vectors of raw columns."""
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
