"""Conditions on recommended items by name (an event, a group of items, a text), and those that each item meets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from semid.config import later_field
from semid.data import ContentEncoder, StoredEncoder
from semid.errors import SemidError, did_you_mean
from seq_models import Conditions, ConditionSizes


@dataclass(frozen=True)
class Condition:
    """Condition on a recommended item; None: any.

    `event` is what the user would do with it ("buy"), `group` a group that it is in (a brand), and `text` a description
    in words of the texts that the model was trained on.
    """

    event: str | None = None
    group: str | None = None
    text: str | None = None


ConditionLike = Condition | Mapping[str, str] | Sequence[Condition | Mapping[str, str]] | Conditions | None
PARTS = tuple(field.name for field in fields(Condition))


@dataclass(frozen=True)
class ConditionSpec:
    """Conditions on the next item that a model was trained with, by name, and how they enter it."""

    events: tuple[str, ...] = ()
    """Names of the events of the training data, sorted."""
    on_event: bool = False
    """Requests may set the next item's event."""
    event_inputs: bool = False
    """The events of the history's items are inputs."""
    event_head: bool = False
    """Probabilities of events given item and history are learned."""
    group: str = ""
    """Column of the items that `groups` are from; empty: none."""
    groups: tuple[str, ...] = ()
    """Names of the groups that requests may set, sorted."""
    text: str = ""
    """Vector column whose encoder encodes conditions that are texts; empty: none."""
    text_width: int = 0
    """Dimensions of a text's vector."""
    film: bool = False
    """Conditions scale and shift the state before the next item is decoded, instead of being added to the input."""
    drop: float = 0.1
    """Share of the conditions that training hides."""
    time_inputs: bool = later_field(False)
    """Times since the previous item are inputs."""
    time_bias: bool = later_field(False)
    """Attention has a bias by the time between two items."""

    @property
    def sizes(self) -> ConditionSizes:
        """Sizes of the model's embeddings of conditions."""
        events = len(self.events)
        return ConditionSizes(
            event=events * self.on_event,
            group=len(self.groups),
            text=self.text_width,
            inputs=events * self.event_inputs,
            film=self.film,
            drop=self.drop,
            head=events * self.event_head,
            time_inputs=self.time_inputs,
            time_bias=self.time_bias,
        )

    @property
    def reads_events(self) -> bool:
        """The model reads the events of the history's items: as inputs, or as conditions that are added to these."""
        return self.event_inputs or (self.on_event and not self.film)

    @property
    def reads_times(self) -> bool:
        """The model reads the times of the history's items."""
        return self.time_inputs or self.time_bias

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a `Condition` that requests may set."""
        known = {"event": self.on_event, "group": bool(self.groups), "text": bool(self.text)}
        return tuple(part for part in PARTS if known[part])

    @property
    def description(self) -> str:
        """Description of the conditions, in words."""
        group = f"a group of items ({self.group}: {_shown(self.groups)})"
        words = {"event": f"an event ({_shown(self.events)})", "group": group, "text": f"a text ({self.text})"}
        inputs = [f"reads the history's events ({_shown(self.events)})"] if self.event_inputs else []
        ways = {"since the item before": self.time_inputs, "between items, in attention": self.time_bias}
        inputs += [f"reads times ({' and '.join(way for way, read in ways.items() if read)})"] * self.reads_times
        values = [f"values of events ({_shown(self.events)})"] if self.event_head else []
        return "; ".join([*(words[part] for part in self.parts), *values, *inputs])

    def event_values(self, values: Mapping[str, float]) -> Float[np.ndarray, " events"]:
        """Values by event number, from 0; events that are not named have 0.

        Raises SemidError for unknown events, for values that are negative or all 0, and for a model without an event
        head.
        """
        if not self.event_head:
            raise SemidError(
                "the model knows no probabilities of events; train one with event_head (--event-head), or ask without"
            )
        by_event = np.zeros(len(self.events), np.float32)
        for name, value in values.items():
            event = _number(name, self.events, "values: unknown event") - 1
            try:
                by_event[event] = value
            except (TypeError, ValueError):
                raise SemidError(f"values: expected a number for event {name!r}, got {value!r}") from None
        if not (np.isfinite(by_event) & (by_event >= 0)).all() or not by_event.any():
            raise SemidError(f"expected finite values of 0 or more, not all 0, got {dict(values)}")
        return by_event

    def event_codes(self, names: Sequence[str | None], *, where: str) -> list[int]:
        """Numbers of events, from 1; 0 for None. Raises SemidError for one that the model does not know."""
        return [0 if name is None else _number(name, self.events, f"{where}: unknown event") for name in names]


# Restored encoders, kept as long as the stored ones are in use.
_RESTORED: WeakKeyDictionary[StoredEncoder, ContentEncoder] = WeakKeyDictionary()


class ItemConditions(NamedTuple):
    """The conditions that items meet, by item row (see `ItemTables`), and the encoder of conditions that are texts."""

    groups: Int[np.ndarray, "items m"] | None = None
    texts: Float[np.ndarray, "items text"] | None = None
    encoder: StoredEncoder | None = None

    def padded(self, new: int) -> ItemConditions:
        """The same with `new` more items, which are in no group and have no text."""
        groups, texts = (None if x is None else np.pad(x, ((0, new), (0, 0))) for x in (self.groups, self.texts))
        return self._replace(groups=groups, texts=texts)

    def of_items(self, rows: Int[np.ndarray, " n"], events: Int[np.ndarray, " n"] | None) -> Conditions:
        """The conditions that items with these events meet, with the first of several groups."""
        group = None if self.groups is None else self.groups[rows, 0]
        return Conditions(events, group, None if self.texts is None else self.texts[rows])


def encode_texts(encoder: StoredEncoder, texts: Sequence[str]) -> Float[np.ndarray, "n width"]:
    """Vectors of texts that belong to no item; zeros for a text without words that the encoder knows."""
    first, *others = encoder.inputs
    table = pa.table({first: pa.array(texts, pa.string()), **{name: pa.nulls(len(texts)) for name in others}})
    return _restored(encoder).encode(table).astype(np.float32)


def _restored(encoder: StoredEncoder) -> ContentEncoder:
    """Restore the encoder, once: a pretrained one reads its files and compiles a program."""
    from semid.encoders import restore_encoders

    if encoder not in _RESTORED:
        _RESTORED[encoder] = restore_encoders([encoder])[encoder.column]
    return _RESTORED[encoder]


def as_conditions(
    condition: ConditionLike, *, number: int, spec: ConditionSpec | None, items: ItemConditions
) -> Conditions | None:
    """Conditions of `number` histories as numbers, with all parts that the model knows; 0 is "any".

    None for a model without conditions. Raises SemidError for unknown parts and names, with the nearest known name.
    """
    if isinstance(condition, Conditions):
        if wrong := [len(part) for part in condition if part is not None and len(part) != number]:
            raise SemidError(f"expected one condition for each of {number} histories, got {wrong[0]}")
        if spec is None:
            return None
        _check_numbers(condition, spec)
        return _complete(condition, number, spec)
    if condition is None or isinstance(condition, (Condition, Mapping)):
        each = [_named(condition)] * number
    else:
        each = [_named(one) for one in condition]
    if len(each) != number:
        raise SemidError(f"expected one condition, or one for each of {number} histories, got {len(each)}")
    given = {part for one in each for part in PARTS if getattr(one, part) is not None}
    _check_known(given, spec)
    if spec is None:
        return None
    events = spec.event_codes([one.event for one in each], where="condition") if spec.on_event else []
    groups = [0 if one.group is None else _number(one.group, spec.groups, "condition: unknown group") for one in each]
    conditions = Conditions(
        np.array(events, np.int32) if "event" in given else None,
        np.array(groups, np.int32) if "group" in given else None,
        _texts([one.text for one in each], items.encoder, spec) if "text" in given else None,
    )
    return _complete(conditions, number, spec)


def own_conditions(
    rows: Int[np.ndarray, " n"],
    events: Int[np.ndarray, " n"] | None,
    parts: Sequence[str],
    *,
    spec: ConditionSpec | None,
    items: ItemConditions,
) -> Conditions:
    """The named parts of the conditions that items with these events meet.

    Raises SemidError for parts that the model does not know, and for the part `event` without events.
    """
    _check_known(parts, spec)
    own = items.of_items(rows, events)._asdict()
    if "event" in parts and events is None:
        raise SemidError("the examples have no events; ask for another part, or evaluate on a dataset with events")
    return Conditions(**{part: own[part] if part in parts else None for part in own})


def _check_known(parts: Iterable[str], spec: ConditionSpec | None) -> None:
    """Raise SemidError naming the first part that the model does not know."""
    known = () if spec is None else spec.parts
    if unknown := sorted(set(parts) - set(known)):
        knows = f"it knows {', '.join(known)}" if known else "it was trained without conditions"
        raise SemidError(
            f"the model cannot be asked for {unknown[0]} ({knows}); train one with on_{unknown[0]} "
            f"(--on-{unknown[0]}), or ask without"
        )


def _check_numbers(given: Conditions, spec: ConditionSpec) -> None:
    """Raise SemidError for events and groups that the model's names have no number for."""
    for part, names in (("event", spec.events), ("group", spec.groups)):
        numbers = getattr(given, part)
        if part not in spec.parts or numbers is None or ((numbers >= 0) & (numbers <= len(names))).all():
            continue
        wrong = numbers[(numbers < 0) | (numbers > len(names))][0]
        raise SemidError(f"condition: expected a number from 0 (any) to {len(names)} as {part}, got {wrong}")


