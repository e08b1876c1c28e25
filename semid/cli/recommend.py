"""The command `semid recommend`."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro
from jaxtyping import Bool
from rich.table import Table

from semid import artifacts
from semid.cli.choices import PathOrUrl, by_name, condition_of, load_recommender
from semid.cli.console import console
from semid.data import Dataset, as_ids, parse_ids, read_boosts, read_id_file
from semid.errors import SemidError
from semid.recommender import Explanation, Recommender, Sampling


@dataclass(frozen=True)
class Recommend:
    """Recommend items for one history."""

    model: str
    """Model folder, or org/name of the Hugging Face hub (extra `hub`)."""
    history: str
    """Item ids, oldest first, separated by commas, or as a JSON list '["i1", "i2"]' for ids with commas or outer
    blanks. Empty: the most popular items of training are recommended."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Number of items."""
    beam_size: int = 50
    """Beams of the search."""
    exclude_seen: bool = False
    """Leave out items of the history."""
    allow: PathOrUrl | None = None
    """File of item ids, one id per line, or table with a column item_id: only these are recommended (in stock, say)."""
    deny: PathOrUrl | None = None
    """File or table of item ids that are not recommended."""
    boost: tuple[str, ...] = ()
    """Factors of items' probabilities, ID=FACTOR each: 2 doubles a probability, 0 excludes an item."""
    boosts: PathOrUrl | None = None
    """Table of such factors with columns item_id and boost; factors of --boost take precedence."""
    skip_unknown: bool = False
    """Drop unknown ids from the history and the files, and print how many, instead of stopping."""
    condition: tuple[str, ...] = ()
    """Condition on the items, for a model trained with conditions: one or more of event=NAME, group=NAME and
    text=WORDS."""
    events: str | None = None
    """Events of the history's items, in the same order, separated by commas or as a JSON list, for a model that reads
    events. An empty or null entry is unknown: 'click,,buy'."""
    times: str | None = None
    """Times of the history's items in seconds, in the same order, separated by commas or as a JSON list, for a model
    that reads times. None given: unknown."""
    values: dict[str, float] = field(default_factory=dict)
    """Values of events, EVENT NUMBER: rank by expected value, for a model trained with --event-head."""
    at_most: tuple[str, ...] = ()
    """Maximum number of items per group in the list, COLUMN=NUMBER each (brand=2), with columns of --items."""
    items: PathOrUrl | None = None
    """Dataset folder, or table with the columns item_id and those of --at-most."""
    sample: bool = False
    """Draw the list at random without replacement, by the items' probabilities, instead of taking the best."""
    temperature: float = 1.0
    """Temperature of the draw: near 0 the best items, 1 the model's own probabilities, above 1 more random."""
    seed: int = 0
    """Seed of the draw."""
    graph_weight: float | None = None
    """Weight of the model's item graph, from 0 (only the model) to 1 (only the graph); none given: the weight chosen in
    training."""
    explain: bool = False
    """Show the item graph's share of each probability, and the items of the history that it comes from."""
    catalog: PathOrUrl | None = None
    """Catalogue folder to recommend from: its current version (FOLDER@3: version 3), with appended and without removed
    items."""
    sequences: tuple[str, ...] = ()
    """Catalogue folders of the model's further code sequences, NAME=FOLDER each, that have codes of appended items."""

    def run(self) -> None:
        self._check_used()
        at_most = by_name(self.at_most, "--at-most", _limit)
        sample = Sampling(self.temperature, self.seed) if self.sample else None
        recommender = load_recommender(self.model, self.catalog, self.sequences)
        if self.items is not None:
            recommender = recommender.with_groups(_items(self.items), *at_most)
        history = parse_ids(self.history)
        if self.skip_unknown and history and self._dropped(recommender, history, "the history") == len(history):
            console.print("no known item left: the most popular of training")
        condition = condition_of(self.condition) or None
        events = None if self.events is None else _events(self.events)
        times = None if self.times is None else _seconds(self.times)
        top = recommender.recommend(
            [history],
            k=self.k,
            beam_size=self.beam_size,
            exclude_seen=self.exclude_seen,
            allowed=self._allowed(recommender),
            boosts=self._boosts(recommender),
            at_most=at_most,
            sample=sample,
            skip_unknown=self.skip_unknown,
            condition=condition,
            events=None if events is None else [events],
            times=None if times is None else [times],
            values=self.values or None,
            graph_weight=self.graph_weight,
        )
        if not top.item_ids[0]:
            console.print("no item is left to recommend: check --allow, --deny, --boost and --exclude-seen")
            return
        explained = []
        if self.explain:
            asked: dict[str, Any] = {"condition": condition, "events": events, "times": times}
            asked |= {"graph_weight": self.graph_weight, "skip_unknown": self.skip_unknown}
            explained = recommender.explain(history, top.item_ids[0], **asked)
        table = Table("rank", "item id", "log of value" if self.values else "log-probability", "codes")
        tokens = recommender.catalog.tokens_of(recommender.catalog.rows(top.item_ids[0]))
        for rank, (item_id, score, codes) in enumerate(zip(top.item_ids[0], top.scores[0], tokens, strict=False), 1):
            table.add_row(str(rank), item_id, f"{score:.3f}", "".join(codes))
        console.print(table)
        if self.explain:
            console.print(_explained(explained))

    def _check_used(self) -> None:
        """Raise SemidError for options that have no effect without another one."""
        if self.items is not None and not self.at_most:
            raise SemidError(
                "--items has the groups of --at-most; give --at-most COLUMN=NUMBER too, or leave --items out"
            )
        if not self.sample and (self.temperature, self.seed) != (1.0, 0):
            raise SemidError("--temperature and --seed are for random lists; add --sample, or leave them out")

    def _allowed(self, recommender: Recommender) -> Bool[np.ndarray, " items"] | None:
        """Mask of the items that the files of --allow and --deny leave; None without such files."""
        if self.allow is None and self.deny is None:
            return None
        allowed = np.ones(len(recommender.catalog), bool)
        if self.allow is not None:
            allowed &= self._mask(recommender, self.allow)
        if self.deny is not None:
            allowed &= ~self._mask(recommender, self.deny)
        return allowed

    def _boosts(self, recommender: Recommender) -> dict[Any, float]:
        """Factors of the table and the option. Raises SemidError naming the wrong file or word."""
        columns = recommender.catalog.source_columns
        given = {} if self.boosts is None else read_boosts(self.boosts, columns=columns)
        if self.boosts is not None:
            self._mask_of(recommender, list(given), self.boosts)
        named = by_name(self.boost, "--boost", _boost)
        self._mask_of(recommender, list(named), "--boost")
        return {**given, **named}

    def _mask(self, recommender: Recommender, file: str | Path) -> Bool[np.ndarray, " items"]:
        """Mask of the items that a file lists. Raises SemidError naming the file if an id is unknown."""
        return self._mask_of(recommender, read_id_file(file, columns=recommender.catalog.source_columns), file)

    def _mask_of(self, recommender: Recommender, ids: list[str], file: str | Path) -> Bool[np.ndarray, " items"]:
        """Mask of the items with these ids. Raises SemidError naming the file if one is unknown."""
        if self.skip_unknown:
            self._dropped(recommender, ids, str(file))
        try:
            return recommender.allow(ids, skip_unknown=self.skip_unknown)
        except SemidError as error:
            raise SemidError(f"{file}: {error}; correct it, or drop such with --skip-unknown") from None

    def _dropped(self, recommender: Recommender, ids: list[str], of: str) -> int:
        """Print and return the number of unknown ids."""
        unknown = int((~recommender.catalog.find_rows(ids)[1]).sum())
        if unknown:
            console.print(f"dropped {unknown} unknown of {len(ids)} items of {of}")
        return unknown


