"""The training loop, and complete runs with checkpoints, validation, early stopping, a log and resumption."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from semid.config import check_range
from semid.errors import SemidError, did_you_mean
from semid.progress import LOG
from semid.training.batches import batches
from semid.training.checkpoints import Checkpoints
from semid.training.gradients import Rates
from semid.training.mesh import divisible_batch_size, gathered, make_mesh, on_host, put_batch
from semid.training.optimizers import OptimizerConfig, make_optimizer
from semid.training.processes import from_first, on_first, stop_requested
from semid.training.profiling import WallTime, traced_steps
from semid.training.rows import as_rows
from semid.training.shares import SHARES
from semid.training.sinks import chosen_trackers
from semid.training.state import (
    Combine,
    Loss,
    Step,
    TrainState,
    create_state,
    make_step,
    named_leaves,
    with_variables,
)
from semid.training.tracking import Tracker, open_tracker

Hook = Callable[[int, TrainState, dict[str, Any]], TrainState]
Validate = Callable[[Any], dict[str, float]]


class StopTraining(Exception):
    """Raised by a hook to end the loop with the current state."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Length, batches and optimizer of a training run, and how often it validates."""

    epochs: float | None = 30.0
    """Passes over the training data. None: the default of the model that is trained."""
    batch_size: int = 64
    """Rows of a global batch."""
    accumulate: int = 1
    """Number of sequential microbatches per batch, to save memory. The step is the same if the loss is a mean over rows
    or targets; losses that compare rows of a batch (contrasts, balanced codes) see one microbatch at a time."""
    optimizer: OptimizerConfig = OptimizerConfig()
    validate_every: float = 1.0
    """Epochs between validations (and checkpoints)."""
    patience: int = 10
    """Validations without a better score before stopping."""
    log_every: int = 20
    """Steps between records of the loss."""
    tensorboard: bool = False
    """Write TensorBoard events next to the checkpoints, as --track tensorboard; both are deleted at the end."""

    def __post_init__(self) -> None:
        check_range(self, "epochs", "validate_every", above=0)
        check_range(self, "batch_size", "accumulate", "patience", "log_every", at_least=1)

    @property
    def num_epochs(self) -> float:
        """The number of epochs. Raises SemidError if it is None."""
        if self.epochs is None:
            raise SemidError("expected a number of epochs, got none; name one")
        return self.epochs


def fit(
    state: TrainState, step: Step, batches: Iterator[Any], *, num_steps: int, hooks: Sequence[Hook] = ()
) -> TrainState:
    """Run `step` until the state has taken `num_steps`. After each step the hooks are called in order with (step,
    state, metrics); each returns the state to continue with, or raises StopTraining. A state changed by a hook gets the
    shardings of the step's, as the step would be compiled again for others."""
    for at in range(int(state.step) + 1, num_steps + 1):
        state, metrics = step(state, next(batches))
        try:
            for hook in hooks:
                after = hook(at, state, metrics)
                state = after if after is state else jax.device_put(after, jax.tree.map(lambda x: x.sharding, state))
        except StopTraining:
            break
    return state


def _no_hooks(steps_per_epoch: int) -> Sequence[Hook]:
    del steps_per_epoch
    return ()


@dataclasses.dataclass(frozen=True)
class Task:
    """A training problem: the model, its loss and data, and the scores by which its checkpoints are compared."""

    model: nnx.Module
    loss: Loss
    rows: Any
    """Training data, a NamedTuple of arrays or Rows; the loss gets batches of it."""
    tables: Any
    """Device arrays that no step changes (codes, features)."""
    validate: Validate
    """Maps a model to its scores."""
    select: str | None = None
    """The score to maximize; None: the last checkpoint is the best."""
    hooks: Callable[[int], Sequence[Hook]] = _no_hooks
    """Maps the number of steps per epoch to hooks that change the state (codebook maintenance)."""
    combine: Combine | None = None
    """Rule that combines the gradients of a vector of losses (see `make_step`)."""
    optimizer: Callable[[int], optax.GradientTransformation] | None = None
    """Maps the number of steps to a custom optimizer, which replaces the config's."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A folder for checkpoints and `history.jsonl`, the request that owns it, and the progress bar's title."""

    folder: Path
    request: dict[str, Any]
    title: str


