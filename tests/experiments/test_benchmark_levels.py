"""Losses by level, against conditional probabilities written out."""

import numpy as np

from experiments.benchmarks.levels import level_losses


def test_losses_are_of_each_code_given_those_before_it_and_sum_to_that_of_the_item():
    codes = np.array([[0, 0], [0, 1], [0, 1], [1, 0]], np.int32)
    probs = np.array([[0.1, 0.2, 0.3, 0.2], [0.4, 0.1, 0.1, 0.4]])
    got = level_losses(probs, np.array([2, 3]), codes)
    np.testing.assert_allclose(got[0], -np.log([0.6 / 0.8, 0.5 / 0.6, 0.3 / 0.5]))
    np.testing.assert_allclose(got[1], -np.log([0.4, 1.0, 1.0]), atol=1e-12)
    np.testing.assert_allclose(got.sum(axis=1), -np.log([0.3 / 0.8, 0.4]))
