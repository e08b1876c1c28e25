"""Words of a command as its parser takes them, and what is said of those that do not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Annotated, cast

import tyro

from semid.data import HeldOutItems
from semid.errors import SemidError

# Options stand in any order, before or after the name of a model, a method or a rule, and those of the default one
# need no name.
OPTIONS = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.EnumChoicesFromValues, tyro.conf.CascadeSubcommandArgs)

REGISTRY = tyro.constructors.ConstructorRegistry()
_asked: list[tyro.constructors.StructTypeInfo] = []


@REGISTRY.struct_rule
def _with_joined_helps(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """Fields as the parser has them, with helps that it wraps itself: it keeps the line breaks of their source."""
    if any(info is one for one in _asked):
        return None
    _asked.append(info)
    try:
        spec = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
    finally:
        _asked.pop()
    if not isinstance(spec, tyro.constructors.StructConstructorSpec):
        return None
    return dataclasses.replace(
        spec, fields=tuple(dataclasses.replace(field, helptext=_joined(field.helptext)) for field in spec.fields)
    )


def _joined(text: str | Callable[[], str | None] | None) -> Callable[[], str | None]:
    """Function that gives a text with the lines of each paragraph joined."""

    def joined() -> str | None:
        made = text() if callable(text) else text
        return made and re.sub(r"(?<!\n)\n(?!\n)", " ", made)

    return joined


@REGISTRY.struct_rule
def _held_out_items(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """HeldOutItems, its seed as --split-seed: --seed is the simulated world's."""
    if info.type is not HeldOutItems:
        return None
    given = info.default if isinstance(info.default, HeldOutItems) else HeldOutItems()
    seed = Annotated[int, tyro.conf.arg(name="split-seed")]
    field = tyro.constructors.StructFieldSpec
    return tyro.constructors.StructConstructorSpec(
        HeldOutItems,
        (
            field("fraction", float, given.fraction, "Share of the items held out."),
            field("seed", cast(type, seed), given.seed, "Seed that draws them (--seed is the simulated world's)."),
        ),
    )


# The option of a command that names a choice of configs (subcommands to the parser), and where the name goes.
_CHOICES = {
    "prepare": ("--split-rule", 1),
    "tokenize": ("--method", 0),
    "train": ("--model", 0),
    "compile": ("--model", 0),
}
# The name of a choice's option that is not its own: another option has that name.
_RENAMED = {"--split-rule.seed": "--split-seed"}
# Names of other tools for options.
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
    """The file after `--config`, and the other words. Raises SemidError where none follows, or several are named."""
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
    """Words with `OPTION=VALUE` of this option as two words."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith(f"{option}=") else [word])]


def as_typed(command: str, words: Sequence[str]) -> list[str]:
    """Words with `--model NAME` as the subcommand NAME, and its options `--model.dim 64` as `--dim 64`."""
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
    """An option of a choice without the choice's name before it; any other word as it is."""
    name, equals, value = word.partition("=")
    return (
        _RENAMED.get(name, name.replace(f"{option}.", "--", 1)) + equals + value
        if name.startswith(f"{option}.")
        else word
    )


@contextlib.contextmanager
def hints(command: str, words: Sequence[str]) -> Iterator[None]:
    """Let the parser say what does not fit; a value that a config refuses is said in one line, after its option."""
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
    """The ValueError of a config of ours that made the parser stop."""
    error: BaseException | None = stop
    while error is not None:
        if isinstance(error, ValueError) and _frames(error)[-1].f_globals["__name__"].startswith(_PACKAGES):
            return error
        error = error.__context__
    return None


def _frames(error: ValueError) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _options_of(refusal: ValueError, words: Sequence[str]) -> str:
    """The given options that set fields of the refusing config, with their values; those that it names, if any."""
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
