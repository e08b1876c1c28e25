"""Memory of the processes of training with distillation: the data, the training rows, and the teacher's best items.

    python -m experiments.benchmarks.training_input --out runs/training_input.json

A dataset of random interactions is written once. Then as many processes as are asked for read it together, each as a
training would, and say at each point what memory is their own, and how much of files they have mapped, which the
system takes back when it needs it. The teacher is not a model: it ranks items at random, in no time.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import tyro

from semid.artifacts import Origin, read_json, try_file, write_json
from semid.data import Dataset
from semid.generators import GeneratorConfig, ObjectiveConfig, TaughtHistories, training_rows
from semid.training import PackedRows, batches, join_processes
from seq_models import Layout, TeacherItems

_BATCHES, _ROWS = 200, 256


@dataclass(frozen=True)
class Anything:
    """A teacher that ranks items at random."""

    item_ids: pa.Array
    digest: str = "0" * 64
    origin: Origin | None = None

    def best(self, rows: PackedRows, *, k: int) -> TeacherItems:
        """As many items as asked for."""
        rng = np.random.default_rng(0)
        shape = (*rows.targets.shape, k)
        return TeacherItems(rng.integers(0, len(self.item_ids), shape, np.int32), rng.random(shape, np.float32))


def main(out: Path = Path("runs/training_input.json"), interactions: int = 4_000_000, items: int = 50_000) -> None:
    """Measure one process and two, print and write JSON.

    Args:
        out: File to write.
        interactions: Interactions of the dataset, ten per user.
        items: Items of the dataset.
    """
    out = try_file(out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _dataset(interactions, items).save(folder / "data")
        figures = {f"{count} processes": _measured(folder, count) for count in (1, 2)}
    write_json(out, {"interactions": interactions, "items": items} | figures)
    for name, of_each in figures.items():
        print(name, *of_each, sep="\n  ")


def _dataset(interactions: int, items: int) -> Dataset:
    rng = np.random.default_rng(0)
    ids = pa.array([f"i{row}" for row in range(items)])
    user = pa.array([f"u{number}" for number in range(interactions // 10)]).take(
        pa.array(np.repeat(np.arange(interactions // 10), 10))
    )
    log = {"user_id": user, "item_id": ids.take(pa.array(rng.integers(0, items, len(user))))}
    log["timestamp"] = pa.array(np.arange(len(user)))
    return Dataset.build(pa.table({"item_id": ids}), pa.table(log), name="random")


def _measured(folder: Path, count: int) -> list[dict[str, Any]]:
    """The measurements of each of a number of processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for process in range(count):
        cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(process)}
        command = [sys.executable, "-m", "experiments.benchmarks.training_input", "worker", str(folder)]
        started.append(subprocess.Popen(command, env={**os.environ, **cluster, "JAX_NUM_CPU_DEVICES": "1"}))
    if sum(process.wait() for process in started):
        raise SystemExit("a process failed")
    return [read_json(folder / f"{process}.json") for process in range(count)]


def _work(folder: Path) -> None:
    """Read the dataset and some batches like a process of a training, and write the memory used."""
    join_processes()
    process, figures = (jax.process_index(), jax.process_count()), {}
    jax.devices()
    figures["libraries"] = _memory()
    data = Dataset.load(folder / "data")
    data.splits  # noqa: B018
    figures["data"] = _memory()
    config = GeneratorConfig(objective=ObjectiveConfig(distillation=1.0))
    rows = training_rows(data, config, Layout.PACKED)
    figures["rows"] = _memory()
    taught = TaughtHistories(rows, Anything(data.item_ids), config.objective)
    taught.prepare(folder / f"shares of {process[1]}")
    figures["teacher"] = _memory()
    for _ in batches(taught, batch_size=_ROWS, num_batches=_BATCHES, seed=0, process=process):
        pass
    figures["batches"] = _memory()
    write_json(folder / f"{process[0]}.json", figures)


def _memory() -> dict[str, int]:
    """MiB of this process: private memory, its peak, and mapped files."""
    status = Path("/proc/self/status").read_text()
    sizes = {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("RssAnon", "RssFile", "VmHWM")}  # type: ignore[index]
    return {name: size >> 10 for name, size in sizes.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        _work(Path(sys.argv[2]))
    else:
        tyro.cli(main)
