"""Upload of recommenders to the Hugging Face hub, with the extra `hub`.

Not through `huggingface_hub.ModelHubMixin`: its `save_pretrained` removes the folder's config.json before anything is
written, its `from_pretrained` hands the entries of config.json to `__init__` as arguments wherever the names agree
(`model` and `catalog` do), and its `__new__` keeps a copy of the whole catalogue as configuration. The rest of it are
the three calls of `upload` and `artifacts.local_folder`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from semid.artifacts import first_line
from semid.errors import SemidError

# Files of a package, in subfolders too: those of an earlier upload that this one lacks are deleted.
_PACKAGE_FILES = ["*.json", "*.safetensors", "*.parquet", "*.model"]


def upload(
    folder: Path, repo_id: str, *, message: str, private: bool | None, revision: str | None, token: str | None
) -> str:
    """Upload a folder in one commit, in place of an earlier package, and return the commit's address.

    The repository is created if it does not exist.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise SemidError("the Hugging Face hub needs an extra; pip install 'semid[hub]'")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the HTTP client's: no network

    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            delete_patterns=_PACKAGE_FILES,
        )
    except (HTTPError, OSError, ValueError) as error:
        raise SemidError(f"{repo_id}: not uploaded ({first_line(error)})") from None
    return str(commit.commit_url)
