"""Speed and memory of the main job on one dataset: data to codes, a generator epoch, the search, peak memory.

    python -m experiments.benchmarks.pipeline --dataset ../shared/data/amazon14_beauty --out runs/spine.json

Each stage is timed after a warm-up of the same shapes, so that compilation is reported apart. The budgets in brackets
are for Beauty on 2 CPU cores. `matmul` is what the machine gave at that moment on a 1024-cubed float32 product: times
of two runs compare only where it does.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.layout import read_layout
from semid import GeneratorConfig, Recommender, TokenizerConfig, tokenize
from semid.artifacts import try_file, write_json
from semid.generators import LossTables, content_features, generator_loss, training_counts
from semid.recommender import ItemData, ModelSpec
from semid.training import batches, create_state, make_mesh, make_optimizer, make_step, pack, put_batch
from seq_models import ItemTables


def main(dataset: Path, out: Path = Path("runs/spine.json"), beam_size: int = 50, epochs: int = 3) -> None:
    """Measure, print and write JSON.

    Args:
        dataset: Folder that `semid prepare layout` reads.
        out: File to write.
        beam_size: Beams per user.
        epochs: Generator epochs to time; the fastest and the median are given.
    """
    out = try_file(out)
    figures: dict[str, Any] = {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    started = time.monotonic()
    data = read_layout(dataset)
    with tempfile.TemporaryDirectory() as folder:
        catalog = tokenize(data, TokenizerConfig(), out=Path(folder) / "catalog")
    figures["data to codes, s (120)"] = time.monotonic() - started

    config, features = GeneratorConfig(), content_features(data, None)
    width = 0 if features is None else features.shape[1]
    spec = ModelSpec(config.model, catalog.level_sizes, len(catalog), width, config.max_history)
    model = spec.build(seed=0)
    figures |= _epochs(model, data, catalog, features, config, epochs)
    recommender = Recommender(model, catalog, spec=spec, items=ItemData(training_counts(data), features))
    figures |= _search(recommender, data.splits.test.histories, beam_size)
    figures["peak memory, GiB (3)"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures["matmul, GFLOP/s"] = _matmul()
    for name, value in figures.items():
        print(f"{name:45s} {value:.2f}" if isinstance(value, float) else f"{name:45s} {value}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, figures)


def _epochs(
    model: Any, data: Any, catalog: Any, features: np.ndarray | None, config: GeneratorConfig, epochs: int
) -> dict[str, Any]:
    packed = pack(data.splits.train, max_history=config.max_history, row_length=config.row_length)
    size, mesh = config.training.batch_size, make_mesh()
    steps = -(-len(packed.history) // size)
    tables = LossTables(ItemTables.from_arrays(catalog.codes, features, training_counts(data)))
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.training.optimizer, num_steps=steps * (epochs + 1))
        state = create_state(model, optimizer, mesh)
        step = make_step(model, optimizer, generator_loss, tables=tables, seed=0, num_steps=10, mesh=mesh)
        feed = batches(packed, batch_size=size, num_batches=steps * epochs + 1, seed=0)
        started = time.monotonic()
        state, metrics = step(state, put_batch(next(feed), mesh))
        jax.block_until_ready(metrics)
        compiled, seconds = time.monotonic() - started, []
        for _ in range(epochs):
            started = time.monotonic()
            for _ in range(steps):
                state, metrics = step(state, put_batch(next(feed), mesh))
            jax.block_until_ready(metrics)
            seconds.append(time.monotonic() - started)
    return {
        "targets an epoch": int((packed.segments != 0).sum()),
        "share of positions filled": float((packed.segments != 0).mean()),
        "generator epoch, s, median (8)": float(np.median(seconds)),
        "generator epoch, s, fastest": min(seconds),
        "first step with compilation, s": compiled,
    }


def _search(recommender: Recommender, histories: Any, beam_size: int) -> dict[str, Any]:
    started = time.monotonic()
    recommender.rank(histories.take(slice(0, 4096)), k=10, exclude_seen=False, beam_size=beam_size)
    warm = time.monotonic() - started
    started = time.monotonic()
    recommender.rank(histories, k=10, exclude_seen=False, beam_size=beam_size)
    seconds = time.monotonic() - started
    return {
        "users searched": len(histories),
        f"beam search of {beam_size}, s (60)": seconds,
        "warm-up of the search, s": warm,
    }


def _matmul(size: int = 1024, repeats: int = 20) -> float:
    x = jnp.ones((size, size))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(x, x))
    started = time.monotonic()
    for _ in range(repeats):
        jax.block_until_ready(multiply(x, x))
    return repeats * 2 * size**3 / (time.monotonic() - started) / 1e9


if __name__ == "__main__":
    tyro.cli(main)
