"""Time and memory of large item graphs: simulated shops with ten interactions per item, with and without content.

    python -m experiments.benchmarks.graphs --out runs/graphs.json

Times are of the processor, all threads together; peak memory is that of a process that makes one shop and its graph,
libraries included. Neighbors found: of the exact ones of 256 items.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Float

from semid.artifacts import try_file, write_json
from semid.data.simulated import SimulatedConfig, simulate
from semid.graphs import ItemGraph, ItemGraphConfig
from semid.graphs.neighbors import neighbors

# Items whose neighbors are compared with exact ones.
_FEW = 256


def main(
    out: Path = Path("runs/graphs.json"),
    items: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    content_dim: int = 64,
    users: int = 1_000,
    exact: int = 200_000,
) -> None:
    """Measure, print and write JSON.

    Args:
        out: File to write.
        items: Numbers of items, with as many users of ten interactions on average.
        content_dim: Dimensions of content vectors.
        users: Users whose next items are ranked.
        exact: Largest number of items for which neighbors are searched again and compared with exact ones.
    """
    out, rows = try_file(out), []
    context = multiprocessing.get_context("spawn")
    for number in items:
        for content in (False, True):
            with context.Pool(1) as pool:  # a process of its own, to measure its peak memory
                rows.append(pool.apply(_measured, (number, content_dim if content else 0, users, number <= exact)))
            print(rows[-1], flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows)


def _measured(items: int, content_dim: int, users: int, exact: bool) -> dict[str, Any]:
    world = SimulatedConfig(
        num_items=items, num_users=items, mean_length=10.0, content_dim=max(content_dim, 8), images=False
    )
    dataset = simulate(world).dataset
    before, seconds = _peak(), time.process_time()
    graph = ItemGraph.fit(dataset, ItemGraphConfig(columns=None if content_dim else ()))
    fitted = time.process_time()
    graph.rank(dataset.splits.test.histories.take(slice(0, users)), k=10)
    ranked, peak = time.process_time(), _peak()
    return {
        "items": items,
        "interactions": len(dataset.item),
        "content": content_dim,
        "edges": int((graph.edges.rows >= 0).sum()),
        "fit, s": round(fitted - seconds, 2),
        "fit, us per item": round((fitted - seconds) / items * 1e6, 1),
        "ranking, ms per user": round((ranked - fitted) / users * 1e3, 3),
        "peak memory, GiB": round(peak, 2),
        "of it before the graph": round(before, 2),
        "neighbors found": None
        if graph.vectors is None or not exact
        else round(_recall(graph.vectors, graph.config.neighbors), 4),
    }


def _recall(vectors: Float[np.ndarray, "items dim"], k: int) -> float:
    """Share of the exact `k` nearest neighbors of a few items that the graph's search finds."""
    few = np.random.default_rng(0).permutation(len(vectors))[:_FEW]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit[few] @ unit.T
    cosine[np.arange(len(few)), few] = -1
    nearest, found = np.argpartition(-cosine, k, axis=1)[:, :k], neighbors(vectors, k=k)[few]
    return float((nearest[:, :, None] == found[:, None]).any(axis=2).mean())


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    tyro.cli(main)
