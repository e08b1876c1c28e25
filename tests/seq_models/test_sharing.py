"""What devices share gives what one device gives, ties included, and moves no scores between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from seq_models import RequestBatch, best_allowed
from seq_models.sharing import set_items, share_items, top_items, top_k

SHAPES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]  # of data, fsdp, tensor
ITEMS, K = 64, 12  # more than the 8 items of a device


def mesh_of(shape):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def many_ties(rows=8):
    return jnp.asarray(np.random.default_rng(0).integers(0, 9, (rows, ITEMS)), jnp.float32)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, tuple(found), tuple(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("best", [top_k, top_items])
def test_the_largest_come_in_the_same_order(best, shape):
    with jax.set_mesh(mesh_of(shape)):
        found = jax.jit(best, static_argnums=1)(many_ties(), K)
    same(found, jax.lax.top_k(many_ties(), K))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_s_own_items_are_set(shape):
    rows = jnp.asarray([[0, 63, -1, 64, 7, 8, -9]] * 4 + [[5, 5, 5, 5, 5, 5, 5]] * 4)
    with jax.set_mesh(mesh_of(shape)):
        found = jax.jit(lambda x: set_items(x, rows, -1.0))(many_ties())
    expected = np.array(many_ties())
    expected[:4, [0, 63, 7, 8]] = -1.0
    expected[4:, 5] = -1.0
    same(found, expected)


def test_rows_and_items_that_do_not_divide_are_left_to_the_compiler():
    odd = many_ties(3)[:, :61]
    with jax.set_mesh(mesh_of((2, 2, 2))):
        same(top_items(odd, K), jax.lax.top_k(odd, K))
        same(top_k(odd, K), jax.lax.top_k(odd, K))
        same(share_items(odd), odd)


def test_scores_of_all_items_stay_where_the_items_lie():
    history = jnp.ones((8, 4), jnp.int32)
    requests = RequestBatch(history, history, denied=jnp.asarray([[1, 40, -1]] * 8))

    def rank(scores):
        return best_allowed(share_items(scores), requests, 3)

    with jax.set_mesh(mesh_of((1, 8, 1))):
        program = jax.jit(rank).lower(many_ties()).compile()
        text, found = program.as_text(), program(many_ties())
    assert "f32[8,8]" in text
    whole = [line for line in text.splitlines() if "= f32[8,64]" in line]
    assert [line for line in whole if "parameter(0)" not in line] == []
    same(found, best_allowed(many_ties(), requests, 3))
