"""Beam search against two float64 references: every item enumerated, and a beam search on tuples.

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

from seq_models.masks import ItemMask
from seq_models.search import Beams, SoftmaxOver, beam_search, top_k
from seq_models.trie import Capacity, CodeTrie

BATCH, DIM = 3, 4
CATALOGUES = [((5, 7), 40), ((4, 3, 6), 50), ((3, 8, 2, 5), 40), ((2, 3, 2, 2, 3, 2, 2, 3), 30)]  # level sizes, items
SEEDS = range(25)  # per catalogue shape: 100 catalogues in all
either_softmax = pytest.mark.parametrize("softmax_over", list(SoftmaxOver), ids=lambda n: n.value)
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
        return rng.normal(size=shape).astype(np.float32)

    made = {
        "context": normal(BATCH, DIM),
        "mix": normal(DIM, DIM),
        "embed": [normal(size, DIM) for size in level_sizes],
        "head": [2 * normal(DIM, size) for size in level_sizes],
        "bias": [normal(DIM, size) for size in level_sizes],
    }
    return jax.device_put(made)


def stateful_step(p):
    """The cache holds the hidden states of every step, each of the beams that were live then."""

    def step(cache, prefixes):
        hidden, level = p["context"][:, None, :], prefixes.level
        if level > 0:
            before = jnp.take_along_axis(cache[-1], prefixes.ancestors[..., -1:], axis=1)
            hidden = jnp.tanh(before @ p["mix"] + p["embed"][level - 1][prefixes.codes[..., -1]])
        return hidden @ p["head"][level] + (p["context"] @ p["bias"][level])[:, None, :], (*cache, hidden)

    return step


STATIC = ("beam_size", "num_results", "softmax_over")


@functools.partial(jax.jit, static_argnames=STATIC)
def search_on_device(p, trie, mask=None, **options) -> Beams:
    return beam_search(stateful_step(p), (), trie, batch=len(p["context"]), mask=mask, **options)


def search(*inputs, **options) -> Beams:
    """As numpy arrays: a slice of one on the device is a program of its own."""
    return jax.device_get(search_on_device(*inputs, **options))


class Reference:
    """The same model in float64, prefix by prefix, on tuples: no trie, no cache."""

    def __init__(self, p, codes, softmax_over):
        self.p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
        self.items = [tuple(row) for row in codes.tolist()]
        self.softmax_over = softmax_over
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
            among = self.children(prefix) if self.softmax_over is SoftmaxOver.CHILDREN else slice(None)
            self.memo[prefix] = logits - logsumexp(logits[:, among], axis=-1, keepdims=True)
        return self.memo[prefix]

    def item_log_probs(self):
        return np.stack([sum(self.log_probs(i[:n])[:, i[n]] for n in range(len(i))) for i in self.items], axis=-1)

    def beam_search(self, user, beam_size, allowed=None):
        allowed = np.ones(len(self.items), bool) if allowed is None else allowed
        alive = {item[:n] for item, a in zip(self.items, allowed, strict=True) if a for n in range(len(item) + 1)}
        live = [(0.0, ())]
        for _ in self.items[0]:
            grown = [(s + self.log_probs(p)[user, c], (*p, c)) for s, p in live for c in self.children(p)]
            live = sorted((beam for beam in grown if beam[1] in alive), key=lambda beam: -beam[0])[:beam_size]
        rows = np.flatnonzero(allowed).tolist()
        found = [(s, row) for s, prefix in live for row in rows if self.items[row] == prefix]
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


@either_softmax
@every_catalogue
def test_a_wide_beam_equals_the_enumeration_of_all_items(level_sizes, num_items, softmax_over):
    for seed in SEEDS:
        codes, p = catalogue(level_sizes, num_items, seed), parameters(level_sizes, seed)
        expected = Reference(p, codes, softmax_over).item_log_probs()
        trie, beam_size = CodeTrie.from_codes(codes, level_sizes), num_items + 7 * (seed % 2)
        beams = search(p, trie, beam_size=beam_size, softmax_over=softmax_over)
        check_structure(beams, codes, beam_size)
        rows = np.argsort(-expected, axis=-1, kind="stable")  # colliding items tie exactly: row order
        assert np.array_equal(beams.rows[:, :num_items], rows)
        assert np.asarray(beams.valid).sum(axis=-1).tolist() == [num_items] * BATCH
        np.testing.assert_allclose(
            beams.log_probs[:, :num_items], np.take_along_axis(expected, rows, axis=-1), rtol=1e-5, atol=1e-5
        )


@either_softmax
@pytest.mark.parametrize("beam_size", [1, 6])
@every_catalogue
def test_a_narrow_beam_equals_a_beam_search_on_tuples(level_sizes, num_items, beam_size, softmax_over):
    for seed in SEEDS:
        codes, p = catalogue(level_sizes, num_items, seed), parameters(level_sizes, seed)
        reference = Reference(p, codes, softmax_over)
        trie = CodeTrie.from_codes(codes, level_sizes)
        beams = search(p, trie, beam_size=beam_size, softmax_over=softmax_over)
        check_structure(beams, codes, beam_size)
        for user in range(BATCH):
            rows, log_probs = reference.beam_search(user, beam_size)
            valid = np.asarray(beams.valid[user])
            assert np.asarray(beams.rows[user])[valid].tolist() == rows
            np.testing.assert_allclose(np.asarray(beams.log_probs[user])[valid], log_probs, rtol=1e-5, atol=1e-5)


def test_probabilities_over_children_sum_to_one_and_over_the_vocabulary_to_less():
    codes = np.unique(catalogue((4, 3, 6), 50, 0), axis=0)
    p, trie = parameters((4, 3, 6), 0), CodeTrie.from_codes(codes, (4, 3, 6))
    totals = {n: np.exp(search(p, trie, beam_size=50, softmax_over=n).log_probs).sum(-1) for n in SoftmaxOver}
    np.testing.assert_allclose(totals[SoftmaxOver.CHILDREN], np.ones(BATCH), rtol=1e-5)
    assert np.all(totals[SoftmaxOver.VOCABULARY] < 0.999)


def test_ancestors_lead_to_what_each_step_left_in_the_cache():
    level_sizes, num_items = CATALOGUES[2]
    codes, p, wrong = catalogue(level_sizes, num_items, 0), parameters(level_sizes, 0), []

    def step(cache, prefixes):
        logits, hidden = stateful_step(p)(cache[0], prefixes)
        for level, kept in enumerate(cache[1]):
            found = jax.vmap(lambda beams, i: beams[i])(kept, prefixes.ancestors[..., level])
            wrong.append((found != prefixes.codes[..., :level]).sum())
            unmoved = jnp.arange(prefixes.codes.shape[1]) % kept.shape[1]
            wrong.append((kept[:, unmoved] != prefixes.codes[..., :level]).sum())  # a control
        return logits, (hidden, (*cache[1], prefixes.codes))

    @jax.jit
    def run(trie):
        beam_search(step, ((), ()), trie, batch=BATCH, beam_size=6)
        return wrong[::2], wrong[1::2]

    followed, unmoved = run(CodeTrie.from_codes(codes, level_sizes))
    assert len(followed) == 1 + 2 + 3
    assert sum(followed) == 0
    assert sum(unmoved) > 0


def random_mask(num_items, seed):
    """Few or many items allowed to each user, and a list of denied ones: repeated, not allowed anyway, or none."""
    rng = np.random.default_rng([seed, 2])
    allowed = rng.random((BATCH, num_items)) < rng.choice([0.05, 0.3, 0.9], size=(BATCH, 1))
    denied = rng.integers(-1, num_items, size=(BATCH, 12)).astype(np.int32)
    left = allowed.copy()
    for user in range(BATCH):
        left[user, denied[user][denied[user] >= 0]] = False
    return allowed, denied, left


@pytest.mark.parametrize(
    ("beam_size", "softmax_over"),
    [(1, SoftmaxOver.CHILDREN), (6, SoftmaxOver.VOCABULARY), (60, SoftmaxOver.CHILDREN)],
)
@every_catalogue
def test_a_masked_search_equals_a_masked_beam_search_on_tuples(level_sizes, num_items, beam_size, softmax_over):
    for seed in SEEDS[:8]:
        codes, p = catalogue(level_sizes, num_items, seed), parameters(level_sizes, seed)
        reference, trie = Reference(p, codes, softmax_over), CodeTrie.from_codes(codes, level_sizes)
        allowed, denied, left = random_mask(num_items, seed)
        mask = ItemMask.from_items(trie, allowed=allowed, denied=denied, codes=codes)
        beams = search(p, trie, mask, beam_size=beam_size, softmax_over=softmax_over)
        check_structure(beams, codes, beam_size)
        for user in range(BATCH):
            rows, log_probs = reference.beam_search(user, beam_size, left[user])
            valid = np.asarray(beams.valid[user])
            assert np.asarray(beams.rows[user])[valid].tolist() == rows
            np.testing.assert_allclose(np.asarray(beams.log_probs[user])[valid], log_probs, rtol=1e-5, atol=1e-5)


def test_the_one_allowed_item_is_found_by_a_single_beam_and_none_where_none_is_allowed():
    level_sizes, num_items = CATALOGUES[2]
    codes, p = catalogue(level_sizes, num_items, 0), parameters(level_sizes, 0)
    trie, everything = CodeTrie.from_codes(codes, level_sizes), np.arange(num_items, dtype=np.int32)
    for row in range(num_items):
        allowed = np.arange(num_items)[None] == np.array([[row], [row], [-1]])  # nothing for the last user
        denied = np.broadcast_to(np.where(everything == row, -1, everything), (BATCH, num_items)).copy()
        denied[-1] = everything
        for mask in (ItemMask.from_items(trie, allowed=allowed), ItemMask.from_items(trie, denied=denied, codes=codes)):
            beams = search(p, trie, mask, beam_size=1, softmax_over=SoftmaxOver.VOCABULARY)
            assert beams.rows[:, 0].tolist() == [row, row, -1]
            check_structure(beams, codes, 1)


def test_a_shorter_list_is_the_head_of_the_longer():
    level_sizes, num_items = CATALOGUES[1]
    p, trie = parameters(level_sizes, 0), CodeTrie.from_codes(catalogue(level_sizes, num_items, 0), level_sizes)
    run = functools.partial(search, p, trie, beam_size=8, softmax_over=SoftmaxOver.VOCABULARY)
    head, whole = run(num_results=3), run()
    assert head.codes.shape == (BATCH, 3, 3)
    assert all(np.array_equal(h, w[:, :3]) for h, w in zip(head, whole, strict=True))


def test_items_of_a_leaf_come_in_order_of_popularity():
    codes = np.array([[0, 0]] * 12 + [[1, 1]])
    p, likes = parameters((5, 7), 0), np.arange(13) % 5
    trie = CodeTrie.from_codes(codes, (5, 7), popularity=likes)
    run = functools.partial(search, p, beam_size=13, softmax_over=SoftmaxOver.VOCABULARY)
    popular, masked = run(trie), run(trie, ItemMask.from_items(trie, denied=np.array([[10, 1]]), codes=codes))
    for user in range(BATCH):
        by_popularity = np.argsort(-likes[:12], kind="stable").tolist()
        assert [row for row in popular.rows[user].tolist() if row != 12] == by_popularity
        left = [row for row in by_popularity if row not in (10, 1)]
        assert [row for row in masked.rows[user].tolist() if row != 12] == [*left, -1, -1]


@pytest.mark.parametrize(("beam_size", "widths"), [(2, [1, 2, 2]), (4, [1, 3, 4]), (50, [1, 3, 6])])
def test_no_level_runs_more_beams_than_it_can_use(beam_size, widths):
    codes = np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1], [2, 2, 0], [2, 0, 0], [2, 0, 1]])
    seen = []

    def step(cache, prefixes):
        seen.append(prefixes.codes.shape[1])
        return jnp.zeros((BATCH, seen[-1], 3)), cache

    run = jax.jit(lambda trie: beam_search(step, (), trie, batch=BATCH, beam_size=beam_size))
    beams = jax.device_get(run(CodeTrie.from_codes(codes, (3, 3, 3))))
    assert seen == widths
    assert np.asarray(beams.valid).sum(axis=-1).tolist() == [min(beam_size, len(codes))] * BATCH
    lexicographic = np.lexsort(codes.T[::-1])  # all scores tie
    assert beams.rows[0, : len(codes)].tolist() == lexicographic[:beam_size].tolist()


@either_softmax
def test_codes_that_the_step_forbids_are_not_returned(softmax_over):
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])

    def forbid(cache, prefixes):
        if prefixes.level == 0:
            return jnp.zeros((BATCH, 1, 2)), cache
        # after code 0 nothing of the catalogue is allowed, after code 1 only code 1
        after = jnp.array([[-jnp.inf, -jnp.inf, 0.0], [-jnp.inf, 0.0, 0.0]])
        return after[prefixes.codes[..., 0]], cache

    run = jax.jit(lambda trie: beam_search(forbid, (), trie, batch=BATCH, beam_size=4, softmax_over=softmax_over))
    beams = jax.device_get(run(CodeTrie.from_codes(codes, (2, 3))))
    assert beams.rows.tolist() == [[3, -1, -1, -1]] * BATCH
    assert beams.valid.tolist() == [[True, False, False, False]] * BATCH
    assert np.isfinite(beams.log_probs[:, 0]).all()


def test_a_model_that_yields_nan_is_seen_and_returns_no_item_twice():
    codes = catalogue((5, 7), 40, 0)
    p = jax.tree.map(lambda x: np.full_like(x, np.nan), parameters((5, 7), 0))
    beams = search(p, CodeTrie.from_codes(codes, (5, 7)), beam_size=40, softmax_over=SoftmaxOver.VOCABULARY)
    assert np.isnan(beams.log_probs).all()
    assert all(sorted(rows) == list(range(40)) for rows in beams.rows.tolist())


def test_catalogues_of_one_capacity_run_in_one_program_and_find_the_same():
    level_sizes, rng = (4, 3, 6), np.random.default_rng(0)
    p, capacity = parameters(level_sizes, 0), Capacity(items=60, fan_outs=level_sizes, leaf_items=60)

    @jax.jit
    def run(p, trie, mask):
        return beam_search(stateful_step(p), (), trie, batch=BATCH, beam_size=20, mask=mask)

    for num_items in (1, 7, 45, 60):
        codes = rng.integers(0, level_sizes, size=(num_items, 3))
        reference = Reference(p, codes, SoftmaxOver.VOCABULARY)
        trie = CodeTrie.from_codes(codes, level_sizes, capacity=capacity)
        allowed = rng.random((1, 60)) < 0.7  # rows that no item has yet among them
        beams = run(p, trie, ItemMask.from_items(trie, allowed=allowed, denied=np.array([[0, 59, -1]]), codes=codes))
        check_structure(beams, codes, 20)
        beams = jax.device_get(beams)
        for user in range(BATCH):
            left = allowed[0, :num_items] & (np.arange(num_items) != 0) & (np.arange(num_items) != 59)
            assert [r for r in beams.rows[user].tolist() if r >= 0] == reference.beam_search(user, 20, left)[0]
    assert run._cache_size() == 1
    trie = CodeTrie.from_codes(codes, level_sizes)  # a control: a trie without that capacity
    run(p, trie, ItemMask.from_items(trie, allowed=allowed, denied=np.array([[0, 59, -1]]), codes=codes))
    assert run._cache_size() == 2


@pytest.mark.parametrize("kind", ["floats", "ties", "minus infinity", "nan"])
def test_the_best_of_long_rows_are_those_of_one_sort(kind):
    scores = np.random.default_rng(0).normal(size=(4, 3999)).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    if kind in ("minus infinity", "nan"):
        scores[:, 3:] = dict(zip(("minus infinity", "nan"), (-np.inf, np.nan), strict=True))[kind]
    for k in (1, 5, 7, 16):  # of 124 blocks; the last of these in one stage
        values, index = jax.jit(top_k, static_argnums=1)(scores, k)
        expected = jax.lax.top_k(scores, k)
        assert np.array_equal(index, expected[1])
        assert np.array_equal(values, expected[0], equal_nan=True)


def test_bfloat16_logits_are_scored_in_float32():
    p = parameters((5, 7), 0)

    def low(cache, prefixes):
        logits, cache = stateful_step(p)(cache, prefixes)
        return logits.astype(jnp.bfloat16), cache

    def same_in_float32(cache, prefixes):
        logits, cache = low(cache, prefixes)
        return logits.astype(jnp.float32), cache

    trie = CodeTrie.from_codes(catalogue((5, 7), 40, 0), (5, 7))
    found, expected = (
        jax.jit(lambda t, s=step: beam_search(s, (), t, batch=BATCH, beam_size=40).log_probs)(trie)
        for step in (low, same_in_float32)
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_users_sharded_over_devices_get_the_same_items():
    level_sizes, num_items = CATALOGUES[1]
    trie = CodeTrie.from_codes(catalogue(level_sizes, num_items, 0), level_sizes)
    p = parameters(level_sizes, 0)
    p = {**p, "context": np.random.default_rng(0).normal(size=(16, DIM)).astype(np.float32)}
    run = functools.partial(search_on_device, trie=trie, beam_size=6, softmax_over=SoftmaxOver.VOCABULARY)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_user = NamedSharding(mesh, PartitionSpec("data"))
    sharded, alone = run({**p, "context": jax.device_put(p["context"], by_user)}), run(p)
    assert np.array_equal(sharded.rows, alone.rows)
    np.testing.assert_allclose(sharded.log_probs, alone.log_probs, rtol=1e-5)
    assert sharded.rows.sharding.is_equivalent_to(by_user, 2)


def test_bad_arguments_are_refused():
    p, trie = parameters((5, 7), 0), CodeTrie.from_codes(np.array([[0, 0], [4, 6]]), (5, 7))
    run = functools.partial(beam_search, stateful_step(p), (), batch=BATCH)
    assert run(trie, beam_size=1).valid.all()
    with pytest.raises(ValueError, match="beam_size must be at least 1, got 0"):
        run(trie, beam_size=0)
    with pytest.raises(ValueError, match="num_results must be from 1 to beam_size 2, got 3"):
        run(trie, beam_size=2, num_results=3)
    with pytest.raises(ValueError, match=r"\(3, 1, 4\) at level 0, got \(3, 1, 5\)"):
        run(CodeTrie.from_codes(np.array([[0, 0]]), (4, 7)), beam_size=1)
