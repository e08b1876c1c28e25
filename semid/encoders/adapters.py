"""Tuning of pretrained encoders: frozen, whole, by low-rank changes of their matrices, or by side adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float16, Key

from semid import artifacts
from semid.config import check_range, to_dict
from semid.encoders.blocks import Constant
from semid.encoders.content import HiddenRows, Rows, arrays_digest, named_variables, present_of
from semid.errors import SemidError

_TEMPERATURE = 0.1  # of the gates (IISAN)


@dataclass(frozen=True)
class Frozen:
    """Nothing of the encoder is trained."""


@dataclass(frozen=True)
class Full:
    """Every parameter of the encoder is trained."""


@dataclass(frozen=True)
class LowRank:
    """Only a product of two narrow matrices, which is added to each matrix, is trained (LoRA: Hu et al. 2021)."""

    rank: int = 8
    """Width of the narrow matrices."""
    alpha: float = 16.0
    """Their product is scaled by alpha / rank."""
    layers: tuple[str, ...] = ("query", "value")
    """Names of the matrices: query, key, value, out, up, down, gate."""

    def __post_init__(self) -> None:
        check_range(self, "rank", at_least=1)
        check_range(self, "alpha", above=0)
        if not self.layers:
            raise SemidError("expected the names of matrices in layers, got none; give some, such as query and value")


@dataclass(frozen=True)
class SideAdapters:
    """A tower of small adapters reads the frozen encoder's states, through which no gradient flows (IISAN)."""

    states: int = 7
    """States that are read, at equal distances from the embeddings to the last block: 7 of BERT's or ViT's 13."""
    hidden: int = 64
    """Width inside an adapter."""

    def __post_init__(self) -> None:
        check_range(self, "states", "hidden", at_least=1)


Tuning = Frozen | SideAdapters | LowRank | Full


@runtime_checkable
class Encoder(Protocol):
    """Maps content to vectors; those of absent items are finite and without meaning."""

    dim: int

    def __call__(self, rows: Any, *, key: Key[Array, ""] | None = None) -> Float[Array, "n dim"]: ...


@runtime_checkable
class Backbone(Encoder, Protocol):
    """An encoder that can return the pooled states of its embeddings and of each of its blocks."""

    config: Any

    def hidden(self, rows: Any) -> Float[Array, "n layer dim"]: ...


def tuned(backbone: Backbone, tuning: Tuning, *, rngs: nnx.Rngs) -> Encoder:
    """Wrap `backbone` so that only the parameters selected by `tuning` are trained; it is changed in place.

    Raises SemidError if `tuning` names a matrix that the backbone does not have.
    """
    match tuning:
        case Full():
            return backbone
        case Frozen():
            return freeze(backbone)
        case LowRank():
            return with_low_rank(freeze(backbone), tuning, rngs=rngs)
        case SideAdapters():
            return SideTower(backbone.dim, tuning, backbone=freeze(backbone), rngs=rngs)


def freeze(module: Any) -> Any:
    """`module` with every `nnx.Param` in it made a `Constant`, in place: no gradient of it is ever computed."""
    for _, part in list(nnx.iter_modules(module)):
        for name, value in list(vars(part).items()):
            if isinstance(value, nnx.Param):
                setattr(part, name, Constant(value[...]))
    return module


class LowRankLinear(nnx.Module):
    """A linear layer plus a low-rank one, which is zero before training."""

    def __init__(self, base: nnx.Linear, config: LowRank, *, rngs: nnx.Rngs) -> None:
        self.scale = config.alpha / config.rank
        self.base = base
        narrow, dtype = nnx.initializers.he_uniform(), base.dtype
        self.narrow = nnx.Linear(
            base.in_features, config.rank, use_bias=False, kernel_init=narrow, dtype=dtype, rngs=rngs
        )
        self.widen = nnx.Linear(
            config.rank, base.out_features, use_bias=False, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "*b inputs"]) -> Float[Array, "*b outputs"]:
        return self.base(x) + self.scale * self.widen(self.narrow(x))


