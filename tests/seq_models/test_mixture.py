"""Mixtures against enumeration in numpy: the probability of every item, and the search's ranking of all of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seq_models import (
    Boosts,
    Capacity,
    CodeTrie,
    DenseConfig,
    EncoderDecoderConfig,
    FlatDecoderConfig,
    HybridConfig,
    ItemNeighbors,
    ItemTables,
    LeafBlocks,
    Mixture,
    ParallelHeadsConfig,
    Precision,
    RequestBatch,
    RQTransformerConfig,
    SoftmaxOver,
    TransformerConfig,
    mixture,
)

USERS, LENGTH, WIDTH, ITEMS, ROWS = 4, 5, 3, 22, 26  # four rows of spare capacity
STACK = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
FAMILIES = {
    "rq-transformer": RQTransformerConfig(STACK),
    "encoder-decoder": EncoderDecoderConfig(STACK, decoder_layers=1),
    "flat": FlatDecoderConfig(STACK),
    "hybrid": HybridConfig(STACK),
    "parallel-heads": ParallelHeadsConfig(STACK),
    "sasrec": DenseConfig(STACK),
}
# Of one share and another of the dense head; the codes alone are a model of the same parameters.
SHARES = {f"dense {share}": RQTransformerConfig(STACK, id_embedding=True, dense_share=share) for share in (0, 0.4, 0.3)}
# Level sizes, the last of them of collisions alone; items of one leaf there.
CATALOGUES = {"collisions": ((3, 5), 4), "levels": ((4, 2, 6), 2), "tie-break": ((2, 3, 2, 5), 1)}
WEIGHTS, FACTORS = (0.0, 0.3, 1.0), (0.0, 0.4, 1.0, 1.5)


@functools.cache
def catalogue(kind, seed=0):
    """Codes, of which no leaf has more items than it may; two items are removed."""
    sizes, most = CATALOGUES[kind]
    rng = np.random.default_rng(seed)
    slots = np.tile(np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=-1), (most, 1))
    codes = slots[rng.permutation(len(slots))[:ITEMS]].astype(np.int32)
    active = ~np.isin(np.arange(ITEMS), rng.permutation(ITEMS)[:2])
    capacity = Capacity(ROWS, sizes, most)
    trie = CodeTrie.from_codes(codes, sizes, active=active, capacity=capacity)
    features = rng.normal(size=(ITEMS, 3)).astype(np.float32)
    counts = (rng.random(ITEMS) < 0.7).astype(np.int32)
    tables = ItemTables.from_arrays(codes, features, counts, active=active, rows=ROWS)
    return tables, trie


@functools.cache
def model(name, kind, dtype=Precision.FLOAT32):
    """Graph and parameters far from their initialization."""
    sizes = CATALOGUES[kind][0]
    config = (FAMILIES | SHARES)[name]
    config = config.__class__(**{**vars(config), "backbone": TransformerConfig(**{**vars(STACK), "dtype": dtype})})
    built = config.build(level_sizes=sizes, num_items=ROWS, num_features=3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(built)
    rng = np.random.default_rng(1)
    return graph, jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def neighbors(seed):
    """Edges, some to rows that are removed or spare; items 0 and 1 have none."""
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(ITEMS)[:WIDTH] for _ in range(ROWS)]).astype(np.int32)
    rows[rng.random(rows.shape) < 0.2] = -1
    rows[:2] = -1
    return ItemNeighbors(jnp.asarray(rows), jnp.asarray(rng.random(rows.shape) + 0.1, jnp.float32))


def requests(seed, *, boosts=True):
    """Histories padded on either side, with repetitions, one of items without edges alone; masks of both kinds."""
    rng = np.random.default_rng(seed)
    history = rng.integers(0, ITEMS, (USERS, LENGTH)).astype(np.int32)
    history[0, -1] = history[0, 1]
    history[1] = rng.integers(0, 2, LENGTH)
    segments = np.ones((USERS, LENGTH), np.int32)
    segments[2, :2], segments[3, 3:] = 0, 0
    allowed = np.pad(rng.random((1, ITEMS)) < 0.8, ((0, 0), (0, ROWS - ITEMS)))
    denied = np.where(rng.random((USERS, 2)) < 0.5, -1, rng.integers(0, ITEMS, (USERS, 2))).astype(np.int32)
    rows = np.append(rng.permutation(ITEMS)[:3], -1).astype(np.int32)[None]
    factors = np.asarray([[1.5, 0.0, 3.0, 7.0]], np.float32)
    given = Boosts(rows, factors) if boosts else None
    return jax.device_put(RequestBatch(history, segments, allowed, denied, given))


@functools.partial(jax.jit, static_argnames=("graph", "blocks", "softmax_over"))
def ranked_and_scored(graph, params, tables, trie, batch, mixed, *, blocks, softmax_over):
    """The best of as many beams as there are items, and exact scores of some items and of all."""
    own, options = nnx.merge(graph, params), {"softmax_over": softmax_over}
    top = own.top(tables, trie, batch, k=ROWS, beam_size=ROWS, mixture=mixed, **options)
    some = own.log_probs(tables, trie, batch, jnp.arange(ROWS), mixture=mixed, **options)
    return top, some, own.catalog_log_probs(tables, trie, batch, blocks=blocks, mixture=mixed, **options)


def run(name, kind, batch, mixed, *, seed=0, softmax_over=SoftmaxOver.VOCABULARY, dtype=Precision.FLOAT32):
    tables, trie = catalogue(kind, seed)
    graph, params = model(name, kind, dtype)
    blocks = LeafBlocks(ROWS, 1, tuple(len(tokens) for tokens in trie.tokens))  # one for all catalogues of a shape
    found = ranked_and_scored(graph, params, tables, trie, batch, mixed, blocks=blocks, softmax_over=softmax_over)
    return jax.device_get(found)


def expected(alone, tables, batch, mixed, *, leaves, most=mixture.GRAPH_ITEMS, dense=None, share=0.0):
    """Probabilities of all rows [users, rows], from the model's own of leaves; each user and item by itself.

    `dense` are the probabilities of a dense head with this share.
    """
    active, codes = np.asarray(tables.active), np.asarray(tables.codes)
    weight, decay, window, factor = (float(x) for x in mixed[1:])
    p, edges = np.exp(np.asarray(alone, np.float64)) * active, [[]] * ROWS
    if mixed.neighbors is not None:
        edges = [list(zip(*item, strict=True)) for item in zip(*map(np.asarray, mixed.neighbors), strict=True)]
    if leaves:
        p /= [max(sum(active[j] and (codes[j] == codes[i]).all() for j in range(ROWS)), 1) for i in range(ROWS)]
    for user, (rows, real) in enumerate(zip(np.asarray(batch.history), np.asarray(batch.segments) > 0, strict=True)):
        history, q = rows[real], np.zeros(ROWS)
        seen = np.isin(np.arange(ROWS), history)
        for age, item in enumerate(history[::-1]):
            for j, edge in edges[item] if age < window else []:
                if j >= 0 and active[j] and not (factor == 0 and seen[j]):
                    q[j] += decay**age * edge
        q[np.argsort(-q)[most:]] = 0
        p[user] = repeated(p[user], seen, factor)
        if dense is not None:
            p_dense = repeated(dense[user] * active, seen, factor)
            p_dense[np.argsort(-p_dense)[most:]] = 0
            p[user] = (1 - share) * p[user] + share * p_dense / p_dense.sum()
        if q.sum():
            p[user] = (1 - weight) * p[user] + weight * q / q.sum()
    if batch.boosts is not None:
        for row, w in zip(np.asarray(batch.boosts.rows)[0], np.asarray(batch.boosts.factors)[0], strict=True):
            p[:, row] *= w if row >= 0 else 1
    return p


def repeated(p, seen, factor):
    """A distribution after the factor of the items of the history."""
    s = p[seen].sum()
    own = min(factor, (1 - 1e-6) / s) if s else factor
    return p * np.where(seen, own, (1 - own * s) / (1 - s))


def check(found, p, batch):
    """Exact scores are the probabilities; the ranking is theirs, of all that is allowed and not zero."""
    top, some, every = found
    np.testing.assert_allclose(np.exp(some), p, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(np.exp(every), p, atol=1e-5, rtol=1e-4)
    np.testing.assert_array_equal(np.isneginf(every), p == 0)
    for user in range(USERS):
        left = p[user].copy()
        if batch.allowed is not None:
            left[~np.asarray(batch.allowed)[0]] = 0
        if batch.denied is not None:
            denied = np.asarray(batch.denied)[user]
            left[denied[denied >= 0]] = 0
        rows = top.rows[user][: (left > 0).sum()]
        assert set(rows.tolist()) == set(np.flatnonzero(left).tolist())
        assert (top.rows[user][len(rows) :] == -1).all()
        np.testing.assert_allclose(np.exp(top.scores[user][: len(rows)]), left[rows], atol=1e-5, rtol=1e-4)
        assert (np.diff(np.exp(top.scores[user])) <= 0).all()


def mixtures():
    for number, (weight, factor) in enumerate((w, f) for w in WEIGHTS for f in FACTORS):
        window = 3 if number % 2 else None
        yield (
            number,
            Mixture.from_numbers(neighbors(number), weight=weight, decay=0.6, window=window, repeat_factor=factor),
        )


@pytest.mark.parametrize(
    ("kind", "softmax_over"),
    [
        ("collisions", SoftmaxOver.VOCABULARY),
        ("levels", SoftmaxOver.CHILDREN),
        ("tie-break", SoftmaxOver.VOCABULARY),
    ],
)
def test_a_search_by_mass_equals_enumeration(kind, softmax_over):
    """Whatever weight, repeats, removals, masks and boosts; every mixture and catalogue runs in one program."""
    before = ranked_and_scored._cache_size()
    for seed, mixed in mixtures():
        batch, (tables, _) = requests(seed), catalogue(kind, seed % 3)
        _, _, alone = run(
            "rq-transformer", kind, batch._replace(boosts=None), None, seed=seed % 3, softmax_over=softmax_over
        )
        found = run("rq-transformer", kind, batch, mixed, seed=seed % 3, softmax_over=softmax_over)
        check(found, expected(alone, tables, batch, mixed, leaves=True), batch)
    assert ranked_and_scored._cache_size() - before == 2  # with a mixture and without


def test_items_outside_the_history_follow_it_whatever_the_factor():
    """Of which the history's mass would be more than all: a search that drops all else finds nothing."""
    batch, (tables, _), options = requests(0), catalogue("levels"), {"softmax_over": SoftmaxOver.CHILDREN}
    mixed = Mixture.from_numbers(neighbors(0), repeat_factor=1e6)
    _, _, alone = run("rq-transformer", "levels", batch._replace(boosts=None), None, **options)
    p = expected(alone, tables, batch._replace(boosts=None), mixed, leaves=True)
    seen = np.stack([np.isin(np.arange(ROWS), rows) for rows in np.asarray(batch.history)])
    assert ((p * ~seen).sum(axis=1) < 1e-5).any()  # control: the factor is at its bound
    found = run("rq-transformer", "levels", batch, mixed, **options)
    check(found, expected(alone, tables, batch, mixed, leaves=True), batch)


