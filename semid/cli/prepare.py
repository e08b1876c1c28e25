"""The command `semid prepare`: one dataclass per source, each a subcommand that reads, summarizes and writes data."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Union

import tyro
from rich.table import Table

from semid import artifacts
from semid.arrow import digest
from semid.artifacts import Kind
from semid.cli.choices import Column, PathOrUrl, Ties, check_columns, columns_of
from semid.cli.console import console
from semid.config import to_dict
from semid.data import SUFFIXES, Dataset, LeaveOneOut, SourceOrder, SplitRule, table_kind
from semid.errors import SemidError
from semid.stage import store_dataset

if TYPE_CHECKING:  # they import JAX
    from semid.encoders import PretrainedVectorsConfig


@dataclass(frozen=True)
class _Source(abc.ABC):
    """Output folder and split of prepared data."""

    out: PathOrUrl
    """Dataset folder to write."""
    split_rule: SplitRule = LeaveOneOut()
    """Rule that splits interactions into training, validation and test."""
    text_vectors: int = 128
    """Dimensions of LSA vectors made from the items' texts, if the items have no vectors. 0: make none."""
    encoder: tuple[str, ...] = ()
    """Pretrained encoders of texts or pictures, each making a vector column: folders in the Hugging Face layout, or
    org/name of its hub (extra `hub`); COLUMN=FOLDER names the column."""
    encoder_tokens: int | None = None
    """Maximum tokens per text for text encoders; none given: the limit in the encoder's folder."""

    @abc.abstractmethod
    def read(self) -> Dataset:
        """Read the dataset of this source."""

    def run(self) -> None:
        """Read, print statistics, write. Raises for an output that cannot be written before reading anything."""
        artifacts.check_output(self.out, kind=Kind.DATASET)
        if self.text_vectors < 0:
            raise SemidError(f"expected text_vectors of 0 (make none) or more, got {self.text_vectors}")
        encoders = [_pretrained(name, self.encoder_tokens) for name in self.encoder]
        if self.encoder_tokens is not None and all(encoder.reader == "image" for encoder in encoders):
            raise SemidError("--encoder-tokens is for text encoders; name one after --encoder, or leave it out")
        recipes = {encoder.column: to_dict(encoder) for encoder in encoders}
        if len(recipes) < len(encoders):
            columns = ", ".join(encoder.column for encoder in encoders)
            raise SemidError(f"--encoder: two have one column ({columns}); name each: COLUMN=FOLDER")
        dataset = self.read()
        _print_statistics(dataset)
        if self.text_vectors and not dataset.vector_columns and not encoders:
            dataset = _with_text_vectors(dataset, self.text_vectors)
        encode = partial(reduce, _with_pretrained_vectors, encoders, dataset)
        store_dataset(dataset, self.out, source={**(dataset.source or {}), **recipes}, work=encode)
        console.print(f"dataset: {self.out}")


def _print_statistics(dataset: Dataset) -> None:
    table = Table(title=f"dataset {dataset.name}", show_header=False)
    for name, value in dataset.statistics().items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)


def _pretrained(name: str, max_length: int | None) -> PretrainedVectorsConfig:
    """Config for FOLDER or COLUMN=FOLDER, with the settings in the folder."""
    from semid.encoders import PretrainedVectorsConfig

    column, equals, folder = name.partition("=")
    if not equals or "/" in column:
        column, folder = "", name
    return PretrainedVectorsConfig(folder, column, max_length).resolved()


def _with_pretrained_vectors(dataset: Dataset, config: PretrainedVectorsConfig) -> Dataset:
    from semid.encoders import with_content_vectors

    made = with_content_vectors(dataset, config)
    encoder = made.encoders[-1]
    width, inputs = made.vectors(encoder.column).shape[1], ", ".join(encoder.inputs)
    console.print(f"made {width}-d vectors of {inputs} ({encoder.column}) by {encoder.settings['encoder']}")
    return made


def _with_text_vectors(dataset: Dataset, dim: int) -> Dataset:
    """`dataset` with LSA vectors of its texts; unchanged, with a printed reason, if they do not suffice."""
    from semid.encoders import with_text_vectors

    try:
        made = with_text_vectors(dataset, dim=dim)
    except SemidError as error:
        console.print(f"no text vectors: {error}")
        return dataset
    console.print(f"made {made.vectors('text_lsa').shape[1]}-d vectors of the items' text (text_lsa)")
    return made