def with_low_rank(module: Any, config: LowRank, *, rngs: nnx.Rngs) -> Any:
    """Wrap every `nnx.Linear` that `config.layers` names, in place."""
    layers = [
        (part, name)
        for _, part in list(nnx.iter_modules(module))
        for name in config.layers
        if isinstance(getattr(part, name, None), nnx.Linear)
    ]
    if missing := set(config.layers) - {name for _, name in layers}:
        raise SemidError(f"low-rank adapters: the encoder has no matrix {sorted(missing)[0]!r}; correct the layers")
    for part, name in layers:
        setattr(part, name, LowRankLinear(getattr(part, name), config, rngs=rngs))
    return module


class Adapter(nnx.Module):
    """The SANB block: two matrices with a rectifier between them, and a residual. Close to the identity at first."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(0.01)
        self.down = nnx.Linear(dim, hidden, kernel_init=normal, rngs=rngs)
        self.up = nnx.Linear(hidden, dim, kernel_init=normal, rngs=rngs)

    def __call__(self, x: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
        return self.up(jax.nn.relu(self.down(x))) + x


def read_states(hidden: Float[Array, "n layer dim"], states: int) -> Float16[Array, "n state dim"]:
    """The states that side adapters read, as they are cached: float16, without a gradient.

    Raises SemidError if there are fewer layers.
    """
    layers = hidden.shape[1]
    if layers < states:
        raise SemidError(
            f"side adapters: expected at most the encoder's {layers} states, got {states}; lower `states`, or take "
            "another tuning (--tuning low-rank)"
        )
    chosen = np.linspace(layers - 1, 0, states).round().astype(int)[::-1]  # the last always
    largest = float(np.finfo(np.float16).max)
    return jnp.clip(jax.lax.stop_gradient(hidden)[:, chosen], -largest, largest).astype(jnp.float16)


class SideTower(nnx.Module):
    """s_0 = A(h_0), s_k = A(g_k h_k + (1 - g_k) s_{k-1}): the intra-modal tower of IISAN (arXiv 2404.02059).

    Rows are the content that `backbone` reads, or its states from `cached_states`, which need no backbone.
    """

    def __init__(self, dim: int, config: SideAdapters, *, backbone: Backbone | None = None, rngs: nnx.Rngs) -> None:
        self.dim, self.config, self.backbone = dim, config, backbone
        self.adapters = nnx.List([Adapter(dim, config.hidden, rngs=rngs) for _ in range(config.states)])
        self.gates = nnx.Param(jnp.zeros(config.states - 1))

    def __call__(self, rows: Rows, *, key: Key[Array, ""] | None = None) -> Float[Array, "n dim"]:
        """The tower's last state. There is no dropout: `key` is not used."""
        return self.climb(self.states(rows))

    def states(self, rows: Rows) -> Float[Array, "n state dim"]:
        """The states that the adapters read, the same from content and from the cache."""
        if isinstance(rows, HiddenRows):
            states = rows.states
            if states.shape[1:] != (self.config.states, self.dim):
                expected = (self.config.states, self.dim)
                raise SemidError(
                    f"side adapters: expected states of {expected}, got {states.shape[1:]}; cache them again"
                )
        elif self.backbone is None:
            raise SemidError(f"side adapters: expected cached states, got {type(rows).__name__}; give the backbone too")
        else:
            states = read_states(self.backbone.hidden(rows), self.config.states)
        return states.astype(jnp.float32)

    def climb(self, states: Float[Array, "n state dim"]) -> Float[Array, "n dim"]:
        """The tower's last state, from the backbone's states."""
        x = self.adapters[0](states[:, 0])
        gates = jax.nn.sigmoid(self.gates[...] / _TEMPERATURE)
        for k, adapter in enumerate(self.adapters[1:], start=1):
            x = adapter(gates[k - 1] * states[:, k] + (1 - gates[k - 1]) * x)
        return x


