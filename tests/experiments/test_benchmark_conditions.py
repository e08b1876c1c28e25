"""Gain of asking, values and groups: the figures that are measured; the benchmarks train for minutes."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from experiments.benchmarks.conditions import _shuffled, table
from experiments.benchmarks.group_heads import entropy, inside, switch
from experiments.benchmarks.steering import without_names, without_words
from experiments.benchmarks.values import calibration_error
from semid.data.simulated import Events, SimulatedConfig, simulate

NAMES = ("never told", "any", "own", "exchanged", "shuffled", "oracle", "oracle, own")


def test_differences_are_paired_by_seed():
    measured = [
        dict(zip(NAMES, row, strict=True)) for row in np.array([[2, 2, 4, 1, 2, 4, 8], [4, 5, 7, 3, 3, 8, 10]]) / 10
    ]
    lines = dict(line.strip("| ").split(" | ") for line in table(measured)[2:])
    assert lines["own"] == "+0.5500 ± 0.1500"
    assert lines["own - never told"] == "+0.2500 ± 0.0500"
    assert lines["any - never told"] == "+0.0500 ± 0.0500"
    assert lines["shuffled - never told"] == "-0.0500 ± 0.0500"
    assert lines["own - exchanged"] == "+0.3500 ± 0.0500"
    assert lines["share of the oracle: own - never told"] == "+0.1000 ± 0.1000"


def test_shuffled_events_are_the_same_on_other_interactions():
    world = SimulatedConfig(num_items=80, num_users=40, images=False, events=Events())
    dataset = simulate(world).dataset
    other = _shuffled(dataset, 0)
    assert Counter(other.event.to_pylist()) == Counter(dataset.event.to_pylist())
    assert not other.event.equals(dataset.event)
    assert np.array_equal(other.item, dataset.item)


def test_calibration_error_is_the_gap_between_probability_and_share():
    p = np.repeat([[0.25, 0.75], [0.9, 0.1]], 8, axis=0)
    done = np.array([0, 0, 0, 0, 1, 1, 1, 1] + [0] * 8)  # half of the first bin, all of the second
    assert calibration_error(p, done) == pytest.approx((0.25 + 0.1) / 2)
    fair = np.array([0, 0, 1, 1, 1, 1, 1, 1])
    assert calibration_error(p[:8], fair) == pytest.approx(0)


def test_losses_inside_a_group_and_of_the_switch_add_up_to_the_item():
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet(np.ones(8), size=5))
    codes = np.stack(np.unravel_index(np.arange(8), (2, 2, 2)), axis=1)  # no two items share all
    group, targets = np.array([0, 1, 0, 1, 1, 0, 0, 1]), rng.integers(0, 8, 5)
    of_group = switch(log_probs, group, 2)
    np.testing.assert_allclose(np.exp(of_group).sum(axis=1), 1)
    levels = inside(log_probs, targets, group, codes)
    assert levels.shape == (3, 5)
    users = np.arange(5)
    np.testing.assert_allclose(levels.sum(axis=0) - of_group[users, group[targets]], -log_probs[users, targets])
    first = [log_probs[u][(group == group[t]) & (codes[:, 0] == codes[t, 0])] for u, t in enumerate(targets)]
    every = [log_probs[u][group == group[t]] for u, t in enumerate(targets)]
    expected = [np.log(np.exp(b).sum() / np.exp(a).sum()) for a, b in zip(first, every, strict=True)]
    np.testing.assert_allclose(levels[0], expected)


def test_entropy_of_groups_is_in_bits():
    np.testing.assert_allclose(entropy(np.array([[0, 0, 1, 1], [2, 2, 2, 2], [0, 1, 2, 3]]), 4), [1, 0, 2])


def test_names_are_left_out_of_texts_and_of_lists():
    items = pa.table({"brand": ["acme", None, "bolt"], "genres": [["a", "b"], [], ["b"]]})
    assert without_names(items, "brand", {"bolt"})["brand"].to_pylist() == ["acme", None, None]
    assert without_names(items, "genres", {"b"})["genres"].to_pylist() == [["a"], [], []]


def test_words_are_left_out_of_texts():
    items = pa.table({"text": ["A western, of dramatic Sci-Fi.", None, "Midwestern"]})
    left = without_words(items, "text", {"Western", "Drama", "Sci-Fi"})["text"].to_pylist()
    assert left == ["A , of  .", None, "Midwestern"]
