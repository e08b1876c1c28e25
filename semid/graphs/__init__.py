"""Graphs of users and items: co-occurrence, LightGCN, and the collaborative item vectors that they give."""

from semid.graphs.cooccurrence import (
    CoConsumption,
    co_consumed,
    cooccurrence,
    interactions_matrix,
    ppmi,
    ppmi_vectors,
    sample_partners,
    user_vectors,
)
from semid.graphs.lightgcn import LightGCNConfig, train_lightgcn
from semid.graphs.signals import PpmiConfig, Signal, VectorColumn

__all__ = [
    "CoConsumption",
    "LightGCNConfig",
    "PpmiConfig",
    "Signal",
    "VectorColumn",
    "co_consumed",
    "cooccurrence",
    "interactions_matrix",
    "ppmi",
    "ppmi_vectors",
    "sample_partners",
    "train_lightgcn",
    "user_vectors",
]
