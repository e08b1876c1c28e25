"""5-core Amazon reviews of 2014 (McAuley et al., SIGIR 2015), 2018 (Ni et al., EMNLP 2019) and 2023 (Hou et al., 2024).

Formats differ by year: reviews are JSON lines in 2014 and 2018, CSV with milliseconds in 2023; metadata are Python
literals in 2014 and JSON lines later, with other names for the same fields.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from semid import artifacts
from semid.data.builders.raw import (
    Interaction,
    Interactions,
    clean,
    interaction,
    json_object,
    parse_lines,
    read_interactions,
)
from semid.data.builders.tables import RatingsBuilder, RawFile, locate, read_dataset
from semid.data.dataset import Dataset
from semid.data.splits import LeaveOneOut, SplitRule
from semid.data.ties import SourceOrder, TieRule
from semid.errors import SemidError, did_you_mean

_UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data"


@dataclass(frozen=True)
class Release:
    """URLs of a release's files, with `{}` for the category, and its categories."""

    page: str
    reviews: str
    metadata: str
    categories: tuple[str, ...]

    def files(self, category: str) -> tuple[RawFile, RawFile]:
        """The file of reviews and the file of metadata."""
        urls = (self.reviews.format(category), self.metadata.format(category))
        reviews, metadata = (RawFile(url.rsplit("/", 1)[1], url, self.page) for url in urls)
        return reviews, metadata


RELEASES = {
    2014: Release(
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/reviews_{}_5.json.gz",
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/meta_{}.json.gz",
        (
            *("Amazon_Instant_Video", "Apps_for_Android", "Automotive", "Baby", "Beauty", "Books", "CDs_and_Vinyl"),
            *("Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Digital_Music", "Electronics"),
            *("Grocery_and_Gourmet_Food", "Health_and_Personal_Care", "Home_and_Kitchen", "Kindle_Store"),
            *("Movies_and_TV", "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies"),
            *("Sports_and_Outdoors", "Tools_and_Home_Improvement", "Toys_and_Games", "Video_Games"),
        ),
    ),
    2018: Release(
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/",
        f"{_UCSD}/amazon_v2/categoryFilesSmall/{{}}_5.json.gz",
        f"{_UCSD}/amazon_v2/metaFiles2/meta_{{}}.json.gz",
        (
            *("AMAZON_FASHION", "All_Beauty", "Appliances", "Arts_Crafts_and_Sewing", "Automotive", "Books"),
            *("CDs_and_Vinyl", "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Digital_Music"),
            *("Electronics", "Gift_Cards", "Grocery_and_Gourmet_Food", "Home_and_Kitchen"),
            *("Industrial_and_Scientific", "Kindle_Store", "Luxury_Beauty", "Magazine_Subscriptions"),
            *("Movies_and_TV", "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies"),
            *("Prime_Pantry", "Software", "Sports_and_Outdoors", "Tools_and_Home_Improvement", "Toys_and_Games"),
            "Video_Games",
        ),
    ),
    2023: Release(
        "https://amazon-reviews-2023.github.io/data_processing/5core.html",
        f"{_UCSD}/amazon_2023/benchmark/5core/rating_only/{{}}.csv.gz",
        f"{_UCSD}/amazon_2023/raw/meta_categories/meta_{{}}.jsonl.gz",
        (
            *("All_Beauty", "Arts_Crafts_and_Sewing", "Automotive", "Baby_Products", "Beauty_and_Personal_Care"),
            *("Books", "CDs_and_Vinyl", "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Electronics"),
            *("Gift_Cards", "Grocery_and_Gourmet_Food", "Health_and_Household", "Home_and_Kitchen"),
            *("Industrial_and_Scientific", "Kindle_Store", "Magazine_Subscriptions", "Movies_and_TV"),
            *("Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies", "Software"),
            *("Sports_and_Outdoors", "Tools_and_Home_Improvement", "Toys_and_Games", "Unknown", "Video_Games"),
        ),
    ),
}


@dataclass(eq=False)
class AmazonConfig(tfds.core.BuilderConfig):
    """A year and a category."""

    year: int = 0
    category: str = ""


