"""`Recommender`: a trained model and its catalogue, from external item ids to external item ids."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
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
from semid.errors import SemidError
from semid.graphs import ItemGraph
from semid.notebooks import Facts
from semid.recommender.conditions import Condition, ConditionLike, ConditionSpec, as_conditions, own_conditions
from semid.recommender.explanation import Explanation, explanations
from semid.recommender.hub import upload
from semid.recommender.items import ItemData
from semid.recommender.lists import PlacedGroups, Sampling, build_limits, groups_of
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
    """A trained model and its catalogue: recommends items to histories of items.

    `items` is what the model reads of its items. A history without items is answered with the most popular of their
    training counts, scored by the log of their smoothed share (the documented cold start). It is a `Ranker` for
    `semid.evaluate`.

    `dataset` is the digest of the dataset that it was trained on; empty: not known, and so measured on any.

    `graph` is an item graph that is mixed with the model, at the weight `spec.graph_weight`. With the standardizer of
    the items' features, and with tables for `capacity_factor` times the items, the same programs serve later versions
    of the catalogue (`with_catalog`).
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
                f"the model speaks the codes of another catalogue (digest {spec.catalog[:12]}) than the one given "
                f"({catalog.digest[:12]}); give that one, or train on this one"
            )
        if capacity_factor is not None and capacity_factor < 1:
            raise SemidError(f"expected a capacity_factor of 1 or more, got {capacity_factor}")
        self.catalog, self.spec = catalog, spec
        self.items, self._capacity_factor, self._graph = items, capacity_factor, graph
        self._groups: dict[str, Tags] = {}
        self._placed_groups: dict[tuple[str, ...], PlacedGroups] = {}
        if graph is not None:
            check_graph(graph, catalog.item_ids)
        self._capacity: Capacity | None = None
        self.origin: Origin | None = None  # the artifact of this very model, if there is one
        self.dataset = dataset  # digest of the dataset that it was trained on; empty: not known
        # It recommends from another version of its catalogue than the origin holds, or by other vectors of its items.
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
        """Name the artifact that holds this very recommender."""
        other = copy.copy(self)
        other.origin, other.dataset = origin, origin.manifest.parents.get("dataset", self.dataset)
        return other

    @property
    def active(self) -> Bool[np.ndarray, " items"]:
        """True at the item rows that may be recommended at all: not removed from the catalogue."""
        return self.catalog.active

    @property
    def scorer(self) -> Scorer:
        """Rankings and exact scores of the model, with the arrays that it reads, on the device."""
        return self._scorer

    @property
    def tables(self) -> ItemTables:
        """Item tables that the model reads, on the device."""
        return self._scorer.tables

    @property
    def codes(self) -> Int[np.ndarray, "items level"] | None:
        """The catalogue's codes, None where the model does not speak in codes."""
        return self.catalog.codes if self.spec.model.has_codes else None

    @property
    def tie_break(self) -> bool:
        """The last level of `codes` only tells colliding items apart."""
        return self.catalog.tie_break

    @property
    def repeats(self) -> bool:
        """False: it never recommends an item of the history, as nothing repeats in its training data."""
        return self.spec.repeat_factor > 0

    @property
    def conditions(self) -> ConditionSpec | None:
        """Conditions on what is recommended that the model knows; None: it knows none."""
        return self.spec.conditions

    @property
    def graph(self) -> ItemGraph | None:
        """The item graph that is mixed with the model."""
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

        With `catalog`, the folder of its catalogue, it recommends that one's current version (`with_version`), whose
        appended items are read in the further code `sequences` by the folders of those, by name.
        With `capacity_factor`, say 1.5, its tables hold so many times the items: `with_catalog` then compiles nothing.
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

        `metrics` (a `metrics.json` of `semid evaluate`, or what `semid.evaluate` gives) go into the card with their
        protocol, `license` into its head. A package that stands there is replaced.
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
        Gives the commit's address. Raises SemidError if the extra is missing or the hub refuses.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, metrics=metrics, license=license)
            return upload(folder, repo_id, message=message, private=private, revision=revision, token=token)

    def with_model(self, model: ItemModel) -> Recommender:
        """The same with another model of this `spec`; shares the item tables and the trie, which cost time to make."""
        other = copy.copy(self)
        other.origin, other.catalog_updated = None, False
        other._scorer = self._scorer.with_model(model)
        return other

    def with_graph(self, graph: ItemGraph | None, *, weight: float = 0.5) -> Recommender:
        """The same mixed with this item graph, of this weight, or with none; one program serves graphs of one width.

        Raises SemidError for a graph of other items than the catalogue's and for a weight out of range.
        """
        check_graph_weight(weight)
        if graph is not None:
            check_graph(graph, self.catalog.item_ids)
        return self._mixed(graph, dataclasses.replace(self.spec, graph_weight=0.0 if graph is None else weight))

    def with_repeat_factor(self, factor: float) -> Recommender:
        """The same with this factor of the model's probability of items in the history. Raises SemidError below 0."""
        return self._mixed(self._graph, dataclasses.replace(self.spec, repeat_factor=factor))

    def with_width(self, width: int | None) -> Recommender:
        """The same ranking by the first `width` numbers of its item vectors; None: all.

        A SASRec that was trained for several `widths` serves at each of them, with so much smaller an index. Raises
        SemidError for a generator of codes, and ValueError for a width that it was not trained for.
        """
        model = self.dense_model()
        config = dataclasses.replace(typing.cast(DenseConfig, self.spec.model), width=width)
        model.width = width
        other = self.with_model(model)
        other.spec = dataclasses.replace(self.spec, model=config)
        return other

    def _mixed(self, graph: ItemGraph | None, spec: ModelSpec) -> Recommender:
        """The same with another graph, and numbers of the mixture as this spec says."""
        other = copy.copy(self)
        other.origin, other.catalog_updated, other._graph = None, False, graph
        other.spec = spec
        other._scorer = self._scorer.with_mixture(other._mixture())
        return other

    def with_groups(self, items: typing.Any, *columns: str) -> Recommender:
        """The same with groups of its items, for `at_most`: columns of a table with `item_id`, such as a dataset's.

        A column holds strings or whole numbers, or lists of such: an item may be in several groups. Steps of a path
        (`Beauty > Hair Care`) are groups each; one that all items share is none. Columns may have the names of the
        dataset's own tables. Items that the table lacks, such as those appended later, are in no group, which limits
        nothing, until it is called again with a table that has them. Raises SemidError naming a column that is not
        there.
        """
        read = ("item_id", *columns)
        names = {own: theirs for own, theirs in self.catalog.source_columns.items() if own in read}
        other = copy.copy(self)
        other._groups = self._groups | groups_of(as_mapped_table(items, names, strings=read), columns, self.item_ids)
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
        """The same model on a later version of its catalogue: it recommends what was appended, not what was removed.

        Rows of the items that the model knows stay, those of all others follow in the order that they have there.
        `vectors` are raw ones of the others, the columns `spec.columns` side by side, for a model that reads any, and
        `graph_vectors` those that the item graph finds neighbors by (`vectors`, where not given), if there is one.
        `sequences` are later versions of the catalogues of further code sequences, by name; an item that none of them
        has is read without. A model that learned something of each item (SASRec, id embeddings) leaves the others out,
        where all are removed.
        The same programs run as long as the version fits the capacity of this; else they are compiled again.
        Raises SemidError where items or codes that the model knows differ, where vectors are missing, and for a model
        that learned something of each item if items were appended. Items that came later are in no group until
        `with_groups` is called again with a table that has them.
        """
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
        """`with_catalog` of a catalogue in the order of this, with the vectors of all items from the row `first` on."""
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
        other.catalog_updated = self.catalog_updated or not (same and other.items.has_inputs_of(self.items))
        other._scorer = other._build_scorer(self.model)
        return other

    def with_version(
        self,
        folder: str | Path,
        version: int | None = None,
        *,
        sequences: Mapping[str, str | Path] | None = None,
    ) -> Recommender:
        """`with_catalog` of the current, or a given, version of a catalogue folder, which holds appended vectors.

        Those of all items that training did not see are read as that version has them. `sequences` are folders of the
        catalogues of further code sequences, by name. No recommender goes back to a version that lacks items which it
        has: load the model again with that version, or revert the catalogue, which makes a later one.
        """
        found = read_version(folder, version)
        catalog, first = self._reordered(found.catalog), self._trained_items
        new, removed = catalog.item_ids[first:], ~catalog.active[first:]

        def appended(columns: tuple[str, ...], width: int) -> Float[np.ndarray, "new dim"]:
            vectors = appended_vectors(folder, columns, new, found.number, removed=removed)  # of no later version
            unread = removed.all() and vectors.shape[1] != width  # some column has no vectors, of items that are gone
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
        """Number of items of its training, whose rows come first and whose vectors stay."""
        return len(self.catalog) if self.spec.trained_items is None else self.spec.trained_items

    def _updated_graph(
        self, graph: ItemGraph, item_ids: pa.Array, first: int, vectors: Float[np.ndarray, "later dim"] | None
    ) -> ItemGraph:
        """The graph with the items behind its own, and with these vectors of all items from the row `first` on."""
        known = len(graph.item_ids)
        later = known - first
        try:
            if later and vectors is not None and graph.vectors is not None:
                everything = np.concatenate([graph.vectors[:first], vectors[:later]])
                if len(item_ids) == known and np.array_equal(everything, graph.vectors):
                    return graph
                graph = dataclasses.replace(graph, vectors=everything)  # `append` computes the edges again
            elif len(item_ids) == known:
                return graph
            return graph.append(item_ids[known:], vectors=None if vectors is None else vectors[later:])
        except ValueError as error:  # SemidError, or vectors of another width
            remedy = "" if graph.vectors is None else "; give those as graph_vectors"
            raise SemidError(f"item graph: {error}{remedy}") from None

    def _build_scorer(self, model: ItemModel) -> Scorer:
        """The scorer on tables of the catalogue, and, for models that search it, on its trie."""
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
        """The mixture, for tables of so many rows, or of the scorer's."""
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
        """A later version with the rows of this first. Raises SemidError where the model does not fit it."""
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

        The search keeps `beam_size` beams, or k if that is more. `allowed` says by item row (`allow` makes it of ids)
        what may be recommended, to all or to each history; with `exclude_seen`, what a history holds may not. Both are
        part of the search: whatever is allowed can be found, and where less than k is, the list is shorter.

        `boosts` multiply the probabilities of items, for freshness or a business rule, and enter the search too, at the
        price of an exact score of each; the scores of boosted items are then no log-probabilities. `graph_weight`
        replaces the weight of the item graph: 0 is the model alone, 1 the graph alone, which may know fewer than k.

        `condition` says what is wanted, of a model that was trained to be asked: `{"event": "buy"}`, a `group` of
        items, a `text`, or a `Condition`; one for all histories or one for each; any where there is none. `events` are
        those of the histories' items, a list for each, None where one is unknown; `times` are in seconds, a list for
        each, for a model that reads times (unknown without). To who has no history none of these matters. `values` of
        events, `{"click": 1, "buy": 2.5}`, rank what the beams find by expected value, for a model that was trained
        with an event head; scores are then its logarithms.

        `at_most` limits the items of one group in a list, `{"brand": 2}` (`with_groups` gives their groups): the best
        that leave room are chosen one by one, of all that the beams find, so that narrow limits want wide beams.
        `sample` draws the list without replacement instead of taking the best; its scores are not sorted then.
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
        """True at the rows of these items: what is in stock, say; masks combine by `&`, `|` and `~`.

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
        """Log-probability of each item after the history, and the item graph's part in it, with the items it came from.

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

        The answer to a history depends (to rounding) on no other.
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
        """Probabilities of the events (`conditions.events`) of each item, should it follow each history, with `events`
        and `times` of its items.

        They sum to one over the events. Raises SemidError for a model that was trained without an event head.
        """
        rows, wanted = self._histories(histories, skip_unknown, events, times), self.catalog.rows(item_ids)
        return np.exp(self.event_log_probs(rows, wanted))

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
        """Conditions that items with these events meet, of which the named parts alone: to ask for each target by what
        it is. Raises SemidError for parts that the model does not know."""
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
        """The `item_vectors` of a dataset's items, in its order, to teach what is trained on it.

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
        """The kind of this generator of codes and its folder, for messages."""
        return f"a generator of codes, {self.spec.model.title}{f' of {self.origin.folder}' if self.origin else ''}"

    @property
    def model(self) -> ItemModel:
        """The model and its parameters, which it shares."""
        return self._scorer.model

    def dense_model(self, *, remedy: str = "take a SASRec model") -> DenseTransformer:
        """The model, of a dense recommender. Raises SemidError with the `remedy` for a generator of codes."""
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

        -inf of items that the search leaves out: those removed and, where nothing repeats, all of a history, however
        long.
        """
        return self._ranking(graph_weight).log_probs(
            histories, rows, conditions=self._conditions(condition, len(histories))
        )

    def catalog_log_probs(
        self, histories: Histories, *, graph_weight: float | None = None, condition: ConditionLike = None
    ) -> Float[np.ndarray, "histories items"]:
        """`log_probs` of all items, at the price of fewer: those that begin alike share the computation."""
        conditions = self._conditions(condition, len(histories))
        return self._ranking(graph_weight).catalog_log_probs(histories, conditions=conditions)

    def most_popular(self, k: int) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """The items most popular in training, and their scores: what is recommended to who has no history."""
        rows, scores = self._ranking(None).most_popular(1, k, None)
        return rows[0], scores[0]

    def _ranking(self, graph_weight: float | None) -> Ranking:
        """Rankings and scores of item rows, by another weight of the graph if one is given."""
        return Ranking(self._weighted(graph_weight), self.spec, self.catalog, self._popularity)

    def _values(
        self, values: Mapping[str, float] | None, conditions: Conditions | None
    ) -> Float[np.ndarray, " events"] | None:
        """Values of the model's events. Raises SemidError where they cannot be asked for."""
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
        """Conditions of so many histories, in numbers."""
        return as_conditions(condition, number=number, spec=self.conditions, items=self.items.conditions)

    def _histories(
        self,
        histories: Iterable[Iterable[Id]],
        skip_unknown: bool,
        events: Iterable[Sequence[str | None]] | None = None,
        times: Iterable[Sequence[float]] | None = None,
    ) -> Histories:
        """Histories of external ids, of names of events, and of times, in numbers."""
        return read_histories(
            histories,
            self.catalog,
            conditions=self.conditions,
            skip_unknown=skip_unknown,
            events=events,
            times=times,
        )
