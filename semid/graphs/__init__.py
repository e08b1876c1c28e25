"""Graphs of users and items: item graphs, item-kNN, co-occurrence, LightGCN, and collaborative item vectors."""

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
from semid.graphs.item_graph import Edges, ItemGraph
from semid.graphs.item_knn import ItemKNN
from semid.graphs.leave_one_out import LeaveOneOut
from semid.graphs.lightgcn import LightGCNConfig, train_lightgcn
from semid.graphs.signals import PpmiConfig, Signal, VectorColumn
from semid.graphs.transitions import ItemGraphConfig, pruned
from semid.graphs.tuning import fit_graph, tuned

__all__ = [
    "CoConsumption",
    "Edges",
    "ItemGraph",
    "ItemGraphConfig",
    "ItemKNN",
    "LeaveOneOut",
    "LightGCNConfig",
    "PpmiConfig",
    "Signal",
    "VectorColumn",
    "co_consumed",
    "cooccurrence",
    "fit_graph",
    "interactions_matrix",
    "ppmi",
    "ppmi_vectors",
    "pruned",
    "sample_partners",
    "train_lightgcn",
    "tuned",
    "user_vectors",
]
