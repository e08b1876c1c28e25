"""Fields of a command by their command-line names, including those of its configs and their chosen alternatives."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tyro

from semid.config import choices

Path = tuple[str, ...]
MISSING = dataclasses.MISSING


@dataclass(frozen=True)
class Field:
    """A field below a command: `path` are the attributes that lead to it, `name` is its key in a file of options.

    The first `scope` parts of the name are the choices that it belongs to, the rest is the option: `model`, `dim` for
    `--dim`.
    """

    path: Path
    name: Path
    scope: int
    kind: Any
    alternatives: Mapping[str, type | None]
    """Config classes possible here, by name; empty for a plain value."""

    def rank(self, key: Path) -> int | None:
        """How `key` names the field: 0 as in files, 1 as an option, 2 by part of its path; None: not at all."""
        if key in (self.name, self.name[self.scope :]):
            return int(key != self.name)
        above = iter(self.path[:-1])
        return 2 if key[-1:] == self.path[-1:] and all(part in above for part in key[:-1]) else None


def fields_below(
    cls: Any, chosen: Mapping[Path, type | None], default: Any = MISSING, *, path: Path = (), listed: bool = False
) -> Iterator[Field]:
    """All fields, configs before their own fields, for the chosen alternatives or else the defaults.

    For a config inside a list (`listed`), names are complete, as the command line does not show them.
    """
    yield from _fields(cls, chosen, default, path, path, 0, None if listed else False)


def _fields(
    cls: Any, chosen: Mapping[Path, type | None], default: Any, path: Path, prefix: Path, scope: int, short: bool | None
) -> Iterator[Field]:
    """`short`: omit the names of enclosing configs; None: never omit, for fields not shown on the command line."""
    hints = typing.get_type_hints(cls, include_extras=True)
    if short is not None:
        short = short or tyro.conf.OmitArgPrefixes in getattr(cls, "__tyro_markers__", ())
    for field in dataclasses.fields(cls):
        kind, marks = unwrapped(hints[field.name])
        if tyro.conf.Fixed in marks or not field.init:
            continue
        below = (*path, field.name)
        omitted = None if short is None or tyro.conf.Suppress in marks else short or tyro.conf.OmitArgPrefixes in marks
        own = next((mark.name for mark in marks if getattr(mark, "name", None) is not None), field.name)
        name = (*(prefix[:scope] if omitted else prefix), own.replace("-", "_"))
        alternatives = {} if any(isinstance(mark, SPEC) for mark in marks) else alternatives_of(kind)
        if own:
            yield Field(below, name, scope, hints[field.name], alternatives)
        value = default_of(field, default)
        found = chosen.get(below, sole(alternatives) if value is MISSING else None if value is None else type(value))
        if found and alternatives:
            inner = value if type(value) is found else MISSING
            if len(alternatives) - ("none" in alternatives) > 1:
                yield from _fields(found, chosen, inner, below, name, len(name), omitted)
            else:
                kept = name if own else prefix
                yield from _fields(found, chosen, inner, below, kept[:scope] if omitted else kept, scope, omitted)


SPEC = tyro.constructors.PrimitiveConstructorSpec


def default_of(field: dataclasses.Field, default: Any) -> Any:
    """The field's value in an instance, else its own default; MISSING if there is none."""
    if default is not MISSING:
        return getattr(default, field.name)
    return field.default_factory() if callable(field.default_factory) else field.default


def unwrapped(kind: Any) -> tuple[Any, tuple]:
    """A type without its annotations, and the annotations."""
    marks: tuple = ()
    while typing.get_origin(kind) is typing.Annotated:
        marks += tuple(kind.__metadata__)
        kind = kind.__origin__
    return kind, marks


def alternatives_of(kind: Any) -> dict[str, type | None]:
    """Config classes that a field declared as `kind` may have, by command-line name; empty for plain values."""
    kind, marks = unwrapped(kind)
    if inspect.isabstract(kind):
        return dict(choices(kind))
    if dataclasses.is_dataclass(kind):
        return {next(_names(kind, marks)): typing.cast(type, kind)}
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return {}
    found: dict[str, type | None] = {}
    for one in typing.get_args(kind):
        found |= {"none": None} if one is type(None) else alternatives_of(one)
    return found if any(found.values()) else {}


def sole(alternatives: Mapping[str, type | None]) -> type | None:
    """The only class if there is no choice, else None."""
    return next(iter(alternatives.values())) if len(alternatives) == 1 else None


def _names(cls: Any, marks: tuple) -> Iterator[str]:
    """Name of a subcommand: declared, the class's own, or derived from the name of the class."""
    yield from (mark.name for mark in marks if isinstance(getattr(mark, "name", None), str))
    if isinstance(name := vars(cls).get("name"), str) and "name" not in cls.__dataclass_fields__:
        yield name
    yield re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()


def value_at(config: Any, path: Path) -> Any:
    """The value at a path of attributes."""
    return functools.reduce(getattr, path, config)


def chosen_in(config: Any) -> dict[Path, type | None]:
    """The chosen class at each choice within a config, by path."""
    choices = [field.path for field in fields_below(type(config), {}, config) if len(field.alternatives) > 1]
    values = {path: value_at(config, path) for path in choices}
    return {path: None if value is None else type(value) for path, value in values.items()}
