"""Lists other than the k best: with a limit of items per group, or sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Array, Int

from semid.config import is_whole
from semid.data import Tags, as_ids
from semid.errors import SemidError
from semid.progress import LOG
from seq_models import GroupLimits, GumbelNoise, request_noise


@dataclass(frozen=True)
class Sampling:
    """Sampling of items without replacement, in proportion to their probability to the power 1 / temperature.

    The list is in the order drawn. A history's draw depends on the seed and on its index in the call.
    """

    temperature: float = 1.0
    """Near 0: the best; 1: the model's own probabilities; above: bolder."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise SemidError(f"expected a temperature above 0, got {self.temperature}; the best items need no sampling")
        if not is_whole(self.seed) or not 0 <= self.seed < 2**32:
            raise SemidError(f"expected a seed from 0 to 2**32 - 1, a whole number, got {self.seed}")

    def noise(self, index: Int[np.ndarray, " b"]) -> GumbelNoise:
        """Noise for the histories of these indices."""
        return request_noise(self.seed, jax.device_put(index.astype(np.int32)), temperature=self.temperature)


def item_groups(items: pa.Table, columns: tuple[str, ...], item_ids: pa.Array) -> dict[str, Tags]:
    """Groups of a catalogue's items by columns of a table with `item_id`; items that it lacks have none.

    Raises SemidError for a column that is missing, occurs twice or holds no groups, for an item that is given twice,
    and if the table has none of the items.
    """
    for column in ("item_id", *columns):
        if items.column_names.count(column) > 1:
            raise SemidError(f"the items' column {column!r} occurs more than once; rename or drop one")
    groups = {column: Tags.from_column(items, column) for column in columns}
    if "item_id" not in items.column_names:
        raise SemidError(f"no column 'item_id' among the items' {items.column_names}; rename the column of the ids")
    ids = as_ids(items["item_id"])
    first = pc.index_in(ids, ids).to_numpy()
    for row in np.flatnonzero(first < np.arange(len(ids)))[:1].tolist():
        raise SemidError(
            f"item id {ids[row].as_py()!r} is given twice, in rows {first[row] + 1} and {row + 1} of the items; keep "
            "one row for each item, with its groups as a list"
        )
    rows = pc.fill_null(pc.index_in(item_ids, ids), -1).to_numpy().astype(np.int64)
    if (lacking := int((rows < 0).sum())) == len(rows):
        raise SemidError(f"the table of {items.num_rows:,} items has none of the model's; give that of its dataset")
    if lacking:
        LOG.warning("groups: the table lacks %d of %d items, which at_most does not limit", lacking, len(rows))
    return {column: tags.take(rows) for column, tags in groups.items()}


class PlacedGroups(NamedTuple):
    """Groups of items by several columns, as in `GroupLimits`, on the device, and the column of each position."""

    groups: Int[Array, "items m"]
    columns: Int[np.ndarray, " m"]

    @classmethod
    def of_columns(cls, tags: Sequence[Tags], *, rows: int) -> PlacedGroups:
        """Groups by these columns, for tables of `rows` rows."""
        blocks, offset = [], 0
        for of_column in tags:
            padded = of_column.padded()
            blocks.append(np.where(padded < 0, -1, padded + offset))
            offset += len(of_column)
        groups = np.hstack(blocks).astype(np.int32)
        groups = np.pad(groups, ((0, rows - len(groups)), (0, 0)), constant_values=-1)
        columns = np.repeat(np.arange(len(blocks)), [block.shape[1] for block in blocks])
        return cls(jax.device_put(groups), columns)


def build_limits(
    at_most: Mapping[str, int],
    groups: Mapping[str, Tags],
    *,
    rows: int,
    placed: dict[tuple[str, ...], PlacedGroups],
) -> GroupLimits | None:
    """Build the limits for tables of `rows` rows, on the device; None: nothing is limited.

    `placed` caches the groups by columns, so that those of all items are built once and not for each request.
    Raises SemidError for a column without groups, and for a limit that is no whole number of at least 1.
    """
    for column, limit in at_most.items():
        if column not in groups:
            known = f"it has those of {', '.join(groups)}" if groups else "it has none"
            raise SemidError(
                f"at_most needs groups of the items by {column!r}, and {known}; give them by with_groups(items, "
                f"{column!r}) (--items)"
            )
        if not is_whole(limit) or limit < 1:
            raise SemidError(f"expected at least 1 item of a {column}, got {limit!r}; to list none, mask the items")
    if not at_most:
        return None
    names = tuple(at_most)
    if names not in placed:
        placed[names] = PlacedGroups.of_columns([groups[name] for name in names], rows=rows)
    device_groups, columns = placed[names]
    return GroupLimits(device_groups, jax.device_put(np.array(list(at_most.values()), np.int32)[columns]))
