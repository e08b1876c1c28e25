"""`semid prepare`: one dataclass a source, each a subcommand that reads a dataset, shows it and writes it."""

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
    """Rule that cuts interactions into training, validation and test."""
    text_vectors: int = 128
    """Dimensions of vectors made from the items' words (LSA) where the items bring no vectors. 0: make none."""
    encoder: tuple[str, ...] = ()
    """Pretrained encoders that make a vector column each, of the items' texts or pictures: folders in the Hugging Face
    layout, or org/name of its hub (extra `hub`); COLUMN=FOLDER names the column."""
    encoder_tokens: int | None = None
    """Tokens of a text that its encoder reads at most; none given: as many as its folder says."""

    @abc.abstractmethod
    def read(self) -> Dataset:
        """Read the dataset of this source."""

    def run(self) -> None:
        """Read, print statistics, write. What forbids writing is found before anything is read."""
        artifacts.check_output(self.out, kind=Kind.DATASET)
        if self.text_vectors < 0:
            raise SemidError(f"expected text_vectors of 0 (make none) or more, got {self.text_vectors}")
        encoders = [_pretrained(name, self.encoder_tokens) for name in self.encoder]
        if self.encoder_tokens is not None and all(encoder.reader == "image" for encoder in encoders):
            raise SemidError("--encoder-tokens is of encoders of texts; name one after --encoder, or leave it out")
        recipes = {encoder.column: to_dict(encoder) for encoder in encoders}
        if len(recipes) < len(encoders):
            columns = ", ".join(encoder.column for encoder in encoders)
            raise SemidError(f"--encoder: two make one column ({columns}); name each: COLUMN=FOLDER")
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
    """Config of FOLDER or COLUMN=FOLDER, with what the folder says."""
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
    """`dataset` with vectors of its texts; as it is, and a line that says why, where they do not suffice."""
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
    """Interactions that were recorded, where some of a user's may be of one time: simulated ones never are."""

    ties: Ties = SourceOrder()
    """Order of a user's interactions of equal time: that of the source, or drawn by a seed (0 if none is given)."""


@dataclass(frozen=True, kw_only=True)
class _Imported(_Recorded):
    """Interactions of the user's own tables, where lines may be sent twice; readers of published data drop these."""

    drop_repeated_lines: bool = False
    """Keep only the first of interactions that are equal in user, item, time, event and weight: events sent twice."""
    columns: tuple[Column, ...] = ()
    """Columns that have another name in the tables: item_id=asin title=name."""

    def __post_init__(self) -> None:
        check_columns(self.columns)


@dataclass(frozen=True, kw_only=True)
class _Tables(_Imported):
    format: ClassVar[str]
    items: PathOrUrl
    """Table with item_id; text columns, vector columns and image or image_path as there are."""
    interactions: PathOrUrl
    """Table with user_id, item_id, and timestamp (seconds, ISO-8601 or datetimes) or position; event, what the user
    did, is for models that read it (`semid train --on-event`), weight for trainings that weigh targets by it
    (`--interaction-weights`)."""
    vectors: dict[str, PathOrUrl] = field(default_factory=dict)
    """Vector columns from .npy files: NAME FILE, row i for item row i."""
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
    """Import items and interactions from two CSV (or .tsv) files with a header line; .gz and such are read too."""

    format = "csv"


@dataclass(frozen=True, kw_only=True)
class Jsonl(_Tables):
    """Import items and interactions from two files with one JSON object a line; .gz and such are read too."""

    format = "jsonl"


@dataclass(frozen=True, kw_only=True)
class HuggingFace(_Imported):
    """Import two tables of a dataset of the Hugging Face hub, or of a folder that `save_to_disk` wrote (extra `hf`)."""

    dataset: tyro.conf.Positional[str]
    """org/name of the hub, or a folder."""
    items: str
    """Split with the items, or CONFIG:SPLIT; of a folder, the subfolder. Columns as of `semid prepare parquet`."""
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
    """Amazon reviews, 5-core, from the files you downloaded (or downloaded now where the host allows it)."""

    year: Literal[2014, 2018, 2023]
    """Release: 2014, 2018 or 2023."""
    category: str
    """Category as its files spell it, such as Beauty or All_Beauty."""
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
    """Read only so many users, drawn by --seed; none given: all."""
    seed: int = 0
    """Seed that draws the users."""
    embeddings: tuple[int, ...] = ()
    """Multi-modal embeddings to read, by number: 81 makes the vector column emb_81; they need --item-ids."""
    item_ids: PathOrUrl | None = None
    """Table with item_id, as in seq, and anonymous_cid, as in mm_emb: indexer.pkl, which has both, is never opened."""

    def read(self) -> Dataset:
        from semid.data import read_tencentgr

        if self.item_ids is not None and not self.embeddings:
            raise SemidError("--item-ids joins embeddings to the items; name some after --embeddings, or leave it out")
        if self.seed and self.users is None:
            raise SemidError("--seed draws the users; say how many with --users, or leave it out")
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
    """Items; above 10,000 they have no pictures."""
    num_users: int = 4_000
    """Users."""
    seed: int = 0
    """Seed of the world."""
    events: bool = False
    """Say of every interaction whether it is an exposure, a click or a buy; the interactions are the same."""
    position_bias: float = 0.0
    """Examine the r-th of ten places of a list with probability r ** -BIAS only, and weigh clicks and purchases by its
    inverse (with --events). 0: none."""

    def read(self) -> Dataset:
        from semid.data.simulated import Events, SimulatedConfig, simulate

        if self.position_bias and not self.events:
            raise SemidError("--position-bias is of clicks and purchases; add --events")
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
