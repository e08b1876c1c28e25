"""Collision groups and the tie-break level against dictionaries."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from quantizers import collision_groups, tie_break


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_equals_counting_rows_as_they_arrive(seed, levels):
    codes = np.random.default_rng(seed).integers(0, 4, size=(300, levels)).astype(np.int32)
    seen: Counter[tuple[int, ...]] = Counter()
    expected = []
    for row in map(tuple, codes.tolist()):
        expected.append(seen[row])
        seen[row] += 1
    result = tie_break(codes)
    np.testing.assert_array_equal(result.codes[:, :-1], codes)
    np.testing.assert_array_equal(result.codes[:, -1], expected)
    assert result.level_size == max(seen.values())
    assert len(np.unique(result.codes, axis=0)) == len(codes)
    assert result.codes.dtype == np.int32


def test_groups_are_dense_and_in_the_order_of_the_codes():
    codes = np.array([[1, 0], [0, 2], [1, 0], [0, 1], [0, 2], [1, 0]])
    np.testing.assert_array_equal(collision_groups(codes), [2, 1, 2, 0, 1, 2])


def test_a_hand_worked_tie_break():
    result = tie_break(np.array([[1, 0], [0, 2], [1, 0], [0, 1], [0, 2], [1, 0]]))
    np.testing.assert_array_equal(result.codes[:, -1], [0, 0, 1, 0, 1, 2])
    assert result.level_size == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_popularity_order_equals_sorting_each_group(dtype):
    rng = np.random.default_rng(0)
    codes, popularity = rng.integers(0, 4, size=(300, 2)), rng.integers(0, 6, 300).astype(dtype)
    result = tie_break(codes, popularity=popularity)
    for code in np.unique(codes, axis=0):
        rows = np.flatnonzero((codes == code).all(1))
        ranked = sorted(rows, key=lambda row: (-int(popularity[row]), row))
        np.testing.assert_array_equal(result.codes[ranked, -1], np.arange(len(rows)))
    assert result.level_size == tie_break(codes).level_size
    np.testing.assert_array_equal(tie_break(codes, popularity=np.ones(300)).codes, tie_break(codes).codes)


def test_a_bad_popularity():
    codes = np.zeros((3, 2), np.int32)
    assert tie_break(codes, popularity=np.array([0, 0, 1])).codes[:, -1].tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match=r"\(3,\), got \(2,\)"):
        tie_break(codes, popularity=np.zeros(2))
    with pytest.raises(ValueError, match="popularity of row 1 is NaN"):
        tie_break(codes, popularity=np.array([0, np.nan, 1]))


def test_a_group_larger_than_the_codes_dtype():
    result = tie_break(np.zeros((300, 2), np.uint8))
    np.testing.assert_array_equal(result.codes[:, -1], np.arange(300))
    assert result.level_size == 300


def test_without_collisions_and_without_items_the_level_has_one_code():
    unique = tie_break(np.arange(6).reshape(3, 2))
    np.testing.assert_array_equal(unique.codes[:, -1], 0)
    assert unique.level_size == 1
    empty = tie_break(np.zeros((0, 3), np.int32))
    assert (empty.codes.shape, empty.level_size) == ((0, 4), 1)
    assert collision_groups(np.zeros((0, 3), np.int32)).shape == (0,)


@pytest.mark.parametrize("codes", [np.zeros(3, np.int32), np.zeros((3, 0), np.int32), np.zeros((3, 2), np.float32)])
def test_bad_input(codes):
    with pytest.raises(ValueError, match=r"integer codes of shape \[items, level >= 1\]"):
        tie_break(codes)
