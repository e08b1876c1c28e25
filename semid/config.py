"""Frozen dataclasses as configuration: to JSON and back, with unknown keys refused by name.

A config belongs to the component it configures, and configs nest. A choice between alternatives is a union of
dataclasses, or their abstract base, written as `{"type": "ClassName", ...}`; or an enum, written as its value (or as
its `stored` attribute, if the field once had another type).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import math
import types
import typing
from numbers import Integral
from typing import Any, TypeVar

from semid.errors import SemidError, did_you_mean

T = TypeVar("T")
E = TypeVar("E", bound=enum.Enum)
_LATER = "later"


def to_dict(config: Any) -> Any:
    """The JSON form of a (nested) frozen dataclass. Raises SemidError for values that JSON cannot hold.

    An integer in a field of floats becomes a float: `epochs=36` and `epochs=36.0` have one form, hence one digest.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kinds = _hints(type(config))
        written = [f for f in dataclasses.fields(config) if not (_LATER in f.metadata and _is_default(config, f))]
        values = {f.name: _with_floats(kinds[f.name], getattr(config, f.name)) for f in written}
        return {"type": type(config).__name__, **{name: to_dict(value) for name, value in values.items()}}
    if isinstance(config, enum.Enum):
        return getattr(config, "stored", config.value)
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, float) and not math.isfinite(config):
        raise SemidError(f"a config holds finite numbers; got {config}")
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise SemidError(f"a config holds plain values and dataclasses; got {type(config).__name__}")


def later_field(default: T) -> T:
    """Dataclass field that was added after configs had been stored. `to_dict` leaves it out at its default, so that
    digests of older artifacts stay the same. A default dict is copied per instance."""
    if isinstance(default, dict):
        return typing.cast(T, dataclasses.field(default_factory=default.copy, metadata={_LATER: True}))
    return dataclasses.field(default=default, metadata={_LATER: True})


def _is_default(config: Any, field: dataclasses.Field) -> bool:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return getattr(config, field.name) == default


def from_dict(cls: type[T], data: dict, *, where: str = "config") -> T:
    """Build `cls` from `to_dict`'s form; missing keys take their defaults.

    Raises SemidError for an unknown key (the nearest is suggested), a missing one without default, or a wrong type.
    """
    return typing.cast(T, _read(cls, data, where))


def choices(base: type) -> dict[str, type[Any]]:
    """Alternatives of an abstract config base: its concrete dataclasses by their `name`, sorted by name.

    A class is an alternative if it defines `name` itself, not if it inherits it. If `name` is a field, the key is the
    name of the class. Classes of a module appear once it is imported.
    """
    below = [cls for cls in _subclasses(base) if dataclasses.is_dataclass(cls)]
    own = [cls for cls in below if "name" in vars(cls) or "name" in inspect.get_annotations(cls)]
    return dict(sorted((vars(cls).get("name", cls.__name__), cls) for cls in own))