def _seconds(text: str) -> list[float]:
    """Parse the option --times."""
    try:
        return [float(word) for word in (json.loads(text) if text.lstrip().startswith("[") else text.split(","))]
    except (ValueError, TypeError):
        raise SemidError(f"--times: expected seconds, separated by commas or as a JSON list, got {text!r}") from None


def _events(text: str) -> list[str | None]:
    """Parse the option --events; None for an unknown event."""
    if not text.lstrip().startswith("["):
        return [name.strip() or None for name in text.split(",")] if text.strip() else []
    try:
        names = ["" if name is None else name for name in json.loads(text)]
        return [name or None for name in as_ids(names, what="events").to_pylist()]
    except (ValueError, RecursionError) as error:  # a SemidError is a ValueError
        raise SemidError(
            f"--events: expected events, separated by commas or as a JSON list, got {text[:80]!r} ({error})"
        ) from None


def _limit(word: str) -> tuple[str, int]:
    """Parse COLUMN=NUMBER; the name of the column may contain =."""
    column, _, number = word.rpartition("=")
    if not (column and number.isdecimal() and int(number)):
        raise SemidError(f"--at-most {word}: expected COLUMN=NUMBER, a whole number from 1 on, such as brand=2")
    return column, int(number)


def _items(path: str | Path) -> pa.Table | Path:
    """The items table of a dataset folder, or the path of a table."""
    folder = artifacts.fetched(path)
    return Dataset.load(folder).items if (folder / artifacts.MANIFEST).is_file() else folder


def _boost(word: str) -> tuple[str, float]:
    """Parse ID=FACTOR; the id may contain =."""
    item, _, factor = word.rpartition("=")
    with contextlib.suppress(ValueError):
        if item and 0 <= float(factor) < math.inf:
            return item, float(factor)
    raise SemidError(f"--boost {word}: expected ID=FACTOR, a finite number of 0 or more after the =, such as i1=1.5")


def _explained(items: list[Explanation]) -> Table:
    """Table of items (rows): the graph's share, and the three items of the history that contribute most to it."""
    table = Table("item id", "of the graph", "through")
    for item in items:
        through = ", ".join(f"{source} ({share:.0%})" for source, share in item.sources[:3])
        table.add_row(item.item_id, f"{item.graph_share:.0%}", through)
    return table
