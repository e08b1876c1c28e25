"""The train state, the jitted training step, and the names of a state's arrays in files."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from semid.errors import SemidError
from semid.training.gradients import Gradients, Rates, accumulated, rate_of
from semid.training.mesh import (
    ShardedByRows,
    TableByRows,
    as_used,
    leaf_sharding,
    replicated,
    row_sharding,
    table_sharding,
    used_sharding,
)

Tree = TypeVar("Tree")
Loss = Callable[[Any, Any, Any, "StepContext"], tuple[Array, dict[str, Array]]]
# Combines the gradients of several losses into one gradient, and scalars to log.
Combine = Callable[[Sequence[nnx.State]], tuple[nnx.State, dict[str, Array]]]
Step = Callable[["TrainState", Any], tuple["TrainState", dict[str, Array]]]

# The hardware generator is much faster than threefry; keys of different steps are distinct.
_IMPL = "rbg"

# `functools.partial` that returns one object for equal arguments, so that equal losses share a program (`make_step`).
bound_loss = functools.lru_cache(maxsize=64)(functools.partial)


class StepContext(NamedTuple):
    """Further inputs of a loss: a PRNG key, and the share of training done, in [0, 1)."""

    key: Array
    progress: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The variables that change in training; a checkpoint holds them and the position in the data.

    `rest` are the model's variables that no gradient moves; a loss may set them (moving averages of code usage).
    """

    step: Int[Array, ""]
    params: nnx.State
    rest: nnx.State
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A jitted training step on its mesh, with the tables that it reads."""

    program: Any
    """The jitted function of (state, batch, tables, key)."""
    tables: Any
    mesh: Mesh
    seed: int

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        """The state after the step, and its metrics; the state before is donated."""
        with jax.set_mesh(self.mesh):
            return self.program(state, batch, self.tables, self.key)

    def trace(self, state: TrainState, batch: Any) -> jax.stages.Traced:
        """The traced program for these arguments (arrays or shapes), before lowering for a platform."""
        with jax.set_mesh(self.mesh):
            key = jax.eval_shape(lambda: _key_numbers(self.seed))
            return self.program.trace(state, batch, self.tables, _placed(key, replicated(self.mesh)))

    @functools.cached_property
    def key(self) -> Array:
        """The seed's key as numbers. It is the program's last argument, so that all seeds share one program."""
        return jax.device_put(_key_numbers(self.seed), replicated(self.mesh))

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """The lowered program, which has a `cost_analysis` and, when compiled, a `memory_analysis`."""
        return self.trace(state, batch).lower()


def split_variables(model: nnx.Module) -> tuple[nnx.GraphDef[Any], nnx.State, nnx.State]:
    """Graph of a model, its parameters, and its other variables."""
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    return graph, params, rest[0]


def create_state(model: nnx.Module, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, its arrays laid out on the mesh (`shardings`), moments like parameters.

    Copies the model's variables: training donates its state, and must not delete what the caller still holds.
    """
    _, *variables = split_variables(model)
    params, rest = (jax.device_put(part, shardings(part, mesh)) for part in _copy(variables))
    moments = shardings(jax.eval_shape(optimizer.init, params), mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=moments)(params)  # made sharded: one device may not hold it
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)), params, rest, opt_state)


