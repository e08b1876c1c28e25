"""Damaged artifacts: one change to one file, then the artifact is read as users would."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import string
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.faults.trials import run_trials
from semid.artifacts import read_json, sha256_json
from semid.bulk import write_catalog
from semid.bulk.encoding import digest_of
from semid.catalog import SemanticCatalog, versions
from semid.data import Dataset
from semid.errors import SemidError
from semid.joint import trained_encoder
from semid.recommender import Recommender
from semid.recommender.stablehlo import LOADER
from semid.report import write_report
from semid.tokenizers import SemanticTokenizer
from semid.training import HISTORY, OptimizerConfig, TrainState, create_state, make_mesh, make_optimizer, named_leaves
from semid.training.checkpoints import Checkpoints

_CONTROL_EVERY = 100
_REQUEST = {"config": {"epochs": 3}, "seed": 0}


# Readers of artifacts, by kind: each returns a digest of what a user gets from an artifact's folder.


def _dataset(folder: Path) -> str:
    return Dataset.load(folder).replace().digest


def _catalog(folder: Path) -> str:
    catalog = SemanticCatalog.load(folder)
    history = (folder / HISTORY).read_text(encoding="utf-8")
    return sha256_json([catalog.digest, read_json(folder / "health.json"), history])


def _changes(folder: Path) -> str:
    catalog = SemanticCatalog.load(folder)
    appended = catalog.item_ids[120:]
    return catalog.digest + _of_arrays({"vectors": versions.vectors(folder, ["content"], appended)})


def _tokenizer(folder: Path) -> str:
    return digest_of(SemanticTokenizer.from_pretrained(folder))


def _model(folder: Path) -> str:
    recommender = Recommender.from_pretrained(folder)
    read = (recommender.scorer.params, recommender.scorer.tables, recommender.scorer.trie)
    popular = recommender.most_popular(10)
    leaves = {str(n): np.asarray(leaf) for n, leaf in enumerate(jax.tree.leaves((*read, *popular)))}
    return recommender.catalog.digest + _of_arrays(leaves)


def _end_to_end(folder: Path) -> str:
    encoder = named_leaves(nnx.state(trained_encoder(folder)))
    return _model(folder) + _tokenizer(folder) + _of_arrays({k: np.asarray(v) for k, v in encoder.items()})


def _program(folder: Path) -> str:
    """As `docs/stablehlo.md` loads it, without semid."""
    made: dict[str, Any] = {}
    try:
        exec(LOADER.replace('"program"', repr(str(folder)), 1), made)
    except (ValueError, KeyError) as error:  # that code does not raise SemidError
        raise SemidError(str(error)) from None
    program = (folder / "program.stablehlo").read_bytes()
    return sha256_json([made["settings"], made["item_ids"], program.hex()]) + _of_arrays(jax.device_get(made["arrays"]))


def _report(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as name:
        return hashlib.sha256(write_report([folder], Path(name) / "report.html").read_bytes()).hexdigest()


def _codes(folder: Path) -> str:
    """The catalogue made from files of codes, as by `--new-catalog`."""
    files = [str(folder / f"{name}_items.parquet") for name in ("new", "other")]
    with tempfile.TemporaryDirectory() as name:
        write_catalog(files, Path(name) / "joined", tokenizer=folder / "tokenizer")
        return SemanticCatalog.load(Path(name) / "joined").digest


def _checkpoints(folder: Path) -> str:
    """The state that a run resumes from. A warning, which names removed checkpoints, is raised as SemidError."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            opened = Checkpoints(folder, request=_REQUEST, select="score")
        except UserWarning as warning:
            raise SemidError(str(warning)) from None
    try:
        if opened.last_step is None:
            return "none"
        read = opened.restore(_state(), opened.last_step)
        return f"{opened.last_step} {opened.best_step} {(folder / HISTORY).read_bytes().hex()}" + _of_arrays(
            {name: np.asarray(leaf) for name, leaf in named_leaves(read).items()}
        )
    finally:
        opened.close()


class _Position:
    """Stub of a position in the data."""

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def get_state(self) -> bytes:
        return json.dumps(self.at).encode()


def _state() -> TrainState:
    optimizer = make_optimizer(OptimizerConfig(), num_steps=9)
    return create_state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optimizer, make_mesh())


def make_checkpoints(folder: Path) -> None:
    """Write checkpoints of three steps, the first of which is the best."""
    checkpoints = Checkpoints(folder, request=_REQUEST, select="score")
    state = _state()
    for step in (1, 2, 3):
        with (folder / HISTORY).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
        checkpoints.save(jax.tree.map(lambda x: x + x.dtype.type(1), state), _Position(step), {"score": 1 / step})
        state = jax.tree.map(lambda x: x + x.dtype.type(1), state)
    checkpoints.close()


def _of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


DOORS: dict[str, Callable[[Path], str]] = {
    "dataset": _dataset,
    "catalogue": _catalog,
    "changes": _changes,
    "tokenizer": _tokenizer,
    "model": _model,
    "package": _model,
    "program": _program,
    "end-to-end": _end_to_end,
    "report data": _report,
    "bulk outputs": _codes,
    "bulk catalogue": _changes,
    "checkpoints": _checkpoints,
}
_FOLDERS = {
    "dataset": "dataset", "catalogue": "catalog", "tokenizer": "catalog", "model": "model", "package": "package",
    "program": "program", "end-to-end": "end_to_end", "bulk catalogue": "joined",
}  # fmt: skip


