"""Offline HTML pages from result files."""

from semid.report.page import write_report
from semid.report.sweep import write_sweep

__all__ = [
    "write_report",
    "write_sweep",
]
