"""Log-probabilities of items against a float64 sum over each item's codes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from seq_models.scoring import LeafBlocks, catalog_log_probs, item_log_probs
from seq_models.search import SoftmaxOver, beam_search
from seq_models.trie import Capacity, CodeTrie

SIZES, ITEMS, BATCH, DIM = (4, 3, 6, 2), 50, 3, 4
either_softmax = pytest.mark.parametrize("softmax_over", list(SoftmaxOver), ids=lambda n: n.value)


def make_codes(seed: int) -> np.ndarray:
    """Some items share their codes."""
    codes = np.random.default_rng(seed).integers(0, SIZES, size=(ITEMS, len(SIZES)))
    codes[-5:] = codes[:5]
    return codes


def make_tables(seed: int):
    rng = np.random.default_rng([seed, 1])
    embed = [rng.normal(size=(size, DIM)).astype(np.float32) for size in SIZES]
    heads = [2 * rng.normal(size=(BATCH, DIM, size)).astype(np.float32) for size in SIZES]
    return embed, heads


@functools.cache
def reference(seed: int, softmax_over: SoftmaxOver) -> np.ndarray:
    embed, heads = jax.tree.map(lambda x: np.asarray(x, np.float64), make_tables(seed))
    items = [tuple(row) for row in make_codes(seed).tolist()]
    scores = np.zeros((BATCH, ITEMS))
    for row, item in enumerate(items):
        state = np.ones(DIM)
        for level, code in enumerate(item):
            logits = state @ heads[level]
            among = sorted({other[level] for other in items if other[:level] == item[:level]})
            every = logits[:, among] if softmax_over is SoftmaxOver.CHILDREN else logits
            scores[:, row] += logits[:, code] - logsumexp(every, axis=-1)
            state = 0.5 * state + embed[level][code]
    return scores


def step_of(tables):
    """The state of a beam is found in the cache through its ancestor at the step before."""
    embed, heads = tables

    def step(cache, prefixes):
        state, level = jnp.ones((BATCH, 1, DIM)), prefixes.level
        if level > 0:
            before = jnp.take_along_axis(cache[level - 1], prefixes.ancestors[..., level - 1, None], axis=1)
            state = 0.5 * before + jnp.asarray(embed[level - 1])[prefixes.codes[..., level - 1]]
        return jnp.einsum("bnd,bds->bns", state, heads[level]), (*cache, state)

    return step


@functools.partial(jax.jit, static_argnames="softmax_over")
def score(tables, codes, trie=None, *, softmax_over):
    return item_log_probs(step_of(tables), (), codes, trie=trie, softmax_over=softmax_over)


@functools.partial(jax.jit, static_argnames=("blocks", "softmax_over"))
def score_all(tables, trie, *, blocks, softmax_over):
    options = {"batch": BATCH, "blocks": blocks, "softmax_over": softmax_over}
    return catalog_log_probs(step_of(tables), (), trie, **options)


@either_softmax
def test_item_log_probs_equal_the_reference(softmax_over):
    for seed in range(3):
        codes = make_codes(seed)
        shown = np.broadcast_to(codes, (BATCH, *codes.shape))
        trie = CodeTrie.from_codes(codes, SIZES, capacity=Capacity(60, SIZES, 5))
        found = score(make_tables(seed), shown, trie, softmax_over=softmax_over)
        np.testing.assert_allclose(found, reference(seed, softmax_over), rtol=1e-5, atol=1e-5)


def test_codes_of_no_item_score_minus_infinity():
    trie = CodeTrie.from_codes(np.array([[0, 0, 0, 0], [3, 2, 5, 1]]), SIZES)
    codes = jnp.array([[0, 0, 0, 0], [0, 0, 0, 1], [4, 2, 5, 1], [-1, 0, 0, 0], [3, 2, 5, 1]])
    codes = jnp.broadcast_to(codes[None], (BATCH, *codes.shape))
    vocabulary = score(make_tables(0), codes, softmax_over=SoftmaxOver.VOCABULARY)
    assert np.isfinite(vocabulary[0]).tolist() == [True, True, False, False, True]  # (0, 0, 0, 1) has one of its own
    children = score(make_tables(0), codes, trie, softmax_over=SoftmaxOver.CHILDREN)
    assert np.isfinite(children[0]).tolist() == [True, False, False, False, True]
    assert not np.isnan(vocabulary).any()
    assert not np.isnan(children).any()
    with pytest.raises(ValueError, match="CHILDREN needs a trie"):
        item_log_probs(step_of(make_tables(0)), (), codes, softmax_over=SoftmaxOver.CHILDREN)


@either_softmax
@pytest.mark.parametrize("size", [1, 7, 45, 1000])
@pytest.mark.parametrize("capacity", [None, Capacity(60, SIZES, 5)], ids=["exact", "padded"])
def test_the_whole_catalogue_scored_in_blocks_equals_the_reference(capacity, size, softmax_over):
    trie = CodeTrie.from_codes(make_codes(0), SIZES, capacity=capacity)
    found = score_all(make_tables(0), trie, blocks=LeafBlocks.from_trie(trie, size), softmax_over=softmax_over)
    assert found.shape == (BATCH, trie.num_items)
    np.testing.assert_allclose(found[:, :ITEMS], reference(0, softmax_over), rtol=1e-5, atol=1e-5)
    assert np.all(found[:, ITEMS:] == -np.inf)


def test_a_search_of_all_beams_finds_the_same_log_probabilities():
    trie = CodeTrie.from_codes(make_codes(1), SIZES)
    beams = jax.jit(lambda t: beam_search(step_of(make_tables(1)), (), t, batch=BATCH, beam_size=ITEMS))(trie)
    options = {"blocks": LeafBlocks.from_trie(trie, 8), "softmax_over": SoftmaxOver.VOCABULARY}
    found = score_all(make_tables(1), trie, **options)
    np.testing.assert_allclose(jnp.take_along_axis(found, beams.rows, axis=1), beams.log_probs, rtol=1e-5, atol=1e-5)


def test_blocks_hold_a_prefix_about_once():
    codes = np.stack(np.unravel_index(np.random.default_rng(0).permutation(4 * 4 * 16), (4, 4, 16)), axis=-1)
    trie = CodeTrie.from_codes(codes, (4, 4, 16))
    assert LeafBlocks.from_trie(trie, 64) == (64, 4, (1, 4, 64))
    assert LeafBlocks.from_trie(trie, 24) == (24, 11, (2, 2, 24))
    assert LeafBlocks.from_trie(trie, 1000) == (1000, 1, (4, 16, 256))
    with pytest.raises(ValueError, match="at least 1 leaf, got 0"):
        LeafBlocks.from_trie(trie, 0)
