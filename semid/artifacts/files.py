"""Atomic files (written under a hidden name next to them and renamed), JSON, tensors and digests."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import functools
import glob
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from semid.artifacts import remote
from semid.artifacts.locks import locked
from semid.artifacts.processes import has_ended, in_use
from semid.errors import SemidError


class Rename(enum.IntEnum):
    """Flags of Linux' renameat2."""

    NO_REPLACE = 1
    EXCHANGE = 2


_AT_FDCWD = -100
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`, renamed to it at the end: readers see the old file or the new one.

    It is removed after an exception, and by the next call if the process was killed. A nested call for the temporary
    name of another call yields that name itself.
    """
    if path.name.endswith(f".{_writing()}"):
        yield path
        return
    with _temporary_file(path) as temporary:
        yield temporary
        if remote.is_output(path):
            remote.upload(temporary, path)
        os.replace(temporary, path)


@contextlib.contextmanager
def write_once(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; on success the file is renamed to `path` and flushed to the disk.

    Raises FileExistsError if `path` exists, even if another process has just made it. The temporary file is removed
    after an exception, and by the next call if the process was killed.
    """
    with _temporary_file(path) as temporary:
        yield temporary
        flush(temporary)
        if remote.is_output(path):
            remote.write_object(path, temporary.read_bytes(), exclusive=True)
        _publish_once(temporary, path)
    flush(path.parent)


def _publish_once(temporary: Path, path: Path) -> None:
    """Rename a file unless the target exists, which `os.replace` would overwrite."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        # No hard links: exFAT, many network file systems.
        if rename(temporary, path, Rename.NO_REPLACE):
            return
        with locked(path.with_name(f".{path.name}.lock"), path):
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            os.replace(temporary, path)


def rename(source: Path, target: Path, how: Rename) -> bool:
    """Rename atomically; False if the system or the file system does not support this kind of rename."""
    call = getattr(_libc(), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), int(how)) == 0:
        return True
    if (code := ctypes.get_errno()) in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises SemidError naming the file if it is missing or not JSON."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise SemidError(f"{path}: no such file") from None
    except OSError as error:
        raise SemidError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json(text, where=path)


def parse_json(text: str | bytes, *, where: str | Path) -> Any:
    """Parse JSON in UTF-8. Raises SemidError naming `where`, also for too deep nesting or too long numbers."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SemidError(f"{where}: not valid JSON ({error})") from None


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own digest, under the key `sha256`."""
    return {**content, "sha256": sha256_json(json.loads(json.dumps(content)))}


def read_sealed(path: Path) -> Any:
    """Read a JSON file, and verify and drop its digest (see `sealed`), if it has one.

    Raises SemidError naming the file if it is absent, not JSON, or not what its digest says.
    """
    return unsealed(read_json(path), where=path)


def unsealed(value: Any, *, where: Path) -> Any:
    """A JSON value without the digest of `sealed`, if it has one. Raises SemidError if the digest does not match."""
    if isinstance(value, dict) and "sha256" in value and value.pop("sha256") != sha256_json(value):
        raise SemidError(f"{where}: content does not match its own digest (edited by hand?); write it again")
    return value


def save_tensors(path: Path, tensors: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write named arrays (of numpy or a device) atomically as one safetensors file, with `metadata` in its header.

    Raises SemidError naming the file if it cannot be written.
    """
    arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(arrays, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # raised also for a full disk
            raise SemidError(f"{path}: cannot be written ({error})") from None
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # the library makes files that other users cannot read


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file. Raises SemidError naming the file if it is missing or damaged."""
    with _readable_tensors(path):
        return load_file(path)


def check_finite(
    tensors: Mapping[str, np.ndarray], *, where: str | Path, may_be_infinite: Collection[str] = ()
) -> None:
    """Raise SemidError naming `where` and the first tensor with NaN, or with infinity unless it is allowed there."""
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all() and (name not in may_be_infinite or np.isnan(tensor).any()):
            raise SemidError(f"{where}: tensor {name!r} holds values that are not finite; train or export it again")


def load_metadata(path: Path) -> dict[str, str]:
    """Read the `metadata` of a safetensors file, as `save_tensors` wrote it.

    Raises SemidError naming the file if it is absent or damaged.
    """
    with _readable_tensors(path), safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _readable_tensors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise SemidError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise SemidError(f"{path}: not a readable safetensors file ({error})") from None


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, cached in the process until the file changes."""
    status = path.stat()
    return _sha256(path.resolve(), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=1 << 14)
def _sha256(path: Path, *identity: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def temporary_file(path: Path) -> Path:
    """Temporary name next to `path` under which this thread writes it."""
    return path.with_name(f".{path.name}.{_writing()}")


def _writing() -> str:
    """Suffix of this thread's temporary names."""
    return in_use(f"writing.{threading.get_ident()}")


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """Yield `temporary_file`; remove it at the end, and first those that killed processes left."""
    temporary = temporary_file(path)
    remove_dead(path.parent, f"{path.name}.writing.@")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def remove_dead(folder: Path, name: str) -> None:
    """Remove files that killed processes of this host left under a hidden name; @ in `name` stands for the thread."""
    pattern = glob.escape(f".{in_use(name, '')}").replace("@", "*")
    for leftover in folder.glob(f"{pattern}*"):
        if has_ended(leftover):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
