"""MovieLens-1M as published by GroupLens (Harper & Konstan, TiiS 2015)."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import tensorflow_datasets as tfds

from semid import artifacts
from semid.data.builders.raw import (
    DAMAGED,
    Interaction,
    Interactions,
    clean,
    interaction,
    parse_lines,
    read_interactions,
)
from semid.data.builders.tables import RatingsBuilder, RawFile, locate, read_dataset
from semid.data.dataset import Dataset
from semid.data.splits import LeaveOneOut, SplitRule
from semid.data.ties import SourceOrder, TieRule
from semid.errors import SemidError

ARCHIVE = RawFile(
    "ml-1m.zip",
    "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    "https://grouplens.org/datasets/movielens/1m/",
)
CHECKSUMS = MappingProxyType({"ml-1m.zip": "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"})

_RATINGS, _MOVIES = "ml-1m/ratings.dat", "ml-1m/movies.dat"


class Movielens1m(RatingsBuilder):
    """MovieLens-1M: every rating an interaction, every rated movie an item. Users' attributes are not read."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""Put {ARCHIVE.name} from {ARCHIVE.page}, or the folder ml-1m/ unpacked from it,
    into the manual folder. Without it, it is downloaded."""
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=f"1m-{table}") for table in ("items", "histories")]  # noqa: RUF012
    TEXTS = ("title",)

    def _located(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Path]:
        try:
            unpacked = {name: Path(dl_manager.manual_dir) / name for name in (_RATINGS, _MOVIES)}
        except AssertionError:  # TFDS raises it for a folder that is missing or empty
            unpacked = {}
        if unpacked and all(path.is_file() for path in unpacked.values()):
            return unpacked
        return dict([locate(ARCHIVE, dl_manager)])

    def _interactions(self, paths: Mapping[str, Path]) -> Interactions:
        path = _member(paths, _RATINGS)
        return read_interactions(parse_lines(path, _rating), path)

    def _items(self, paths: Mapping[str, Path], wanted: set[str]) -> dict[str, dict]:
        movies = parse_lines(_member(paths, _MOVIES), _movie, encoding="latin-1")
        return {item_id: movie for item_id, movie in movies if item_id in wanted}


def _member(paths: Mapping[str, Path], name: str) -> Path | zipfile.Path:
    if name in paths:
        return paths[name]
    archive = paths[ARCHIVE.name]
    try:
        member = zipfile.Path(archive, name)
    except DAMAGED as error:
        raise SemidError(f"{archive}: not a zip archive ({error}); download it again") from None
    if not member.is_file():
        raise SemidError(f"{archive}: no {name} in it; download it again")
    return member


def _rating(line: str) -> Interaction:
    user_id, item_id, rating, seconds = line.split("::")
    return interaction(user_id, item_id, milliseconds=1000 * int(seconds), rating=float(rating))


def _movie(line: str) -> tuple[str, dict]:
    item_id, title, genres = line.split("::")
    return item_id, {"title": clean(title), "categories": genres.split("|")}


def read_movielens(
    *,
    manual_dir: str | Path,
    data_dir: str | Path,
    name: str = "movielens-1m",
    split_rule: SplitRule = LeaveOneOut(),
    ties: TieRule = SourceOrder(),
    checksums: Mapping[str, str] = CHECKSUMS,
) -> Dataset:
    """MovieLens-1M from `ml-1m.zip` or the folder `ml-1m` in `manual_dir`, else downloaded.

    The dataset is prepared once, as array_record files below `data_dir`, and read from there afterwards. `checksums`
    maps names of raw files to their expected sha256. Items are the rated movies by ascending number, with `title`
    (including the year) and `categories` (genres). Raises SemidError naming the file that is missing, damaged or
    changed.
    """
    data_dir = artifacts.local_only(data_dir, "TensorFlow Datasets prepares files there")
    builders = [
        Movielens1m(config=config.name, data_dir=data_dir, checksums=checksums)
        for config in Movielens1m.BUILDER_CONFIGS
    ]
    source = {"type": "movielens", "version": "1m"}
    return read_dataset(builders, manual_dir=manual_dir, name=name, split_rule=split_rule, ties=ties, source=source)
