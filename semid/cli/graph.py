"""The command `semid graph`."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from semid.cli.choices import PathOrUrl, print_chosen
from semid.cli.console import console
from semid.data import Dataset
from semid.graphs import ItemGraphConfig, fit_graph


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True)
class Graph:
    """Count which items lead to which in the training histories, and find each item's neighbors by content.

    The graph ranks by itself in `semid evaluate` (--model), teaches a generator (`semid train --teacher`), and is
    mixed into a model's search (`semid train --graph`).
    """

    dataset: PathOrUrl
    """Dataset folder."""
    out: PathOrUrl
    """Graph folder to write."""
    tune: bool = False
    """Choose content, smoothing, new items, degree power and recency on validation, starting from the given values; a
    weight of new items that is given is kept."""
    config: tyro.conf.OmitArgPrefixes[ItemGraphConfig] = ItemGraphConfig()

    def run(self) -> None:
        dataset = Dataset.load(self.dataset)
        graph = fit_graph(dataset, self.config, tune=self.tune, out=self.out)
        print_chosen(self.config, graph.config, by="validation" if self.tune else "the dataset's columns")
        if self.config.new_items is None and graph.config.new_items == 0 and graph.config.columns:
            console.print("nothing leads to new items at new_items 0.0: to append some, give --new-items 1")
        console.print(f"graph: {self.out}")