class AmazonReviews(RatingsBuilder):
    """5-core Amazon reviews of a year and a category; the items are the reviewed ones, with their metadata.

    The published files are used as they are, without a further k-core filter.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put two files into the manual folder (without them, they are downloaded):\n" + (
        "\n".join(
            f"{year}: {' and '.join(file.name for file in release.files('<category>'))} from {release.page}"
            for year, release in RELEASES.items()
        )
    )
    BUILDER_CONFIGS = [  # noqa: RUF012
        AmazonConfig(name=f"{year}-{category}-{table}", year=year, category=category)
        for year, release in RELEASES.items()
        for category in release.categories
        for table in ("items", "histories")
    ]
    TEXTS = ("title", "brand", "price", "features", "description")

    @property
    def _files(self) -> tuple[RawFile, RawFile]:
        return RELEASES[self.builder_config.year].files(self.builder_config.category)

    def _located(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Path]:
        files = self._files if self._holds_items else self._files[:1]
        return dict(locate(file, dl_manager) for file in files)

    def _interactions(self, paths: Mapping[str, Path]) -> Interactions:
        path = next(iter(paths.values()))
        if self.builder_config.year == 2023:
            rows = parse_lines(path, _rating, header="user_id,parent_asin,rating,timestamp")
        else:
            rows = parse_lines(path, _review)
        return read_interactions(rows, path)

    def _items(self, paths: Mapping[str, Path], wanted: set[str]) -> dict[str, dict]:
        parse = partial(_METADATA[self.builder_config.year], wanted=wanted)
        items: dict[str, dict] = {}
        for entry in parse_lines(list(paths.values())[1], parse):
            if entry:
                items.setdefault(*entry)  # the file of 2018 repeats lines
        return items


def _review(line: str) -> Interaction:
    review = json_object(line)
    seconds = int(review["unixReviewTime"])
    return interaction(
        review["reviewerID"], review["asin"], milliseconds=1000 * seconds, rating=float(review["overall"])
    )


def _rating(line: str) -> Interaction:
    user_id, item_id, rating, milliseconds = line.split(",")
    return interaction(user_id, item_id, milliseconds=int(milliseconds), rating=float(rating))


_Entry = tuple[str, dict] | None
_ASIN = re.compile(r"""'asin': '(\w+)'""")
_PRICE = re.compile(r"\$?(\d[\d,]*(?:\.\d+)?)")


def _metadata_2014(line: str, *, wanted: set[str]) -> _Entry:
    asin = _ASIN.search(line)
    if asin and asin[1] not in wanted:  # skips most lines: parsing a literal is slow, 0.4 ms
        return None
    record = ast.literal_eval(line)  # unlike eval, accepts only literals
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {line[:80]}")
    categories = [name for path in record.get("categories") or [] for name in path]
    return _item(record, record["asin"], wanted, brand="brand", categories=categories, features=None)


def _metadata_2018(line: str, *, wanted: set[str]) -> _Entry:
    record = json_object(line)
    if "getTime" in (record.get("title") or ""):  # a script of the web page in place of the title
        record["title"] = None
    return _item(record, record["asin"], wanted, brand="brand", categories=record.get("category"), features="feature")


def _metadata_2023(line: str, *, wanted: set[str]) -> _Entry:
    record = json_object(line)
    categories = record.get("categories")
    return _item(record, record["parent_asin"], wanted, brand="store", categories=categories, features="features")


_METADATA = {2014: _metadata_2014, 2018: _metadata_2018, 2023: _metadata_2023}


def _item(record: dict, item_id: str, wanted: set[str], *, brand: str, categories: Any, features: str | None) -> _Entry:
    if item_id not in wanted:
        return None
    names = dict.fromkeys(_text(name) for name in categories or [])  # several paths, without duplicates
    return item_id, {
        "title": _text(record.get("title")),
        "brand": _text(record.get(brand)),
        "price": _price(record.get("price")),
        "features": _text(record.get(features)),
        "description": _text(record.get("description")),
        "categories": [name for name in names if name],
    }


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(filter(None, map(_text, value)))
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    return clean(value)


def _price(value: Any) -> str:
    """Dollars as "$3.17"; empty for anything but a single amount (ranges, "None", style sheets)."""
    amount = _PRICE.fullmatch(str(value))
    return f"${float(amount[1].replace(',', '')):.2f}" if amount else ""


def read_amazon_reviews(
    year: int,
    category: str,
    *,
    manual_dir: str | Path,
    data_dir: str | Path,
    name: str | None = None,
    split_rule: SplitRule = LeaveOneOut(),
    ties: TieRule = SourceOrder(),
    checksums: Mapping[str, str] | None = None,
) -> Dataset:
    """5-core Amazon reviews of `year` (2014, 2018 or 2023) and `category` ("Beauty"), from files in `manual_dir`.

    Missing files are downloaded. The dataset is prepared once, as array_record files below `data_dir`, and read from
    there afterwards. `checksums` maps names of raw files to their expected sha256. Items are the reviewed ones by
    ascending ASIN, with `title`, `brand`, `price`, `features`, `description` and `categories`, null where unknown.
    Raises SemidError naming the file that is missing, damaged or changed.
    """
    if year not in RELEASES:
        raise SemidError(f"expected year {', '.join(map(str, RELEASES))}, got {year}")
    known = RELEASES[year].categories
    if category not in known:
        hint = did_you_mean(category, known)
        raise SemidError(f"no category {category!r} in {year}{hint} Known: {', '.join(known)}")
    configs = [f"{year}-{category}-{table}" for table in ("items", "histories")]
    data_dir = artifacts.local_only(data_dir, "TensorFlow Datasets prepares files there")
    builders = [AmazonReviews(config=config, data_dir=data_dir, checksums=checksums) for config in configs]
    source = {"type": "amazon-reviews", "year": year, "category": category}
    name = name or f"amazon-{year}-{category}"
    return read_dataset(builders, manual_dir=manual_dir, name=name, split_rule=split_rule, ties=ties, source=source)
