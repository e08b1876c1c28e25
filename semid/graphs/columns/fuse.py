"""Content and behavior side by side with equal weight: UNGER's alignment of content with collaborative vectors.

Xiao et al., "UNGER: Generative Recommendation with A Unified Code via Semantic and Collaborative Integration",
arXiv 2502.06269. There the alignment is trained along with the recommender whose vectors are `E_C`; here those vectors
are given and fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from quantizers import info_nce, unit_rows
from semid.config import check_range
from semid.data import Dataset, Standardizer, StoredEncoder
from semid.errors import SemidError
from semid.graphs.columns.base import ColumnConfig, ColumnEncoder, check_training, minimize
from semid.graphs.signals import PpmiConfig, Signal, content_scale, has_content, standardize_known


class Projection(NamedTuple):
    """Parameters of `modulated`: of the projection, of the scale and of the shift, in this order."""

    kernel: Float[Array, "dim 3*width"]
    bias: Float[Array, " 3*width"]


@dataclass(frozen=True)
class FuseConfig(ColumnConfig):
    """Unit vectors of behavior and of content, side by side: InfoNCE trains a projection of content to be near the same
    item's behavior, so that neither dominates the other in codes of both.

    Items without training interactions, appended later or not, have their projected content in both halves. Items
    without content (rows of zeros) are not trained on, and their half for content is zero.
    """

    signal: Signal = PpmiConfig()
    """Collaborative vectors, from co-occurrence, by LightGCN, or a column that the dataset has."""
    temperature: float = 0.07
    """Divides the cosines of InfoNCE."""
    epochs: int = 100
    """Passes over the items."""
    batch_size: int = 1024
    """Items per step: each one's negatives are the others."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW."""
    weight_decay: float = 1e-4
    """Decoupled decay of AdamW."""
    seed: int = 0
    """Seed of the signal, the parameters and the batches."""
    name = "fuse"
    version = 2  # of how batches are drawn

    def __post_init__(self) -> None:
        check_training(self, ("epochs",))
        check_range(self, "batch_size", at_least=2)  # an item and its negatives

    def fitted(self, dataset: Dataset) -> tuple[Fused, Float[np.ndarray, "items width"]]:
        source, x = self.read(dataset)
        signal = self.signal.item_vectors(dataset, seed=self.seed)
        known = (dataset.splits.train.popularity(dataset.num_items) > 0) & signal.any(axis=1)
        both = known & has_content(x)
        if both.sum() < 2:
            what = "content and collaborative vectors"
            raise SemidError(f"dataset {dataset.name!r}: {both.sum()} items have {what}, 2 are needed")
        behavior, scale = standardize_known(signal, known).astype(np.float32), content_scale(x)
        projection, _ = fit_projection(scale(x)[both], behavior[both], self)
        arrays = {"mean": scale.mean, "scale": scale.scale, **projection._asdict()}
        encoder = Fused(source, {name: np.asarray(array) for name, array in arrays.items()}, self.name)
        projected = encoder.projected(x)
        return encoder, _side_by_side(np.where(known[:, None], behavior, projected), projected)

    def lacks_content(self, dataset: Dataset) -> bool:
        return super().lacks_content(dataset) or self.signal.lacks_content(dataset)

    def restore(self, stored: StoredEncoder) -> Fused:
        return Fused(stored.inputs[0], stored.tensors, self.name)


@dataclass(frozen=True, eq=False)
class Fused(ColumnEncoder):
    """Vectors of items without interactions: projected content in both halves."""

    @property
    def source_width(self) -> int:
        return len(self.arrays["mean"])

    @property
    def width(self) -> int:
        return len(self.arrays["bias"]) // 3 * 2

    def projected(self, x: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n half"]:
        """Content in the space of behavior; zero where there is none."""
        standardized = Standardizer(self.arrays["mean"], self.arrays["scale"])(x)
        parameters = Projection(jnp.asarray(self.arrays["kernel"]), jnp.asarray(self.arrays["bias"]))
        projected = np.asarray(modulated(parameters, jnp.asarray(standardized)))
        return np.where(has_content(x)[:, None], projected, np.float32(0))

    def from_vectors(self, x: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n width"]:
        projected = self.projected(x)
        return _side_by_side(projected, projected)


def fit_projection(
    x: Float[np.ndarray, "items dim"], behavior: Float[np.ndarray, "items half"], config: FuseConfig
) -> tuple[Projection, Float[np.ndarray, " steps"]]:
    """Projection of `x` that finds the same row of `behavior` among others, and vice versa; the loss of every step."""
    key, start_key = jax.random.split(jax.random.key(config.seed))
    (items, dim), width = x.shape, behavior.shape[1]
    kernel = dim**-0.5 * jax.random.normal(start_key, (dim, width))
    start = Projection(jnp.pad(kernel, ((0, 0), (0, 2 * width))), jnp.zeros(3 * width))
    size = min(config.batch_size, items)
    order = np.random.default_rng(config.seed).permutation(items)  # as `_draw_rows` never draws two of one run
    return minimize(
        partial(_alignment_loss, size=size, temperature=config.temperature),
        start,
        (jnp.asarray(x[order]), jnp.asarray(behavior[order])),
        steps=config.epochs * -(-items // size),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        key=key,
        title="aligning content with behavior",
    )


def modulated(parameters: Projection, x: Float[Array, "n dim"]) -> Float[Array, "n half"]:
    """`(1 + s(x)) LN(W x + b) + t(x)`: a layer norm whose scale and shift are linear in its own input."""
    main, scale, shift = jnp.split(x @ parameters.kernel + parameters.bias[None], 3, axis=-1)
    centered = main - main.mean(axis=-1, keepdims=True)
    normalized = centered * jax.lax.rsqrt(jnp.square(centered).mean(axis=-1, keepdims=True) + 1e-5)
    return (1 + scale) * normalized + shift


def _alignment_loss(
    parameters: Projection,
    data: tuple[Float[Array, "items dim"], Float[Array, "items half"]],
    key: PRNGKeyArray,
    *,
    size: int,
    temperature: float,
) -> Float[Array, ""]:
    """InfoNCE in both directions on a batch of different items."""
    x, behavior = data
    rows = _draw_rows(key, len(x), size)
    projected, own = modulated(parameters, x[rows]), behavior[rows]
    return 0.5 * sum(info_nce(*pair, temperature=temperature) for pair in ((projected, own), (own, projected)))


def _draw_rows(key: PRNGKeyArray, items: int, size: int) -> Int[Array, " size"]:
    """Different rows, one from each of `size` equal runs of items: a permutation would sort all items in every step."""
    bounds = np.arange(size + 1) * items // size
    return jax.random.randint(key, (size,), bounds[:-1].astype(np.int32), bounds[1:].astype(np.int32))


def _side_by_side(
    behavior: Float[np.ndarray, "n half"], content: Float[np.ndarray, "n half"]
) -> Float[np.ndarray, "n width"]:
    """Both at unit length."""
    return np.concatenate([np.asarray(unit_rows(half)) for half in (behavior, content)], axis=1)