@pytest.mark.parametrize("name", [*FAMILIES][1:])
def test_every_family_mixes_alike(name):
    """In the search, in exact scores and in those of all items; without boosts and masks."""
    leaves = name not in ("hybrid", "sasrec")
    for seed, mixed in list(mixtures())[1::5]:
        batch, (tables, _) = requests(seed, boosts=False)._replace(allowed=None, denied=None), catalogue("levels")
        _, _, alone = run(name, "levels", batch, None)
        check(run(name, "levels", batch, mixed), expected(alone, tables, batch, mixed, leaves=leaves), batch)


def dense_head(kind, batch, seed):
    """Probabilities of the dense head: the state's inner products with embeddings of ids and projected features."""
    (graph, params), (tables, _) = model("dense 0", kind), catalogue(kind, seed)
    own = nnx.merge(graph, params)
    state = np.asarray(own.encode_history(batch.inputs(tables), batch.segments), np.float64)
    kernel, bias = (np.asarray(x[...], np.float64) for x in (own.project.kernel, own.project.bias))
    vectors = np.asarray(own.ids.embedding[...], np.float64) + np.asarray(tables.features) @ kernel + bias
    powers = np.exp(state @ vectors.T / 8**0.5) * np.asarray(tables.active)
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("share", "most"), [(0.4, mixture.GRAPH_ITEMS), (0.3, 4)])
def test_a_dense_head_has_its_share(monkeypatch, share, most):
    """Next to a graph, repeats, masks and boosts, or alone; with all items or its four best."""
    monkeypatch.setattr(mixture, "GRAPH_ITEMS", most)
    for seed, mixed in [*list(mixtures())[1::4], (0, None)]:
        batch, (tables, _) = requests(seed), catalogue("tie-break", seed % 3)
        _, _, of_codes = run("dense 0", "tie-break", batch._replace(boosts=None), None, seed=seed % 3)
        found = run(f"dense {share}", "tie-break", batch, mixed, seed=seed % 3)
        p = expected(
            of_codes,
            tables,
            batch,
            Mixture.from_numbers() if mixed is None else mixed,
            leaves=True,
            most=most,
            dense=dense_head("tie-break", batch, seed % 3),
            share=share,
        )
        check(found, p, batch)


