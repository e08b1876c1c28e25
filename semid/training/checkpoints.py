"""Checkpoints of a run: train state and position in the data, for the best and the last two saved steps.

Each is sealed with the sha256 of its files. A changed or incomplete checkpoint is never read: a warning names the
damage, and the run resumes from the one before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import glob
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from semid import artifacts, config
from semid.errors import SemidError
from semid.training.processes import on_first
from semid.training.seals import REQUEST, Scores, best_of, damage, log_now, restorable, seal, steps_to_keep
from semid.training.state import TrainState, named_leaves, replace_leaves
from semid.training.tracking import HISTORY, naming

_PARTS = ("params", "rest", "opt_state")
# Seconds to wait for the threads of a failed save.
_SECONDS = 60


class Checkpoints:
    """Checkpoints in a folder that belongs to one request (config, seed, parents); every process opens it.

    The best one has the highest score `select`; without scores it is the last. Damaged checkpoints after the last
    intact one are removed with a warning. Raises SemidError if the folder has checkpoints of another request, naming
    what differs, if none is intact, or if the best is damaged.
    """

    def __init__(self, folder: Path, *, request: dict, select: str | None) -> None:
        import orbax.checkpoint as ocp

        self.folder = folder.absolute()
        self._select = select
        with naming(folder):
            on_first(functools.partial(_claim, folder, request))
            scores = on_first(lambda: list(restorable(self.folder).items()))
        self._scores: Scores = dict(map(tuple, scores))
        options = ocp.CheckpointManagerOptions(  # keeps all checkpoints: old ones are removed after the new one's seal
            enable_async_checkpointing=False,  # saving and sealing happen in a thread of this class
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=_handlers())
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    @property
    def last_step(self) -> int | None:
        return max(self._scores, default=None)

    @property
    def best_step(self) -> int | None:
        return best_of(self._scores)

    def save(self, state: TrainState, iterator: Any, scores: dict[str, float] | None = None) -> None:
        """Write a checkpoint at the state's step; one without scores is never the best.

        `iterator` is the Grain iterator that feeds the run. A single process copies the state and writes it in the
        background, until `wait`; several processes write it before they return, as they must agree on the outcome.
        Raises SemidError, here or in `wait`, if this checkpoint or the one before cannot be written, naming the last
        good one; an unfinished checkpoint is removed.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step, alone = int(state.step), jax.process_count() == 1
        score = float(step) if self._select is None else (scores or {}).get(self._select)
        scores_now = {**self._scores, step: score}
        parts = {name: _plain_arrays(part) for name, part in _parts(state).items()}
        args = ocp.args.Composite(
            **{name: ocp.args.PyTreeSave(_copied(part) if alone else part) for name, part in parts.items()},
            input=ocp.args.JsonSave(json.loads(iterator.get_state())),
        )
        good = (
            "no checkpoint was written before"
            if self.last_step is None
            else f"the last good checkpoint is {self.last_step}"
        )
        advice = f"{good}; make space, and give the same command again to go on"
        write = functools.partial(self._write, step, args, scores_now, log=log_now(self.folder), advice=advice)
        self._scores = {step: scores_now[step] for step in steps_to_keep(scores_now)}
        if alone:
            self._writing = self._thread.submit(contextvars.copy_context().run, write)
        else:
            write()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written, if any, is complete. Raises SemidError if that fails."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, args: Any, scores: Scores, *, log: dict[str, Any], advice: str) -> None:
        """Write and seal a checkpoint, given the scores of all steps up to it; then remove those no longer needed."""
        try:
            with naming(self.folder / str(step), advice):
                with _errors_raised_alone():
                    self._manager.save(step, args=args)
                on_first(functools.partial(_publish, self.folder, step))
                on_first(functools.partial(seal, self.folder / str(step), scores, log))
        except SemidError:
            if jax.process_index() == 0:
                _remove_unsealed(self.folder, step)
            raise
        for old in sorted(scores.keys() - steps_to_keep(scores)):
            self._manager.delete(old)
            on_first(functools.partial(artifacts.remove, self.folder / str(old)))

    def restore(self, like: TrainState, step: int, iterator: Any | None = None) -> TrainState:
        """The state saved at `step`, on the devices of `like`; the iterator, if given, is set to its saved position.

        Raises SemidError if the checkpoint is damaged, or belongs to another model or other data.
        """
        import orbax.checkpoint as ocp

        self.wait()
        where = str(self.folder / str(step))
        if found := on_first(functools.partial(damage, self.folder / str(step))):
            raise SemidError(f"{where}: damaged ({found}); delete {self.folder} and run again")
        parts = _parts(like)
        args = ocp.args.Composite(
            **{name: _restore_args(_plain_arrays(part)) for name, part in parts.items()}, input=ocp.args.JsonRestore()
        )
        try:
            read = self._manager.restore(step, args=args)
            if iterator is not None:
                iterator.set_state(json.dumps(read.input).encode())
        except (ValueError, KeyError, OSError) as error:  # messages of Orbax and Grain have several lines
            why = " ".join(str(error).split())[:300]
            raise SemidError(
                f"{where}: cannot go on from here, as it may be of another model or other data ({why}); take the "
                f"settings of that run, or delete {self.folder} and run again"
            ) from None
        found = {name: replace_leaves(part, _with_keys(part, read[name]), where=where) for name, part in parts.items()}
        return dataclasses.replace(like, step=like.step * 0 + step, **found)

    def close(self) -> None:
        """Wait for the checkpoint that is being written. Raises SemidError if that fails."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()


def _claim(folder: Path, request: dict) -> None:
    """Write `request` into the folder, or check that the folder belongs to it."""
    artifacts.refresh(folder)
    if folder.exists() and not folder.is_dir():
        raise SemidError(f"{folder}: is a file, and checkpoints should go below it; choose another path (--out)")
    if glob.has_magic(str(folder.absolute())):  # Orbax uses the path in a glob, which would not find its files
        raise SemidError(f"{folder}: checkpoints cannot go below a path with *, ? or [; choose another path (--out)")
    folder.mkdir(parents=True, exist_ok=True)
    half_written = set(folder.glob(f".{REQUEST}.writing*"))  # from a run killed right at its start
    if (folder / REQUEST).exists() and any(entry.name.isdecimal() for entry in folder.iterdir()):
        written = artifacts.read_json(folder / REQUEST)
        if not isinstance(written, dict):
            raise SemidError(f"{folder / REQUEST}: not the request of a run; delete {folder} and run again")
        if change := config.difference(written, request):
            raise SemidError(
                f"{folder}: checkpoints of another run ({change}); delete the folder, or choose another path (--out)"
            )
    elif not (folder / REQUEST).exists() and set(folder.iterdir()) - half_written:
        raise SemidError(f"{folder}: holds files that are no checkpoints of semid; choose another path (--out)")
    else:
        artifacts.write_json(folder / REQUEST, request)


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that waits for its tasks when it is closed, and does not log errors of abandoned tasks.

    Orbax aborts a save at its first error and closes the loop while TensorStore still writes the other arrays. Each of
    these would then print a traceback about the closed loop, and might write after the checkpoint has been removed.
    """

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        del context

    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


