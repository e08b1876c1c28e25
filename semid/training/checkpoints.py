"""Checkpoints of a run: the train state and the position in the data, of the best and of the last two steps.

Each is sealed with the sha256 of its files. One that is no longer as it was written is never read: its damage is named,
and the run goes on from the one before it.
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
# Threads of a save that failed are waited for so long.
_SECONDS = 60


class Checkpoints:
    """The checkpoints in a folder that belongs to one request (config, seed, parents); every process opens it.

    The best has the highest score `select`; without one it is the last. Warns of damaged checkpoints after the last
    whole one, and forgets them. Raises SemidError when the folder holds checkpoints of another request, naming what
    differs, or none that is whole, or when the best is damaged.
    """

    def __init__(self, folder: Path, *, request: dict, select: str | None) -> None:
        import orbax.checkpoint as ocp

        self.folder = folder.absolute()
        self._select = select
        with naming(folder):
            on_first(functools.partial(_claim, folder, request))
            scores = on_first(lambda: list(restorable(self.folder).items()))
        self._scores: Scores = dict(map(tuple, scores))
        options = ocp.CheckpointManagerOptions(  # that keep all: an old one goes when the new one is sealed
            enable_async_checkpointing=False,  # what is to be done behind a save, its seal too, is in a thread of ours
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

        `iterator` is the Grain iterator that feeds the run. One process copies the state and writes it while the run
        goes on, until `wait`; several write before they return, since they tell each other how it went. Raises
        SemidError, here or in `wait`, if this checkpoint or the one before cannot be written, naming the last good one;
        nothing is left of it then.
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
        """Wait until the checkpoint that is being written, if any, is whole. Raises SemidError if it cannot be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, args: Any, scores: Scores, *, log: dict[str, Any], advice: str) -> None:
        """Write a checkpoint and seal it, `scores` being those until it; then remove those that it makes needless."""
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
        """The state saved at `step`, on the devices of `like`; the iterator, if given, is put back where it was.

        Raises SemidError if the checkpoint is damaged, or holds another model's state or a position in other data.
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
        except (ValueError, KeyError, OSError) as error:  # Orbax and Grain explain themselves over several lines
            why = " ".join(str(error).split())[:300]
            raise SemidError(f"{where}: cannot go on from here ({why}); delete this folder and run again") from None
        found = {name: replace_leaves(part, _with_keys(part, read[name]), where=where) for name, part in parts.items()}
        return dataclasses.replace(like, step=like.step * 0 + step, **found)

    def close(self) -> None:
        """Wait for what is being written. Raises SemidError if it cannot be."""
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
    if glob.has_magic(str(folder.absolute())):  # Orbax globs below it, and finds nothing of what it wrote
        raise SemidError(f"{folder}: checkpoints cannot go below a path with *, ? or [; choose another path (--out)")
    folder.mkdir(parents=True, exist_ok=True)
    half_written = set(folder.glob(f".{REQUEST}.writing*"))  # by a run killed in its first moments
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
    """An event loop that ends once its tasks have, and says nothing of errors that nobody waits for.

    Orbax gives up a save at its first error and closes the loop, while TensorStore still writes the other arrays: each
    would then print a traceback for want of the loop, and might write where the rest has been removed. What failed
    after the first error would be logged when it is forgotten.
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
    """Wait for all that Orbax does before its error is raised here, and keep its traces of it off the console."""
    logger, policy = logging.getLogger("absl"), asyncio.get_event_loop_policy()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    asyncio.set_event_loop_policy(_PatientLoops())
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):  # it writes on, and would fail when the process ends
                thread.join(_SECONDS)
        asyncio.set_event_loop_policy(policy)
        logger.setLevel(level)


def _remove_unsealed(folder: Path, step: int) -> None:
    """Remove what an attempt to write a checkpoint left."""
    for left in (folder / str(step), *folder.glob(f"{step}.*")):
        artifacts.remove(left)


def _publish(folder: Path, step: int) -> None:
    """Bring a checkpoint that is not sealed yet, and the log, to the URL that the folder is the copy of, if any."""
    artifacts.upload(folder / str(step), folder / str(step))
    if (folder / HISTORY).exists():
        artifacts.upload(folder / HISTORY, folder / HISTORY)


def _handlers() -> dict[str, Any]:
    """Orbax's readers and writers of the parts of a checkpoint.

    Of an array that all devices hold, each would write a slice, cut by a program per device and shape: compiling these
    costs more than writing, unless slices are large.
    """
    import orbax.checkpoint as ocp

    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    copies = ocp.type_handlers.NumpyHandler()
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays), (np.ndarray, copies))
    handlers = {name: ocp.PyTreeCheckpointHandler(type_handler_registry=registry) for name in _PARTS}
    return {**handlers, "input": ocp.JsonCheckpointHandler()}


def _plain_arrays(part: Any) -> dict[str, Array]:
    """Arrays by name, keys as their numbers: these handlers of Orbax keep no other record of what a key is."""
    return {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named_leaves(part).items()}


def _copied(leaves: dict[str, Array]) -> dict[str, np.ndarray]:
    """Copies on the host, of arrays that the next step overwrites."""
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
    """The parts of the state that are saved one by one; Orbax takes no empty tree, and `rest` is often empty."""
    parts = {name: getattr(state, name) for name in _PARTS}
    return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def discard_checkpoints(folder: Path) -> None:
    """Delete the folder of a run whose result is written; one that holds no checkpoints of semid is left alone."""
    if (folder / REQUEST).is_file():
        for step in filter(Path.is_dir, list(folder.iterdir())):  # the request last: a kill here can be made good
            shutil.rmtree(step, ignore_errors=True)
        artifacts.remove(folder)
