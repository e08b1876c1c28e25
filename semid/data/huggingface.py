"""Tables of the `datasets` library: of the Hugging Face hub, or of a folder that `save_to_disk` wrote."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from semid.errors import SemidError


def read_huggingface(name: str, part: str, *, revision: str | None = None) -> pa.Table:
    """One table of a dataset of the hub (`org/name`) or in a folder.

    `part` is a split, or CONFIG:SPLIT; in a folder the subfolder of that name, as `save_to_disk` has one per split.
    Pictures become their bytes. Raises SemidError without the library (extra `hf`), and for what is not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise SemidError(f"{name}: reading it needs the extra ({error}): pip install 'semid[hf]'") from None
    config, _, split = part.rpartition(":")
    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(str(Path(name, config, split)))
        else:
            found = datasets.load_dataset(name, config or None, split=split, revision=revision)
        table: pa.Table = found.with_format("arrow")[:]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise SemidError(f"{name}: no table {part!r} ({' '.join(str(error).split())[:300]})") from None
    for index, field in enumerate(table.schema):
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            table = table.set_column(index, field.name, pc.struct_field(table[field.name], "bytes"))
    return table
