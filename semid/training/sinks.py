"""Experiment trackers for training, in addition to history.jsonl: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from semid import artifacts
from semid.errors import SemidError


class TrackedRun(NamedTuple):
    """Description of a training run for trackers; `first_step` is above 0 in a resumed run."""

    folder: Path
    title: str
    config: Mapping[str, Any]
    first_step: int = 0


@runtime_checkable
class Sink(Protocol):
    """A tracker of one run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the scalars of a step."""

    def close(self, *, failed: bool) -> None:
        """End the run."""


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, run: TrackedRun) -> None:
        check_folder(run.folder)
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        del failed
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, by its own settings (WANDB_PROJECT, WANDB_MODE, ...); resuming continues the run."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "semid"),
            name=run.title,
            id=_run_id(run),
            resume="allow",
            config=dict(run.config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _run_id(run: TrackedRun) -> str:
    """The run's id, stored in its folder for a resumed run; a run from the start gets a new id."""
    kept = run.folder / "wandb.id"
    if not (run.first_step and kept.exists()):
        with artifacts.replacing(kept) as written:
            written.write_text(uuid.uuid4().hex[:16], encoding="ascii")
    return kept.read_text(encoding="ascii")


class MLflow:
    """A run of MLflow, by its own settings (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...).

    A resumed run becomes a new one of the same name. Names of metrics have _at_ for @, which MLflow does not allow.
    """

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._client = mlflow.tracking.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "semid")
        known = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id
        self._id = self._client.create_run(experiment, run_name=run.title).info.run_id
        for key, value in _flat(run.config).items():
            self._client.log_param(self._id, key, str(value)[:500])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name.replace("@", "_at_"), value, step=step)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


class _Kind(NamedTuple):
    module: str
    open: Callable[[TrackedRun], Sink]


SINKS = {
    "tensorboard": _Kind("tensorboardX", TensorBoard),
    "wandb": _Kind("wandb", WeightsAndBiases),
    "mlflow": _Kind("mlflow", MLflow),
}
_CHOSEN: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("trackers", default=())


@contextlib.contextmanager
def tracked_by(*names: str) -> Iterator[None]:
    """Track the training runs of the block by these trackers: tensorboard, wandb, mlflow.

    Trackers do not change any artifact. Raises SemidError for another name, or a missing extra or login.
    """
    for name in names:
        check_tracker(name)
    token = _CHOSEN.set(names)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def check_tracker(name: str) -> None:
    """Raise SemidError for a tracker that does not exist, or whose extra or login is missing."""
    if name not in SINKS:
        raise SemidError(f"expected trackers among {', '.join(SINKS)}, got {name!r}")
    try:
        module = importlib.import_module(SINKS[name].module)
    except ImportError:
        raise SemidError(f"{name} output needs the extra: pip install 'semid[{name}]'") from None
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if name == "wandb" and not offline and not module.api.api_key:
        raise SemidError("wandb has no login; give `wandb login`, or set WANDB_MODE=offline")


def chosen_trackers(*, tensorboard: bool = False) -> tuple[str, ...]:
    """Trackers of the enclosing `tracked_by` block, and TensorBoard if a config asks for it."""
    return tuple(dict.fromkeys([*_CHOSEN.get(), *["tensorboard"] * tensorboard]))


def check_folder(folder: Path) -> None:
    """Raise SemidError for the local copy of a URL, as TensorBoard cannot write to URLs."""
    artifacts.local_only(folder, "tensorboard writes its events while training goes on")


def open_sinks(run: TrackedRun, names: tuple[str, ...]) -> list[Sink]:
    """Begin a run in each of these trackers. Raises SemidError with one line if a tracker fails."""
    opened: list[Sink] = []
    for name in names:
        check_tracker(name)
        try:
            opened.append(SINKS[name].open(run))
        except SemidError:
            raise
        except Exception as error:  # each library has its own
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise SemidError(f"{name} cannot begin a run ({said}); mend that, or leave it out (--track)") from None
    return opened
