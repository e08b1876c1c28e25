"""RQ-Transformer: its equations in float64, tied heads, the state it reads. What every model does: test_models.py."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seq_models import (
    Inputs,
    ItemTables,
    RQTransformer,
    RQTransformerConfig,
    TeacherItems,
    TrainingBatch,
    TransformerConfig,
)

SIZES = (3, 5, 4)
BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=12, dropout=0.3)
CONFIGS = {
    "tied": RQTransformerConfig(BACKBONE, depth_layers=2, depth_dropout=0.1),
    "untied": RQTransformerConfig(BACKBONE, tied_heads=False, depth_hidden=20, scaled_codes=True),
    "no depth": RQTransformerConfig(BACKBONE, depth_layers=0),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def build(config, **inputs):
    """A model far from its initialisation: every parameter random, the biases too."""
    model = RQTransformer(config, level_sizes=SIZES, rngs=nnx.Rngs(0), **inputs)
    graph, params = nnx.split(model)
    rng = np.random.default_rng(0)
    return graph, jax.tree.map(lambda x: x + jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), params)


@functools.cache
def model(name):
    return nnx.merge(*build(CONFIGS[name]))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, params, codes, targets):
    m, segments = nnx.merge(graph, params), jnp.ones(codes.shape[:2], jnp.int32)
    return m.states(Inputs(codes), segments), m.decode(Inputs(codes), segments, targets).logits


def states_and_logits(name, codes, targets):
    return _logits(*nnx.split(model(name)), codes, targets)


@jax.jit
def logits_of(model, inputs, segments, targets, key=None):
    return model.decode(inputs, segments, targets, key=key).logits


@jax.jit
def terms_of(model, tables, batch):
    return model.loss_terms(tables, batch)


@jax.jit
def history_of(model, codes, segments):
    return model.encode_history(Inputs(codes), segments)


def random_codes(seed, *shape):
    return np.random.default_rng(seed).integers(0, SIZES, (*shape, len(SIZES))).astype(np.int32)


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def array(parameter):
    return np.asarray(parameter[...], np.float64)


def rms_norm(x, norm):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * array(norm.scale)


def reference_block(block, x):
    """One block over `[n, level, dim]` in float64, with a causal mask over all levels at once."""
    _, levels, dim = x.shape
    q, k, v = np.einsum("nli,ijhw->jnlhw", rms_norm(x, block.norm_attention), array(block.attention.qkv.kernel))
    powers = np.exp(np.einsum("nqhw,nkhw->nhqk", q, k) / (dim // 2) ** 0.5) * np.tri(levels)
    mixed = np.einsum("nhqk,nkhw->nqhw", powers / powers.sum(axis=-1, keepdims=True), v).reshape(x.shape)
    x = x + mixed @ array(block.attention.out.kernel)
    gate, value = np.einsum("nli,ijh->jnlh", rms_norm(x, block.norm_feed), array(block.feed.up.kernel))
    return x + (gate / (1 + np.exp(-gate)) * value) @ array(block.feed.down.kernel)


@every_config
def test_logits_against_all_levels_at_once_in_float64(name):
    """Equation 9 for every level, the blocks, and the head: training and search share their code, this does not."""
    m, codes = model(name), random_codes(3, 2, 4)
    states, found = states_and_logits(name, random_codes(4, 2, 4), codes)
    embedded = np.stack([array(table.embedding)[codes[..., j]] for j, table in enumerate(m.tables)], axis=2)
    before = (np.cumsum(embedded, axis=2) - embedded) * (8**0.5 if CONFIGS[name].scaled_codes else 1)
    x = np.asarray(states, np.float64)[:, :, None] + before + array(m.levels.embedding)
    x = x.reshape(8, 3, -1)
    for block in m.depth:
        x = reference_block(block, x)
    x, heads = rms_norm(x, m.norm), m.heads or m.tables
    for level, logits in enumerate(found):
        expected = x[:, level] @ array(heads[level].embedding).T + array(m.biases[level])
        close(logits.reshape(expected.shape), expected, 1e-4)


def test_tied_heads_are_the_input_tables():
    """The table of the last level is read by no level of one item's, so logits depend on it as a head or not at all."""
    inputs, segments, targets = Inputs(random_codes(4, 1, 2)), np.ones((1, 2), np.int32), random_codes(5, 1, 2)

    def moved(name):
        changed = nnx.merge(*build(CONFIGS[name]))
        before = np.asarray(logits_of(changed, inputs, segments, targets)[2])
        table = np.array(changed.tables[2].embedding[...])
        table[(inputs.codes[..., 2].max() + 1) % 4] += 1  # unread
        changed.tables[2].embedding[...] = jax.device_put(table)
        return bool(np.any(np.asarray(logits_of(changed, inputs, segments, targets)[2]) != before))

    assert set(np.asarray(inputs.codes[..., 2]).ravel()) != {0, 1, 2, 3}
    assert moved("no depth")
    assert not moved("untied")


