"""Parsing of published files: numbered lines, texts without markup, interactions grouped by user."""

from __future__ import annotations

import contextlib
import gzip
import html
import json
import lzma
import re
import struct
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from semid.errors import SemidError

T = TypeVar("T")
Interaction = tuple[str, str, int, float]  # user id, item id, milliseconds since 1970, rating

_GZIP = b"\x1f\x8b"
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_SURROGATE = re.compile("[\ud800-\udfff]")  # unpaired halves of UTF-16 characters, possible in JSON escapes
_YEAR_10000 = 253_402_300_800_000  # milliseconds since 1970
# What parsing a line can raise; the last two come from deeply nested literals.
_UNREADABLE = (ValueError, SyntaxError, KeyError, TypeError, OverflowError, RecursionError, MemoryError)
# What opening and unpacking a damaged file can raise; RuntimeError: encrypted members and unknown methods.
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, struct.error)


@dataclass(frozen=True)
class Interactions:
    """All lines of a file of ratings or reviews: ids numbered by first appearance, times in milliseconds."""

    user_ids: list[str]
    item_ids: list[str]
    user: Int[np.ndarray, " n"]
    item: Int[np.ndarray, " n"]
    time: Int[np.ndarray, " n"]
    rating: Float[np.ndarray, " n"]

    def histories(self) -> Iterator[dict]:
        """One record per user, users by first appearance, interactions by time and then file order."""
        order = np.lexsort((self.time, self.user))  # stable
        ends = np.cumsum(np.bincount(self.user, minlength=len(self.user_ids)))
        for user_id, rows in zip(self.user_ids, np.split(order, ends[:-1]), strict=True):
            items = [self.item_ids[row] for row in self.item[rows]]
            yield {"user_id": user_id, "item_id": items, "timestamp": self.time[rows], "rating": self.rating[rows]}


def read_interactions(rows: Iterable[Interaction], path: Path | zipfile.Path) -> Interactions:
    """Collect `rows`, parsed from `path`, and number their ids. Raises SemidError if there are none."""
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    user, item, time, rating = array("i"), array("i"), array("q"), array("f")
    for user_id, item_id, milliseconds, stars in rows:
        user.append(users.setdefault(user_id, len(users)))
        item.append(items.setdefault(item_id, len(items)))
        time.append(milliseconds)
        rating.append(stars)
    if not user:
        raise SemidError(f"{path}: no interactions in it; download the file again")
    times = np.asarray(time).view(np.int64)  # array("q") holds C's long long, another NumPy type than int64
    return Interactions(list(users), list(items), np.asarray(user), np.asarray(item), times, np.asarray(rating))


def interaction(user_id: str, item_id: str, *, milliseconds: int, rating: float) -> Interaction:
    """The four values, checked. Raises ValueError for invalid ids and times."""
    for value in (user_id, item_id):
        if not isinstance(value, str) or not value or _SURROGATE.search(value):
            raise ValueError(f"expected an id, got {value!r}")
    if not 0 <= milliseconds < _YEAR_10000:
        raise ValueError(f"{milliseconds} milliseconds since 1970 are no time before the year 10000")
    return user_id, item_id, milliseconds, rating


def parse_lines(
    path: Path | zipfile.Path, parse: Callable[[str], T], *, encoding: str = "utf-8", header: str | None = None
) -> Iterator[T]:
    """`parse(line)` for each non-blank line, after a first line that must equal `header`, if given.

    Gzip is recognized by content. Raises SemidError naming file and line if a line cannot be parsed.
    """
    for number, line in enumerate(_lines(path), 1):
        try:
            text = line.decode(encoding).strip()
            if header and number == 1:
                if text != header:
                    raise ValueError(f"expected the header {header!r}, got {text[:80]!r}")
            elif text:
                yield parse(text)
        except _UNREADABLE as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise SemidError(f"{path}, line {number}: {problem}; download the file again") from None


def json_object(line: str) -> dict[str, Any]:
    """Parse a line as a JSON object. Raises ValueError for other JSON."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {line[:80]}")
    return record


def _lines(path: Path | zipfile.Path) -> Iterator[bytes]:
    with contextlib.ExitStack() as stack:
        try:
            stream: Any = stack.enter_context(path.open("rb"))
            is_gzip = stream.peek(len(_GZIP))[: len(_GZIP)] == _GZIP
            yield from stack.enter_context(gzip.GzipFile(fileobj=stream)) if is_gzip else stream
        except DAMAGED as error:
            raise SemidError(f"{path}: damaged or not readable ({error}); download the file again") from None


def clean(text: str) -> str:
    """Text without HTML tags, entities and unpaired surrogates, with white space collapsed to single blanks."""
    return " ".join(html.unescape(_TAG.sub(" ", _SURROGATE.sub("", text))).split())
