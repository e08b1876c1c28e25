"""Code health against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from quantizers import CodeHealth, LevelHealth, health, reconstruction_error


def test_hand_worked_health():
    found = health(np.array([[0, 1], [0, 1], [1, 0], [2, 0]]), (4, 2))
    entropy = 1.5 * np.log(2)  # shares 1/2, 1/4, 1/4
    first, second = found.levels
    assert (first.size, first.usage, first.dead) == (4, 0.75, 1)
    np.testing.assert_allclose([first.entropy, first.perplexity], [entropy, 2**1.5])
    assert (second.size, second.usage, second.dead) == (2, 1.0, 0)
    np.testing.assert_allclose([second.entropy, second.perplexity], [np.log(2), 2])
    assert (found.items, found.collision_rate, found.largest_group) == (4, 0.5, 2)


def test_a_collapsed_and_a_perfect_assignment():
    collapsed = health(np.zeros((5, 1), np.int32), (3,))
    assert collapsed == CodeHealth(5, (LevelHealth(3, 1 / 3, 2, 0.0, 1.0),), 1.0, 5)
    perfect = health(np.arange(8)[:, None], (8,))
    assert (perfect.collision_rate, perfect.largest_group, perfect.levels[0].dead) == (0.0, 1, 0)
    np.testing.assert_allclose(perfect.levels[0].perplexity, 8)


def test_health_is_json():
    found = asdict(health(np.array([[0, 1], [1, 1]]), (2, 2)))
    assert json.loads(json.dumps(found)) == found | {"levels": list(found["levels"])}


def test_reconstruction_error():
    assert reconstruction_error(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 0.0], [0.0, 4.0]])) == 13 / 4
    with pytest.raises(ValueError, match=r"\(2, 2\), \(2, 1\)"):
        reconstruction_error(np.zeros((2, 2)), np.zeros((2, 1)))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.array([[0, 1], [3, 2]]), r"code 2 of row 1, level 1 lies outside 0\.\.1"),
        (np.array([[0, 1], [-1, 0]]), r"code -1 of row 1, level 0 lies outside 0\.\.3"),
        (np.zeros((0, 2), np.int32), r"\(0, 2\)"),
        (np.zeros((3, 3), np.int32), r"\(3, 3\)"),
    ],
)
def test_bad_input(codes, message):
    with pytest.raises(ValueError, match=message):
        health(codes, (4, 2))
