"""Types of options: paths or URLs, NAME=VALUE words, and choices between configs as subcommands."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from semid import artifacts
from semid.artifacts import Kind
from semid.cli.console import console
from semid.config import choices, difference, to_dict
from semid.data import ShuffledTies, SourceOrder, TieRule
from semid.errors import SemidError

if TYPE_CHECKING:  # they import JAX
    from semid.graphs import ItemGraph
    from semid.recommender import Recommender

T = TypeVar("T")

PathOrUrl = Annotated[
    str | Path,  # the parser's own Path would reduce the two slashes of a URL to one
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|URL",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str | Path),
        str_from_instance=lambda value: [str(value)],
    ),
]


def _tie_rule(word: str) -> TieRule:
    if not (parts := re.fullmatch(r"(source|shuffled)(?:(?<=shuffled):(\d+))?", word)):
        raise SemidError(f"ties: expected source, shuffled or shuffled:SEED, got {word!r}")
    return SourceOrder() if parts[1] == "source" else ShuffledTies(int(parts[2] or 0))


Ties = Annotated[
    TieRule,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="source|shuffled[:SEED]",
        instance_from_str=lambda words: _tie_rule(words[0]),
        is_instance=lambda value: isinstance(value, TieRule),
        str_from_instance=lambda ties: [f"shuffled:{ties.seed}" if isinstance(ties, ShuffledTies) else "source"],
    ),
]


def _renamed(word: str) -> tuple[str, str]:
    own, _, theirs = word.partition("=")
    if not own or not theirs:
        raise SemidError(f"expected columns as NAME=COLUMN, such as item_id=asin, got {word!r}")
    return own, theirs


Column = Annotated[
    str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME=COLUMN",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]


def by_name(words: Sequence[str], option: str, read: Callable[[str], tuple[str, T]]) -> dict[str, T]:
    """Values of an option's NAME=VALUE words, split by `read`. Raises SemidError for a name given twice."""
    found: dict[str, T] = {}
    for word in words:
        name, value = read(word)
        if name in found:
            raise SemidError(f"{option} {word}: {name} is given already ({found[name]}); give it once")
        found[name] = value
    return found


def check_columns(words: Sequence[str]) -> None:
    """Raise SemidError for a word that is no NAME=COLUMN."""
    for word in words:
        _renamed(word)


def columns_of(words: Sequence[str]) -> dict[str, str]:
    """Columns by name, from NAME=COLUMN words. Raises SemidError for a malformed word or a name given twice."""
    return by_name(words, "--columns", _renamed)


def condition_of(words: Sequence[str]) -> dict[str, str]:
    """Condition from PART=VALUE words. Raises SemidError for a malformed word or a part given twice."""
    return by_name(words, "--condition", _condition)


def folders_of(words: Sequence[str]) -> dict[str, str]:
    """Folders by name, from NAME=FOLDER words. Raises SemidError for a malformed word or a name given twice."""
    return by_name(words, "--sequences", _folder)


def _condition(word: str) -> tuple[str, str]:
    part, _, value = word.partition("=")
    if part not in ("event", "group", "text") or not value:
        raise SemidError(f"--condition {word}: expected event=NAME, group=NAME or text=WORDS")
    return part, value


def _folder(word: str) -> tuple[str, str]:
    name, _, folder = word.partition("=")
    if not re.fullmatch(r"[\w-]+", name) or not folder:
        raise SemidError(f"--sequences {word}: expected NAME=FOLDER, such as image=runs/mine/images")
    return name, folder


def subcommands(base: type, *, first: str) -> Any:
    """Annotation for a field of an abstract config base: one subcommand per alternative, by its name, `first` listed
    first."""
    named: list[tuple[str, type]] = sorted(choices(base).items(), key=lambda choice: choice[0] != first)
    kinds: tuple[Any, ...] = tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in named)
    return tyro.conf.arg(constructor=functools.reduce(operator.or_, kinds))


def print_chosen(given: Any, resolved: Any, *, by: str) -> None:
    """Print the settings that were left open by the options and chosen from the data."""
    if chosen := difference(to_dict(given), to_dict(resolved), most=None):
        console.print(f"by {by}: {chosen}")


def load_recommender(model: str, catalog: str | Path | None, sequences: Sequence[str]) -> Recommender:
    """Load a model with the current versions of its catalogue and of its further code sequences (NAME=FOLDER words)."""
    from semid.recommender import Recommender

    return Recommender.from_pretrained(model, catalog=catalog, sequences=folders_of(sequences))


def load_ranker(path: str) -> Recommender | ItemGraph:
    """Load a model, from a folder or the Hugging Face hub, or an item graph from a folder."""
    from semid.graphs import ItemGraph
    from semid.recommender import Recommender

    folder = artifacts.local_folder(path)
    is_graph = artifacts.read_manifest(folder).kind == Kind.GRAPH
    return ItemGraph.load(folder) if is_graph else Recommender.from_pretrained(path)
