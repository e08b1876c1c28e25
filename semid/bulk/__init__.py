"""Catalogues larger than memory or than one machine: encode files of vectors to files of codes, join them."""

from semid.bulk.collisions import check_catalog, write_catalog
from semid.bulk.scheduling import Encoded, encode_files

__all__ = [
    "Encoded",
    "check_catalog",
    "encode_files",
    "write_catalog",
]
