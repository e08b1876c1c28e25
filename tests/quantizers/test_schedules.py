"""A schedule's values by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from quantizers import Schedule


def test_linear_from_initial_to_value_then_constant():
    schedule = Schedule(1.0, initial=3.0, until=0.5)
    np.testing.assert_allclose([schedule(p) for p in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)], [3, 2.5, 2, 1, 1, 1])
    np.testing.assert_allclose(jax.jit(schedule)(0.125), 2.5)


def test_constant_without_initial():
    np.testing.assert_array_equal([Schedule(0.7)(p) for p in (0.0, 0.5, 1.0)], np.float32([0.7] * 3))


@pytest.mark.parametrize("bad", [{"value": -0.1}, {"value": float("nan")}, {"value": 1.0, "initial": -0.1}])
def test_values_are_finite_and_not_negative(bad):
    with pytest.raises(ValueError, match=r"expected value and initial of 0 or more, both finite, got Schedule\(value="):
        Schedule(**bad)
    assert Schedule(0.0, initial=2).ends == (2, 0.0)


@pytest.mark.parametrize("until", [0.0, -0.5, 1.5])
def test_until_is_a_share(until):
    with pytest.raises(ValueError, match="until"):
        Schedule(1.0, initial=0.0, until=until)
