"""The main job on the embedded simulated catalogue, as the commands a user would type. No download.

    python -m experiments.demo --out runs/demo        # or: make demo

Leaves dataset/, catalog/, model/, sasrec/, metrics.json, examples.json and report.html in the output folder. The oracle
in the table knows the simulator's true next-item distribution: no model can beat it but by chance. A second run skips
what is there. About 2 minutes on 2 CPU cores.
"""

from __future__ import annotations

import time
from pathlib import Path

import tyro

from semid import Dataset, cli


def main(out: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Run every stage into `out`.

    Args:
        out: Folder for all results.
        seed: Seed of the simulated world, the tokenizer and the models.
    """
    started = time.monotonic()
    stages = f"--dataset {out}/dataset", f"--catalog {out}/catalog", f"--seed {seed}"
    data, catalog, seeded = stages
    _run(f"prepare simulated --out {out}/dataset {seeded}")
    _run(f"tokenize {data} --out {out}/catalog {seeded}")
    _run(f"train {data} {catalog} --out {out}/model {seeded}")
    _run(f"train {data} {catalog} --out {out}/sasrec {seeded} dense-config")
    _run(f"evaluate --model {out}/model {out}/sasrec {data} --split test --beam-size 50")
    history = Dataset.load(out / "dataset").splits.test.histories
    first = Dataset.load(out / "dataset").item_ids.take(history[0]).to_pylist()
    _run(f"recommend --model {out}/model --history {','.join(first)} -k 5")
    _run(f"export {catalog} --format hf-tokens --out {out}/catalog_tokens.json")
    _run(f"report {out}")
    print(f"\ndone in {time.monotonic() - started:.0f} s; open {out}/report.html in a browser")


def _run(command: str) -> None:
    print(f"\n$ semid {command}", flush=True)
    cli.main(command.split())


if __name__ == "__main__":
    tyro.cli(main)