def test_without_a_graph_repeats_or_boosts_only_collisions_are_told_apart():
    """A mixture that does nothing ranks as none, but gives each item of a leaf an equal share of it."""
    batch, (tables, _), nothing = requests(0), catalogue("collisions"), Mixture.from_numbers(neighbors(0))
    ones = batch._replace(boosts=Boosts(batch.boosts.rows, jnp.ones_like(batch.boosts.factors)))
    plain, _, alone = run("rq-transformer", "collisions", batch._replace(boosts=None), None)
    top, _, every = run("rq-transformer", "collisions", ones, nothing)
    check((top, every, every), expected(alone, tables, ones, nothing, leaves=True), ones)
    assert (plain.scores > top.scores + 0.5).any()  # control: some leaves have two items
    np.testing.assert_allclose(np.exp(every).sum(axis=1), np.exp(alone[:, leaf_firsts(tables)]).sum(axis=1), rtol=1e-5)


def leaf_firsts(tables):
    """One active row of every leaf."""
    rows = np.flatnonzero(np.asarray(tables.active))
    return rows[np.unique(np.asarray(tables.codes)[rows], axis=0, return_index=True)[1]]


def test_the_largest_shares_are_the_graphs_distribution(monkeypatch):
    batch, (tables, _) = requests(3, boosts=False)._replace(allowed=None, denied=None), catalogue("levels")
    mixed = Mixture.from_numbers(neighbors(3), weight=1.0, decay=0.6, repeat_factor=1.0)
    _, _, alone = run("sasrec", "levels", batch, None)
    (tables, trie), (graph, params) = catalogue("levels"), model("sasrec", "levels")
    monkeypatch.setattr(mixture, "GRAPH_ITEMS", 4)
    options = {"blocks": None, "softmax_over": SoftmaxOver.CHILDREN, "mixture": mixed}
    found = jax.jit(lambda own: nnx.merge(graph, own).catalog_log_probs(tables, trie, batch, **options))(params)
    wanted = expected(alone, tables, batch, mixed, leaves=False, most=4)
    np.testing.assert_allclose(np.exp(found), wanted, atol=1e-5)
    assert ((wanted > 0).sum(axis=1)[[0, 2, 3]] == 4).all()
    assert ((expected(alone, tables, batch, mixed, leaves=False) > 0).sum(axis=1)[[0, 2, 3]] > 4).any()  # control


