"""Recommenders on the Hugging Face hub, with the extra `hub`.

Not through `huggingface_hub.ModelHubMixin`: its `save_pretrained` removes the folder's config.json before anything is
written, its `from_pretrained` hands the entries of config.json to `__init__` as arguments wherever the names agree
(`model` and `catalog` do), and its `__new__` keeps a copy of the whole catalogue as configuration. What it does beside
that are the three calls below.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from semid.errors import SemidError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = ["*.json", "*.safetensors", "*.parquet", "*.model", "README.md"]


def local_folder(path: str | Path, *, revision: str | None = None) -> Path:
    """`path` itself; or, where it is the `org/name` of a repository and no path, the folder it was downloaded to.

    A string counts as that only if the extra is installed and there is no folder `org` here.
    Raises SemidError if the hub does not have it or does not answer.
    """
    if not is_repository(path):
        if revision is not None:
            raise SemidError(f"{path}: revision {revision!r} is for repositories of the hub, org/name; leave it out")
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        raise SemidError(f"{path}: no such folder, and not to be had from the hub ({_first_line(error)})") from None


def upload(
    folder: Path, repo_id: str, *, message: str, private: bool | None, revision: str | None, token: str | None
) -> str:
    """Upload a folder in one commit, making the repository if there is none, and give the commit's address."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise SemidError("the Hugging Face hub needs an extra; pip install 'semid[hub]'")
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message, revision=revision)
    except (OSError, ValueError) as error:
        raise SemidError(f"{repo_id}: not uploaded ({_first_line(error)})") from None
    return str(commit.commit_url)


def is_repository(path: str | Path) -> bool:
    """True for a string `org/name` that is no path here, where the extra is installed."""
    if not isinstance(path, str) or not _REPO_ID.fullmatch(path) or Path(path.split("/")[0]).exists():
        return False
    return importlib.util.find_spec("huggingface_hub") is not None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
