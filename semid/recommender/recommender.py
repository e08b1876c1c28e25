"""`Recommender`: a trained model and its catalogue, from external item ids to external item ids."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import tempfile
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from semid import artifacts, config
from semid.artifacts import Kind, Origin
from semid.catalog import CATALOG_FILE, SemanticCatalog
from semid.catalog.versions import current as read_version
from semid.catalog.versions import vectors as appended_vectors
from semid.data import Dataset, Histories, Id, Tags, as_ids, as_mapped_table
from semid.errors import SemidError, refuse_path
from semid.graphs import ItemGraph
from semid.notebooks import Facts
from semid.recommender.conditions import Condition, ConditionLike, ConditionSpec, as_conditions, own_conditions
from semid.recommender.explanation import Explanation, explanations
from semid.recommender.hub import upload
from semid.recommender.items import ItemData
from semid.recommender.lists import PlacedGroups, Sampling, build_limits, item_groups
from semid.recommender.mixing import build_boosts, build_mixture, check_graph, check_graph_weight
from semid.recommender.packaging import Measured, write_package
from semid.recommender.persistence import read_model, write_model
from semid.recommender.ranking import BEAM, ItemPopularity, Ranking
from semid.recommender.recommendations import Recommendations
from semid.recommender.requests import read_histories
from semid.recommender.scorers import Scorer
from semid.recommender.spec import ModelSpec
from semid.recommender.versions import build_trie
from semid.training import named_leaves
from seq_models import (
    Capacity,
    Conditions,
    DenseConfig,
    DenseTransformer,
    GroupLimits,
    ItemModel,
    ItemTables,
    Mixture,
)


class Recommender:
    """A trained model and its catalogue: recommends items for histories of items. A `Ranker` for `semid.evaluate`.

    `items` is the item data that the model reads, with training counts: a history without items gets the most popular
    items, scored by the log of their smoothed share (the documented cold start).

    `dataset` is the digest of the dataset that it was trained on; empty: not known, so that it is measured on any.

    `graph` is an item graph to mix with the model, at the weight `spec.graph_weight`. Later versions of the catalogue
    (`with_catalog`) need the standardizer of the items' features; they run in the same compiled programs if tables have
    room for `capacity_factor` times the items.
    """

    def __init__(
        self,
        model: ItemModel,
        catalog: SemanticCatalog,
        *,
        spec: ModelSpec,
        items: ItemData,
        capacity_factor: float | None = None,
        graph: ItemGraph | None = None,
        dataset: str = "",
    ) -> None:
        if spec.catalog not in ("", catalog.digest):
            raise SemidError(
                f"the model was trained on the codes of another catalogue (digest {spec.catalog[:12]}) than the one "
                f"given ({catalog.digest[:12]}); give that one, or train on this one"
            )
        if capacity_factor is not None and not 1 <= capacity_factor < math.inf:
            raise SemidError(f"expected a capacity_factor of 1 or more, and finite, got {capacity_factor}")
        self.catalog, self.spec = catalog, spec
        self.items, self._capacity_factor, self._graph = items, capacity_factor, graph
        self._groups: dict[str, Tags] = {}
        self._placed_groups: dict[tuple[str, ...], PlacedGroups] = {}
        if graph is not None:
            check_graph(graph, catalog.item_ids)
        self._capacity: Capacity | None = None
        self.origin: Origin | None = None  # the artifact of this very model, if there is one
        self.dataset = dataset  # digest of the dataset that it was trained on; empty: not known
        # Its catalogue, or vectors of its items, are of another version than those in the origin.
        self.catalog_updated = False
        self._scorer = self._build_scorer(model)

    def _repr_html_(self) -> str:
        parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(self._scorer.params))
        values = {"model": self.spec.model.name, "parameters": int(parameters), "items": len(self.catalog)}
        graph = {} if self._graph is None else {"mixed with": "an item graph"}
        place = {} if self.origin is None else {"from": str(self.origin.folder)}
        return Facts("recommender", {**values, **graph, **place})._repr_html_()

    def __repr__(self) -> str:
        parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(self._scorer.params))
        origin = f", from {self.origin.folder}" if self.origin else ""
        return f"Recommender({self.spec.model.name}, {parameters:,} parameters, {len(self.catalog):,} items{origin})"

    @property
    def item_ids(self) -> pa.Array:
        """External ids, by item row."""
        return self.catalog.item_ids

    @property
    def digest(self) -> str:
        """Digest of the artifact that it was loaded from, or of its parameters and catalogue where there is none."""
        if self.origin is not None:
            return self.origin.digest
        leaves = named_leaves(jax.device_get(self._scorer.params))
        total = hashlib.sha256(json.dumps([config.to_dict(self.spec), self.catalog.digest]).encode())
        if self._graph is not None:
            total.update(self._graph.digest.encode())
        for name, leaf in leaves.items():
            total.update(name.encode() + np.asarray(leaf).tobytes())
        return total.hexdigest()

    def with_origin(self, origin: Origin) -> Recommender:
        """The same, with the artifact that holds it as origin."""
        other = copy.copy(self)
        other.origin, other.dataset = origin, origin.manifest.parents.get("dataset", self.dataset)
        return other

    @property
    def active(self) -> Bool[np.ndarray, " items"]:
        """True at the item rows that may be recommended at all: not removed from the catalogue."""
        return self.catalog.active

    @property
    def scorer(self) -> Scorer:
        """The model and the arrays that it reads, on the device, for rankings and exact scores."""
        return self._scorer

    @property
    def tables(self) -> ItemTables:
        """Item tables that the model reads, on the device."""
        return self._scorer.tables

    @property
    def codes(self) -> Int[np.ndarray, "items level"] | None:
        """The catalogue's codes; None for a model without codes."""
        return self.catalog.codes if self.spec.model.has_codes else None

    @property
    def tie_break(self) -> bool:
        """The last level of `codes` only tells colliding items apart."""
        return self.catalog.tie_break

    @property
    def repeats(self) -> bool:
        """False: it never recommends items of the history, as items do not repeat in its training data."""
        return self.spec.repeat_factor > 0

    @property
    def conditions(self) -> ConditionSpec | None:
        """Conditions on recommended items that the model was trained with; None: none."""
        return self.spec.conditions

    @property
    def graph(self) -> ItemGraph | None:
        """The item graph that is mixed with the model, if there is one."""
        return self._graph

    @property
    def train_counts(self) -> Int[np.ndarray, " items"]:
        """Number of training interactions per item row."""
        return self.items.train_counts

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        catalog: str | Path | None = None,
        sequences: Mapping[str, str | Path] | None = None,
        capacity_factor: float | None = None,
        revision: str | None = None,
    ) -> Recommender:
        """Load what `semid train` or `save_pretrained` wrote, every file verified.

        `catalog` is the folder of its catalogue, to recommend from the current version (`with_version`); `sequences`
        are the folders of its further code sequences by name, which have the codes of appended items.
        With `capacity_factor`, say 1.5, tables have room for so many times the items: `with_catalog` compiles nothing.
        A string `org/name` that is no path is a repository of the Hugging Face hub (extra `hub`), at its `revision`.
        Raises SemidError naming what is wrong.
        """
        if sequences and catalog is None:
            raise SemidError(
                "`sequences` have codes of appended items, which come with their catalogue: give it (--catalog)"
            )
        path = artifacts.local_folder(path, revision=revision)
        with artifacts.opened(path, Kind.MODEL) as origin:
            files = origin.manifest.files  # those alone: a folder may hold more, which nothing verifies
            spec, model, items = read_model(path, files)
            loaded = cls(
                model,
                SemanticCatalog.read(path / CATALOG_FILE),
                spec=spec,
                items=items,
                capacity_factor=capacity_factor,
                graph=ItemGraph.read(path) if ItemGraph.is_in(files) else None,
            ).with_origin(origin)
        return loaded if catalog is None else loaded.with_version(catalog, sequences=sequences)

    def save_pretrained(
        self, folder: str | Path, *, metrics: str | Path | Measured | None = None, license: str | None = None
    ) -> None:
        """Package the model: a folder with its catalogue, tokenizer and card, without the state of training.

        `metrics` (a `metrics.json` of `semid evaluate`, or the result of `semid.evaluate`) go into the card with their
        protocol, `license` into its head. An earlier package there is replaced.
        Raises SemidError for metrics of another model, and if `folder` holds anything else.
        """
        write_package(
            artifacts.place(folder),
            write=self.write,
            spec=config.to_dict(self.spec),
            catalog=self.catalog,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(self._scorer.params)),
            origin=self.origin,
            dataset=self.dataset,
            catalog_updated=self.catalog_updated,
            metrics=metrics,
            license=license,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        metrics: str | Path | Measured | None = None,
        license: str | None = None,
        message: str = "Upload a recommender",
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to `org/name` on the Hugging Face hub (extra `hub`), in one commit.

        Files of an earlier package that this one lacks are deleted there (JSON, safetensors, Parquet).
        Returns the commit's address. Raises SemidError if the extra is missing or the hub refuses.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, metrics=metrics, license=license)
            return upload(folder, repo_id, message=message, private=private, revision=revision, token=token)

    def with_model(self, model: ItemModel) -> Recommender:
        """The same with another model of this `spec`; shares the item tables and the trie, which take time to build."""
        other = copy.copy(self)
        other.origin, other.catalog_updated = None, False
        other._scorer = self._scorer.with_model(model)
        return other

    def with_graph(self, graph: ItemGraph | None, *, weight: float = 0.5) -> Recommender:
        """The same mixed with this item graph at this weight, or with none; graphs of one width share a program.

        Raises SemidError for a graph of other items than the catalogue's and for a weight out of range.
        """
        refuse_path(graph, "ItemGraph.load")
        check_graph_weight(weight)
        if graph is not None:
            check_graph(graph, self.catalog.item_ids)
        return self._mixed(graph, dataclasses.replace(self.spec, graph_weight=0.0 if graph is None else weight))

    def with_repeat_factor(self, factor: float) -> Recommender:
        """The same with this factor on the model's probabilities of the history's items. Raises SemidError below 0."""
        return self._mixed(self._graph, dataclasses.replace(self.spec, repeat_factor=factor))

    def with_width(self, width: int | None) -> Recommender:
        """The same, ranking by the first `width` dimensions of its item vectors; None: all.

        A SASRec trained for several `widths` ranks at each of them, with a smaller index. Raises SemidError for a
        generator of codes, and ValueError for a width that it was not trained for.
        """
        model = self.dense_model()
        config = dataclasses.replace(typing.cast(DenseConfig, self.spec.model), width=width)
        model.width = width
        other = self.with_model(model)
        other.spec = dataclasses.replace(self.spec, model=config)
        return other

    def _mixed(self, graph: ItemGraph | None, spec: ModelSpec) -> Recommender:
        """The same with this graph, mixed by the weights of this spec."""
        other = copy.copy(self)
        other.origin, other.catalog_updated, other._graph = None, False, graph
        other.spec = spec
        other._scorer = self._scorer.with_mixture(other._mixture())
        return other

    def with_groups(self, items: typing.Any, *columns: str) -> Recommender:
        """The same with groups of its items, for `at_most`: columns of a table with `item_id`, such as a dataset's.

        A column holds strings or whole numbers, or lists of these: an item may be in several groups. Each step of a
        path (`Beauty > Hair Care`) is a group; one that all items share does not count. Columns may be named as in the
        dataset's own tables. Items that the table lacks, such as those appended later, are in no group and so not
        limited: call it again with a table that has them. Raises SemidError naming a missing column.
        """
        read = ("item_id", *columns)
        names = {own: theirs for own, theirs in self.catalog.source_columns.items() if own in read}
        other = copy.copy(self)
        other._groups = self._groups | item_groups(as_mapped_table(items, names, strings=read), columns, self.item_ids)
        other._placed_groups = {}
        return other

    def with_catalog(
        self,
        catalog: SemanticCatalog,
        *,
        vectors: Float[np.ndarray, "new dim"] | None = None,
        graph_vectors: Float[np.ndarray, "new dim_of_graph"] | None = None,
        sequences: Mapping[str, SemanticCatalog] | None = None,
    ) -> Recommender:
        """The same model on a later version of its catalogue: it recommends appended items, and no removed ones.

        Items that the recommender has keep their rows; the new ones follow in the catalogue's order. `vectors` are the
        raw vectors of the new items (the columns `spec.columns` side by side), for a model that reads any, and
        `graph_vectors` those that an item graph finds their neighbors by (default: `vectors`). `sequences` are later
        versions of the catalogues of further code sequences, by name; items without such codes are read without.
        A model with a learned vector per item (SASRec, id embeddings) leaves new items out, which must all be removed.
        Programs are compiled again only if the version exceeds the capacity of this recommender's tables.
        Raises SemidError if items or codes that the model knows differ, if vectors are missing, and for active new
        items of a model with a learned vector per item. New items are in no group until `with_groups` is called again
        with a table that has them.
        """
        refuse_path(catalog, "SemanticCatalog.load")
        first, catalog = len(self.catalog), self._reordered(catalog)
        return self._updated(catalog, first, vectors=vectors, graph_vectors=graph_vectors, sequences=sequences or {})

    def _updated(
        self,
        catalog: SemanticCatalog,
        first: int,
        *,
        vectors: Float[np.ndarray, "later dim"] | None,
        graph_vectors: Float[np.ndarray, "later dim_of_graph"] | None,
        sequences: Mapping[str, SemanticCatalog],
    ) -> Recommender:
        """`with_catalog` for a catalogue in this one's order, with the vectors of all items from row `first` on."""
        new = len(catalog) - len(self.catalog)
        other = copy.copy(self)
        other.catalog = catalog
        known = catalog.digest if self.spec.catalog else ""
        trained = self._trained_items if len(catalog) > self._trained_items else None
        other.spec = dataclasses.replace(self.spec, num_items=len(catalog), catalog=known, trained_items=trained)
        other.items = self.items.appended(catalog, self.spec, first=first, vectors=vectors, sequences=sequences)
        rows = np.pad(np.arange(len(self.catalog)), (0, new), constant_values=-1)
        other._groups = {name: groups.take(rows) for name, groups in self._groups.items()}
        other._placed_groups = {}
        if self._graph is not None:
            near = vectors if graph_vectors is None and self._graph.vectors is not None else graph_vectors
            other._graph = self._updated_graph(self._graph, catalog.item_ids, first, near)
        same = catalog.digest == self.catalog.digest and other._graph is self._graph
        other.catalog_updated = self.catalog_updated or not (same and other.items.same_inputs_as(self.items))
        other._scorer = other._build_scorer(self.model)
        return other

    def with_version(
        self,
        folder: str | Path,
        version: int | None = None,
        *,
        sequences: Mapping[str, str | Path] | None = None,
    ) -> Recommender:
        """`with_catalog` for the current version of a catalogue folder, or a given one, with the vectors stored there.

        All items that were not in training get the vectors that they have in that version. `sequences` are folders of
        the catalogues of further code sequences, by name. A recommender cannot go back to a version that lacks some of
        its items: load the model again with that version, or revert the catalogue, which makes a later version.
        """
        stored = read_version(folder, version)
        catalog, first = self._reordered(stored.catalog), self._trained_items
        new, removed = catalog.item_ids[first:], ~catalog.active[first:]

        def appended(columns: tuple[str, ...], width: int) -> Float[np.ndarray, "new dim"]:
            vectors = appended_vectors(folder, columns, new, stored.number, removed=removed)  # as of this version
            unread = removed.all() and vectors.shape[1] != width  # a column lacks vectors of removed items
            return np.zeros((len(new), width), np.float32) if unread else vectors

        vectors, near = None, None
        if len(new) and self.spec.num_features and self.spec.columns:
            vectors = appended(self.spec.columns, self.spec.num_features)
        if len(new) and self._graph is not None and self._graph.vectors is not None:
            near = appended(self._graph.config.columns or (), self._graph.vectors.shape[1])
        read = {name: SemanticCatalog.load(one) for name, one in (sequences or {}).items()}
        return self._updated(catalog, first, vectors=vectors, graph_vectors=near, sequences=read)

    @property
    def _trained_items(self) -> int:
        """Number of items that it was trained on; their rows come first, and their vectors never change."""
        return len(self.catalog) if self.spec.trained_items is None else self.spec.trained_items

    def _updated_graph(
        self, graph: ItemGraph, item_ids: pa.Array, first: int, vectors: Float[np.ndarray, "later dim"] | None
    ) -> ItemGraph:
        """The graph with the items that follow its own, and with these vectors of all items from row `first` on."""
        size = len(graph.item_ids)
        changed = size - first
        try:
            if changed and vectors is not None and graph.vectors is not None:
                all_vectors = np.concatenate([graph.vectors[:first], vectors[:changed]])
                if len(item_ids) == size and np.array_equal(all_vectors, graph.vectors):
                    return graph
                graph = dataclasses.replace(graph, vectors=all_vectors)  # `append` computes the edges again
            elif len(item_ids) == size:
                return graph
            return graph.append(item_ids[size:], vectors=None if vectors is None else vectors[changed:])
        except ValueError as error:  # SemidError, or vectors of another width
            remedy = "" if graph.vectors is None else "; give those as graph_vectors"
            raise SemidError(f"item graph: {error}{remedy}") from None

    def _build_scorer(self, model: ItemModel) -> Scorer:
        """Build the scorer on the catalogue's tables and, for models of codes, its trie."""
        catalog, rows = self.catalog, None
        active, trie = None if catalog.removed is None else catalog.active, None
        if self.spec.model.has_codes:
            trie, self._capacity = build_trie(
                catalog,
                active=active,
                popularity=self.train_counts,
                capacity=self._capacity,
                capacity_factor=self._capacity_factor,
            )
            rows = None if self._capacity is None else trie.num_items
        if self._capacity_factor is not None and active is None:
            active = catalog.active  # the same programs with and without removed items
        tables = self.items.tables(catalog, active=active, rows=rows)
        softmax_over, mixture = self.spec.normalization, self._mixture(len(tables.codes))
        self._popularity = ItemPopularity.from_counts(catalog, self.train_counts)
        return Scorer.from_model(model, tables=tables, trie=trie, softmax_over=softmax_over, mixture=mixture)

    def _mixture(self, rows: int | None = None) -> Mixture | None:
        """Build the mixture, for tables of `rows` rows (default: the scorer's)."""
        rows = len(self.tables.codes) if rows is None else rows
        weights = {"weight": self.spec.graph_weight, "repeat_factor": self.spec.repeat_factor}
        return build_mixture(self._graph, **weights, rows=rows)

    def _weighted(self, graph_weight: float | None) -> Scorer:
        """The scorer with another weight of the graph. Raises SemidError for one out of range or without a graph."""
        mixture = self._scorer.mixture
        if graph_weight is None or (self._graph is None and graph_weight == 0):
            return self._scorer
        check_graph_weight(graph_weight)
        if mixture is None or mixture.neighbors is None:
            raise SemidError(f"a graph_weight of {graph_weight} needs an item graph, and the recommender has none")
        return self._scorer.with_mixture(mixture._replace(weight=jnp.float32(graph_weight)))

    def _reordered(self, catalog: SemanticCatalog) -> SemanticCatalog:
        """A later version in the order of this one, new items last. Raises SemidError if the model does not fit it."""
        if reason := self.spec.incompatibility(self.catalog, catalog):
            known = catalog.find_rows(self.item_ids)[1]
            alike = catalog.level_sizes == self.catalog.level_sizes
            if alike and known[: self._trained_items].all() and not known.all():
                raise SemidError(
                    f"this recommender has {(~known).sum()} appended items that the version lacks (an earlier one?): "
                    'load the model again with catalog="FOLDER@3", or make it the current one (semid catalog revert '
                    "--to 3)"
                )
            raise SemidError(
                f"the model does not fit this catalogue: {reason}; give a later version of its own, or train again"
            )
        return catalog.arranged(self.item_ids, others=not self.spec.model.has_item_embeddings)

    def write(self, folder: Path) -> None:
        """Write config, parameters, item tables and catalogue into the folder of an artifact under construction."""
        write_model(folder, self.spec, self._scorer.params, self.items)
        self.catalog.write(folder / CATALOG_FILE)
        if self._graph is not None:
            self._graph.write(folder)

    def recommend(
        self,
        histories: Iterable[Iterable[Id]],
        *,
        k: int = 10,
        beam_size: int = BEAM,
        exclude_seen: bool = False,
        allowed: Bool[np.ndarray, " items"] | Bool[np.ndarray, "histories items"] | None = None,
        boosts: Mapping[Id, float] | None = None,
        graph_weight: float | None = None,
        at_most: Mapping[str, int] | None = None,
        sample: Sampling | None = None,
        skip_unknown: bool = False,
        condition: ConditionLike = None,
        events: Iterable[Sequence[str | None]] | None = None,
        times: Iterable[Sequence[float]] | None = None,
        values: Mapping[str, float] | None = None,
    ) -> Recommendations:
        """The k best items for each history of external ids, oldest first.

        The search keeps `beam_size` beams, or k if that is more. `allowed` masks the item rows that may be recommended,
        for all histories or each (`allow` builds it from ids); `exclude_seen` leaves out the history's items. Both are
        part of the search: every allowed item can be found, and only if there are fewer than k is a list shorter.

        `boosts` multiply the probabilities of items, for freshness or a business rule. They enter the search too, at
        the cost of an exact score of each; scores of boosted items are then no log-probabilities. `graph_weight`
        replaces the weight of the item graph: 0 is the model alone, 1 the graph alone, which may rank fewer than k.

        `condition` is what a model that was trained with conditions is asked for: `{"event": "buy"}`, a `group` of
        items, a `text`, or a `Condition`, one for all histories or one each. `events` and `times` (in seconds) are
        those of the histories' items, a list for each, for a model that reads them; an unknown event is None. For an
        empty history none of these matters. `values` of events, `{"click": 1, "buy": 2.5}`, rank the items that the
        beams find by expected value, for a model with an event head; scores are then its logarithms.

        `at_most` limits the items per group in a list, `{"brand": 2}` (see `with_groups`). The list is filled greedily
        from all items that the beams find, so that narrow limits need wide beams. `sample` draws the list without
        replacement instead of taking the best; its scores are not sorted.
        Raises SemidError for numbers out of range, for conditions and events that the model does not know, and for an
        unknown id, unless `skip_unknown` drops it.
        """
        rows = self._histories(histories, skip_unknown, events, times)
        conditions = self._conditions(condition, len(rows))
        ranked, scores = self._ranking(graph_weight).top(
            rows,
            k=k,
            beam_size=beam_size,
            exclude_seen=exclude_seen,
            allowed=allowed,
            boosts=build_boosts(boosts, self.catalog, skip_unknown=skip_unknown) if boosts else None,
            conditions=conditions,
            values=self._values(values, conditions),
            limits=self._limits(at_most),
            sample=sample,
        )
        ids = [self.item_ids.take(pa.array(row[row >= 0])).to_pylist() for row in ranked]
        return Recommendations(ids, scores)

    def allow(self, item_ids: Iterable[Id], *, skip_unknown: bool = False) -> Bool[np.ndarray, " items"]:
        """Mask that is True at the rows of these items, say those in stock; masks combine by `&`, `|` and `~`.

        Raises SemidError for an unknown id, unless `skip_unknown` leaves it out: a shop has items newer than the model.
        """
        ids = as_ids(item_ids)
        rows = self.catalog.find_rows(ids)[0] if skip_unknown else self.catalog.rows(ids)
        allowed = np.zeros(len(self.catalog), bool)
        allowed[rows[rows >= 0]] = True
        return allowed

    def score(
        self,
        histories: Iterable[Iterable[Id]],
        item_ids: Iterable[Id],
        *,
        graph_weight: float | None = None,
        skip_unknown: bool = False,
        condition: ConditionLike = None,
        events: Iterable[Sequence[str | None]] | None = None,
        times: Iterable[Sequence[float]] | None = None,
    ) -> Float[np.ndarray, "histories items"]:
        """Exact log-probabilities of the given items after each history, given `condition`, `events` and `times`.

        Raises SemidError for an unknown id, in a history or among the items.
        """
        rows = self._histories(histories, skip_unknown, events, times)
        return self.log_probs(rows, self.catalog.rows(item_ids), graph_weight=graph_weight, condition=condition)

    def explain(
        self,
        history: Iterable[Id],
        item_ids: Iterable[Id],
        *,
        graph_weight: float | None = None,
        skip_unknown: bool = False,
        condition: Condition | Mapping[str, str] | None = None,
        events: Sequence[str | None] | None = None,
        times: Sequence[float] | None = None,
    ) -> list[Explanation]:
        """Log-probability of each item after the history, and the item graph's share of it, by the history's items.

        `condition`, and `events` and `times` of the history, are those of `recommend`.
        Raises SemidError for a model without an item graph, and for an unknown id, unless `skip_unknown` drops it from
        the history.
        """
        events_of, times_of = None if events is None else [events], None if times is None else [times]
        histories = self._histories([history], skip_unknown, events_of, times_of)
        rows = self.catalog.rows(item_ids)
        return self.explain_rows(histories, rows, graph_weight=graph_weight, condition=condition)

    def explain_rows(
        self,
        histories: Histories,
        rows: Int[np.ndarray, " n"],
        *,
        graph_weight: float | None = None,
        condition: ConditionLike = None,
    ) -> list[Explanation]:
        """`explain` of item rows after one history."""
        if self._graph is None:
            raise SemidError("the model has no item graph, so its probabilities have one source; train with a graph")
        weight = self.spec.graph_weight if graph_weight is None else graph_weight
        mixed, alone = (self.log_probs(histories, rows, graph_weight=w, condition=condition)[0] for w in (weight, 0.0))
        read = histories[0][-self.spec.max_history :]
        return explanations(self._graph, read, rows, item_ids=self.item_ids, weight=weight, mixed=mixed, alone=alone)

    def rank(
        self,
        histories: Histories,
        *,
        k: int,
        exclude_seen: bool,
        beam_size: int = BEAM,
        allowed: Bool[np.ndarray, " items"] | Bool[np.ndarray, "n items"] | None = None,
        graph_weight: float | None = None,
        condition: ConditionLike = None,
        values: Mapping[str, float] | None = None,
        at_most: Mapping[str, int] | None = None,
        sample: Sampling | None = None,
    ) -> Int[np.ndarray, "n k"]:
        """Item rows best first, -1 where there are fewer than k; see `recommend`.

        A history's list does not depend on other histories, up to rounding.
        """
        conditions = self._conditions(condition, len(histories))
        return self._ranking(graph_weight).top(
            histories,
            k=k,
            beam_size=beam_size,
            exclude_seen=exclude_seen,
            allowed=allowed,
            conditions=conditions,
            values=self._values(values, conditions),
            limits=self._limits(at_most),
            sample=sample,
        )[0]

    def event_probs(
        self,
        histories: Iterable[Iterable[Id]],
        item_ids: Iterable[Id],
        *,
        events: Iterable[Sequence[str | None]] | None = None,
        times: Iterable[Sequence[float]] | None = None,
        skip_unknown: bool = False,
    ) -> Float[np.ndarray, "histories items event"]:
        """Probabilities of the events (`conditions.events`), if each item follows each history; `events` and `times`
        are those of the history's items.

        They sum to one over the events. Raises SemidError for a model that was trained without an event head.
        """
        rows, item_rows = self._histories(histories, skip_unknown, events, times), self.catalog.rows(item_ids)
        return np.exp(self.event_log_probs(rows, item_rows))

    def event_log_probs(
        self, histories: Histories, rows: Int[np.ndarray, " n"] | Int[np.ndarray, "histories n"]
    ) -> Float[np.ndarray, "histories n event"]:
        """Logarithms of `event_probs` by item rows, the same after all histories or each one's own."""
        if self.conditions is None or not self.conditions.event_head:
            raise SemidError("the model knows no probabilities of events; train one with event_head (--event-head)")
        return self._ranking(None).event_log_probs(histories, rows, conditions=self._conditions(None, len(histories)))

    def own_conditions(
        self, rows: Int[np.ndarray, " n"], events: Int[np.ndarray, " n"] | None, parts: Sequence[str]
    ) -> Conditions:
        """The named parts of the conditions that items with these events meet, to ask for each target by its own.
        Raises SemidError for parts that the model does not know."""
        return own_conditions(rows, events, parts, spec=self.conditions, items=self.items.conditions)

    def item_vectors(self) -> Float[np.ndarray, "items dim"]:
        """The vectors by which a dense model scores its items, or those that an end-to-end model's encoders give them.

        Raises SemidError for another model of codes.
        """
        if self.spec.model.has_codes:
            if self.items.features is None or self.spec.columns:
                raise SemidError(
                    f"expected item vectors of a dense (SASRec) or an end-to-end model, got {self._kind_of_codes}"
                )
            return self.items.features.copy()
        model = self.dense_model()
        return np.asarray(model.ranked_by(model.vectors(self.tables.features)))

    def item_vectors_for(self, dataset: Dataset) -> Float[np.ndarray, "items dim"]:
        """The `item_vectors` of a dataset's items, in its order, for a model that learns from this one.

        Raises SemidError where this model was trained on another dataset, or has no item vectors.
        """
        if made := self.origin or self.dataset:
            dataset.check_source(made, what="the teacher", remedy="train a teacher on this dataset")
        try:
            vectors = self.item_vectors()
        except SemidError as error:
            raise SemidError(f"teacher (--teacher): {error}; name one that `semid train sasrec` wrote") from None
        return vectors[self.catalog.rows(dataset.item_ids)]

    @property
    def _kind_of_codes(self) -> str:
        """Family and folder of this generator of codes, for messages."""
        return f"a generator of codes, {self.spec.model.title}{f' of {self.origin.folder}' if self.origin else ''}"

    @property
    def model(self) -> ItemModel:
        """The model; it shares the parameters."""
        return self._scorer.model

    def dense_model(self, *, remedy: str = "take a SASRec model") -> DenseTransformer:
        """The dense model. Raises SemidError with the `remedy` for a generator of codes."""
        if self.spec.model.has_codes:
            raise SemidError(f"expected a dense model (SASRec), got {self._kind_of_codes}; {remedy}")
        return typing.cast(DenseTransformer, self.model)

    def log_probs(
        self,
        histories: Histories,
        rows: Int[np.ndarray, " n"],
        *,
        graph_weight: float | None = None,
        condition: ConditionLike = None,
    ) -> Float[np.ndarray, "histories n"]:
        """Exact log-probabilities of item rows after each history (of popularity, after an empty one).

        -inf for items that the search leaves out: removed ones and, if items do not repeat, the whole history's.
        """
        return self._ranking(graph_weight).log_probs(
            histories, rows, conditions=self._conditions(condition, len(histories))
        )

    def catalog_log_probs(
        self, histories: Histories, *, graph_weight: float | None = None, condition: ConditionLike = None
    ) -> Float[np.ndarray, "histories items"]:
        """`log_probs` of all items, at less cost: items whose codes begin alike share the computation."""
        conditions = self._conditions(condition, len(histories))
        return self._ranking(graph_weight).catalog_log_probs(histories, conditions=conditions)

    def most_popular(self, k: int) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """The items most popular in training, and their scores: the list for an empty history."""
        rows, scores = self._ranking(None).most_popular(1, k, None)
        return rows[0], scores[0]

    def _ranking(self, graph_weight: float | None) -> Ranking:
        """Rankings and scores of item rows, by another weight of the graph if one is given."""
        return Ranking(self._weighted(graph_weight), self.spec, self.catalog, self._popularity)

    def _values(
        self, values: Mapping[str, float] | None, conditions: Conditions | None
    ) -> Float[np.ndarray, " events"] | None:
        """Values by event number. Raises SemidError if the model or the conditions do not allow them."""
        if not values:
            return None
        if self.conditions is None or conditions is None:
            raise SemidError(
                "the model knows no probabilities of events; train one with event_head (--event-head), or ask without"
            )
        if conditions.event is not None and conditions.event.any():
            raise SemidError("values weigh all events: ask for no event next to them")
        return self.conditions.event_values(values)

    def _limits(self, at_most: Mapping[str, int] | None) -> GroupLimits | None:
        return build_limits(at_most or {}, self._groups, rows=len(self.tables.codes), placed=self._placed_groups)

    def _conditions(self, condition: ConditionLike, number: int) -> Conditions | None:
        """Conditions of `number` histories as numbers."""
        return as_conditions(condition, number=number, spec=self.conditions, items=self.items.conditions)

    def _histories(
        self,
        histories: Iterable[Iterable[Id]],
        skip_unknown: bool,
        events: Iterable[Sequence[str | None]] | None = None,
        times: Iterable[Sequence[float]] | None = None,
    ) -> Histories:
        """Histories as item rows, event numbers and times."""
        return read_histories(
            histories,
            self.catalog,
            conditions=self.conditions,
            skip_unknown=skip_unknown,
            events=events,
            times=times,
        )
