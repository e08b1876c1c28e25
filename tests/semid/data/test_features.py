"""Standardized content vectors, worked by hand."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from semid.data import Dataset, Standardizer, content_blocks
from semid.errors import SemidError


def test_one_block_by_hand():
    block = np.array([[1.0, 10.0], [3.0, 30.0]], np.float32)
    found = Standardizer.fit([block])
    np.testing.assert_array_equal(found.mean, [2.0, 20.0])
    np.testing.assert_array_equal(found.scale, [1.0, 10.0])
    np.testing.assert_array_equal(found(np.array([[2.0, 20.0], [5.0, 0.0]], np.float32)), [[0.0, 0.0], [3.0, -2.0]])
    assert found.mean.dtype == found.scale.dtype == found(block).dtype == np.float32


def test_two_blocks_have_the_same_total_variance():
    rng = np.random.default_rng(0)
    blocks = [rng.normal(3, 5, (400, 1)), rng.normal(-1, 0.1, (400, 4))]
    values = Standardizer.fit(blocks)(np.concatenate(blocks, axis=1))
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-5)
    # Five dimensions, two blocks: each block a variance of 2.5 in all, so the single dimension has all of its own.
    np.testing.assert_allclose(values.var(axis=0), [2.5, 0.625, 0.625, 0.625, 0.625], rtol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3e5, 1e8])
def test_a_constant_dimension_becomes_zero(constant):
    block = np.stack([np.full(1001, constant), np.arange(1001)], axis=1).astype(np.float32)
    found = Standardizer.fit([block])
    values = found(block)
    assert not values[:, 0].any()
    np.testing.assert_allclose(values[:, 1].std(), 1, rtol=1e-5)
    assert found(block + 5)[0, 0] == 0  # an item met later may differ there: it was never seen to matter


def test_float16_columns_do_not_overflow():
    block = np.array([[60000.0], [0.0]] * 500, np.float16)
    np.testing.assert_allclose(Standardizer.fit([block])(block)[:2, 0], [1, -1])


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("widths", [(1,), (16,), (17,), (48,), (33, 16), (1, 1), (1, 40, 2)])
def test_columns_at_a_time_are_as_all_at_once(kind, order, widths):
    rng = np.random.default_rng(0)
    order = order if len(widths) == 1 else "C"  # as those of a dataset are
    blocks = [np.asarray(rng.normal(3, 5, (5001, width)).astype(kind), order=order) for width in widths]
    joined = np.concatenate(blocks, axis=1, dtype=np.float64)
    weights = [np.sqrt(sum(widths) / len(widths) / width) for width in widths for _ in range(width)]
    found = Standardizer.fit(blocks)
    np.testing.assert_array_equal(found.mean, joined.mean(axis=0).astype(np.float32))
    np.testing.assert_array_equal(found.scale, (joined.std(axis=0) / weights).astype(np.float32))
    x = np.concatenate(blocks, axis=1)
    given = x.copy()
    np.testing.assert_array_equal(found(x), ((given - found.mean) / found.scale).astype(np.float32))
    np.testing.assert_array_equal(x, given)


def test_memory_is_that_of_some_columns_and_of_the_result():
    x = np.random.default_rng(0).normal(size=(20_000, 128)).astype(np.float32)
    tracemalloc.start()
    found = Standardizer.fit([x])
    assert tracemalloc.get_traced_memory()[1] < x.nbytes
    found(x)
    assert tracemalloc.get_traced_memory()[1] < 1.1 * x.nbytes
    tracemalloc.stop()


def test_another_width_is_refused():
    found = Standardizer.fit([np.eye(3, dtype=np.float32)])
    assert found(np.ones((2, 3), np.float32)).shape == (2, 3)
    with pytest.raises(SemidError, match="expected content vectors of 3 dimensions, got 2"):
        found(np.ones((2, 2), np.float32))


@pytest.mark.parametrize(
    ("columns", "widths"), [(None, [3, 1]), (("audio",), [1]), (("audio", "text"), [1, 3]), ((), [])]
)
def test_content_blocks_in_the_order_asked_for(columns, widths):
    interactions = pa.table({"user_id": ["u"] * 3, "item_id": ["a", "b", "a"], "position": [0, 1, 2]})
    plain = Dataset.build(pa.table({"item_id": ["a", "b"]}), interactions, name="two columns")
    dataset = plain.with_vectors("text", np.eye(2, 3)).with_vectors("audio", np.eye(2, 1))
    assert [block.shape[1] for block in content_blocks(dataset, columns)] == widths
    with pytest.raises(SemidError, match="vector column 'audio' is named twice and would count twice; name it once"):
        content_blocks(dataset, ("text", "audio", "audio"))
