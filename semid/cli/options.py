"""Conversion of a command's words for its parser, and messages about words that do not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Annotated, Any, TypeVar, cast

import tyro

from semid.data import HeldOutItems
from semid.errors import SemidError

# Options may come in any order, before or after the name of a model, a method or a rule. Those of the default one need
# no name.
OPTIONS = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.EnumChoicesFromValues, tyro.conf.CascadeSubcommandArgs)

REGISTRY = tyro.constructors.ConstructorRegistry()
T = TypeVar("T")
_asked: list[object] = []


def _own_spec(info: Any, spec_of: Callable[[Any], T]) -> T | None:
    """What the parser makes of a type without the rule that calls this; None in the parser's call of that rule."""
    if any(info is one for one in _asked):
        return None
    _asked.append(info)
    try:
        return spec_of(info)
    finally:
        _asked.pop()


@REGISTRY.struct_rule
def _with_joined_helps(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """The parser's fields with unwrapped help texts, since it keeps the line breaks of their source."""
    spec = _own_spec(info, tyro.constructors.ConstructorRegistry.get_struct_spec)
    if not isinstance(spec, tyro.constructors.StructConstructorSpec):
        return None
    return dataclasses.replace(
        spec, fields=tuple(dataclasses.replace(field, helptext=_joined(field.helptext)) for field in spec.fields)
    )


@REGISTRY.primitive_rule
def _names_once(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Mappings of NAME VALUE pairs, refused if a name is given twice: the parser takes the last."""
    if info.type_origin is not dict:
        return None
    spec = _own_spec(info, tyro.constructors.ConstructorRegistry.get_primitive_spec)
    if not isinstance(spec, tyro.constructors.PrimitiveConstructorSpec):
        return None

    def distinct(words: list[str]) -> Any:
        names = words[::2]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"expected every name once, got {twice[0]!r} twice; keep one")
        return spec.instance_from_str(words)

    return dataclasses.replace(spec, instance_from_str=distinct)


def _joined(text: str | Callable[[], str | None] | None) -> Callable[[], str | None]:
    """Function that returns the text with the lines of each paragraph joined."""

    def joined() -> str | None:
        made = text() if callable(text) else text
        return made and re.sub(r"(?<!\n)\n(?!\n)", " ", made)

    return joined


@REGISTRY.struct_rule
def _held_out_items(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """HeldOutItems with its seed as --split-seed, since --seed is the simulated world's."""
    if info.type is not HeldOutItems:
        return None
    given = info.default if isinstance(info.default, HeldOutItems) else HeldOutItems()
    seed = Annotated[int, tyro.conf.arg(name="split-seed")]
    field = tyro.constructors.StructFieldSpec
    return tyro.constructors.StructConstructorSpec(
        HeldOutItems,
        (
            field("fraction", float, given.fraction, "Share of the items held out."),
            field("seed", cast(type, seed), given.seed, "Seed of the choice (--seed is the simulated world's)."),
        ),
    )


# Options of commands that name an alternative of a config (a subcommand for the parser), and where its name goes.
_CHOICES = {
    "prepare": ("--split-rule", 1),
    "tokenize": ("--method", 0),
    "train": ("--model", 0),
    "compile": ("--model", 0),
}
# Options of choices that have another name, as another option has theirs.
_RENAMED = {"--split-rule.seed": "--split-seed"}
# Names of options in other tools.
_ELSEWHERE = {
    "--lr": "--learning-rate",
    "--wd": "--weight-decay",
    "--bs": "--batch-size",
    "--num-epochs": "--epochs",
    "--num-beams": "--beam-size",
    "--beams": "--beam-size",
    "--top-k": "-k",
    "--output": "--out",
    "-o": "--out",
}
_PACKAGES = ("semid", "quantizers", "seq_models")


def file_of_options(command: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file after `--config`, and the other words. Raises SemidError if none follows, or if there are several."""
    files, others, rest = [], [], iter(words)
    for word in rest:
        option, equals, file = word.partition("=")
        if option != "--config":
            others.append(word)
        elif file := file if equals else next(rest, ""):
            files.append(file)
        else:
            raise SemidError(f"{command}: expected a file of options after --config, got none")
    if len(files) > 1:
        raise SemidError(f"{command}: expected one --config, got {len(files)}: {', '.join(files)}")
    return next(iter(files), None), others


def split_equals(words: Sequence[str], option: str) -> list[str]:
    """Words with `OPTION=VALUE` split into two words."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith(f"{option}=") else [word])]


def check_once(command: str, words: Iterable[str]) -> None:
    """Raise SemidError for an option that is given twice: the parser takes the last and drops the values before."""
    options = Counter(word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--"))
    for option, times in options.items():
        if times > 1:
            raise SemidError(f"{command}: {option} is given {times} times; give it once, with all of its values")


def as_typed(command: str, words: Sequence[str]) -> list[str]:
    """Words with `--model NAME` replaced by the subcommand NAME, and its options `--model.dim 64` by `--dim 64`."""
    if command not in _CHOICES:
        return list(words)
    option, at = _CHOICES[command]
    words = split_equals(words, option)
    names, others, rest = [], [], iter(words)
    for word in rest:
        if word == option:
            names += [name] if (name := next(rest, None)) else []
        else:
            others.append(_own_name(word, option))
    at = at if others and not others[0].startswith("-") else 0
    return [*others[:at], *names, *others[at:]]


def _own_name(word: str, option: str) -> str:
    """An option of a choice without the prefix of the choice; other words unchanged."""
    name, equals, value = word.partition("=")
    return (
        _RENAMED.get(name, name.replace(f"{option}.", "--", 1)) + equals + value
        if name.startswith(f"{option}.")
        else word
    )


@contextlib.contextmanager
def hints(command: str, words: Sequence[str]) -> Iterator[None]:
    """Add hints to the parser's messages; a value that a config refuses gives one line with its option."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except (SystemExit, ValueError) as stop:
        if refusal := _refusal(stop):
            print(f"semid {command}: {_options_of(refusal, words)}{refusal}", file=sys.stderr)
            raise SystemExit(2) from None
        sys.stderr.write(said.getvalue())
        given = {word.partition("=")[0] for word in words}
        for theirs, ours in _ELSEWHERE.items():
            if theirs in given and isinstance(stop, SystemExit) and stop.code:
                print(f"semid {command}: {theirs} is called {ours} here", file=sys.stderr)
        raise


def _refusal(stop: BaseException) -> ValueError | None:
    """The ValueError of a semid config that made the parser stop, if any."""
    error: BaseException | None = stop
    while error is not None:
        if isinstance(error, ValueError) and _frames(error)[-1].f_globals["__name__"].startswith(_PACKAGES):
            return error
        error = error.__context__
    return None


def _frames(error: ValueError) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _options_of(refusal: ValueError, words: Sequence[str]) -> str:
    """The given options, with values, that set fields of the refusing config; only those that it names, if any."""
    owners = [frame.f_locals.get("self") for frame in _frames(refusal)]
    fields = {field.name for owner in owners if dataclasses.is_dataclass(owner) for field in dataclasses.fields(owner)}
    given: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            given[name] = [value] if value else []
        elif given:
            given[next(reversed(given))].append(word)
    spelled = {option: option.rpartition(".")[2].removeprefix("--").replace("-", "_") for option in given}
    own = [option for option in given if spelled[option] in fields]
    named = [option for option in own if re.search(rf"\b{spelled[option]}\b", str(refusal))]
    chosen = [" ".join([option, *given[option]]) for option in named or own]
    return f"{', '.join(chosen)}: " if chosen else ""
