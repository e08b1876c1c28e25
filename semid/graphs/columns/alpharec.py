"""AlphaRec: one map of frozen language vectors under which users are the means of their items.

Sheng et al., "Language Representations Can be What Recommenders Need", arXiv 2407.05441. The release maps items and
then propagates over the graph of users and items; here only the map is used, so that items without interactions have
vectors too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from quantizers import unit_rows
from semid.config import check_range
from semid.data import Dataset, Standardizer, StoredEncoder
from semid.errors import SemidError
from semid.graphs.columns.base import ColumnConfig, ColumnEncoder, check_training, minimize
from semid.graphs.cooccurrence import interactions_matrix
from semid.graphs.signals import Signal, content_scale, has_content, standardize_content

_NEGATIVES = 256

Layers = tuple[Float[Array, "_ _"], ...]
"""Kernels, without biases; a leaky ReLU stands between two."""


class Interactions(NamedTuple):
    """Different (user, item) pairs of users with at least two items."""

    users: Int[Array, " n"]
    items: Int[Array, " n"]
    counts: Float[Array, " users"]


@dataclass(frozen=True)
class AlphaRecConfig(ColumnConfig, Signal):
    """Item vectors of AlphaRec: content, mapped so that the mean of a user's other items finds each of the user's items
    among 256 random ones, by InfoNCE on cosines.

    The map reads content alone, so that new items have vectors too. Items without content (rows of zeros) are left out
    of the loss and stay zero. As a signal it is trained with the tokenizer's seed.
    """

    dim: int = 64
    """Dimensions of the mapped vectors."""
    hidden: int = 0
    """Width of a hidden layer; 0: the map is linear."""
    temperature: float = 0.15
    """Divides the cosines."""
    epochs: int = 10
    """Passes over the interactions."""
    batch_size: int = 4096
    """Interactions per step, all with the same negatives; fewer where there are fewer interactions."""
    learning_rate: float = 2e-3
    """Learning rate of AdamW."""
    weight_decay: float = 1e-6
    """Decoupled decay of AdamW."""
    seed: int = 0
    """Seed of the parameters, batches and negatives."""
    name = "alpharec"

    def __post_init__(self) -> None:
        check_training(self, ("dim", "epochs", "batch_size"))
        check_range(self, "hidden", at_least=0)

    def fitted(self, dataset: Dataset) -> tuple[Mapped, Float[np.ndarray, "items width"]]:
        encoder, x = self._trained(dataset, seed=self.seed)
        return encoder, encoder.from_vectors(x)

    def item_vectors(self, dataset: Dataset, *, seed: int) -> Float[np.ndarray, "items signal"]:
        encoder, x = self._trained(dataset, seed=seed)
        return encoder.from_vectors(x)

    def restore(self, stored: StoredEncoder) -> Mapped:
        return Mapped(stored.inputs[0], stored.tensors, self.name)

    def _trained(self, dataset: Dataset, *, seed: int) -> tuple[Mapped, Float[np.ndarray, "items dim"]]:
        source, x = self.read(dataset)
        scale, present = content_scale(x), has_content(x)
        matrix = interactions_matrix(dataset.splits.train, num_items=dataset.num_items, num_users=dataset.num_users)
        matrix = matrix[:, present]
        counts = np.diff(matrix.indptr)
        users, items = matrix.tocoo().coords
        several = counts[users] > 1
        if not several.any():
            raise SemidError(
                f"dataset {dataset.name!r}: no user has two training items with content, one to find by the other"
            )
        of_several = [jnp.asarray(index[several], jnp.int32) for index in (users, items)]
        pairs = Interactions(of_several[0], of_several[1], jnp.asarray(counts, jnp.float32))
        layers, _ = fit_map(scale(x)[present], pairs, self, seed=seed)
        arrays = {f"layer{place}": np.asarray(layer) for place, layer in enumerate(layers)}
        return Mapped(source, {"mean": scale.mean, "scale": scale.scale, **arrays}, self.name), x


@dataclass(frozen=True, eq=False)
class Mapped(ColumnEncoder):
    """Content vectors mapped by the fitted layers."""

    @property
    def source_width(self) -> int:
        return len(self.arrays["mean"])

    @property
    def width(self) -> int:
        return self._layers[-1].shape[1]

    @property
    def _layers(self) -> Layers:
        return tuple(jnp.asarray(self.arrays[name]) for name in sorted(self.arrays) if name.startswith("layer"))

    def from_vectors(self, x: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n width"]:
        standardized = standardize_content(x, Standardizer(self.arrays["mean"], self.arrays["scale"]))
        return np.asarray(mapped(self._layers, jnp.asarray(standardized)))


def mapped(layers: Layers, x: Float[Array, "n dim"]) -> Float[Array, "n width"]:
    """`x` through the layers."""
    for place, kernel in enumerate(layers):
        x = x @ kernel if place == 0 else jax.nn.leaky_relu(x) @ kernel
    return x


def fit_map(
    x: Float[np.ndarray, "items dim"], pairs: Interactions, config: AlphaRecConfig, *, seed: int
) -> tuple[Layers, Float[np.ndarray, " steps"]]:
    """The layers of the map, and the loss of every step."""
    key, *keys = jax.random.split(jax.random.key(seed), 3)
    widths = [x.shape[1], *([config.hidden] if config.hidden else []), config.dim]
    start = tuple(
        before**-0.5 * jax.random.normal(key, (before, after))
        for key, before, after in zip(keys, widths[:-1], widths[1:], strict=False)
    )
    size = min(config.batch_size, len(pairs.users))
    return minimize(
        partial(contrast, size=size, temperature=config.temperature),
        start,
        (jnp.asarray(x), pairs),
        steps=config.epochs * -(-len(pairs.users) // size),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        key=key,
        title="training AlphaRec",
    )


def contrast(
    layers: Layers,
    data: tuple[Float[Array, "items dim"], Interactions],
    key: PRNGKeyArray,
    *,
    size: int,
    temperature: float,
) -> Float[Array, ""]:
    """Mean of `-log softmax` over the cosines of a user with an item of theirs and with random items.

    The user is the mean of the other items; the release leaves the item itself in it.
    """
    x, pairs = data
    batch_key, negative_key = jax.random.split(key)
    z = mapped(layers, x)
    sums = jax.ops.segment_sum(z[pairs.items], pairs.users, num_segments=len(pairs.counts))
    rows = jax.random.randint(batch_key, (size,), 0, len(pairs.users))
    user, item = pairs.users[rows], pairs.items[rows]
    others = unit_rows((sums[user] - z[item]) / (pairs.counts[user] - 1)[:, None])
    negatives = jax.random.randint(negative_key, (_NEGATIVES,), 0, len(x))
    against = jnp.where(negatives[None] == item[:, None], -jnp.inf, others @ unit_rows(z[negatives]).T)
    own = (others * unit_rows(z[item])).sum(axis=-1, keepdims=True)
    logits = jnp.concatenate([own, against], axis=1) / temperature
    return -jax.nn.log_softmax(logits)[:, 0].mean()