class CrossTower(nnx.Module):
    """m_k = A(m_{k-1} + sum_j g_kj h_kj) over the modalities j: the inter-modal tower of IISAN, for any number of them.

    Gates are a softmax over the modalities that an item has; for two it is the published sigmoid. States of wider
    modalities are projected to the narrowest width, by a linear layer for each step (IISAN-Versa, arXiv 2411.02992).
    """

    def __init__(self, dims: Sequence[int], config: SideAdapters, *, rngs: nnx.Rngs) -> None:
        self.dim = min(dims)

        def down(dim: int) -> nnx.List:
            return nnx.List([nnx.Linear(dim, self.dim, rngs=rngs) for _ in range(config.states)])

        self.down = nnx.List([down(dim) if dim > self.dim else None for dim in dims])
        self.adapters = nnx.List([Adapter(self.dim, config.hidden, rngs=rngs) for _ in range(config.states)])
        self.gates = nnx.Param(jnp.zeros((config.states, len(dims))))

    def __call__(
        self, states: Sequence[Float[Array, "n state _"]], present: Bool[Array, "n modality"]
    ) -> Float[Array, "n dim"]:
        """The last state; `states` of each modality in the order of `dims`."""
        states = [x if down is None else _stepwise(down, x) for down, x in zip(self.down, states, strict=True)]
        logits = self.gates[...][None] / _TEMPERATURE
        gates = jax.nn.softmax(jnp.where(present[:, None], logits, -1e9), axis=-1)
        mixed = jnp.einsum("nkj,nkjd->nkd", gates, jnp.stack(states, axis=2))
        x = jnp.zeros_like(mixed[:, 0])
        for k, adapter in enumerate(self.adapters):
            x = adapter(x + mixed[:, k])
        return x


def _stepwise(layers: Sequence[nnx.Linear], states: Float[Array, "n state wide"]) -> Float[Array, "n state narrow"]:
    return jnp.stack([layer(states[:, k]) for k, layer in enumerate(layers)], axis=1)


def cached_states(
    folder: str | Path, backbone: Backbone, rows: Rows, *, config: SideAdapters, batch_size: int = 256
) -> HiddenRows:
    """Compute the states of all items that side adapters read, once, and cache them in `folder` as float16.

    The file is named by a digest of weights, config and content, and appears when it is complete. It holds
    `items x states x dim` halves: 11 kB per item for BERT or ViT.
    """
    path = artifacts.place(folder) / f"{_digest(backbone, rows, config)}.npy"
    artifacts.refresh(path)
    if not path.is_file():
        artifacts.try_file(path).parent.mkdir(parents=True, exist_ok=True)
        _write_states(path, backbone, rows, states=config.states, batch_size=batch_size)
    try:
        return HiddenRows(jnp.asarray(np.load(path, mmap_mode="r")), present_of(rows))
    except (OSError, ValueError) as error:
        raise SemidError(f"{path}: expected cached states, got a damaged file ({error}); delete it") from None


def _write_states(path: Path, backbone: Backbone, rows: Rows, *, states: int, batch_size: int) -> None:
    graph, variables = nnx.split(backbone)

    @jax.jit
    def compute(variables: nnx.State, rows: Rows, chosen: Array) -> Array:
        with jax.default_matmul_precision("highest"):  # codes depend on these states
            return read_states(nnx.merge(graph, variables).hidden(jax.tree.map(lambda x: x[chosen], rows)), states)

    items, shape = len(jax.tree.leaves(rows)[0]), (states, backbone.dim)
    with artifacts.replacing(path) as temporary:
        file = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=(items, *shape))
        for start in range(0, items, batch_size):
            stop = min(start + batch_size, items)
            chosen = jnp.minimum(jnp.arange(start, start + batch_size), items - 1)  # one shape, the last item repeated
            file[start:stop] = np.asarray(compute(variables, rows, chosen))[: stop - start]
        file.flush()


def _digest(backbone: Backbone, rows: Rows, config: SideAdapters) -> str:
    """Digest of all that determines the states: the encoder's config and weights, the content, and the states read."""
    header = [to_dict(backbone.config), config.states, type(rows).__name__]
    return arrays_digest(header, [*named_variables(backbone), *rows._asdict().items()])[:32]
