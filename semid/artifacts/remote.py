"""URLs (`gs://bucket/run`, through fsspec) as local paths: each has a copy in the user's cache, which all other code
reads and writes like any folder or file.

The copy of gs://bucket/run is `urls/gs/bucket/run` below `$XDG_CACHE_HOME/semid` (or `~/.cache/semid`). `fetched`
updates it from the URL, downloading what changed; writers upload finished files. The copy may be deleted at any time.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import math
import os
import posixpath
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from semid.artifacts.processes import has_ended, in_use
from semid.caches import is_off, remove_oldest, user_cache
from semid.errors import SemidError

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_MADE_OF_PATH = re.compile(r"([a-z][a-z0-9+.-]*):/(?=[^/])")  # pathlib reduces two slashes to one
_LOCAL = ("file", "local")
# Replaces the empty host of URLs such as hdfs:///run in the path of a copy.
_NO_HOST = "_"
# Object that marks a folder while it is being written.
_WRITING = ".writing-url"
# Maximum bytes of all copies, and the folder with a file for each process that reads copies.
LIMIT, _USERS = 32 << 30, ".users"
# Folder of files that are being downloaded.
_ARRIVING = ".arriving"


def locate(path: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and its name there. Raises SemidError for an unknown protocol."""
    try:
        return url_to_fs(path)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
        raise SemidError(f"{path}: {error}") from None


def place(path: str | Path) -> Path:
    """A local path with `~` expanded, or the path of a URL's copy, whether fetched or not.

    Raises SemidError for an unknown protocol, and for the home of an unknown user.
    """
    url = as_url(path)
    if url is None:
        found = _URL.fullmatch(str(path))
        here = os.path.expanduser(path if found is None else found[2])
        if str(here).startswith("~"):
            raise SemidError(f"{str(path)!r}: there is no such home; name the folder, or begin with ./")
        return Path(here)
    scheme, rest = url.split("://", 1)
    with _naming(url, "opened"):
        locate(url)
    host, *parts = rest.rstrip("/").split("/")
    return _copies().joinpath(scheme, host or _NO_HOST, *_checked(url, [part for part in parts if part]))


def as_url(path: str | Path) -> str | None:
    """The URL that a string or path names; None for a local path."""
    text = str(path)
    if (slash := _MADE_OF_PATH.match(text)) and slash[1] in fsspec.available_protocols():
        text = f"{slash[1]}://{text[slash.end() :]}"
    found = _URL.fullmatch(text)
    return text if found and found[1] not in _LOCAL else None


def _copies() -> Path:
    return _resolved(user_cache("urls"))


@functools.cache
def _resolved(path: Path) -> Path:
    return path.resolve()


def url_of(path: Path) -> str | None:
    """The URL of which a path is the copy; None for other paths."""
    if not path.is_relative_to(_copies()):
        return None
    scheme, *parts = path.relative_to(_copies()).parts or ("",)
    return f"{scheme}://{'/'.join(['', *parts[1:]] if parts[:1] == [_NO_HOST] else parts)}" if parts else None


def shown(text: str) -> str:
    """A message with the paths of copies replaced by their URLs."""
    found = re.compile(rf"{re.escape(str(_copies()))}/([^/\s]+)/(?:({_NO_HOST})(?=/))?")
    return found.sub(lambda copy: f"{copy[1]}://", text)


def fetched(path: str | Path) -> Path:
    """A local path (see `place`), or the updated copy of a URL.

    Only changed files are downloaded; if nothing exists at the URL, there is no copy. Raises SemidError if the URL
    cannot be read.
    """
    here = place(path)
    if as_url(path) is not None:
        refresh(here)
    return here


def refresh(path: Path) -> None:
    """Update the copy of a URL; any other path is unchanged."""
    url = url_of(path)
    if url is None:
        return
    with _naming(url, "read"):
        fs, root = locate(url)
        fs.invalidate_cache()
        found = _finished({_checked_name(url, name): facts for name, facts in _files(fs, root).items()})
        _prune(path, found)
        _say_in_use()
        for name, facts in found.items():
            _download(fs, posixpath.join(root, name) if name else root, path / name, facts)
        make_room()


