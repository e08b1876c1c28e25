"""The command `semid report`."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from semid import artifacts
from semid.cli.choices import PathOrUrl
from semid.cli.console import console
from semid.errors import SemidError


@dataclass(frozen=True)
class Report:
    """Write one offline HTML page from the result files of runs."""

    runs: tyro.conf.Positional[tuple[PathOrUrl, ...]]
    """Run folders, each with a metrics.json, or one of validation alone (metrics_validation.json)."""
    dataset: PathOrUrl | None = None
    """Dataset folder with the items' titles, pictures and categories, for runs without a folder `dataset`; none given:
    their items are shown by id."""
    out: PathOrUrl | None = None
    """File to write; none given: report.html in the first run's folder."""

    def run(self) -> None:
        from semid.report import write_report

        if not self.runs:
            raise SemidError("report: expected at least one run folder; name folders that hold a metrics.json")
        out = write_report(self.runs, self.out or f"{self.runs[0]}/report.html", dataset=self.dataset)
        console.print(f"wrote {artifacts.shown(str(out))}")
