"""The device mesh and the layout of parameters and batches on it; a single device is a mesh of 1x1x1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from semid.config import check_range
from semid.errors import SemidError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # of a batch; the devices along `tensor` share theirs

Axis = str | tuple[str, ...] | None
Tree = TypeVar("Tree")

# How the last axes of a variable are split, by the end of its name; the first that matches decides, and whatever
# matches none lies whole on every device. As in Megatron-LM (arXiv 1909.08053) a matrix that opens a block is split by
# its outputs over `tensor` (of attention: by heads) and the one that closes it by its inputs, so that a block needs one
# sum over devices. `fsdp` splits what is stored alone: a step gathers it (`as_used`).
RULES: tuple[tuple[str, tuple[Axis, ...]], ...] = (
    ("qkv/kernel", ("fsdp", None, "tensor", None)),
    ("kv/kernel", ("fsdp", None, "tensor", None)),
    ("q/kernel", ("fsdp", "tensor")),
    ("mix/kernel", ("fsdp", None, "tensor", None)),
    ("up/kernel", ("fsdp", None, "tensor")),
    ("out/kernel", ("tensor", "fsdp")),
    ("down/kernel", ("tensor", "fsdp")),
    ("kernel", ("fsdp", None)),
    ("ids/embedding", (("fsdp", "tensor"), None)),  # of all items: it is never gathered
    ("embedding", (None, "fsdp")),
)


# A table of all items (codes, vectors, content) of more bytes lies in parts over all devices.
LARGE_TABLE = 1 << 30


class ShardedByRows(nnx.Variable):
    """A variable whose first axis is split over all devices, because no device should hold it whole (a memory bank)."""


class TableByRows(nnx.Variable):
    """A table of all items in a model: it is laid out like those that a step reads (`table_sharding`)."""


@dataclass(frozen=True)
class MeshConfig:
    """Shape of the device mesh. It belongs to the machine, not to the experiment: a run that is resumed, or repeated
    from its config, may have another one.

    Every device has its own rows of a batch, unless `tensor` devices share them.
    """

    fsdp: int = 1
    """Devices that hold a part of every matrix and of its optimizer moments; more of them hold a larger model."""
    tensor: int = 1
    """Devices that share the rows of a batch, each computing a part of every matrix product."""

    def __post_init__(self) -> None:
        check_range(self, "fsdp", "tensor", at_least=1)


def make_mesh(devices: Sequence[jax.Device] | None = None, config: MeshConfig = MeshConfig()) -> Mesh:
    """A mesh over `devices` (default: all), the `data` axis taking what `fsdp` and `tensor` leave.

    Raises SemidError if the devices do not divide, or those of a process do not among `tensor`: a process reads rows of
    its own.
    """
    devices = jax.devices() if devices is None else list(devices)
    fsdp, tensor = config.fsdp, config.tensor
    if len(devices) % (fsdp * tensor):
        raise SemidError(f"{len(devices)} devices do not divide into fsdp {fsdp} x tensor {tensor}; change either")
    if jax.process_count() > 1 and jax.local_device_count() % tensor:
        raise SemidError(
            f"a process's {jax.local_device_count()} devices do not divide among tensor {tensor}; choose less"
        )
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    # Auto axes: with explicit ones (the default) a gather from a sharded embedding table is a type error.
    types = (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # a slice none of whose sides make these axes: 4 x 8 x 8 by fsdp 16
        return Mesh(create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout in which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def leaf_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The layout of the variable `name`, or of its optimizer moment: by RULES, where its axes divide."""
    return _split(shape, next((axes for end, axes in RULES if name.endswith(end)), ()), mesh)


def row_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The layout of a variable `ShardedByRows`, where its first axis divides."""
    return _split(shape, (AXES, *(None,) * (len(shape) - 1)), mesh)


def table_sharding(table: Any, mesh: Mesh) -> NamedSharding:
    """The layout of a table of all items: whole on every device or, where it is large (`LARGE_TABLE`), split by rows
    over all of them if these divide it. A step gathers a batch's rows of it."""
    size = math.prod(table.shape) * np.dtype(table.dtype).itemsize
    return row_sharding(table.shape, mesh) if size > LARGE_TABLE else replicated(mesh)


