"""`ItemGraph`: weighted edges from items to likely next items, counted and not trained. It ranks by itself, or mixed
with a model.

Its edges `G = D^-a (C + tau C T + nu C N + kappa T)` come from transitions in training histories and from content
neighbors, through which edges also lead to new items. The next item's distribution is the sum of the edges of the
history's items, later items weighted more.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from scipy import sparse

from semid import artifacts
from semid.arrow import read_parquet, write_parquet
from semid.artifacts import Kind, Origin
from semid.config import from_dict, to_dict
from semid.data import Allowed, Dataset, Histories, Id, as_ids, content_blocks
from semid.errors import SemidError
from semid.graphs.ranking import ItemRanker, best_items, normalized, without_history
from semid.graphs.transitions import (
    ItemGraphConfig,
    content_edges,
    count_transitions,
    pruned_edges,
    row_blocks,
    scaled_by_degree,
    spreading_matrix,
)
from semid.progress import LOG

_SETTINGS, _TENSORS, _ITEMS = "graph.json", "graph.safetensors", "graph_items.parquet"


class Edges(NamedTuple):
    """The largest edges of each item, largest first: item rows (-1: none) and weights."""

    rows: Int[np.ndarray, "items width"]
    weights: Float[np.ndarray, "items width"]


@dataclass(frozen=True, eq=False)
class ItemGraph(ItemRanker):
    """Weighted edges between items, and the counts and vectors that they are computed from."""

    config: ItemGraphConfig
    counts: sparse.csr_array
    """Weighted transitions, [items, items]."""
    vectors: Float[np.ndarray, "items dim"] | None
    """Content vectors; None: edges are transitions alone."""
    edges: Edges
    origin: Origin | None = None

    def __repr__(self) -> str:
        num_edges, origin = int((self.edges.rows >= 0).sum()), f", from {self.origin.folder}" if self.origin else ""
        return f"ItemGraph({len(self.item_ids):,} items, {num_edges:,} edges{origin})"

    @property
    def digest(self) -> str:
        """Digest of the artifact that it was loaded from, or of its edges where there is none."""
        if self.origin is not None:
            return self.origin.digest
        edges = [hashlib.sha256(part.tobytes()).hexdigest() for part in self.edges]
        return artifacts.sha256_json([to_dict(self.config), self.dataset, edges])

    @classmethod
    def fit(cls, dataset: Dataset, config: ItemGraphConfig = ItemGraphConfig()) -> ItemGraph:
        """Count transitions of the training histories and find content neighbors.

        Raises SemidError if a content weight is given and the dataset has no vector column.
        """
        config, train = config.resolved(dataset.vector_columns), dataset.splits.train
        vectors, repeats = content_vectors(dataset, config), dataset.repeats.common
        return cls.from_histories(
            train, dataset.item_ids, config, vectors=vectors, repeats=repeats, dataset=dataset.digest
        )

    @classmethod
    def from_histories(
        cls,
        histories: Histories,
        item_ids: pa.Array,
        config: ItemGraphConfig,
        *,
        vectors: Float[np.ndarray, "items dim"] | None = None,
        repeats: bool = False,
        dataset: str = "",
    ) -> ItemGraph:
        """Fit to histories of item rows, and to content `vectors` by item row, if there are any.

        Raises SemidError if a content weight is given and there are no vectors.
        """
        columns = ("vectors",) if vectors is not None and config.columns != () else ()
        config = replace(replace(config, columns=None).resolved(columns), columns=config.columns)
        counts = count_transitions(histories, config, num_items=len(item_ids), loops=repeats)
        if not counts.nnz:
            remains = "content neighbors and popularity remain" if vectors is not None else "popularity remains"
            LOG.warning("item graph: no training history holds two items, so there are no transitions; %s", remains)
        popularity = histories.popularity(len(item_ids)).astype(np.int64)
        return cls._build(item_ids, config, counts, vectors, popularity, repeats, dataset)

    @classmethod
    def _build(
        cls,
        item_ids: pa.Array,
        config: ItemGraphConfig,
        counts: sparse.csr_array,
        vectors: Float[np.ndarray, "items dim"] | None,
        train_counts: Int[np.ndarray, " items"],
        repeats: bool,
        dataset: str,
    ) -> ItemGraph:
        edges = build_edges(counts, None if vectors is None else content_edges(vectors, config), config)
        return cls(item_ids, train_counts, repeats, dataset, config, counts, vectors, edges)

    def append(
        self,
        item_ids: Iterable[Id] = (),
        *,
        vectors: Float[np.ndarray, "new dim"] | None = None,
        histories: Histories | None = None,
        new: Int[np.ndarray, " n"] | None = None,
    ) -> ItemGraph:
        """The graph with more items, by their raw content `vectors`, and more interactions, as if fitted to everything.

        `histories` are of item rows, where new items follow the present ones; the last `new` items of each (by default
        all) are interactions that the graph has not counted yet. Test targets of its dataset may be among them, so a
        graph with such interactions has another `dataset` digest: it can recommend, but not be evaluated there.
        Raises SemidError for items that the graph has or that are given twice, for vectors that are missing, of another
        width, not finite or without use, and for `new` above a history's length.
        """
        added = as_ids(item_ids)
        if len(present := added.filter(pa.compute.is_in(added, self.item_ids))):
            present_id = present[0].as_py()
            raise SemidError(f"item {present_id!r} is in the graph already ({len(present)} of {len(added)} are)")
        if twice := next((pair for pair in added.value_counts() if pair["counts"].as_py() > 1), None):
            raise SemidError(f"item {twice['values'].as_py()!r} is given {twice['counts']} times; keep one")
        total, all_vectors = len(self.item_ids) + len(added), self.vectors
        if vectors is not None and self.vectors is None:
            raise SemidError("the graph has no content vectors, so items join it without any; leave them out")
        if self.vectors is not None and (len(added) or vectors is not None):
            width = self.vectors.shape[1]
            if vectors is None or vectors.shape != (len(added), width):
                got, columns = "none" if vectors is None else list(vectors.shape), ", ".join(self.config.columns or ())
                raise SemidError(f"expected vectors [{len(added)}, {width}] of the new items ({columns}), got {got}")
            if len(rows := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
                raise SemidError(f"expected finite vectors, got NaN or infinity for item {added[rows[0]].as_py()!r}")
            all_vectors = np.concatenate([self.vectors, vectors.astype(np.float32)])
        counts, popularity = self.counts.copy(), np.pad(self.train_counts, (0, len(added)))
        counts.resize((total, total))
        dataset = self.dataset
        if histories is not None:
            lengths = histories.lengths
            new = lengths if new is None else np.asarray(new)
            if new.shape != lengths.shape:
                raise SemidError(f"expected new [{len(lengths)}], a number for each history, got {list(new.shape)}")
            if len(rows := np.flatnonzero((new < 0) | (new > lengths))):
                row = int(rows[0])
                raise SemidError(f"expected new of 0 to {lengths[row]} for history {row}, its items, got {new[row]}")
            counts = counts + count_transitions(histories, self.config, num_items=total, loops=self.repeats, new=new)
            popularity = popularity + replace(histories, starts=histories.ends - new).popularity(total)
            if dataset and new.any():
                dataset = artifacts.sha256_json([dataset, "and interactions since"])
        ids = pa.concat_arrays([self.item_ids, added.cast(self.item_ids.type)])
        return self._build(ids, self.config, counts, all_vectors, popularity, self.repeats, dataset)

    def distribution(self, histories: Histories) -> sparse.csr_array:
        """Probabilities [histories, items] of the next item: 0 where no edge leads, all 0 after an empty history."""
        return next_item(histories, self._matrix, self.config, loops=self.repeats)

    @functools.cached_property
    def _matrix(self) -> sparse.csr_array:
        """The edges as a matrix [items, items]."""
        real = self.edges.rows >= 0
        starts = np.concatenate([[0], np.cumsum(real.sum(axis=1))])
        shape = (len(self.item_ids), len(self.item_ids))
        return sparse.csr_array((self.edges.weights[real], self.edges.rows[real], starts), shape=shape)

    def rank(
        self,
        histories: Histories,
        *,
        k: int,
        exclude_seen: bool = False,
        allowed: Allowed = None,
    ) -> Int[np.ndarray, "n k"]:
        """The `k` most probable item rows for each history, then the most popular; -1 where there are fewer.

        Where items do not repeat, those of the history are never listed, whatever `exclude_seen` says.
        """
        lists = [np.zeros((0, k), np.int32)]
        for part, masks in self._blocks(histories, allowed):
            q = self.distribution(part)
            seen = part if exclude_seen or not self.repeats else None
            q = without_history(q, part) if exclude_seen else q
            lists.append(best_items(q, k=k, popular=self._popular, seen=seen, allowed=masks))
        return np.concatenate(lists)

    def log_probs(self, histories: Histories, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "histories n"]:
        """Log-probabilities of item rows after each history, -inf where no edges lead."""
        with np.errstate(divide="ignore"):
            return np.log(self.distribution(histories)[:, rows].toarray())

    def write(self, folder: Path) -> None:
        """Write settings, counts, vectors and edges into the folder of an artifact under construction."""
        settings = {"config": to_dict(self.config), "repeats": self.repeats, "dataset": self.dataset}
        artifacts.write_json(folder / _SETTINGS, settings)
        counts = self.counts
        tensors = {
            "counts/starts": counts.indptr.astype(np.int64),
            "counts/rows": counts.indices.astype(np.int32),
            "counts/values": counts.data,
            "edges/rows": self.edges.rows,
            "edges/weights": self.edges.weights,
            "train_counts": self.train_counts,
        }
        artifacts.save_tensors(folder / _TENSORS, tensors | ({} if self.vectors is None else {"vectors": self.vectors}))
        write_parquet(pa.table({"item_id": self.item_ids}), folder / _ITEMS)

    @staticmethod
    def is_in(files: Collection[str]) -> bool:
        """True if these files of an artifact include a graph's."""
        return _SETTINGS in files

    @classmethod
    def read(cls, folder: Path) -> ItemGraph:
        """Read what `write` wrote. Raises SemidError naming the file that does not fit."""
        settings, file = artifacts.read_json(folder / _SETTINGS), folder / _TENSORS
        config = from_dict(ItemGraphConfig, settings["config"], where=str(folder / _SETTINGS))
        tensors = artifacts.load_tensors(file)
        ids = read_parquet(folder / _ITEMS)["item_id"].combine_chunks()
        artifacts.check_finite(tensors, where=file)
        rows, weights = tensors["edges/rows"], tensors["edges/weights"]
        if rows.shape != weights.shape or len(rows) != len(ids) or not -1 <= rows.min() <= rows.max() < len(ids):
            raise SemidError(f"{file}: its edges are not those of the {len(ids):,} items; fit the graph again")
        values = (tensors["counts/values"], tensors["counts/rows"], tensors["counts/starts"])
        return cls(
            ids,
            tensors["train_counts"],
            settings["repeats"],
            settings["dataset"],
            config,
            sparse.csr_array(values, shape=(len(ids), len(ids))),
            tensors.get("vectors"),
            Edges(rows, weights),
        )

    @classmethod
    def load(cls, path: str | Path) -> ItemGraph:
        """Read the artifact that `fit_graph` (`semid graph`) wrote, every file verified."""
        path = artifacts.fetched(path)
        with artifacts.opened(path, Kind.GRAPH) as origin:
            return cls.read(path).with_origin(origin)

    def check_dataset(self, dataset: Dataset) -> None:
        """Raise SemidError for a graph of another dataset, which may have counted interactions that are test here."""
        remedy = "fit a graph to this dataset (`semid graph`)"
        if self.origin is None and not self.dataset:
            raise SemidError(
                "the item graph: the dataset of its histories is not known and may hold test interactions of this one; "
                f"name it by ItemGraph.from_histories(..., dataset=dataset.digest), or {remedy}"
            )
        dataset.check_source(self.origin or self.dataset, what="the item graph", remedy=remedy)

    def with_origin(self, origin: Origin) -> ItemGraph:
        """The same graph, with the artifact that holds it as origin."""
        return replace(self, origin=origin)