@functools.partial(jax.jit, static_argnames="graph")
def three_best(graph, params, tables, trie, batch, mixed):
    """Of three beams."""
    options = {"softmax_over": SoftmaxOver.VOCABULARY, "mixture": mixed}
    return nnx.merge(graph, params).top(tables, trie, batch, k=3, beam_size=3, **options)


@pytest.mark.parametrize("name", ["rq-transformer", "hybrid"])
def test_items_of_the_graph_alone_are_found_by_few_beams(name):
    """Though the model finds them impossible: their logits are so low that the probability is zero in float32."""
    (tables, trie), (graph, params) = catalogue("tie-break"), model(name, "tie-break")
    codes = np.asarray(tables.codes)[:ITEMS]
    active = np.flatnonzero(np.asarray(tables.active)[:ITEMS])
    wanted = active[codes[active, 0] == 0][:3]
    if name != "hybrid":  # whose dense head is another model
        params["biases"][0] = jax.tree.map(lambda x: x.at[0].set(-1e4), params["biases"][0])
    rows = np.full((ROWS, WIDTH), -1, np.int32)
    rows[active[-1]] = wanted
    edges = ItemNeighbors(jnp.asarray(rows), jnp.asarray(np.tile([3.0, 2.0, 1.0], (ROWS, 1)), jnp.float32))
    batch = RequestBatch(jnp.full((USERS, LENGTH), active[-1]), jnp.ones((USERS, LENGTH), jnp.int32))
    without, found = (
        three_best(graph, params, tables, trie, batch, Mixture.from_numbers(edges, weight=w, repeat_factor=0.5))
        for w in (0.0, 0.999)
    )
    assert found.rows.tolist() == [wanted.tolist()] * USERS
    np.testing.assert_allclose(np.exp(found.scores), np.broadcast_to([[3 / 6, 2 / 6, 1 / 6]], (USERS, 3)), atol=2e-3)
    assert (without.rows != found.rows).any()  # control


