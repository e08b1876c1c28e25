"""Vector columns derived from another column and training interactions: smoothed, fused, mapped."""

from semid.graphs.columns.alpharec import AlphaRecConfig
from semid.graphs.columns.base import ColumnConfig, add_column
from semid.graphs.columns.fuse import FuseConfig
from semid.graphs.columns.smooth import EdgeWeights, SmoothConfig

__all__ = ["AlphaRecConfig", "ColumnConfig", "EdgeWeights", "FuseConfig", "SmoothConfig", "add_column"]
