"""Beam search and item scoring against two float64 references: every item enumerated, and a beam search on tuples.

The model has state: its logits depend on the whole prefix through the cache, and on a context that users' beams share.
Catalogues of one shape are made from one base by renaming codes and shuffling rows, so that few programs are compiled.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import logsumexp

from seq_models.search import Beams, Normalization, beam_search, item_log_probs
from seq_models.trie import CodeTrie

BATCH, DIM = 3, 4
CATALOGUES = [((5, 7), 40), ((4, 3, 6), 50), ((3, 8, 2, 5), 40), ((2, 3, 2, 2, 3, 2, 2, 3), 30)]  # level sizes, items
SEEDS = range(25)  # per catalogue shape: 100 catalogues in all
both_normalizations = pytest.mark.parametrize("normalization", list(Normalization), ids=lambda n: n.value)
every_catalogue = pytest.mark.parametrize(("level_sizes", "num_items"), CATALOGUES, ids=lambda v: str(v))


@functools.cache
def catalogue(level_sizes, num_items, seed):
    codes = np.random.default_rng(num_items).integers(0, level_sizes, size=(num_items, len(level_sizes)))
    codes[-5:] = codes[:5]  # collisions, whatever the space
    rng = np.random.default_rng(seed)
    renamed = [rng.permutation(size)[column] for size, column in zip(level_sizes, codes.T, strict=True)]
    return rng.permutation(np.stack(renamed, axis=-1))


@functools.cache
def parameters(level_sizes, seed):
    rng = np.random.default_rng([seed, 1])

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "context": normal(BATCH, DIM),
        "mix": normal(DIM, DIM),
        "embed": [normal(size, DIM) for size in level_sizes],
        "head": [2 * normal(DIM, size) for size in level_sizes],
        "bias": [normal(DIM, size) for size in level_sizes],
    }


def stateful_step(p):
    def step(hidden, codes, level):
        if level > 0:
            hidden = jnp.tanh(hidden @ p["mix"] + p["embed"][level - 1][codes])
        return hidden @ p["head"][level] + (p["context"] @ p["bias"][level])[:, None, :], hidden

    return step


def start(p):
    return p["context"][:, None, :]


@functools.partial(jax.jit, static_argnames=("beam_size", "normalization"))
def search(p, trie, *, beam_size, normalization) -> Beams:
    return beam_search(stateful_step(p), start(p), trie, beam_size=beam_size, normalization=normalization)


@functools.partial(jax.jit, static_argnames="normalization")
def score(p, codes, trie, *, normalization):
    return item_log_probs(stateful_step(p), start(p), codes, trie=trie, normalization=normalization)


class Reference:
    """The same model in float64, prefix by prefix, on tuples: no trie, no cache."""

    def __init__(self, p, codes, normalization):
        self.p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
        self.items = [tuple(row) for row in codes.tolist()]
        self.normalization = normalization
        self.memo = {}

    def children(self, prefix):
        return sorted({item[len(prefix)] for item in self.items if item[: len(prefix)] == prefix})

    def log_probs(self, prefix):
        """[users, size of the level after the prefix]"""
        if prefix not in self.memo:
            hidden, level = self.p["context"], len(prefix)
            for depth, code in enumerate(prefix):
                hidden = np.tanh(hidden @ self.p["mix"] + self.p["embed"][depth][code])
            logits = hidden @ self.p["head"][level] + self.p["context"] @ self.p["bias"][level]
            among = self.children(prefix) if self.normalization is Normalization.CHILDREN else slice(None)
            self.memo[prefix] = logits - logsumexp(logits[:, among], axis=-1, keepdims=True)
        return self.memo[prefix]

    def item_log_probs(self):
        return np.stack([sum(self.log_probs(i[:n])[:, i[n]] for n in range(len(i))) for i in self.items], axis=-1)

    def beam_search(self, user, beam_size):
        live = [(0.0, ())]
        for _ in self.items[0]:
            grown = [(s + self.log_probs(p)[user, c], (*p, c)) for s, p in live for c in self.children(p)]
            live = sorted(grown, key=lambda beam: -beam[0])[:beam_size]
        found = [(s, row) for s, prefix in live for row, item in enumerate(self.items) if item == prefix]
        return [row for _, row in found[:beam_size]], [s for s, _ in found[:beam_size]]


def check_structure(beams, codes, beam_size):
    """Real items, none twice, best first, the rest marked."""
    rows, found, log_probs, valid = (np.asarray(x) for x in beams)
    assert rows.shape == log_probs.shape == valid.shape == (BATCH, beam_size)
    assert np.array_equal(found[valid], codes[rows[valid]])
    assert all(len(set(r[v])) == v.sum() for r, v in zip(rows, valid, strict=True))
    assert np.all(np.diff(valid.astype(int)) <= 0)
    assert np.all(log_probs[:, 1:] <= log_probs[:, :-1])
    assert np.all(rows[~valid] == -1)
    assert np.all(found[~valid] == -1)
    assert np.all(log_probs[~valid] == -np.inf)


@both_normalizations
@every_catalogue
def test_a_wide_beam_equals_the_enumeration_of_all_items(level_sizes, num_items, normalization):
    for seed in SEEDS:
        codes, p = catalogue(level_sizes, num_items, seed), parameters(level_sizes, seed)
        expected = Reference(p, codes, normalization).item_log_probs()
        trie, beam_size = CodeTrie.from_codes(codes, level_sizes), num_items + 7 * (seed % 2)
        beams = search(p, trie, beam_size=beam_size, normalization=normalization)
        check_structure(beams, codes, beam_size)
        rows = np.argsort(-expected, axis=-1, kind="stable")  # colliding items tie exactly: row order
        assert np.array_equal(beams.rows[:, :num_items], rows)
        assert np.asarray(beams.valid).sum(axis=-1).tolist() == [num_items] * BATCH
        np.testing.assert_allclose(
            beams.log_probs[:, :num_items], np.take_along_axis(expected, rows, axis=-1), rtol=1e-5, atol=1e-5
        )


@both_normalizations
@pytest.mark.parametrize("beam_size", [1, 6])
@every_catalogue
def test_a_narrow_beam_equals_a_beam_search_on_tuples(level_sizes, num_items, beam_size, normalization):
    for seed in SEEDS:
        codes, p = catalogue(level_sizes, num_items, seed), parameters(level_sizes, seed)
        reference = Reference(p, codes, normalization)
        trie = CodeTrie.from_codes(codes, level_sizes)
        beams = search(p, trie, beam_size=beam_size, normalization=normalization)
        check_structure(beams, codes, beam_size)
        for user in range(BATCH):
            rows, log_probs = reference.beam_search(user, beam_size)
            valid = np.asarray(beams.valid[user])
            assert np.asarray(beams.rows[user])[valid].tolist() == rows
            np.testing.assert_allclose(np.asarray(beams.log_probs[user])[valid], log_probs, rtol=1e-5, atol=1e-5)


@both_normalizations
@every_catalogue
def test_item_log_probs_equal_the_reference(level_sizes, num_items, normalization):
    for seed in SEEDS[:5]:
        codes, p = catalogue(level_sizes, num_items, seed), parameters(level_sizes, seed)
        expected = Reference(p, codes, normalization).item_log_probs()
        trie = CodeTrie.from_codes(codes, level_sizes)
        scores = score(p, np.broadcast_to(codes, (BATCH, *codes.shape)), trie, normalization=normalization)
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_codes_of_no_item_score_minus_infinity():
    p, trie = parameters((5, 7), 0), CodeTrie.from_codes(np.array([[0, 0], [4, 6]]), (5, 7))
    codes = np.broadcast_to([[4, 6], [-1, -1], [0, 7], [0, 6]], (BATCH, 4, 2))
    vocabulary = score(p, codes, trie, normalization=Normalization.VOCABULARY)
    assert np.isfinite(vocabulary[0]).tolist() == [True, False, False, True]  # (0, 6) has a probability of its own
    children = score(p, codes, trie, normalization=Normalization.CHILDREN)
    assert np.isfinite(children[0]).tolist() == [True, False, False, False]
    assert not np.isnan(vocabulary).any()
    assert not np.isnan(children).any()


def test_probabilities_over_children_sum_to_one_and_over_the_vocabulary_to_less():
    codes = np.unique(catalogue((4, 3, 6), 50, 0), axis=0)
    p, trie = parameters((4, 3, 6), 0), CodeTrie.from_codes(codes, (4, 3, 6))
    totals = {n: np.exp(search(p, trie, beam_size=50, normalization=n).log_probs).sum(-1) for n in Normalization}
    np.testing.assert_allclose(totals[Normalization.CHILDREN], np.ones(BATCH), rtol=1e-5)
    assert np.all(totals[Normalization.VOCABULARY] < 0.999)


def test_the_cache_follows_its_beams():
    level_sizes, num_items = CATALOGUES[1]
    codes, p = catalogue(level_sizes, num_items, 0), parameters(level_sizes, 0)
    expected = np.sort(Reference(p, codes, Normalization.VOCABULARY).item_log_probs())[:, ::-1]

    def not_gathered(step):
        """A control: each step goes on from the cache as the last one left it, beam for beam."""
        kept = None

        def forgetful(cache, codes, level):
            nonlocal kept
            cache = cache if kept is None else kept[:, np.arange(codes.shape[1]) % kept.shape[1]]
            logits, kept = step(cache, codes, level)
            return logits, kept

        return forgetful

    def log_probs(step):
        trie = CodeTrie.from_codes(codes, level_sizes)
        return jax.jit(lambda t: beam_search(step, start(p), t, beam_size=num_items).log_probs)(trie)

    np.testing.assert_allclose(log_probs(stateful_step(p)), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(log_probs(not_gathered(stateful_step(p))) - expected).max() > 0.1


@pytest.mark.parametrize(("beam_size", "widths"), [(2, [1, 2, 2]), (4, [1, 3, 4]), (50, [1, 3, 6])])
def test_no_level_runs_more_beams_than_it_can_use(beam_size, widths):
    codes = np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1], [2, 2, 0], [2, 0, 0], [2, 0, 1]])
    seen = []

    def step(cache, codes, level):
        seen.append(1 if codes is None else codes.shape[1])
        return jnp.zeros((BATCH, seen[-1], 3)), cache

    run = jax.jit(lambda trie: beam_search(step, (), trie, beam_size=beam_size))
    beams = run(CodeTrie.from_codes(codes, (3, 3, 3)))
    assert seen == widths
    assert np.asarray(beams.valid).sum(axis=-1).tolist() == [min(beam_size, len(codes))] * BATCH
    lexicographic = np.lexsort(codes.T[::-1])  # all scores tie
    assert beams.rows[0, : len(codes)].tolist() == lexicographic[:beam_size].tolist()


@both_normalizations
def test_codes_that_the_step_forbids_are_not_returned(normalization):
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])

    def forbid(cache, chosen, level):
        if chosen is None:
            return jnp.zeros((BATCH, 1, 2)), cache
        # after code 0 nothing of the catalogue is allowed, after code 1 only code 1
        after = jnp.array([[-jnp.inf, -jnp.inf, 0.0], [-jnp.inf, 0.0, 0.0]])
        return after[chosen], cache

    run = jax.jit(lambda trie: beam_search(forbid, (), trie, beam_size=4, normalization=normalization))
    beams = run(CodeTrie.from_codes(codes, (2, 3)))
    assert beams.rows.tolist() == [[3, -1, -1, -1]] * BATCH
    assert beams.valid.tolist() == [[True, False, False, False]] * BATCH
    assert np.isfinite(beams.log_probs[:, 0]).all()


def test_a_model_that_yields_nan_is_seen_and_returns_no_item_twice():
    codes = catalogue((5, 7), 40, 0)
    p = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), parameters((5, 7), 0))
    beams = search(p, CodeTrie.from_codes(codes, (5, 7)), beam_size=40, normalization=Normalization.VOCABULARY)
    assert np.isnan(beams.log_probs).all()
    assert all(sorted(rows) == list(range(40)) for rows in beams.rows.tolist())


def test_another_catalogue_of_equal_shape_is_not_compiled_again():
    level_sizes, num_items = CATALOGUES[0]
    traces = []

    @jax.jit
    def counted(p, trie):
        traces.append(1)
        return beam_search(stateful_step(p), start(p), trie, beam_size=5)

    for seed in range(3):
        trie = CodeTrie.from_codes(catalogue(level_sizes, num_items, seed), level_sizes)
        counted(parameters(level_sizes, seed), trie)
    assert len(traces) == 1
    counted(parameters(level_sizes, 0), CodeTrie.from_codes(np.array([[4, 6]]), level_sizes))
    assert len(traces) == 2  # other shapes do compile


def test_bfloat16_logits_are_scored_in_float32():
    p = parameters((5, 7), 0)

    def low(cache, codes, level):
        logits, cache = stateful_step(p)(cache, codes, level)
        return logits.astype(jnp.bfloat16), cache

    @jax.jit
    def search_and_score(trie):
        beams = beam_search(low, start(p), trie, beam_size=40)
        return beams.log_probs, item_log_probs(low, start(p), beams.codes)

    found, again = search_and_score(CodeTrie.from_codes(catalogue((5, 7), 40, 0), (5, 7)))
    assert found.dtype == again.dtype == jnp.float32
    np.testing.assert_allclose(again, found, rtol=1e-6)


def test_users_sharded_over_devices_get_the_same_items():
    level_sizes, num_items = CATALOGUES[1]
    trie = CodeTrie.from_codes(catalogue(level_sizes, num_items, 0), level_sizes)
    p = parameters(level_sizes, 0)
    p = {**p, "context": np.random.default_rng(0).normal(size=(16, DIM)).astype(np.float32)}
    run = functools.partial(search, trie=trie, beam_size=6, normalization=Normalization.VOCABULARY)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_user = NamedSharding(mesh, PartitionSpec("data"))
    sharded, alone = run({**p, "context": jax.device_put(p["context"], by_user)}), run(p)
    assert np.array_equal(sharded.rows, alone.rows)
    np.testing.assert_allclose(sharded.log_probs, alone.log_probs, rtol=1e-5)
    assert sharded.rows.sharding.is_equivalent_to(by_user, 2)


def test_bad_arguments_are_refused():
    p, trie = parameters((5, 7), 0), CodeTrie.from_codes(np.array([[0, 0], [4, 6]]), (5, 7))
    assert search(p, trie, beam_size=1, normalization=Normalization.CHILDREN).valid.all()
    with pytest.raises(ValueError, match="beam_size must be at least 1, got 0"):
        beam_search(stateful_step(p), start(p), trie, beam_size=0)
    with pytest.raises(ValueError, match=r"\(3, 1, 4\) at level 0, got \(3, 1, 5\)"):
        beam_search(stateful_step(p), start(p), CodeTrie.from_codes(np.array([[0, 0]]), (4, 7)), beam_size=1)
    with pytest.raises(ValueError, match="CHILDREN needs the trie"):
        item_log_probs(
            stateful_step(p), start(p), jnp.zeros((BATCH, 1, 2), jnp.int32), normalization=Normalization.CHILDREN
        )
