"""The device mesh, and the sharding of parameters and batches over it; a single device is a mesh of 1x1x1."""

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
ROWS = PartitionSpec(("data", "fsdp"))  # rows of a batch; devices along `tensor` have the same rows

Axis = str | tuple[str, ...] | None
Tree = TypeVar("Tree")

# Sharding of the last axes of a variable, by the end of its name; the first match counts, and variables without a match
# are replicated. As in Megatron-LM (arXiv 1909.08053), the first matrix of a block is split over `tensor` by outputs
# (in attention, by heads) and the last one by inputs, so that a block needs one sum over devices. `fsdp` splits only
# the storage: a step gathers the weights (`as_used`).
RULES: tuple[tuple[str, tuple[Axis, ...]], ...] = (
    ("qkv/kernel", ("fsdp", None, "tensor", None)),
    ("kv/kernel", ("fsdp", None, "tensor", None)),
    ("q/kernel", ("fsdp", "tensor")),
    ("mix/kernel", ("fsdp", None, "tensor", None)),
    ("up/kernel", ("fsdp", None, "tensor")),
    ("out/kernel", ("tensor", "fsdp")),
    ("down/kernel", ("tensor", "fsdp")),
    ("kernel", ("fsdp", None)),
    ("ids/embedding", (("fsdp", "tensor"), None)),  # a table of all items: never gathered
    ("embedding", (None, "fsdp")),
)


# Tables of all items (codes, vectors, content) with more bytes are split over all devices.
LARGE_TABLE = 1 << 30


class ShardedByRows(nnx.Variable):
    """A variable whose first axis is split over all devices, as it is too large for one (a memory bank)."""


class TableByRows(nnx.Variable):
    """A table of all items inside a model, sharded like the tables that a step reads (`table_sharding`)."""


@dataclass(frozen=True)
class MeshConfig:
    """Shape of the device mesh. It belongs to the machine, not to the experiment: a resumed or repeated run may have
    another one.

    Every device has its own rows of a batch, except that `tensor` devices share theirs.
    """

    fsdp: int = 1
    """Devices over which every matrix and its optimizer moments are split; more of them fit a larger model."""
    tensor: int = 1
    """Devices that share the rows of a batch, each computing a part of every matrix product."""

    def __post_init__(self) -> None:
        check_range(self, "fsdp", "tensor", at_least=1)


def make_mesh(devices: Sequence[jax.Device] | None = None, config: MeshConfig = MeshConfig()) -> Mesh:
    """A mesh over `devices` (default: all); the `data` axis gets the devices that `fsdp` and `tensor` leave.

    Raises SemidError if the number of devices is not divisible, or a process's devices do not divide among `tensor`, as
    each process reads its own rows.
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
    except NotImplementedError:  # no sides of the slice match these axes, e.g. 4 x 8 x 8 for fsdp 16
        return Mesh(create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """The replicated sharding: every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def leaf_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Sharding of the variable `name`, or of its optimizer moment: by RULES, if its axes are divisible."""
    return _split(shape, next((axes for end, axes in RULES if name.endswith(end)), ()), mesh)


def row_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Sharding of a variable `ShardedByRows`, if its first axis is divisible."""
    return _split(shape, (AXES, *(None,) * (len(shape) - 1)), mesh)


def table_sharding(table: Any, mesh: Mesh) -> NamedSharding:
    """Sharding of a table of all items: replicated or, if it is large (`LARGE_TABLE`) and divisible, split by rows over
    all devices. A step gathers the rows of a batch from it."""
    size = math.prod(table.shape) * np.dtype(table.dtype).itemsize
    return row_sharding(table.shape, mesh) if size > LARGE_TABLE else replicated(mesh)


def used_sharding(stored: NamedSharding) -> NamedSharding:
    """Sharding for computation with a variable stored so: not split over `fsdp`, whose devices have their own rows."""
    spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in stored.spec))
    return NamedSharding(stored.mesh, spec)


def as_used(tree: Tree, stored: Any) -> Tree:
    """Gather arrays stored with the shardings `stored` for a computation; their gradients are sharded as stored.

    Without this, XLA would move activations instead of gathering weights, since their contracted axes are split.
    """
    return jax.tree.map(_as_used, tree, stored)


def _as_used(x: Array, stored: NamedSharding) -> Array:
    used = used_sharding(stored)

    @jax.custom_vjp
    def gather(x: Array) -> Array:
        return jax.lax.with_sharding_constraint(x, used)

    def scatter(_: None, gradient: Array) -> tuple[Array]:
        summed = jax.lax.with_sharding_constraint(gradient, used)  # keeps the split from propagating to activations
        return (jax.lax.with_sharding_constraint(summed, stored),)

    gather.defvjp(lambda x: (gather(x), None), scatter)
    return gather(x)


def _split(shape: tuple[int, ...], axes: tuple[Axis, ...], mesh: Mesh) -> NamedSharding:
    """Sharding of the last axes of `shape` over the mesh axes that divide them."""
    if not axes or len(shape) < len(axes):
        return replicated(mesh)
    pairs = zip(axes, shape[-len(axes) :], strict=True)
    split = [axis if size % _devices(axis, mesh) == 0 else None for axis, size in pairs]
    return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - len(axes)), *split))


def _devices(axis: Axis, mesh: Mesh) -> int:
    names = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(mesh.shape[name] for name in names)


def gathered(tree: Any, mesh: Mesh) -> Any:
    """Whole arrays on this process's first device, for code without a mesh. Split arrays are copied to no other device
    (with several processes, one array at a time is)."""

    def whole(x: Array) -> Array:
        if x.is_fully_replicated:
            return x.addressable_data(0)
        return jax.device_put(on_host(x, mesh), x.addressable_shards[0].device)

    return jax.tree.map(whole, tree)


def on_host(tree: Any, mesh: Mesh) -> Any:
    """Whole arrays in host memory; those split among processes are gathered one at a time."""

    def own(x: Array) -> Array | np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return x
        return jax.device_get(jax.device_put(x, replicated(mesh)).addressable_data(0))

    return jax.device_get(jax.tree.map(own, tree))


def divisible_batch_size(batch_size: int, *, rows: int, mesh: Mesh, accumulate: int = 1) -> int:
    """The batch size for `rows` rows of data: `batch_size` or, if there are fewer rows, the largest size that divides
    into `accumulate` microbatches and these among the devices (at least one row each).

    Raises SemidError if `batch_size` is not divisible so, since rounding it would change the experiment.
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
    """Number of parts into which the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_devices() -> int:
    """Number of parts of a batch's rows on the mesh set by `jax.set_mesh`; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else row_parts(mesh)


def share_rows(x: Array) -> Array:
    """`x` with its rows (a multiple of `row_devices()`) split over the devices, and so the results derived from it."""
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
