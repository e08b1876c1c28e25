"""Time and memory of training variants.

    python -m experiments.benchmarks.training --out runs/training.json
    JAX_NUM_CPU_DEVICES=8 python -m experiments.benchmarks.training --rounds 0 --out runs/training_devices.json

Microbatches, bfloat16, rematerialisation, donated states, packed rows, long histories, the softmax over a million
items, parameters shared by devices. Speed is compared within rounds, in which every variant takes its turn: on a
shared machine their ratio to the plain variant, median over rounds, is steadier than any time. Memory is the need that
the compiled step states. Histories are random; their lengths are those of Amazon's Beauty, or all the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from semid.artifacts import try_file, write_json
from semid.data import Histories
from semid.generators import LossTables, generator_loss
from semid.recommender import ConditionSpec, ModelSpec, SequencesSpec
from semid.training import (
    MeshConfig,
    OptimizerConfig,
    PackedRows,
    batches,
    create_state,
    make_mesh,
    make_optimizer,
    make_step,
    pack,
    put_batch,
)
from seq_models import CodeConfig, FlatDecoderConfig, ItemTables, RQTransformerConfig, softmax_cross_entropy
from seq_models.layers import Precision, Remat

ITEMS, SIZES = 12_101, (256, 256, 256)
HISTORY, ROW = 20, 32  # as GeneratorConfig has them
POSITIONS = 2048  # items per batch, for rows of any length
FAMILIES: dict[str, CodeConfig] = {"rq-transformer": RQTransformerConfig(), "flat": FlatDecoderConfig()}
_EVENTS = ("buy", "click", "look")
_CONDITIONS = {
    "events as inputs": ConditionSpec(_EVENTS, event_inputs=True),
    "asked for events": ConditionSpec(_EVENTS, event_inputs=True, on_event=True),
    "asked for events, FiLM": ConditionSpec(_EVENTS, event_inputs=True, on_event=True, film=True),
    "events as inputs, event head": ConditionSpec(_EVENTS, event_inputs=True, event_head=True),
}
IDS, STATES, DIM = 1_000_000, 1024, 64  # of the softmax over items
MIB = 2**20


@dataclass(frozen=True)
class Variant:
    """A variant to train."""

    model: CodeConfig
    rows: PackedRows
    accumulate: int = 1
    donate: bool = True
    ahead: bool = False
    """Put each batch on the device before the previous step starts."""
    sequences: int = 0
    """Further code sequences of every item, as long as the first."""
    conditions: ConditionSpec | None = None

    def backbone(self, **options: Any) -> Variant:
        """The same with other options of the backbone."""
        return replace(self, model=replace(self.model, backbone=replace(self.model.backbone, **options)))


def main(
    out: Path = Path("runs/training.json"),
    rounds: int = 7,
    steps: int = 10,
    lengths: tuple[int, ...] = (20, 200, 2000),
    only: tuple[str, ...] = (),
) -> None:
    """Measure, print a table and write JSON.

    Args:
        out: File to write.
        rounds: Rounds over all variants; 0: only devices are compared.
        steps: Steps per turn; for long histories, of all turns together.
        lengths: Items of the histories whose cost is compared.
        only: Variants to compare with the plain one, by name; none given: all.
    """
    out = try_file(out)
    figures: dict[str, Any] = {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "positions of a batch": POSITIONS,
        "state on a device, MiB": {str(sharing): _state_on_a_device(sharing) for sharing in _meshes()},
        f"softmax over {IDS:,} items, {STATES} states": _softmax(run=rounds > 0),
    }
    if rounds:
        chosen = {name: one for name, one in _variants().items() if not only or name in ("plain", *only)}
        figures["variants"] = _compared(chosen, rounds, steps)
        figures["lengths"] = [_of_length(name, length, steps) for name in FAMILIES for length in lengths]
    for name, value in figures.items():
        print(table(name, value) if isinstance(value, dict | list) else f"{name}: {value}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, figures)


def _variants() -> dict[str, Variant]:
    """The plain variant first."""
    train = _histories(np.minimum(2 + np.random.default_rng(0).geometric(0.2, 22_363), 200))
    plain = Variant(RQTransformerConfig(), pack(train, max_history=HISTORY, row_length=ROW))
    events = np.random.default_rng(0).integers(1, 4, len(train.items)).astype(np.int32)
    told = replace(plain, rows=pack(replace(train, events=events), max_history=HISTORY, row_length=ROW))
    return {
        "plain": plain,
        "2 microbatches": replace(plain, accumulate=2),
        "4 microbatches": replace(plain, accumulate=4),
        "8 microbatches": replace(plain, accumulate=8),
        "input put ahead": replace(plain, ahead=True),
        "bfloat16": plain.backbone(dtype=Precision.BFLOAT16),
        "rematerialised": plain.backbone(remat=Remat.FULL),
        "state not donated": replace(plain, donate=False),
        "one history a row": replace(plain, rows=_one_a_row(train)),
        "two further code sequences": replace(plain, sequences=2),
        **{name: replace(told, conditions=spec) for name, spec in _CONDITIONS.items()},
    }


def _histories(lengths: np.ndarray) -> Histories:
    rng = np.random.default_rng(0)
    lists = np.split(rng.integers(0, ITEMS, lengths.sum()), np.cumsum(lengths)[:-1])
    return Histories.from_lists([one.tolist() for one in lists])


def _one_a_row(train: Histories) -> PackedRows:
    """The latest items of each history, padded."""
    items, real = replace(train, ends=train.ends - 1).padded(HISTORY)
    following, _ = replace(train, starts=train.starts + 1).padded(HISTORY)
    return PackedRows(items, np.where(real, following, -1), real.astype(np.int32))


class _Training:
    """A variant's compiled step, its state, and a stream of batches on the device."""

    def __init__(self, variant: Variant) -> None:
        mesh, size = make_mesh(), POSITIONS // variant.rows.history.shape[1]
        size = max(size // variant.accumulate, 1) * variant.accumulate
        further = SequencesSpec(tuple(map(str, range(variant.sequences))), (SIZES,) * variant.sequences, ())
        spec = ModelSpec(variant.model, SIZES, ITEMS, num_features=0, max_history=HISTORY)
        model = replace(spec, sequences=further if variant.sequences else None, conditions=variant.conditions).build(
            seed=0
        )
        optimizer = make_optimizer(OptimizerConfig(), num_steps=10_000)
        stream = batches(variant.rows, batch_size=size, num_batches=10_000, seed=0)
        on_device = (put_batch(batch, mesh) for batch in stream)
        self.batches: Iterator[Any] = _ahead(on_device) if variant.ahead else on_device
        self.state = create_state(model, optimizer, mesh)
        options: dict[str, Any] = {"tables": _tables(variant.sequences), "seed": 0, "num_steps": 10_000, "mesh": mesh}
        step = make_step(model, optimizer, generator_loss, **options, accumulate=variant.accumulate)
        if not variant.donate:
            step = replace(step, program=jax.jit(step.program.__wrapped__))
        self.given, self.program = (step.tables, step.key), step.lower(self.state, next(self.batches)).compile()

    def take(self, steps: int) -> dict[str, float]:
        """Run a number of steps: wall seconds, processor seconds, and number of targets."""
        found, started, before = [], time.monotonic(), time.process_time()
        for batch in itertools.islice(self.batches, steps):
            self.state, metrics = self.program(self.state, batch, *self.given)
            found.append(metrics["targets"])
        jax.block_until_ready(found)
        seconds, processor = time.monotonic() - started, time.process_time() - before
        return {"seconds": seconds, "processor": processor, "targets": float(sum(found))}

    def memory(self) -> dict[str, float]:
        """MiB of temporary arrays (beyond state and batch), and in total."""
        need: Any = self.program.memory_analysis()
        whole = need.argument_size_in_bytes + need.output_size_in_bytes - need.alias_size_in_bytes
        return {"temporaries": need.temp_size_in_bytes / MIB, "in all": (whole + need.temp_size_in_bytes) / MIB}


def _tables(sequences: int) -> LossTables:
    draws = np.random.default_rng(0).integers(0, SIZES, (1 + sequences, ITEMS, len(SIZES))).astype(np.int32)
    return LossTables(ItemTables.from_arrays(draws[0], None, np.ones(ITEMS, np.int32), sequences=tuple(draws[1:])))


def _ahead(stream: Iterator[Any]) -> Iterator[Any]:
    """The same batches, each put on the device before the previous step starts."""
    before = next(stream)
    for batch in stream:
        yield before
        before = batch


def _compared(variants: dict[str, Variant], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Targets per second of every variant, relative to the first one in the same round, and memory."""
    trained = {name: _Training(variant) for name, variant in variants.items()}
    takes = [{name: one.take(steps) for name, one in trained.items()} for _ in range(rounds + 1)][1:]
    rates = {name: np.array([take[name]["targets"] / take[name]["seconds"] for take in takes]) for name in variants}
    processor = {name: float(np.median([take[name]["processor"] for take in takes])) for name in variants}
    plain, rows = next(iter(rates.values())), []
    for name, one in trained.items():
        low, middle, high = np.quantile(rates[name] / plain, (0.25, 0.5, 0.75))
        rows.append(
            {
                "variant": name,
                "targets a second": float(np.median(rates[name])),
                "over plain": float(middle),
                "quartiles": f"{low:.2f} to {high:.2f}",
                "processor time over plain": processor[name] / next(iter(processor.values())),
                **{f"{what}, MiB": value for what, value in one.memory().items()},
            }
        )
    return rows


def _of_length(name: str, length: int, steps: int) -> dict[str, Any]:
    """A step with the same number of positions, in rows of one history of `length` items each."""
    config = FAMILIES[name]
    append_last = name == "flat"
    train = _histories(np.full(max(POSITIONS // length, 1) * 2, length + 1))
    variant = Variant(config, pack(train, max_history=length, row_length=length + append_last, append_last=append_last))
    training, lean = _Training(variant), _Training(variant.backbone(remat=Remat.FULL))
    training.take(1)
    takes = [training.take(1) for _ in range(steps)]
    return {
        "model": name,
        "items": length,
        "ms a step": 1e3 * float(np.median([take["seconds"] for take in takes])),
        "targets a second": float(np.median([take["targets"] / take["seconds"] for take in takes])),
        "temporaries, MiB": training.memory()["temporaries"],
        "rematerialised, MiB": lean.memory()["temporaries"],
    }


def _softmax(*, run: bool) -> list[dict[str, Any]]:
    """Memory of the dense head's loss and gradients: all logits at once (not run), and by blocks of the devices."""

    def at_once(states: Any, vectors: Any, targets: Any, weights: Any) -> Any:
        losses = optax.softmax_cross_entropy_with_integer_labels(states @ vectors.T, targets)
        return jnp.sum(losses * weights)

    def blocked(*given: Any) -> Any:
        return softmax_cross_entropy(*given, id_axes=("tensor",))

    shapes = [((STATES, DIM), jnp.float32), ((IDS, DIM), jnp.float32), ((STATES,), jnp.int32), ((STATES,), jnp.float32)]
    rows, devices = [], jax.device_count()
    with jax.set_mesh(make_mesh(config=MeshConfig(tensor=devices))):
        for name, loss in (("all logits at once", at_once), (f"in blocks, {devices} devices", blocked)):
            gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
            program = gradients.lower(*(jax.ShapeDtypeStruct(*one) for one in shapes)).compile()
            need: Any = program.memory_analysis()
            rows.append({"loss": name, "temporaries, MiB": need.temp_size_in_bytes / MIB})
        if run:
            given = [jnp.ones(*one) for one in shapes]
            jax.block_until_ready(program(*given))
            started = time.monotonic()
            jax.block_until_ready(program(*given))
            rows[-1]["seconds"] = time.monotonic() - started
    return rows


def _meshes() -> list[MeshConfig]:
    sizes = (MeshConfig(), MeshConfig(fsdp=2), MeshConfig(tensor=2), MeshConfig(2, 2), MeshConfig(fsdp=8))
    return [mesh for mesh in sizes if jax.device_count() % (mesh.fsdp * mesh.tensor) == 0]


def _state_on_a_device(sharing: MeshConfig) -> float:
    """Parameters and moments that the first device holds, MiB."""
    model = ModelSpec(RQTransformerConfig(), SIZES, ITEMS, num_features=0, max_history=HISTORY).build(seed=0)
    state = create_state(model, make_optimizer(OptimizerConfig(), num_steps=10), make_mesh(config=sharing))
    return sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state)) / MIB


def table(name: str, value: dict[str, float] | list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [{name: key, "": figure} for key, figure in value.items()] if isinstance(value, dict) else value
    names = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"\n{name}\n", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row.get(key, "-") for key in names]
        lines.append(f"| {' | '.join(f'{c:,.4g}' if isinstance(c, float) else str(c) for c in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
