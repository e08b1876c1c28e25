"""Choices between configs as subcommands, and those that the data make."""

from __future__ import annotations

import functools
import operator
from typing import Annotated, Any

import tyro

from semid.cli.console import console
from semid.config import choices, difference, to_dict


def subcommands(base: type, *, first: str) -> Any:
    """Annotation of a field of an abstract config base: a subcommand per choice, by its name, `first` before others."""
    named: list[tuple[str, type]] = sorted(choices(base).items(), key=lambda choice: choice[0] != first)
    kinds: tuple[Any, ...] = tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in named)
    return tyro.conf.arg(constructor=functools.reduce(operator.or_, kinds))


def print_chosen(given: Any, resolved: Any, *, by: str) -> None:
    """Print the settings that the data have chosen, where the options leave them open."""
    if chosen := difference(to_dict(given), to_dict(resolved)):
        console.print(f"by {by}: {chosen}")