@contextlib.contextmanager
def _errors_raised_alone() -> Iterator[None]:
    """Wait for all of Orbax's threads before its error is raised here, and keep its tracebacks off the console."""
    logger, policy = logging.getLogger("absl"), asyncio.get_event_loop_policy()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    asyncio.set_event_loop_policy(_PatientLoops())
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):  # it is still writing, and would fail at process exit
                thread.join(_SECONDS)
        asyncio.set_event_loop_policy(policy)
        logger.setLevel(level)


def _remove_unsealed(folder: Path, step: int) -> None:
    """Remove the files of a checkpoint that was not completed."""
    for left in (folder / str(step), *folder.glob(f"{step}.*")):
        artifacts.remove(left)


def _publish(folder: Path, step: int) -> None:
    """Upload a checkpoint that is not sealed yet, and the log, if the folder is the local copy of a URL."""
    artifacts.upload(folder / str(step), folder / str(step))
    if (folder / HISTORY).exists():
        artifacts.upload(folder / HISTORY, folder / HISTORY)


def _handlers() -> dict[str, Any]:
    """Orbax's handlers of the parts of a checkpoint.

    By default, each device writes a slice of a replicated array, cut by a program per device and shape; compiling these
    programs costs more than writing, unless slices are large.
    """
    import orbax.checkpoint as ocp

    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    copies = ocp.type_handlers.NumpyHandler()
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays), (np.ndarray, copies))
    handlers = {name: ocp.PyTreeCheckpointHandler(type_handler_registry=registry) for name in _PARTS}
    return {**handlers, "input": ocp.JsonCheckpointHandler()}


def _plain_arrays(part: Any) -> dict[str, Array]:
    """Arrays by name, with PRNG keys as plain numbers, since these handlers of Orbax do not record key types."""
    return {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named_leaves(part).items()}


def _copied(leaves: dict[str, Array]) -> dict[str, np.ndarray]:
    """Host copies of arrays that the next step overwrites."""
    return {name: np.array(leaf) for name, leaf in jax.device_get(leaves).items()}


def _with_keys(like: Any, read: dict[str, Array]) -> dict[str, Array]:
    keys = {name: leaf for name, leaf in named_leaves(like).items() if _is_key(leaf) and name in read}
    return read | {
        name: jax.random.wrap_key_data(read[name], impl=jax.random.key_impl(key)) for name, key in keys.items()
    }


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _restore_args(leaves: dict[str, Any]) -> Any:
    import orbax.checkpoint as ocp

    return ocp.args.PyTreeRestore(leaves, restore_args=ocp.checkpoint_utils.construct_restore_args(leaves))


def _parts(state: TrainState) -> dict[str, Any]:
    """The parts of the state, which are saved separately; empty ones, as `rest` often is, are refused by Orbax."""
    parts = {name: getattr(state, name) for name in _PARTS}
    return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def discard_checkpoints(folder: Path) -> None:
    """Delete the folder of a run whose result is written; a folder without checkpoints of semid is not touched."""
    if (folder / REQUEST).is_file():
        for step in filter(Path.is_dir, list(folder.iterdir())):  # request last: a killed deletion can then resume
            shutil.rmtree(step, ignore_errors=True)
        artifacts.remove(folder)
