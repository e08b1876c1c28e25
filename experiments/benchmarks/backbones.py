"""Wall time of backbones by the length of histories: attention, its relation term, and the state-space recurrence.

    python -m experiments.benchmarks.backbones --out runs/backbones.json

One history per row and about as many positions at every length; forward passes, and steps with the gradient, of a
backbone alone. Variants take turns; figures are the median and the fastest, which a busy machine changes less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from semid.artifacts import try_file, write_json
from seq_models import Mixer, TransformerConfig
from seq_models.backbones import build_backbone


def main(
    out: Path = Path("runs/backbones.json"),
    lengths: tuple[int, ...] = (20, 200, 2_000),
    positions: int = 4_000,
    dim: int = 64,
    layers: int = 2,
    heads: int = 2,
    state_size: int = 64,
    rounds: int = 7,
) -> None:
    """Measure, print and write JSON.

    Args:
        out: File to write.
        lengths: Items of a history.
        positions: Items of all histories of a batch.
        dim: Width of the states.
        layers: Blocks.
        heads: Heads.
        state_size: State size of the recurrence per dimension.
        rounds: Runs of each variant.
    """
    out, rows = try_file(out), []
    plain = TransformerConfig(dim, layers, heads, hidden=2 * dim, dropout=0.0, state_size=state_size)
    variants: dict[str, dict[str, Any]] = {
        "attention": {},
        "relation": {"relation": True},
        "state-space": {"mixer": Mixer.STATE_SPACE},
    }
    for length in lengths:
        shape = (max(positions // length, 1), length)
        runs = {
            (name, what): run
            for name, options in variants.items()
            for what, run in _programs(replace(plain, **options), shape).items()
        }
        seconds = _times(runs, rounds)
        for name in variants:
            rows.append({"length": length, "rows": shape[0], "backbone": name} | _row(seconds, name))
            print(rows[-1], flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows)


def _row(seconds: dict[tuple[str, str], list[float]], name: str) -> dict[str, float]:
    figures: dict[str, Callable[[list[float]], float]] = {"median": median, "fastest": min}
    return {
        f"{what}_{figure}_ms": round(1e3 * of(seconds[name, what]), 2)
        for what in ("forward", "step")
        for figure, of in figures.items()
    }


def _programs(config: TransformerConfig, shape: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """Compiled forward pass, and forward pass with the gradient of the parameters."""
    graph, parameters = nnx.split(build_backbone(config, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (*shape, config.dim))
    segments = jnp.ones(shape, jnp.int32)

    def states(parameters: Any) -> Any:
        return nnx.merge(graph, parameters)(x, segments)

    forward = jax.jit(states).lower(parameters).compile()
    step = jax.jit(jax.grad(lambda p: jnp.mean(jnp.sin(states(p))))).lower(parameters).compile()
    return {"forward": lambda: forward(parameters), "step": lambda: step(parameters)}


def _times(runs: dict[tuple[str, str], Callable[[], Any]], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds per round for each variant."""
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for at in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if at:  # the first round is a warm-up
                taken[name].append(time.perf_counter() - start)
    return taken


if __name__ == "__main__":
    tyro.cli(main)
