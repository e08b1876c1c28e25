"""Files by path or URL (`s3://bucket/items.parquet`) through fsspec: finding, opening, and atomic writing."""

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
# Folder of a partition (rows with one value of a column), and how Hive spells null.
_PARTITION, _NULL = re.compile(r"([^/=]+)=([^/]*)"), "__HIVE_DEFAULT_PARTITION__"


def absolute(path: str | Path) -> str:
    """Absolute path or URL, valid in any process."""
    fs, name = locate(str(path))
    return name if is_local(fs) else fs.unstrip_protocol(name)


def find(pattern: str | Path) -> list[str]:
    """The files that a path, URL or pattern such as 'items/*.parquet' names, sorted; a folder stands for its parts (see
    `table_files`). Without a match, the pattern itself."""
    fs, name = locate(as_url(pattern) or str(pattern))
    matched = [name] if fs.exists(name) else [path for path in sorted(fs.glob(name)) if not _is_hidden(path)]
    files = [part for path in matched for part in table_files(fs, path)] or [name]
    return files if is_local(fs) else [fs.unstrip_protocol(file) for file in files]


def find_all(inputs: str | Path | Sequence[str | Path]) -> list[str]:
    """The files of one or several paths, URLs or patterns (see `find`), each once."""
    paths = [inputs] if isinstance(inputs, str | Path) else inputs
    return list(dict.fromkeys(file for path in paths for file in find(path)))


def table_files(fs: AbstractFileSystem, path: str) -> list[str]:
    """The files of a table: the file itself, or the parts in a folder and its partitions (`day=1`), as Spark writes it.

    Names that begin with `_` or a dot are ignored. Raises SemidError for a folder that has no files, has subfolders
    that are no partitions, or is an artifact.
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
    """Columns and values of a file's partition, read from its innermost folders (`day=1/shop=x/part-0.parquet`)."""
    values: dict[str, str | None] = {}
    for folder in reversed(PurePath(path).parts[:-1]):
        if (partition := _PARTITION.fullmatch(folder)) is None:
            break
        values[unquote(partition[1])] = None if partition[2] == _NULL else unquote(partition[2])
    return values


def is_local(fs: AbstractFileSystem) -> bool:
    """Tell whether `fs` is the local file system."""
    return type(fs) is LocalFileSystem


def is_same(path: str, other: str) -> bool:
    """Tell whether two paths name the same file; links and `..` are resolved if both are local."""
    (fs, name), (other_fs, other_name) = locate(path), locate(other)
    local = is_local(fs) and is_local(other_fs)
    return os.path.realpath(name) == os.path.realpath(other_name) if local else path == other


def exists(path: str) -> bool:
    """Tell whether the file exists."""
    fs, name = locate(path)
    return fs.exists(name)


def names_in(folder: str) -> set[str]:
    """Names of the files in a folder; empty if the folder does not exist."""
    fs, path = locate(folder)
    fs.invalidate_cache()
    return {posixpath.basename(name) for name in fs.find(path, maxdepth=1)}


def version(path: str) -> list[str]:
    """Version of a file: its size and, if the file system knows it, its modification time."""
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
    """Open a Parquet file to be read in small batches, as a row group may be larger than memory.

    Raises SemidError if it is missing or not Parquet, and OSError for failures that may be temporary.
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
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:  # the latter is raised for column names
        raise SemidError(f"{path}: not a readable Parquet file ({error})") from None


@contextlib.contextmanager
def replacing(path: str) -> Iterator[tuple[AbstractFileSystem, str]]:
    """Yield a unique temporary name, renamed to `path` at the end and removed after an exception. Concurrent writers of
    the same file, possible after a network failure, do not interfere."""
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
    """Remove temporary files that killed writers of the files `names` left in a folder; call it once those exist."""
    fs, path = locate(folder)
    fs.invalidate_cache()
    for leftover in fs.glob(f"{glob.escape(path)}/.*{WRITING}*"):
        if posixpath.basename(leftover)[1:].rpartition(WRITING)[0] in names:
            fs.rm(leftover)
