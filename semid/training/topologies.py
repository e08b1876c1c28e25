"""Accelerators to compile programs for, present or not: their devices by name, and their published rates."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from semid.artifacts import first_line
from semid.errors import SemidError


@dataclass(frozen=True)
class Chip:
    """Published rates of one chip. Units are decimal; memory is in the maker's GB."""

    name: str
    flops: float
    """FLOPs per second of bfloat16 matrix products (two per multiply-add)."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes read or written per second."""
    links: float
    """Bytes sent to other chips per second: half the rate published for both directions."""


# TPU: docs.cloud.google.com/tpu/docs, pages v5e, v5p and v6e ("System architecture"); H200 SXM, H100 SXM and A100 SXM
# 80 GB: NVIDIA's data sheets (dense rates).
CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 16 * 2**30, 819e9, 200e9),
    "v5p": Chip("TPU v5p", 459e12, 95 * 2**30, 2765e9, 600e9),
    "v6e": Chip("TPU v6e", 918e12, 32 * 2**30, 1638e9, 400e9),
    "h200": Chip("H200 SXM", 989e12, 141e9, 4800e9, 450e9),
    "h100": Chip("H100 SXM", 989e12, 80e9, 3350e9, 450e9),
    "a100": Chip("A100 SXM", 312e12, 80e9, 2039e9, 300e9),
}

_TPU = re.compile(r"(v5e|v5p|v6e):(\d+(?:x\d+)+)")


def chip_of(topology: str) -> Chip | None:
    """The chip of a topology; None if it has no published rates, such as a CPU."""
    if topology.startswith("cuda"):
        kind = jax.devices("cuda")[0].device_kind.lower()
        return next((chip for name, chip in CHIPS.items() if name in kind), None)
    return CHIPS.get(topology.partition(":")[0])


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """The devices to compile for: of a slice of TPUs (`v5e:4x4`, `v5p:2x2x2`), which need not be there, or `cpu` or
    `cuda`, all that this process has.

    Raises SemidError for a name that is none, without libtpu, and without a GPU.
    """
    if topology in ("cpu", "cuda"):
        try:
            return jax.devices(topology)
        except RuntimeError:
            raise SemidError(f"topology {topology}: this process has no such device") from None
    if not _TPU.fullmatch(topology):
        raise SemidError(f"expected a topology such as v5e:4x4, v5p:2x2x2, v6e:16x16, cpu or cuda, got {topology!r}")
    if importlib.util.find_spec("libtpu") is None:
        raise SemidError(f"topology {topology}: compiling for TPUs needs libtpu: pip install 'semid[tpu]'")
    return _slice(topology)


def _slice(topology: str) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    # libtpu asks the machine that it believes to run on, unless it is told.
    told = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost"}
    told["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # one at a time is for those that run programs
    for name, value in told.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise SemidError(f"topology {topology}: libtpu has no such slice ({first_line(error)})") from None
