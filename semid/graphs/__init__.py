"""Graphs of users and items: item graphs, item-kNN, co-occurrence, LightGCN, and collaborative item vectors."""

from semid.graphs.columns import AlphaRecConfig, ColumnConfig, EdgeWeights, FuseConfig, SmoothConfig, add_column
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
from semid.graphs.item_knn import ItemKNN, UserItemVectors, VectorKNN
from semid.graphs.leave_one_out import LeaveOneOutGraph
from semid.graphs.lightgcn import (
    BM3Config,
    CM3Config,
    FreedomConfig,
    GraphConfig,
    LightGCNConfig,
    MMHCLConfig,
    TripleLoss,
    train_graph,
)
from semid.graphs.neighbors import neighbor_overlap
from semid.graphs.signals import PpmiConfig, Signal, VectorColumn, standardize_known
from semid.graphs.transitions import ItemGraphConfig, pruned
from semid.graphs.tuning import fit_graph, tuned

__all__ = [
    "AlphaRecConfig",
    "BM3Config",
    "CM3Config",
    "CoConsumption",
    "ColumnConfig",
    "EdgeWeights",
    "Edges",
    "FreedomConfig",
    "FuseConfig",
    "GraphConfig",
    "ItemGraph",
    "ItemGraphConfig",
    "ItemKNN",
    "LeaveOneOutGraph",
    "LightGCNConfig",
    "MMHCLConfig",
    "PpmiConfig",
    "Signal",
    "SmoothConfig",
    "TripleLoss",
    "UserItemVectors",
    "VectorColumn",
    "VectorKNN",
    "add_column",
    "co_consumed",
    "cooccurrence",
    "fit_graph",
    "interactions_matrix",
    "neighbor_overlap",
    "ppmi",
    "ppmi_vectors",
    "pruned",
    "sample_partners",
    "standardize_known",
    "train_graph",
    "tuned",
    "user_vectors",
]
