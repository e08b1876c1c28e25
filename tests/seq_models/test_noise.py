"""Draws without replacement against the probabilities of all ordered samples, by chi-square."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import logsumexp
from scipy.stats import chisquare, kstest

from seq_models import (
    Boosts,
    CodeTrie,
    DenseConfig,
    GroupLimits,
    GumbelNoise,
    ItemMask,
    ItemTables,
    RequestBatch,
    RQTransformerConfig,
    SoftmaxOver,
    TransformerConfig,
    beam_search,
    request_noise,
)
from seq_models.noise import truncated

SIZES, DRAWS = (3, 4), 20_000
CODES = np.array([[0, 0], [0, 1], [0, 3], [1, 2], [2, 0], [2, 1], [2, 1]])  # the last two share a leaf
ITEMS, SHARING = len(CODES), np.array([1, 1, 1, 1, 1, 2, 2])
RNG = np.random.default_rng(0)
LOGITS = [RNG.normal(size=(1, 3)).astype(np.float32), RNG.normal(size=(3, 4)).astype(np.float32)]


def step(cache, prefixes):
    """Logits of the root, then of each first code."""
    if prefixes.level == 0:
        return jnp.broadcast_to(LOGITS[0][None], (prefixes.codes.shape[0], 1, 3)), cache
    return jnp.asarray(LOGITS[1])[prefixes.codes[..., 0]], cache


@functools.partial(jax.jit, static_argnames=("batch", "beam_size", "num_results", "softmax_over"))
def search(trie, noise, mask=None, *, batch=DRAWS, **options):
    return beam_search(step, (), trie, batch=batch, mask=mask, noise=noise, **options)


def log_probs(softmax_over: SoftmaxOver) -> np.ndarray:
    """Of items, those of a leaf in equal shares, by loops."""
    found = []
    for row, (first, second) in enumerate(CODES.tolist()):
        levels = [
            (LOGITS[0][0], first, set(CODES[:, 0])),
            (LOGITS[1][first], second, set(CODES[CODES[:, 0] == first, 1])),
        ]
        children = softmax_over is SoftmaxOver.CHILDREN
        total = sum(x[code] - logsumexp(x[sorted(among)] if children else x) for x, code, among in levels)
        found.append(total - np.log(SHARING[row]))
    return np.array(found)


def assert_drawn(lists: np.ndarray, weights: np.ndarray) -> None:
    """Ordered pairs at the head of the lists, against p(i) p(j) / (1 - p(i))."""
    p, rows = weights / weights.sum(), np.flatnonzero(weights)
    pairs = list(itertools.permutations(rows.tolist(), 2))
    expected = np.array([p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    counts = np.array([np.all(lists[:, :2] == pair, axis=1).sum() for pair in pairs])
    assert counts.sum() == len(lists)
    assert chisquare(counts, expected * len(lists)).pvalue > 1e-3
    even = np.full(len(pairs), len(lists) / len(pairs))
    assert chisquare(counts, even).pvalue < 1e-9  # control: the test tells distributions apart


@pytest.fixture(scope="module")
def trie() -> CodeTrie:
    return CodeTrie.from_codes(CODES, SIZES)


@pytest.mark.parametrize(
    ("softmax_over", "temperature", "denied"),
    [
        (SoftmaxOver.CHILDREN, 1.0, ()),
        (SoftmaxOver.VOCABULARY, 1.0, ()),
        (SoftmaxOver.VOCABULARY, 0.6, ()),
        (SoftmaxOver.CHILDREN, 2.5, ()),
        (SoftmaxOver.VOCABULARY, 1.0, (1, 5)),
        (SoftmaxOver.CHILDREN, 2.5, (3, 6)),
    ],
    ids=str,
)
def test_a_wide_beam_draws_items_without_replacement(trie, softmax_over, temperature, denied):
    mask, weights = None, np.exp(log_probs(softmax_over) / temperature)
    if denied:
        mask = ItemMask.from_items(trie, denied=np.array([denied]), codes=CODES)
        weights[list(denied)] = 0
    noise = request_noise(3, jnp.arange(DRAWS), temperature=temperature)
    beams = search(trie, noise, mask, beam_size=ITEMS, softmax_over=softmax_over)
    rows = np.asarray(beams.rows)
    assert_drawn(rows, weights)
    left = [row for row in range(ITEMS) if row not in denied]
    assert all(sorted(drawn[: len(left)]) == left for drawn in rows[:50].tolist())
    leaf = log_probs(softmax_over) + np.log(SHARING)
    found = np.asarray(beams.log_probs)[:50, : len(left)]
    np.testing.assert_allclose(found, leaf[rows[:50, : len(left)]], atol=1e-5)


def test_a_beam_as_wide_as_the_list_is_exact_where_nothing_is_left_out(trie):
    noise = request_noise(4, jnp.arange(DRAWS), temperature=1.0)
    beams = search(trie, noise, beam_size=2, softmax_over=SoftmaxOver.CHILDREN)
    assert_drawn(np.asarray(beams.rows), np.exp(log_probs(SoftmaxOver.CHILDREN)))


def test_above_temperature_one_items_of_small_and_large_leaves_are_drawn_alike():
    """16 items, all alike: eight in leaves of their own, eight in one."""
    codes = np.array([*([0, code] for code in range(8)), *[[1, 0]] * 8])
    trie = CodeTrie.from_codes(codes, (2, 8))
    np.testing.assert_array_equal(trie.item_counts(jnp.arange(2), level=1), [8, 8])

    @jax.jit
    def first(trie, noise):
        def even(cache, prefixes):
            return jnp.zeros((*prefixes.codes.shape[:2], (2, 8)[prefixes.level])), cache

        options = {"beam_size": 16, "softmax_over": SoftmaxOver.CHILDREN}
        return beam_search(even, (), trie, batch=4000, noise=noise, **options).rows[:, 0]

    drawn = np.bincount(first(trie, request_noise(0, jnp.arange(4000), temperature=2.0)), minlength=16)
    assert chisquare(drawn).pvalue > 1e-3


def test_at_a_temperature_near_zero_the_draw_is_the_list_of_the_beam():
    rng, sizes = np.random.default_rng(1), (6, 5, 7)
    codes = np.unique(rng.integers(0, sizes, size=(80, 3)), axis=0)
    tables = [rng.normal(size=(5, *sizes[: level + 1])).astype(np.float32) for level in range(3)]

    def of_prefix(cache, prefixes):
        user = jnp.arange(5)[:, None]
        return jnp.asarray(tables[prefixes.level])[(user, *jnp.moveaxis(prefixes.codes, -1, 0))], cache

    @functools.partial(jax.jit, static_argnames="drawn")
    def run(trie, noise, *, drawn):
        return beam_search(of_prefix, (), trie, batch=5, beam_size=9, noise=noise if drawn else None)

    trie = CodeTrie.from_codes(codes, sizes)
    best = run(trie, None, drawn=False)
    near, far = (run(trie, request_noise(0, jnp.arange(5), temperature=t), drawn=True) for t in (1e-4, 1.0))
    for one, other in zip(best, near, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (np.asarray(best.rows) != np.asarray(far.rows)).any()  # control


def test_moved_values_have_the_wanted_maximum_and_the_distribution_given_it():
    """The other values, of one location, are Gumbel's below the maximum: F(x) / F(maximum) is uniform."""
    values = jax.random.gumbel(jax.random.key(0), (4000, 3))
    moved = np.asarray(truncated(values, values.max(-1, keepdims=True), jnp.full((4000, 1), 1.5)))
    np.testing.assert_allclose(moved.max(axis=1), 1.5, atol=1e-6)
    others = np.sort(moved, axis=1)[:, :2].ravel()
    assert kstest(np.exp(-np.exp(-others) + np.exp(-1.5)), "uniform").pvalue > 1e-3


BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
MODELS = {
    "codes": (RQTransformerConfig(backbone=BACKBONE), SoftmaxOver.VOCABULARY),
    "children": (RQTransformerConfig(backbone=BACKBONE), SoftmaxOver.CHILDREN),
    "dense": (DenseConfig(backbone=BACKBONE), SoftmaxOver.VOCABULARY),
}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("k", "softmax_over"))
def top(graph, params, tables, trie, requests, *, k, softmax_over):
    model = nnx.merge(graph, params)
    return model.top(tables, trie, requests, k=k, beam_size=ITEMS, softmax_over=softmax_over)


@functools.partial(jax.jit, static_argnums=0, static_argnames="softmax_over")
def scores(graph, params, tables, trie, requests, *, softmax_over):
    every = jnp.arange(ITEMS, dtype=jnp.int32)
    return nnx.merge(graph, params).log_probs(tables, trie, requests, every, softmax_over=softmax_over)


@functools.cache
def built(name):
    config, softmax_over = MODELS[name]
    graph, params = nnx.split(config.build(level_sizes=SIZES, num_items=ITEMS, num_features=0, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), params)
    tables = ItemTables.from_arrays(CODES.astype(np.int32), None, np.ones(ITEMS, np.int64))
    return (graph, params, tables, CodeTrie.from_codes(CODES, SIZES)), softmax_over