def lay_out(kind: str, world: Path, folder: Path) -> tuple[Path, ...]:
    """Copy an artifact of the world to `folder`; return the parts to damage."""
    if kind == "changes":
        shutil.copytree(world / "grown", folder)
        return (*sorted((folder / "changes").iterdir()), folder / "head.json")
    if kind == "report data":
        for name in ("dataset", "catalog", "model"):
            shutil.copytree(world / name, folder / name)
        for name in ("metrics.json", *read_json(world / "metrics.json")["files"]):
            shutil.copy(world / name, folder / name)
    elif kind == "bulk outputs":
        shutil.copytree(world / "codes", folder)
        shutil.copytree(world / "catalog", folder / "tokenizer")
        return tuple(sorted(folder.glob("*.parquet")))
    elif kind == "checkpoints":
        shutil.copytree(world / "checkpoints", folder)
    else:
        shutil.copytree(world / _FOLDERS[kind], folder)
    return tuple(path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "config.yaml")


# Damages: each changes a file, or two, and returns the chosen one; None if it could not.


def _flip(parts: Sequence[Path], dice: random.Random) -> Path | None:
    part = dice.choice(parts)
    content = bytearray(part.read_bytes())
    if not content:
        return None
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    part.write_bytes(content)
    return part


def _truncate(parts: Sequence[Path], dice: random.Random) -> Path | None:
    part = dice.choice(parts)
    content = part.read_bytes()
    part.write_bytes(content[: dice.randrange(max(len(content), 1))])
    return part if content else None


def _delete(parts: Sequence[Path], dice: random.Random) -> Path | None:
    part = dice.choice(parts)
    part.unlink()
    return part


def _swap(parts: Sequence[Path], dice: random.Random) -> Path | None:
    part, other = dice.choice(parts), dice.choice(parts)
    one, two = part.read_bytes(), other.read_bytes()
    part.write_bytes(two)
    other.write_bytes(one)
    return part if one != two else None


def _edit(parts: Sequence[Path], dice: random.Random) -> Path | None:
    """Change, drop or add one entry of a JSON file."""
    documents = [part for part in parts if part.suffix == ".json"]
    if not documents:
        return None
    part = dice.choice(documents)
    value = json.loads(part.read_text(encoding="utf-8"))
    holder, key = dice.choice(list(json_places(value)))
    match dice.randrange(3), holder[key]:
        case 0, _:
            del holder[key]
        case 1, _ if isinstance(holder, dict):
            holder["added"] = 1
        case _, bool(old):
            holder[key] = not old
        case _, int(old) | float(old):
            holder[key] = old + 1
        case _, str(old):
            holder[key] = old + "0"
        case _:
            holder[key] = "changed"
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return part


def json_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All entries in a JSON value, as pairs of container and key."""
    keys: Iterable[Any] = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(value[key], dict | list):
            yield from json_places(value[key])


def _add(parts: Sequence[Path], dice: random.Random) -> Path | None:
    """Add a foreign file: a copy under another name, or noise."""
    part, name = dice.choice(parts), "".join(dice.choices(string.ascii_lowercase, k=6))
    new = part.parent / dice.choice((f".{name}", name, f"{name}{part.suffix}", f"{name}/{part.name}"))
    new.parent.mkdir(exist_ok=True)
    new.write_bytes(part.read_bytes() if dice.random() < 0.5 else dice.randbytes(99))
    return new


DAMAGES = {"flip": _flip, "truncate": _truncate, "delete": _delete, "swap": _swap, "edit": _edit, "add": _add}


def measure(world: Path, kind: str, *, counts: Mapping[str, int], seed: int) -> dict[str, Any]:
    """Outcomes by damage, and the first records of bad ones."""
    tasks = [how for how in counts for _ in range(counts[how])]
    with tempfile.TemporaryDirectory() as name:
        records = list(run_trials(_Trials, (world, kind), tasks, seed=seed, folder=Path(name)))
    outcomes = {how: dict(Counter(r["outcome"] for r in records if r["task"] == how)) for how in counts}
    bad = [record for record in records if record["outcome"] not in ("named", "harmless", "none")]
    return {"outcomes": outcomes, "bad": bad[:50]}


class _Trials:
    """Trials of one kind in one process, each on its own copy, with a clean control after every hundredth."""

    def __init__(self, world: Path, kind: str) -> None:
        self._home = tempfile.TemporaryDirectory()
        self._copy, self._door = Path(self._home.name) / "copy", DOORS[kind]
        self._world, self._kind, self._number = world, kind, 0
        self._clean = self._read_clean()

    def _lay_out(self) -> tuple[Path, ...]:
        shutil.rmtree(self._copy, ignore_errors=True)
        return lay_out(self._kind, self._world, self._copy)

    def _read_clean(self) -> str:
        self._lay_out()
        return self._door(self._copy)

    def __call__(self, how: str, dice: random.Random) -> dict[str, Any]:
        self._number += 1
        if self._number % _CONTROL_EVERY == 0 and self._read_clean() != self._clean:
            return {"outcome": "control failed"}
        part = DAMAGES[how](self._lay_out(), dice)
        if part is None:
            return {"outcome": "none"}
        where = str(part.relative_to(self._copy))
        try:
            return {"part": where, "outcome": "harmless" if self._door(self._copy) == self._clean else "wrong"}
        except (SemidError, OSError) as error:
            return {
                "part": where,
                "outcome": "named" if str(self._copy) in str(error) else "unnamed",
                "text": str(error),
            }
        except Exception as error:
            return {"part": where, "outcome": "traceback", "text": "".join(traceback.format_exception(error))[-900:]}
