"""Conditions on the next item, for every family: where they reach, that search and exact scores agree on them, and that
they are learned."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from seq_models import (
    CodeTrie,
    ConditionEncoder,
    Conditions,
    ConditionSizes,
    DenseConfig,
    EncoderDecoderConfig,
    FlatDecoderConfig,
    HybridConfig,
    ItemTables,
    Layout,
    ParallelHeadsConfig,
    RequestBatch,
    RQTransformerConfig,
    SoftmaxOver,
    TrainingBatch,
    TransformerConfig,
)
from seq_models.conditions import EventHead, after_histories

ITEMS, SIZES, LENGTH, USERS = 12, (4, 4), 4, 3
STACK = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
FAMILIES = {
    "rq": RQTransformerConfig(STACK),
    "flat": FlatDecoderConfig(STACK),
    "encoder-decoder": EncoderDecoderConfig(STACK, decoder_layers=1),
    "dense": DenseConfig(STACK),
    "hybrid": HybridConfig(STACK),
    "parallel": ParallelHeadsConfig(STACK),
}
MODELS = {**{name: (name, False) for name in FAMILIES}, **{f"{n}, film": (n, True) for n in ("rq", "dense", "hybrid")}}
ASKED = ConditionSizes(event=2, group=3, text=5, inputs=2)
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def tables() -> ItemTables:
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.permutation(16)[:ITEMS], SIZES), axis=1).astype(np.int32)
    groups = np.array([[1 + row % 3, (row % 2) * (1 + (row + 1) % 3)] for row in range(ITEMS)], np.int32)
    texts = rng.normal(size=(ITEMS, 5)).astype(np.float32) * (np.arange(ITEMS) != 4)[:, None]  # one has no text
    features = rng.normal(size=(ITEMS, 3)).astype(np.float32)
    return ItemTables.from_arrays(codes, features, np.ones(ITEMS, np.int64), groups=groups, texts=texts)


def trie(name):
    return None if name.startswith("dense") else CodeTrie.from_codes(np.asarray(tables().codes), SIZES)


def fresh(name, sizes=ASKED):
    family, film = MODELS[name]
    width = 3 if family == "hybrid" else 0
    rngs = nnx.Rngs(0)
    model = FAMILIES[family].build(level_sizes=SIZES, num_items=ITEMS, num_features=width, rngs=rngs)
    if sizes is not None:
        model.add_conditions(replace(sizes, film=film), rngs=rngs)
    return model


@functools.cache
def random(name, sizes=ASKED):
    """A model far from its initialization: embeddings of conditions are no longer zero."""
    graph, params = nnx.split(fresh(name, sizes))
    rng = np.random.default_rng(1)
    return graph, jax.tree.map(lambda x: x + jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), params)


def asked(event=0, group=0, text=0.0):
    return Conditions(jnp.full(USERS, event), jnp.full(USERS, group), jnp.full((USERS, 5), text))


def requests(condition, *, events=2):
    rng = np.random.default_rng(2)
    history = jnp.asarray(rng.integers(0, ITEMS, (USERS, LENGTH)), jnp.int32)
    segments = jnp.asarray(np.arange(LENGTH) < np.array([[4], [2], [3]]), jnp.int32)
    return RequestBatch(history, segments, events=segments * events, target_conditions=condition)


@functools.partial(jax.jit, static_argnums=0)
def _catalog(graph, params, told, among, asking):
    return nnx.merge(graph, params).log_probs(
        told, among, asking, jnp.arange(ITEMS), softmax_over=SoftmaxOver.VOCABULARY
    )


def catalog(model, name, asking):
    return np.asarray(_catalog(*model, tables(), trie(name), asking))


@every_model
def test_a_fresh_model_is_the_unconditioned_one(name):
    plain, told = nnx.split(fresh(name, None)), nnx.split(fresh(name))
    assert {str(path) for path, _ in jax.tree.leaves_with_path(plain[1])} < {
        str(path) for path, _ in jax.tree.leaves_with_path(told[1])
    }
    conditioned = catalog(told, name, requests(asked(1, 2, 0.5)))
    np.testing.assert_array_equal(conditioned, catalog(plain, name, requests(None)._replace(events=None)))


@every_model
def test_every_part_of_a_condition_moves_the_scores_and_no_condition_is_any(name):
    model = random(name)
    unasked = catalog(model, name, requests(asked()))
    for condition in (asked(event=1), asked(event=2), asked(group=3), asked(text=0.3)):
        assert np.abs(catalog(model, name, requests(condition)) - unasked).max() > 1e-2
    assert (
        np.abs(catalog(model, name, requests(asked(), events=1)) - unasked).max() > 1e-3
    )  # inputs, and conditions met
    np.testing.assert_array_equal(catalog(model, name, requests(Conditions())), unasked)
    np.testing.assert_array_equal(catalog(model, name, requests(None)), unasked)


@every_model
def test_search_and_exact_scores_agree_under_a_condition(name):
    model, asking = random(name), requests(asked(2, 1, -0.4))

    @jax.jit
    def both(params, told, among, asking):
        m = nnx.merge(model[0], params)
        options = {"softmax_over": SoftmaxOver.CHILDREN}
        top = m.top(told, among, asking, k=ITEMS, beam_size=16, **options)
        whole = m.catalog_log_probs(told, among, asking, blocks=blocks, **options)
        return top, whole, m.log_probs(told, among, asking, jnp.arange(ITEMS), **options)

    blocks = nnx.merge(*model).leaf_blocks(trie(name))
    top, whole, exact = both(model[1], tables(), trie(name), asking)
    np.testing.assert_allclose(whole, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.exp(exact).sum(axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(top.scores, np.take_along_axis(np.asarray(exact), np.asarray(top.rows), 1), atol=1e-4)
    assert (np.diff(np.asarray(top.scores), axis=1) <= 1e-6).all()


def training_batch(model, targets, target_events):
    """One history a row, the target at its end alone, in the model's layout."""
    asking = requests(None)
    history, segments, events = asking.history, asking.segments, asking.events
    lengths, users = np.asarray(segments).sum(axis=1), np.arange(USERS)
    if model.layout is Layout.SINGLE:
        told = {"events": events, "target_events": jnp.asarray(target_events)}
        return TrainingBatch(history, segments, jnp.asarray(targets), **told)
    pad = ((0, 0), (0, 1))
    history, segments, events = (np.pad(np.asarray(x), pad) for x in (history, segments, events))
    following, following_events = (np.full(history.shape, fill, np.int32) for fill in (-1, 0))
    following[:, :-1] = np.where(segments[:, 1:] > 0, history[:, 1:], -1)
    following_events[:, :-1] = events[:, 1:]
    following[users, lengths - 1], following_events[users, lengths - 1] = targets, target_events
    history[users, lengths], events[users, lengths] = targets, target_events
    if model.layout is Layout.CLOSED:
        segments[users, lengths] = 1
    return TrainingBatch(
        *map(jnp.asarray, (history, segments, following)), None, None, *map(jnp.asarray, (events, following_events))
    )


