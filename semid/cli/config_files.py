"""Options of a command in a YAML file (`--config run.yaml`), read as its defaults and written next to its output."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
import yaml

from semid import artifacts
from semid.cli.fields import (
    MISSING,
    SPEC,
    Field,
    alternatives_of,
    chosen_in,
    default_of,
    fields_below,
    sole,
    unwrapped,
    value_at,
)
from semid.config import to_dict
from semid.errors import SemidError, did_you_mean
from semid.progress import LOG

# Options that name the artifact that a command makes; the first one that names an artifact counts.
_OUTPUTS = ("new_catalog", "out")
Key = tuple[str, ...]


class Entry(NamedTuple):
    """A value of a file and its key, which includes the keys of the mappings around it. `within` is the key of the list
    for an entry inside a list's element."""

    key: Key
    node: yaml.Node
    file: str
    within: Key = ()

    @property
    def where(self) -> str:
        return f"{self.file}: line {self.node.start_mark.line + 1}: {'.'.join((*self.within, *self.key))}"


def read_entries(file: str | Path) -> list[Entry]:
    """Entries of a YAML file. Raises SemidError naming the line that is not YAML, or a key that is given twice."""
    return entries_of(read_mapping(file), str(file))


def entries_of(mapping: yaml.MappingNode, file: str) -> list[Entry]:
    """Keys of a mapping in a file."""
    return list(_entries(mapping, (), file))


def read_mapping(file: str | Path) -> yaml.MappingNode:
    """The mapping of a YAML file, empty for an empty file. Raises SemidError naming the line that is not YAML."""
    text = _text(artifacts.fetched(file), str(file))
    try:
        if alias := next((event for event in yaml.parse(text) if isinstance(event, yaml.AliasEvent)), None):
            raise SemidError(f"{file}: line {alias.start_mark.line + 1}: aliases (*) are not read; write the value")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise SemidError(f"{file}: {line}not valid YAML ({getattr(error, 'problem', None) or error})") from None
    except RecursionError:
        raise SemidError(f"{file}: nested too deeply to be options") from None
    if root is None:
        return yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(root, yaml.MappingNode):
        raise SemidError(f"{file}: expected options as `key: value`, got {_shown(root)}")
    return root


