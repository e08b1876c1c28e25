"""Further code sequences of items as inputs, for every generator of codes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from seq_models import (
    CodeTrie,
    DenseConfig,
    EncoderDecoderConfig,
    FlatDecoderConfig,
    HybridConfig,
    ItemTables,
    RequestBatch,
    RQTransformerConfig,
    SequenceEncoder,
    SequenceSizes,
    SoftmaxOver,
    TrainingBatch,
    TransformerConfig,
)

ITEMS, SIZES, OTHERS = 12, (4, 4), ((5,), (3, 2))
STACK = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
FAMILIES = {
    "rq": RQTransformerConfig(STACK),
    "flat": FlatDecoderConfig(STACK),
    "encoder-decoder": EncoderDecoderConfig(STACK, decoder_layers=1),
    "hybrid": HybridConfig(STACK),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def others():
    rng = np.random.default_rng(3)
    found = [np.stack([rng.integers(0, size, ITEMS) for size in sizes], 1).astype(np.int32) for sizes in OTHERS]
    found[0][4] = found[1][5] = -1
    return tuple(found)


@functools.cache
def tables(known=True):
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.permutation(16)[:ITEMS], SIZES), axis=1).astype(np.int32)
    features = rng.normal(size=(ITEMS, 3)).astype(np.float32)
    return ItemTables.from_arrays(codes, features, np.ones(ITEMS, np.int64), sequences=others() if known else ())


def fresh(name, known=True):
    rngs = nnx.Rngs(0)
    width = 3 if name == "hybrid" else 0
    model = FAMILIES[name].build(level_sizes=SIZES, num_items=ITEMS, num_features=width, rngs=rngs)
    if known:
        model.add_sequences(SequenceSizes(OTHERS), rngs=rngs)
    return nnx.split(model)


def random(name):
    """A model far from its initialization: the embeddings of the sequences are no longer zero."""
    graph, params = fresh(name)
    rng = np.random.default_rng(1)
    return graph, jax.tree.map(lambda x: x + jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), params)


def requests():
    history = jnp.asarray([[0, 4, 1, 2], [3, 7, 0, 0], [5, 6, 8, 0]], jnp.int32)
    return RequestBatch(history, jnp.asarray(np.arange(4) < np.array([[4], [2], [3]]), jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def _scores(graph, params, told, trie, asking):
    return nnx.merge(graph, params).log_probs(
        told, trie, asking, jnp.arange(ITEMS), softmax_over=SoftmaxOver.VOCABULARY
    )


@functools.partial(jax.jit, static_argnums=0)
def _found(graph, params, told, trie, asking):
    return nnx.merge(graph, params).top(told, trie, asking, k=5, beam_size=16, softmax_over=SoftmaxOver.VOCABULARY)


def scores(model, told):
    return np.asarray(_scores(*model, told, CodeTrie.from_codes(np.asarray(told.codes), SIZES), requests()))


@every_family
def test_a_fresh_model_is_the_one_without_and_then_each_sequence_moves_it(name):
    plain = scores(fresh(name, known=False), tables(known=False))
    np.testing.assert_array_equal(scores(fresh(name), tables()), plain)
    model = random(name)
    before = scores(model, tables())
    for at in range(2):
        changed = tuple(jnp.where(at == n, -1, codes) for n, codes in enumerate(tables().sequences))
        assert (np.abs(scores(model, tables()._replace(sequences=changed)) - before).max(axis=1) > 1e-3).all()


@every_family
def test_the_search_finds_the_best_of_all_scores(name):
    model, trie = random(name), CodeTrie.from_codes(np.asarray(tables().codes), SIZES)
    found = _found(*model, tables(), trie, requests())
    exact = scores(model, tables())
    np.testing.assert_array_equal(found.rows, np.argsort(-exact, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(found.scores, -np.sort(-exact, axis=1)[:, :5], atol=1e-5)


def test_an_item_is_the_sum_of_its_codes_or_has_the_embedding_of_a_missing_sequence():
    encoder = SequenceEncoder(SequenceSizes(OTHERS), 6, rngs=nnx.Rngs(0))
    values = [np.random.default_rng(n).normal(size=table.embedding.shape) for n, table in enumerate(encoder.tables)]
    for table, value in zip(encoder.tables, values, strict=True):
        table.embedding[...] = jnp.asarray(value)
    embedded = np.asarray(encoder(tuple(jnp.asarray(codes)[None] for codes in others())))[0]
    first, second = others()
    for item in range(ITEMS):
        expected = values[0][1 + first[item, 0]] if item != 4 else values[0][0]
        expected = expected + (
            values[1][1 + second[item, 0]] + values[1][4 + second[item, 1]] if item != 5 else values[1][0]
        )
        np.testing.assert_allclose(embedded[item], expected, atol=1e-6)
    with pytest.raises(ValueError, match="reads 2 further code sequences of every item, got none"):
        encoder(None)


def test_training_leaves_whole_sequences_of_whole_histories_out():
    encoder = SequenceEncoder(SequenceSizes(OTHERS, drop=0.3), 6, rngs=nnx.Rngs(0))
    segments = jnp.asarray(np.repeat([[1, 1, 2, 2, 2, 3]], 2000, axis=0))
    told = tuple(jnp.zeros((2000, 6, len(sizes)), jnp.int32) for sizes in OTHERS)
    dropped = [np.asarray(codes) < 0 for codes in encoder.drop(told, segments, jax.random.key(0))]
    for gone in dropped:
        whole = gone.all(axis=-1)
        assert (whole == gone.any(axis=-1)).all()
        assert (whole[:, [0, 2, 2]] == whole[:, [1, 3, 4]]).all()
        assert abs(whole[:, [0, 2, 5]].mean() - 0.3) < 0.02
    drawn = np.asarray(jax.random.bernoulli(jax.random.key(0), 0.3, (2, 2000, 7)))  # one per segment of a row
    for gone, of_segments in zip(dropped, drawn, strict=True):
        np.testing.assert_array_equal(gone[..., 0], of_segments[:, [1, 1, 2, 2, 2, 3]])
    both = (dropped[0][:, 0, 0] & dropped[1][:, 0, 0]).mean()
    assert abs(both - 0.09) < 0.02  # each by itself
    assert encoder.drop(told, segments, None) is told
    # A row of one history is numbered by its user, whatever the number.
    single = [encoder.drop(told, jnp.full((2000, 6), number), jax.random.key(0)) for number in (1, 1000)]
    for first, other in zip(*single, strict=True):
        np.testing.assert_array_equal(first, other)
        assert abs((np.asarray(first) < 0).mean() - 0.3) < 0.02


def test_what_only_a_further_sequence_tells_is_learned():
    """Items 0 to 9 share their codes; the parity that their further sequence tells is what follows them."""
    codes = np.array([[0, 0]] * 10 + [[1, 0], [2, 0]], np.int32)
    parity = (np.arange(ITEMS) % 2)[:, None].astype(np.int32)
    told = ItemTables.from_arrays(codes, None, np.ones(ITEMS, np.int64), sequences=(parity,))
    model = FAMILIES["rq"].build(level_sizes=SIZES, num_items=ITEMS, num_features=0, rngs=nnx.Rngs(0))
    model.add_sequences(SequenceSizes(((2,),), drop=0.0), rngs=nnx.Rngs(1))
    graph, params = nnx.split(model)
    history = np.random.default_rng(0).integers(0, 10, (64, 4)).astype(np.int32)
    batch = TrainingBatch(jnp.asarray(history), jnp.ones((64, 4), jnp.int32), jnp.asarray(10 + history % 2))
    optimizer = optax.adam(0.03)

    @jax.jit
    def step(params, moments):
        terms = jax.value_and_grad(lambda params: nnx.merge(graph, params).loss_terms(told, batch)["loss/level"][0])
        value, gradient = terms(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, value

    moments = optimizer.init(params)
    for _ in range(60):
        params, moments, value = step(params, moments)
    assert value < 0.1 < np.log(2)


def test_sizes_and_families_that_do_not_fit_are_refused():
    for levels, drop in ((((),), 0.1), (((0,),), 0.1), (OTHERS, 1.0)):
        with pytest.raises(ValueError, match="expected"):
            SequenceSizes(levels, drop)
    dense = DenseConfig(STACK).build(level_sizes=SIZES, num_items=ITEMS, num_features=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="DenseTransformer reads no codes"):
        dense.add_sequences(SequenceSizes(OTHERS), rngs=nnx.Rngs(0))