def used_sharding(stored: NamedSharding) -> NamedSharding:
    """The layout in which a variable stored so is computed with: whole along `fsdp`, whose devices split the rows."""
    spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in stored.spec))
    return NamedSharding(stored.mesh, spec)


def as_used(tree: Tree, stored: Any) -> Tree:
    """Arrays stored in the layouts `stored`, gathered for a computation; their gradients are laid out as stored.

    Without this XLA would rather move activations than gather the weights, whose contracted axes are split.
    """
    return jax.tree.map(_as_used, tree, stored)


def _as_used(x: Array, stored: NamedSharding) -> Array:
    used = used_sharding(stored)

    @jax.custom_vjp
    def gather(x: Array) -> Array:
        return jax.lax.with_sharding_constraint(x, used)

    def scatter(_: None, gradient: Array) -> tuple[Array]:
        summed = jax.lax.with_sharding_constraint(gradient, used)  # else the split would reach back to activations
        return (jax.lax.with_sharding_constraint(summed, stored),)

    gather.defvjp(lambda x: (gather(x), None), scatter)
    return gather(x)


def _split(shape: tuple[int, ...], axes: tuple[Axis, ...], mesh: Mesh) -> NamedSharding:
    """The last axes of `shape` split over those of the mesh that divide them."""
    if not axes or len(shape) < len(axes):
        return replicated(mesh)
    pairs = zip(axes, shape[-len(axes) :], strict=True)
    split = [axis if size % _devices(axis, mesh) == 0 else None for axis, size in pairs]
    return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - len(axes)), *split))


def _devices(axis: Axis, mesh: Mesh) -> int:
    names = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(mesh.shape[name] for name in names)


def gathered(tree: Any, mesh: Mesh) -> Any:
    """Whole arrays on this process's first device, for code that knows of no mesh; no other device gets a copy of what
    is divided (of several processes: of one array at a time)."""

    def whole(x: Array) -> Array:
        if x.is_fully_replicated:
            return x.addressable_data(0)
        return jax.device_put(on_host(x, mesh), x.addressable_shards[0].device)

    return jax.tree.map(whole, tree)


def on_host(tree: Any, mesh: Mesh) -> Any:
    """Whole arrays in this process's own memory, past its devices; those divided among processes one at a time."""

    def own(x: Array) -> Array | np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return x
        return jax.device_get(jax.device_put(x, replicated(mesh)).addressable_data(0))

    return jax.device_get(jax.tree.map(own, tree))


def divisible_batch_size(batch_size: int, *, rows: int, mesh: Mesh, accumulate: int = 1) -> int:
    """The batch size to use on `rows` rows of data: `batch_size`, or where there are fewer rows, as many as make
    `accumulate` microbatches in equal parts for the devices (but at least one row for each part).

    Raises SemidError if `batch_size` does not divide so, since rounding it would make another experiment.
    """
    devices = row_parts(mesh)
    parts = devices * accumulate
    if batch_size % parts:
        near = sorted({max(batch_size // parts, 1) * parts, -(-batch_size // parts) * parts})
        raise SemidError(
            f"batch_size {batch_size} does not divide into {accumulate} microbatches for {devices} devices; "
            f"take {' or '.join(map(str, near))}, or fewer devices"
        )
    return max(min(batch_size, rows) // parts, 1) * parts


def row_parts(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts into which the devices split the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_devices() -> int:
    """The number of parts of a batch's rows on the mesh that `jax.set_mesh` has set; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else row_parts(mesh)


def share_rows(x: Array) -> Array:
    """`x` with its rows, a multiple of `row_devices()`, split over the devices; results derived from them are, too."""
    return jax.lax.with_sharding_constraint(x, ROWS) if row_devices() > 1 else x


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch as global arrays, their first axis split over `data` and `fsdp`.

    Raises SemidError if the rows do not divide among the devices.
    """
    rows, parts = len(jax.tree.leaves(batch)[0]) * jax.process_count(), row_parts(mesh)
    if rows % parts:
        raise SemidError(f"a batch of {rows} rows does not divide among {parts} devices; change the batch size")
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
