"""Recommended items per history, the result of `Recommender.recommend`."""

from __future__ import annotations

import typing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from semid.notebooks import Facts, as_pandas

# Histories, and items per history, that a notebook shows.
_SHOWN = 5


@dataclass(frozen=True)
class Recommendations:
    """Recommended items per history, best first.

    `item_ids[i]` may be shorter than k; `scores` are log-probabilities, -inf where there is no item.
    """

    item_ids: list[list[str]]
    scores: Float[np.ndarray, "histories k"]

    def __repr__(self) -> str:
        return f"Recommendations({self.scores.shape[1]} items for each of {len(self.item_ids):,} histories)"

    def to_pandas(self) -> typing.Any:
        """A pandas DataFrame with a row per recommendation: `history` (from 0), `rank` (from 1), `item_id`, `score`."""
        lengths = [len(ids) for ids in self.item_ids]
        columns = {
            "history": np.repeat(np.arange(len(lengths)), lengths),
            "rank": np.concatenate([np.arange(1, length + 1) for length in [0, *lengths]]),
            "item_id": pa.array([item for ids in self.item_ids for item in ids], pa.string()),
            "score": np.concatenate([row[:length] for row, length in zip(self.scores, lengths, strict=True)] or [[]]),
        }
        return as_pandas(pa.table(columns))

    def _repr_html_(self) -> str:
        best = {f"history {at}": ", ".join(ids[:_SHOWN]) for at, ids in enumerate(self.item_ids[:_SHOWN])}
        return Facts(repr(self), best)._repr_html_()
