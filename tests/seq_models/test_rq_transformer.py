"""RQ-Transformer: teacher forcing against search's steps, causality over levels, and the real model in beam search."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seq_models import CodeTrie, Inputs, RQTransformer, RQTransformerConfig, TransformerConfig
from seq_models.search import beam_search, item_log_probs

SIZES = (3, 5, 4)
BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=12, dropout=0.3)
CONFIGS = {
    "tied": RQTransformerConfig(BACKBONE, depth_layers=2, depth_dropout=0.1),
    "untied": RQTransformerConfig(BACKBONE, tied_heads=False),
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
def _logits(graph, params, states, codes, key):
    return nnx.merge(graph, params).logits(states, codes, key=key)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _step(graph, params, states, cache, codes, level):
    m = nnx.merge(graph, params)
    return m.step(states, m.start(states) if cache is None else cache, codes, level)


def forced_logits(name, states, codes, key=None):
    return _logits(*nnx.split(model(name)), states, codes, key)


def step(name, states, cache, codes, level):
    """One step of search, from the start where there is no cache yet."""
    return _step(*nnx.split(model(name)), states, cache, codes, level)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_codes(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, SIZES, (*shape, len(SIZES))))


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@every_config
def test_steps_with_a_cache_give_the_teacher_forced_logits(name):
    codes, states = random_codes(0, 2, 4), normal(0, 2, 8)
    forced = forced_logits(name, jnp.repeat(states, 4, axis=0), codes.reshape(8, 3))
    logits, cache = step(name, states, None, None, 0)
    close(logits[:, 0], forced[0].reshape(2, 4, -1)[:, 0])
    cache = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=1), cache)  # four beams of each user
    for level in (1, 2):
        logits, cache = step(name, states, cache, codes[..., level - 1], level)
        assert logits.shape == (2, 4, SIZES[level])
        close(logits, forced[level].reshape(2, 4, -1))


@every_config
def test_regathered_beams_carry_their_own_past(name):
    """As in search: beams are reordered, and one is dropped for a second child of another, between the levels."""
    states, first = normal(1, 1, 8), jnp.asarray([[0, 1, 2]])
    parents, second = jnp.asarray([2, 2, 0]), jnp.asarray([[4, 0, 3]])
    _, cache = step(name, states, None, None, 0)
    _, cache = step(name, states, jax.tree.map(lambda x: jnp.repeat(x, 3, axis=1), cache), first, 1)
    logits, _ = step(name, states, jax.tree.map(lambda x: x[:, parents], cache), second, 2)
    codes = jnp.stack([first[0, parents], second[0], jnp.zeros(3, jnp.int32)], axis=-1)
    close(logits[0], forced_logits(name, jnp.repeat(states, 3, axis=0), codes)[2])
    unmoved, _ = step(name, states, cache, second, 2)
    assert np.abs(unmoved - logits).max() > 1e-3


@every_config
def test_a_level_depends_on_the_codes_before_it_and_on_no_other(name):
    codes, states = random_codes(2, 5), normal(2, 5, 8)
    before = forced_logits(name, states, codes)
    assert [x.shape for x in before] == [(5, size) for size in SIZES]
    for level, size in enumerate(SIZES):
        after = forced_logits(name, states, codes.at[:, level].set((codes[:, level] + 1) % size))
        changed = [bool(np.any(a != b)) for a, b in zip(after, before, strict=True)]
        assert changed == [other > level for other in range(3)]


def array(parameter):
    return np.asarray(parameter[...], np.float64)


def rms_norm(x, norm):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * array(norm.scale)


def reference_block(block, x):
    """One block over `[n, level, dim]` in float64, with a causal mask over all levels at once."""
    n, levels, dim = x.shape
    qkv = (rms_norm(x, block.norm_attention) @ array(block.attention.qkv.kernel)).reshape(n, levels, 3, 2, dim // 2)
    q, k, v = np.moveaxis(qkv, 2, 0)
    powers = np.exp(np.einsum("nqhw,nkhw->nhqk", q, k) / (dim // 2) ** 0.5) * np.tri(levels)
    mixed = np.einsum("nhqk,nkhw->nqhw", powers / powers.sum(axis=-1, keepdims=True), v).reshape(x.shape)
    x = x + mixed @ array(block.attention.out.kernel)
    gate, value = np.split(rms_norm(x, block.norm_feed) @ array(block.feed.up.kernel), 2, axis=-1)
    return x + (gate / (1 + np.exp(-gate)) * value) @ array(block.feed.down.kernel)


@every_config
def test_logits_against_all_levels_at_once_in_float64(name):
    """Equation 9 for every level, the blocks, and the head: training and search share their code, this does not."""
    m, codes, states = model(name), random_codes(3, 4), normal(3, 4, 8)
    embedded = np.stack([array(table.embedding)[codes[:, j]] for j, table in enumerate(m.tables)], axis=1)
    before = np.cumsum(embedded, axis=1) - embedded
    x = np.asarray(states, np.float64)[:, None] + before + array(m.levels.embedding)
    for block in m.depth:
        x = reference_block(block, x)
    x, heads = rms_norm(x, m.norm), m.heads or m.tables
    for level, logits in enumerate(forced_logits(name, states, codes)):
        close(logits, x[:, level] @ array(heads[level].embedding).T + array(m.biases[level]), 1e-4)


def test_tied_heads_are_the_input_tables():
    """The table of the last level is read by no level, so the logits depend on it as a head or not at all."""
    args = normal(4, 2, 8), random_codes(4, 2)

    def moved(name):
        changed = nnx.merge(*build(CONFIGS[name]))
        before = changed.logits(*args)[2]
        changed.tables[2].embedding[...] = changed.tables[2].embedding[...] + 1.0
        return bool(np.any(changed.logits(*args)[2] != before))

    assert moved("no depth")
    assert not moved("untied")


def test_read_is_the_state_of_the_last_item_whatever_stands_behind_it():
    m, codes = model("tied"), random_codes(5, 1, 6)
    short = m.read(Inputs(codes[:, :4]), jnp.ones((1, 4), jnp.int32))
    segments = jnp.asarray([[1, 1, 1, 1, 0, 0]])
    close(m.read(Inputs(codes), segments), short)
    close(m.read(Inputs(jnp.zeros_like(codes).at[:, :4].set(codes[:, :4])), segments), short)
    packed = m.states(Inputs(jnp.roll(codes, 2, axis=1)), jnp.asarray([[1, 1, 2, 2, 2, 2]]))
    close(packed[:, 5], short)
    assert np.abs(m.read(Inputs(codes.at[:, 0].set((codes[:, 0] + 1) % 3)), segments) - short).max() > 1e-3


def test_dense_and_id_inputs_are_used_where_given():
    config = RQTransformerConfig(BACKBONE, id_embedding=True)
    hybrid = nnx.merge(*build(config, num_features=3, num_ids=7))
    codes, dense, ids = random_codes(6, 1, 4), normal(6, 1, 4, 3), jnp.asarray([[0, 3, 6, 2]])
    segments = jnp.ones((1, 4), jnp.int32)
    whole, no_dense, no_ids, other_dense, other_ids = (
        hybrid.read(inputs, segments)
        for inputs in (
            Inputs(codes, dense, ids),
            Inputs(codes, None, ids),
            Inputs(codes, dense),
            Inputs(codes, dense.at[:, 1].add(1.0), ids),
            Inputs(codes, dense, ids.at[:, 1].set(4)),
        )
    )
    for other in (no_dense, no_ids, other_dense, other_ids):
        assert np.abs(whole - other).max() > 1e-3
    plain = model("tied")
    np.testing.assert_array_equal(plain.read(Inputs(codes, dense, ids), segments), plain.read(Inputs(codes), segments))


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_reaches_every_parameter(tied):
    config = RQTransformerConfig(BACKBONE, depth_layers=2, tied_heads=tied, id_embedding=True)
    graph, params = build(config, num_features=3, num_ids=4)
    codes = jnp.asarray(list(itertools.product(*map(range, SIZES))))  # every code at every level
    ids, segments = jnp.arange(60)[None] % 4, jnp.ones((1, 60), jnp.int32)

    @jax.jit
    def loss(params):
        m, keys = nnx.merge(graph, params), jax.random.split(jax.random.key(0))
        states = m.states(Inputs(codes[None], normal(7, 1, 60, 3), ids), segments, key=keys[0])
        logits = m.logits(states[0], codes, key=keys[1])
        return sum(jnp.sum(jax.nn.log_softmax(x)[:, 0]) for x in logits)

    zero = [jax.tree_util.keystr(path) for path, g in jax.tree.leaves_with_path(jax.grad(loss)(params)) if not g.any()]
    assert zero == []


def test_dropout_acts_on_the_depth_decoder_with_a_key_alone():
    states, codes = normal(8, 6, 8), random_codes(8, 6)

    def logits(key):
        return np.concatenate(forced_logits("tied", states, codes, key), axis=-1)

    first, again, other, plain = (logits(key) for key in (*map(jax.random.key, (0, 0, 1)), None))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - plain).max() > 1e-3
    without = nnx.merge(*build(RQTransformerConfig(BACKBONE, depth_layers=2, depth_dropout=0.0)))
    close(without.logits(states, codes, key=jax.random.key(0))[2], plain[:, -SIZES[2] :])


@every_config
def test_beam_search_of_the_whole_catalogue_is_enumeration(name):
    rng = np.random.default_rng(9)
    codes = rng.permutation(list(itertools.product(*map(range, SIZES))))[:20]
    codes = np.concatenate([codes, codes[:2]])  # two pairs of items that share their codes
    trie, states = CodeTrie.from_codes(codes, SIZES), normal(9, 3, 8)
    graph, params = nnx.split(model(name))

    @jax.jit
    def search(params, trie):
        m = nnx.merge(graph, params)
        of_states, each = functools.partial(m.step, states), jnp.broadcast_to(codes[None], (3, *codes.shape))
        found = beam_search(of_states, m.start(states), trie, beam_size=22)
        return found, item_log_probs(of_states, m.start(states), each)

    beams, scored = search(params, trie)
    forced = forced_logits(name, jnp.repeat(states, 22, axis=0), jnp.tile(codes, (3, 1)))
    expected = np.zeros((3, 22))
    for level, logits in enumerate(forced):
        logits = np.asarray(logits, np.float64).reshape(3, 22, -1)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected += log_probs[:, np.arange(22), codes[:, level]]
    close(scored, expected)
    close(beams.log_probs, -np.sort(-expected))
    assert bool(beams.valid.all())
    np.testing.assert_array_equal(np.sort(beams.rows), np.tile(np.arange(22), (3, 1)))
    close(np.take_along_axis(expected, np.asarray(beams.rows), axis=1), beams.log_probs)


def test_probabilities_of_all_codes_sum_to_one():
    codes = jnp.asarray(list(itertools.product(*map(range, SIZES))))
    m, states = model("untied"), normal(10, 2, 8)
    scored = item_log_probs(
        functools.partial(m.step, states), m.start(states), jnp.broadcast_to(codes[None], (2, *codes.shape))
    )
    close(jnp.exp(scored).sum(axis=1), np.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth_dropout": 1.5}, r"^depth_dropout 1\.5 must lie in \[0, 1\)$"),
        ({"depth_dropout": -0.1}, r"^depth_dropout -0\.1 must lie in"),
        ({"depth_layers": -1}, "^expected depth_layers of at least 0, got -1$"),
    ],
)
def test_the_depth_decoders_config_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        RQTransformerConfig(BACKBONE, **change)
    RQTransformerConfig(BACKBONE, depth_layers=0, depth_dropout=0.0)
