"""Conditions on the next item that a generator is trained with, read from a dataset's events and items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from semid.config import check_range, later_field
from semid.data import Dataset, StoredEncoder, Tags, joined_texts
from semid.errors import SemidError
from semid.recommender import ConditionSpec, ItemConditions, encode_texts


@dataclass(frozen=True)
class ConditionsConfig:
    """Conditions on the next item that requests may set (`recommend(condition=)`), and events and times as inputs."""

    on_event: bool = False
    """Condition on the next item's event: "what would they buy next"."""
    on_group: str | None = None
    """Condition on a group of the next item, such as its brand: a column of the items with texts or whole numbers, or
    lists of these. A group that all items share does not count."""
    on_text: str | None = None
    """Condition on a text that describes the next item, encoded by the encoder of this vector column (`semid prepare
    --encoder`, or text_lsa), which is not trained."""
    text_columns: tuple[str, ...] = ()
    """Columns of the items whose texts are joined in training; none given: those that the encoder reads."""
    event_inputs: bool = False
    """Read the events of the history, next to its items."""
    event_head: bool = False
    """Learn the probabilities of events given item and history, so that `recommend(values=)` ranks by expected value.
    Not for the flat decoder and the encoder-decoder."""
    calibrate_events: bool = later_field(False)
    """Shift the event head's logits after training, so that its probabilities fit the validation targets."""
    film: bool = False
    """Let conditions scale and shift the state that the next item is decoded from (FiLM), instead of adding them to the
    input of the position before it. Not for the flat decoder and the encoder-decoder."""
    time_inputs: bool = later_field(False)
    """Read the time since the previous item next to each item, in powers of two of seconds."""
    time_bias: bool = later_field(False)
    """Add a learned bias to attention scores, per head and power of two of the seconds between two items. Not for
    the flat decoder and the encoder-decoder."""
    drop_conditions: float = 0.1
    """Share of the conditions that training hides, so that the model also learns to answer without any."""

    def __post_init__(self) -> None:
        check_range(self, "drop_conditions", at_least=0, below=1)
        if self.calibrate_events and not self.event_head:
            raise SemidError("calibrate_events is for the probabilities of an event head: give event_head too")
        if self.film and not (self.on_event or self.on_group or self.on_text):
            raise SemidError("film is how conditions enter the model: give on_event, on_group or on_text too")
        if self.event_head and self.on_event and not (self.film or self.drop_conditions):
            raise SemidError(
                "event_head learns from states that have not read the event as a condition, with drop_conditions of 0 "
                "nowhere: give film, or drop_conditions above 0"
            )
        if self.text_columns and self.on_text is None:
            raise SemidError("text_columns are read for conditions on texts only: give on_text too")

    @property
    def reads_times(self) -> bool:
        """The model reads times."""
        return self.time_inputs or self.time_bias

    @property
    def reads_events(self) -> bool:
        """The model reads events."""
        return self.on_event or self.event_inputs or self.event_head

    def fit(self, dataset: Dataset) -> FittedConditions:
        """Read the conditions' names, and those that each item meets, from the dataset.

        Raises SemidError if the dataset lacks what they are read from, and for events that are null.
        """
        if self.reads_times and dataset.time_unit == "position":
            raise SemidError(f"dataset {dataset.name!r} has positions and no times; leave these out")
        if not (self.reads_events or self.reads_times or self.on_group or self.on_text):
            return FittedConditions(None, ItemConditions())
        events = dataset.events if self.reads_events else ()
        if self.reads_events and not events:
            raise SemidError(
                f"dataset {dataset.name!r} has no column 'event'; add one to its interactions, or leave events out"
            )
        names, groups = ((), None) if self.on_group is None else _groups(dataset, self.on_group)
        encoder = None if self.on_text is None else _text_encoder(dataset, self.on_text)
        texts = None if encoder is None else _texts(dataset, encoder, self.text_columns or encoder.inputs)
        spec = ConditionSpec(
            events=events,
            on_event=self.on_event,
            event_inputs=self.event_inputs,
            event_head=self.event_head,
            group=self.on_group or "",
            groups=names,
            text=self.on_text or "",
            text_width=0 if texts is None else texts.shape[1],
            film=self.film,
            drop=self.drop_conditions,
            time_inputs=self.time_inputs,
            time_bias=self.time_bias,
        )
        return FittedConditions(spec, ItemConditions(groups, texts, encoder))


class FittedConditions(NamedTuple):
    """Spec of the conditions that a model learns, None without any, and the conditions that each item meets."""

    spec: ConditionSpec | None
    of_items: ItemConditions


def _groups(dataset: Dataset, column: str) -> tuple[tuple[str, ...], Int[np.ndarray, "items m"]]:
    """Sorted names of the groups, and the groups of each item by number, from 1, padded with 0."""
    tags = Tags.from_column(dataset.items, column)
    if not len(tags):
        raise SemidError(f"dataset {dataset.name!r}: column {column!r} tells no items apart; choose another")
    return tuple(tags.names.to_pylist()), tags.padded() + 1


def _text_encoder(dataset: Dataset, column: str) -> StoredEncoder:
    by_column = {encoder.column: encoder for encoder in dataset.encoders}
    encoder = by_column.get(column)
    if encoder is None or not set(encoder.inputs) <= set(dataset.text_columns):
        raise SemidError(
            f"dataset {dataset.name!r}: no text encoder made a column {column!r}, to encode conditions with; "
            f"there are {', '.join(by_column) or 'none'}; make one (`semid prepare --encoder`, or --text-vectors)"
        )
    return encoder


def _texts(dataset: Dataset, encoder: StoredEncoder, columns: tuple[str, ...]) -> Float[np.ndarray, "items width"]:
    return encode_texts(encoder, joined_texts(dataset.items, columns))