def make_room() -> None:
    """Remove the least recently read copies until all take at most `LIMIT` bytes (0 with SEMID_CACHE=off). Copies that
    a process may be reading stay, and so do files of unfinished work."""
    for leftover in (_copies() / _ARRIVING).glob(f"*{in_use('arriving', '')}*"):
        if has_ended(leftover):
            leftover.unlink(missing_ok=True)
    remove_oldest(_copies(), limit=0 if is_off() else LIMIT, before=_first_use(), spared=_goes_with_work)


def _say_in_use() -> None:
    """Register this process as a reader of copies; the time of its file is that of its first read."""
    marker = _copies() / _USERS / in_use("reading")
    if not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        atexit.register(marker.unlink, missing_ok=True)


def _first_use() -> float:
    """Earliest first read of a registered process that is still running."""
    times = [math.inf]
    for marker in (_copies() / _USERS).glob("*"):
        with contextlib.suppress(FileNotFoundError):
            marker.unlink() if has_ended(marker) else times.append(marker.stat().st_mtime)
    return min(times)


def _files(fs: AbstractFileSystem, root: str) -> dict[str, dict[str, Any]]:
    """File system information of the files below a folder, by relative name; for a file, under an empty name."""
    try:
        facts = fs.info(root)
    except FileNotFoundError:
        return {}
    if facts["type"] == "file":
        return {"": facts}
    found = fs.find(root, detail=True)
    above = root.rstrip("/") + "/"
    return {name.removeprefix(above): facts for name, facts in found.items() if name.startswith(above)}


def _finished(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Files for readers: without folders whose writing is unfinished, and without locks, attempts and checkpoints."""
    unfinished = {posixpath.dirname(name) for name in files if posixpath.basename(name) == _WRITING}
    seen = (name for name in files if not _goes_with_work(name) and unfinished.isdisjoint(_folders(name)))
    return {name: files[name] for name in seen}


def _folders(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(len(parts))]


def _goes_with_work(name: str) -> bool:
    """Tell whether a name, or a folder in it, belongs to locks, attempts or checkpoints."""
    return any(part.startswith(".") or part.endswith(".checkpoints") for part in name.split("/"))


def _checked(url: str, parts: list[str]) -> list[str]:
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise SemidError(f"{url}: has a name that no file can have; give its folder without '..'")
    return parts


def _checked_name(url: str, name: str) -> str:
    return "/".join(_checked(f"{url}/{name}", name.split("/"))) if name else name


def _prune(path: Path, names: Collection[str]) -> None:
    """Remove files of a copy that its URL does not have, except locks, attempts and checkpoints."""
    if path.is_dir() and "" in names:
        shutil.rmtree(path)
    elif not path.is_dir():
        if "" not in names:
            path.unlink(missing_ok=True)
        return
    for below in sorted(path.rglob("*"), reverse=True):
        name = below.relative_to(path).as_posix()
        if _goes_with_work(name) or name in names:
            continue
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            below.rmdir() if below.is_dir() and not below.is_symlink() else below.unlink()
    if not names:
        with contextlib.suppress(OSError):
            path.rmdir()


def _download(fs: AbstractFileSystem, name: str, path: Path, facts: dict[str, Any]) -> None:
    """Download a file unless the copy is current: its modification time encodes a hash of the remote file's facts."""
    stamp = int(hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:7], 16)
    with contextlib.suppress(OSError):
        found = path.lstat()
        if (found.st_size, found.st_mtime_ns) == (facts["size"], stamp * 10**9):
            os.utime(path, (time.time(), stamp))  # mark it as recently read
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    arriving = _copies() / _ARRIVING
    arriving.mkdir(exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=arriving, suffix=in_use("arriving"))
    os.close(descriptor)
    try:
        fs.get_file(name, temporary)
        os.utime(temporary, (time.time(), stamp))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def try_url(path: Path) -> None:
    """Raise SemidError if `path` is the copy of a URL that cannot be written, by writing and removing an object."""
    if url := url_of(path):
        with _naming(url, "written"):
            fs, name = locate(url)
            folder, _, file = name.rpartition("/")
            trial = f"{folder}/.{file}.trying-{os.getpid()}"
            _put(fs, b"semid", trial)
            fs.rm_file(trial)