def test_bfloat16_gives_the_probabilities_of_float32_to_its_precision():
    batch, mixed = requests(1), Mixture.from_numbers(neighbors(1), weight=0.3, decay=0.6)
    options = {"softmax_over": SoftmaxOver.CHILDREN}
    _, _, exact = run("rq-transformer", "levels", batch, mixed, **options)
    with jax.numpy_dtype_promotion("standard"):  # jax promotes inside dot_product_attention
        top, _, rough = run("rq-transformer", "levels", batch, mixed, **options, dtype=Precision.BFLOAT16)
    np.testing.assert_allclose(np.exp(rough), np.exp(exact), atol=0.05)
    for user in range(USERS):
        rows = top.rows[user][top.rows[user] >= 0]
        np.testing.assert_allclose(top.scores[user][: len(rows)], rough[user, rows], atol=0.05)


def test_numbers_and_neighbors_are_checked():
    for wrong in ({"weight": 1.1}, {"weight": -0.1}, {"decay": 2.0}, {"repeat_factor": -1.0}, {"weight": np.nan}):
        with pytest.raises(ValueError, match=r"^expected a weight and a decay from 0 to 1 and a repeat_factor of at"):
            Mixture.from_numbers(**wrong)
    few = ItemNeighbors(*(x[:-1] for x in neighbors(0)))
    with pytest.raises(ValueError, match=r"^expected the neighbors of all 26 rows of the item tables, got 25"):
        run("sasrec", "levels", requests(0, boosts=False), Mixture.from_numbers(few))
