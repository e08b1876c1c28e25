"""Gain of asking: events that are shuffled, and the differences that the table has; it trains for minutes."""

from collections import Counter

import numpy as np

from experiments.benchmarks.conditions import _shuffled, table
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
