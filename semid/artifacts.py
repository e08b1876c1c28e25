"""Artifacts: directories that are complete or absent, verified on load, and that say how they were made.

Every stage writes one: data in open formats with a `manifest.json` with schema version, resolved config, the
sha256 of every file, the digests of its parents, package versions, seed and devices.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from semid.config import difference
from semid.errors import SemidError


class Kind(enum.StrEnum):
    """Kinds of artifacts, as `manifest.json` names them."""

    DATASET = "dataset"
    CATALOG = "catalog"
    MODEL = "model"
    PROGRAM = "program"


SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# The page that says what a folder is, which its readers may edit: no code reads it, and no load verifies it.
PAGE = "README.md"
_PACKAGES = ("semid", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pyarrow")


@dataclass(frozen=True)
class Manifest:
    """Record of an artifact: `manifest.json`. `digest` names the content, `fingerprint` the request for it."""

    kind: str
    config: dict
    files: dict[str, str]
    parents: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    schema_version: int = SCHEMA_VERSION
    packages: dict[str, str] = field(default_factory=dict)
    devices: str = ""
    created: str = ""

    @property
    def digest(self) -> str:
        """sha256 over kind, config, parents, seed and every file's sha256: equal content, equal digest."""
        return sha256_json([self.fingerprint, self.files])

    @property
    def fingerprint(self) -> str:
        """sha256 over what determines the artifact: kind, schema version, config, parents and seed."""
        return sha256_json([self.kind, self.schema_version, self.config, self.parents, self.seed])


@dataclass(frozen=True)
class Origin:
    """Artifact that an object was loaded from, or written to."""

    folder: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """Digest of the artifact."""
        return self.manifest.digest

    def read(self, name: str) -> Any:
        """Read a JSON file of the artifact; None where it has none of that name."""
        return read_json(self.folder / name) if name in self.manifest.files else None

    def copy_file(self, name: str, into: Path) -> None:
        """Copy a file of the artifact into a folder.

        Raises SemidError if it is no longer what it was when the artifact was read.
        """
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(self.folder / name, into / name)
        except FileNotFoundError:
            raise SemidError(f"{self.folder / name}: gone since {self.folder} was loaded; load it again") from None
        if sha256(into / name) != self.manifest.files[name]:
            raise SemidError(f"{self.folder / name}: changed since {self.folder} was loaded; load it again")


