"""Tables read by the `datasets` library: from the Hugging Face hub, or from a folder that `save_to_disk` wrote."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.faults import Faults, raise_faults
from semid.errors import SemidError


def read_huggingface(name: str, part: str, *, revision: str | None = None) -> pa.Table:
    """Read one table of a dataset on the hub (`org/name`) or in a folder.

    `part` is SPLIT or CONFIG:SPLIT; in a folder, the subfolder that `save_to_disk` wrote for the split. Images become
    the bytes of their files. Raises SemidError if the library is missing (extra `hf`), or the table.
    """
    try:
        import datasets
    except ImportError as error:
        raise SemidError(f"{name}: reading it needs the extra ({error}): pip install 'semid[hf]'") from None
    config, _, split = part.rpartition(":")
    if revision is not None and Path(name).is_dir():
        raise SemidError(f"{name}: revision {revision!r} is for datasets of the hub, org/name; leave it out")
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(str(Path(name, config, split)))
        else:
            loaded = datasets.load_dataset(name, config or None, split=split, revision=revision)
        table: pa.Table = loaded.with_format("arrow")[:]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise SemidError(f"{name}: no table {part!r} ({' '.join(str(error).split())[:300]})") from None
    for index, field in enumerate(table.schema):
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            faults = Faults(f"{name}: {part}")
            table = table.set_column(index, field.name, _file_bytes(field.name, table[field.name], faults))
            raise_faults(faults.lines)
    return table


def _file_bytes(name: str, values: pa.ChunkedArray, faults: Faults) -> pa.Array | pa.ChunkedArray:
    """Bytes of structs {bytes, path}, read from the local file where `bytes` is null; missing files are faults."""
    data = pc.struct_field(values, "bytes")
    if values.type.get_field_index("path") < 0:
        return data
    paths = pc.struct_field(values, "path")
    named = pc.and_(data.is_null(), paths.is_valid()).to_numpy()
    absent = named & np.array([not os.path.isfile(path or "") for path in paths.to_pylist()], bool)
    faults.rows(name, absent, "no bytes, and no such file: {}; store the bytes in the dataset", paths)
    if absent.any() or not named.any():
        return data
    rows = zip(data, paths, named, strict=True)
    files = [Path(path.as_py()).read_bytes() if read else stored.as_py() for stored, path, read in rows]
    return pa.array(files, pa.binary())