def requests_of(users: int, **options) -> RequestBatch:
    history = jnp.broadcast_to(jnp.array([[4, 0, 2]], jnp.int32), (users, 3))
    return RequestBatch(history, jnp.ones_like(history), **options)


@pytest.mark.parametrize("name", MODELS)
def test_models_draw_from_their_own_probabilities_under_masks_and_boosts(name):
    model, softmax_over = built(name)
    denied = jnp.array([[3, -1]], jnp.int32)
    boosts = Boosts(jnp.array([[0, 6]], jnp.int32), jnp.array([[2.0, 0.5]]))
    log_p = np.asarray(scores(*model, requests_of(1, boosts=boosts), softmax_over=softmax_over))[0]
    weights = np.where(np.arange(ITEMS) == 3, 0, np.exp(log_p.astype(np.float64) / 0.8))
    noise = request_noise(1, jnp.arange(4000), temperature=0.8)
    asked = requests_of(4000, denied=jnp.broadcast_to(denied, (4000, 2)), boosts=boosts, noise=noise)
    found = top(*model, asked, k=2, softmax_over=softmax_over)
    assert_drawn(np.asarray(found.rows), weights)
    np.testing.assert_allclose(found.scores[:9], log_p[np.asarray(found.rows[:9])], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_draw_depends_on_its_own_key_alone_and_limits_cut_it(name):
    model, softmax_over = built(name)
    noise = request_noise(2, jnp.arange(6), temperature=1.0)
    whole = top(*model, requests_of(6, noise=noise), k=ITEMS, softmax_over=softmax_over)
    alone = top(*model, requests_of(6, noise=GumbelNoise(noise.keys[::-1], noise.temperature)), k=ITEMS,
                softmax_over=softmax_over)  # fmt: skip
    np.testing.assert_array_equal(whole.rows[::-1], alone.rows)
    assert len({tuple(rows) for rows in np.asarray(whole.rows).tolist()}) > 1
    groups = CODES[:, :1].astype(np.int32)
    limits = GroupLimits(jnp.asarray(groups), jnp.array([1]))
    cut = top(*model, requests_of(6, noise=noise, limits=limits), k=4, softmax_over=softmax_over)
    for rows, every in zip(np.asarray(cut.rows).tolist(), np.asarray(whole.rows).tolist(), strict=True):
        firsts = [row for n, row in enumerate(every) if groups[row, 0] not in groups[every[:n], 0]]
        assert rows == [*firsts, *[-1] * (4 - len(firsts))]


def test_bad_temperatures_are_refused():
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            request_noise(0, jnp.arange(2), temperature=wrong)
    assert request_noise(0, jnp.arange(2), temperature=0.5).temperature == 0.5  # control
