"""Reliability tests: damaged artifacts, killed processes, full disks, bad input, and fuzzed parsers.

    python -m experiments.reliability --out runs/reliability                     # hours
    python -m experiments.reliability --out runs/reliability --small             # minutes
    python -m experiments.reliability --out runs/reliability --parts kills disks

Tiny artifacts of every kind are made once, in OUT/world. Each part writes its figures to OUT/PART.json (damage first
those of each kind to OUT/damage, fuzz those of each parser to OUT/fuzz); existing figures of the same counts are read.
Full disks are small tmpfs, which need root; without root they are skipped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.faults import damage, fuzz, inputs, kills
from experiments.faults.parsers import parsers
from experiments.faults.world import make_world
from semid.cli.app import run_command
from semid.stage import run_recorded

Measure = Callable[[], dict[str, Any]]
Part = Literal["damage", "kills", "disks", "input", "fuzz"]
PARTS: tuple[Part, ...] = ("damage", "kills", "disks", "input", "fuzz")


@dataclass(frozen=True)
class Counts:
    """Number of trials of each part."""

    flips: int = 1_000
    """Single bit flips of each kind of artifact."""
    others: int = 200
    """Truncations, deletions, swaps, edits of JSON, and added files, each, of each kind."""
    kills: int = 300
    """Kills over all commands, at random times, every third one while a file is being written."""
    disks: int = 20
    """Full disks."""
    seconds: float = 3_600
    """Seconds of fuzzing per parser."""


SMALL = Counts(flips=50, others=10, kills=10, disks=3, seconds=10)


def main(
    out: Path = Path("runs/reliability"),
    parts: tuple[Part, ...] = PARTS,
    small: bool = False,
    seed: int = 0,
    counts: tyro.conf.OmitArgPrefixes[Counts] = Counts(),
) -> None:
    """Measure the parts, print what came out, and write OUT/PART.json.

    Args:
        out: Folder for the world and the results.
        parts: What to measure.
        small: Use small counts, whatever `counts` are.
        seed: Seed of damages, times and mutations.
        counts: How much of each.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out.absolute() / "cache"))  # read by the children
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    world, counts = make_world(out.absolute() / "world"), SMALL if small else counts
    for part in parts:
        request = {"part": part, "seed": seed, **asdict(counts)}
        trials = _trials(part, world, counts, seed)
        if isinstance(trials, Mapping):
            files = {name: out / part / f"{name.replace('/', '_')}.json" for name in trials}
            trials = partial(_each, request, trials, files)
        show(part, run_recorded(request, out / f"{part}.json", trials))


def _trials(part: Part, world: Path, counts: Counts, seed: int) -> Measure | Mapping[str, Measure]:
    """Measurement of a part, or several by name."""
    if part == "damage":
        of_each = {how: counts.flips if how == "flip" else counts.others for how in damage.DAMAGES}
        return {kind: partial(damage.measure, world, kind, counts=of_each, seed=seed) for kind in damage.DOORS}
    if part == "fuzz":
        seconds = counts.seconds
        return {name: partial(fuzz.measure, world, name, seconds=seconds, seed=seed) for name in parsers(world)}
    whole: dict[str, Measure] = {
        "kills": partial(kills.measure, world, trials=counts.kills, seed=seed),
        "disks": partial(kills.fill_disks, world, trials=counts.disks, seed=seed),
        "input": partial(inputs.measure, world),
    }
    return whole[part]


def _each(request: dict[str, Any], trials: Mapping[str, Measure], files: Mapping[str, Path]) -> dict[str, Any]:
    """The outcomes of each trial, stored in its file, so that a stopped run of hours can resume."""
    return {name: run_recorded(request | {"of": name}, files[name], trial) for name, trial in trials.items()}


def show(part: str, results: Mapping[str, Any]) -> None:
    """Print a line per trial, and every bad outcome."""
    print(f"\n{part}\n")
    for name, result in results.items():
        nested = result["outcomes"]
        total = Counter[str]()
        for value in nested.values():
            total.update(value if isinstance(value, dict) else {})
        outcomes = total or Counter(nested)
        print(f"| {name} | " + ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items())) + " |")
        for record in result["bad"]:
            print(f"  {str(record)[:600]}")


if __name__ == "__main__":
    run_command(None, lambda words: tyro.cli(main, args=list(words)), name="reliability")
