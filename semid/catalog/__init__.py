"""Semantic catalogues: item ids and codes, versions, updates, export."""

from semid.catalog.catalog import (
    CATALOG_FILE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    CatalogPath,
    SemanticCatalog,
    copy_tokenizer_files,
    file_metadata,
    level_name,
)
from semid.catalog.collisions import Collisions, Residuals, warn_of_large_group
from semid.catalog.export import Format, export, read_tokens
from semid.catalog.updates import Known, append, extend, remove
from semid.catalog.versions import Version

__all__ = [
    "CATALOG_FILE",
    "TOKENIZER_CONFIG",
    "TOKENIZER_FILE",
    "CatalogPath",
    "Collisions",
    "Format",
    "Known",
    "Residuals",
    "SemanticCatalog",
    "Version",
    "append",
    "copy_tokenizer_files",
    "export",
    "extend",
    "file_metadata",
    "level_name",
    "read_tokens",
    "remove",
    "warn_of_large_group",
]
