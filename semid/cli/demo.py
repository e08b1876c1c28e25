"""The command `semid demo`."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from semid import artifacts
from semid.cli import app
from semid.cli.choices import PathOrUrl
from semid.cli.console import console


@dataclass(frozen=True)
class Demo:
    """Run the whole job on the embedded simulated catalogue, as the commands a user would type. No download.

    Writes dataset/, catalog/, graph/, sasrec/, model/, metrics.json, examples.json, users.parquet and report.html into
    the folder. The oracle in the table knows the simulator's true next-item distribution: no model can beat it except
    by chance. The first run takes 250 CPU seconds; a second one skips what exists.
    """

    out: PathOrUrl = Path("runs/demo")
    """Folder for all results."""
    seed: int = 0
    """Seed of the simulated world, the tokenizer and the models."""
    num_items: int = 2_000
    """Items of the simulated world."""
    num_users: int = 4_000
    """Users of the simulated world."""
    epochs: float | None = None
    """Passes of the tokenizer and of both models over their data. None given: the defaults of each."""

    def run(self) -> None:
        from semid.training import TrainingConfig

        TrainingConfig(epochs=self.epochs)  # raises for wrong epochs before any work
        started, out = time.monotonic(), artifacts.as_url(self.out) or artifacts.resolved(self.out)
        data, catalog = ("--dataset", f"{out}/dataset"), ("--catalog", f"{out}/catalog")
        seeded, passes = ("--seed", self.seed), () if self.epochs is None else ("--epochs", self.epochs)
        training = (*data, *catalog, *seeded, *passes)
        sizes = ("--num-items", self.num_items, "--num-users", self.num_users)
        _run("prepare", "simulated", "--out", f"{out}/dataset", *sizes, *seeded)
        _run("tokenize", *data, "--out", f"{out}/catalog", *seeded, "rq-vae", *passes)
        _run("graph", *data, "--out", f"{out}/graph", "--tune")
        _run("train", *training, "--out", f"{out}/sasrec", "--features", "sasrec")  # no features: item ids alone
        parts = ("--teacher", f"{out}/sasrec", "--graph", f"{out}/graph", "--teacher-graph", 0.5)
        _run("train", *training, *parts, "--out", f"{out}/model")
        _run("evaluate", "--model", f"{out}/model", f"{out}/sasrec", *data, "--split", "test", "--beam-size", 50)
        history = ",".join(_first_history(f"{out}/dataset"))
        _run("recommend", "--model", f"{out}/model", "--history", history, "-k", 5, "--explain")
        _run("export", *catalog, "--format", "hf-tokens", "--out", f"{out}/catalog_tokens.json")
        _run("report", out)
        console.print(f"\ndone in {time.monotonic() - started:.0f} s; open {out}/report.html in a browser")


def _run(*words: object) -> None:
    arguments = [str(word) for word in words]
    console.print(f"\n$ semid {shlex.join(arguments)}")
    app.run(arguments[0], app.parse(arguments))


def _first_history(folder: str) -> list[str]:
    """Item ids of the first test history."""
    from semid.data import Dataset

    dataset = Dataset.load(folder)
    ids: list[str] = dataset.item_ids.take(dataset.splits.test.histories[0]).to_pylist()
    return ids