@jax.jit
def _copy(tree: Tree) -> Tree:
    """Copies with the types that a step returns: with weak types at first, the second step would compile again."""
    return jax.tree.map(lambda x: jnp.copy(x).astype(x.dtype), tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf: by rows if its variable is `ShardedByRows` or a large `TableByRows`, else by its name
    and shape."""

    def layout(path: Any, node: Any) -> Any:
        if isinstance(node, ShardedByRows):
            return jax.tree.map(lambda x: row_sharding(np.shape(x), mesh), node)
        if isinstance(node, TableByRows):
            return jax.tree.map(lambda x: table_sharding(x, mesh), node)
        return leaf_sharding(leaf_name(path), np.shape(node), mesh)

    by_kind = (ShardedByRows, TableByRows)
    return jax.tree_util.tree_map_with_path(layout, tree, is_leaf=lambda node: isinstance(node, by_kind))


def used_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf for computation: as stored, but not split over `fsdp`."""
    return jax.tree.map(used_sharding, shardings(tree, mesh))


def make_step(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    tables: Any,
    seed: int,
    num_steps: int,
    mesh: Mesh,
    accumulate: int = 1,
    combine: Combine | None = None,
    rates: Rates = (),
) -> TrainStep:
    """The jitted training step: `loss(model, batch, tables, context) -> (scalar, metrics)`, gradients, update.

    `tables` are device arrays that no step changes (codes, features): arguments, never constants of the program; large
    ones lie over the devices (`table_sharding`). The context of step `n` of `num_steps` is a fixed function of seed and
    `n`: a resumed run draws the same dropout.

    With `accumulate` above 1, gradients are those of so many microbatches, one after the other. They are the whole
    batch's, to rounding, if the loss is a mean over rows, or a mean over targets whose number it gives as the metric
    `targets`. Each microbatch draws its own dropout, and sees the variables that a loss set in the one before.

    With `combine` the loss is a vector, and the step follows what `combine` makes of its entries' gradients.

    `rates` are the optimizer's: of parts at 0 no gradients are computed, nor do they count in `gradient_norm`.

    Steps of equal models, losses (`bound_loss`), optimizers (`make_optimizer`) and numbers but the seed share one
    program.
    """
    graph, *_ = split_variables(model)
    layout = jax.tree.flatten(_layout(model, optimizer, mesh))
    held = tuple(name for name in named_leaves(split_variables(model)[1]) if not rate_of(name, rates))
    options = (held, num_steps, mesh, accumulate, combine)
    program = _program(graph, optimizer, loss, tuple(layout[0]), layout[1], *options)
    return TrainStep(program, jax.tree.map(lambda x: _placed(x, table_sharding(x, mesh)), tables), mesh, seed)


@functools.lru_cache(maxsize=16)
def _program(
    graph: nnx.GraphDef[Any],
    optimizer: optax.GradientTransformation,
    loss: Loss,
    shardings_of_state: tuple[NamedSharding, ...],
    structure: jax.tree_util.PyTreeDef,
    held: tuple[str, ...],
    num_steps: int,
    mesh: Mesh,
    accumulate: int,
    combine: Combine | None,
) -> Any:
    """The step's program, cached, so that trainings with equal arguments compile it once."""
    layout = jax.tree.unflatten(structure, shardings_of_state)

    def row_gradients(
        params: nnx.State, rest: nnx.State, rows: Any, key: Array, *, tables: Any, progress: Array
    ) -> Gradients:
        def compute(params: nnx.State) -> tuple[Array, tuple[dict[str, Array], nnx.State]]:
            params = _without_gradients(as_used(params, layout.params), held)
            current = nnx.merge(graph, params, rest, copy=True)  # a copy, as a loss may set variables
            value, metrics = loss(current, rows, tables, StepContext(key, progress))
            return value, ({"loss": jnp.sum(value), **metrics}, split_variables(current)[2])

        if combine is None:
            (_, (metrics, after)), gradients = jax.value_and_grad(compute, has_aux=True)(params)
            return Gradients(gradients, metrics, after)
        values, pull, (metrics, after) = jax.vjp(compute, params, has_aux=True)
        gradients, found = combine([pull(one)[0] for one in jnp.eye(len(values), dtype=values.dtype)])
        return Gradients(gradients, metrics | found, after)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    def step(state: TrainState, batch: Any, tables: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl=_IMPL), state.step)
        of = functools.partial(row_gradients, tables=tables, progress=state.step.astype(jnp.float32) / num_steps)
        if accumulate == 1:
            found = of(state.params, state.rest, batch, key)
        else:
            found = accumulated(of, state.params, state.rest, batch, key, parts=accumulate, mesh=mesh)
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction multiplies an integer count
            updates, opt_state = optimizer.update(found.gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"gradient_norm": optax.tree.norm(found.gradients), **found.metrics}
        return TrainState(state.step + 1, params, found.rest, opt_state), metrics

    return step


def _key_numbers(seed: int) -> Array:
    return jax.random.key_data(jax.random.key(seed, impl=_IMPL))


def _without_gradients(params: nnx.State, held: tuple[str, ...]) -> nnx.State:
    """`params`, with a `stop_gradient` on those of these names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.stop_gradient(x) if leaf_name(path) in held else x, params
    )


def _placed(x: Any, sharding: NamedSharding) -> Any:
    """An array with a sharding; a shape gets the sharding as an attribute."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.device_put(x, sharding)


