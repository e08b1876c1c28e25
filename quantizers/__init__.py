"""Vector quantizers in JAX: from vectors to short tuples of discrete codes and back."""

from quantizers.collisions import TieBroken, collision_groups, tie_break
from quantizers.distances import code_logits, nearest, squared_distances
from quantizers.kmeans import KMeans, kmeans
from quantizers.metrics import CodeHealth, LevelHealth, health, reconstruction_error
from quantizers.residual import (
    Reseeded,
    ResidualCodes,
    ResidualQuantizer,
    code_counts,
    fit_codebooks,
    reseed_dead_codes,
    residual_codes,
    residual_decode,
    residual_quantize,
)
from quantizers.residual_kmeans import ResidualKMeans
from quantizers.types import Quantized, Quantizer, QuantizerLosses

__all__ = [
    "CodeHealth",
    "KMeans",
    "LevelHealth",
    "Quantized",
    "Quantizer",
    "QuantizerLosses",
    "Reseeded",
    "ResidualCodes",
    "ResidualKMeans",
    "ResidualQuantizer",
    "TieBroken",
    "code_counts",
    "code_logits",
    "collision_groups",
    "fit_codebooks",
    "health",
    "kmeans",
    "nearest",
    "reconstruction_error",
    "reseed_dead_codes",
    "residual_codes",
    "residual_decode",
    "residual_quantize",
    "squared_distances",
    "tie_break",
]
