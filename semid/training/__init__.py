"""One training loop for every model: state, mesh, checkpoints, tracking. Knows no model and no dataset."""

from semid.training.checkpoints import discard_checkpoints
from semid.training.loop import StopTraining, TrainingConfig, fit, train
from semid.training.mesh import MeshConfig, fitting_batch, make_mesh, put_batch
from semid.training.processes import join_processes, on_first
from semid.training.state import (
    OptimizerConfig,
    StepContext,
    TrainState,
    create_state,
    make_optimizer,
    make_step,
    named_leaves,
    replace_leaves,
    with_variables,
)

__all__ = [
    "MeshConfig",
    "OptimizerConfig",
    "StepContext",
    "StopTraining",
    "TrainState",
    "TrainingConfig",
    "create_state",
    "discard_checkpoints",
    "fit",
    "fitting_batch",
    "join_processes",
    "make_mesh",
    "make_optimizer",
    "make_step",
    "named_leaves",
    "on_first",
    "put_batch",
    "replace_leaves",
    "train",
    "with_variables",
]