def abstract_state(model: nnx.Module, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shapes and layouts of `create_state`'s arrays, to lower a step with; the model may be one of shapes, too."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        _untrained(model, optimizer),
        _layout(model, optimizer, mesh),
    )


def _untrained(model: nnx.Module, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, without shardings, and with only the shapes of moments."""
    _, params, rest = split_variables(model)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step, params, rest, jax.eval_shape(optimizer.init, params))  # type: ignore[arg-type]


def _layout(model: nnx.Module, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shardings of `create_state`'s arrays."""
    return shardings(_untrained(model, optimizer), mesh)


def with_variables(model: nnx.Module, params: nnx.State, rest: nnx.State) -> Any:
    """A model of the same kind holding these variables (shared, not copied)."""
    graph, *_ = split_variables(model)
    return nnx.merge(graph, params, rest)


def edit_variables(model: nnx.Module, state: TrainState, edit: Callable[[Any], None]) -> TrainState:
    """`state` after `edit` has set variables of a model with copies of all variables."""
    graph, *_ = split_variables(model)
    current = nnx.merge(graph, state.params, state.rest, copy=True)
    edit(current)
    _, params, rest = split_variables(current)
    return dataclasses.replace(state, params=params, rest=rest)


def edit_moments(model: nnx.Module, state: TrainState, edit: Callable[[Any], None]) -> TrainState:
    """`state` after `edit` has set the optimizer's moments, one of them at a time (Adam has two).

    It is given a model that holds, in place of each parameter, its moment: of the same shape or, with optimizers that
    factor or mask moments, of another one, or none.
    """

    def edited(part: Any) -> Any:
        if not isinstance(part, nnx.State):  # counts of steps
            return part
        return edit_variables(model, dataclasses.replace(state, params=part), edit).params

    opt_state = jax.tree.map(edited, state.opt_state, is_leaf=lambda part: isinstance(part, nnx.State))
    return dataclasses.replace(state, opt_state=opt_state)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path (`backbone/blocks/0/feed/up/kernel`), as files and checkpoints name them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {leaf_name(path): leaf for path, leaf in leaves}


def replace_leaves(tree: Tree, leaves: Mapping[str, Any], *, where: str) -> Tree:
    """`tree` with the arrays of `leaves`; fused matrices may lie flat, as they once did.

    Raises SemidError naming the tensor that is missing, extra or misshapen.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [leaf_name(path) for path, _ in paths]
    if set(names) != set(leaves):
        odd = sorted(set(names) ^ set(leaves))[0]
        raise SemidError(f"{where}: tensor {odd!r} is {'missing' if odd in names else 'not one of the model'}")
    found = [_fused(leaves[name], np.shape(old)) for name, (_, old) in zip(names, paths, strict=True)]
    for name, leaf, (_, old) in zip(names, found, paths, strict=True):
        if np.shape(leaf) != np.shape(old):
            raise SemidError(
                f"{where}: tensor {name!r} has shape {np.shape(leaf)}; the config asks for {np.shape(old)}"
            )
    # A global array cannot be put on a device; `jnp.asarray` compiles a program for each shape of host arrays.
    arrays = [leaf if isinstance(leaf, Array) else jax.device_put(leaf) for leaf in found]
    return jax.tree_util.tree_unflatten(structure, arrays)


def _fused(leaf: Any, shape: tuple[int, ...]) -> Any:
    """A matrix that was stored with all outputs on one axis, in the current shape [inputs, matrices, ...].

    Of attention these were queries by head, then keys, then values, and are [inputs, group + 2, heads, width].
    """
    if np.ndim(leaf) != 2 or len(shape) < 3 or np.shape(leaf) != (shape[0], math.prod(shape[1:])):
        return leaf
    if len(shape) == 3 or shape[1] <= 3:
        return leaf.reshape(shape)
    inputs, group, heads, width = shape[0], shape[1] - 2, *shape[2:]
    queries, others = leaf[:, : group * heads * width], leaf[:, group * heads * width :]
    queries = queries.reshape(inputs, heads, group, width).swapaxes(1, 2)
    return (jnp if isinstance(leaf, Array) else np).concatenate([queries, others.reshape(inputs, 2, heads, width)], 1)


def leaf_name(path: Any) -> str:
    """The name of a leaf in files and checkpoints, from its key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
