"""How a model answers a batch of histories: by search over codes, by scoring every item, or by both."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from semid.recommender.spec import ItemTables, Model, ModelSpec, inputs_at
from seq_models import (
    CodeTrie,
    DenseTransformer,
    HybridTransformer,
    ItemMask,
    LeafBlocks,
    Normalization,
    beam_search,
    catalog_log_probs,
    item_log_probs,
)

# Items that are scored at once in a pass over all: their logits stay in cache.
_LEAVES = 512


class Question(NamedTuple):
    """Histories of item rows, and what may be answered; `allowed` and `denied` are None where all or none are.

    `segments` is 1 where `history` holds an item. `allowed` has one row for all histories, or one for each; `denied`
    are item rows, -1 for none.
    """

    history: Int[Array, "b t"]
    segments: Int[Array, "b t"]
    allowed: Bool[Array, "b items"] | None = None
    denied: Int[Array, "b n"] | None = None


class Answer(NamedTuple):
    """Item rows, best first, and their log-probabilities; -1 and -inf where there are fewer."""

    rows: Int[Array, "b k"]
    scores: Float[Array, "b k"]


@dataclass(frozen=True, eq=False)
class Scorer:
    """A model's parameters and the tables that it reads, on the device."""

    graph: Any
    params: Any
    tables: ItemTables

    def with_model(self, model: Model) -> Scorer:
        """The same of another model of its kind: shares the tables, which cost time to make."""
        graph, params = _split(model)
        return replace(self, graph=graph, params=params)

    def top(self, question: Question, *, k: int, beam_size: int) -> Answer:
        """The k best items; a search has at least k beams."""
        raise TypeError(f"{type(self).__name__} does not say how it ranks")

    def log_probs(self, question: Question, rows: Int[Array, " n"]) -> Float[Array, "b n"]:
        """Exact log-probabilities of item rows."""
        return self.catalog_log_probs(question)[:, rows]

    def catalog_log_probs(self, question: Question) -> Float[Array, "b items"]:
        """Those of all items."""
        raise TypeError(f"{type(self).__name__} does not say how it scores")


def make_scorer(model: Model, spec: ModelSpec, tables: ItemTables, trie: CodeTrie | None) -> Scorer:
    """The scorer of the model's family; `trie` is that of the catalogue, for models of codes."""
    if isinstance(model, DenseTransformer):
        return DenseScorer(*_split(model), tables)
    if trie is None:
        raise TypeError(f"{type(model).__name__} is searched over a trie")
    kind = HybridScorer if isinstance(model, HybridTransformer) else CodeScorer
    return kind(*_split(model), tables, trie, spec.normalization)


@dataclass(frozen=True, eq=False)
class CodeScorer(Scorer):
    """Ranks by a generator of codes, searched with beams over the catalogue's trie."""

    trie: CodeTrie
    normalization: Normalization

    def top(self, question: Question, *, k: int, beam_size: int) -> Answer:
        beam_size = max(beam_size, k)
        return _search(
            self.graph,
            self.params,
            self.tables,
            self.trie,
            question,
            k=k,
            beam_size=beam_size,
            normalization=self.normalization,
        )

    def log_probs(self, question: Question, rows: Int[Array, " n"]) -> Float[Array, "b n"]:
        return _code_log_probs(
            self.graph, self.params, self.tables, self.trie, question, rows, normalization=self.normalization
        )

    def catalog_log_probs(self, question: Question) -> Float[Array, "b items"]:
        """Each prefix of codes is computed once for all items behind it."""
        return _catalog_log_probs(
            self.graph,
            self.params,
            self.tables,
            self.trie,
            question,
            blocks=LeafBlocks.of(self.trie, _LEAVES),
            normalization=self.normalization,
        )


@dataclass(frozen=True, eq=False)
class DenseScorer(Scorer):
    """Ranks by a model that scores every item at once."""

    def top(self, question: Question, *, k: int, beam_size: int) -> Answer:
        return _dense_top(self.graph, self.params, self.tables, question, k=k)

    def catalog_log_probs(self, question: Question) -> Float[Array, "b items"]:
        return _dense_log_probs(self.graph, self.params, self.tables, question)


@dataclass(frozen=True, eq=False)
class HybridScorer(CodeScorer):
    """Ranks, by its dense head, what the beams find and all items that training never saw (LIGER)."""

    def top(self, question: Question, *, k: int, beam_size: int) -> Answer:
        beam_size = max(beam_size, k)
        found = super().top(question, k=beam_size, beam_size=beam_size)
        return _ranked_union(self.graph, self.params, self.tables, question, found.rows, k=k)

    def log_probs(self, question: Question, rows: Int[Array, " n"]) -> Float[Array, "b n"]:
        return self.catalog_log_probs(question)[:, rows]

    def catalog_log_probs(self, question: Question) -> Float[Array, "b items"]:
        """Those of the dense head, by which it ranks."""
        return _dense_log_probs(self.graph, self.params, self.tables, question)


def _split(model: Model) -> tuple[Any, Any]:
    """Graph and parameters, these on the device: training hands them over in host memory."""
    graph, params = nnx.split(model)
    return graph, jax.device_put(params)