@dataclass(frozen=True, kw_only=True)
class _Recorded(_Source):
    """Source of recorded interactions, where a user may have several at one time, unlike in simulated data."""

    ties: Ties = SourceOrder()
    """Order of a user's interactions of equal time: that of the source, or random by a seed (0 if none is given)."""


@dataclass(frozen=True, kw_only=True)
class _Imported(_Recorded):
    """Source of the user's own tables, which may repeat lines; readers of published data drop repeated lines."""

    drop_repeated_lines: bool = False
    """Keep only the first of interactions with equal user, item, time, event and weight (events logged twice)."""
    columns: tuple[Column, ...] = ()
    """Names of columns in the tables where they differ from semid's: item_id=asin title=name."""

    def __post_init__(self) -> None:
        check_columns(self.columns)


@dataclass(frozen=True, kw_only=True)
class _Tables(_Imported):
    format: ClassVar[str]
    items: PathOrUrl
    """Table with item_id, and optionally text columns, vector columns, and image or image_path."""
    interactions: PathOrUrl
    """Table with user_id, item_id, and timestamp (seconds, ISO-8601 or datetimes) or position; optionally event, what
    the user did, for models that read it (`semid train --on-event`), and weight, for training with weighted targets
    (`--interaction-weights`)."""
    vectors: dict[str, PathOrUrl] = field(default_factory=dict)
    """Vector columns to add from .npy files: NAME FILE, with row i for item row i."""
    name: str = ""
    """Name of the dataset; none given: the output folder's."""

    def read(self) -> Dataset:
        for path in (self.items, self.interactions):
            found = table_kind(path)
            if found != self.format:
                wanted = " or ".join(SUFFIXES[self.format])
                raise SemidError(f"{path}: expected {wanted}; use `semid prepare {found}`, both tables of its kind")
        name = self.name or artifacts.resolved(self.out).name
        return Dataset.from_tables(
            self.items,
            self.interactions,
            name=name,
            split_rule=self.split_rule,
            ties=self.ties,
            vectors=self.vectors,
            columns=columns_of(self.columns),
            drop_repeated_lines=self.drop_repeated_lines,
        )


@dataclass(frozen=True, kw_only=True)
class Parquet(_Tables):
    """Import items and interactions from two Parquet files, or folders of part files."""

    format = "parquet"


@dataclass(frozen=True, kw_only=True)
class Csv(_Tables):
    """Import items and interactions from two CSV (or .tsv) files with a header line, compressed (.gz) or not."""

    format = "csv"


@dataclass(frozen=True, kw_only=True)
class Jsonl(_Tables):
    """Import items and interactions from two files with one JSON object per line, compressed (.gz) or not."""

    format = "jsonl"


@dataclass(frozen=True, kw_only=True)
class HuggingFace(_Imported):
    """Import two tables of a dataset of the Hugging Face hub, or of a folder that `save_to_disk` wrote (extra `hf`)."""

    dataset: tyro.conf.Positional[str]
    """org/name of the hub, or a folder."""
    items: str
    """Split with the items, or CONFIG:SPLIT; in a folder, the subfolder. Columns as for `semid prepare parquet`."""
    interactions: str
    """Split with the interactions, likewise."""
    revision: str | None = None
    """Commit, tag or branch of the hub; none given: its main branch."""
    name: str = ""
    """Name of the dataset; none given: the output folder's."""

    def read(self) -> Dataset:
        from semid.data import read_huggingface

        items, interactions = (
            read_huggingface(self.dataset, part, revision=self.revision) for part in (self.items, self.interactions)
        )
        dataset = Dataset.from_tables(
            items,
            interactions,
            name=self.name or artifacts.resolved(self.out).name,
            split_rule=self.split_rule,
            ties=self.ties,
            columns=columns_of(self.columns),
            drop_repeated_lines=self.drop_repeated_lines,
        )
        source, checksums = dataset.source or {}, {"items": digest(items), "interactions": digest(interactions)}
        return dataset.replace(source={**source, "sha256": {**source["sha256"], **checksums}})


@dataclass(frozen=True, kw_only=True)
class AmazonReviews(_Recorded):
    """5-core Amazon reviews, from files you downloaded (or downloaded now, if the network allows it)."""

    year: Literal[2014, 2018, 2023]
    """Release: 2014, 2018 or 2023."""
    category: str
    """Category as spelled in the file names, such as Beauty or All_Beauty."""
    manual_dir: PathOrUrl
    """Folder with the raw files."""
    data_dir: PathOrUrl = Path("data/tfds")
    """Folder for the prepared array_record files."""

    def read(self) -> Dataset:
        from semid.data import read_amazon_reviews

        return read_amazon_reviews(
            self.year,
            self.category,
            manual_dir=self.manual_dir,
            data_dir=self.data_dir,
            split_rule=self.split_rule,
            ties=self.ties,
        )


