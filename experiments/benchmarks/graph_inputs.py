"""The item graph's best items as inputs of SASRec (retrieval in the literal sense), next to mixing with the graph.

    python -m experiments.benchmarks.graph_inputs --dataset ../shared/data/amazon14_beauty \
        --graph runs/amazon14_beauty/item-graph/model --out runs/graph_inputs

To the state after each item is added a learned map, zero at first, of the mean of the vectors of the graph's 32 best
items there, weighted by their shares; in training the graph is asked as if it had not counted the history. Two arms of
equal settings, those of `recipe.sasrec-text` at the default width: with these inputs, and with the map kept at zero.
Measured on the validation users, alone and mixed with the graph at the best of the weights 0, .1, ... .9. Test is not
read; what was interrupted goes on.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from experiments.configs import recipe
from experiments.layout import read_layout
from semid.data import Dataset, Examples, Histories
from semid.evaluation import accuracy, item_places, paired_bootstrap
from semid.generators import (
    GeneratorConfig,
    LossTables,
    ObjectiveConfig,
    as_teacher,
    content_features,
    generator_loss,
    training_counts,
    training_rows,
)
from semid.generators.distillation import TaughtHistories
from semid.graphs import ItemGraph, pruned
from semid.training import RunFolder, Task, train
from seq_models import CodeTrie, DenseConfig, ItemTables, TeacherItems, TrainingBatch, last_state
from seq_models.dense import DenseTransformer
from seq_models.layers import products
from seq_models.losses import item_cross_entropy

_ITEMS, _USERS = 32, 512
_WEIGHTS = np.arange(10) / 10


class GraphReader(DenseTransformer):
    """SASRec whose states use the graph's best items as input, if `reads`."""

    def __init__(self, config: DenseConfig, *, num_items: int, num_features: int, reads: bool, rngs: nnx.Rngs) -> None:
        super().__init__(config, num_items=num_items, num_features=num_features, rngs=rngs)
        dim = config.backbone.dim
        self.reads = reads
        self.found = nnx.Linear(dim, dim, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def with_found(
        self, states: Float[Array, "*n dim"], vectors: Float[Array, "items dim"], found: TeacherItems
    ) -> Float[Array, "*n dim"]:
        """States plus the input from the graph's items for the same history; unchanged without such items."""
        if not self.reads:
            return states
        shares = jnp.where(found.rows >= 0, jnp.exp(found.scores), 0.0)
        mean = jnp.einsum("...k,...kd->...d", shares, vectors[jnp.maximum(found.rows, 0)])
        mean /= jnp.maximum(shares.sum(axis=-1, keepdims=True), 1e-9)
        return states + self.found(mean * vectors.shape[-1] ** 0.5)

    def loss_terms(
        self,
        tables: ItemTables,
        batch: TrainingBatch,
        *,
        trie: CodeTrie | None = None,
        smoothing: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """SASRec's loss for these states."""
        vectors = self.vectors(tables.features)
        states = self.history_states(vectors, batch.history, batch.segments, key=key)
        assert batch.teacher is not None
        queries = self.with_found(states, vectors, batch.teacher)
        return {"loss": item_cross_entropy(queries, vectors, batch.targets, batch.weights, seen=batch.seen)}


def main(dataset: Path, graph: Path, out: Path, epochs: float = 20, seed: int = 0) -> None:
    """Train both arms, and print.

    Args:
        dataset: Folder of research data (see `experiments.layout`).
        graph: Item graph of these data.
        out: Folder for the trainings.
        epochs: Passes over the training data.
        seed: Seed of parameters, shuffling and dropout.
    """
    data, memory = read_layout(dataset), ItemGraph.load(graph)
    config = recipe.sasrec(features=None, epochs=epochs)
    objective = ObjectiveConfig(distillation=1.0, repeats=False, teacher_items=_ITEMS)
    config = replace(config, objective=objective)
    examples: Examples = data.splits.examples("validation")
    ndcg = {}
    for reads in (False, True):
        arm = "graph items read" if reads else "none read"
        model = _trained(data, memory, config, reads=reads, out=out / arm.replace(" ", "_"), seed=seed)
        by_weight = _by_weight(model, _tables(data), memory, examples)
        best = int(by_weight.mean(axis=1).argmax())
        ndcg[reads] = (by_weight[0], by_weight[best])
        means = [f"{one.mean():.4f}" for one in ndcg[reads]]
        print(f"{arm}: validation NDCG@10 {means[0]}, with the graph at {_WEIGHTS[best]}: {means[1]}")
    for name, ours, theirs in zip(("alone", "mixed"), ndcg[True], ndcg[False], strict=True):
        print(f"gain {name}: {paired_bootstrap(ours, theirs, users=examples.histories.users)}")


def _tables(data: Dataset) -> ItemTables:
    counts = training_counts(data)
    return ItemTables.from_arrays(np.zeros((len(counts), 1), np.int32), content_features(data, None), counts)


def _trained(
    data: Dataset, graph: ItemGraph, config: GeneratorConfig, *, reads: bool, out: Path, seed: int
) -> GraphReader:
    assert isinstance(config.model, DenseConfig)
    tables = _tables(data)
    width = 0 if tables.features is None else tables.features.shape[1]
    model = GraphReader(config.model, num_items=data.num_items, num_features=width, reads=reads, rngs=nnx.Rngs(seed))
    rows = TaughtHistories(
        training_rows(data, config, model.layout), as_teacher(graph, config.objective), config.objective
    )
    examples: Examples = data.splits.examples("validation")
    some = examples.take(np.random.default_rng(seed).permutation(len(examples))[: config.validation_users])
    task = Task(
        model,
        functools.partial(generator_loss, objective=config.objective),
        rows,
        tables=LossTables(tables),
        validate=lambda model: {"ndcg@10": float(_by_weight(model, tables, graph, some, _WEIGHTS[:1]).mean())},
        select="ndcg@10",
    )
    request = {"reads": reads, "epochs": config.training.epochs, "graph": graph.digest, "seed": seed}
    return train(task, config.training, run=RunFolder(out, request, title=out.name), seed=seed)


def _by_weight(
    model: GraphReader,
    tables: ItemTables,
    graph: ItemGraph,
    examples: Examples,
    weights: Float[np.ndarray, " w"] = _WEIGHTS,
) -> Float[np.ndarray, "w n"]:
    """NDCG@10 of every example at every weight of the graph, without items of the history."""
    items, found = np.arange(len(tables.known)), []
    for start in range(0, len(examples), _USERS):
        block = examples.take(np.arange(start, min(start + _USERS, len(examples))))
        q = graph.distribution(block.histories)
        probs = np.array(_probabilities(model, tables, *_padded(block.histories), _largest(q)))[: len(block)]
        seen = [block.histories[at] for at in range(len(block))]
        for at, row in enumerate(seen):
            probs[at, row] = 0
        probs /= probs.sum(axis=1, keepdims=True)
        dense = q.toarray()
        lists = [
            np.argsort(weight * -dense - (1 - weight) * probs, axis=1, kind="stable")[:, :10] for weight in weights
        ]
        found.append([accuracy(item_places(one, block.targets, items), (10,))["ndcg@10"] for one in lists])
    return np.concatenate([np.array(block) for block in found], axis=1)


@jax.jit
def _probabilities(
    model: GraphReader,
    tables: ItemTables,
    history: Int[Array, "b t"],
    segments: Int[Array, "b t"],
    found: TeacherItems,
) -> Float[Array, "b items"]:
    vectors = model.vectors(tables.features)
    states = last_state(model.history_states(vectors, history, segments), segments)
    return jax.nn.softmax(products(model.with_found(states, vectors, found), vectors, model.dtype))


def _padded(histories: Histories) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"]]:
    history, segments = (np.zeros((_USERS, 20), np.int32) for _ in range(2))
    for at in range(len(histories)):
        latest = histories[at][-20:]
        history[at, : len(latest)], segments[at, : len(latest)] = latest, 1
    return history, segments


def _largest(q: Any) -> TeacherItems:
    """The largest shares of each row, padded with -1."""
    best = pruned(q, _ITEMS)
    rows, scores = np.full((_USERS, _ITEMS), -1, np.int32), np.full((_USERS, _ITEMS), -np.inf, np.float32)
    owner = np.repeat(np.arange(best.shape[0]), np.diff(best.indptr))
    nth = np.arange(best.nnz) - np.repeat(best.indptr[:-1], np.diff(best.indptr))
    rows[owner, nth], scores[owner, nth] = best.indices, np.log(best.data)
    return TeacherItems(rows, scores)


if __name__ == "__main__":
    tyro.cli(main)
