"""Choices between configs as subcommands."""

from __future__ import annotations

import functools
import operator
from typing import Annotated, Any

import tyro

from semid.config import choices


def subcommands(base: type, *, first: str) -> Any:
    """Annotation of a field of an abstract config base: a subcommand per choice, by its name, `first` before others."""
    named: list[tuple[str, type]] = sorted(choices(base).items(), key=lambda choice: choice[0] != first)
    kinds: tuple[Any, ...] = tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in named)
    return tyro.conf.arg(constructor=functools.reduce(operator.or_, kinds))
