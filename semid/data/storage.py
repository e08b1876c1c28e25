"""Files by path or URL (`s3://bucket/items.parquet`), through fsspec: found, opened, written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import posixpath
import re
import uuid
from collections.abc import Container, Iterator, Sequence
from pathlib import Path, PurePath
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from semid.artifacts import MANIFEST, as_url
from semid.artifacts.remote import locate as locate
from semid.errors import SemidError

_READ_BUFFER = 1 << 20
WRITING = ".writing-"
# A folder of the rows with one value of a column, and how Hive spells null.
_PARTITION, _NULL = re.compile(r"([^/=]+)=([^/]*)"), "__HIVE_DEFAULT_PARTITION__"


def absolute(path: str | Path) -> str:
    """Absolute path or URL, which means the same to another process."""
    fs, name = locate(str(path))
    return name if is_local(fs) else fs.unstrip_protocol(name)


def find(pattern: str | Path) -> list[str]:
    """The files of a path, URL or pattern such as 'items/*.parquet', in order of name, and of folders their parts (see
    `table_files`); the pattern itself where it finds none."""
    fs, name = locate(as_url(pattern) or str(pattern))
    matched = [name] if fs.exists(name) else [path for path in sorted(fs.glob(name)) if not _is_hidden(path)]
    found = [part for path in matched for part in table_files(fs, path)] or [name]
    return found if is_local(fs) else [fs.unstrip_protocol(one) for one in found]


def find_all(inputs: str | Path | Sequence[str | Path]) -> list[str]:
    """The files of one or several paths, URLs or patterns (see `find`)."""
    return [file for path in ([inputs] if isinstance(inputs, str | Path) else inputs) for file in find(path)]


def table_files(fs: AbstractFileSystem, path: str) -> list[str]:
    """The files of a table: itself, or the parts in a folder and in its partitions (`day=1`), as Spark writes them.

    Names that begin with `_` or a dot do not count. Raises SemidError for a folder that has none, has folders that are
    no partitions, or is an artifact.
    """
    if not fs.isdir(path):
        return [path]
    if fs.exists(f"{path}/{MANIFEST}"):
        raise SemidError(f"{path}: is an artifact of semid, not a table; load it, or name a file in it")
    if files := list(_parts(fs, path)):
        return files
    raise SemidError(f"{path}: has no files; expected a file, or a folder of parts")


def _parts(fs: AbstractFileSystem, folder: str) -> Iterator[str]:
    for entry in sorted(fs.ls(folder, detail=True), key=lambda entry: entry["name"]):
        path = entry["name"].rstrip("/")
        if _is_hidden(path):
            continue
        if not fs.isdir(path):
            yield path
        elif _PARTITION.fullmatch(posixpath.basename(path)):
            yield from _parts(fs, path)
        else:
            what = f"holds the folder {posixpath.basename(path)}, which is no partition such as day=1"
            raise SemidError(f"{folder}: {what}; expected a file, or a folder of parts")


def _is_hidden(path: str) -> bool:
    return posixpath.basename(path).startswith(("_", "."))


def partitions(path: str | PurePath) -> dict[str, str | None]:
    """Columns and their values that the innermost folders of a file name (`day=1/shop=x/part-0.parquet`)."""
    values: dict[str, str | None] = {}
    for folder in reversed(PurePath(path).parts[:-1]):
        if (found := _PARTITION.fullmatch(folder)) is None:
            break
        values[unquote(found[1])] = None if found[2] == _NULL else unquote(found[2])
    return values


def is_local(fs: AbstractFileSystem) -> bool:
    """Tell whether names there are those of the operating system."""
    return type(fs) is LocalFileSystem


def is_same(path: str, other: str) -> bool:
    """Tell whether two paths are one file's; links and `..` count where names are the operating system's."""
    (fs, name), (other_fs, other_name) = locate(path), locate(other)
    local = is_local(fs) and is_local(other_fs)
    return os.path.realpath(name) == os.path.realpath(other_name) if local else path == other


def exists(path: str) -> bool:
    """Tell whether there is such a file."""
    fs, name = locate(path)
    return fs.exists(name)


def names_in(folder: str) -> set[str]:
    """The names of a folder's files; none if there is no such folder."""
    fs, path = locate(folder)
    fs.invalidate_cache()
    return {posixpath.basename(name) for name in fs.find(path, maxdepth=1)}


def version(path: str) -> list[str]:
    """Version of a file: its size and, where the file system knows it, the time of writing."""
    fs, name = locate(path)
    try:
        written = str(fs.modified(name))
    except NotImplementedError:
        written = ""
    return [str(fs.size(name)), written]


def sha256(path: str) -> str:
    """Hex sha256 of a file's bytes."""
    fs, name = locate(path)
    with fs.open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_parquet(path: str) -> pq.ParquetFile:
    """A Parquet file that is read piece by piece: a row group may be larger than memory.

    Raises SemidError where there is none, and OSError where it may be that it cannot be read just now.
    """
    fs, name = locate(path)
    try:
        file = pq.ParquetFile(
            name, filesystem=fs, buffer_size=_READ_BUFFER, pre_buffer=False, page_checksum_verification=True
        )
        _ = file.schema_arrow.names
        return file
    except FileNotFoundError:
        raise SemidError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise SemidError(f"{path}: is a folder; name its files, such as {path}/*.parquet") from None
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:  # the latter for names of columns
        raise SemidError(f"{path}: not a readable Parquet file ({error})") from None


@contextlib.contextmanager
def replacing(path: str) -> Iterator[tuple[AbstractFileSystem, str]]:
    """A name of one's own to write to, which becomes `path` at the end: another writer of the same file, as there may
    be after a failure of the network, cannot meddle. Left without an exception or not at all."""
    fs, name = locate(path)
    folder, file = posixpath.split(name)
    temporary = f"{folder}/.{file}{WRITING}{uuid.uuid4().hex}"
    fs.makedirs(folder, exist_ok=True)
    try:
        yield fs, temporary
        fs.mv(temporary, name)
    finally:
        if fs.exists(temporary):
            fs.rm(temporary)


def remove_leftovers(folder: str, names: Container[str]) -> None:
    """Remove what killed writers of these files left in a folder; call it once the files stand."""
    fs, path = locate(folder)
    fs.invalidate_cache()
    for leftover in fs.glob(f"{glob.escape(path)}/.*{WRITING}*"):
        if posixpath.basename(leftover)[1:].rpartition(WRITING)[0] in names:
            fs.rm(leftover)
