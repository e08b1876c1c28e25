"""Histories as request batches of few shapes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Bool, Int

from semid.data import Histories
from seq_models import Boosts, Conditions, RequestBatch


def request_batches(
    histories: Histories,
    size: int,
    *,
    max_history: int,
    slots: int,
    allowed: Bool[np.ndarray, "masks items"] | None = None,
    exclude_seen: bool = False,
    boosts: Boosts | None = None,
    conditions: Conditions | None = None,
    times: bool = False,
) -> Iterator[tuple[Int[np.ndarray, " n"], RequestBatch]]:
    """Batches of requests with the indices of their histories: `size` each, or a power of two for the last few.

    A batch holds the last `max_history` items of each history, and masks of `slots` item rows, as the tables have; with
    `conditions`, one per history, the items' events too, unknown where there are none; their times, if asked for.
    """
    for start in range(0, len(histories), size):
        index = np.arange(start, min(start + size, len(histories)))
        batch, rows = histories.take(index), min(size, _power_of_two(len(index)))
        history, real = batch.padded(max_history)
        masks, denied = select_masks(allowed, index), _seen_items(batch) if exclude_seen else None
        if masks is not None and (spare := slots - masks.shape[1]):
            masks = np.pad(masks, ((0, 0), (0, spare)))
        if masks is not None and len(masks) > 1:
            masks = _pad_rows(masks, rows)
        requests = RequestBatch(
            jax.device_put(_pad_rows(history, rows)),
            jax.device_put(_pad_rows(real.astype(np.int32), rows)),
            None if masks is None else jax.device_put(masks),
            None if denied is None else jax.device_put(_pad_rows(denied, rows)),
            boosts,
            None if conditions is None else jax.device_put(_pad_rows(batch.padded_events(max_history), rows)),
            None if conditions is None else _conditions_of(conditions, index, rows),
            times=jax.device_put(_pad_rows(batch.padded_times(max_history), rows)) if times else None,
        )
        yield index, requests


def select_masks(masks: Bool[np.ndarray, "masks items"] | None, index: Int[np.ndarray, " n"]) -> np.ndarray | None:
    """Select the masks of the histories at `index`; a single one is for all and stays."""
    return masks if masks is None or len(masks) == 1 else masks[index]


def _seen_items(histories: Histories) -> Int[np.ndarray, "histories n"]:
    """The items of each history, -1 behind them."""
    rows, real = histories.padded(_power_of_two(max(int(histories.lengths.max(initial=0)), 1)))
    return np.where(real, rows, -1)


def _conditions_of(conditions: Conditions, index: Int[np.ndarray, " n"], rows: int) -> Conditions:
    """The conditions of the histories at `index`, and any of what pads them."""
    return Conditions(*(None if part is None else jax.device_put(_pad_rows(part[index], rows)) for part in conditions))


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Append rows of zeros to `x`, up to `rows` in all."""
    return np.pad(x, ((0, rows - len(x)), *((0, 0),) * (x.ndim - 1)))
