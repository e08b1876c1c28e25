"""Alternating measurements of semid and of a peer process that trains and searches with another library."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from semid import GeneratorConfig
from semid.errors import SemidError
from semid.generators import LossTables, generator_loss
from semid.recommender import ModelSpec
from semid.training import Rows, SingleRows, batches, create_state, make_mesh, make_optimizer, make_step, put_batch
from seq_models import EncoderDecoderConfig, ItemTables

SCRIPT = Path(__file__).with_name("peer_generator.py")
# OpenMP's threads spin for .2 s after PyTorch's last product, and would take cores from the next contender.
_PAUSE = 0.5

Ask = Callable[..., dict[str, Any]]
Turn = Callable[[int], float]


@contextlib.contextmanager
def peer(python: Path | None, codes: np.ndarray, level_sizes: tuple[int, ...], *, search: bool) -> Iterator[Ask | None]:
    """A process of `peer_generator.py` with the codes, controlled line by line; None without a Python for it."""
    if python is None:
        yield None
        return
    with (
        tempfile.TemporaryDirectory() as home,
        subprocess.Popen(
            [python, SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as process,
    ):
        ask = functools.partial(_ask, process)
        np.save(Path(home) / "codes.npy", codes.astype(np.int64))
        ask("catalogue", file=str(Path(home) / "codes.npy"), level_sizes=level_sizes, search=search)
        yield ask


def _ask(process: subprocess.Popen, do: str, **arguments: Any) -> dict[str, Any]:
    if process.stdin is None or process.stdout is None:
        raise SemidError("the peer has no pipes to it")
    try:
        process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise SemidError(f"the peer ended at {do!r}; what it said stands above, and it needs the extra 'bench'")
    return json.loads(answer)


def new_peer(ask: Ask, name: str, model: EncoderDecoderConfig, **options: Any) -> dict[str, Any]:
    """A T5 of the sizes of `model`."""
    size = model.backbone
    backbone = {field: getattr(size, field) for field in ("dim", "layers", "heads", "hidden", "dropout")}
    return ask("model", name=name, backbone=backbone, decoder_layers=model.decoder_layers, **options)


class _Numbers(Rows):
    """The numbers of examples, batched as the examples are."""

    def __init__(self, rows: SingleRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return index

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self._rows.arrays

    def buckets(self, batch_size: int) -> np.ndarray | None:
        return self._rows.buckets(batch_size)


def semid_order(rows: SingleRows, *, batch_size: int, num_batches: int) -> np.ndarray:
    """The numbers of the examples in semid's order."""
    return np.concatenate(list(batches(_Numbers(rows), batch_size=batch_size, num_batches=num_batches, seed=0)))


def give_examples(ask: Ask, rows: SingleRows, names: list[str], *, order: np.ndarray | None = None) -> None:
    """Send every training example of semid, to be used in that order, or else in a new permutation per epoch."""
    history, targets, segments = rows[np.arange(len(rows))][:3]
    arrays = {"history": history, "real": segments != 0, "targets": targets}
    with tempfile.TemporaryDirectory() as home:
        file = Path(home) / "examples.npz"
        np.savez(file, **arrays if order is None else arrays | {"order": order})
        ask("examples", file=str(file), names=names)


def peer_steps(ask: Ask, name: str, batch: int, steps: int) -> float:
    """Takes so many more steps and returns the seconds."""
    return ask("steps", name=name, batch=batch, steps=steps)["seconds"]


def take_turns(turns: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender's turns, after a warm-up turn."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds + 1):
        for name, turn in turns.items():
            time.sleep(_PAUSE)
            seconds[name].append(turn())
    return {name: times[1:] for name, times in seconds.items()}


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    """Seconds until all results are computed."""
    started = time.perf_counter()
    jax.block_until_ready(work(*arguments, **options))
    return time.perf_counter() - started


def semid_steps(
    config: GeneratorConfig,
    rows: Any,
    codes: np.ndarray,
    level_sizes: tuple[int, ...],
    features: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> Turn:
    """Takes so many more steps and returns the seconds."""
    mesh, num_steps, size = make_mesh(), 10_000, config.training.batch_size
    width = 0 if features is None else features.shape[1]
    model = ModelSpec(config.model, level_sizes, len(codes), width, config.max_history).build(seed=0)
    optimizer = make_optimizer(config.training.optimizer, num_steps=num_steps)
    tables = LossTables(
        ItemTables.from_arrays(codes, features, np.ones(len(codes), np.int32) if counts is None else counts)
    )
    step = make_step(
        model,
        optimizer,
        functools.partial(generator_loss, objective=config.objective),
        tables=tables,
        seed=0,
        num_steps=num_steps,
        mesh=mesh,
        accumulate=config.training.accumulate,
    )
    state = create_state(model, optimizer, mesh)
    stream = batches(rows, batch_size=size, num_batches=num_steps, seed=0)

    def run(steps: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(steps):
            state, _ = step(state, put_batch(next(stream), mesh))
        jax.block_until_ready(state)
        return time.perf_counter() - started

    return run
