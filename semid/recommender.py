"""`Recommender`: a trained model and its catalogue, from external item ids to external item ids."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from flax import nnx
from jaxtyping import Array, Float, Int

from semid import artifacts, config
from semid.catalog import FILE as CATALOG_FILE
from semid.catalog import SemanticCatalog
from semid.data.histories import Histories
from semid.errors import SemidError
from semid.training.state import named_leaves, replace_leaves
from seq_models import (
    Beams,
    CodeTrie,
    DenseConfig,
    DenseTransformer,
    Inputs,
    RQTransformer,
    RQTransformerConfig,
    beam_search,
    item_log_probs,
)

KIND = "model"
SPEC_FILE = "config.json"
ModelConfig = RQTransformerConfig | DenseConfig

# Users a search runs at once, at the default beam; wider beams take proportionally fewer.
_BATCH, _BEAM = 512, 50
# Exact scoring holds this many (history, item) pairs at once.
_PAIRS = 1 << 16
# A dense model scores every item of the catalogue: this many scores (64 MiB) at once.
_SCORES = 1 << 24


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build the model anew: its config, the catalogue's levels, the width of its dense input."""

    model: ModelConfig
    level_sizes: tuple[int, ...]
    num_items: int
    num_features: int
    max_history: int


class ItemTables(NamedTuple):
    """Per item row, on the device: the codes, and the dense input if the model has one."""

    codes: Int[Array, "items level"]
    features: Float[Array, "items feature"] | None


@dataclass(frozen=True)
class Recommendations:
    """Best first. `item_ids[i]` may be shorter than k; `scores` are log-probabilities, -inf where there is no item."""

    item_ids: list[list[str]]
    scores: Float[np.ndarray, "histories k"]


def build_model(spec: ModelSpec, *, seed: int) -> RQTransformer | DenseTransformer:
    """The model of `spec` with parameters drawn from `seed`."""
    rngs = nnx.Rngs(seed)
    if isinstance(spec.model, DenseConfig):
        return DenseTransformer(spec.model, num_ids=spec.num_items, num_features=spec.num_features, rngs=rngs)
    return RQTransformer(
        spec.model, level_sizes=spec.level_sizes, num_features=spec.num_features, num_ids=spec.num_items, rngs=rngs
    )


def inputs_at(tables: ItemTables, rows: Int[Array, "b t"]) -> Inputs:
    """What the generator reads at positions that hold these item rows."""
    dense = None if tables.features is None else tables.features[rows]
    return Inputs(tables.codes[rows], dense, rows)