def target_loss(model, batch, targets):
    """Loss of the last targets alone: the others weigh nothing, but are told as conditions all the same."""
    events, conditions = model.training_conditions(tables(), batch, None)
    if batch.targets.ndim == 2:
        last = (
            np.asarray(batch.segments if model.layout is not Layout.CLOSED else batch.targets >= 0).astype(bool).sum(1)
            - 1
        )
        kept = np.full(batch.targets.shape, -1, np.int32)
        kept[np.arange(USERS), last] = targets
        told = conditions
        model.training_conditions = lambda *_: (
            events,
            told,
        )  # as the whole batch says, whatever is left of the targets
        batch = batch._replace(targets=jnp.asarray(kept))
    terms = model.loss_terms(tables(), batch)
    return float(jnp.sum(terms.get("loss/dense", terms.get("loss/level", terms.get("loss/item")))))


@every_model
def test_a_training_target_is_scored_as_a_request_that_asks_for_what_it_is(name):
    """Histories tell the same in training and in recommendation, and the target's event enters as condition alone."""
    graph, params = random(name)
    targets, target_events = np.array([3, 4, 9], np.int32), np.array([2, 1, 2], np.int32)
    own = tables().conditions(jnp.asarray(targets), jnp.asarray(target_events))
    scores = catalog((graph, params), name, requests(own))
    model = nnx.merge(graph, params)
    loss = target_loss(model, training_batch(model, targets, target_events), targets)
    assert loss == pytest.approx(-scores[np.arange(USERS), targets].mean(), rel=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if "encoder" not in name])
