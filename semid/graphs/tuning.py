"""Constants of an item graph, chosen on validation; and `fit_graph`, the stage that writes the artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from semid.artifacts import Kind
from semid.config import to_dict
from semid.data import Dataset, Examples
from semid.errors import refuse_path
from semid.graphs.item_graph import ItemGraph, content_vectors, next_item
from semid.graphs.transitions import (
    ItemGraphConfig,
    content_edges,
    count_transitions,
    pruned_edges,
    scaled_by_degree,
    spreading_matrix,
)
from semid.progress import show_progress
from semid.stage import Request, run_stage

# Version of the `fit_graph` stage: raised where the same settings come to give another graph.
_VERSION = 2
# Validation examples on which constants are chosen.
_EXAMPLES = 4096
# Values to try, one constant after another, the most important first.
_GRID: dict[str, Sequence[float]] = {
    "content": (0.0, 1.0, 3.0, 6.0, 10.0, 16.0),
    "smoothing": (0.0, 0.5, 1.0),
    "new_items": (0.0, 1.0, 2.0, 4.0, 8.0, 16.0),
    "degree_power": (0.3, 0.5, 0.7, 1.0),
    "recency": (0.35, 0.5, 0.6, 0.7, 0.8),
}
_CONTENT_WEIGHTS = {"content", "smoothing", "new_items"}


def fit_graph(
    dataset: Dataset, config: ItemGraphConfig = ItemGraphConfig(), *, tune: bool = False, out: str | Path | None = None
) -> ItemGraph:
    """Fit an item graph to the dataset's training histories and write the artifact `out`.

    With `tune` its constants are chosen on validation. A stage (see `run_stage`): without `out` nothing is written.
    """
    refuse_path(dataset, "Dataset.load")
    request = Request(Kind.GRAPH, {"graph": to_dict(config), "tune": tune}, dataset.parents, None, _VERSION)

    def work(folder: Path) -> ItemGraph:
        return ItemGraph.fit(dataset, tuned(dataset, config) if tune else config)

    return run_stage(request, out, load=ItemGraph.load, work=work, write=ItemGraph.write)


def tuned(dataset: Dataset, config: ItemGraphConfig = ItemGraphConfig()) -> ItemGraphConfig:
    """Choose the weights of content, smoothing and new items, the power of the degree and the recency, by NDCG@10 on (a
    sample of) the validation split.

    Two rounds, one constant after another. A value must gain more than the standard error of the paired difference, so
    that constants without effect stay as they are. A given weight of new items is kept, as validation may have hardly
    any new items. Raises SemidError without validation examples.
    """
    examples = dataset.splits.examples("validation")
    if len(examples) > _EXAMPLES:
        examples = examples.take(np.random.default_rng(0).permutation(len(examples))[:_EXAMPLES])
    given, config = config, config.resolved(dataset.vector_columns)
    score = _Scores(dataset, examples, config)
    fixed = set() if given.new_items is None else {"new_items"}
    if not config.columns:
        fixed |= _CONTENT_WEIGHTS
    grid = {name: values for name, values in _GRID.items() if name not in fixed}
    best = score(config)
    total = 2 * sum(map(len, grid.values()))
    with show_progress("tuning the graph", total=total, unit="settings") as progress:
        done = 0
        for name, values in [*grid.items(), *grid.items()]:
            for value in values:
                changes: dict[str, Any] = {name: value}
                candidate = replace(config, **changes)
                gain = score(candidate) - best
                if gain.mean() > gain.std() / np.sqrt(len(gain)):
                    best, config = score(candidate), candidate
                done += 1
                progress.advance(done, f"best validation NDCG@10 {best.mean():.4f}")
    return config


class _Scores:
    """NDCG@10 of graphs per example; only the edges of the histories' items are computed."""

    def __init__(self, dataset: Dataset, examples: Examples, config: ItemGraphConfig) -> None:
        train, num_items, self.loops = dataset.splits.train, dataset.num_items, dataset.repeats.common
        self.examples = examples
        self.counts = count_transitions(train, config, num_items=num_items, loops=self.loops)
        vectors = content_vectors(dataset, replace(config, content=config.content or 1.0))
        self.content = None if vectors is None else content_edges(vectors, config)
        self.known: dict[tuple[Any, ...], Float[np.ndarray, " n"]] = {}
        self.edges: tuple[ItemGraphConfig, sparse.csr_array] | None = None
        rows, real = examples.histories.padded(config.window)
        self.rows = np.unique(rows[real])

    def __call__(self, config: ItemGraphConfig) -> Float[np.ndarray, " n"]:
        key = tuple(getattr(config, name) for name in _GRID)
        if key not in self.known:
            self.known[key] = self._ndcg(config)
        return self.known[key]

    def _ndcg(self, config: ItemGraphConfig) -> Float[np.ndarray, " n"]:
        without_recency = replace(config, recency=0.0)
        if self.edges is None or self.edges[0] != without_recency:
            near = None if self.content is None else self.content[self.rows]
            spreading = None if self.content is None else spreading_matrix(self.counts, self.content, config)
            edges = scaled_by_degree(*pruned_edges(self.counts[self.rows], spreading, near, config), config)
            starts = np.zeros(self.counts.shape[0] + 1, np.int64)
            starts[self.rows + 1] = np.diff(edges.indptr)
            whole = sparse.csr_array((edges.data, edges.indices, np.cumsum(starts)), shape=self.counts.shape)
            self.edges = without_recency, whole
        q = next_item(self.examples.histories, self.edges[1], config, loops=self.loops)
        return _ndcg_at_10(q, self.examples.targets)


def _ndcg_at_10(scores: sparse.csr_array, targets: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """NDCG@10 of targets in sparse rows of scores, ties in the order of columns, as `best_items` lists them; a target
    without a score is a miss."""
    owner = np.repeat(np.arange(len(targets)), np.diff(scores.indptr))
    of_target = np.zeros(len(targets), scores.dtype)
    hit = scores.indices == targets[owner]
    of_target[owner[hit]] = scores.data[hit]
    before = (scores.data == of_target[owner]) & (scores.indices < targets[owner])
    above = np.bincount(owner[(scores.data > of_target[owner]) | before], minlength=len(targets))
    return np.where((above < 10) & (of_target > 0), 1 / np.log2(above + 2.0), 0)
