"""SASRec: scores are inner products of states with the vectors that are its inputs too."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seq_models import DenseConfig, DenseTransformer, ItemTables, TrainingBatch, TransformerConfig
from seq_models.layers import Precision

CONFIG = DenseConfig(TransformerConfig(dim=8, layers=1, heads=2, hidden=12))
IDS, FEATURES = 11, 3
HISTORY = np.array([[3, 1, 4, 1, 0], [5, 9, 2, 6, 10]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], np.int32)


@functools.cache
def model(num_features):
    return DenseTransformer(CONFIG, num_items=IDS, num_features=num_features, rngs=nnx.Rngs(0))


@jax.jit
def scores_of(model, vectors, history=HISTORY, segments=SEGMENTS):
    return model.scores(vectors, jnp.asarray(history), jnp.asarray(segments))


@jax.jit
def states_of(model, vectors, key=None):
    return model.states(vectors, jnp.asarray(HISTORY), jnp.asarray(SEGMENTS), key=key)


def features():
    return jnp.asarray(np.random.default_rng(0).normal(size=(IDS, FEATURES)), jnp.float32)


def test_vectors_are_the_table_plus_the_projected_features():
    m = model(FEATURES)
    table, kernel, bias = (np.asarray(x[...]) for x in (m.ids.embedding, m.project.kernel, m.project.bias))
    np.testing.assert_allclose(m.vectors(features()), table + np.asarray(features()) @ kernel + bias, atol=1e-5)
    np.testing.assert_array_equal(m.vectors(None), table)
    assert model(0).project is None
    np.testing.assert_array_equal(model(0).vectors(features()), model(0).ids.embedding[...])


@pytest.mark.parametrize("num_features", [0, FEATURES])
def test_scores_are_inner_products_with_the_last_state(num_features):
    m = model(num_features)
    vectors = m.vectors(features())
    states = np.asarray(states_of(m, vectors))
    scores = scores_of(m, vectors)
    assert scores.shape == (2, IDS)
    np.testing.assert_allclose(scores, np.stack([states[0, 3], states[1, 4]]) @ np.asarray(vectors).T, atol=1e-5)


def test_output_is_tied_to_the_vectors():
    """An id outside the histories has its own score doubled by doubling its vector, and no other's changed."""
    vectors = np.asarray(model(0).vectors(None))
    outer, inner = vectors.copy(), vectors.copy()
    outer[7] *= 2
    inner[3] += np.arange(8)
    before, after, inside = (np.asarray(scores_of(model(0), each)) for each in (vectors, outer, inner))
    np.testing.assert_allclose(after, np.where(np.arange(IDS) == 7, 2.0, 1.0) * before, atol=1e-6)
    assert np.abs(inside[0, :3] - before[0, :3]).max() > 1e-4  # an id inside is an input as well


def test_scores_ignore_padding_and_heed_order():
    vectors = model(0).vectors(None)
    scores = np.asarray(scores_of(model(0), vectors))
    alone = scores_of(model(0), vectors, HISTORY[:1, :4], SEGMENTS[:1, :4])
    np.testing.assert_allclose(scores[:1], alone, atol=1e-5)
    other = HISTORY.copy()
    other[0, 4] = 8
    np.testing.assert_array_equal(scores, scores_of(model(0), vectors, other))
    left = scores_of(model(0), vectors, np.roll(HISTORY[:1], 1, axis=1), np.roll(SEGMENTS[:1], 1, axis=1))
    np.testing.assert_allclose(left, alone, atol=1e-5)
    assert np.abs(scores_of(model(0), vectors, HISTORY[:, [1, 0, 2, 3, 4]]) - scores).max() > 1e-4


def test_dropout_is_used_with_a_key_alone():
    vectors = model(0).vectors(None)
    plain, again, dropped = (np.asarray(states_of(model(0), vectors, key)) for key in (None, None, jax.random.key(0)))
    np.testing.assert_array_equal(plain, again)
    assert np.abs(dropped - plain).max() > 1e-2


def test_bfloat16_scores_are_float32_and_close():
    rough = DenseTransformer(
        DenseConfig(replace(CONFIG.backbone, dtype=Precision.BFLOAT16)),
        num_items=IDS,
        num_features=FEATURES,
        rngs=nnx.Rngs(0),
    )
    with jax.numpy_dtype_promotion("standard"):  # dot_product_attention itself promotes
        got, expected = (scores_of(m, m.vectors(features())) for m in (rough, model(FEATURES)))
        states = states_of(rough, rough.vectors(None))
    assert got.dtype == jnp.float32
    got, expected = np.asarray(got), np.asarray(expected)
    assert 1e-4 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05
    assert states.dtype == jnp.bfloat16  # as the loss multiplies them


def test_the_gradient_reaches_every_parameter():
    graph, params = nnx.split(model(FEATURES))

    def loss(params):
        m = nnx.merge(graph, params)
        return jnp.sum(
            jax.nn.log_softmax(m.scores(m.vectors(features()), *map(jnp.asarray, (HISTORY, SEGMENTS))))[:, 0]
        )

    gradients = jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params))
    assert [jax.tree_util.keystr(path) for path, g in gradients if not g.any()] == []


def test_the_loss_is_summed_over_widths_and_a_slice_ranks_alone():
    nested = DenseConfig(CONFIG.backbone, widths=(2, 4), width=4)
    m = DenseTransformer(nested, num_items=IDS, rngs=nnx.Rngs(0))
    targets, weights = np.array([[1, 4, 1, 7, -1], [9, 2, 6, 10, 8]]), np.ones((2, 5), np.float32)
    weights[0, 4] = 0
    batch = TrainingBatch(jnp.asarray(HISTORY), jnp.asarray(SEGMENTS), jnp.asarray(targets))
    tables = ItemTables(jnp.zeros((IDS, 1), jnp.int32), None, jnp.ones(IDS, bool))

    def loss(config):
        one = DenseTransformer(config, num_items=IDS, rngs=nnx.Rngs(0))
        return float(jax.jit(lambda one: one.loss_terms(tables, batch)["loss/item"])(one))

    states, vectors = np.asarray(states_of(m, m.vectors(None))), np.asarray(m.vectors(None))
    of_width = {}
    for width in (2, 4, 8):
        log_probs = jax.nn.log_softmax(states[..., :width] @ vectors[:, :width].T)
        own = np.take_along_axis(np.asarray(log_probs), np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        of_width[width] = -(own * weights).sum() / weights.sum()
    assert loss(nested) == pytest.approx(of_width[8] + 0.1 * (of_width[2] + of_width[4]), rel=1e-5)
    assert loss(replace(nested, width_weight=1.0)) == pytest.approx(sum(of_width.values()), rel=1e-5)
    assert loss(CONFIG) == pytest.approx(of_width[8], rel=1e-5)  # control: without widths the full one alone
    scores = scores_of(m, m.vectors(None))
    last = np.stack([states[0, 3], states[1, 4]])
    np.testing.assert_allclose(scores, last[:, :4] @ vectors[:, :4].T, atol=1e-5)
    with pytest.raises(ValueError, match="expected widths of 1 to dim 8, got 9"):
        DenseConfig(CONFIG.backbone, widths=(4, 9))
    with pytest.raises(ValueError, match="expected a width_weight above 0, got 0"):
        DenseConfig(CONFIG.backbone, width_weight=0)
