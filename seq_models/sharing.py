"""Operations sharded over the mesh set by `jax.set_mesh`: by rows of a batch, and by ids of a table of all items.

Without a mesh, or with other axes, everything is left to the compiler.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, SupportsInt

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

# Names of the axes of semid's mesh, over which are sharded: rows of a batch, rows of a large table, attention heads.
ROW_AXES, _ID_AXES, HEAD_AXES = ("data", "fsdp"), ("fsdp", "tensor"), ("tensor",)

Axes = tuple[tuple[str, ...], tuple[str, ...]]


def shared_axes(rows: SupportsInt, ids: int) -> Axes:
    """The mesh's axes that shard rows, and those that shard ids: all that divide their numbers.

    Ids are sharded over devices that hold different parts of a model, so that a large table need not move: the states
    of a batch are far smaller.
    """
    mesh = _mesh()
    if mesh is None:
        return (), ()
    shared = _devices(_ID_AXES) > 1 and ids % _devices(_ID_AXES) == 0
    axes = tuple(axis for axis in ROW_AXES if not (shared and axis in _ID_AXES))
    return dividing(axes, rows), (_ID_AXES if shared else ())


def share_items(scores: Float[Array, "b items"]) -> Float[Array, "b items"]:
    """Scores of all items, each on the device that holds the item's vector."""
    axes = shared_axes(*scores.shape)
    return jax.lax.with_sharding_constraint(scores, axes_spec(*axes)) if any(axes) else scores


def top_k(scores: Float[Array, "batch n"], k: int) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"]]:
    """`jax.lax.top_k`, each device for its own rows."""
    axes = dividing(ROW_AXES, scores.shape[0])
    return _per_device(functools.partial(_top_k, k=k), (axes, ()), scores)


def top_items(scores: Float[Array, "b items"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """`jax.lax.top_k` of scores sharded by items: the k best are among the k best of each device."""
    axes = shared_axes(*scores.shape)

    def best(scores: Array) -> tuple[Array, Array]:
        values, rows = jax.lax.top_k(scores, min(k, scores.shape[1]))
        if not axes[1]:
            return values, rows
        rows += scores.shape[1] * jax.lax.axis_index(axes[1])
        # Gathered in the order of devices, hence of items, so that ties keep their order.
        values, rows = (jax.lax.all_gather(x, axes[1], axis=1, tiled=True) for x in (values, rows))
        values, best = jax.lax.top_k(values, k)
        return values, jnp.take_along_axis(rows, best, axis=-1)

    return _per_device(best, axes, scores)


def set_items(x: Shaped[Array, "b items"], rows: Int[Array, "b n"], value: Any) -> Shaped[Array, "b items"]:
    """`x` with `value` at each row's own item rows; rows outside 0 .. items - 1, such as -1, are skipped."""
    axes = shared_axes(*x.shape)

    def put(x: Array, rows: Array) -> Array:
        own = rows - x.shape[1] * jax.lax.axis_index(axes[1]) if axes[1] else rows
        own = jnp.where(own < 0, x.shape[1], own)
        return x.at[jnp.arange(x.shape[0])[:, None], own].set(value, mode="drop")

    if not any(axes):
        return put(x, rows)
    where, own = axes_spec(*axes), axes_spec(axes[0], ())
    return jax.shard_map(put, in_specs=(where, own), out_specs=where, check_vma=False)(x, rows)


def take_beams(tree: Any, index: Int[Array, "batch n"]) -> Any:
    """Entries `index` along axis 1 of every leaf, per user."""
    return jax.tree.map(lambda leaf: jax.vmap(lambda beams, i: beams[i])(leaf, index), tree)


def _per_device(run: Callable[[Array], tuple[Array, Array]], axes: Axes, scores: Array) -> tuple[Array, Array]:
    """Call `run` on each device's own part of the scores; the CPU compiler would gather them all for a `top_k`."""
    if not any(axes):
        return run(scores)
    return jax.shard_map(run, in_specs=axes_spec(*axes), out_specs=axes_spec(axes[0], ()), check_vma=False)(scores)


def _top_k(scores: Float[Array, "batch n"], k: int) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"]]:
    """`jax.lax.top_k`, for long rows in two stages: the k largest values lie in the k blocks with the largest maxima.

    On a CPU each stage has a fixed cost, so that a second one pays off only for very long rows.
    """
    num_blocks = scores.shape[-1] // _BLOCK
    if num_blocks < 8 * k:
        values, best = jax.lax.top_k(scores, k)
        return values, best
    missing = -scores.shape[-1] % _BLOCK
    padded = jnp.pad(scores, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    blocks = padded.reshape(scores.shape[0], -1, _BLOCK)
    chosen = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), k)[1], axis=-1)  # sorted, so that ties keep their order
    values, best = jax.lax.top_k(take_beams(blocks, chosen).reshape(len(scores), -1), k)
    return values, take_beams(chosen, best // _BLOCK) * _BLOCK + best % _BLOCK


_BLOCK = 32


def _mesh() -> Any:
    """The mesh that is set, if it has the axes and more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or not {*ROW_AXES, *_ID_AXES} <= {*mesh.axis_names} or mesh.size == 1 else mesh


def _devices(axes: tuple[str, ...]) -> int:
    return math.prod(_mesh().shape[axis] for axis in axes)


def dividing(axes: tuple[str, ...], size: SupportsInt) -> tuple[str, ...]:
    """The axes, if a mesh is set and their number of devices divides `size`; else none."""
    return axes if _mesh() is not None and int(size) % _devices(axes) == 0 else ()


def axes_spec(*axes: tuple[str, ...]) -> PartitionSpec:
    """Partition spec with these axes of a mesh, per axis of an array."""
    return PartitionSpec(*(names or None for names in axes))
