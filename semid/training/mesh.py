"""The mesh of devices: one named mesh for everything, a single device being 1x1x1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from semid.errors import SemidError

AXES = ("data", "fsdp", "tensor")


def make_mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over `devices` (default: all), the `data` axis taking what `fsdp` and `tensor` leave.

    Raises SemidError if the devices do not divide.
    """
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) % (fsdp * tensor):
        raise SemidError(f"{len(devices)} devices do not divide into fsdp {fsdp} x tensor {tensor}")
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    # Auto axes: with explicit ones (the default) a gather from a sharded embedding table is a type error.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def fitting_batch(batch_size: int, *, rows: int, mesh: Mesh) -> int:
    """The batch size to use on `rows` rows of data: `batch_size`, at most all rows, in equal parts for the devices.

    Rounded down to a multiple of the devices, but at least one row for each, though there be fewer.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return max(min(batch_size, rows) // parts, 1) * parts


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch as global arrays, their first axis split over `data` and `fsdp`.

    Raises SemidError if the rows do not divide among the devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    rows, parts = len(jax.tree.leaves(batch)[0]) * jax.process_count(), mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise SemidError(f"a batch of {rows} rows does not divide among {parts} devices; change the batch size")
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
