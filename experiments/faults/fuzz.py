"""Mutated small files: each parser reads them, refuses them with a SemidError, or has a fault."""

from __future__ import annotations

import math
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.faults.trials import run_trials
from semid.artifacts import load_tensors, read_manifest
from semid.bulk.encoding import UNSTEADY
from semid.catalog.changes import read_change
from semid.catalog.export import read_tokens
from semid.data import Dataset, VectorFile, read_id_file
from semid.errors import SemidError
from semid.training import read_history

_HANG = 20  # seconds
_BATCH = 200
_ITEMS = b'item_id,title,price\na,Red shoe,1.5\nb,"Blue, big",2\nc,Green,3\n'
_INTERACTIONS = b"user_id,item_id,timestamp\n" + b"".join(
    b"u%d,%s,%d\n" % (user, item, 1_600_000_000 + user) for user in range(3) for item in (b"a", b"b", b"c")
)
_WORDS = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b",",
    b"\n",
    b"[",
    b"{",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 30,
)


def _tables(suffix: str) -> Callable[[Path], Any]:
    """Import of the mutated file as items, with interactions that are as they should be."""

    def read(path: Path) -> Any:
        other = path.with_name(f"interactions{suffix}")
        if not other.exists():
            other.write_bytes(_as(suffix, _INTERACTIONS))
        return Dataset.from_tables(path, other, name="fuzz")

    return read


def _as(suffix: str, table: bytes) -> bytes:
    import pyarrow.csv as csv

    if suffix == ".csv":
        return table
    if suffix == ".tsv":
        return table.replace(b'"Blue, big"', b"Blue big").replace(b",", b"\t")
    import io
    import json

    rows = csv.read_csv(io.BytesIO(table)).to_pylist()
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parsers(world: Path) -> dict[str, tuple[bytes, str, Callable[[Path], Any]]]:
    """By name: a file as it should be, its suffix, and what reads it."""
    change = world / "grown" / "changes" / "000001.parquet"
    model = world / "model"
    vectors = (world / "new_items.parquet").read_bytes()

    def blocks(path: Path) -> list[Any]:
        try:
            return list(VectorFile.open(str(path), dim=32, id_column="item_id", columns=("content",)).blocks(64))
        except UNSTEADY as error:  # whoever reads vectors tries again, and then names the file
            raise SemidError(str(error)) from None

    def manifest(path: Path) -> Any:
        return read_manifest(path.rename(path.with_name("manifest.json")).parent)

    return {
        "CSV": (_ITEMS, ".csv", _tables(".csv")),
        "TSV": (_as(".tsv", _ITEMS), ".tsv", _tables(".tsv")),
        "JSONL": (_as(".jsonl", _ITEMS), ".jsonl", _tables(".jsonl")),
        "Parquet of vectors": (vectors, ".parquet", blocks),
        "index.json": (b'{"a": ["<a_1>", "<b_2>"], "b": ["<a_0>", "<b_3>"]}', ".json", read_tokens),
        "codes as TSV": (b"a\t1 2\nb\t0 3\n", ".tsv", read_tokens),
        "change": (change.read_bytes(), ".parquet", lambda path: read_change(path, None)),
        "weights": ((model / "model.safetensors").read_bytes(), ".safetensors", load_tensors),
        "manifest.json": ((model / "manifest.json").read_bytes(), ".json", manifest),
        "history.jsonl": ((model / "history.jsonl").read_bytes(), ".jsonl", read_history),
        "ids": (b"a\nb\nc d\n", ".txt", read_id_file),
    }


def mutated(content: bytes, dice: random.Random) -> bytes:
    """One to four changes: bits, slices that go, come again or move, and words that parsers stumble over."""
    value = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        at, width = dice.randrange(len(value) + 1), dice.randint(1, 16)
        match dice.randrange(5):
            case 0 if at < len(value):
                value[at] ^= 1 << dice.randrange(8)
            case 1:
                del value[at : at + width]
            case 2:
                value[at:at] = value[at : at + width]
            case 3:
                value[at:at] = dice.choice(_WORDS)
            case _:
                other = dice.randrange(len(value) + 1)
                value[at : at + width] = value[other : other + width]
    return bytes(value)


def measure(world: Path, name: str, *, seconds: float, seed: int) -> dict[str, Any]:
    """Number of tries, their outcomes, and the first faults, of one parser."""
    outcomes, bad = Counter[str](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as home:
        list(run_trials(_Parser, (world, name, math.inf), [name], seed=seed, folder=Path(home)))  # imports take a while
        until = time.monotonic() + seconds
        number = 0
        while time.monotonic() < until:
            folder = Path(home) / str(number)
            folder.mkdir()
            for record in run_trials(_Parser, (world, name, until), [name] * _BATCH, seed=seed + number, folder=folder):
                outcomes[record["outcome"]] += 1
                if record["outcome"] not in ("read", "named", "skipped") and len(bad) < 20:
                    bad.append(record)
            number += _BATCH
    outcomes.pop("skipped", None)
    return {"outcomes": dict(outcomes), "bad": bad}


class _Parser:
    """One parser in a process of its own."""

    def __init__(self, world: Path, name: str, until: float) -> None:
        self._content, self._suffix, self._read = parsers(world)[name]
        self._home, self._until = tempfile.TemporaryDirectory(), until
        signal.signal(signal.SIGALRM, _hang)
        warnings.simplefilter("ignore")

    def __call__(self, name: str, dice: random.Random) -> dict[str, Any]:
        del name
        if time.monotonic() > self._until:
            return {"outcome": "skipped"}
        path, content = Path(self._home.name) / f"items{self._suffix}", mutated(self._content, dice)
        path.write_bytes(content)
        signal.alarm(_HANG)
        try:
            self._read(path)
            return {"outcome": "read"}
        except SemidError:
            return {"outcome": "named"}
        except TimeoutError:
            return {"outcome": "hang", "input": content[:4000].hex()}
        except Exception as error:
            text = "".join(traceback.format_exception(error))[-900:]
            return {"outcome": "traceback", "text": text, "input": content[:4000].hex()}
        finally:
            signal.alarm(0)


def _hang(*_: Any) -> None:
    raise TimeoutError
