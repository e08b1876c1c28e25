"""The main job on the embedded simulated catalogue, as the commands a user would type. No download.

    python -m experiments.demo --out runs/demo        # or: make demo

Leaves dataset/, catalog/, model/, sasrec/, metrics.json, examples.json and report.html in the output folder. The oracle
in the table knows the simulator's true next-item distribution: no model can beat it but by chance. A second run skips
what is there. About 2 minutes on 2 CPU cores.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import tyro

from semid import Dataset, cli


def main(
    out: Path = Path("runs/demo"),
    seed: int = 0,
    num_items: int = 2_000,
    num_users: int = 4_000,
    epochs: float | None = None,
) -> None:
    """Run every stage into `out`.

    Args:
        out: Folder for all results.
        seed: Seed of the simulated world, the tokenizer and the models.
        num_items: Items of the simulated world.
        num_users: Users of the simulated world.
        epochs: Passes of the tokenizer and of both models over their data; none given: the defaults of each.
    """
    started = time.monotonic()
    data, catalog = ("--dataset", out / "dataset"), ("--catalog", out / "catalog")
    seeded, passes = ("--seed", seed), () if epochs is None else ("--epochs", epochs)
    training = (*data, *catalog, *seeded, *passes)
    sizes = ("--num-items", num_items, "--num-users", num_users)
    _run("prepare", "simulated", "--out", out / "dataset", *sizes, *seeded)
    _run("tokenize", *data, "--out", out / "catalog", *seeded, "rq-vae", *passes)
    _run("train", *training, "--out", out / "model")
    _run("train", *training, "--out", out / "sasrec", "--features", "sasrec")  # no features: item ids alone
    _run("evaluate", "--model", out / "model", out / "sasrec", *data, "--split", "test", "--beam-size", 50)
    dataset = Dataset.load(out / "dataset")
    history = dataset.item_ids.take(dataset.splits.test.histories[0]).to_pylist()
    _run("recommend", "--model", out / "model", "--history", ",".join(history), "-k", 5)
    _run("export", *catalog, "--format", "hf-tokens", "--out", out / "catalog_tokens.json")
    _run("report", out)
    print(f"\ndone in {time.monotonic() - started:.0f} s; open {out}/report.html in a browser")


def _run(*words: object) -> None:
    arguments = [str(word) for word in words]
    print(f"\n$ semid {shlex.join(arguments)}", flush=True)
    cli.main(arguments)


if __name__ == "__main__":
    tyro.cli(main)
