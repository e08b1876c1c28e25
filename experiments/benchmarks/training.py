"""What ways of training give: microbatches, input put on the device ahead of time, parameters shared by devices.

    python -m experiments.benchmarks.training --out runs/training.json
    JAX_NUM_CPU_DEVICES=8 python -m experiments.benchmarks.training --rounds 0 --out runs/training_devices.json

Speed is compared within rounds, in which every way takes its turn: on a shared machine their ratio to the plain way,
median over rounds, is steadier than any time. Histories are random; their lengths are those of Amazon's Beauty.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from semid.artifacts import write_json
from semid.data.batches import PackedRows, batches, pack
from semid.data.histories import Histories
from semid.generator import GeneratorConfig
from semid.models import ItemTables, ModelSpec, build_model
from semid.objective import LossTables, code_loss
from semid.training import (
    MeshConfig,
    OptimizerConfig,
    StepContext,
    create_state,
    make_mesh,
    make_optimizer,
    make_step,
    put_batch,
)
from semid.training.gradients import Gradients, accumulated

ITEMS, SIZES = 12_101, (256, 256, 256)


def main(
    out: Path = Path("runs/training.json"),
    batch_size: int = 64,
    microbatches: tuple[int, ...] = (2, 4, 8),
    rounds: int = 9,
    steps: int = 10,
) -> None:
    """Measure, print and write JSON.

    Args:
        out: File to write.
        batch_size: Rows of a batch.
        microbatches: Numbers of microbatches to compare with the batch at once.
        rounds: Times that every way takes its turn; 0 leaves the speed out.
        steps: Steps of a turn.
    """
    config = GeneratorConfig()
    spec = ModelSpec(config.model, SIZES, ITEMS, num_features=0, max_history=config.max_history)
    model, rows, tables = build_model(spec, seed=0), _rows(config), _tables()
    figures: dict[str, Any] = {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "batch": batch_size,
    }
    for parts in (1, *microbatches):
        name = f"memory of the gradients of {parts} microbatches, MiB"
        figures[name] = _temporaries(model, rows, tables, batch_size, parts)
    for sharing in _meshes():
        figures[f"state on a device, {sharing}, MiB"] = _state_on_a_device(model, sharing)
    if rounds:
        figures |= _speed(model, rows, tables, batch_size, microbatches, rounds, steps)
    for name, value in figures.items():
        print(f"{name:75s} {value:,.3f}" if isinstance(value, float) else f"{name:75s} {value}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, figures)


def _rows(config: GeneratorConfig) -> PackedRows:
    rng = np.random.default_rng(0)
    lengths = np.minimum(2 + rng.geometric(0.2, 22_363), 200)
    lists = np.split(rng.integers(0, ITEMS, lengths.sum()), np.cumsum(lengths)[:-1])
    return pack(
        Histories.from_lists([one.tolist() for one in lists]),
        max_history=config.max_history,
        row_length=config.row_length,
    )


def _tables() -> LossTables:
    codes = np.random.default_rng(0).integers(0, SIZES, (ITEMS, len(SIZES))).astype(np.int32)
    return LossTables(ItemTables.of(codes, None, np.ones(ITEMS, np.int32)))


def _meshes() -> list[MeshConfig]:
    sizes = (MeshConfig(), MeshConfig(fsdp=2), MeshConfig(tensor=2), MeshConfig(2, 2), MeshConfig(fsdp=8))
    return [mesh for mesh in sizes if jax.device_count() % (mesh.fsdp * mesh.tensor) == 0]


def _state_on_a_device(model: nnx.Module, sharing: MeshConfig) -> float:
    """Parameters and moments that the first device holds, MiB."""
    state = create_state(model, make_optimizer(OptimizerConfig(), num_steps=10), make_mesh(config=sharing))
    return sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state)) / 2**20


def _temporaries(model: nnx.Module, rows: PackedRows, tables: LossTables, batch_size: int, parts: int) -> float | None:
    """What the compiled gradients need beside their inputs and outputs, MiB."""
    mesh = make_mesh()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def of_rows(params: nnx.State, rest: nnx.State, rows: PackedRows, key: Any) -> Gradients:
        def loss(params: nnx.State) -> Any:
            context = StepContext(key, jnp.zeros(()))
            return code_loss(nnx.merge(graph, params, rest, copy=True), rows, tables, context)

        (value, _), found = jax.value_and_grad(loss, has_aux=True)(params)
        return Gradients(found, {"loss": value}, rest)

    def whole(params: nnx.State, rest: nnx.State, rows: PackedRows, key: Any) -> Gradients:
        if parts == 1:
            return of_rows(params, rest, rows, key)
        return accumulated(of_rows, params, rest, rows, key, parts=parts, mesh=mesh)

    batch = put_batch(PackedRows(*(array[:batch_size] for array in rows)), mesh)
    program = jax.jit(whole).lower(params, rest, batch, jax.random.key(0, impl="rbg")).compile()
    found = program.memory_analysis()
    return found.temp_size_in_bytes / 2**20 if found else None  # not every backend tells


def _speed(
    model: nnx.Module,
    rows: PackedRows,
    tables: LossTables,
    batch_size: int,
    microbatches: tuple[int, ...],
    rounds: int,
    steps: int,
) -> dict[str, float]:
    """Steps a second of the plain way, and how many times that the others make."""
    turn = {
        "plain": _way(model, rows, tables, batch_size, steps),
        **{
            f"{parts} microbatches": _way(model, rows, tables, batch_size, steps, accumulate=parts)
            for parts in microbatches
        },
        "input put ahead": _way(model, rows, tables, batch_size, steps, feed=_ahead),
    }
    seconds = [{name: take() for name, take in turn.items()} for _ in range(rounds + 1)][1:]  # the first compiles
    figures = {"plain, steps/s, median": float(np.median([steps / one["plain"] for one in seconds]))}
    for name in list(turn)[1:]:
        ratios = [one["plain"] / one[name] for one in seconds]
        figures[f"{name}, steps/s over plain, median"] = float(np.median(ratios))
        figures[f"{name}, steps/s over plain, quartiles"] = np.quantile(ratios, (0.25, 0.75)).tolist()
    return figures


def _way(
    model: nnx.Module,
    rows: PackedRows,
    tables: LossTables,
    batch_size: int,
    steps: int,
    *,
    accumulate: int = 1,
    feed: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> Callable[[], float]:
    """A function that takes `steps` more steps and returns the seconds."""
    mesh = make_mesh()
    optimizer = make_optimizer(OptimizerConfig(), num_steps=10_000)
    state = create_state(model, optimizer, mesh)
    step = make_step(
        model, optimizer, code_loss, tables=tables, seed=0, num_steps=10_000, mesh=mesh, accumulate=accumulate
    )
    stream = batches(rows, batch_size=batch_size, num_batches=10_000, seed=0)
    on_device = feed(put_batch(batch, mesh) for batch in stream)

    def take() -> float:
        nonlocal state
        started = time.monotonic()
        for batch in itertools.islice(on_device, steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        return time.monotonic() - started

    return take


def _ahead(stream: Iterator[Any]) -> Iterator[Any]:
    """The same batches, each put on the device before the step of the one before it starts."""
    before = next(stream)
    for batch in stream:
        yield before
        before = batch


if __name__ == "__main__":
    tyro.cli(main)
