"""One offline HTML page from result files."""

from semid.report.page import write_report

__all__ = [
    "write_report",
]
