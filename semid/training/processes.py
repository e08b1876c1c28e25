"""Processes of a distributed run, one per host or device: joining, broadcasting, work of the first, joint stopping."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from semid.artifacts import first_line
from semid.errors import SemidError

_OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Number of processes started by a launcher. For a single one, JAX would still make a cluster, with one of its devices.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def join_processes() -> None:
    """Join the other processes of this run, if there are any; call it before anything touches a device.

    Either JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID are all set, or JAX
    detects the cluster: Cloud TPU, GKE, Kubernetes jobs, Slurm, Open MPI. Raises SemidError if the three do not fit
    together, or if the processes of a cluster do not meet.
    """
    given = {name: os.environ[name] for name in _OURS if os.environ.get(name)}
    if not given:
        _join_cluster()
        return
    if missing := [name for name in _OURS if name not in given]:
        raise SemidError(f"{', '.join(given)} set without {', '.join(missing)}; set all of {', '.join(_OURS)}, or none")
    address, count, index = given.values()
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise SemidError(f"expected 0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES, got {index} and {count}")
    jax.distributed.initialize(address, int(count), int(index), cluster_detection_method="deactivate")


def _join_cluster() -> None:
    """Join the processes of a cluster that JAX detects; do nothing if it detects none."""
    if jax.distributed.is_initialized() or any(os.environ.get(name) == "1" for name in _LAUNCHERS):
        return
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Kubernetes environment detected")  # a single pod is no cluster
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        if not str(error).startswith(_NO_CLUSTER):
            why = " ".join(str(error).split())[:300]
            raise SemidError(f"the processes of this cluster do not meet ({why}); set {', '.join(_OURS)}") from None


# Errors of `initialize` if it detects no cluster, or if the process has used a device already and so works alone.
_NO_CLUSTER = ("coordinator_address should be defined", "jax.distributed.initialize() must be called before")


@contextlib.contextmanager
def stop_requested(*, every: int) -> Iterator[Callable[[int], bool]]:
    """Yield a function that tells whether the run should stop after a step, with the same result on all processes.

    It should stop after SIGTERM, which schedulers send before they take a machine away; the signal is handled here
    while the context lasts. Several processes agree at every `every`th step.
    """
    told = threading.Event()
    answered = False

    def stop(step: int) -> bool:
        nonlocal answered
        if jax.process_count() == 1:
            answered = told.is_set()
        elif step % every == 0:
            answered = bool(process_allgather(np.int32(told.is_set())).any())
        return answered

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set()) if in_main_thread else None
    try:
        yield stop
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        if told.is_set() and not answered:  # the signal came after the last step
            signal.raise_signal(signal.SIGTERM)


def from_first(value: Any) -> Any:
    """Broadcast the first process's `value`, of JSON types, to every process."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode()
    text += b" " * (-len(text) % 256)  # few lengths, so that few programs are compiled
    length = int(broadcast_one_to_all(np.int32(len(text))))
    sent = broadcast_one_to_all(np.resize(np.frombuffer(text, np.uint8), length))
    return json.loads(sent.astype(np.uint8).tobytes())


def on_first(function: Callable[[], Any]) -> Any:
    """Run `function` in the first process while the others wait; all return its result, of JSON types. An exception is
    raised there, and a SemidError with its first line in the others."""
    if jax.process_count() == 1:
        return function()
    if jax.process_index() == 0:
        try:
            result = function()
        except Exception as raised:
            from_first([None, first_line(raised)])
            raise
        return from_first([result, None])[0]
    result, error = from_first(None)
    if error is not None:
        raise SemidError(error)
    return result