@contextlib.contextmanager
def write_artifact(
    path: str | Path,
    *,
    kind: str,
    config: dict,
    parents: Mapping[str, str] | None = None,
    seed: int | None = None,
    devices: str = "",
) -> Iterator[Path]:
    """Yield a temporary directory next to `path`; on success seal it with a manifest and rename it to `path`.

    An artifact that already stands at `path` is replaced; anything else there is refused (see `check_output`).
    `parents` are digests of the artifacts that it is made from, by their roles.
    After an exception nothing is left behind; what a kill leaves, the next call of this or `is_current` undoes.
    """
    path = Path(path)
    wanted = _request(kind, config, parents, seed)
    _remove_leftovers(path)
    check_output(path, kind=kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / _temporary_name(path, "writing")
    temporary.mkdir()
    try:
        yield temporary
        files = {str(p.relative_to(temporary)): sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
        values = asdict(wanted) | {"files": files, "packages": _packages(), "devices": devices or platform.machine()}
        values |= {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(temporary / MANIFEST, values | {"digest": Manifest(**values).digest})
        if path.exists():  # the old one steps aside first: a rename cannot replace a full directory
            os.replace(path, path.parent / _temporary_name(path, "replaced"))
        os.replace(temporary, path)
    finally:
        _remove_leftovers(path)


def read_artifact(path: str | Path, kind: str, *others: str) -> Manifest:
    """Read the manifest of the artifact at `path`, of one of these kinds, every file but its `PAGE` verified.

    Raises SemidError for: no artifact, one of another kind or of a newer schema, a missing or changed file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.kind not in (kind, *others):
        raise SemidError(f"{path}: expected an artifact of kind {str(kind)!r}, found {manifest.kind!r}; check the path")
    for name, expected in manifest.files.items():
        if name == PAGE:
            continue
        if not (path / name).is_file():
            raise SemidError(f"{path / name}: listed in {MANIFEST} but missing; write the artifact again")
        if sha256(path / name) != expected:
            raise SemidError(f"{path / name}: content does not match its sha256 in {MANIFEST}; write it again")
    return manifest


def is_current(path: str | Path, *, kind: str, config: dict, parents: Mapping[str, str], seed: int | None) -> bool:
    """Tell whether `path` holds the artifact that this request would write, and print that the stage is skipped.

    Raises SemidError if it holds anything else, naming what differs: an output folder in use is never overwritten.
    """
    path = Path(path)
    _remove_leftovers(path)
    check_output(path, kind=kind)
    if not (path / MANIFEST).is_file():
        return False
    asked_for = [
        made.config | {"schema_version": made.schema_version, "seed": made.seed, "parents": made.parents}
        for made in (read_artifact(path, kind), _request(kind, config, parents, seed))
    ]
    if change := difference(*asked_for):
        raise SemidError(f"{path}: in use by a {kind} of other settings ({change}); choose another --out or delete it")
    print(f"{path}: this {kind} exists, made with the same settings and inputs; skipped")
    return True


def check_output(path: Path, *, kind: str) -> None:
    """Raise SemidError if something other than an artifact of this kind stands at `path`."""
    if above := next((p for p in path.absolute().parents if p.exists() and not p.is_dir()), None):
        raise SemidError(f"{above}: is a file, and {path} should go below it; choose another --out")
    if not path.exists():
        return
    if not path.is_dir() or ((not (path / MANIFEST).is_file()) and any(path.iterdir())):
        raise SemidError(f"{path}: output folder in use by something that is no {kind} artifact; choose another --out")
    if (path / MANIFEST).is_file() and (found := read_manifest(path).kind) != kind:
        raise SemidError(f"{path}: output folder in use by a {found} artifact; choose another --out for this {kind}")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`, which is renamed to it at the end: a reader sees the old file or the new.

    After an exception nothing is left behind; what a kill leaves, the next call undoes.
    """
    with _temporary_file(path) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def write_once(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; on success what was written there stands, on the disk, at `path`.

    Raises FileExistsError where something stands there already, also where another process came first. After an
    exception nothing is left behind; what a kill leaves, the next call undoes.
    """
    with _temporary_file(path) as temporary:
        yield temporary
        flush(temporary)
        os.link(temporary, path)  # a rename would replace what stands there
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises SemidError naming the file if it is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SemidError(f"{path}: no such file") from None
    except ValueError as error:
        raise SemidError(f"{path}: not valid JSON ({error})") from None


def save_tensors(path: Path, tensors: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write named arrays (of numpy or a device) as one safetensors file, whole or not at all, `metadata` in its header.

    Raises SemidError naming the file if it cannot be written.
    """
    arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(arrays, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # the library's, also for a full disk
            raise SemidError(f"{path}: cannot be written ({error})") from None
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # the library makes files that nobody else can read


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file. Raises SemidError naming the file if it is absent or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise SemidError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise SemidError(f"{path}: not a readable safetensors file ({error})") from None


def load_metadata(path: Path) -> dict[str, str]:
    """Read the `metadata` of a safetensors file, as `save_tensors` wrote it."""
    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, computed once per process while the file stays as it is."""
    found = path.stat()
    return _sha256(path.resolve(), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(maxsize=1 << 14)
def _sha256(path: Path, *identity: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _request(kind: str, config: dict, parents: Mapping[str, str] | None, seed: int | None) -> Manifest:
    return Manifest(kind=kind, config=config, files={}, parents=dict(parents or {}), seed=seed)


def read_manifest(path: Path) -> Manifest:
    """Read an artifact's manifest; its files are not verified (see `read_artifact`)."""
    if not path.is_dir():
        raise SemidError(f"{path}: no such artifact; expected a folder that semid wrote")
    file = path / MANIFEST
    data = read_json(file)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise SemidError(f"{file}: schema version {version} is newer than {SCHEMA_VERSION}; upgrade semid to read it")
    if version is None or set(data) != {f.name for f in fields(Manifest)} | {"digest"}:
        raise SemidError(f"{file}: not a manifest of semid; write the artifact again")
    digest = data.pop("digest")
    manifest = Manifest(**data)
    if manifest.digest != digest:
        raise SemidError(f"{file}: content does not match its own digest (edited by hand?); write the artifact again")
    return manifest


def _temporary_name(path: Path, use: str, process: int | str | None = None) -> str:
    """Hidden name with the host and process that use it: another host cannot tell whether that process lives."""
    host = re.sub(r"[^A-Za-z0-9.]", "_", platform.node())
    return f".{path.name}.{use}-{host}-{os.getpid() if process is None else process}"


def _remove_leftovers(path: Path) -> None:
    """Undo what this process, or a killed one of this host, left of its attempt to write `path`.

    An artifact that stepped aside for one that never came is put back. Another live writer's is not touched.
    """
    for use in ("replaced", "writing"):
        for leftover in path.parent.glob(glob.escape(_temporary_name(path, use, "")) + "*"):
            process = Path("/proc") / leftover.name.rpartition("-")[2]
            if process.name != str(os.getpid()) and (process.exists() or not process.parent.is_dir()):
                continue
            if use == "replaced" and not path.exists():
                os.replace(leftover, path)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """Yield a name next to `path` for this thread; remove it at the end, and what killed processes left."""
    temporary = path.with_name(_temporary_name(path, f"writing.{threading.get_ident()}"))
    _remove_dead_files(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _remove_dead_files(path: Path) -> None:
    """Remove what killed processes of this host left of `_temporary_file`."""
    names = glob.escape(_temporary_name(path, "writing.@", "")).replace("@", "*")
    for leftover in path.parent.glob(f"{names}*"):
        process = Path("/proc") / leftover.name.rpartition("-")[2]
        if process.parent.is_dir() and not process.exists():
            leftover.unlink(missing_ok=True)


def _packages() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def sha256_json(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