def test_no_position_reads_the_condition_of_a_later_one(name):
    graph, params = random(name)
    model = nnx.merge(graph, params)
    batch = training_batch(model, np.array([3, 4, 9], np.int32), np.array([2, 1, 2], np.int32))
    events, conditions = model.training_conditions(tables(), batch, None)

    @jax.jit
    def run(params, event, inputs):
        m = nnx.merge(graph, params)
        told = {"events": inputs, "conditions": conditions._replace(event=event)}
        if isinstance(m, type(nnx.merge(*random("dense")))):
            return [m.states(m.vectors(None), batch.history, batch.segments, **told)]
        read = tables().inputs(batch.history)._replace(**told)
        return m.decode(read, batch.segments, batch.target_codes(tables())).logits

    before = run(params, conditions.event, events)
    for at in range(LENGTH):
        after = run(params, conditions.event.at[:, at].set(0), events)
        for old, new in zip(before, after, strict=True):
            changed = np.abs(np.asarray(old - new)).max(axis=-1) > 1e-6
            assert not changed[:, :at].any()
        first = np.abs(np.asarray(before[0] - after[0])).max(axis=-1) > 1e-6
        assert first[0, at]  # and the first code of the very next item does: history 0 is there all along
        if "film" not in name:
            continue
        assert not first[0, at + 1 :].any()  # a modulated state is of one item alone
    later = run(params, conditions.event, events.at[:, 2].set(1))
    assert not any((np.abs(np.asarray(a - b)) > 1e-6)[:, :2].any() for a, b in zip(before, later, strict=True))


def test_a_share_of_the_conditions_is_left_out_in_training():
    """The others have every set of parts, so that a part is asked for alone as often as with another."""
    sizes = ConditionSizes(event=2, group=3, text=5, inputs=2, drop=0.2)
    encoder = ConditionEncoder(sizes, STACK, rngs=nnx.Rngs(0))
    ones = jnp.ones((2000, 8), jnp.int32)
    told = Conditions(ones, ones, jnp.ones((2000, 8, 5)))
    events, left = encoder.drop(ones, told, jax.random.key(0))
    assert (np.asarray(left.text).std(axis=-1) == 0).all()
    subsets = np.asarray(left.event) + 2 * np.asarray(left.group) + 4 * np.asarray(left.text)[..., 0].astype(int)
    for unknown in (np.asarray(events) == 0, subsets == 0):
        assert unknown.mean() == pytest.approx(1 - 0.9**2, abs=0.02)
        assert unknown.all(axis=1).mean() == pytest.approx(0.1, abs=0.02)  # whole rows, so that nothing is known
    assert np.corrcoef((np.asarray(events) == 0).ravel(), (subsets == 0).ravel())[0, 1] < 0.03
    shares = np.bincount(subsets.ravel(), minlength=8) / subsets.size
    np.testing.assert_allclose(shares[1:], 0.9**2 / 7, atol=0.01)
    assert encoder.drop(ones, told, None) == (ones, told)
    alone = ConditionEncoder(ConditionSizes(event=2, drop=0.2), STACK, rngs=nnx.Rngs(0))
    _, one = alone.drop(None, told, jax.random.key(0))
    assert (one.group, one.text) == (None, None)
    assert (np.asarray(one.event) == 0).mean() == pytest.approx(1 - 0.9**2, abs=0.02)


def test_of_several_groups_one_is_drawn():
    groups = jnp.asarray([[1, 0, 0], [2, 3, 0], [0, 0, 0]], jnp.int32)
    told = tables()._replace(groups=groups)
    rows = jnp.tile(jnp.asarray([0, 1, 2, -1]), 500)
    drawn = np.asarray(told.conditions(rows, None, key=jax.random.key(0)).group).reshape(-1, 4)
    assert (drawn[:, [0, 2, 3]] == [1, 0, 0]).all()
    assert set(drawn[:, 1].tolist()) == {2, 3}
    assert (drawn[:, 1] == 2).mean() == pytest.approx(0.5, abs=0.07)
    assert np.asarray(told.conditions(rows, None).group)[:4].tolist() == [1, 2, 0, 0]


def test_conditions_follow_histories_padded_on_either_side():
    segments = jnp.asarray([[0, 1, 1], [1, 1, 0], [0, 0, 0]], jnp.int32)
    own = Conditions(jnp.asarray([[0, 7, 8], [5, 6, 0], [0, 0, 0]], jnp.int32), None, None)
    got = after_histories(own, Conditions(jnp.asarray([1, 2, 3]), jnp.asarray([4, 0, 9]), None), segments)
    assert np.asarray(got.event)[np.asarray(segments) > 0].tolist() == [8, 1, 6, 2]
    assert np.asarray(got.group)[np.asarray(segments) > 0].tolist() == [0, 4, 0, 0]
    assert got.text is None


