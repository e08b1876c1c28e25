"""Commands that are killed or meet a full disk, and are then repeated: the result must equal that of a clean run."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from experiments.faults.children import run_command, start_command
from experiments.faults.world import COMMANDS, lay_out, words

# Names of files and folders that are being written.
_WRITING = re.compile(r"\.writing[-.]|orbax-checkpoint-tmp|\.replaced-")
_CHANGES = {"os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir"}
_TIMES = {"created", "digest", "sha256"}  # of a manifest: the first is a time, the others are of it


class Clean(NamedTuple):
    """An undisturbed run of a command: its files, its seconds, and its number of moments inside a write."""

    files: dict[str, str]
    seconds: float
    moments: int


@dataclass
class Moments:
    """Audit hook for moments inside a write: a file or folder below `out` is opened for writing, made, renamed or
    removed while a temporary name exists there. Each moment adds a byte to `log`; the last one kills the process."""

    out: Path
    log: Path
    last: int | None = None
    number: int = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in _CHANGES or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))
        if not changes or str(self.out) not in os.fsdecode(str(arguments[0])) or not _written(self.out):
            return
        self.number += 1
        with self.log.open("ab") as file:
            file.write(b".")
        if self.number == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def measure(world: Path, *, trials: int, seed: int) -> dict[str, Any]:
    """Kill every command in turn, every third time at a moment inside a write; then run it again."""
    results: dict[str, Any] = {}
    for number in range(trials):
        command = list(COMMANDS)[number % len(COMMANDS)]
        dice, inside = random.Random(seed + number), number // len(COMMANDS) % 3 == 2
        with tempfile.TemporaryDirectory() as home:
            left = _killed(command, world, Path(home), _clean(command, world), dice, inside=inside)
            fault = _again(command, world, Path(home), _clean(command, world))
        _note(results, command, fault, "of these inside a write" if left else None)
    return results


def fill_disks(world: Path, *, trials: int, seed: int) -> dict[str, Any]:
    """Run commands on disks that are too small, then again after enlarging the disks."""
    results: dict[str, Any] = {}
    for number in range(trials):
        command = list(COMMANDS)[number % len(COMMANDS)]
        with tempfile.TemporaryDirectory() as home:
            disk = Path(home) / "out"
            disk.mkdir()
            size = 4096 * random.Random(seed + number).randrange(2, 40)
            if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=False).returncode:
                return {"mount": {"outcomes": {"refused: needs root": 1}, "bad": []}}
            try:
                fault = _filled(command, world, Path(home), _clean(command, world))
            finally:
                subprocess.run(["umount", "--lazy", disk], check=True)  # a killed writer may still be ending
        _note(results, command, fault, None)
    return results


def _note(results: dict[str, Any], command: str, fault: str | None, more: str | None) -> None:
    result = results.setdefault(command, {"outcomes": Counter(), "bad": []})
    result["outcomes"]["fault" if fault else "same"] += 1
    print(f"{command}: {fault or 'same'}", flush=True)
    if more:
        result["outcomes"][more] += 1
    if fault:
        result["bad"].append(fault)


@functools.cache
def _clean(command: str, world: Path) -> Clean:
    """The second of two runs, as the first one compiles programs."""
    for _ in range(2):
        with tempfile.TemporaryDirectory() as name:
            out, moments = Path(name) / "out", Path(name) / "moments"
            lay_out(command, world=world, out=out)
            moments.touch()
            started = time.monotonic()
            start_command(
                words(command, world=world, out=out), log=Path(name) / "log", hook=Moments(out, moments)
            ).join()
            clean = Clean(tree(out, name), time.monotonic() - started, moments.stat().st_size)
    return clean


def _killed(command: str, world: Path, home: Path, clean: Clean, dice: random.Random, *, inside: bool) -> bool:
    """Begin a command and kill it; tell whether something was left that was being written."""
    out, seconds = home / "out", dice.random() * clean.seconds
    last = dice.randint(1, max(clean.moments, 1)) if inside else None
    lay_out(command, world=world, out=out)
    child = start_command(
        words(command, world=world, out=out), log=home / "log", hook=Moments(out, home / "moments", last)
    )
    child.join(None if inside else seconds)
    child.kill()
    child.join()
    return bool(_written(out))


def _filled(command: str, world: Path, home: Path, clean: Clean) -> str | None:
    """Fault of a command on a full disk, or after it has grown; one that fits is right as well."""
    out = home / "out"
    full = out / "filler"
    try:
        lay_out(command, world=world, out=out)
    except OSError:  # what it changes does not fit
        subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
        subprocess.run(["rm", "-rf", *out.iterdir()], check=True)
        lay_out(command, world=world, out=out)
        with full.open("wb") as file:
            file.write(bytes(64 * 2**20 - 2**14 - sum(p.stat().st_size for p in out.rglob("*") if p.is_file())))
    ended = run_command(words(command, world=world, out=out), log=home / "log")
    lines = [line for line in ended.text.splitlines() if line.startswith("semid: ")]
    if ended.status not in (0, 1) or "Traceback" in ended.text or "(unexpected;" in ended.text:
        return f"{command}: on a full disk: status {ended.status}: {ended.text[-900:]}"
    if ended.status and not lines:
        return f"{command}: on a full disk: no line of semid: {ended.text[-900:]}"
    full.unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
    return _again(command, world, home, clean)


def _again(command: str, world: Path, home: Path, clean: Clean) -> str | None:
    """Run a command to its end where it ended before its time; the difference from a clean run, if there is one."""
    ended = run_command(words(command, world=world, out=home / "out"), log=home / "log")
    if ended.status:
        return f"{command}: given again: {ended.text[-900:]}"
    found = tree(home / "out", str(home))
    if found == clean.files:
        return None
    others = {name for name in found.keys() & clean.files.keys() if found[name] != clean.files[name]}
    more, less = sorted(found.keys() - clean.files.keys()), sorted(clean.files.keys() - found.keys())
    return f"{command}: other bytes {sorted(others)}, more {more}, missing {less}"


def _written(folder: Path) -> set[str]:
    return {path for path in _names(str(folder)) if _WRITING.search(path)}


def _names(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry.path
                if entry.is_dir(follow_symlinks=False):
                    yield from _names(entry.path)
    except OSError:  # gone meanwhile
        return


def tree(folder: Path, home: str) -> dict[str, str]:
    """Digests of the files below a folder, without the times that they were made at and the path of `home`."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "config.yaml")
    return {str(path.relative_to(folder)): _content(path, home) for path in files}


def _content(path: Path, home: str) -> str:
    content = path.read_bytes()
    if path.name in ("manifest.json", "head.json"):
        value = json.loads(content.decode().replace(home, ""))
        content = json.dumps({key: value[key] for key in value.keys() - _TIMES}, sort_keys=True).encode()
    if path.parent.name == "changes":
        content = str(pq.read_table(path).to_pydict()).encode()  # its header has the time
    return hashlib.sha256(content.replace(home.encode(), b"")).hexdigest()