def _subclasses(base: type) -> list[type]:
    children: list[type] = base.__subclasses__()
    return [cls for child in children for cls in (child, *_subclasses(child))]


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _with_floats(kind: Any, value: Any) -> Any:
    """`value` with integers converted to floats where the declared type allows floats and no integers."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is float and type(value) is int:
        return float(value)
    if origin in (typing.Union, types.UnionType) and int not in args:
        return functools.reduce(lambda converted, one: _with_floats(one, converted), args, value)
    if origin is tuple and isinstance(value, (tuple, list)):
        inner = args[:1] * len(value) if args[1:] == (Ellipsis,) else args
        return tuple(_with_floats(one, item) for one, item in zip(inner, value, strict=True))
    return value


def _read(kind: Any, value: Any, where: str) -> Any:
    if inspect.isabstract(kind):
        return _read_choice(kind, value, where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_union(args, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SemidError(f"{where}: expected a list, got {value!r}")
        inner = args[:1] * len(value) if args[1:] == (Ellipsis,) else args
        if len(inner) != len(value):
            raise SemidError(f"{where}: expected {len(inner)} values, got {len(value)}")
        return tuple(_read(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise SemidError(f"{where}: expected names and values, got {value!r}")
        return {key: _read(args[1], one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return enum_member(kind, value, where)
    if kind is float and type(value) is int:
        return float(value)
    if kind is not Any and origin is None and type(value) is not kind:
        raise SemidError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _read_dataclass(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise SemidError(f"{where}: expected the keys of {cls.__name__}, got {value!r}")
    if value.get("type", cls.__name__) != cls.__name__:
        raise SemidError(f"{where}: expected type {cls.__name__}, got {value['type']!r}")
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    known = {}
    for key in [name for name in value if name != "type"]:
        if key not in fields:
            raise SemidError(f"{where}: unknown key {key!r}{did_you_mean(key, fields)}")
        known[key] = _read(hints[key], value[key], f"{where}.{key}")
    for name, f in fields.items():
        if name not in known and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise SemidError(f"{where}: key {name!r} is missing")
    return cls(**known)


def _read_choice(base: Any, value: Any, where: str) -> Any:
    """A config of the subclass of `base` that the key `type` names."""
    if not isinstance(value, dict):
        raise SemidError(f"{where}: expected the keys of a {base.__name__}, got {value!r}")
    below = [cls for cls in _subclasses(base) if dataclasses.is_dataclass(cls) and not inspect.isabstract(cls)]
    by_type = {cls.__name__: cls for cls in below}  # also classes that are no alternatives, since `to_dict` writes them
    if (name := value.get("type")) not in by_type:
        named = [cls.__name__ for cls in choices(base).values()]
        hint = did_you_mean(name, named, cutoff=0.6)
        own = "; a class of your own is known once its module is imported" if name is not None else ""
        raise SemidError(f"{where}.type: expected one of {', '.join(named)}, got {name!r}{hint}{own}")
    return _read_dataclass(by_type[name], value, where)


def _read_union(kinds: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if isinstance(value, dict) and len(kinds) > 1:
        by_name = {kind.__name__: kind for kind in kinds}
        if value.get("type") not in by_name:
            raise SemidError(f"{where}.type: expected one of {', '.join(by_name)}, got {value.get('type')!r}")
        return _read(by_name[value["type"]], value, where)
    return _read(kinds[0], value, where)


def enum_member(kind: type[E], value: Any, where: str) -> E:
    """Member of an enum, given as member or value. Raises SemidError listing the valid values."""
    try:
        return kind(value)
    except ValueError:
        raise SemidError(f"{where}: expected one of {', '.join(str(m.value) for m in kind)}, got {value!r}") from None


def difference(old: dict, new: dict, *, prefix: str = "", most: int | None = 4) -> str:
    """The first `most` entries in which two JSON configs differ (None: all), for a message: `epochs: 3 -> 4, ...`.

    Empty if they agree. An absent entry equals None, and 36 equals 36.0, so that configs written before a field was
    added or became a float still match. If the `type` differs, only that is shown, as other keys are not comparable.
    """
    old_type, new_type = old.get("type"), new.get("type")
    other_type = None not in (old_type, new_type) and old_type != new_type
    changes = []
    for key in ["type"] if other_type else sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes.append(difference(a, b, prefix=f"{prefix}{key}.", most=most))
        elif a != b:
            changes.append(f"{prefix}{key}: {_short(a)} -> {_short(b)}")
    return ", ".join([change for change in changes if change][:most])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def is_whole(number: object) -> bool:
    """True for integers, numpy's too, but not for booleans."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def check_range(
    config: Any,
    *names: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise SemidError unless the numbers in these fields (numbers, tuples of them, None) are finite and in the range.

    A range has one lower bound, `at_least` or `above`, and at most one upper bound, `at_most` or `below`.
    """
    low, high = above if at_least is None else at_least, below if at_most is None else at_most
    if high is None:
        expected = f"of at least {low}" if above is None else f"above {low}"
    else:
        expected = f"in {'[' if above is None else '('}{low}, {high}{']' if below is None else ')'}"
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            in_range = (low < number or number == at_least) and (high is None or number < high or number == at_most)
            if not in_range or number == math.inf:
                finite = " and finite" if number == math.inf else ""
                raise SemidError(f"expected {name} {expected}{finite}, got {value}")


def check_seed(seed: int | None) -> None:
    """Raise SemidError for a seed that NumPy refuses (negative) or whose upper bits JAX would drop (2**32 and more)."""
    if seed is not None and not 0 <= seed < 2**32:
        raise SemidError(f"expected a seed {'of 0 or more' if seed < 0 else 'below 2**32'}, got {seed}")
