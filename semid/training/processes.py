"""Multi-process runs, with one process per host or per device: joining, broadcasting, work of the first process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

from semid.errors import SemidError

_OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # how many processes they started; JAX finds the rest


def join_processes() -> None:
    """Join the other processes of this run, if the environment names any; call it before anything touches a device.

    Either JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID are all set, or Slurm
    or Open MPI started several. Raises SemidError if the three do not fit together.
    """
    given = {name: os.environ[name] for name in _OURS if os.environ.get(name)}
    if not given:
        if any(int(os.environ.get(name) or 1) > 1 for name in _LAUNCHERS):
            jax.distributed.initialize()
        return
    if missing := [name for name in _OURS if name not in given]:
        raise SemidError(f"{', '.join(given)} set without {', '.join(missing)}; set all of {', '.join(_OURS)}, or none")
    address, count, index = given.values()
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise SemidError(f"expected 0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES, got {index} and {count}")
    jax.distributed.initialize(address, int(count), int(index), cluster_detection_method="deactivate")


def from_first(value: Any) -> Any:
    """The first process's `value`, of JSON's types, on every process."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode()
    text += b" " * (-len(text) % 256)  # few lengths, so few programs
    length = int(broadcast_one_to_all(np.int32(len(text))))
    sent = broadcast_one_to_all(np.resize(np.frombuffer(text, np.uint8), length))
    return json.loads(sent.astype(np.uint8).tobytes())


def on_first(function: Callable[[], Any]) -> Any:
    """Run `function` in the first process while the others wait; all return its result, of JSON's types, or raise its
    error."""
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = function()
        except (SemidError, OSError) as caught:
            error = str(caught)
    result, error = from_first([result, error])
    if error:
        raise SemidError(error)
    return result
