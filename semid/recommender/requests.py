"""Histories of ids as item rows, and as request batches of few shapes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from semid.catalog import SemanticCatalog
from semid.data import Histories, Id, as_ids
from semid.errors import SemidError
from semid.recommender.conditions import ConditionSpec
from seq_models import Boosts, Conditions, RequestBatch


def read_histories(
    histories: Iterable[Iterable[Id]],
    catalog: SemanticCatalog,
    *,
    conditions: ConditionSpec | None,
    skip_unknown: bool,
    events: Iterable[Sequence[str | None]] | None = None,
    times: Iterable[Sequence[float]] | None = None,
) -> Histories:
    """Convert histories of external ids, event names and times to item rows, event numbers and seconds.

    Raises SemidError for ids that the catalogue does not know, unless `skip_unknown` drops them, for events and times
    that a model of these `conditions` does not read, and if some are missing.
    """
    items = _known_rows(histories, catalog, skip_unknown)
    rows, known = [rows[known].tolist() for rows, known in items], [known for _, known in items]
    seconds = None if times is None else _seconds(times, known, conditions)
    if events is None:
        return Histories.from_lists(rows, times=seconds)
    if conditions is None or not conditions.reads_events:
        raise SemidError("the model reads no events; leave them out, or train one with event_inputs (--event-inputs)")
    names = [_event_names(of, index) for index, of in enumerate(events)]
    if (given := [len(of) for of in names]) != (expected := [len(of) for of in known]):
        raise SemidError(f"expected an event for each item of the histories, {expected[:9]}, got {given[:9]}")
    codes = [conditions.event_codes(of, where=f"history {index}") for index, of in enumerate(names)]
    of_known = [np.array(of)[there] for of, there in zip(codes, known, strict=True)]
    return Histories.from_lists(rows, events=of_known, times=seconds)


def _seconds(
    times: Iterable[Sequence[float]], known: Sequence[Bool[np.ndarray, " _"]], conditions: ConditionSpec | None
) -> list[Int[np.ndarray, " _"]]:
    """Times of the known items. Raises SemidError for a model that reads none, for anything but a sorted list of
    numbers, and if some are missing."""
    if conditions is None or not conditions.reads_times:
        raise SemidError(
            "the model reads no times; leave them out, or train one with time_inputs (--time-inputs) or time_bias "
            "(--time-bias)"
        )
    seconds = [_numbers(of, index) for index, of in enumerate(times)]
    if (given := [of.size for of in seconds]) != (expected := [len(of) for of in known]):
        raise SemidError(f"expected a time for each item of the histories, {expected[:9]}, got {given[:9]}")
    return [of[there].astype(np.int64) for of, there in zip(seconds, known, strict=True)]


def _numbers(times: Sequence[float], index: int) -> Float[np.ndarray, " _"]:
    try:
        numbers = np.asarray(times)
    except ValueError:  # lists of several lengths
        numbers = np.empty((), object)
    if numbers.ndim == 1 and numbers.dtype.kind in "iuf":
        seconds = numbers.astype(np.float64)
        if (np.abs(seconds) < 2.0**63).all() and not (np.diff(seconds) < 0).any():
            return seconds
    got = f"{str(times)[:80]} ({numbers.dtype})"
    raise SemidError(f"history {index}: expected times in seconds, a list of numbers, none before the last, got {got}")


def _event_names(events: Sequence[str | None], index: int) -> list[str | None]:
    if isinstance(events, str) or not isinstance(events, Iterable):
        raise SemidError(f"history {index}: expected a list of events, None for an unknown one, got {events!r}")
    return list(events)


def _known_rows(
    histories: Iterable[Iterable[Id]], catalog: SemanticCatalog, skip_unknown: bool
) -> list[tuple[Int[np.ndarray, " length"], Bool[np.ndarray, " length"]]]:
    """Item rows of each history, and a mask of the known ones."""
    given, result = [pa.array([], pa.string())], []
    for index, history in enumerate(histories):
        if isinstance(history, str):
            raise SemidError(f"history {index} is the string {history!r}; expected a list of item ids")
        given.append(as_ids(history, what=f"item ids (history {index})"))
    ends = np.cumsum([len(ids) for ids in given])[:-1]  # all are looked up at once
    split = (np.split(of_all, ends)[1:] for of_all in catalog.find_rows(pa.concat_arrays(given)))
    for index, (ids, rows, known) in enumerate(zip(given[1:], *split, strict=True)):
        if not known.all() and not skip_unknown:
            unknown = ids.filter(pa.array(~known))
            raise SemidError(
                f"history {index}: unknown item id {unknown[0].as_py()!r} ({len(unknown)} of {len(ids)} unknown); "
                "correct it, or drop such items with skip_unknown=True (--skip-unknown)"
            )
        result.append((rows, known))
    return result


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
    """Batches of `size` requests, the last padded to a power of two, with the indices of their histories.

    A batch holds the last `max_history` items of each history, and masks of `slots` item rows, as many as the tables
    have. With `conditions`, one per history, it has the items' events too, unknown if there are none, and with `times`
    their times.
    """
    for start in range(0, len(histories), size):
        index = np.arange(start, min(start + size, len(histories)))
        batch, rows = histories.take(index), min(size, power_of_two(len(index)))
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
    """The items of each history, padded with -1."""
    rows, real = histories.padded(power_of_two(max(int(histories.lengths.max(initial=0)), 1)))
    return np.where(real, rows, -1)


def _conditions_of(conditions: Conditions, index: Int[np.ndarray, " n"], rows: int) -> Conditions:
    """The conditions of the histories at `index`, padded with "any"."""
    return Conditions(*(None if part is None else jax.device_put(_pad_rows(part[index], rows)) for part in conditions))


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Append rows of zeros to `x`, up to `rows` in all."""
    return np.pad(x, ((0, rows - len(x)), *((0, 0),) * (x.ndim - 1)))
