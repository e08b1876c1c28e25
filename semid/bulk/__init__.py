"""Catalogues larger than memory or one machine: files of vectors in, files of codes out, one catalogue of them."""

from semid.bulk.collisions import check_catalog, write_catalog
from semid.bulk.scheduling import Encoded, encode_files

__all__ = [
    "Encoded",
    "check_catalog",
    "encode_files",
    "write_catalog",
]