def _named(one: Condition | Mapping[str, str] | None) -> Condition:
    if one is None or isinstance(one, Condition):
        return one or Condition()
    if not isinstance(one, Mapping):
        raise SemidError(f"expected a condition such as {{'event': 'buy'}}, got {one!r}")
    if unknown := [name for name in one if name not in PARTS]:
        raise SemidError(f"a condition has {', '.join(PARTS)}, got {unknown[0]!r}")
    return Condition(**one)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6:,} more" if len(names) > 6 else "")


def _number(name: str, names: Sequence[str], what: str) -> int:
    """Number of a name, from 1."""
    if name in names:
        return names.index(name) + 1
    raise SemidError(f"{what} {name!r}{did_you_mean(name, names)} It knows {_shown(names)}")


def _texts(
    texts: Sequence[str | None], encoder: StoredEncoder | None, spec: ConditionSpec
) -> Float[np.ndarray, "n width"]:
    if encoder is None:
        raise SemidError(f"the model came without the encoder of its text conditions ({spec.text}); train it again")
    distinct = sorted({text for text in texts if text is not None})
    vectors = dict(zip(distinct, encode_texts(encoder, distinct), strict=True))
    if strange := [text for text in distinct if not vectors[text].any()]:
        raise SemidError(f"condition: the encoder {spec.text} knows no word of the text {strange[0]!r}; use others")
    nothing = np.zeros(spec.text_width, np.float32)
    return np.stack([nothing if text is None else vectors[text] for text in texts])


def _complete(conditions: Conditions, number: int, spec: ConditionSpec) -> Conditions:
    """Exactly the parts that the model knows, so that all requests run in one program."""
    absent = Conditions(
        np.zeros(number, np.int32), np.zeros(number, np.int32), np.zeros((number, spec.text_width), np.float32)
    )
    parts = asdict(Condition())
    for part in spec.parts:
        given = getattr(conditions, part)
        parts[part] = getattr(absent, part) if given is None else given
    return Conditions(**parts)
