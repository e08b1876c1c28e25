"""The train state, the jitted step over it, and named leaves for files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from semid.errors import SemidError
from semid.training.mesh import replicated

Tree = TypeVar("Tree")
Loss = Callable[[Any, Any, Any, "StepContext"], tuple[Array, dict[str, Array]]]
Step = Callable[["TrainState", Any], tuple["TrainState", dict[str, Array]]]


class StepContext(NamedTuple):
    """What a loss may depend on beside its inputs: a key of its own, and the share of training done, in [0, 1)."""

    key: Array
    progress: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes in training, and so all that a checkpoint holds beside the input's position.

    `rest` are the model's variables that no gradient moves; a loss may set them (moving averages of code usage).
    """

    step: Int[Array, ""]
    params: nnx.State
    rest: nnx.State
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and gradient clipping."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled decay, on matrices only."""
    warmup: float = 0.05
    """Share of all steps in which the rate rises linearly from 0."""
    final: float = 0.02
    """Last learning rate as a share of the peak."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    beta2: float = 0.98
    """Decay of Adam's second moment."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise SemidError(f"expected a learning_rate above 0, got {self.learning_rate}")
        if not 0 <= self.warmup < 1:
            raise SemidError(f"expected warmup, a share of all steps, in [0, 1), got {self.warmup}")


def make_optimizer(config: OptimizerConfig, *, num_steps: int) -> optax.GradientTransformation:
    """The optax chain of `config` over `num_steps` steps."""
    peak = config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, round(config.warmup * num_steps), max(num_steps, 1), end_value=config.final * peak
    )

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    adamw = optax.adamw(schedule, b2=config.beta2, weight_decay=config.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def create_state(model: nnx.Module, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, its arrays on every device of the mesh.

    Copies the model's variables: training donates its state, and must not delete what the caller still holds.
    """
    _, *variables = nnx.split(model, nnx.Param, ...)
    params, rest = jax.tree.map(jnp.copy, variables)
    state = TrainState(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params))
    return jax.device_put(state, replicated(mesh))


def make_step(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    tables: Any,
    seed: int,
    num_steps: int,
    mesh: Mesh,
) -> Step:
    """The jitted training step: `loss(model, batch, tables, context) -> (scalar, metrics)`, gradients, update.

    `tables` are device arrays that no step changes (codes, features): arguments, never constants of the program. The
    context of step `n` of `num_steps` is a fixed function of seed and `n`: a resumed run draws the same dropout.
    """
    graph, *_ = nnx.split(model, nnx.Param, ...)
    tables = jax.device_put(tables, replicated(mesh))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated(mesh))
    def step(state: TrainState, batch: Any, tables: Any) -> tuple[TrainState, dict[str, Array]]:
        # The hardware generator costs a fraction of threefry; keys of different steps never meet.
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), state.step)
        context = StepContext(key, state.step.astype(jnp.float32) / num_steps)

        def compute(params: nnx.State) -> tuple[Array, tuple[dict[str, Array], nnx.State]]:
            current = nnx.merge(graph, params, state.rest, copy=True)  # a loss may set variables of its own
            value, metrics = loss(current, batch, tables, context)
            return value, (metrics, nnx.split(current, nnx.Param, ...)[2])

        (value, (metrics, rest)), gradients = jax.value_and_grad(compute, has_aux=True)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction multiplies an integer count
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients), **metrics}
        return TrainState(state.step + 1, params, rest, opt_state), metrics

    return lambda state, batch: step(state, batch, tables)


def with_variables(model: nnx.Module, params: nnx.State, rest: nnx.State) -> Any:
    """A model of the same kind holding these variables (shared, not copied)."""
    graph, *_ = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, params, rest)


def named_leaves(tree: Any) -> dict[str, Array]:
    """The arrays of a pytree by path (`backbone/blocks/0/feed/up/kernel`), as files and checkpoints name them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def replace_leaves(tree: Tree, leaves: Mapping[str, Any], *, where: str) -> Tree:
    """`tree` with the arrays of `leaves`. Raises SemidError naming the tensor that is missing, extra or misshapen."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [_name(path) for path, _ in paths]
    if set(names) != set(leaves):
        odd = sorted(set(names) ^ set(leaves))[0]
        raise SemidError(f"{where}: tensor {odd!r} is {'missing' if odd in names else 'not one of the model'}")
    for name, (_, old) in zip(names, paths, strict=True):
        if np.shape(leaves[name]) != np.shape(old):
            raise SemidError(
                f"{where}: tensor {name!r} has shape {np.shape(leaves[name])}; the config asks for {np.shape(old)}"
            )
    return jax.tree_util.tree_unflatten(structure, [jnp.asarray(leaves[name]) for name in names])


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
