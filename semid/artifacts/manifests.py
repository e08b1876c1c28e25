"""Manifests: what an artifact is, how it was made, and the sha256 of its files. They are read as untrusted input."""

from __future__ import annotations

import contextlib
import enum
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from semid.artifacts.files import read_json, sha256, sha256_json, unsealed
from semid.artifacts.places import is_unfinished
from semid.errors import SemidError


class Kind(enum.StrEnum):
    """Kinds of artifacts, as `manifest.json` names them."""

    DATASET = "dataset"
    CATALOG = "catalog"
    MODEL = "model"
    PROGRAM = "program"
    GRAPH = "graph"


SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# The page that describes a folder. Users may edit it: it is neither read nor verified.
PAGE = "README.md"
# All options of the command that made an artifact, for `--config`. It names local paths, so no digest covers it.
CONFIG = "config.yaml"
# Maximum size; a manifest usually has some kilobytes.
MAX_BYTES = 16 << 20
# Advice for an item graph that is given in place of a model.
_USES_OF_GRAPH = (
    "an item graph is measured by `semid evaluate` (without --catalog), mixed with a model (--graph) and taught from "
    "(--teacher of `semid train`)"
)
# Maximum number of artifacts to suggest if a folder is none itself.
_SHOWN = 4
_SHA256 = re.compile("[0-9a-f]{64}")
_TYPES: dict[str, Any] = {
    "kind": str,
    "config": dict,
    "files": dict,
    "parents": dict,
    "seed": int | None,
    "schema_version": int,
    "packages": dict,
    "devices": str,
    "created": str,
    "digest": str,
}


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.folder.absolute())  # a process may change its working directory

    def __repr__(self) -> str:
        return f"Origin({str(self.folder)!r}, {self.manifest.kind} {self.digest[:12]})"

    @property
    def digest(self) -> str:
        """Digest of the artifact."""
        return self.manifest.digest

    def read(self, name: str) -> Any:
        """Read a JSON file of the artifact; None if it has none of that name."""
        return read_json(self.folder / name) if name in self.manifest.files else None

    def copy_file(self, name: str, into: Path) -> None:
        """Copy a file of the artifact into a folder.

        Raises SemidError if it has changed since the artifact was read.
        """
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(self.folder / name, into / name)
        except FileNotFoundError:
            raise SemidError(f"{self.folder / name}: gone since {self.folder} was loaded; load it again") from None
        if sha256(into / name) != self.manifest.files[name]:
            raise SemidError(f"{self.folder / name}: changed since {self.folder} was loaded; load it again")


