"""Events of simulated interactions: the oracle of a conditioned question, and position bias undone by weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from simulated_by_hand import components, history_of

from semid import config as configs
from semid.data import Histories
from semid.data.simulated import EVENTS, Events, SimulatedConfig, simulate
from semid.data.simulated.config import COMPONENTS
from semid.data.simulated.events import draw_log
from semid.data.simulated.world import draw_next
from semid.errors import SemidError
from semid.evaluation import baselines, compare, evaluate

PLAIN = SimulatedConfig(num_items=60, num_users=600, taxonomy=(2, 2, 2), max_length=20, images=False, seed=3)
TABLE = np.array([getattr(Events(), name) for name in COMPONENTS])
AT = ((0, 0), (2, 1), (3, 2), (1, 3), (5, 4))


@pytest.fixture(scope="module")
def plain():
    return simulate(PLAIN)


@pytest.fixture(scope="module")
def world():
    return simulate(dataclasses.replace(PLAIN, events=Events()))


@pytest.fixture(scope="module")
def biased():
    return simulate(dataclasses.replace(PLAIN, events=Events(position_bias=1.0)))


def _target_events(dataset, examples):
    return dataset.event.take(examples.histories.ends).to_pylist()


def test_without_events_a_world_is_that_of_before(plain):
    assert plain.dataset.digest == "a3a7650c187d37e288c150c8bf118f7e5529ef8d292761273ab29f7867d45481"  # of 53b140b
    assert plain.dataset.event is plain.dataset.weight is plain.oracle.log is None
    assert "events" not in plain.dataset.source["config"]


def test_events_change_no_interaction_and_are_made_again_from_the_config(plain, world, biased):
    for made in (world, biased):
        for name in ("user", "item", "time"):
            np.testing.assert_array_equal(getattr(made.dataset, name), getattr(plain.dataset, name))
        again = simulate(configs.from_dict(SimulatedConfig, made.dataset.source["config"])).dataset
        assert again.event.equals(made.dataset.event)
        assert again.digest == made.dataset.digest != plain.dataset.digest
        assert set(made.dataset.event.to_pylist()) == set(EVENTS)
    assert world.dataset.weight is None


@pytest.mark.parametrize(("user", "step"), AT)
def test_bayes_by_hand(world, user, step):
    """p(item | history, event) and P(event | item, history) of the mixture written out component by component."""
    joint = TABLE.T @ components(world, user, step)  # [event, item]
    history = history_of(world, user, step)
    for name, p in zip(EVENTS, joint, strict=True):
        np.testing.assert_allclose(world.oracle.probabilities(history, event=name)[0], p / p.sum(), rtol=1e-12)
    items = np.flatnonzero(joint.sum(axis=0))
    found = world.oracle.event_probabilities(history, items[None])[0]
    np.testing.assert_allclose(found, (joint / np.maximum(joint.sum(axis=0), 1e-300)).T[items], rtol=1e-10)
    given = [world.oracle.probabilities(history, event=name)[0] for name in EVENTS]
    assert 0.5 * np.abs(given[0] - given[2]).sum() > 0.05  # control: the condition matters


def test_no_event_is_any_event(biased):
    """None for some histories: their distribution without condition, places or not."""
    histories = biased.dataset.splits.test.histories.take(slice(0, 8))
    asked = [None, "buy", None, "exposure", "click", None, "exposure", "buy"]
    found = biased.oracle.probabilities(histories, event=asked)
    for row, event in enumerate(asked):
        alone = biased.oracle.probabilities(histories.take(slice(row, row + 1)), event=event)
        np.testing.assert_allclose(found[row], alone[0], rtol=1e-12)


def test_bayes_by_hand_with_places(biased):
    """An item counts for click and buy by its examination, for exposure by the rest too."""
    shown = biased.oracle.world.shown
    np.testing.assert_allclose(shown.place.sum(axis=1), 1)
    np.testing.assert_allclose(shown.examined, 1 / np.arange(1, 11))
    seen = shown.place @ shown.examined
    assert seen.max() == 1  # the most popular item always stands first
    for user, step in AT:
        p = components(biased, user, step)
        joint = TABLE.T @ p * seen
        joint[0] += p.sum(axis=0) * (1 - seen)
        history = history_of(biased, user, step)
        for name, mass in zip(EVENTS, joint, strict=True):
            found = biased.oracle.probabilities(history, event=name)[0]
            np.testing.assert_allclose(found, mass / mass.sum(), rtol=1e-12)
        items = np.flatnonzero(p.sum(axis=0))
        found = biased.oracle.event_probabilities(history, items[None])[0]
        np.testing.assert_allclose(found, (joint / np.maximum(p.sum(axis=0), 1e-300)).T[items], rtol=1e-10)


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_draws_of_item_and_event_follow_the_components(bias, world, biased):
    """Chi-square of 20,000 draws of one user's next item and event; the control exchanges two events."""
    simulation, user, step, draws = (biased if bias else world), 7, 4, 20_000
    dataset, oracle = simulation
    rows = dataset.item[dataset.offsets[user] :][:step]
    users, rng = np.full(draws, user), np.random.default_rng(0)
    drawn = draw_next(oracle.world, oracle.people, users=users, seen=np.tile(rows, (draws, 1)), rng=rng)
    examined = oracle._events_if_examined(history_of(simulation, user, step), np.arange(60)[None])[0]
    log = draw_log(oracle.world.shown, drawn, examined[drawn], rng)
    event = np.array([EVENTS.index(name) for name in log.event.to_pylist()])
    observed = np.bincount(drawn * 3 + event, minlength=180)
    p = components(simulation, user, step)
    seen = oracle.world.shown.place @ oracle.world.shown.examined
    joint = TABLE.T @ p * seen
    joint[0] += p.sum(axis=0) * (1 - seen)
    joint /= joint.sum()
    assert _chi_square(observed, joint.T.reshape(-1)) < 5
    assert _chi_square(observed, joint[[1, 0, 2]].T.reshape(-1)) > 50


