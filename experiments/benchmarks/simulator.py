"""Time and memory of a large simulation: by default a million items and ten million interactions, without images.

    python -m experiments.benchmarks.simulator --out runs/simulator.json

Peak memory is that of the whole process, its libraries included.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import tyro

from semid.artifacts import try_file, write_json
from semid.data.simulated import SimulatedConfig, simulate


def main(
    out: Path = Path("runs/simulator.json"),
    num_items: int = 1_000_000,
    num_users: int = 1_000_000,
    mean_length: float = 10.0,
    content_dim: int = 8,
) -> None:
    """Measure, print and write JSON.

    Args:
        out: File to write.
        num_items: Items.
        num_users: Users.
        mean_length: Mean interactions per user, before the longest are cut.
        content_dim: Dimensions of content vectors.
    """
    out = try_file(out)
    world = SimulatedConfig(
        num_items=num_items, num_users=num_users, mean_length=mean_length, content_dim=content_dim, images=False
    )
    started = time.monotonic()
    dataset = simulate(world).dataset
    seconds = time.monotonic() - started
    figures: dict[str, Any] = {
        "items": dataset.num_items,
        "users": dataset.num_users,
        "interactions": len(dataset.item),
        "seconds": seconds,
        "interactions a second": len(dataset.item) / seconds,
        "peak memory, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    for name, value in figures.items():
        print(f"{name:45s} {value:,.2f}" if isinstance(value, float) else f"{name:45s} {value:,}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, figures)


if __name__ == "__main__":
    tyro.cli(main)
