"""The training loop of every model: batches, device mesh, optimizer, train state, checkpoints, training log."""

from semid.training.batches import batches
from semid.training.checkpoints import discard_checkpoints
from semid.training.compiled import Compiled, DoesNotFit, compile_for, size_on_a_device
from semid.training.gradients import rate_of
from semid.training.loop import RunFolder, StopTraining, Task, TrainingConfig, check_training, fit, train
from semid.training.mesh import (
    ROWS,
    MeshConfig,
    ShardedByRows,
    TableByRows,
    divisible_batch_size,
    make_mesh,
    put_batch,
    replicated,
    row_devices,
    row_parts,
    share_rows,
    table_sharding,
)
from semid.training.optimizers import OptimizerConfig, RateSchedule, make_optimizer
from semid.training.processes import join_processes, on_first
from semid.training.profiling import profiled
from semid.training.rows import PackedHistories, PackedRows, Rows, SingleRows, pack
from semid.training.seals import REQUEST
from semid.training.shares import SharedArray, own_share
from semid.training.sinks import SINKS, tracked_by
from semid.training.state import (
    Loss,
    StepContext,
    TrainState,
    TrainStep,
    abstract_state,
    bound_loss,
    create_state,
    edit_moments,
    edit_variables,
    make_step,
    named_leaves,
    replace_leaves,
    shardings,
    split_variables,
    used_shardings,
    with_variables,
)
from semid.training.topologies import chip_of, topology_devices
from semid.training.tracking import HISTORY, check_events, read_history

__all__ = [
    "HISTORY",
    "REQUEST",
    "ROWS",
    "SINKS",
    "Compiled",
    "DoesNotFit",
    "Loss",
    "MeshConfig",
    "OptimizerConfig",
    "PackedHistories",
    "PackedRows",
    "RateSchedule",
    "Rows",
    "RunFolder",
    "ShardedByRows",
    "SharedArray",
    "SingleRows",
    "StepContext",
    "StopTraining",
    "TableByRows",
    "Task",
    "TrainState",
    "TrainStep",
    "TrainingConfig",
    "abstract_state",
    "batches",
    "bound_loss",
    "check_events",
    "check_training",
    "chip_of",
    "compile_for",
    "create_state",
    "discard_checkpoints",
    "divisible_batch_size",
    "edit_moments",
    "edit_variables",
    "fit",
    "join_processes",
    "make_mesh",
    "make_optimizer",
    "make_step",
    "named_leaves",
    "on_first",
    "own_share",
    "pack",
    "profiled",
    "put_batch",
    "rate_of",
    "read_history",
    "replace_leaves",
    "replicated",
    "row_devices",
    "row_parts",
    "shardings",
    "share_rows",
    "size_on_a_device",
    "split_variables",
    "table_sharding",
    "topology_devices",
    "tracked_by",
    "train",
    "used_shardings",
    "with_variables",
]
