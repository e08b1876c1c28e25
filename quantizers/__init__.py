"""Vector quantizers in JAX: from vectors to short tuples of discrete codes and back."""

from quantizers.alignment import Similarity, info_nce, masked_mean, unit_rows
from quantizers.assignment import AssignedCodes, Assignment, Gumbel, Nearest, OverusedGumbel, Sinkhorn, sinkhorn
from quantizers.collisions import TieBreak, collision_groups, tie_break
from quantizers.distances import Distance, code_logits, distances, nearest, squared_distances, unit_vectors
from quantizers.finite_scalar import FiniteScalarQuantizer
from quantizers.gradients import GradientPath, rotate, soft_vectors, straight_through
from quantizers.kmeans import Blocks, KMeans, balanced_kmeans, kmeans, lloyd_pass
from quantizers.maintenance import (
    ReseededCodebooks,
    cluster_means,
    code_counts,
    diversity_loss,
    ema_codebook,
    fit_codebooks,
    reseed_dead_codes,
    usage_entropy_loss,
)
from quantizers.metrics import (
    CodeHealth,
    LevelHealth,
    health,
    linear_probe_r2,
    neighbor_prefix_overlap,
    neighbor_preservation,
    reconstruction_error,
)
from quantizers.product import ProductKMeans
from quantizers.reassignment import Reassignment, min_cost_reassign, sinkhorn_reassign
from quantizers.residual import (
    Codebook,
    ResidualCodes,
    ResidualQuantizer,
    RunningStatistic,
    quantize_found,
    residual_codes,
    residual_decode,
    residual_encode,
    residual_quantize,
)
from quantizers.residual_kmeans import ClusterFunction, LevelClusters, ResidualKMeans, cluster_levels
from quantizers.schedules import Schedule
from quantizers.types import Quantized, Quantizer, QuantizerLosses

__all__ = [
    "AssignedCodes",
    "Assignment",
    "Blocks",
    "ClusterFunction",
    "CodeHealth",
    "Codebook",
    "Distance",
    "FiniteScalarQuantizer",
    "GradientPath",
    "Gumbel",
    "KMeans",
    "LevelClusters",
    "LevelHealth",
    "Nearest",
    "OverusedGumbel",
    "ProductKMeans",
    "Quantized",
    "Quantizer",
    "QuantizerLosses",
    "Reassignment",
    "ReseededCodebooks",
    "ResidualCodes",
    "ResidualKMeans",
    "ResidualQuantizer",
    "RunningStatistic",
    "Schedule",
    "Similarity",
    "Sinkhorn",
    "TieBreak",
    "balanced_kmeans",
    "cluster_levels",
    "cluster_means",
    "code_counts",
    "code_logits",
    "collision_groups",
    "distances",
    "diversity_loss",
    "ema_codebook",
    "fit_codebooks",
    "health",
    "info_nce",
    "kmeans",
    "linear_probe_r2",
    "lloyd_pass",
    "masked_mean",
    "min_cost_reassign",
    "nearest",
    "neighbor_prefix_overlap",
    "neighbor_preservation",
    "quantize_found",
    "reconstruction_error",
    "reseed_dead_codes",
    "residual_codes",
    "residual_decode",
    "residual_encode",
    "residual_quantize",
    "rotate",
    "sinkhorn",
    "sinkhorn_reassign",
    "soft_vectors",
    "squared_distances",
    "straight_through",
    "tie_break",
    "unit_rows",
    "unit_vectors",
    "usage_entropy_loss",
]