def _text(path: Path, file: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SemidError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise SemidError(f"{file}: not a readable text file ({error})") from None


def _entries(mapping: yaml.MappingNode, above: Key, file: str, within: Key = ()) -> Iterator[Entry]:
    seen = set()
    for key_node, node in mapping.value:
        key = (*above, *str(key_node.value).replace("-", "_").split("."))
        if not isinstance(key_node, yaml.ScalarNode) or key in seen:
            what = "given twice; keep one" if key in seen else "expected the name of an option"
            line = key_node.start_mark.line + 1
            raise SemidError(f"{file}: line {line}: {'.'.join((*within, *key))}: {what}")
        seen.add(key)
        yield Entry(key, node, file, within)


Chosen = dict[Key, type | None]
Values = dict[Key, tuple[Any, Entry]]


def build(cls: Any, entries: Sequence[Entry], *, chosen: Mapping[Key, type | None], listed: bool = False) -> Any:
    """Build `cls` from entries. Where they choose no alternative of a config, that of `chosen` (by path) or the default
    is used.

    Fields without any value become `tyro.MISSING`. Raises SemidError naming the line of a key that is unknown (with the
    nearest one) or ambiguous, and of a value of a wrong type.
    """
    found, values = _resolved(cls, entries, chosen, listed)
    return _built(cls, (), found, values, MISSING)


def _resolved(
    cls: Any, entries: Sequence[Entry], chosen: Mapping[Key, type | None], listed: bool = False
) -> tuple[Chosen, Values]:
    """Chosen alternatives and plain values, by path. Choices are resolved first, as other keys may belong to them."""
    chosen = dict(chosen)
    left = list(_opened(entries))
    while True:
        fields = list(fields_below(cls, chosen, listed=listed))
        named = {id(entry): found for entry in left if (found := _choice(fields, entry))}
        if not named:
            break
        chosen |= dict(named.values())
        left = [entry for entry in left if id(entry) not in named]
    values: Values = {}
    for entry in _joined(fields, left):
        field = _field(fields, entry)
        if field.path in values:
            raise SemidError(f"{entry.where}: given before as {'.'.join(values[field.path][1].key)}; keep one")
        values[field.path] = _value(field.kind, entry), entry
    return chosen, values


def _opened(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Entries and, after each, the entries of its mapping."""
    for entry in entries:
        yield entry
        if isinstance(entry.node, yaml.MappingNode):
            yield from _opened(list(_entries(entry.node, entry.key, entry.file, entry.within)))


def _joined(fields: Sequence[Field], entries: Sequence[Entry]) -> Iterator[Entry]:
    """Entries without mappings that only group others, and without the parts of mappings that are values."""
    inside: list[Key] = []
    for entry in entries:
        if any(entry.key[: len(key)] == key for key in inside):
            continue
        if isinstance(entry.node, yaml.MappingNode):
            field = _field(fields, entry, groups=True)
            if field.alternatives:
                continue
            inside.append(entry.key)
        yield entry


def _choice(fields: Sequence[Field], entry: Entry) -> tuple[Key, type | None] | None:
    """Path and class of the choice that an entry makes: `model: sasrec`, or `type: sasrec` inside of it."""
    if not isinstance(entry.node, yaml.ScalarNode):
        return None
    key = entry.key[:-1] if entry.key[-1] == "type" else entry.key
    field = _best(fields, key, entry) if key else _root(fields, entry)
    if field is None or len(field.alternatives) < (1 if key != entry.key else 2):
        return None
    return field.path, _alternative(field.alternatives, entry)


def _root(fields: Sequence[Field], entry: Entry) -> Field | None:
    """The field that a `type` at the top of a file chooses, if there is only one candidate."""
    of_type = [field for field in fields if entry.node.value in _by_name(field.alternatives)]
    return of_type[0] if len(of_type) == 1 else None


def _by_name(alternatives: Mapping[str, type | None]) -> dict[str, type | None]:
    return {**{cls.__name__: cls for cls in alternatives.values() if cls}, **alternatives}


def _alternative(alternatives: Mapping[str, type | None], entry: Entry) -> type | None:
    if _is_null(entry.node) and "none" in alternatives:
        return None
    names, name = _by_name(alternatives), str(entry.node.value)
    if name not in names:
        hint = did_you_mean(name, names, cutoff=0.3)
        raise SemidError(f"{entry.where}: expected one of {', '.join(alternatives)}, got {name!r}{hint}")
    return names[name]


def _best(fields: Sequence[Field], key: Key, entry: Entry) -> Field | None:
    """The field that a key names. Raises SemidError if several match equally well."""
    ranks = [(rank, len(field.path), field) for field in fields if (rank := field.rank(key)) is not None]
    if not ranks:
        return None
    ranks.sort(key=lambda one: one[:2])
    if len(ranks) > 1 and ranks[0][:2] == ranks[1][:2]:
        either = " or ".join(".".join(field.name) for *_, field in ranks[:2])
        raise SemidError(f"{entry.where}: may be {either}; write which")
    return ranks[0][2]


def _field(fields: Sequence[Field], entry: Entry, *, groups: bool = False) -> Field:
    field = _best(fields, entry.key, entry)
    if field is None or (field.alternatives and not groups):
        what = "expected its options, got a value" if field else "unknown key"
        known = [".".join(field.name[at:]) for field in fields for at in (0, field.scope)]
        hint = "" if field else did_you_mean(".".join(entry.key), known, cutoff=0.3)
        raise SemidError(f"{entry.where}: {what}{hint}")
    return field


def _built(cls: Any, path: Key, chosen: Chosen, values: Values, default: Any) -> Any:
    """An instance of `cls` from the values below `path`; `default` itself if there are none."""
    given = [key for key in (*values, *chosen) if key[: len(path)] == path]
    if not given and default is not MISSING:
        return default
    hints, made = typing.get_type_hints(cls, include_extras=True), {}
    for field in [field for field in dataclasses.fields(cls) if field.init]:
        below = (*path, field.name)
        made[field.name] = _part(unwrapped(hints[field.name])[0], below, chosen, values, default_of(field, default))
    if tyro.MISSING in made.values():
        return _unfinished(cls, made)
    with _naming([entry for key, (_, entry) in values.items() if key[: len(path)] == path]):
        return cls(**made)


def _part(kind: Any, path: Key, chosen: Chosen, values: Values, default: Any) -> Any:
    if path in values:
        return values[path][0]
    cls, alternatives = chosen.get(path, None if default is MISSING else type(default)), alternatives_of(kind)
    if path in chosen and cls is None:
        return None
    if default is MISSING and any(key[: len(path)] == path for key in values):
        cls = cls or sole(alternatives)
    if cls and alternatives:
        return _built(cls, path, chosen, values, default if type(default) is cls else MISSING)
    return tyro.MISSING if default is MISSING else default


def _unfinished(cls: Any, values: Mapping[str, Any]) -> Any:
    """An instance of `cls` without the values that the command line must provide."""
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


@contextlib.contextmanager
def _naming(entries: Sequence[Entry]) -> Iterator[None]:
    """Add the line of the option to the error of a config that refuses it."""
    try:
        yield
    except ValueError as error:
        about = [entry for entry in entries if entry.key[-1] in str(error)] or entries
        if not about:
            raise SemidError(str(error)) from None
        raise SemidError(f"{about[0].where}: {str(error).removeprefix(f'{about[0].key[-1]}: ')}") from None


def _value(kind: Any, entry: Entry) -> Any:
    """The value of an entry, as the type `kind`."""
    kind, marks = unwrapped(kind)
    node = entry.node
    if spec := next((mark for mark in marks if isinstance(mark, SPEC)), None):
        text = _of_text(str, entry)
        with _naming([entry]):
            return spec.instance_from_str([text])
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType) and not alternatives_of(kind):
        return _of_union(args, entry)
    if origin is tuple:
        return _of_tuple(args, entry)
    if origin is dict and isinstance(node, yaml.MappingNode):
        pairs = [(str(key.value), entry._replace(node=value)) for key, value in node.value]
        return {key: _value(args[1], value) for key, value in pairs}
    if alternatives := alternatives_of(kind):
        return _of_config(alternatives, entry)
    if origin is typing.Literal:
        return _of_names({str(value): value for value in args}, entry)
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        stored = {json.dumps(to_dict(one)): one for one in kind}
        return stored.get(str(entry.node.value)) or _of_names({str(one.value): one for one in kind}, entry)
    return _of_text(kind, entry)


def _of_union(kinds: Sequence[Any], entry: Entry) -> Any:
    if _is_null(entry.node) and type(None) in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    for kind in kinds[:-1]:
        with contextlib.suppress(SemidError):
            return _value(kind, entry)
    return _value(kinds[-1], entry)


def _of_tuple(kinds: Sequence[Any], entry: Entry) -> tuple:
    nodes = entry.node.value if isinstance(entry.node, yaml.SequenceNode) else [entry.node]
    each = [kinds[0]] * len(nodes) if kinds[1:] == (Ellipsis,) else kinds
    if len(each) != len(nodes):
        raise SemidError(f"{entry.where}: expected {len(each)} values, got {len(nodes)}")
    return tuple(_value(kind, entry._replace(node=node)) for kind, node in zip(each, nodes, strict=True))


def _of_config(alternatives: Mapping[str, type | None], entry: Entry) -> Any:
    """A config inside a list: a name, or its options, with `type` if there are alternatives."""
    if not isinstance(entry.node, yaml.MappingNode):
        cls = _alternative(alternatives, entry)
        return cls and cls()
    inside = list(_entries(entry.node, (), entry.file, (*entry.within, *entry.key)))
    named = next((one for one in inside if one.key == ("type",)), None)
    cls = _alternative(alternatives, named) if named else next(iter(alternatives.values()))
    made = cls and build(cls, [one for one in inside if one is not named], chosen={}, listed=True)
    missing = [name for name, value in vars(made).items() if value is tyro.MISSING]
    if missing:
        raise SemidError(f"{entry.where}: {missing[0]} is missing; give it")
    return made


def _of_names(named: Mapping[str, Any], entry: Entry) -> Any:
    name = _scalar(entry, f"one of {', '.join(named)}")
    if name not in named:
        hint = did_you_mean(name, named, cutoff=0.3)
        raise SemidError(f"{entry.where}: expected one of {', '.join(named)}, got {name!r}{hint}")
    return named[name]


TRUTH = {"true": True, "false": False}


def _of_text(kind: Any, entry: Entry) -> Any:
    text = _scalar(entry, kind.__name__)
    try:
        if kind is str and _is_null(entry.node):
            raise ValueError
        return TRUTH[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        what = "true or false" if kind is bool else f"a value of type {kind.__name__}"
        raise SemidError(f"{entry.where}: expected {what}, got {_shown(entry.node)}") from None


def _scalar(entry: Entry, what: str) -> str:
    if not isinstance(entry.node, yaml.ScalarNode):
        raise SemidError(f"{entry.where}: expected {what}, got {_shown(entry.node)}")
    return str(entry.node.value)


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "null" if _is_null(node) else repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def to_yaml(command: Any) -> str:
    """All options of a command, including defaults, in the form that `build` reads."""
    tree: dict[str, Any] = {}
    for field in fields_below(type(command), {}, command):
        value = value_at(command, field.path)
        if not field.alternatives:
            _put(tree, field.name, _plain(field.kind, value))
        elif len(field.alternatives) > 1:
            names = {cls: name for name, cls in field.alternatives.items()}
            _put(tree, field.name, None if value is None else {"type": names[type(value)]})
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def _put(tree: dict[str, Any], name: Key, value: Any) -> None:
    for part in name[:-1]:
        tree = tree.setdefault(part.replace("_", "-"), {})
    tree[name[-1].replace("_", "-")] = value


def _plain(kind: Any, value: Any) -> Any:
    """A value as plain YAML types."""
    kind, marks = unwrapped(kind)
    if spec := next((mark for mark in marks if isinstance(mark, SPEC)), None):
        return " ".join(spec.str_from_instance(value))
    if isinstance(value, tuple):
        return [_plain(Any, one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(Any, one) for key, one in value.items()}
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else to_dict(value)


def with_file(cls: Any, file: str | Path, first: str, parse: Callable[[Any], Any]) -> Any:
    """The command that `parse` builds from its words, with a file's options as defaults.

    `first` is the first word: it may name an alternative of a choice without default (`prepare parquet`).
    """
    entries = read_entries(file)
    by_word = {field.path: field.alternatives[first] for field in fields_below(cls, {}) if first in field.alternatives}
    default = build(cls, entries, chosen=by_word)
    command = parse(default)
    before, after = chosen_in(default), chosen_in(command)
    if by_words := {path: found for path, found in after.items() if before.get(path, found) is not found}:
        named, _ = _resolved(cls, entries, by_word)
        open_to_words = {path: found for path, found in by_words.items() if path not in named}
        command = parse(build(cls, entries, chosen=by_word | open_to_words)) if open_to_words else command
    return command


def write_beside(name: str, command: Any) -> None:
    """Write all options of a command into the folder of the artifact that it made, for `--config`."""
    if name == "package":  # packages are for others, and options contain paths of this machine
        return
    paths = {field.path[-1]: field.path for field in fields_below(type(command), {}, command)}
    given = [value_at(command, paths[option]) for option in _OUTPUTS if option in paths]
    folders = [artifacts.resolved(path) for path in given if path]
    if folder := next((folder for folder in folders if (folder / artifacts.MANIFEST).is_file()), None):
        head = f"# semid {name} --config {artifacts.CONFIG}"
        _write_config(folder / artifacts.CONFIG, f"{head}\n{to_yaml(command)}")


def _write_config(file: Path, text: str) -> None:
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        try:
            with artifacts.replacing(file) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:  # an existing artifact may be in a read-only folder
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            LOG.info("%s: not written (%s); the artifact is as it was", file, error.strerror)
