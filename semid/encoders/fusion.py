"""Fusion: one vector per item from its text, pictures and ready-made vectors, any of which may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from semid.config import check_range, later_field
from semid.encoders.adapters import CrossTower, Encoder, SideTower
from semid.encoders.blocks import BlocksConfig, FeedForward
from semid.encoders.content import FeatureRows, Rows, present_of
from semid.errors import SemidError
from seq_models import split_key

Content = Mapping[str, Rows]
"""Content of items, by the names of the encoders that read it."""


@dataclass(frozen=True)
class FusionConfig:
    """Settings of the layer that fuses the vectors of an item's modalities into one."""

    dim: int = 64
    """Width of an item's vector."""
    hidden: int = 128
    """Width inside the layer that mixes the modalities."""
    modality_dropout: float = 0.1
    """Share of an item's modalities hidden in training, never all, so that vectors do not rely on one modality."""
    cross: bool = False
    """Add the tower between modalities that reads the states of all side towers (IISAN)."""
    identity: bool = later_field(False)
    """Start as the normed sum of the encoders' vectors, all of width `dim`: projections are the identity and the mixing
    layer adds nothing. Before training, items then have the same neighbors as by a pretrained encoder."""

    def __post_init__(self) -> None:
        check_range(self, "dim", "hidden", at_least=1)
        check_range(self, "modality_dropout", at_least=0, below=1)


class FeatureEncoder(nnx.Module):
    """Ready-made vectors, as they are."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, rows: FeatureRows, *, key: Key[Array, ""] | None = None) -> Float[Array, "n dim"]:
        """There is no dropout: `key` is not used."""
        return rows.vectors.astype(jnp.float32)


def check_content(content: Content) -> None:
    """Raise SemidError for a modality that no item has, and for modalities of different numbers of items."""
    items = {name: len(present_of(rows)) for name, rows in content.items()}
    if len(set(items.values())) > 1:
        raise SemidError(f"expected content of the same items, got {items} rows; make all from one dataset")
    for name, rows in content.items():
        if not bool(present_of(rows).any()):
            raise SemidError(f"expected items with {name!r}, got none among {items[name]}; leave that encoder out")


def keep_modalities(
    present: Bool[Array, "n modality"], rate: float, key: Key[Array, ""] | None
) -> Bool[Array, "n modality"]:
    """`present` with a share `rate` hidden, but never all of an item's modalities; unchanged without a key."""
    if key is None or rate == 0.0:
        return present
    kept = present & jax.random.bernoulli(key, 1.0 - rate, present.shape)
    return jnp.where(kept.any(axis=1, keepdims=True), kept, present)


class ItemEncoder(nnx.Module):
    """Projects modalities to one width, with a learned vector for missing ones; then sums, mixes and normalizes."""

    def __init__(self, encoders: Mapping[str, Encoder], config: FusionConfig, *, rngs: nnx.Rngs) -> None:
        if not encoders:
            raise SemidError("expected at least one encoder, got none; name what items are encoded from")
        encoders = dict(sorted(encoders.items()))  # in the order in which nnx merges state
        self.config, self.dim = config, config.dim
        self.encoders = nnx.Dict(**encoders)
        self.cross = _cross_tower(encoders, rngs) if config.cross else None
        widths = {name: encoder.dim for name, encoder in encoders.items()}
        if self.cross is not None:
            widths["cross"] = self.cross.dim
        normal = nnx.initializers.normal(0.02)
        self.projections = nnx.Dict(**{name: nnx.Linear(dim, self.dim, rngs=rngs) for name, dim in widths.items()})
        self.absent = nnx.Dict(**{name: nnx.Param(normal(rngs.params(), (self.dim,))) for name in widths})
        self.norm_feed = nnx.LayerNorm(self.dim, rngs=rngs)
        self.feed = FeedForward(BlocksConfig(dim=self.dim, heads=1, hidden=config.hidden), rngs=rngs)
        self.norm = nnx.LayerNorm(self.dim, use_scale=False, use_bias=False, rngs=rngs)
        self.scale, self.bias = nnx.Param(jnp.ones(self.dim)), nnx.Param(jnp.zeros(self.dim))
        if config.identity:
            self._start_at_identity(widths)

    def __call__(self, content: Content, *, key: Key[Array, ""] | None = None) -> Float[Array, "n dim"]:
        """Vectors of the items of `content`, which has the encoders' names. Dropouts need a `key`.

        Raises SemidError if the names differ.
        """
        if set(content) != set(self.encoders):
            raise SemidError(
                f"expected content of {sorted(self.encoders)}, got {sorted(content)}; give it for every encoder"
            )
        drop, *keys = split_key(key, 1 + len(content))
        present = jnp.stack([present_of(content[name]) for name in self.encoders], axis=1)
        present = keep_modalities(present, self.config.modality_dropout, drop)
        vectors, states = {}, []
        for (name, encoder), encoder_key in zip(self.encoders.items(), keys, strict=True):
            if self.cross is None or not isinstance(encoder, SideTower):
                vectors[name] = encoder(content[name], key=encoder_key)
            else:
                states.append(encoder.states(content[name]))
                vectors[name] = encoder.climb(states[-1])
        real = dict(zip(self.encoders, present.T, strict=True))
        if self.cross is not None:
            read = jnp.stack([real[name] for name in _towers(self.encoders)], axis=1)
            vectors["cross"], real["cross"] = self.cross(states, read), read.any(axis=1)
        return self._fused(vectors, real)

    def standardize(self, vectors: Float[Array, "items dim"]) -> None:
        """Change the last scale and bias so that the catalogue, now encoded as `vectors`, has mean 0 and variance 1 in
        every dimension: a quantizer cannot tell apart vectors that differ little from a common mean."""
        mean, deviation = vectors.mean(0), jnp.maximum(vectors.std(0), 1e-6)
        self.scale[...] = self.scale[...] / deviation
        self.bias[...] = (self.bias[...] - mean) / deviation

    def _start_at_identity(self, widths: Mapping[str, int]) -> None:
        if other := {name: width for name, width in widths.items() if width != self.dim}:
            raise SemidError(f"identity: expected vectors as wide as dim {self.dim}, got {other}; give that dim")
        for _, linear in self.projections.items():  # a column may be called `values`
            linear.kernel[...] = jnp.eye(self.dim)
        self.feed.down.kernel[...] = jnp.zeros_like(self.feed.down.kernel[...])

    def _fused(self, vectors: dict[str, Array], present: dict[str, Array]) -> Float[Array, "n dim"]:
        parts = [
            jnp.where(present[name][:, None], self.projections[name](vector), self.absent[name][...][None])
            for name, vector in vectors.items()
        ]
        x = jnp.sum(jnp.stack(parts), axis=0)
        return self.norm(x + self.feed(self.norm_feed(x))) * self.scale[...][None] + self.bias[...][None]


def _towers(encoders: Mapping[str, Encoder]) -> dict[str, SideTower]:
    return {name: encoder for name, encoder in encoders.items() if isinstance(encoder, SideTower)}


def _cross_tower(encoders: Mapping[str, Encoder], rngs: nnx.Rngs) -> CrossTower:
    towers = _towers(encoders)
    states = {name: tower.config.states for name, tower in towers.items()}
    if len(towers) < 2 or len(set(states.values())) > 1:
        raise SemidError(f"cross: expected side adapters of equal states on 2 encoders, got {states}; leave it out")
    return CrossTower([t.dim for t in towers.values()], next(iter(towers.values())).config, rngs=rngs)
