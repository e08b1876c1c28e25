"""Places that are URLs (`gs://bucket/run`, through fsspec): each has a copy in the user's cache, which all else reads
and writes as the folder or file that it is.

The copy of gs://bucket/run is `urls/gs/bucket/run` below `$XDG_CACHE_HOME/semid` (or `~/.cache/semid`). `fetched`
brings it up to what the URL holds, downloading what changed; writers bring what is finished to the URL. The URL is the
truth: a copy may be deleted at any time.
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
_MADE_OF_PATH = re.compile(r"([a-z][a-z0-9+.-]*):/(?=[^/])")  # pathlib makes one slash of two
_LOCAL = ("file", "local")
# Stands for the empty host of URLs such as hdfs:///run in the path of a copy.
_NO_HOST = "_"
# An object that stands in a folder for as long as it is written.
_WRITING = ".writing-url"
# Bytes of all copies, and the folder that has a file for each process that reads some.
LIMIT, _USERS = 32 << 30, ".users"
# The folder of files that are being downloaded.
_ARRIVING = ".arriving"


def locate(path: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and its name there. Raises SemidError for one that is not known here."""
    try:
        return url_to_fs(path)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
        raise SemidError(f"{path}: {error}") from None


def place(path: str | Path) -> Path:
    """A path, `~` being the user's home, or where the copy of a URL stands, fetched or not.

    Raises SemidError for an unknown protocol, and for the home of a user whom there is not.
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
    """The URL that a string or path names; None for a path here."""
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
    """The URL that a path is the copy of; None for all others."""
    if not path.is_relative_to(_copies()):
        return None
    scheme, *parts = path.relative_to(_copies()).parts or ("",)
    return f"{scheme}://{'/'.join(['', *parts[1:]] if parts[:1] == [_NO_HOST] else parts)}" if parts else None


def shown(text: str) -> str:
    """A message with URLs in place of the paths of their copies."""
    found = re.compile(rf"{re.escape(str(_copies()))}/([^/\s]+)/(?:({_NO_HOST})(?=/))?")
    return found.sub(lambda copy: f"{copy[1]}://", text)


def fetched(path: str | Path) -> Path:
    """A path (see `place`), or the copy of a URL, which holds what the URL does now.

    Only what changed is downloaded; for nothing there is no copy. Raises SemidError where the URL cannot be read.
    """
    here = place(path)
    if as_url(path) is not None:
        refresh(here)
    return here


def refresh(path: Path) -> None:
    """Bring a copy of a URL up to what the URL holds; any other path stays as it is."""
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
    """Remove copies, those first that were not read for longest, until all take no more than `LIMIT` bytes (none, with
    SEMID_CACHE=off). Copies that a process may be reading stay, and what goes with unfinished work."""
    for leftover in (_copies() / _ARRIVING).glob(f"*{in_use('arriving', '')}*"):
        if has_ended(leftover):
            leftover.unlink(missing_ok=True)
    remove_oldest(_copies(), limit=0 if is_off() else LIMIT, before=_first_use(), spared=_goes_with_work)


def _say_in_use() -> None:
    """Name this process among those that read copies; the file's time is that of its first reading."""
    marker = _copies() / _USERS / in_use("reading")
    if not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        atexit.register(marker.unlink, missing_ok=True)


def _first_use() -> float:
    """Time of the first reading of any process that has not ended."""
    times = [math.inf]
    for marker in (_copies() / _USERS).glob("*"):
        with contextlib.suppress(FileNotFoundError):
            marker.unlink() if has_ended(marker) else times.append(marker.stat().st_mtime)
    return min(times)


def _files(fs: AbstractFileSystem, root: str) -> dict[str, dict[str, Any]]:
    """Facts that a file system has of the files below a folder, by their names there; of a file, with an empty name."""
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
    """Files that a reader sees: none of a folder that is being written or was left so, nor of what goes with work."""
    unfinished = {posixpath.dirname(name) for name in files if posixpath.basename(name) == _WRITING}
    seen = (name for name in files if not _goes_with_work(name) and unfinished.isdisjoint(_folders(name)))
    return {name: files[name] for name in seen}


def _folders(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(len(parts))]


def _goes_with_work(name: str) -> bool:
    """Tell whether a name, or one above it, is that of locks, attempts and checkpoints."""
    return any(part.startswith(".") or part.endswith(".checkpoints") for part in name.split("/"))


def _checked(url: str, parts: list[str]) -> list[str]:
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise SemidError(f"{url}: has a name that no file can have; give its folder without '..'")
    return parts


def _checked_name(url: str, name: str) -> str:
    return "/".join(_checked(f"{url}/{name}", name.split("/"))) if name else name


def _prune(path: Path, names: Collection[str]) -> None:
    """Remove files of a copy that its URL does not have; what goes with work here stays."""
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
    """Download a file unless the copy is of it: its time of change stands for what is known of the file there."""
    stamp = int(hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:7], 16)
    with contextlib.suppress(OSError):
        found = path.lstat()
        if (found.st_size, found.st_mtime_ns) == (facts["size"], stamp * 10**9):
            os.utime(path, (time.time(), stamp))  # it is in use
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
    """Raise SemidError where `path` is the copy of a URL that cannot be written: a small object is, and removed."""
    if url := url_of(path):
        with _naming(url, "written"):
            fs, name = locate(url)
            folder, _, file = name.rpartition("/")
            trial = f"{folder}/.{file}.trying-{os.getpid()}"
            _put(fs, b"semid", trial)
            fs.rm_file(trial)


def upload(source: Path, path: Path, *, last: str = "") -> None:
    """Bring a file or folder to the URL that `path` is the copy of, in place of what is there; none for other paths.

    Of a folder the file `last` comes last, and an object says until then that it is unfinished, so that readers find
    it whole or not at all. Raises SemidError where the URL cannot be written.
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
    """Write the object of the URL that `path` is the copy of; none for other paths.

    `exclusive`: raise FileExistsError where there is one. Stores without such writes may miss one of the same moment.
    """
    if url := url_of(path):
        with _naming(url, "written"):
            fs, name = locate(url)
            fs.invalidate_cache()
            _put(fs, content, name, mode="create" if exclusive else "overwrite")


def read_object(path: Path) -> bytes:
    """Content of the object of the URL that `path` is the copy of; none if there is no such."""
    url = url_of(path)
    if url is None:
        return b""
    with _naming(url, "read"), contextlib.suppress(FileNotFoundError):
        fs, name = locate(url)
        return bytes(fs.cat_file(name))
    return b""


def remove(path: Path) -> None:
    """Remove a file or folder, and where it is the copy of a URL what that names."""
    if url := url_of(path):
        with _naming(url, "removed"), contextlib.suppress(FileNotFoundError):
            fs, name = locate(url)
            fs.invalidate_cache()
            fs.rm(name, recursive=True)
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def is_output(path: Path) -> bool:
    """Tell whether what is written at a path goes to a URL: it is the copy of one, and no part of unfinished work."""
    return path.is_relative_to(_copies()) and not any(part[0] == "." for part in path.relative_to(_copies()).parts)


def local_only(path: str | Path, why: str) -> Path:
    """A path here, as `place` gives it. Raises SemidError for a URL, saying `why` it cannot be one."""
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
    """One line of whatever a store raises: each has errors of its own."""
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
