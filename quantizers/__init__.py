"""Vector quantizers in JAX: from vectors to short tuples of discrete codes and back."""

from quantizers.alignment import (
    ClickLoss,
    DebiasLosses,
    Similarity,
    debias_loss,
    debiased_click_loss,
    info_nce,
)
from quantizers.assignment import Assigned, Assignment, Gumbel, Nearest, OverusedGumbel, Sinkhorn, sinkhorn
from quantizers.care import (
    Reseeded,
    cluster_means,
    code_counts,
    diversity,
    fit_codebooks,
    moved_codebook,
    reseed_dead_codes,
    usage_entropy,
)
from quantizers.collisions import TieBroken, collision_groups, tie_break
from quantizers.distances import Metric, code_logits, directions, distances, nearest, squared_distances
from quantizers.finite_scalar import FiniteScalarQuantizer
from quantizers.gradients import GradientPath, rotate, soft_vectors, straight_through
from quantizers.kmeans import Blocks, KMeans, balanced_kmeans, kmeans, lloyd_pass
from quantizers.metrics import (
    CodeHealth,
    LevelHealth,
    explained_by_codes,
    health,
    neighbor_preservation,
    prefix_sharing,
    reconstruction_error,
)
from quantizers.product import ProductKMeans, product_codes, product_decode, product_quantize
from quantizers.reassignment import Reassigned, min_cost_reassign, sinkhorn_reassign
from quantizers.residual import (
    Moving,
    ResidualCodes,
    ResidualQuantizer,
    residual_codes,
    residual_decode,
    residual_encode,
    residual_quantize,
    residual_quantized,
)
from quantizers.residual_kmeans import Cluster, LevelClusters, ResidualKMeans, cluster_levels
from quantizers.schedules import Schedule
from quantizers.types import Quantized, Quantizer, QuantizerLosses

__all__ = [
    "Assigned",
    "Assignment",
    "Blocks",
    "ClickLoss",
    "Cluster",
    "CodeHealth",
    "DebiasLosses",
    "FiniteScalarQuantizer",
    "GradientPath",
    "Gumbel",
    "KMeans",
    "LevelClusters",
    "LevelHealth",
    "Metric",
    "Moving",
    "Nearest",
    "OverusedGumbel",
    "ProductKMeans",
    "Quantized",
    "Quantizer",
    "QuantizerLosses",
    "Reassigned",
    "Reseeded",
    "ResidualCodes",
    "ResidualKMeans",
    "ResidualQuantizer",
    "Schedule",
    "Similarity",
    "Sinkhorn",
    "TieBroken",
    "balanced_kmeans",
    "cluster_levels",
    "cluster_means",
    "code_counts",
    "code_logits",
    "collision_groups",
    "debias_loss",
    "debiased_click_loss",
    "directions",
    "distances",
    "diversity",
    "explained_by_codes",
    "fit_codebooks",
    "health",
    "info_nce",
    "kmeans",
    "lloyd_pass",
    "min_cost_reassign",
    "moved_codebook",
    "nearest",
    "neighbor_preservation",
    "prefix_sharing",
    "product_codes",
    "product_decode",
    "product_quantize",
    "reconstruction_error",
    "reseed_dead_codes",
    "residual_codes",
    "residual_decode",
    "residual_encode",
    "residual_quantize",
    "residual_quantized",
    "rotate",
    "sinkhorn",
    "sinkhorn_reassign",
    "soft_vectors",
    "squared_distances",
    "straight_through",
    "tie_break",
    "usage_entropy",
]