def test_read_is_the_state_of_the_last_item_whatever_stands_behind_it():
    m, codes = model("tied"), random_codes(5, 1, 6)
    short = history_of(m, codes[:, :4], np.ones((1, 4), np.int32))
    segments, behind, rolled = np.array([[1, 1, 1, 1, 0, 0]], np.int32), codes.copy(), np.roll(codes, 2, axis=1)
    behind[:, 4:] = 0
    close(history_of(m, codes, segments), short)
    close(history_of(m, behind, segments), short)
    close(history_of(m, rolled, np.array([[0, 0, 1, 1, 1, 1]], np.int32)), short)
    packed = jax.jit(lambda m, codes, rows: m.states(Inputs(codes), rows))(m, rolled, np.array([[1, 1, 2, 2, 2, 2]]))
    close(np.asarray(packed)[:, 5], short)
    other = codes.copy()
    other[:, 0] = (other[:, 0] + 1) % 3
    assert np.abs(np.asarray(history_of(m, other, segments)) - short).max() > 1e-3


def test_dropout_of_the_depth_decoder_is_its_own():
    """With none in the backbone, a key changes nothing but through the depth decoder."""
    still = replace(BACKBONE, dropout=0.0)
    inputs, segments, targets = Inputs(random_codes(6, 1, 6)), np.ones((1, 6), np.int32), random_codes(7, 1, 6)

    def moved(rate):
        m = nnx.merge(*build(RQTransformerConfig(still, depth_dropout=rate)))
        keys = (None, jax.random.key(0))
        plain, dropped = (np.asarray(logits_of(m, inputs, segments, targets, key)[0]) for key in keys)
        return np.abs(dropped - plain).max() > 1e-3

    assert moved(0.1)
    assert not moved(0.0)


def test_the_dense_head_is_trained_as_sasrec_is():
    """By cross-entropy over all items but the history's, half of it to a teacher's; codes have theirs as before."""
    codes, features = random_codes(8, 6), np.random.default_rng(9).normal(size=(6, 2)).astype(np.float32)
    tables = ItemTables.from_arrays(codes, features, np.ones(6, np.int32))
    history, targets = np.array([[0, 1, 2]], np.int32), np.array([[1, 2, 5]], np.int32)
    batch = jax.device_put(TrainingBatch(history, np.ones((1, 3), np.int32), targets)).without_repeats()
    rows = jnp.asarray([[[3, 4], [5, -1], [-1, -1]]], jnp.int32)  # a teacher names two items, one, and none
    scores = jnp.asarray([[[0.3, 1.2], [2.0, -jnp.inf], [-jnp.inf, -jnp.inf]]])
    taught = batch._replace(teacher=TeacherItems(rows, scores))
    with_head = RQTransformerConfig(BACKBONE, id_embedding=True, dense_share=0.4)
    graph, params = build(with_head, num_items=6, num_features=2)
    m = nnx.merge(graph, params)
    terms = terms_of(m, tables, batch)
    states = np.asarray(m.states(tables.inputs(jnp.asarray(history)), batch.segments), np.float64)[0]
    vectors = array(m.ids.embedding) + features @ array(m.project.kernel) + array(m.project.bias)
    powers = np.exp(states @ vectors.T / 8**0.5)
    of_target = [
        p[target] / p[place + 1 :].sum() for place, (p, target) in enumerate(zip(powers, targets[0], strict=True))
    ]
    close(terms["loss/dense"], -np.log(of_target).mean(), 1e-4)
    left = [p[place + 1 :].sum() for place, p in enumerate(powers)]
    e = np.exp([0.3, 1.2])
    of_teacher = (e / e.sum()) @ np.log(powers[0, 3:5] / left[0]), np.log(powers[1, 5] / left[1]), np.log(of_target[2])
    of_both = (np.log(of_target) + of_teacher) / 2
    close(terms_of(m, tables, taught)["loss/dense"], -of_both.mean(), 1e-4)
    without, _ = build(replace(with_head, dense_share=0.0), num_items=6, num_features=2)
    alone = terms_of(nnx.merge(without, params), tables, batch)
    assert set(terms) - set(alone) == {"loss/dense"}
    close(terms["loss/level"], alone["loss/level"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth_dropout": 1.5}, r"^depth_dropout 1\.5 must lie in \[0, 1\)$"),
        ({"depth_dropout": -0.1}, r"^depth_dropout -0\.1 must lie in"),
        ({"depth_hidden": 0}, r"^expected depth_hidden of at least 1, got 0$"),
        ({"depth_layers": -1}, "^expected depth_layers of at least 0, got -1$"),
        ({"dense_share": 1.0, "id_embedding": True}, r"^expected a dense_share of at least 0 and below 1, got 1\.0$"),
        ({"dense_share": 0.4}, r"^the dense head knows items by the embeddings of their ids; set id_embedding too$"),
    ],
)
def test_the_config_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        RQTransformerConfig(BACKBONE, **change)
    RQTransformerConfig(BACKBONE, depth_layers=0, depth_dropout=0.0)