# Jitted at module level with the graph as a static argument: a model with new parameters runs in the same program.


@functools.partial(jax.jit, static_argnums=0, static_argnames=("k", "beam_size", "normalization"))
def _search(
    graph: Any,
    params: Any,
    tables: ItemTables,
    trie: CodeTrie,
    question: Question,
    *,
    k: int,
    beam_size: int,
    normalization: Normalization,
) -> Answer:
    model = nnx.merge(graph, params)
    context = model.read(inputs_at(tables, question.history), question.segments)
    mask = None
    if question.allowed is not None or question.denied is not None:
        mask = ItemMask.of(trie, allowed=question.allowed, denied=question.denied, codes=tables.codes)
    beams = beam_search(
        functools.partial(model.step, context),
        model.start(context),
        trie,
        batch=question.history.shape[0],
        beam_size=beam_size,
        num_results=k,
        normalization=normalization,
        mask=mask,
    )
    return Answer(beams.rows, beams.log_probs)


@functools.partial(jax.jit, static_argnums=0, static_argnames="normalization")
def _code_log_probs(
    graph: Any,
    params: Any,
    tables: ItemTables,
    trie: CodeTrie,
    question: Question,
    rows: Int[Array, " n"],
    *,
    normalization: Normalization,
) -> Float[Array, "b n"]:
    model = nnx.merge(graph, params)
    context = model.read(inputs_at(tables, question.history), question.segments)
    codes = jnp.broadcast_to(tables.codes[rows][None], (question.history.shape[0], *tables.codes[rows].shape))
    step, start = functools.partial(model.step, context), model.start(context)
    return item_log_probs(step, start, codes, trie=trie, normalization=normalization)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("blocks", "normalization"))
def _catalog_log_probs(
    graph: Any,
    params: Any,
    tables: ItemTables,
    trie: CodeTrie,
    question: Question,
    *,
    blocks: LeafBlocks,
    normalization: Normalization,
) -> Float[Array, "b items"]:
    model = nnx.merge(graph, params)
    context = model.read(inputs_at(tables, question.history), question.segments)
    step, start = functools.partial(model.step, context), model.start(context)
    batch = question.history.shape[0]
    return catalog_log_probs(step, start, trie, batch=batch, blocks=blocks, normalization=normalization)


@functools.partial(jax.jit, static_argnums=0)
def _dense_log_probs(graph: Any, params: Any, tables: ItemTables, question: Question) -> Float[Array, "b items"]:
    return jax.nn.log_softmax(_dense_scores(nnx.merge(graph, params), tables, question), axis=-1)


@functools.partial(jax.jit, static_argnums=0, static_argnames="k")
def _dense_top(graph: Any, params: Any, tables: ItemTables, question: Question, *, k: int) -> Answer:
    log_probs = jax.nn.log_softmax(_dense_scores(nnx.merge(graph, params), tables, question), axis=-1)
    return _best(_only_allowed(log_probs, question), k)


@functools.partial(jax.jit, static_argnums=0, static_argnames="k")
def _ranked_union(
    graph: Any, params: Any, tables: ItemTables, question: Question, found: Int[Array, "b beam"], *, k: int
) -> Answer:
    log_probs = jax.nn.log_softmax(_dense_scores(nnx.merge(graph, params), tables, question), axis=-1)
    user = jnp.arange(found.shape[0])[:, None]
    taken = jnp.broadcast_to(~tables.known[None], log_probs.shape)
    taken = taken.at[user, _or_none(found, len(tables.known))].set(True, mode="drop")
    return _best(_only_allowed(jnp.where(taken, log_probs, -jnp.inf), question), k)


def _dense_scores(model: Any, tables: ItemTables, question: Question) -> Float[Array, "b items"]:
    """Logits of every row, -inf of those that hold no item."""
    if isinstance(model, DenseTransformer):
        scores = model.scores(model.vectors(tables.features), question.history, question.segments)
    else:
        states = model.read(inputs_at(tables, question.history), question.segments)
        scores = model.scores(states, model.vectors(tables.features))
    return scores if tables.alive is None else jnp.where(tables.alive[None], scores, -jnp.inf)


def _only_allowed(scores: Float[Array, "b items"], question: Question) -> Float[Array, "b items"]:
    if question.allowed is not None:
        scores = jnp.where(question.allowed, scores, -jnp.inf)
    if question.denied is not None:
        user = jnp.arange(scores.shape[0])[:, None]
        scores = scores.at[user, _or_none(question.denied, scores.shape[1])].set(-jnp.inf, mode="drop")
    return scores


def _or_none(rows: Int[Array, "b n"], size: int) -> Int[Array, "b n"]:
    """Item rows, with what is no item (-1) behind the last, where a scatter drops it."""
    return jnp.where(rows < 0, size, rows)


def _best(scores: Float[Array, "b items"], k: int) -> Answer:
    values, rows = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    missing = ((0, 0), (0, k - rows.shape[1]))
    rows = jnp.pad(jnp.where(values == -jnp.inf, -1, rows), missing, constant_values=-1)
    return Answer(rows, jnp.pad(values, missing, constant_values=-jnp.inf))