@pytest.mark.parametrize("name", ["flat", "encoder-decoder"])
def test_film_is_refused_where_no_state_is_decoded(name):
    model = fresh(name, None)
    with pytest.raises(ValueError, match="FiLM needs one state that an item is decoded from"):
        model.add_conditions(replace(ASKED, film=True), rngs=nnx.Rngs(0))
    model.add_conditions(ASKED, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"drop in \[0, 1\)"):
        ConditionSizes(drop=1.0)


@pytest.mark.parametrize("name", [name for name in MODELS if name.split(",")[0] in ("rq", "dense", "hybrid")])
def test_events_are_learned_from_all_targets_unless_the_history_has_read_the_answer(name):
    """FiLM acts behind what the head reads; a condition that is added to the input would give the event away."""
    graph, params = random(name, replace(ASKED, head=2))
    model = nnx.merge(graph, params)
    batch = training_batch(model, np.array([3, 4, 9], np.int32), np.array([2, 1, 2], np.int32))
    told = tables()
    loss = jax.jit(lambda params, batch: nnx.merge(graph, params).loss_terms(told, batch)["loss/event"])
    unasked = loss(params, batch._replace(target_events=jnp.zeros_like(batch.target_events)))
    assert unasked == 0  # no event is known
    if "film" not in name:
        assert loss(params, batch) == 0  # every event is asked for
        return
    assert loss(params, batch) > 0
    read = jax.jit(lambda params, asking: nnx.merge(graph, params).event_log_probs(told, asking, rows))
    rows = jnp.tile(jnp.arange(ITEMS), (USERS, 1))
    found = [np.asarray(read(params, requests(asked(event)))) for event in (0, 1)]
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(np.exp(found[0]).sum(axis=-1), 1, atol=1e-5)


def test_events_of_items_that_suit_the_history_are_learned():
    """Neither state nor item tells the event, the two together do."""
    rng = np.random.default_rng(0)
    states, items = (jnp.asarray(rng.choice([-1.0, 1.0], (2, 1024, 8)), jnp.float32) for _ in range(2))
    event = (jnp.sum(states * items, axis=-1) > 0).astype(jnp.int32)
    graph, params = nnx.split(EventHead(2, STACK, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(0.02)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = nnx.merge(graph, params)(states[0], items[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, event[0]).mean()

        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(200):
        params, state = step(params, state)
    guessed = nnx.merge(graph, params)(states[1], items[1]).argmax(axis=-1)
    assert (guessed == event[1]).mean() > 0.8


@every_model
def test_the_item_that_follows_is_learned_to_depend_on_what_is_asked(name):
    """Event 1 is always followed by item 1, event 2 by item 2, whatever the history: without a condition, either."""
    sizes = ConditionSizes(event=2, drop=0.4)
    graph, params = nnx.split(fresh(name, sizes))
    layout = nnx.merge(graph, params).layout
    rng = np.random.default_rng(0)
    told = tables()._replace(groups=None, texts=None)
    optimizer = optax.adam(optax.linear_schedule(0.03, 0.0, 200))

    def batch():
        history = rng.integers(3, ITEMS, (32, 3)).astype(np.int32)
        event = rng.integers(1, 3, 32).astype(np.int32)
        nothing = np.zeros_like(history)
        if layout is Layout.SINGLE:
            before, none = history[:, :2], nothing[:, :2]
            return TrainingBatch(before, np.ones_like(before), event, events=none, target_events=event)
        targets, events = np.full_like(history, -1), nothing.copy()
        targets[:, 1], events[:, 1] = event, event
        history[:, 2] = event
        return TrainingBatch(history, np.ones_like(history), targets, events=nothing, target_events=events)

    @jax.jit
    def step(params, state, batch, key):
        def loss(params):
            terms = nnx.merge(graph, params).loss_terms(told, batch, key=key)
            return sum(jnp.sum(term) for term in terms.values())

        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number in range(200):
        params, state = step(params, state, jax.tree.map(jnp.asarray, batch()), jax.random.key(number))
    history = jnp.asarray(rng.integers(3, ITEMS, (USERS, 2)), jnp.int32)
    for event in (1, 2, 0):
        condition = Conditions(jnp.full(USERS, event))
        asking = RequestBatch(
            history, jnp.ones_like(history), events=jnp.zeros_like(history), target_conditions=condition
        )
        probabilities = np.exp(np.asarray(_catalog(graph, params, told, trie(name), asking)))
        best = probabilities.argmax(axis=1)
        if event:
            assert (best == event).all()
            assert (probabilities[:, event] > 0.7).all()
        else:
            assert (probabilities[:, 1:3] > 0.2).all()
