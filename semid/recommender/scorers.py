"""A model's parameters and the tables it reads, on the device: rankings and exact scores of batches of histories."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from seq_models import CodeTrie, ItemModel, ItemTables, LeafBlocks, Mixture, RequestBatch, SoftmaxOver, TopK


@dataclass(frozen=True, eq=False)
class Scorer:
    """A model split into `graph` and `params`, with the item tables, the trie of a model of codes, and a mixture."""

    graph: Any
    params: Any
    tables: ItemTables
    trie: CodeTrie | None
    softmax_over: SoftmaxOver
    mixture: Mixture | None = None

    @classmethod
    def from_model(
        cls,
        model: ItemModel,
        *,
        tables: ItemTables,
        trie: CodeTrie | None,
        softmax_over: SoftmaxOver,
        mixture: Mixture | None = None,
    ) -> Scorer:
        """Build the scorer of any model."""
        return cls(*_split(model), tables, trie, softmax_over, mixture)

    def with_model(self, model: ItemModel) -> Scorer:
        """The scorer of another model of the same config; it shares the tables, which cost time to build."""
        graph, params = _split(model)
        return replace(self, graph=graph, params=params)

    def with_mixture(self, mixture: Mixture | None) -> Scorer:
        """The scorer with another mixture; it shares what was computed from model, tables and trie."""
        other, _ = replace(self, mixture=mixture), self.request_tables
        computed = ("request_tables", "_leaf_blocks")
        vars(other).update({name: vars(self)[name] for name in computed if name in vars(self)})
        return other

    @property
    def model(self) -> ItemModel:
        """The model, which shares the parameters."""
        return nnx.merge(self.graph, self.params)

    def top(self, requests: RequestBatch, *, k: int, beam_size: int) -> TopK:
        """The k best items per history; a search has at least k beams."""
        arguments, options = self._top_arguments(requests, k, beam_size)
        return _top(*arguments, **options)

    def trace_top(self, requests: RequestBatch, *, k: int, beam_size: int) -> jax.stages.Traced:
        """The program of `top`; parameters, tables and requests may be shapes."""
        arguments, options = self._top_arguments(requests, k, beam_size)
        return _top.trace(*arguments, **options)

    def _top_arguments(self, requests: RequestBatch, k: int, beam_size: int) -> tuple[tuple, dict[str, Any]]:
        beam_size = 0 if self.trie is None else max(beam_size, k)  # without a trie, one program for all beam sizes
        options = {"k": k, "beam_size": beam_size, "softmax_over": self.softmax_over}
        return (self.graph, self.params, self.request_tables, self.trie, requests, self.mixture), options

    def log_probs(self, requests: RequestBatch, rows: Int[Array, " n"]) -> Float[Array, "b n"]:
        """Exact log-probabilities of item rows."""
        arrays = (self.params, self.request_tables, self.trie, requests, rows, self.mixture)
        return _log_probs(self.graph, *arrays, softmax_over=self.softmax_over)

    def event_log_probs(self, requests: RequestBatch, rows: Int[Array, "b n"]) -> Float[Array, "b n event"]:
        """Logarithms of p(event | item, history) of each request's own items."""
        return _event_log_probs(self.graph, self.params, self.request_tables, requests, rows)

    def catalog_log_probs(self, requests: RequestBatch) -> Float[Array, "b items"]:
        """Exact log-probabilities of all items."""
        arrays = (self.params, self.request_tables, self.trie, requests, self.mixture)
        return _catalog_log_probs(self.graph, *arrays, blocks=self._leaf_blocks, softmax_over=self.softmax_over)

    @functools.cached_property
    def request_tables(self) -> ItemTables:
        """The tables with the item vectors that the model computes from them, once and not for every batch; without
        these if the tables are shapes."""
        if self.tables.item_vectors is not None:
            return self.tables
        arrays = (self.graph, self.params, self.tables)
        shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arrays[1:]))
        if shapes or _item_vectors.eval_shape(*arrays) is None:
            return self.tables
        return self.tables._replace(item_vectors=_item_vectors(*arrays))

    @functools.cached_property
    def _leaf_blocks(self) -> LeafBlocks | None:
        return self.model.leaf_blocks(self.trie)


def _split(model: ItemModel) -> tuple[Any, Any]:
    """Graph and parameters, which are committed to the device: training validates with committed ones and returns ones
    in host memory, and the search would be compiled for each kind."""
    graph, params = nnx.split(model)
    return graph, jax.tree.map(lambda x: jax.device_put(x, x.sharding), jax.device_put(params))


# Jitted at module level with the graph as a static argument: a model with new parameters runs in the same program.


@functools.partial(jax.jit, static_argnums=0, static_argnames=("k", "beam_size", "softmax_over"))
def _top(
    graph: Any,
    params: Any,
    tables: ItemTables,
    trie: CodeTrie | None,
    requests: RequestBatch,
    mixture: Mixture | None,
    **options: Any,
) -> TopK:
    return nnx.merge(graph, params).top(tables, trie, requests, mixture=mixture, **options)


@functools.partial(jax.jit, static_argnums=0)
def _item_vectors(graph: Any, params: Any, tables: ItemTables) -> Float[Array, "items dim"] | None:
    return nnx.merge(graph, params).item_vectors(tables)


@functools.partial(jax.jit, static_argnums=0)
def _event_log_probs(
    graph: Any, params: Any, tables: ItemTables, requests: RequestBatch, rows: Int[Array, "b n"]
) -> Float[Array, "b n event"]:
    return nnx.merge(graph, params).event_log_probs(tables, requests, rows)


@functools.partial(jax.jit, static_argnums=0, static_argnames="softmax_over")
def _log_probs(
    graph: Any,
    params: Any,
    tables: ItemTables,
    trie: CodeTrie | None,
    requests: RequestBatch,
    rows: Int[Array, " n"],
    mixture: Mixture | None,
    *,
    softmax_over: SoftmaxOver,
) -> Float[Array, "b n"]:
    options = {"softmax_over": softmax_over, "mixture": mixture}
    return nnx.merge(graph, params).log_probs(tables, trie, requests, rows, **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("blocks", "softmax_over"))
def _catalog_log_probs(
    graph: Any,
    params: Any,
    tables: ItemTables,
    trie: CodeTrie | None,
    requests: RequestBatch,
    mixture: Mixture | None,
    *,
    blocks: LeafBlocks | None,
    softmax_over: SoftmaxOver,
) -> Float[Array, "b items"]:
    options = {"blocks": blocks, "softmax_over": softmax_over, "mixture": mixture}
    return nnx.merge(graph, params).catalog_log_probs(tables, trie, requests, **options)