def _chi_square(observed, p):
    """Pearson's statistic in deviations above its mean; rare cells are pooled, an impossible one makes it infinite."""
    expected = p * observed.sum()
    if observed[p == 0].any():
        return np.inf
    rare = expected < 20
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    observed = np.append(observed[~rare], observed[rare].sum())
    freedom = len(expected) - 1
    return (((observed - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("name", ["world", "biased"])
def test_recorded_events_have_the_oracles_probabilities(name, request):
    """Over all interactions: counts of each event within 4 deviations, and those of shifted interactions not."""
    dataset, oracle = request.getfixturevalue(name)
    at = np.arange(len(dataset.item))
    histories = Histories(dataset.user, dataset.item, dataset.offsets[dataset.user], at)
    p = oracle.event_probabilities(histories, dataset.item[:, None])[:, 0]
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)
    event = np.array([EVENTS.index(each) for each in dataset.event.to_pylist()])
    assert np.abs(_standard_score(event, p)).max() < 4
    # Calibrated where it is confident, which the same events of other interactions are not.
    likely = p[:, 2] > 0.4
    assert np.abs(_standard_score(event[likely], p[likely])).max() < 4
    assert np.abs(_standard_score(np.roll(event, 1)[likely], p[likely])).max() > 5


def _standard_score(event, p):
    one_hot = np.eye(3)[event]
    return (one_hot - p).sum(axis=0) / np.sqrt((p * (1 - p)).sum(axis=0))


def test_a_group_and_an_event_together(world):
    history = history_of(world, 3, 2)
    of_cell = world.oracle.world.cell == world.oracle.people.early[3, 0]
    p = world.oracle.probabilities(history, event="buy")[0]
    given = world.oracle.probabilities(history, event="buy", allowed=of_cell)[0]
    np.testing.assert_allclose(given, np.where(of_cell, p, 0) / p[of_cell].sum(), rtol=1e-12)
    ranked = world.oracle.rank(history, k=60, condition={"event": "buy"}, allowed=of_cell)[0]
    assert set(ranked[ranked >= 0]) == set(np.flatnonzero(given))
    nothing = world.oracle.probabilities(history, allowed=np.zeros(60, bool))
    assert not nothing.any()


def test_the_ranker_takes_one_condition_or_one_per_history(world, monkeypatch):
    histories = world.dataset.splits.test.histories.take(slice(0, 30))
    alone = [world.oracle.rank(histories, k=7, condition={"event": name}) for name in EVENTS]
    alone.append(world.oracle.rank(histories, k=7))
    each = [{"event": EVENTS[row % 4]} if row % 4 < 3 else {} for row in range(30)]
    expected = np.array([alone[row % 4][row] for row in range(30)])
    np.testing.assert_array_equal(world.oracle.rank(histories, k=7, condition=each), expected)
    monkeypatch.setattr("semid.data.simulated.oracle.DENSE_ENTRIES", 300)  # five rows at a time
    np.testing.assert_array_equal(world.oracle.rank(histories, k=7, condition=each), expected)
    assert not np.array_equal(alone[2], alone[0])


def test_the_evaluator_asks_for_what_targets_are(biased):
    """As it asks models: each target by its event; and what the same lists are without it."""
    dataset, oracle = biased
    examples = dataset.splits.test
    events = _target_events(dataset, examples)
    ranked = oracle.rank(examples.histories, k=5, condition=[{"event": event} for event in events])
    own = evaluate(oracle, dataset, ks=(5,), own=("event",))
    np.testing.assert_array_equal(own.ranked, ranked)
    assert own.provenance["own_conditions"] == ["event"]
    compared = compare(baselines(dataset, asked=("event",)), dataset, ks=(5,), own=("event",))
    assert compared["oracle"].values == own.values
    plain = compare(baselines(dataset), dataset, ks=(5,))
    assert compared["popularity"].values == plain["popularity"].values
    assert not np.array_equal(compared["oracle"].ranked, plain["oracle"].ranked)
    assert "oracle" not in baselines(dataset, asked=("event", "group"))
    with pytest.raises(SemidError, match="knows its world's events alone, and cannot be asked for group"):
        evaluate(oracle, dataset, own=("group",))


def test_the_condition_of_the_target_helps_and_another_targets_does_not(world):
    dataset, oracle = world
    examples = dataset.splits.test
    events = _target_events(dataset, examples)
    shuffled = np.random.default_rng(0).permutation(events).tolist()
    logs = [
        np.log(oracle.probabilities(examples.histories, event=event)[np.arange(len(events)), examples.targets])
        for event in (None, events, shuffled)
    ]
    gain, control = logs[1] - logs[0], logs[2] - logs[0]
    assert gain.mean() > 4 * gain.std() / np.sqrt(len(gain))
    assert control.mean() < 0


def test_weights_undo_the_position_bias(biased):
    """Clicks and purchases by item: weighted they are what examining everything gives, unweighted they are not."""
    dataset, oracle = biased
    at = np.arange(len(dataset.item))
    histories = Histories(dataset.user, dataset.item, dataset.offsets[dataset.user], at)
    p = 1 - oracle._events_if_examined(histories, dataset.item[:, None])[:, 0, 0]  # click or buy, if examined
    recorded = np.array(dataset.event.to_pylist()) != "exposure"
    assert (dataset.weight[~recorded] == 1).all()
    np.testing.assert_allclose(dataset.weight[recorded], 1 + oracle.log.place[recorded], rtol=1e-6)
    unbiased = np.bincount(dataset.item, p, minlength=60)
    shown = oracle.world.shown
    variance = np.bincount(dataset.item, p * (shown.place @ (1 / shown.examined))[dataset.item] - p**2, minlength=60)
    weighted = np.bincount(dataset.item, dataset.weight * recorded, minlength=60)
    counts = np.bincount(dataset.item, recorded, minlength=60)
    counts = counts * unbiased.sum() / counts.sum()  # as popularity: shares of a whole
    assert abs(_excess(weighted, unbiased, variance)) < 4
    assert _excess(counts, unbiased, variance) > 50
    # Popular items stand above, so that they have too many of the clicks that are recorded.
    popular = np.argsort(-unbiased)[:10]
    assert counts[popular].sum() > 1.2 * unbiased[popular].sum()


def _excess(counts, expected, variance):
    return (((counts - expected) ** 2 / variance).sum() - len(counts)) / np.sqrt(2 * len(counts))


def test_a_simulated_datasets_oracle_knows_its_events(world, tmp_path):
    saved = world.dataset.save(tmp_path / "dataset")
    loaded = type(saved).load(tmp_path / "dataset")
    assert loaded.event.equals(world.dataset.event)
    histories = loaded.splits.test.histories
    oracles = (world.oracle, baselines(loaded)["oracle"])
    ranks = [oracle.rank(histories, k=5, condition={"event": "buy"}) for oracle in oracles]
    np.testing.assert_array_equal(*ranks)


def test_unknown_events_and_worlds_without_are_named(plain, world):
    history = history_of(world, 3, 2)
    with pytest.raises(SemidError, match=r"has events exposure, click, buy, not 'bought'; did you mean 'buy'\?"):
        world.oracle.probabilities(history, event="bought")
    with pytest.raises(SemidError, match="expected one event or 1, one per history, got 2"):
        world.oracle.probabilities(history, event=["buy", "click"])
    with pytest.raises(SemidError, match="this simulated world has no events"):
        plain.oracle.probabilities(history, event="buy")
    assert world.oracle.probabilities(history, event=["buy"]).shape == (1, 60)
    for condition in ({"group": "a"}, [{"event": "buy"}] * 2):
        with pytest.raises(SemidError, match=r"takes one condition \{'event': NAME\}, or one per history"):
            world.oracle.rank(history, k=5, condition=condition)
    with pytest.raises(SemidError, match=r"events.taste: expected probabilities .* sum 1, got \(0.5, 0.6, 0.1\)"):
        Events(taste=(0.5, 0.6, 0.1))
    with pytest.raises(SemidError, match=r"events.position_bias: expected 0 \(none\) or more, got -1"):
        Events(position_bias=-1.0)
