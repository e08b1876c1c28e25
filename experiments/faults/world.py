"""A tiny world of every kind of artifact, and the commands that write it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pyarrow as pa

from experiments.faults.children import run_command
from experiments.faults.damage import make_checkpoints
from quantizers import Schedule
from semid.arrow import write_parquet
from semid.artifacts import write_json
from semid.config import to_dict
from semid.data import Dataset
from semid.errors import SemidError
from semid.generators import GeneratorConfig
from semid.joint import JointConfig, Objective, Phase, StepConfig
from semid.tokenizers import RQVaeConfig
from semid.training import TrainingConfig
from seq_models import RQTransformerConfig, TransformerConfig

# What writes an artifact, of the artifacts of a world; those that read what another writes come after it.
COMMANDS = {
    "prepare": "prepare simulated --num-items 120 --num-users 80 --out {out}/dataset",
    "tokenize": "tokenize --dataset {world}/dataset --out {out}/catalog rq-vae --epochs 3 --level-sizes 8 8 "
    "--hidden 16 --latent 8",
    "append": "catalog append --catalog {out}/grown --input {world}/new_items.parquet",
    "train": "train rq-transformer --dataset {world}/dataset --catalog {world}/catalog --out {out}/model --epochs 3 "
    "--validation-beam 10 --dim 16 --layers 1 --hidden 16",
    "evaluate": "evaluate --model {world}/model --dataset {world}/dataset --beam-size 10 --out {out}/metrics.json",
    "package": "package --model {world}/model --metrics {world}/metrics.json --out {out}/package",
    "export-program": "export-program --model {world}/model --beam-size 10 --out {out}/program",
    "export": "export --catalog {world}/catalog --format hf-tokens --out {out}/tokens.json",
    "encode": "tokenize --catalog {world}/catalog --input {world}/new_items.parquet {world}/other_items.parquet "
    "--out {out}/codes --new-catalog {out}/joined",
    "report": "report {world} --out {out}/report.html",
    "train-end-to-end": "train-end-to-end --dataset {world}/dataset --config {world}/end_to_end.json "
    "--out {out}/end_to_end",
}
# Further versions of the catalogue `grown`.
_LATER = (
    "catalog remove --catalog {world}/grown --items new-1 new-2",
    "catalog append --catalog {world}/grown --input {world}/other_items.parquet",
)
_BRIEF = TrainingConfig(epochs=1, batch_size=64)
_TINY = JointConfig(
    encoder=_BRIEF,
    tokenizer=RQVaeConfig(level_sizes=(8, 8), hidden=(8,), latent=4, training=_BRIEF),
    generator=GeneratorConfig(
        RQTransformerConfig(TransformerConfig(dim=8, layers=1, heads=2, hidden=8)), training=_BRIEF
    ),
    joint=(Phase(_BRIEF, StepConfig(Objective.only(generation=Schedule(1.0)))),),
    finetune=_BRIEF,
    tie_break=120,
)


def words(command: str, *, world: Path, out: Path) -> list[str]:
    """The words of one of `COMMANDS`."""
    return [word.format(world=world, out=out) for word in shlex.split(COMMANDS[command])]


def lay_out(command: str, *, world: Path, out: Path) -> None:
    """Make the folder that a command writes into, with what it changes."""
    out.mkdir(parents=True, exist_ok=True)
    if command == "append":
        shutil.copytree(world / "catalog", out / "grown")


def make_world(world: Path) -> Path:
    """Run all commands, each unless its output is there; a world is made once."""
    if (world / "complete").exists():
        return world
    shutil.rmtree(world, ignore_errors=True)
    for command in COMMANDS:
        lay_out(command, world=world, out=world)
        _run(words(command, world=world, out=world), world)
        if command == "prepare":
            _write_inputs(world)
    for later in _LATER:
        _run([word.format(world=world) for word in later.split()], world)
    make_checkpoints(world / "checkpoints")
    (world / "complete").touch()
    return world


def _run(command: list[str], world: Path) -> None:
    ended = run_command(command, log=world.with_name("world.log"), seconds=3600)  # it compiles, on any machine
    if ended.status:
        raise SemidError(f"semid {shlex.join(command)}: {ended.text}")


def _write_inputs(world: Path) -> None:
    """Items that the dataset lacks, in two files, and the settings of end-to-end training."""
    items = Dataset.load(world / "dataset").items
    for name, rows in (("new", slice(0, 20)), ("other", slice(20, 60))):
        some = items.slice(rows.start, rows.stop - rows.start)
        ids = pa.array([f"{name}-{row}" for row in range(some.num_rows)])
        write_parquet(
            some.set_column(some.column_names.index("item_id"), "item_id", ids), world / f"{name}_items.parquet"
        )
    write_json(world / "end_to_end.json", to_dict(_TINY))
