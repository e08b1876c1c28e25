"""What users do with items: co-occurrence and LightGCN."""

from semid.graphs.cooccurrence import (
    cooccurrence,
    interactions_matrix,
    ppmi,
    ppmi_vectors,
    sample_partners,
    user_vectors,
)
from semid.graphs.lightgcn import (
    LightGCNConfig,
    train_lightgcn,
)

__all__ = [
    "LightGCNConfig",
    "cooccurrence",
    "interactions_matrix",
    "ppmi",
    "ppmi_vectors",
    "sample_partners",
    "train_lightgcn",
    "user_vectors",
]
