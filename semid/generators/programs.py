"""The training step and the search of a generator, traced from sizes alone, without data or parameters."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from semid.config import check_range
from semid.errors import SemidError
from semid.generators.conditions import ConditionsConfig
from semid.generators.objective import LossTables, generator_loss
from semid.generators.training import GeneratorConfig
from semid.recommender import ModelSpec, Scorer
from semid.training import (
    ROWS,
    PackedRows,
    TrainState,
    abstract_state,
    bound_loss,
    divisible_batch_size,
    make_optimizer,
    make_step,
    replicated,
    row_parts,
    table_sharding,
    used_shardings,
)
from seq_models import CodeTrie, ItemModel, ItemTables, Layout, RequestBatch, SoftmaxOver


@dataclass(frozen=True)
class ProgramSizes:
    """Sizes of a catalogue and of requests, in place of real ones."""

    items: int = 12_000
    """Items of the catalogue."""
    level_sizes: tuple[int, ...] = (256, 256, 256)
    """Codebook size of each level."""
    num_features: int = 0
    """Width of the dense input; 0: none. End to end: width of the content vectors."""
    item_dim: int = 64
    """Width of the item vectors that end-to-end training computes from content."""
    users: int = 512
    """Histories per search, over all devices."""
    beam_size: int = 50
    """Beams of a search, and items per list."""
    leaf_items: int = 4
    """Largest number of items that share all codes."""

    def __post_init__(self) -> None:
        check_range(self, "items", "item_dim", "users", "beam_size", "leaf_items", at_least=1)


def training_program(config: GeneratorConfig, sizes: ProgramSizes, mesh: Mesh) -> tuple[jax.stages.Traced, TrainState]:
    """Trace the training step for a batch of the config's size; also returns the shapes of its state."""
    model, training = _model(config, sizes), config.training
    constrained = config.objective.normalization is SoftmaxOver.CHILDREN
    batch_size = divisible_batch_size(training.batch_size, rows=1 << 62, mesh=mesh, accumulate=training.accumulate)
    optimizer = make_optimizer(training.optimizer, num_steps=10_000)
    step = make_step(
        model,
        optimizer,
        bound_loss(generator_loss, objective=config.objective),
        tables=LossTables(_tables(sizes), abstract_trie(sizes) if constrained else None),
        seed=0,
        num_steps=10_000,
        mesh=mesh,
        accumulate=training.accumulate,
        rates=training.optimizer.rates,
    )
    single = model.layout is Layout.SINGLE
    length = config.max_history if single else config.row_length
    rows = _array(np.int32, batch_size, length, sharding=NamedSharding(mesh, ROWS))
    last = _array(np.int32, batch_size, sharding=NamedSharding(mesh, ROWS))
    state = abstract_state(model, optimizer, mesh)
    return step.trace(state, PackedRows(rows, last if single else rows, rows)), state


def search_program(config: GeneratorConfig, sizes: ProgramSizes, mesh: Mesh) -> jax.stages.Traced:
    """Trace the search for `sizes.users` histories, which are divided among the devices.

    Parameters are sharded along `tensor` alone, large item tables over all devices; the trie and small tables are
    replicated.
    """
    if sizes.users % row_parts(mesh):
        raise SemidError(f"{sizes.users} users do not divide among {row_parts(mesh)} devices; change either")
    graph, params = nnx.split(_model(config, sizes))
    everywhere, layout = replicated(mesh), used_shardings(params, mesh)
    params = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params, layout)
    trie = abstract_trie(sizes) if config.model.has_codes else None
    trie = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), trie)
    tables = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=table_sharding(x, mesh)), _tables(sizes)
    )
    rows = _array(np.int32, sizes.users, config.max_history, sharding=NamedSharding(mesh, ROWS))
    scorer = Scorer(graph, params, tables, trie, config.objective.normalization)
    with jax.set_mesh(mesh):
        return scorer.trace_top(RequestBatch(rows, rows), k=sizes.beam_size, beam_size=sizes.beam_size)


def abstract_trie(sizes: ProgramSizes) -> CodeTrie:
    """Shapes of a trie of `sizes.items` items whose nodes have a child for every code, as far as there are items."""
    nodes = tuple(itertools.accumulate(sizes.level_sizes, lambda n, size: min(n * size, sizes.items)))
    parents = (1, *nodes[:-1])
    types = [np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.int32 for size in sizes.level_sizes]
    return CodeTrie(
        tokens=tuple(_array(kind, n) for kind, n in zip(types, nodes, strict=True)),
        child_start=tuple(_array(np.int32, n + 1) for n in parents),
        leaf_start=_array(np.int32, nodes[-1] + 1),
        item_rows=_array(np.int32, sizes.items),
        level_sizes=sizes.level_sizes,
        fan_outs=tuple(min(size, n) for size, n in zip(sizes.level_sizes, nodes, strict=True)),
        max_leaf_items=sizes.leaf_items,
    )


def check_sizes(config: GeneratorConfig) -> None:
    """Raise SemidError for settings whose sizes depend on a dataset, and for distillation, which needs a teacher."""
    if config.conditions != ConditionsConfig():
        raise SemidError("the sizes of conditions are a dataset's, and there is none: leave conditions out")
    if config.objective.state_column:
        raise SemidError("the width of state_column is a dataset's, and there is none: leave it out")
    if config.objective.distillation:
        raise SemidError("distillation reads a teacher's ranking, and there is no teacher: leave distillation out")


def _model(config: GeneratorConfig, sizes: ProgramSizes) -> ItemModel:
    check_sizes(config)
    spec = ModelSpec(config.model, sizes.level_sizes, sizes.items, sizes.num_features, config.max_history)
    return nnx.eval_shape(lambda: spec.build(seed=0))


def _tables(sizes: ProgramSizes) -> ItemTables:
    features = _array(np.float32, sizes.items, sizes.num_features) if sizes.num_features else None
    return ItemTables(_array(np.int32, sizes.items, len(sizes.level_sizes)), features, _array(bool, sizes.items))


def _array(kind: Any, *shape: int, sharding: NamedSharding | None = None) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=sharding)
