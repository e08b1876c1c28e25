"""Folders of the Hugging Face hub, downloaded with the extra `hub`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from semid.artifacts.remote import fetched, first_line
from semid.errors import SemidError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = ["*.json", "*.safetensors", "*.parquet", "*.model", "*.txt", "README.md"]


def local_folder(path: str | Path, *, revision: str | None = None) -> Path:
    """Local folder of a path, of a URL (its local copy), or of a hub repository `org/name` (its download).

    A string counts as a repository only if the extra is installed and no local folder `org` exists.
    Raises SemidError if the hub does not have it or does not answer.
    """
    if not is_repository(path):
        if revision is not None:
            raise SemidError(f"{path}: revision {revision!r} is for repositories of the hub, org/name; leave it out")
        return fetched(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        raise SemidError(f"{path}: no such folder, and not available from the hub ({first_line(error)})") from None


def is_repository(path: str | Path) -> bool:
    """True for a string `org/name` that is no local path, if the extra is installed."""
    if not isinstance(path, str) or not _REPO_ID.fullmatch(path) or Path(path.split("/")[0]).exists():
        return False
    return importlib.util.find_spec("huggingface_hub") is not None