def upload(source: Path, path: Path, *, last: str = "") -> None:
    """Upload a file or folder to the URL of which `path` is the copy, replacing what is there; no-op for other paths.

    The file `last` of a folder is uploaded last, and until then an object marks the folder as unfinished, so that
    readers find it complete or not at all. Raises SemidError if the URL cannot be written.
    """
    url = url_of(path)
    if url is None:
        return
    with _naming(url, "written"):
        fs, root = locate(url)
        if source.is_file():
            _put(fs, source, root)
            return
        fs.invalidate_cache()
        names = [file.relative_to(source).as_posix() for file in sorted(source.rglob("*")) if file.is_file()]
        before = _files(fs, root)
        _put(fs, b"", f"{root}/{_WRITING}")
        for name in sorted(names, key=lambda name: name == last):
            _put(fs, source / name, f"{root}/{name}")
        for name in before.keys() - {*names, _WRITING}:
            fs.rm_file(f"{root}/{name}")
        fs.rm_file(f"{root}/{_WRITING}")


def write_object(path: Path, content: bytes, *, exclusive: bool = False) -> None:
    """Write the object at the URL of which `path` is the copy; no-op for other paths.

    `exclusive`: raise FileExistsError if it exists. Stores without exclusive writes may miss a simultaneous one.
    """
    if url := url_of(path):
        with _naming(url, "written"):
            fs, name = locate(url)
            fs.invalidate_cache()
            _put(fs, content, name, mode="create" if exclusive else "overwrite")


def read_object(path: Path) -> bytes:
    """Content of the object at the URL of which `path` is the copy; empty if there is none."""
    url = url_of(path)
    if url is None:
        return b""
    with _naming(url, "read"), contextlib.suppress(FileNotFoundError):
        fs, name = locate(url)
        return bytes(fs.cat_file(name))
    return b""


def remove(path: Path) -> None:
    """Remove a file or folder and, if it is the copy of a URL, what is there."""
    if url := url_of(path):
        with _naming(url, "removed"), contextlib.suppress(FileNotFoundError):
            fs, name = locate(url)
            fs.invalidate_cache()
            fs.rm(name, recursive=True)
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def is_output(path: Path) -> bool:
    """Tell whether a path is uploaded: the copy of a URL, and no temporary file."""
    return path.is_relative_to(_copies()) and not any(part[0] == "." for part in path.relative_to(_copies()).parts)


def local_only(path: str | Path, why: str) -> Path:
    """A local path (see `place`). Raises SemidError for a URL, with the reason `why`."""
    if url := as_url(path) or url_of(Path(path)):
        raise SemidError(f"{url}: {why}, and needs a folder of this machine; give one")
    return place(path)


def _put(fs: AbstractFileSystem, content: Path | bytes, name: str, mode: str = "overwrite") -> None:
    fs.makedirs(posixpath.dirname(name), exist_ok=True)
    if isinstance(content, bytes):
        fs.pipe_file(name, content, mode=mode)
    else:
        fs.put_file(str(content), name)


@contextlib.contextmanager
def _naming(url: str, done: str) -> Iterator[None]:
    """Convert any exception of a store to one line, as each store has its own exceptions."""
    try:
        yield
    except (SemidError, FileExistsError):
        raise
    except Exception as error:
        raise SemidError(
            f"{url}: cannot be {done} ({first_line(error)}); check the URL and your rights to it"
        ) from None


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its name."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
