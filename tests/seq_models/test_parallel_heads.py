"""Parallel heads: their equations in float64, and a ranking that is that of an enumeration."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seq_models import (
    CodeTrie,
    Inputs,
    ItemTables,
    ParallelHeadsConfig,
    RequestBatch,
    SoftmaxOver,
    TransformerConfig,
    beam_search,
)

SIZES = (3, 5, 4)
CONFIG = ParallelHeadsConfig(TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0), temperature=0.2)
CODES = np.array(list(itertools.product(*map(range, SIZES))))[::3]  # a third of all codes are items
HISTORIES = jnp.asarray([[1, 16, 0], [4, 5, 6]]), jnp.asarray([[1, 1, 0], [1, 1, 1]])


@pytest.fixture(scope="module")
def model():
    """A model whose every parameter is random, so that its residual blocks act."""
    graph, params = nnx.split(CONFIG.build(level_sizes=SIZES, num_items=0, num_features=0, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params))


@pytest.fixture(scope="module")
def state(model):
    return model.encode_history(Inputs(jnp.asarray(CODES)[HISTORIES[0]]), HISTORIES[1])


def level_log_probs(model, state):
    """log softmax(cos(x_l, e_l) / T) with x_l = h + silu(W_l h + b_l), by level."""
    h, found = np.asarray(state, np.float64), []
    for block, table in zip(model.blocks, model.tables, strict=True):
        z = h @ np.asarray(block.kernel[...], np.float64) + np.asarray(block.bias[...], np.float64)
        x, e = h + z / (1 + np.exp(-z)), np.asarray(table.embedding[...], np.float64)
        cosines = x @ e.T / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(e, axis=1))
        powers = np.exp(cosines / 0.2)
        found.append(np.log(powers / powers.sum(axis=1, keepdims=True)))
    return found


def sums(model, state, codes):
    return np.sum([of_level[:, codes[:, at]] for at, of_level in enumerate(level_log_probs(model, state))], axis=0)


def test_an_item_has_the_sum_of_its_levels_log_probabilities(model, state):
    tables, trie = ItemTables.from_arrays(CODES, None, np.ones(len(CODES), int)), CodeTrie.from_codes(CODES, SIZES)
    expected = sums(model, state, CODES)
    every = np.array(list(itertools.product(*map(range, SIZES))))
    np.testing.assert_allclose(np.exp(sums(model, state, every)).sum(axis=1), 1, rtol=1e-12)
    requests, k = RequestBatch(*HISTORIES), len(CODES)
    options = {"softmax_over": SoftmaxOver.VOCABULARY}
    whole = model.catalog_log_probs(tables, trie, requests, blocks=model.leaf_blocks(trie), **options)
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)
    rows = jnp.asarray([7, 0, 11])
    np.testing.assert_allclose(model.log_probs(tables, trie, requests, rows, **options), expected[:, rows], atol=1e-4)
    top = model.top(tables, trie, requests, k=k, beam_size=k, **options)
    for user in range(2):
        np.testing.assert_array_equal(top.rows[user], np.argsort(-expected[user]))


def test_the_order_of_the_codes_changes_no_probability(model, state):
    """The search goes through the levels in another order, and finds the same items with the same scores."""
    found = []
    for order in ([0, 1, 2], [2, 0, 1]):
        heads = [model.head(state, level)[:, None] for level in order]

        def step(cache, prefixes, heads=heads):
            logits = heads[prefixes.level]
            return jnp.broadcast_to(logits, (*prefixes.codes.shape[:2], logits.shape[-1])), cache

        trie = CodeTrie.from_codes(CODES[:, order], tuple(SIZES[at] for at in order))
        found.append(beam_search(step, (), trie, batch=2, beam_size=len(CODES), num_results=len(CODES)))
    np.testing.assert_array_equal(found[0].rows, found[1].rows)
    np.testing.assert_allclose(found[0].log_probs, found[1].log_probs, atol=1e-4)


def test_an_item_of_a_history_is_the_mean_of_its_codes(model):
    inputs = Inputs(jnp.asarray(CODES[None, :4]))
    embedded = [np.asarray(table.embedding[...])[CODES[None, :4, at]] for at, table in enumerate(model.tables)]
    np.testing.assert_allclose(model.item_states(inputs), np.mean(embedded, axis=0), atol=1e-6)


def test_heads_are_the_state_alone_at_first():
    fresh = CONFIG.build(level_sizes=SIZES, num_items=0, num_features=0, rngs=nnx.Rngs(1))
    state = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)
    unit = state / jnp.linalg.norm(state, axis=1, keepdims=True)
    table = fresh.tables[1].embedding[...]
    cosines = unit @ (table / jnp.linalg.norm(table, axis=1, keepdims=True)).T
    np.testing.assert_allclose(fresh.head(state, 1), cosines / 0.2, rtol=1e-5, atol=1e-5)


def test_the_temperature_is_checked():
    with pytest.raises(ValueError, match=r"^expected a temperature above 0, got 0$"):
        ParallelHeadsConfig(temperature=0)
    ParallelHeadsConfig(temperature=1)
