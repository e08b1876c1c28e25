"""Training step and search at three sizes on this machine's accelerators: rates, and shares of the chip's peak.

    python -m experiments.benchmarks.accelerator_speed --out runs/accelerator_speed.json

The promise is the roofline of `semid compile`: the least time that matrix products, memory or links need at the chip's
published rates. Data and parameters are random. On one GPU it is meant to take less than eight minutes, most of them
compiling; what is measured is written at once, and no program is begun after --minutes. Without published rates, as on
a CPU, there are times alone.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.benchmarks.accelerators import decoder
from semid.artifacts import try_file, write_json
from semid.generators import GeneratorConfig, LossTables, generator_loss
from semid.recommender import ModelSpec, Scorer
from semid.training import (
    Compiled,
    PackedRows,
    chip_of,
    compile_for,
    create_state,
    make_mesh,
    make_optimizer,
    make_step,
    put_batch,
)
from seq_models import CodeTrie, ItemTables, Remat, RequestBatch, RQTransformerConfig

# Warm-up runs of a program, and timed rounds.
_WARM_UP, _ROUNDS = 2, 3


@dataclass(frozen=True)
class Size:
    """A generator, and the sizes of its catalogue."""

    name: str
    config: GeneratorConfig
    items: int
    level_sizes: tuple[int, ...]
    users: int = 256
    """Batch sizes of the search."""
    beam_size: int = 50


def _sizes() -> list[Size]:
    default = replace(GeneratorConfig(), model=RQTransformerConfig().with_dropout(0.1))
    return [
        Size("default generator", default, 12_000, (256, 256, 256)),
        Size("decoder of 100M", decoder(768, 12, 2048, Remat.DOTS, 1024), 1_000_000, (1024, 1024, 1024)),
        Size("decoder of 1B", decoder(2048, 20, 5504, Remat.FULL, 256), 1_000_000, (1024, 1024, 1024)),
    ]


def main(out: Path = Path("runs/accelerator_speed.json"), steps: int = 10, minutes: float = 7.0) -> None:
    """Measure, print and write JSON.

    Args:
        out: File to write.
        steps: Runs of a program per round; three rounds are timed.
        minutes: Time after which no further program is started.
    """
    out, started = try_file(out), time.monotonic()
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    figures: dict[str, Any] = {"devices": devices, "jax": jax.__version__, "left out": [], "programs": []}
    with tempfile.TemporaryDirectory() as cache:  # programs are compiled for analysis, and cached for their runs
        jax.config.update("jax_compilation_cache_dir", cache)
        for size in _sizes():
            for name, program in (("step", _training), ("search", _search)):
                if time.monotonic() - started > 60 * minutes:
                    figures["left out"].append(f"{size.name}, {name}")
                else:
                    figures["programs"].append({"program": f"{size.name}, {name}"} | program(size, steps))
                    print(figures["programs"][-1], flush=True)
                write_json(out, figures)


def _training(size: Size, steps: int) -> dict[str, Any]:
    """The training step with the config's batch size."""
    config, mesh, (model, tables, _, history) = size.config, make_mesh(), _parts(size)
    optimizer = make_optimizer(config.training.optimizer, num_steps=10_000)
    loss = functools.partial(generator_loss, objective=config.objective)
    step = make_step(model, optimizer, loss, tables=LossTables(tables), seed=0, num_steps=10_000, mesh=mesh)
    state = create_state(model, optimizer, mesh)
    rows = history(config.training.batch_size, config.row_length)
    batch = put_batch(PackedRows(rows, np.roll(rows, -1, axis=1), np.ones_like(rows)), mesh)
    needs = compile_for(step.trace(state, batch), devices=mesh.size, chip=_chip())

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return _figures(run, needs, steps) | {"positions": rows.size}


def _search(size: Size, steps: int) -> dict[str, Any]:
    """The search for a batch of users, on one device."""
    model, tables, trie, history = _parts(size)
    rows = jnp.asarray(history(size.users, size.config.max_history))
    scorer = Scorer.from_model(model, tables=tables, trie=trie, softmax_over=size.config.objective.normalization)
    ask = {"k": size.beam_size, "beam_size": size.beam_size}
    requests = RequestBatch(rows, jnp.ones_like(rows))
    needs = compile_for(scorer.trace_top(requests, **ask), devices=1, chip=_chip())
    return _figures(lambda: scorer.top(requests, **ask), needs, steps) | {"users": size.users}


def _parts(size: Size) -> tuple[Any, ItemTables, CodeTrie, Callable[..., np.ndarray]]:
    """An untrained model, tables and trie of random codes, and a function that makes random histories."""
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, codes, size.items, np.int32) for codes in size.level_sizes], axis=1)
    spec = ModelSpec(size.config.model, size.level_sizes, size.items, 0, size.config.max_history)
    tables = ItemTables.from_arrays(codes, None, np.ones(size.items, np.int32))
    trie = CodeTrie.from_codes(codes, size.level_sizes)
    return spec.build(seed=0), tables, trie, lambda *shape: rng.integers(0, size.items, shape, np.int32)


def _chip() -> Any:
    return chip_of("cuda") if jax.default_backend() == "gpu" else None


def _figures(run: Callable[[], Any], needs: Compiled, steps: int) -> dict[str, Any]:
    """Seconds per run (median of the rounds), and the shares of the chip's peak and of its roofline."""
    for _ in range(_WARM_UP):
        jax.block_until_ready(run())
    rounds = []
    for _ in range(_ROUNDS):
        started = time.monotonic()
        jax.block_until_ready([run() for _ in range(steps)])
        rounds.append((time.monotonic() - started) / steps)
    seconds = float(np.median(rounds))
    figures: dict[str, Any] = {"ms": 1e3 * seconds, "TFLOP/s": needs.products / seconds / 1e12}
    figures["compiled in, s"] = needs.seconds
    if needs.chip is not None:
        figures |= {
            "bound": needs.bound,
            "ms at best": 1e3 * max(needs.times.values()),
            "share of matrix peak": needs.products / seconds / needs.chip.flops,
            "share of the promise": max(needs.times.values()) / seconds,
        }
    return figures


if __name__ == "__main__":
    tyro.cli(main)
