"""`ItemGraph`: which item leads to which, counted and not trained; a recommender of its own and a part of others.

Its edges `G = D^-a (C + tau C T + nu C N + kappa T)` come from transitions of training histories and from neighbors by
content, which also say what would lead to items that are new.
A history's next item is distributed as the sum of the edges of its items, the later ones weighted more.
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
    passed_on,
    pruned_edges,
    row_blocks,
    scaled_by_degree,
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

        Raises SemidError where a weight of content is given and the dataset has no vector column.
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
        """The graph of these histories of item rows, and of content `vectors` by item row, if there are any.

        Raises SemidError where a weight of content is given and there are no vectors.
        """
        there = vectors is not None and config.columns != ()
        config = replace(replace(config, columns=None).resolved(("vectors",) if there else ()), columns=config.columns)
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
        """The graph with more items, which join by their raw content `vectors`, and more interactions.

        `histories` are of item rows, those of the new items behind the others'; the last `new` items of each (all, if
        not given) are the interactions that the graph has not counted. What comes out is what fitting to everything
        would give. With interactions it is no longer the graph of its dataset, whose targets may be among them (its
        `dataset` is another digest), but one to recommend with.
        Raises SemidError for items that it has or that are given twice, for vectors that are missing, of another width,
        not finite or of no use, and for `new` beyond a history.
        """
        added = as_ids(item_ids)
        if len(there := added.filter(pa.compute.is_in(added, self.item_ids))):
            raise SemidError(f"item {there[0].as_py()!r} is in the graph already ({len(there)} of {len(added)} are)")
        if twice := next((pair for pair in added.value_counts() if pair["counts"].as_py() > 1), None):
            raise SemidError(f"item {twice['values'].as_py()!r} is given {twice['counts']} times; keep one")
        total, everything = len(self.item_ids) + len(added), self.vectors
        if vectors is not None and self.vectors is None:
            raise SemidError("the graph has no content vectors, so items join it without any; leave them out")
        if self.vectors is not None and (len(added) or vectors is not None):
            width = self.vectors.shape[1]
            if vectors is None or vectors.shape != (len(added), width):
                got, columns = "none" if vectors is None else list(vectors.shape), ", ".join(self.config.columns or ())
                raise SemidError(f"expected vectors [{len(added)}, {width}] of the new items ({columns}), got {got}")
            if len(rows := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
                raise SemidError(f"expected finite vectors, got NaN or infinity for item {added[rows[0]].as_py()!r}")
            everything = np.concatenate([self.vectors, vectors.astype(np.float32)])
        counts, popularity = self.counts.copy(), np.pad(self.train_counts, (0, len(added)))
        counts.resize((total, total))
        dataset = self.dataset
        if histories is not None:
            lengths = histories.lengths
            fresh = lengths if new is None else np.asarray(new)
            if fresh.shape != lengths.shape:
                raise SemidError(f"expected new [{len(lengths)}], a number for each history, got {list(fresh.shape)}")
            if len(rows := np.flatnonzero((fresh < 0) | (fresh > lengths))):
                row = int(rows[0])
                raise SemidError(f"expected new of 0 to {lengths[row]} for history {row}, its items, got {fresh[row]}")
            counts = counts + count_transitions(histories, self.config, num_items=total, loops=self.repeats, new=fresh)
            popularity = popularity + replace(histories, starts=histories.ends - fresh).popularity(total)
            if dataset and fresh.any():
                dataset = artifacts.sha256_json([dataset, "and interactions since"])
        ids = pa.concat_arrays([self.item_ids, added.cast(self.item_ids.type)])
        return self._build(ids, self.config, counts, everything, popularity, self.repeats, dataset)

    def distribution(self, histories: Histories) -> sparse.csr_array:
        """The probabilities [histories, items] of the next item, as far as edges lead there; nothing after none."""
        return next_item(histories, self._matrix, self.config, loops=self.repeats)

    @functools.cached_property
    def _matrix(self) -> sparse.csr_array:
        """The edges as a matrix [items, items]."""
        there = self.edges.rows >= 0
        starts = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
        shape = (len(self.item_ids), len(self.item_ids))
        return sparse.csr_array((self.edges.weights[there], self.edges.rows[there], starts), shape=shape)

    def rank(
        self,
        histories: Histories,
        *,
        k: int,
        exclude_seen: bool = False,
        allowed: Allowed = None,
    ) -> Int[np.ndarray, "n k"]:
        """The `k` most probable item rows for each history, then the most popular; -1 where there are fewer.

        Where nothing repeats, none of them is of the history, whatever `exclude_seen` says.
        """
        lists = [np.zeros((0, k), np.int32)]
        for part, some in self._blocks(histories, allowed):
            q = self.distribution(part)
            seen = part if exclude_seen or not self.repeats else None
            q = without_history(q, part) if exclude_seen else q
            lists.append(best_items(q, k=k, popular=self._popular, seen=seen, allowed=some))
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
        """True for the files of an artifact that `write` wrote to."""
        return _SETTINGS in files

    @classmethod
    def read(cls, folder: Path) -> ItemGraph:
        """Read what `write` wrote. Raises SemidError naming the file that does not fit."""
        settings, file = artifacts.read_json(folder / _SETTINGS), folder / _TENSORS
        made = from_dict(ItemGraphConfig, settings["config"], where=str(folder / _SETTINGS))
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
            made,
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
        """Raise SemidError for a graph that was fitted to another dataset, which may have what is test here."""
        remedy = "fit a graph to this dataset (`semid graph`)"
        if self.origin is None and not self.dataset:
            raise SemidError(
                "the item graph: the dataset of its histories is not known, and what is test here may be among them; "
                f"name it by ItemGraph.from_histories(..., dataset=dataset.digest), or {remedy}"
            )
        dataset.check_source(self.origin or self.dataset, what="the item graph", remedy=remedy)

    def with_origin(self, origin: Origin) -> ItemGraph:
        """Name the artifact that holds this very graph."""
        return replace(self, origin=origin)


def content_vectors(dataset: Dataset, config: ItemGraphConfig) -> Float[np.ndarray, "items dim"] | None:
    """The columns that content edges are found by, side by side; None where nothing weighs them."""
    if not config.columns or not (config.content or config.smoothing or config.new_items):
        return None
    return np.concatenate(content_blocks(dataset, config.columns), axis=1).astype(np.float32)


def build_edges(counts: sparse.csr_array, content: sparse.csr_array | None, config: ItemGraphConfig) -> Edges:
    """The largest edges of all items, block by block."""
    num_items = counts.shape[0]
    rows = np.full((num_items, config.width), -1, np.int32)
    weights = np.zeros((num_items, config.width), np.float32)
    passed = None if content is None else passed_on(counts, content, config)
    for block in row_blocks(counts, config):
        edges, degrees = pruned_edges(counts[block], passed, None if content is None else content[block], config)
        edges = scaled_by_degree(edges, degrees, config)
        there = np.arange(config.width) < np.diff(edges.indptr)[:, None]
        rows[block][there], weights[block][there] = edges.indices, edges.data
    return Edges(rows, weights)


def next_item(
    histories: Histories, edges: sparse.csr_array, config: ItemGraphConfig, *, loops: bool
) -> sparse.csr_array:
    """The distribution [histories, items] of the next item: `sum_t recency^(n - t) G[h_t]`, normalized.

    Without `loops` items of the history get nothing.
    """
    rows, real = histories.padded(config.window)
    age = real.sum(axis=1, keepdims=True) - 1 - np.arange(config.window)
    weights = np.where(real, config.recency ** np.maximum(age, 0.0), 0.0)[real].astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(real.sum(axis=1))])
    latest = sparse.csr_array((weights, rows[real], starts), shape=(len(histories), edges.shape[0]))
    scores = (latest @ edges).tocsr()
    return normalized(scores if loops else without_history(scores, histories))