@dataclass(frozen=True, kw_only=True)
class Movielens(_Recorded):
    """MovieLens-1M from ml-1m.zip (or its folder) as you downloaded it."""

    manual_dir: PathOrUrl
    """Folder with ml-1m.zip or ml-1m/."""
    data_dir: PathOrUrl = Path("data/tfds")
    """Folder for the prepared array_record files."""

    def read(self) -> Dataset:
        from semid.data import read_movielens

        return read_movielens(
            manual_dir=self.manual_dir, data_dir=self.data_dir, split_rule=self.split_rule, ties=self.ties
        )


@dataclass(frozen=True, kw_only=True)
class TencentGR(_Recorded):
    """TencentGR-1M or -10M (Tencent advertising challenge 2025), from the Parquet folders that you downloaded."""

    release: Literal["1m", "10m"]
    """Release: 1m or 10m."""
    manual_dir: PathOrUrl
    """Folder with seq, item_feat and, for --embeddings, mm_emb."""
    data_dir: PathOrUrl = Path("data/tfds")
    """Folder for the prepared array_record files."""
    users: int | None = None
    """Number of users to read, drawn at random by --seed; none given: all."""
    seed: int = 0
    """Seed of the random choice of users."""
    embeddings: tuple[int, ...] = ()
    """Numbers of the multi-modal embeddings to read, each as a vector column such as emb_81; needs --item-ids."""
    item_ids: PathOrUrl | None = None
    """Table that maps item_id, as in seq, to anonymous_cid, as in mm_emb (the pickle indexer.pkl is never opened)."""

    def read(self) -> Dataset:
        from semid.data import read_tencentgr

        if self.item_ids is not None and not self.embeddings:
            raise SemidError("--item-ids is for embeddings; name some after --embeddings, or leave it out")
        if self.seed and self.users is None:
            raise SemidError("--seed is for a random choice of users; give their number with --users, or leave it out")
        return read_tencentgr(
            self.release,
            manual_dir=self.manual_dir,
            data_dir=self.data_dir,
            users=self.users,
            seed=self.seed,
            embeddings=self.embeddings,
            item_ids=self.item_ids,
            split_rule=self.split_rule,
            ties=self.ties,
        )


@dataclass(frozen=True, kw_only=True)
class Simulated(_Source):
    """Generate the embedded simulated catalogue, whose true next-item distribution is known."""

    num_items: int = 2_000
    """Number of items; above 10,000 they have no pictures."""
    num_users: int = 4_000
    """Number of users."""
    seed: int = 0
    """Seed of the world."""
    events: bool = False
    """Add an event to every interaction (exposure, click or buy); the interactions are otherwise the same."""
    position_bias: float = 0.0
    """Position bias, with --events: place r of ten in a list is examined with probability r ** -BIAS, and clicks and
    purchases are weighted by its inverse. 0: none."""

    def read(self) -> Dataset:
        from semid.data.simulated import Events, SimulatedConfig, simulate

        if self.position_bias and not self.events:
            raise SemidError("--position-bias needs clicks and purchases; add --events")
        world = SimulatedConfig(
            num_items=self.num_items,
            num_users=self.num_users,
            seed=self.seed,
            images=self.num_items <= 10_000,
            events=Events(position_bias=self.position_bias) if self.events else None,
        )
        return simulate(world).dataset.replace(split_rule=self.split_rule)


Source = Union[  # noqa: UP007 - tyro names subcommands by annotation
    Annotated[Parquet, tyro.conf.subcommand("parquet")],
    Annotated[Csv, tyro.conf.subcommand("csv")],
    Annotated[Jsonl, tyro.conf.subcommand("jsonl")],
    Annotated[HuggingFace, tyro.conf.subcommand("huggingface")],
    Annotated[AmazonReviews, tyro.conf.subcommand("amazon-reviews")],
    Annotated[Movielens, tyro.conf.subcommand("movielens")],
    Annotated[TencentGR, tyro.conf.subcommand("tencentgr")],
    Annotated[Simulated, tyro.conf.subcommand("simulated")],
]


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True)
class Prepare:
    """Import a dataset: check it, print its statistics, write it as one verified folder."""

    source: Source
    """Where the data come from."""

    def run(self) -> None:
        self.source.run()
