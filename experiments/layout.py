"""Reader for dataset folders in the layout of the development data: Parquet tables, `.npy` vectors, `.npz` posters.

    python -m experiments.layout --folder ../shared/data/amazon14_beauty --out data/beauty
    python -m experiments.layout --folder ../shared/data/amazon14_beauty --out data/beauty_shuffled --ties shuffled

interactions.parquet   user_id, item_id (integers from 0), position (order of a user's interactions); optional
                       timestamp (then the order is by time, ties by position), rel_time, event, weight
items.parquet          a row for each item_id, in that order; optional `asin` or `movie_id`: the external id
<name>_f16.npy         vectors [items, dim], row i for item_id i: the vector column `<name>`
posters_<size>.npz     item_id, offset, jpeg: image k of item item_id[k] is jpeg[offset[k]:offset[k + 1]]

Other columns of the interactions are dropped. `rel_time` has the seconds since the user's own first interaction. As
users do not share this clock, it is no time for the split by global time; it only defines ties if they are shuffled.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from semid.artifacts import sha256
from semid.cli.app import run_command
from semid.cli.choices import Ties
from semid.data import (
    Dataset,
    Faults,
    LeaveOneOut,
    SourceOrder,
    SplitRule,
    TieRule,
    add_vector_files,
    raise_faults,
    read_table,
)
from semid.errors import SemidError
from semid.stage import store_dataset

_EXTERNAL_IDS = ("asin", "movie_id")
_KEPT = ("user_id", "position", "timestamp", "event", "weight")


def read_layout(folder: str | Path, *, split_rule: SplitRule = LeaveOneOut(), ties: TieRule = SourceOrder()) -> Dataset:
    """The dataset in `folder`, named after it, with all columns of `items.parquet` that are not empty.

    If `ties` are not in source order and there is no `timestamp`, the time is `rel_time`, with the unit "relative".
    Raises SemidError naming a file that is missing or does not follow the layout.
    """
    folder = Path(folder)
    items = read_table(folder / "items.parquet")
    interactions = read_table(folder / "interactions.parquet")
    external = next((name for name in _EXTERNAL_IDS if name in items.column_names), "item_id")
    _check_rows(items, folder / "items.parquet")
    if is_relative := ties != SourceOrder() and "timestamp" not in interactions.column_names:
        interactions = _with_relative_time(interactions, ties.description, folder / "interactions.parquet")
    ids = items[external]
    interactions = _with_external_ids(interactions, ids, folder / "interactions.parquet")
    items = items.drop_columns(list({"item_id", external})).add_column(0, "item_id", ids)
    faults = Faults(str(folder))
    vectors, posters = sorted(folder.glob("*_f16.npy")), sorted(folder.glob("posters_*.npz"))
    items = add_vector_files(items, {path.stem.removesuffix("_f16"): path for path in vectors}, faults)
    raise_faults(faults.lines)
    for path in posters[:1]:
        items = items.append_column("image", _posters(path, len(ids)))
    files = [folder / "items.parquet", folder / "interactions.parquet", *vectors, *posters[:1]]
    dataset = Dataset.build(
        items,
        interactions,
        name=folder.resolve().name,
        split_rule=split_rule,
        ties=ties,
        source={"type": "layout", "sha256": {path.name: sha256(path) for path in files}},
        item_file=str(folder / "items.parquet"),
        interaction_file=str(folder / "interactions.parquet"),
    )
    return dataset.replace(time_unit="relative") if is_relative else dataset


def _check_rows(items: pa.Table, path: Path) -> None:
    if "item_id" not in items.column_names or not np.array_equal(items["item_id"], np.arange(items.num_rows)):
        raise SemidError(f"{path}: expected column 'item_id' with 0, 1, 2, ... in row order; sort and number the items")


def _with_relative_time(interactions: pa.Table, description: str, path: Path) -> pa.Table:
    """`rel_time` as `timestamp`."""
    names = interactions.column_names
    if "rel_time" not in names:
        raise SemidError(
            f"{path}: ties {description} need column 'timestamp' or 'rel_time' (seconds since the user's first "
            f"interaction), found {', '.join(names)}; add one, or leave ties in source order"
        )
    _check_integers(interactions, "rel_time", path)
    return interactions.rename_columns({"rel_time": "timestamp"})


def _with_external_ids(interactions: pa.Table, ids: pa.ChunkedArray, path: Path) -> pa.Table:
    for column in ("user_id", "item_id", "position"):
        if column not in interactions.column_names:
            raise SemidError(f"{path}: column {column!r} is missing; found {', '.join(interactions.column_names)}")
    _check_integers(interactions, "item_id", path)
    rows = interactions["item_id"].to_numpy()
    outside = (rows < 0) | (rows >= len(ids))
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise SemidError(f"{path}: row {row + 1}, column 'item_id': {rows[row]} is no row of the {len(ids)} items")
    kept = [name for name in _KEPT if name in interactions.column_names]
    return interactions.select(kept).add_column(0, "item_id", pc.take(ids, pa.array(rows)))


def _check_integers(interactions: pa.Table, column: str, path: Path) -> None:
    kind, nulls = interactions[column].type, interactions[column].null_count
    if not pa.types.is_integer(kind) or nulls:
        raise SemidError(f"{path}: column {column!r}: expected integers, got {kind} with {nulls} nulls; number them")


def _posters(path: Path, num_items: int) -> pa.Array:
    try:
        with np.load(path, allow_pickle=False) as archive:
            rows, offset, data = (archive[name] for name in ("item_id", "offset", "jpeg"))
        images: list[bytes | None] = [None] * num_items
        for row, start, end in zip(rows.tolist(), offset[:-1], offset[1:], strict=True):
            images[row] = data[start:end].tobytes()
    except (OSError, ValueError, EOFError, KeyError, IndexError) as error:
        raise SemidError(f"{path}: expected arrays item_id, offset and jpeg ({error}); check the file") from None
    return pa.array(images, pa.binary())


def main(folder: Path, out: Path, split_rule: SplitRule = LeaveOneOut(), ties: Ties = SourceOrder()) -> None:
    """Write the dataset artifact of a layout folder.

    Args:
        folder: Folder to read.
        out: Dataset folder to write.
        split_rule: Cut into training, validation and test.
        ties: Order of a user's interactions of equal time: that of the source, or drawn by a seed (0 if none is given).
    """
    store_dataset(read_layout(folder, split_rule=split_rule, ties=ties), out)
    print(f"dataset: {out}")


if __name__ == "__main__":
    run_command(None, lambda words: tyro.cli(main, args=list(words)), name="layout")
