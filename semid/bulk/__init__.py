"""Catalogues larger than memory or one machine: files of vectors in, files of codes out, one catalogue of them."""

from semid.bulk.collisions import write_catalog
from semid.bulk.encoding import Encoded, encode_files

__all__ = ["Encoded", "encode_files", "write_catalog"]
