"""`Dataset`: items and interactions. External ids are mapped to dense rows here and nowhere else."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from semid import arrow, artifacts, config
from semid.arrow import is_text, read_parquet, to_lists, to_matrix, write_parquet
from semid.artifacts import Kind, Origin
from semid.data.content import StoredEncoder, joined_texts, read_encoders
from semid.data.histories import Repeats
from semid.data.importing import read_import
from semid.data.splits import LeaveOneOut, SplitRule, Splits, split
from semid.data.ties import SourceOrder, TieRule, other_columns, repeated_lines
from semid.data.validation import checked_items, checked_tables
from semid.errors import SemidError
from semid.notebooks import Facts

_LOG = logging.getLogger("semid")


@dataclass(frozen=True)
class DatasetConfig:
    """Name, rules and source of a dataset, as its artifact records them."""

    name: str
    split_rule: SplitRule
    source: dict
    time_unit: str
    ties: TieRule = SourceOrder()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Items and the interactions of users with them.

    `items` is an Arrow table whose row number is the item row used everywhere: `item_id` (string, unique), text
    columns, optionally `image` (encoded bytes) and vector columns (fixed-size lists of floats). `user`, `item` and
    `time` hold one entry per interaction, sorted by user, then time; the rule `ties` orders equal times. `time_unit`
    is "seconds", "relative" (seconds since the user's own first interaction) or, if the source has no times,
    "position". `origin` is the artifact that the dataset was read from. For each vector column added since, `added`
    has the digest of its source. `encoders` are the fitted encoders that made vector columns from raw ones.
    """

    items: pa.Table
    users: pa.Array
    user: Int[np.ndarray, " n"]
    item: Int[np.ndarray, " n"]
    time: Int[np.ndarray, " n"]
    name: str
    time_unit: str = "seconds"
    event: pa.Array | None = None
    weight: Float[np.ndarray, " n"] | None = None
    split_rule: SplitRule = LeaveOneOut()
    ties: TieRule = SourceOrder()
    source: dict | None = None
    origin: Origin | None = field(default=None, repr=False)
    added: Mapping[str, str] = field(default_factory=dict)
    encoders: tuple[StoredEncoder, ...] = ()

    def __post_init__(self) -> None:
        _check_rules(self.split_rule, self.ties)

    def __repr__(self) -> str:
        counts = f"{self.num_users:,} users, {self.num_items:,} items, {len(self.item):,} interactions"
        vectors = f", vectors {', '.join(self.vector_columns)}" if self.vector_columns else ""
        return f"Dataset({self.name!r}: {counts}{vectors}{f', from {self.origin.folder}' if self.origin else ''})"

    def describe(self) -> Facts:
        """Statistics and columns, as a notebook shows them."""
        columns = {name: f"{self.vectors(name).shape[1]}-d vectors" for name in self.vector_columns}
        return Facts(f"dataset {self.name}", self.statistics() | columns)

    def _repr_html_(self) -> str:
        counts = {"users": self.num_users, "items": self.num_items, "interactions": len(self.item)}
        columns = {"columns of items": ", ".join(self.items.column_names)}
        return Facts(f"dataset {self.name}", counts | columns | _place(self.origin))._repr_html_()

    @property
    def source_columns(self) -> dict[str, str]:
        """Column names of the source tables where they differ from semid's, e.g. `{"item_id": "asin"}`."""
        return dict((self.source or {}).get("columns", {}))

    @classmethod
    def from_tables(
        cls,
        items: Any,
        interactions: Any,
        *,
        name: str,
        split_rule: SplitRule = LeaveOneOut(),
        ties: TieRule = SourceOrder(),
        vectors: Mapping[str, str | Path] | None = None,
        columns: Mapping[str, str] | None = None,
        drop_repeated_lines: bool = False,
    ) -> Dataset:
        """Import two tables. Each may be a file or folder of part files (see `read_table`), a pandas DataFrame, a
        polars frame (lazy or not), an Arrow table or dataset, a DuckDB relation, or any other Arrow stream.

        `columns` maps semid's column names to the tables' own where they differ: `{"item_id": "asin"}`. See `build`
        for the columns and `drop_repeated_lines`; columns that nothing reads are logged. `vectors` maps each vector
        column to add to a `.npy` file of floats [items, dim], row `i` for item row `i`. A string column `image_path`
        (relative to the items file, or to the working directory) is replaced by `image`, the content of the files;
        null or empty means no image.
        Raises SemidError that lists all faults of all tables, one per line.
        """
        tables = read_import(items, interactions, vectors=vectors or {}, columns=columns or {})
        return cls._from_checked(
            tables.items,
            tables.interactions,
            name=name,
            split_rule=split_rule,
            ties=ties,
            source=tables.source,
            file=tables.interaction_file,
            drop_repeated_lines=drop_repeated_lines,
        )

    @classmethod
    def build(
        cls,
        items: pa.Table,
        interactions: pa.Table,
        *,
        name: str,
        split_rule: SplitRule = LeaveOneOut(),
        ties: TieRule = SourceOrder(),
        source: dict | None = None,
        item_file: str = "items",
        interaction_file: str = "interactions",
        drop_repeated_lines: bool = False,
    ) -> Dataset:
        """Check the tables, map ids to rows and sort.

        `items` needs `item_id`; `interactions` needs `user_id`, `item_id` and `timestamp` (seconds since 1970, ISO-8601
        text or datetimes) or `position`. Optional are `event` (what the user did, an input of models that read events)
        and `weight` (of the interaction as a training target). `ties` orders a user's interactions of equal time.
        `drop_repeated_lines` keeps the first of the lines with equal user, item, time, event and weight, and records
        the number of dropped lines in `source`.
        Raises SemidError listing every fault with file, row and column.
        """
        items, interactions = checked_tables(items, interactions, item_file, interaction_file)
        return cls._from_checked(
            items,
            interactions,
            name=name,
            split_rule=split_rule,
            ties=ties,
            source=source or {},
            file=interaction_file,
            drop_repeated_lines=drop_repeated_lines,
        )

    @classmethod
    def _from_checked(
        cls,
        items: pa.Table,
        interactions: pa.Table,
        *,
        name: str,
        split_rule: SplitRule,
        ties: TieRule,
        source: dict,
        file: str,
        drop_repeated_lines: bool,
    ) -> Dataset:
        """Map the ids of checked tables to rows and sort. Drops lines that repeat an earlier one, or warns of them."""
        _check_rules(split_rule, ties)
        columns = interactions.column_names
        # Encode before combining chunks: the ids themselves may exceed the 2 GiB of one chunk.
        encoded = interactions["user_id"].dictionary_encode().combine_chunks()
        user = encoded.indices.to_numpy().astype(np.int32)
        item = pc.index_in(interactions["item_id"], items["item_id"]).to_numpy().astype(np.int32)
        time_column = "timestamp" if "timestamp" in columns else "position"
        time = interactions[time_column].to_numpy().astype(np.int64)
        if time_column == "position" and ties != SourceOrder():
            raise SemidError(
                f"{file}: ties {ties.description} need column 'timestamp': by 'position' alone nothing ties; "
                "add it, or leave ties in source order"
            )
        order = np.lexsort((*ties.sort_keys(interactions), time, user))  # stable: the rest stays in source order
        others = itertools.chain([item[order]], (column[order] for column in other_columns(interactions)))
        repeats = repeated_lines(user[order], time[order], others)
        if drop_repeated_lines:
            kept = np.ones(len(user), bool)
            kept[order[repeats]] = False
            interactions, user, item, time = interactions.filter(pa.array(kept)), user[kept], item[kept], time[kept]
            order = np.lexsort((*ties.sort_keys(interactions), time, user))
            source = source | {"repeated lines left out": len(repeats)}
        elif len(repeats):
            *equal, last = ["user", "item", *(name for name in (time_column, "event", "weight") if name in columns)]
            what = f"of {len(user):,} interactions repeat {', '.join(equal)} and {last} of an earlier one"
            remedy = "all become targets; if they are events logged twice, drop them (--drop-repeated-lines)"
            _LOG.warning("%s: %s %s; %s", file, f"{len(repeats):,}", what, remedy)
        return cls(
            items=items,
            users=encoded.dictionary,
            user=user[order],
            item=item[order],
            time=time[order],
            name=name,
            time_unit="seconds" if time_column == "timestamp" else "position",
            event=interactions["event"].combine_chunks().take(pa.array(order)) if "event" in columns else None,
            weight=interactions["weight"].to_numpy().astype(np.float32)[order] if "weight" in columns else None,
            split_rule=split_rule,
            ties=ties,
            source=source,
        )

    @property
    def num_items(self) -> int:
        return self.items.num_rows

    @property
    def num_users(self) -> int:
        return len(self.users)

    @functools.cached_property
    def item_ids(self) -> pa.Array:
        """External ids, by item row."""
        return self.items["item_id"].combine_chunks()

    @functools.cached_property
    def offsets(self) -> Int[np.ndarray, " bounds"]:
        """The interactions of user `u` are `offsets[u]:offsets[u + 1]`."""
        counts = np.bincount(self.user, minlength=self.num_users)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @functools.cached_property
    def splits(self) -> Splits:
        """Training histories, validation and test examples by the dataset's own rule."""
        return split(self, self.split_rule)

    @functools.cached_property
    def events(self) -> tuple[str, ...]:
        """Distinct event names, sorted; empty if the dataset has no events.

        Raises SemidError naming the first interaction without an event: a model that reads events needs all of them.
        """
        if self.event is None:
            return ()
        if self.event.null_count:
            row = int(np.flatnonzero(self.event.is_null().to_numpy(zero_copy_only=False))[0])
            raise SemidError(
                f"dataset {self.name!r}: interactions row {row + 1}, column 'event': is null, as are "
                f"{self.event.null_count:,} of {len(self.event):,}; fill them in, or leave events out of the model"
            )
        return self._event_names

    @functools.cached_property
    def event_codes(self) -> Int[np.ndarray, " n"] | None:
        """Index of each interaction's event in `events`, from 1; 0 if it is null. None if the dataset has no events."""
        if self.event is None:
            return None
        index = pc.index_in(self.event, value_set=pa.array(self._event_names, pa.string()))
        return pc.add(index.fill_null(-1), 1).to_numpy(zero_copy_only=False).astype(np.int32)

    @functools.cached_property
    def _event_names(self) -> tuple[str, ...]:
        return () if self.event is None else tuple(sorted(pc.unique(self.event.drop_null()).to_pylist()))

    @property
    def num_training_interactions(self) -> int:
        """Number of interactions in the training histories."""
        return int(self.splits.train.lengths.sum())

    @functools.cached_property
    def repeats(self) -> Repeats:
        """Counts of training targets (all items of a history but its first) and of those seen earlier in it."""
        return self.splits.train.repeats()

    @property
    def text_columns(self) -> list[str]:
        """Names of the string and list-of-string columns other than the id."""
        return [f.name for f in self.items.schema if f.name != "item_id" and is_text(f.type)]

    @property
    def vector_columns(self) -> list[str]:
        """Names of the vector columns."""
        return [f.name for f in self.items.schema if arrow.is_fixed_vector(f.type)]

    def vectors(self, column: str) -> Float[np.ndarray, "items dim"]:
        """A vector column in float32. Raises SemidError if there is no such column."""
        if column not in self.vector_columns:
            raise SemidError(f"no vector column {column!r} in dataset {self.name!r}; it has {self.vector_columns}")
        return to_matrix(self.items[column]).astype(np.float32)

    def with_vectors(
        self, column: str, vectors: Float[np.ndarray, "items dim"], *, origin: Origin | None = None
    ) -> Dataset:
        """Copy with a vector column added or replaced, e.g. by a model's item vectors; `origin` is their artifact."""
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or len(vectors) != self.num_items or not vectors.size or vectors.dtype.kind not in "fiuV":
            got = f"{vectors.dtype} {list(vectors.shape)}"
            raise SemidError(f"column {column!r}: expected numbers [{self.num_items} items, dim], got {got}")
        lists = to_lists(vectors.astype(np.float32))
        checked = checked_items(pa.table({"item_id": self.item_ids, column: lists}), column)
        items = self.items.drop_columns([column]) if column in self.items.column_names else self.items
        source_digest = arrow.digest(pa.table({column: lists})) if origin is None else origin.digest
        return self.replace(
            items=items.append_column(column, checked[column]),
            origin=self.origin,
            added={**self.added, column: source_digest},
            encoders=tuple(encoder for encoder in self.encoders if encoder.column != column),
        )

    def replace(self, **changes: Any) -> Dataset:
        """Copy with some fields changed. The copy counts as a new dataset, in no artifact unless `origin` names one."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Dataset(**fields | {"origin": None, "added": {}} | changes)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the artifact that it was read from, else of its content without the columns `added`."""
        return self._content_digest if self.origin is None else self.origin.digest

    @functools.cached_property
    def _content_digest(self) -> str:
        tables = (self.items.drop_columns(list(self.added)), pa.table({"user_id": self.users}), self._interactions)
        return artifacts.sha256_json([self.config, *map(arrow.digest, tables)])

    def other_source(self, made: Origin | str) -> str | None:
        """Compare the dataset that an artifact was made from, or a dataset's digest, with this dataset.

        Returns None if they are the same, else the digest of the other ("unknown" if the artifact names none).
        """
        digest = made if isinstance(made, str) else made.manifest.parents.get("dataset", "unknown")
        return None if digest in {self.digest, *self._saved_as} or digest == self._content_digest else digest

    @functools.cached_property
    def _saved_as(self) -> set[str]:
        """Digests of the artifacts that this object was written to."""
        return set()

    def check_source(self, made: Origin | str, *, what: str, remedy: str) -> None:
        """Raise SemidError if `made` was made from another dataset, whose training part may contain this test part.

        `made` is an artifact, or the digest of the dataset that an object in memory, called `what`, was made from.
        `remedy` ends the message.
        """
        if (digest := self.other_source(made)) is not None:
            where = what if isinstance(made, str) else made.folder
            raise SemidError(
                f"{where}: trained on dataset digest {digest[:16]}, not on this one of {self.digest[:16]}; what is "
                f"test here may have been training there; {remedy}"
            )

    @property
    def parents(self) -> dict[str, str]:
        """Parents of an artifact made from this dataset: digests by role."""
        return {"dataset": self.digest, **self.added}

    def text_inputs(self) -> tuple[str, ...]:
        """The text columns to read: `text` if it exists, else all. Raises SemidError if there are none."""
        columns = ("text",) if "text" in self.text_columns else tuple(self.text_columns)
        if not columns:
            lacks = "no text columns" if self.vector_columns else "neither vector nor text columns"
            raise SemidError(f"dataset {self.name!r} has {lacks}; add one to the items table")
        return columns

    def texts(self) -> list[str]:
        """One text per item: its `text_inputs` joined."""
        return joined_texts(self.items, self.text_inputs())

    def statistics(self) -> dict[str, int | float | str]:
        """Summary statistics: users, items, interactions, lengths, dates, ties, repeats, split sizes."""
        return dict(self._statistics)

    @functools.cached_property
    def _statistics(self) -> dict[str, int | float | str]:
        lengths = np.diff(self.offsets)
        new_user = np.diff(self.user, prepend=-1) != 0
        tied = ~new_user & (np.diff(self.time, prepend=0) == 0)
        pairs = np.unique(self.user.astype(np.int64) * self.num_items + self.item)
        optional = (("event", self.event_codes), ("weight", self.weight))
        more = {name: values for name, values in optional if values is not None}
        lines = len(repeated_lines(self.user, self.time, [self.item, *more.values()]))
        return {
            "users": self.num_users,
            "items": self.num_items,
            "items never interacted with": int(self.num_items - len(np.unique(self.item))),
            "interactions": len(self.item),
            "interactions a user (min / mean / max)": f"{lengths.min()} / {lengths.mean():.2f} / {lengths.max()}",
            **({"times": f"{_day(self.time.min())} to {_day(self.time.max())}"} if self.time_unit == "seconds" else {}),
            "same time as the one before": int(tied.sum()),
            "order of equal times": self.ties.description,
            "repeated (user, item)": int(len(self.item) - len(pairs)),
            **({f"repeated ({', '.join(['user', 'item', 'time', *more])})": lines} if lines else {}),
            "split": config.to_dict(self.split_rule)["type"],
            **({} if self.event_codes is None else {"events": self._event_counts(self.event_codes)}),
            "training interactions": self.num_training_interactions,
            "training targets seen before": str(self.repeats),
            "validation examples": len(self.splits.validation),
            "test examples": len(self.splits.test),
        }

    def _event_counts(self, codes: Int[np.ndarray, " n"]) -> str:
        """Events and their counts as text, most frequent first."""
        numbers = zip(np.bincount(codes, minlength=1).tolist(), ("null", *self._event_names), strict=True)
        ordered = sorted((one for one in numbers if one[0]), reverse=True)
        shown = ", ".join(f"{name} {number:,}" for number, name in ordered[:6])
        return shown + (f" and {len(ordered) - 6:,} more" if len(ordered) > 6 else "")

    def save(self, path: str | Path) -> Dataset:
        """Write the artifact, replacing an existing one, and return the dataset with its origin."""
        with artifacts.write_artifact(path, kind=Kind.DATASET, config=self.config) as folder:
            self.write(folder)
        path = artifacts.resolved(path)
        return self.with_origin(Origin(path, artifacts.read_manifest(path)))

    def write(self, folder: Path) -> None:
        """Write `items.parquet`, `users.parquet`, `interactions.parquet` and the encoders into a folder."""
        write_parquet(self.items, folder / "items.parquet")
        write_parquet(pa.table({"user_id": self.users}), folder / "users.parquet")
        write_parquet(self._interactions, folder / "interactions.parquet")
        for encoder in self.encoders:
            encoder.write(folder)

    def with_origin(self, origin: Origin) -> Dataset:
        """Copy whose origin is the artifact that this dataset was written to or read from."""
        self._saved_as.add(origin.digest)
        return self.replace(origin=origin)

    @property
    def _interactions(self) -> pa.Table:
        columns = {"user": self.user, "item": self.item, "time": self.time}
        return pa.table(
            columns | {k: v for k, v in {"event": self.event, "weight": self.weight}.items() if v is not None}
        )

    @property
    def config(self) -> dict:
        """Name, rules, source and time unit, as the artifact's manifest records them.

        The default tie rule, source order, is left out: manifests written before there was a choice lack the key.
        """
        full = config.to_dict(DatasetConfig(self.name, self.split_rule, self.source or {}, self.time_unit, self.ties))
        return {name: value for name, value in full.items() if name != "ties" or self.ties != SourceOrder()}

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Read a dataset artifact and verify every file. Raises SemidError naming what is wrong."""
        path = artifacts.fetched(path)
        origin = Origin(path, artifacts.read_artifact(path, Kind.DATASET))
        stored = config.from_dict(DatasetConfig, origin.manifest.config, where=str(path))
        interactions = read_parquet(path / "interactions.parquet")
        has = interactions.column_names
        return cls(
            items=read_parquet(path / "items.parquet"),
            users=read_parquet(path / "users.parquet")["user_id"].combine_chunks(),
            user=interactions["user"].to_numpy(),
            item=interactions["item"].to_numpy(),
            time=interactions["time"].to_numpy(),
            name=stored.name,
            time_unit=stored.time_unit,
            event=interactions["event"].combine_chunks() if "event" in has else None,
            weight=interactions["weight"].to_numpy() if "weight" in has else None,
            split_rule=stored.split_rule,
            ties=stored.ties,
            source=stored.source,
            origin=origin,
            encoders=read_encoders(path, origin.manifest.files),
        )


def _check_rules(split_rule: Any, ties: Any) -> None:
    """Raise SemidError for anything that is not an instance of a rule, such as its class or its command-line name."""
    for name, given, rules in (("split_rule", split_rule, SplitRule), ("ties", ties, TieRule)):
        if not isinstance(given, rules):
            known = ", ".join(f"{rule.__name__}()" for rule in get_args(rules))
            raise SemidError(f"{name}: expected one of {known} of semid.data, got {given!r}")


def _day(seconds: np.integer) -> str:
    return str(np.datetime64(int(seconds), "s").astype("datetime64[D]"))


def _place(origin: Origin | None) -> dict[str, str]:
    return {} if origin is None else {"from": str(origin.folder)}
