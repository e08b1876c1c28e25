"""Checkpoints of a run: parameters, optimizer, input position and step, the best and the last kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from semid import artifacts, config
from semid.errors import SemidError
from semid.training.state import TrainState, named_leaves, replace_leaves

REQUEST = "request.json"


class Checkpoints:
    """The checkpoints under one folder, which belongs to one request (config, seed, parents).

    Raises SemidError when the folder holds checkpoints of another request, naming what differs.
    """

    def __init__(self, folder: Path, *, request: dict, select: str) -> None:
        self.folder, self._select = folder.absolute(), select
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / REQUEST).exists():
            if change := config.difference(artifacts.read_json(folder / REQUEST), request):
                raise SemidError(f"{folder}: checkpoints of another run ({change}); delete the folder or change --out")
        elif any(folder.iterdir()):
            raise SemidError(f"{folder}: holds files that are no checkpoints of semid; choose another --out")
        else:
            artifacts.write_json(folder / REQUEST, request)
        best = BestN(get_metric_fn=lambda metrics: metrics[select], n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(1), best]),
            best_fn=lambda metrics: metrics[select],
            enable_async_checkpointing=False,  # the state is small; a save is over when it returns
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def last_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        return self._manager.best_step()

    def save(self, state: TrainState, iterator: Any, metrics: dict[str, float]) -> None:
        """Write a checkpoint at the state's step. `iterator` is the Grain iterator that feeds the run."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(named_leaves(state.params)),
                optimizer=ocp.args.StandardSave(named_leaves(state.opt_state)),
                input=ocp.args.JsonSave(json.loads(_text(iterator.get_state()))),
            ),
            metrics=metrics,
        )

    def restore(self, like: TrainState, step: int, iterator: Any | None = None) -> TrainState:
        """The state saved at `step`, on the devices of `like`; the iterator, if given, is put back where it was."""
        read = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(named_leaves(like.params)),
                optimizer=ocp.args.StandardRestore(named_leaves(like.opt_state)),
                input=ocp.args.JsonRestore(),
            ),
        )
        where = str(self.folder / str(step))
        if iterator is not None:
            iterator.set_state(read.input)
        return dataclasses.replace(
            like,
            step=like.step * 0 + step,
            params=replace_leaves(like.params, read.params, where=where),
            opt_state=replace_leaves(like.opt_state, read.optimizer, where=where),
        )

    def close(self) -> None:
        self._manager.close()


def _text(state: Any) -> str:
    return state.decode() if isinstance(state, bytes) else json.dumps(state)
