"""The autoencoder of the RQ-VAE: MLP encoder, residual quantizer, MLP decoder; and its loss."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from quantizers import (
    Distance,
    GradientPath,
    Gumbel,
    Nearest,
    OverusedGumbel,
    Quantized,
    ResidualCodes,
    ResidualQuantizer,
    Sinkhorn,
    diversity_loss,
    masked_mean,
    usage_entropy_loss,
)
from semid.tokenizers.blocks import map_blocks


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes, quantizer, loss weights and initialization of an autoencoder."""

    level_sizes: tuple[int, ...] = ()
    """Codebook size of each level; none given: three levels of the power of two nearest to a quarter of the items, from
    16 to 256."""
    hidden: tuple[int, ...] = (512, 256, 128)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    latent: int = 32
    """Dimensions of the quantized vector."""
    assignments: tuple[Nearest | Sinkhorn | Gumbel | OverusedGumbel, ...] = (Nearest(),)
    """Assignment of codes in training, one for all levels or one per level; the catalogue has the nearest codes."""
    path: GradientPath = GradientPath.STRAIGHT_THROUGH
    """Gradient estimator of the quantizer. Soft paths depend on the assignments' temperature (UniGRec: from .01 to
    .001): at the default of 1, soft vectors may be far from the nearest codes, and `soft` then trains other vectors
    than the catalogue's codes stand for."""
    metric: Distance = Distance.EUCLIDEAN
    """Distance by which the nearest code is found."""
    decay: float | None = None
    """Decay of codebooks that are moving averages of their inputs; none given: codebooks are learned by gradient."""
    reconstruction: float = 1.0
    """Weight of the content's reconstruction; the lower, the more an alignment decides about the codes."""
    commitment: float = 0.25
    """Weight of the commitment loss."""
    entropy: float = 0.0
    """Weight of the loss that spreads each batch over the codes (UniGRec: 1e-4)."""
    diversity: float = 0.0
    """Weight of the loss that spreads clusters of codes in space (LETTER: 1e-4); not with `decay`."""
    kmeans_iterations: int = 25
    """Lloyd iterations of the codebooks' initialization on all items; 0: random codebooks, which may collapse."""


class Pass(NamedTuple):
    """One pass of vectors `x` through the autoencoder; rows outside `mask` count in no loss (None: all count)."""

    x: Float[Array, "n dim"]
    latents: Float[Array, "n latent"]
    found: ResidualCodes
    quantized: Quantized
    reconstruction: Float[Array, "n dim"]
    mask: Bool[Array, " n"] | None = None


class RQVAE(nnx.Module):
    """MLP encoder, residual quantizer, MLP decoder; all vectors standardized."""

    def __init__(self, config: AutoencoderConfig, *, dim: int, rngs: nnx.Rngs) -> None:
        widths = (dim, *config.hidden, config.latent)
        each = config.assignments if len(config.assignments) > 1 else config.assignments[0]
        self.encoder = _mlp(widths, rngs)
        self.quantizer = ResidualQuantizer(
            config.level_sizes,
            dim=config.latent,
            rngs=rngs,
            assignment=each,
            path=config.path,
            distance=config.metric,
            decay=config.decay,
        )
        self.decoder = _mlp(widths[::-1], rngs)
        # Cluster of each code, for the diversity loss.
        self.clusters = nnx.List([nnx.Variable(jnp.zeros(size, jnp.int32)) for size in config.level_sizes])

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Codebook size of each level."""
        return self.quantizer.level_sizes

    def latents(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b latent"]:
        """Inputs of the quantizer."""
        return _through(self.encoder, x)

    def exact_latents(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b latent"]:
        """`latents` with float32 products on every device, for stored codes: less precise products change some."""
        with jax.default_matmul_precision("highest"):
            return self.latents(x)

    def encode(self, x: Float[Array, "*b dim"]) -> Int[Array, "*b level"]:
        """Codes of standardized vectors."""
        return self.quantizer.encode(self.exact_latents(x))

    def decode(self, codes: Int[Array, "*b level"]) -> Float[Array, "*b dim"]:
        """Standardized vectors reconstructed from codes."""
        return _through(self.decoder, self.quantizer.decode(codes))

    def __call__(
        self,
        x: Float[Array, "n dim"],
        *,
        mask: Bool[Array, " n"] | None = None,
        key: PRNGKeyArray | None = None,
        progress: Float[Array, ""] | float = 1.0,
    ) -> Pass:
        """One pass; for `mask`, `key` and `progress` see ResidualQuantizer."""
        latents = self.latents(x)
        found = self.quantizer.search(latents, mask=mask, key=key, progress=progress)
        quantized = self.quantizer.quantize_found(latents, found, mask=mask)
        return Pass(x, latents, found, quantized, _through(self.decoder, quantized.vectors), mask)

    def initialize(self, x: Float[np.ndarray, "items dim"], *, iterations: int, seed: int) -> None:
        """Set codebooks by residual k-means on the latents of all items; with 0 iterations they stay random."""
        if not iterations:
            return
        latents = jnp.asarray(map_blocks(self.exact_latents, x))
        self.quantizer.initialize(latents, iterations=iterations, key=jax.random.key(seed))


class Tables(NamedTuple):
    """Device arrays that no step changes: standardized content of all items, and the alignments' signals."""

    x: Float[Array, "items dim"]
    signals: Any


def autoencoder_loss(
    model: RQVAE, config: AutoencoderConfig, passed: Pass
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Reconstruction + codebook + commitment (TIGER, eq. 1-2), means over rows and dimensions, and the losses that
    spread codes."""
    errors, mask = jnp.square(passed.reconstruction - passed.x), passed.mask
    reconstruction = jnp.mean(errors) if mask is None else masked_mean(errors.mean(-1), mask=mask)
    losses = passed.quantized.losses
    loss = config.reconstruction * reconstruction + config.commitment * losses.commitment
    if config.decay is None:
        loss += losses.codebook
    if config.entropy:
        loss += config.entropy * usage_entropy_loss(passed.found.probabilities, mask=mask)
    if config.diversity:
        levels = zip(model.quantizer.codebooks, model.clusters, strict=True)
        for level, (book, clusters) in enumerate(levels):
            codes = passed.found.codes[..., level]
            loss += config.diversity * diversity_loss(book[...], clusters[...], codes=codes, mask=mask)
    return loss, {"reconstruction": reconstruction, **losses._asdict()}


def _mlp(widths: tuple[int, ...], rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])


def _through(layers: nnx.List, x: Float[Array, "*b dim"]) -> Float[Array, "*b out"]:
    for layer in layers[:-1]:
        x = jax.nn.relu(layer(x))
    return layers[-1](x)