def content_vectors(dataset: Dataset, config: ItemGraphConfig) -> Float[np.ndarray, "items dim"] | None:
    """The columns for content edges, side by side; None if no weight uses content."""
    if not config.columns or not (config.content or config.smoothing or config.new_items):
        return None
    return np.concatenate(content_blocks(dataset, config.columns), axis=1).astype(np.float32)


def build_edges(counts: sparse.csr_array, content: sparse.csr_array | None, config: ItemGraphConfig) -> Edges:
    """The largest edges of all items, block by block."""
    num_items = counts.shape[0]
    rows = np.full((num_items, config.width), -1, np.int32)
    weights = np.zeros((num_items, config.width), np.float32)
    spreading = None if content is None else spreading_matrix(counts, content, config)
    for block in row_blocks(counts, config):
        edges, degrees = pruned_edges(counts[block], spreading, None if content is None else content[block], config)
        edges = scaled_by_degree(edges, degrees, config)
        real = np.arange(config.width) < np.diff(edges.indptr)[:, None]
        rows[block][real], weights[block][real] = edges.indices, edges.data
    return Edges(rows, weights)


def next_item(
    histories: Histories, edges: sparse.csr_array, config: ItemGraphConfig, *, loops: bool
) -> sparse.csr_array:
    """The distribution [histories, items] of the next item: `sum_t recency^(n - t) G[h_t]`, normalized.

    Without `loops` items of the history get 0.
    """
    rows, real = histories.padded(config.window)
    age = real.sum(axis=1, keepdims=True) - 1 - np.arange(config.window)
    weights = np.where(real, config.recency ** np.maximum(age, 0.0), 0.0)[real].astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(real.sum(axis=1))])
    latest = sparse.csr_array((weights, rows[real], starts), shape=(len(histories), edges.shape[0]))
    scores = (latest @ edges).tocsr()
    return normalized(scores if loops else without_history(scores, histories))
