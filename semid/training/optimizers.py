"""Optimizers of optax by name, with warm-up, learning-rate schedule, gradient clipping, and rates per model part."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any

import jax
import jax.numpy as jnp
import optax

from semid.config import check_range
from semid.errors import SemidError
from semid.training.gradients import Rates, rate_of
from semid.training.state import leaf_name

# Not supported, as they need more than gradients and parameters: losses, keys, more evaluations, a constant rate.
_OTHERS = {
    *("lbfgs", "optimistic_adam", "rprop", "sm3", "noisy_sgd", "dpsgd", "momo", "momo_adam", "sophia"),
    *("schedule_free", "schedule_free_adamw", "schedule_free_sgd"),
}


class RateSchedule(StrEnum):
    """The course of the learning rate after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer of optax with linear warm-up, decay of the learning rate and gradient clipping."""

    name: str = "adamw"
    """Function of `optax` or `optax.contrib` that makes the optimizer: adamw, lion, muon, adafactor, sgd, ..."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled decay, on matrices only."""
    warmup: float = 0.05
    """Share of all steps in which the rate rises linearly from 0."""
    schedule: RateSchedule = RateSchedule.COSINE
    """Course of the rate after the warm-up."""
    final: float = 0.02
    """Final learning rate as a share of the peak; not used by a constant schedule."""
    clip: float = 1.0
    """Maximum global norm of the gradient, over the trained parts."""
    beta2: float = 0.98
    """Decay of the second moment of adam and adamw."""
    options: tuple[tuple[str, float], ...] = ()
    """Further arguments of the optimizer's function, NAME NUMBER each (`--options b1 0.95`)."""
    rates: Rates = ()
    """Factors of the learning rate for parts of the model, by prefixes of names; 0 freezes a part. The first match
    counts; other parts have factor 1."""

    def __post_init__(self) -> None:
        if not all(share >= 0 for _, share in self.rates):
            raise SemidError(f"expected rates, shares of the learning rate, of at least 0, got {self.rates}")
        check_range(self, "learning_rate", "clip", above=0)
        check_range(self, "weight_decay", at_least=0)
        check_range(self, "final", at_least=0, at_most=1)
        check_range(self, "warmup", "beta2", at_least=0, below=1)
        known = set(_parameters(_factory(self.name))) - set(_arguments(self, lambda step: step))
        for option, _ in self.options:
            if option not in known:
                raise SemidError(f"{self.name} has no option {option!r}{_suggestion(option, known)}")


@functools.lru_cache(maxsize=64)  # one object per settings, as `make_step` compares optimizers by identity
def make_optimizer(config: OptimizerConfig, *, num_steps: int) -> optax.GradientTransformation:
    """The optax chain of `config` over `num_steps` steps."""
    rate = learning_rate(config, num_steps=num_steps)
    factory, arguments = _factory(config.name), _arguments(config, rate)
    defaults = {name: parameter.default for name, parameter in _parameters(factory).items()}
    options = {name: _like(value, defaults[name]) for name, value in config.options}
    chain = [_clip(config), factory(**arguments, **options)]
    if "weight_decay" not in arguments:
        chain.append(optax.add_decayed_weights(lambda step: -config.weight_decay * rate(step), mask=_matrices))
    if config.rates:
        chain.append(optax.stateless(lambda updates, _: _at_rates(updates, config.rates)))
    return optax.chain(*chain)


def learning_rate(config: OptimizerConfig, *, num_steps: int) -> optax.Schedule:
    """The learning rate of each step."""
    peak, last = config.learning_rate, config.final * config.learning_rate
    warmup = min(round(config.warmup * num_steps), max(num_steps - 1, 0))
    if config.schedule is RateSchedule.COSINE:
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(num_steps, 1), end_value=last)
    end = last if config.schedule is RateSchedule.LINEAR else peak
    rise, fall = optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, end, num_steps - warmup)
    return optax.join_schedules([rise, fall], [warmup])


def _arguments(config: OptimizerConfig, rate: optax.Schedule) -> dict[str, Any]:
    """The arguments of the optimizer's function that the config sets."""
    arguments: dict[str, Any] = {"learning_rate": rate}
    if config.name in ("adam", "adamw"):
        arguments["b2"] = config.beta2
    if config.name == "muon":
        arguments["muon_weight_dimension_numbers"] = _kernels
    if {"weight_decay", "mask"} <= set(_parameters(_factory(config.name))):
        arguments |= {"weight_decay": config.weight_decay, "mask": _matrices}
    return arguments


@functools.cache
def _optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """The functions of optax that make an optimizer, by name."""
    functions = {
        name: found
        for name, found in {**vars(optax.contrib), **vars(optax)}.items()
        if inspect.isfunction(found) or isinstance(found, functools.partial)
    }
    names = {name for name in functions if not name.startswith(("_", "scale_by_"))} - _OTHERS
    return {name: functions[name] for name in names if "learning_rate" in _parameters(functions[name])}


def _factory(name: str) -> Callable[..., optax.GradientTransformation]:
    if name not in _optimizers():
        raise SemidError(f"expected the name of an optimizer of optax, got {name!r}{_suggestion(name, _optimizers())}")
    return _optimizers()[name]


def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(factory).parameters


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; known: {', '.join(sorted(known))}"


def _like(value: float, default: Any) -> float:
    """`value` as an integer if the default is one (numbers of iterations, switches)."""
    return int(value) if isinstance(default, int) and float(value).is_integer() else value


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _kernels(params: Any) -> Any:
    """The matrices of layers, which Muon orthogonalizes; embeddings and all others use its Adam."""

    def dimensions(path: Any, p: Any) -> optax.contrib.MuonDimensionNumbers | None:
        is_kernel = p.ndim >= 2 and leaf_name(path).endswith("kernel")
        return optax.contrib.MuonDimensionNumbers(0, tuple(range(1, p.ndim))) if is_kernel else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _clip(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm of the trained parts; gradients of frozen parts are zero."""
    clip = optax.clip_by_global_norm(config.clip)

    def trained(path: Any, gradient: jax.Array) -> jax.Array:
        return gradient if rate_of(leaf_name(path), config.rates) else jnp.zeros_like(gradient)

    def clipped(gradients: Any, _: Any) -> Any:
        gradients = jax.tree_util.tree_map_with_path(trained, gradients)
        return clip.update(gradients, optax.EmptyState())[0]

    return optax.stateless(clipped)


def _at_rates(updates: Any, rates: Rates) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, u: u * rate_of(leaf_name(path), rates), updates)
