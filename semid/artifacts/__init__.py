"""Artifacts: directories that are complete or absent, verified on load, and that say how they were made.

Every stage writes one: data in open formats with a `manifest.json` with schema version, resolved config, the
sha256 of every file, the digests of its parents, package versions, seed and devices.
"""

from semid.artifacts.files import (
    check_finite,
    flush,
    load_metadata,
    load_tensors,
    parse_json,
    read_json,
    read_sealed,
    remove_dead,
    replacing,
    save_tensors,
    sealed,
    sha256,
    sha256_json,
    write_json,
    write_once,
)
from semid.artifacts.hub import is_repository, local_folder
from semid.artifacts.locks import Owner, locked
from semid.artifacts.manifests import (
    MANIFEST,
    PAGE,
    SCHEMA_VERSION,
    Kind,
    Manifest,
    Origin,
    read_artifact,
    read_manifest,
)
from semid.artifacts.places import Place, resolved, try_file, try_folder
from semid.artifacts.remote import (
    as_url,
    fetched,
    first_line,
    local_only,
    place,
    refresh,
    remove,
    shown,
    upload,
    url_of,
)
from semid.artifacts.writing import check_output, fill, is_current, output_folder, write_artifact

__all__ = [
    "MANIFEST",
    "PAGE",
    "SCHEMA_VERSION",
    "Kind",
    "Manifest",
    "Origin",
    "Owner",
    "Place",
    "as_url",
    "check_finite",
    "check_output",
    "fetched",
    "fill",
    "first_line",
    "flush",
    "is_current",
    "is_repository",
    "load_metadata",
    "load_tensors",
    "local_folder",
    "local_only",
    "locked",
    "output_folder",
    "parse_json",
    "place",
    "read_artifact",
    "read_json",
    "read_manifest",
    "read_sealed",
    "refresh",
    "remove",
    "remove_dead",
    "replacing",
    "resolved",
    "save_tensors",
    "sealed",
    "sha256",
    "sha256_json",
    "shown",
    "try_file",
    "try_folder",
    "upload",
    "url_of",
    "write_artifact",
    "write_json",
    "write_once",
]
