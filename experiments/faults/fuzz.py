"""Fuzzing with mutated small files: a parser must read them or refuse them with a SemidError."""

from __future__ import annotations

import copy
import json
import math
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.faults.damage import json_places
from experiments.faults.parsers import parsers
from experiments.faults.trials import run_trials
from semid.errors import SemidError

_HANG = 20  # seconds of processor time
_BATCH = 1_000  # trials per process, as each must import its modules first
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
_ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 10**30, 2.5, 1e308, math.inf, math.nan),
    *("", "\ud800", "\0", "7", "9" * 30, [], [None], [[]], {}, {"": None}),
)


def mutated(content: bytes, dice: random.Random) -> bytes:
    """One to four mutations: flipped bits, slices removed, repeated or moved, and words that are hard to parse.

    For JSON, in half of the cases, other names, and values of another type or size.
    """
    if dice.random() < 0.5 and (edited := _edited(content, dice)) is not None:
        return edited
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


def _edited(content: bytes, dice: random.Random) -> bytes | None:
    """JSON, or a line of JSON, with one or two odd names or values; None for other content."""
    lines = content.splitlines()
    whole = len(lines) < 2 or not lines[0].endswith(b"}")
    at = 0 if whole else dice.randrange(len(lines))
    try:
        value = json.loads(content if whole else lines[at])
    except ValueError:
        return None
    for _ in range(dice.randint(1, 2)):
        if places := list(json_places(value)):
            holder, key = dice.choice(places)
            odd = copy.deepcopy(dice.choice(_ODD))  # a copy, as the next edit may change it
            if isinstance(holder, dict) and isinstance(odd, str):
                holder[odd] = holder.pop(key)
            else:
                holder[key] = odd
    edited = json.dumps(value).encode() + b"\n"
    return edited if whole else b"\n".join([*lines[:at], edited, *lines[at + 1 :]])


def measure(world: Path, name: str, *, seconds: float, seed: int) -> dict[str, Any]:
    """Number of trials, their outcomes, and the first faults, of one parser."""
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
        signal.signal(signal.SIGPROF, _hang)
        warnings.simplefilter("ignore")

    def __call__(self, name: str, dice: random.Random) -> dict[str, Any]:
        del name
        if time.monotonic() > self._until:
            return {"outcome": "skipped"}
        path, content = Path(self._home.name) / f"items{self._suffix}", mutated(self._content, dice)
        path.write_bytes(content)
        signal.setitimer(signal.ITIMER_PROF, _HANG)
        try:
            self._read(path)
            return {"outcome": "read"}
        except SemidError as error:
            named = self._home.name in str(error)
            return {"outcome": "named"} if named else {"outcome": "unnamed", "text": str(error)}
        except _Hang:
            return {"outcome": "hang", "input": content[:4000].hex()}
        except Exception as error:
            text = "".join(traceback.format_exception(error))[-900:]
            return {"outcome": "traceback", "text": text, "input": content[:4000].hex()}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


class _Hang(BaseException):
    """Raised in a parser that takes too long; a BaseException, so that the parser does not catch it."""


def _hang(*_: Any) -> None:
    raise _Hang