def train(task: Task, config: TrainingConfig, *, run: RunFolder, seed: int, mesh: Mesh | None = None) -> Any:
    """Train `task.model` and return it with the variables of the best validation.

    Checkpoints, `history.jsonl` and the request are kept in the run's folder; a run of the same request resumes from
    the last checkpoint. With the same number of devices, the result is bitwise equal to an uninterrupted run on CPUs
    and, by XLA's design, on TPUs; on GPUs only with `XLA_FLAGS=--xla_gpu_deterministic_ops=true` (not tried), as sums
    there have no fixed order.

    Several processes call this with the same arguments and get the same model. Each reads its own rows; they share one
    folder, and only the first writes the history. `task.validate` runs in each on its own arrays; the scores of the
    first count.
    Raises SemidError if the loss is not finite, with the step and the last good checkpoint. After SIGTERM it writes a
    checkpoint at once (with several processes, at the next logged step) and raises SystemExit with status 143.
    """
    wall_time, mesh, rows = WallTime(), make_mesh() if mesh is None else mesh, as_rows(task.rows)
    size = divisible_batch_size(config.batch_size, rows=len(rows), mesh=mesh, accumulate=config.accumulate)
    steps_per_epoch = -(-len(rows) // size)
    num_steps = max(round(config.num_epochs * steps_per_epoch), 1)
    every = max(min(round(config.validate_every * steps_per_epoch), num_steps), 1)
    own, rates = task.optimizer, () if task.optimizer else config.optimizer.rates
    _check_parts(task.model, rates)
    optimizer = own(num_steps) if own else make_optimizer(config.optimizer, num_steps=num_steps)
    checkpoints = Checkpoints(run.folder, request=run.request, select=task.select)
    try:
        with wall_time.spent_on("input"):
            rows.prepare(run.folder / SHARES)
        state = create_state(task.model, optimizer, mesh)
        process = (jax.process_index(), jax.process_count())
        iterator = batches(rows, batch_size=size, num_batches=num_steps, seed=seed, process=process)
        if checkpoints.last_step is not None:
            state = checkpoints.restore(state, checkpoints.last_step, iterator)
        step = make_step(
            task.model,
            optimizer,
            task.loss,
            tables=task.tables,
            seed=seed,
            num_steps=num_steps,
            mesh=mesh,
            accumulate=config.accumulate,
            combine=task.combine,
            rates=rates,
        )
        device_batches, first = (put_batch(batch, mesh) for batch in iterator), int(state.step)
        timed_batches, timed_step = wall_time.timed("input", device_batches), wall_time.first_timed("compiling", step)
        with open_tracker(
            run.folder,
            title=run.title,
            num_steps=num_steps,
            first_step=first,
            config=run.request,
            trackers=chosen_trackers(tensorboard=config.tensorboard),
        ) as tracker:
            validation = _Validation(
                task, mesh, tracker, checkpoints, iterator, every, num_steps, config.patience, wall_time
            )
            log = _log_hook(tracker, validation, config.log_every)
            if not (validation.due(first) and validation.out_of_patience(first)):
                tracker.say("compiling ...")
                with stop_requested(every=config.log_every) as stop, traced_steps(run.title, first=first) as trace:
                    hooks: list[Hook] = [trace, log, *task.hooks(steps_per_epoch), _stop_hook(stop, validation)]
                    state = fit(state, timed_step, timed_batches, num_steps=num_steps, hooks=hooks)
                tracker.say(str(wall_time))
        best = checkpoints.best_step or num_steps
        state = state if int(state.step) == best else checkpoints.restore(state, best)
        return with_variables(task.model, *on_host((state.params, state.rest), mesh))
    finally:
        checkpoints.close()


def check_training(model: nnx.Module, config: TrainingConfig, *, mesh: Mesh | None = None) -> None:
    """Raise SemidError if `train` would refuse the config before its first step: for a batch that does not divide among
    the mesh's devices, or a rate of a part that the model does not have."""
    mesh = make_mesh() if mesh is None else mesh
    divisible_batch_size(config.batch_size, rows=config.batch_size, mesh=mesh, accumulate=config.accumulate)
    _check_parts(model, config.optimizer.rates)


def _check_parts(model: nnx.Module, rates: Rates) -> None:
    """Raise SemidError for a rate whose part does not exist in the model, as it would have no effect."""
    parts = {*vars(model), *named_leaves(nnx.state(model))}
    for start, _ in rates:
        if not any(name.startswith(start) for name in parts):
            known = {name.split("/")[0] for name in named_leaves(nnx.state(model))}
            raise SemidError(f"rates: no part of the model begins with {start!r}{did_you_mean(start, known)}")


def _stop_hook(stop: Callable[[int], bool], validation: _Validation) -> Hook:
    """Hook that validates and, when a scheduler stops the run, writes a checkpoint and ends the process."""

    def end(at: int, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        state = validation(at, state, metrics)
        if stop(at):
            if not validation.due(at):
                _check_finite(at, jax.device_get(metrics), validation.checkpoints)
                validation.save(state)
            validation.checkpoints.wait()
            LOG.warning("stopped at step %d of %d; the same command goes on from there", at, validation.num_steps)
            raise SystemExit(143)
        return state

    return end


def _log_hook(tracker: Tracker, validation: _Validation, every: int) -> Hook:
    """Hook that logs metrics; until then they stay on the device, so that no step waits for them."""
    pending: list[tuple[int, dict[str, Any]]] = []

    def log(at: int, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        pending.append((at, metrics))
        if at % every == 0 or validation.due(at):
            for step, step_metrics in jax.device_get(pending):
                _check_finite(step, step_metrics, validation.checkpoints)
            pending.clear()
        if at % every == 0:
            values = jax.device_get(metrics)
            on_first(lambda: tracker.log(at, values))
            tracker.advance(at, f"loss {values['loss']:.4f}")
        return state

    return log


@dataclasses.dataclass(frozen=True)
class _Validation:
    """Hook that validates, saves, and stops when the best score is `patience` validations old.

    It decides only by the checkpoints, so that a resumed run decides like an uninterrupted one.
    """

    task: Task
    mesh: Mesh
    tracker: Tracker
    checkpoints: Checkpoints
    iterator: Any
    every: int
    num_steps: int
    patience: int
    wall_time: WallTime

    def __call__(self, at: int, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        if not self.due(at):
            return state
        whole = gathered((state.params, state.rest), self.mesh)
        with self.wall_time.spent_on("validation"):
            scores = from_first(self.task.validate(with_variables(self.task.model, *whole)))
        _check_finite(at, scores, self.checkpoints)
        # Log before saving: a resumed run logs again what came after its checkpoint, and nothing before it.
        on_first(lambda: self.tracker.log(at, {f"validation/{name}": value for name, value in scores.items()}))
        self.save(state, scores)
        self.tracker.show(at, {f"wall_time/{name}": share for name, share in self.wall_time.shares.items()})
        shown = self.task.select or next(iter(scores))
        self.tracker.advance(at, f"{shown} {scores[shown]:.4f}")
        if self.out_of_patience(at):
            self.tracker.say(f"stopped at step {at}, best at step {self.checkpoints.best_step}")
            raise StopTraining
        return state

    def save(self, state: TrainState, scores: dict[str, float] | None = None) -> None:
        with self.wall_time.spent_on("checkpoints"):
            self.checkpoints.save(state, self.iterator, scores)

    def due(self, at: int) -> bool:
        return at % self.every == 0 or at == self.num_steps

    def out_of_patience(self, at: int) -> bool:
        best = self.checkpoints.best_step
        return best is not None and at - best >= self.patience * self.every


def _check_finite(at: int, values: Mapping[str, SupportsFloat], checkpoints: Checkpoints) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        folder, last = checkpoints.folder, checkpoints.last_step
        good = "no checkpoint was written; "
        if last:  # a run with another learning rate cannot resume from it
            good = f"the last good checkpoint is {folder / str(last)}; delete {folder} or choose another path (--out), "
        name = "loss" if "loss" in bad else bad[0]
        raise SemidError(f"{name} is not finite at step {at}; {good}lower the learning rate and run again")
