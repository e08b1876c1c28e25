"""Lists other than the k best: with at most so many items of a group, or drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Array, Int

from semid.data import Tags, as_ids
from semid.errors import SemidError
from semid.progress import LOG
from seq_models import GroupLimits, GumbelNoise, request_noise


@dataclass(frozen=True)
class Sampling:
    """A draw of items without replacement, each in proportion to its probability to the power 1 / temperature.

    The list is in the order drawn. The draw of a history depends on the seed and on its number in the call.
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
        """The noise of the histories of these numbers."""
        return request_noise(self.seed, jax.device_put(index.astype(np.int32)), temperature=self.temperature)


def is_whole(number: object) -> bool:
    """True of an integer, one of numpy's too, that is no boolean."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def groups_of(items: pa.Table, columns: tuple[str, ...], item_ids: pa.Array) -> dict[str, Tags]:
    """Groups of a catalogue's items by columns of a table with `item_id`, none for items that it lacks.

    Raises SemidError for a column that is not there or holds no groups, and where the table has none of the items.
    """
    groups = {column: Tags.from_column(items, column) for column in columns}
    if "item_id" not in items.column_names:
        raise SemidError(f"no column 'item_id' among the items' {items.column_names}; name that of the ids so")
    rows = pc.fill_null(pc.index_in(item_ids, as_ids(items["item_id"])), -1).to_numpy().astype(np.int64)
    if (lacking := int((rows < 0).sum())) == len(rows):
        raise SemidError(f"the table of {items.num_rows:,} items has none of the model's; give that of its dataset")
    if lacking:
        LOG.warning("groups: the table lacks %d of %d items, which at_most does not limit", lacking, len(rows))
    return {column: tags.take(rows) for column, tags in groups.items()}


class PlacedGroups(NamedTuple):
    """Groups of items by several columns as `GroupLimits` has them, on the device, and the column of each, by place."""

    groups: Int[Array, "items m"]
    columns: Int[np.ndarray, " m"]

    @classmethod
    def of_columns(cls, tags: Sequence[Tags], *, rows: int) -> PlacedGroups:
        """Groups for tables of so many rows."""
        blocks, before = [], 0
        for of_column in tags:
            padded = of_column.padded()
            blocks.append(np.where(padded < 0, -1, padded + before))
            before += len(of_column)
        every = np.hstack(blocks).astype(np.int32)
        every = np.pad(every, ((0, rows - len(every)), (0, 0)), constant_values=-1)
        columns = np.repeat(np.arange(len(blocks)), [block.shape[1] for block in blocks])
        return cls(jax.device_put(every), columns)


def build_limits(
    at_most: Mapping[str, int],
    groups: Mapping[str, Tags],
    *,
    rows: int,
    placed: dict[tuple[str, ...], PlacedGroups],
) -> GroupLimits | None:
    """Limits for tables of so many rows, on the device; None where nothing is limited.

    `placed` keeps the groups of columns that are asked for: those of all items are made once, and not for each request.
    Raises SemidError for a column without groups, and for a number that is not a whole one from 1 on.
    """
    for column, limit in at_most.items():
        if column not in groups:
            known = f"it has those of {', '.join(groups)}" if groups else "it has none"
            raise SemidError(
                f"at_most needs groups of the items by {column!r}, and {known}; give them by with_groups(items, "
                f"{column!r}) (--items)"
            )
        if not is_whole(limit) or limit < 1:
            raise SemidError(f"expected at least 1 item of a {column}, got {limit!r}; what may not be listed, mask")
    if not at_most:
        return None
    names = tuple(at_most)
    if names not in placed:
        placed[names] = PlacedGroups.of_columns([groups[name] for name in names], rows=rows)
    every, columns = placed[names]
    return GroupLimits(every, jax.device_put(np.array(list(at_most.values()), np.int32)[columns]))