def read_artifact(path: str | Path, kind: str, *others: str) -> Manifest:
    """Read the manifest of the artifact at `path`, of one of these kinds, and verify every file but its `PAGE`.

    Raises SemidError for: no artifact, one of another kind or of a newer schema, a missing or changed file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.kind not in (kind, *others):
        remedy = _USES_OF_GRAPH if (kind, manifest.kind) == (Kind.MODEL, Kind.GRAPH) else "check the path"
        raise SemidError(f"{path}: expected an artifact of kind {str(kind)!r}, found {manifest.kind!r}; {remedy}")
    with _unreplaced(path, manifest):
        for name, expected in manifest.files.items():
            if name == PAGE:
                continue
            if not os.path.lexists(path / name):
                raise SemidError(f"{path / name}: listed in {MANIFEST} but missing; write the artifact again")
            if sha256(regular_file(path, name)) != expected:
                raise SemidError(f"{path / name}: content does not match its sha256 in {MANIFEST}; write it again")
    return manifest


@contextlib.contextmanager
def opened(path: str | Path, kind: str, *others: str) -> Iterator[Origin]:
    """Verify the artifact at `path`, as `read_artifact` does, and yield it to read its files.

    Raises SemidError, also in place of an error of the body, if another process has replaced the artifact meanwhile.
    """
    manifest = read_artifact(path, kind, *others)
    with _unreplaced(Path(path), manifest):
        yield Origin(Path(path), manifest)


@contextlib.contextmanager
def _unreplaced(path: Path, manifest: Manifest) -> Iterator[None]:
    """Raise SemidError after the body, also in place of its error, if the artifact was replaced meanwhile."""
    try:
        yield
    finally:
        try:
            same = read_manifest(path).digest == manifest.digest
        except SemidError:
            same = False
        if not same:
            raise SemidError(f"{path}: was replaced while it was read; load it again") from None


def read_manifest(path: Path) -> Manifest:
    """Read an artifact's manifest; its files are not verified (see `read_artifact`)."""
    if not path.is_dir():
        raise SemidError(f"{path}: no such artifact; expected a folder that semid wrote")
    file = path / MANIFEST
    if not file.exists() and is_unfinished(path):
        raise SemidError(f"{file}: no such file, the artifact is unfinished; run the command that writes it again")
    if not file.exists():
        below = sorted(str(manifest.parent) for manifest in path.glob(f"[!.]*/{MANIFEST}"))[:_SHOWN]
        hint = f", such as {' or '.join(below)}" if below else ""
        raise SemidError(f"{file}: no such file; expected a folder that semid wrote{hint}")
    if regular_file(path, MANIFEST).stat().st_size > MAX_BYTES:
        raise SemidError(f"{file}: larger than {MAX_BYTES} bytes, which no manifest of semid is; check the path")
    data = read_json(file)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise SemidError(f"{file}: schema version {version} is newer than {SCHEMA_VERSION}; upgrade semid to read it")
    data = unsealed(data, where=file)
    if version is None or set(data) != {f.name for f in fields(Manifest)} | {"digest"}:
        raise SemidError(f"{file}: not a manifest of semid; write the artifact again")
    _check_entries(file, data)
    digest = data.pop("digest")
    manifest = Manifest(**data)
    if manifest.digest != digest:
        raise SemidError(f"{file}: content does not match its own digest (edited by hand?); write the artifact again")
    return manifest


def _check_entries(file: Path, data: dict[str, Any]) -> None:
    """Raise SemidError for an entry of a wrong type, a file name outside the folder, or an invalid digest."""
    for name, expected in _TYPES.items():
        if not isinstance(data[name], expected) or isinstance(data[name], bool):
            raise SemidError(f"{file}: {name} is not what a manifest of semid has there; write the artifact again")
    for name in ("parents", "packages"):
        if not all(isinstance(value, str) for value in data[name].values()):
            raise SemidError(f"{file}: {name} has an entry that is no text; write the artifact again")
    for name, digest in data["files"].items():
        if not _is_below(name):
            raise SemidError(f"{file}: lists the file {name!r}, which is not below its folder; do not trust it")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise SemidError(f"{file}: the digest of {name!r} is no sha256; write the artifact again")


def _is_below(name: str) -> bool:
    """Tell whether a file name is relative, without special parts, and not the manifest's."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts) and name != MANIFEST


def regular_file(folder: Path, name: str) -> Path:
    """A file of an artifact. Raises SemidError if it is a link, device or pipe, or is below a link.

    Links in a snapshot of the Hugging Face hub's cache to its own store, `snapshots/REVISION` to `blobs`, are followed.
    """
    path = folder / name
    for above in (path, *path.parents[: name.count("/")]):
        if above.is_symlink() and not _is_in_store(folder, above):
            raise SemidError(f"{above}: is a link, and an artifact has none; copy it with its links followed (cp -rL)")
    if not path.is_file():
        raise SemidError(f"{path}: is no regular file; write the artifact again")
    return path


def _is_in_store(folder: Path, link: Path) -> bool:
    """Tell whether `folder` is a snapshot in the hub's cache, and `link` points to a file of its store."""
    home = folder.resolve().parent
    return home.name == "snapshots" and link.resolve().parent == home.parent / "blobs"