class Recommender:
    """Recommends items of `catalog` to histories of its items.

    `features` is the model's dense input, `train_counts` how often each item occurs in training: a history without
    items is answered with the items most popular there, scored by the log of their smoothed share (the documented
    cold start). It is a `Ranker` for `semid.evaluate`.
    """

    def __init__(
        self,
        model: RQTransformer | DenseTransformer,
        catalog: SemanticCatalog,
        *,
        spec: ModelSpec,
        features: Float[np.ndarray, "items feature"] | None,
        train_counts: Int[np.ndarray, " items"],
    ) -> None:
        self.catalog, self.spec = catalog, spec
        self._features, self._train_counts = features, train_counts
        tables = ItemTables(jnp.asarray(catalog.codes), None if features is None else jnp.asarray(features))
        self._scorer: _CodeScorer | _DenseScorer
        if isinstance(model, DenseTransformer):
            self._scorer = _DenseScorer(*_split(model), tables.features)
        else:
            trie = CodeTrie.from_codes(catalog.codes, catalog.level_sizes)
            self._scorer = _CodeScorer(*_split(model), tables, trie)

    @property
    def item_ids(self) -> pa.Array:
        """External ids, by item row."""
        return self.catalog.item_ids

    @property
    def codes(self) -> Int[np.ndarray, "items level"] | None:
        """The catalogue's codes, None where the model does not speak in codes."""
        return self.catalog.codes if isinstance(self._scorer, _CodeScorer) else None

    @property
    def tie_break(self) -> bool:
        """Whether the last level of `codes` only tells colliding items apart."""
        return self.catalog.tie_break

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Recommender:
        """Load what `semid train` wrote, every file verified. Raises SemidError naming what is wrong."""
        path = Path(path)
        artifacts.read_artifact(path, KIND)
        spec = config.from_dict(ModelSpec, artifacts.read_json(path / SPEC_FILE), where=str(path / SPEC_FILE))
        model = build_model(spec, seed=0)
        graph, state = nnx.split(model)
        file = path / "model.safetensors"
        model = nnx.merge(graph, replace_leaves(state, artifacts.load_tensors(file), where=str(file)))
        items = artifacts.load_tensors(path / "items.safetensors")
        return cls(
            model,
            SemanticCatalog.read(path / CATALOG_FILE),
            spec=spec,
            features=items.get("features"),
            train_counts=items["train_counts"],
        )

    def with_model(self, model: RQTransformer | DenseTransformer) -> Recommender:
        """The same with another model of this `spec`; shares the item tables and the trie, which cost time to make."""
        other = copy.copy(self)
        graph, params = _split(model)
        other._scorer = replace(self._scorer, graph=graph, params=params)
        return other

    def write(self, folder: Path) -> None:
        """Write config, parameters, item tables and catalogue into the folder of an artifact under construction."""
        artifacts.write_json(folder / SPEC_FILE, config.to_dict(self.spec))
        state = jax.device_get(self._scorer.params)
        artifacts.save_tensors(folder / "model.safetensors", named_leaves(state))
        items = {"train_counts": self._train_counts}
        artifacts.save_tensors(
            folder / "items.safetensors", items if self._features is None else items | {"features": self._features}
        )
        self.catalog.write(folder / CATALOG_FILE)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        *,
        k: int = 10,
        beam_size: int = _BEAM,
        exclude_seen: bool = False,
        skip_unknown: bool = False,
    ) -> Recommendations:
        """The k best items for each history of external ids, oldest first. How wide each is searched: see `rank`.

        Raises SemidError for an unknown id, unless `skip_unknown` drops it.
        """
        rows = Histories.from_lists(self._history_rows(histories, skip_unknown))
        ranked, scores = self._rank(rows, k=k, beam_size=beam_size, exclude_seen=exclude_seen)
        ids = [self.item_ids.take(pa.array(row[row >= 0])).to_pylist() for row in ranked]
        return Recommendations(ids, scores)

    def score(
        self, histories: Sequence[Sequence[str]], item_ids: Sequence[str], *, skip_unknown: bool = False
    ) -> Float[np.ndarray, "histories items"]:
        """Exact log-probabilities of the given items after each history.

        Raises SemidError for an unknown id, in a history or among the items.
        """
        rows = Histories.from_lists(self._history_rows(histories, skip_unknown))
        return self.log_probs(rows, self.catalog.rows(item_ids))

    def rank(
        self, histories: Histories, *, k: int, exclude_seen: bool, beam_size: int = _BEAM
    ) -> Int[np.ndarray, "n k"]:
        """Item rows best first, -1 where there are fewer than k.

        The answer to a history depends (to rounding) on no other. Each is searched with `beam_size` beams if k plus,
        with `exclude_seen`, the number of distinct items seen is at most `beam_size`; otherwise the beam is doubled
        until it is wide enough, up to the size of the catalogue.
        """
        return self._rank(histories, k=k, beam_size=beam_size, exclude_seen=exclude_seen)[0]

    def item_vectors(self) -> Float[np.ndarray, "items dim"]:
        """The vectors by which a dense model scores its items. Raises SemidError for a model that speaks in codes."""
        model = nnx.merge(self._scorer.graph, self._scorer.params)
        if not isinstance(model, DenseTransformer):
            raise SemidError("item vectors are those of a dense model (SASRec); this one speaks in codes")
        return np.asarray(model.vectors(None if self._features is None else jnp.asarray(self._features)))

    def log_probs(self, histories: Histories, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "histories n"]:
        """Exact log-probabilities of item rows after each history (of popularity, after an empty one)."""
        scores = np.empty((len(histories), len(rows)), np.float32)
        width = min(len(rows), _PAIRS) or 1
        for index, history, segments in _batches(histories, self.spec.max_history, self._at_once(_PAIRS // width)):
            for start in range(0, len(rows), width):
                block = np.resize(rows[start : start + width], width)  # one shape; what repeats is cut off again
                values = np.asarray(self._scorer.log_probs(history, segments, jnp.asarray(block)))
                kept = slice(start, min(start + width, len(rows)))
                scores[index, kept] = values[: len(index), : kept.stop - kept.start]
        scores[histories.lengths == 0] = self._popularity()[rows]
        return scores

    def _rank(
        self, histories: Histories, *, k: int, beam_size: int, exclude_seen: bool
    ) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        if k < 1 or beam_size < 1:
            raise SemidError(f"expected k and beam_size of at least 1, got {k} and {beam_size}")
        ranked = np.full((len(histories), k), -1, np.int32)
        scores = np.full((len(histories), k), -np.inf, np.float32)
        needed = np.full(len(histories), k, np.int64)
        if exclude_seen:
            needed += np.bincount(self._seen(histories) // len(self.catalog), minlength=len(histories))
        widths = _widths(needed, beam_size, len(self.catalog))
        for width in np.unique(widths).tolist():
            part = np.flatnonzero(widths == width)
            some = histories.take(part)
            size = self._at_once(_BATCH * _BEAM // max(width, _BEAM))
            for index, history, segments in _batches(some, self.spec.max_history, size):
                found = self._scorer.top(history, segments, width)
                rows, values = np.array(found[0])[: len(index)], np.array(found[1])[: len(index)]
                kept = self._kept(rows, values, some.take(index), exclude_seen, k)
                ranked[part[index]], scores[part[index]] = kept
        return ranked, scores

    def _kept(
        self, rows: np.ndarray, values: np.ndarray, histories: Histories, exclude_seen: bool, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first k entries, without seen items if asked; popularity's where the history is empty."""
        empty = histories.lengths == 0
        if empty.any():
            popularity = self._popularity()
            best = np.argsort(-popularity, kind="stable")[: rows.shape[1]]
            rows[empty, :], values[empty, :] = -1, -np.inf
            rows[empty, : len(best)], values[empty, : len(best)] = best, popularity[best]
        if exclude_seen:
            keys = np.arange(len(rows))[:, None] * len(self.catalog) + rows
            rows = np.where(np.isin(keys, self._seen(histories)) & (rows >= 0), -1, rows)
        first = np.argsort(rows < 0, axis=1, kind="stable")[:, :k]
        rows, values = np.take_along_axis(rows, first, axis=1), np.take_along_axis(values, first, axis=1)
        missing = ((0, 0), (0, k - rows.shape[1]))
        values = np.where(rows >= 0, values, -np.inf)
        return np.pad(rows, missing, constant_values=-1), np.pad(values, missing, constant_values=-np.inf)

    def _seen(self, histories: Histories) -> Int[np.ndarray, " pairs"]:
        """The distinct pairs of history and item, each as index of the history * number of items + item row."""
        items, owner = histories.flat()
        return np.unique(owner * len(self.catalog) + items)

    def _at_once(self, histories: int) -> int:
        """So many histories, at least one, and no more than a dense model can score all items for."""
        most = histories if isinstance(self._scorer, _CodeScorer) else min(histories, _SCORES // len(self.catalog))
        return max(most, 1)

    def _popularity(self) -> Float[np.ndarray, " items"]:
        counts = self._train_counts + 1.0
        return np.log(counts / counts.sum()).astype(np.float32)

    def _history_rows(self, histories: Sequence[Sequence[str]], skip_unknown: bool) -> list[list[int]]:
        result = []
        for index, history in enumerate(histories):
            if isinstance(history, str):
                raise SemidError(f"history {index} is the string {history!r}; expected a list of item ids")
            rows, known = self.catalog.find_rows(list(history))
            if not known.all() and not skip_unknown:
                unknown = [history[at] for at in np.flatnonzero(~known).tolist()]
                raise SemidError(
                    f"history {index}: unknown item id {unknown[0]!r} ({len(unknown)} of {len(history)} unknown); "
                    "correct it, or drop such items with skip_unknown=True (--skip-unknown)"
                )
            result.append(rows[known].tolist())
        return result


@dataclass(frozen=True, eq=False)
class _CodeScorer:
    """Ranks by a generator of codes, searched with beams over the catalogue's trie."""

    graph: Any
    params: Any
    tables: ItemTables
    trie: CodeTrie

    def top(self, history: Array, segments: Array, width: int) -> tuple[Array, Array]:
        beams = _search(self.graph, self.params, self.tables, self.trie, history, segments, beam_size=width)
        return beams.rows, beams.log_probs

    def log_probs(self, history: Array, segments: Array, rows: Array) -> Array:
        return _code_log_probs(self.graph, self.params, self.tables, history, segments, rows)


@dataclass(frozen=True, eq=False)
class _DenseScorer:
    """Ranks by a model that scores every item at once."""

    graph: Any
    params: Any
    features: Array | None

    def top(self, history: Array, segments: Array, width: int) -> tuple[Array, Array]:
        return _dense_top(self.graph, self.params, self.features, history, segments, width=width)

    def log_probs(self, history: Array, segments: Array, rows: Array) -> Array:
        return _dense_log_probs(self.graph, self.params, self.features, history, segments)[:, rows]


def _split(model: RQTransformer | DenseTransformer) -> tuple[Any, Any]:
    """Graph and parameters, these on the device: training hands them over in host memory."""
    graph, params = nnx.split(model)
    return graph, jax.device_put(params)


# Jitted at module level with the graph as a static argument: a model with new parameters runs in the same program.


@functools.partial(jax.jit, static_argnums=0, static_argnames="beam_size")
def _search(
    graph: Any, params: Any, tables: ItemTables, trie: CodeTrie, history: Array, segments: Array, *, beam_size: int
) -> Beams:
    model = nnx.merge(graph, params)
    states = model.read(inputs_at(tables, history), segments)
    return beam_search(functools.partial(model.step, states), model.start(states), trie, beam_size=beam_size)


@functools.partial(jax.jit, static_argnums=0)
def _code_log_probs(
    graph: Any, params: Any, tables: ItemTables, history: Array, segments: Array, rows: Array
) -> Float[Array, "b n"]:
    model = nnx.merge(graph, params)
    states = model.read(inputs_at(tables, history), segments)
    codes = jnp.broadcast_to(tables.codes[rows][None], (len(history), *tables.codes[rows].shape))
    return item_log_probs(functools.partial(model.step, states), model.start(states), codes)


@functools.partial(jax.jit, static_argnums=0)
def _dense_log_probs(
    graph: Any, params: Any, features: Array | None, history: Array, segments: Array
) -> Float[Array, "b items"]:
    model = nnx.merge(graph, params)
    return jax.nn.log_softmax(model.scores(model.vectors(features), history, segments), axis=-1)


@functools.partial(jax.jit, static_argnums=0, static_argnames="width")
def _dense_top(
    graph: Any, params: Any, features: Array | None, history: Array, segments: Array, *, width: int
) -> tuple[Array, Array]:
    log_probs = _dense_log_probs(graph, params, features, history, segments)
    values, rows = jax.lax.top_k(log_probs, min(width, log_probs.shape[-1]))
    return rows, values


def _widths(needed: Int[np.ndarray, " n"], beam_size: int, num_items: int) -> Int[np.ndarray, " n"]:
    """`beam_size`, doubled until it covers what is needed, at most all items: few widths, so few programs."""
    widths = np.full(len(needed), min(beam_size, num_items), np.int64)
    while (narrow := widths < np.minimum(needed, num_items)).any():
        widths[narrow] *= 2
    return np.minimum(widths, num_items)


def _batches(histories: Histories, max_history: int, size: int) -> Iterator[tuple[np.ndarray, Array, Array]]:
    """Indices, and histories and segments padded to few shapes: `size` users, or a power of two for the last few."""
    for start in range(0, len(histories), size):
        index = np.arange(start, min(start + size, len(histories)))
        rows, real = histories.take(index).padded(max_history)
        missing = ((0, min(size, 1 << (len(index) - 1).bit_length()) - len(index)), (0, 0))
        yield index, jnp.asarray(np.pad(rows, missing)), jnp.asarray(np.pad(real, missing).astype(np.int32))
