"""Lists with at most so many items of a group, against a greedy choice in plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seq_models import GroupLimits, RequestBatch, TopK, best_allowed
from seq_models.ranking import first_within

ITEMS, USERS, K = 40, 6, 8


def greedy(order: list[int], groups: np.ndarray, most: np.ndarray, k: int) -> list[int]:
    """The first k rows of which each has room in all of its groups."""
    chosen, used = [], dict.fromkeys(np.unique(groups).tolist(), 0)
    for row in order:
        own = [(group, limit) for group, limit in zip(groups[row].tolist(), most.tolist(), strict=True) if group >= 0]
        if all(used[group] < limit for group, limit in own):
            chosen.append(row)
            for group, _ in own:
                used[group] += 1
    return [*chosen, *[-1] * k][:k]


def some_limits(seed: int) -> GroupLimits:
    """A brand for most items, and up to two different categories each."""
    rng = np.random.default_rng(seed)
    brands, categories = rng.integers(-1, 6, size=(ITEMS, 1)), 6 + rng.integers(0, 5, size=(ITEMS, 2))
    categories[categories[:, 0] == categories[:, 1], 1] = -1
    return GroupLimits(jnp.asarray(np.hstack([brands, categories]), jnp.int32), jnp.array([2, 3, 3]))


@functools.partial(jax.jit, static_argnames="k")
def ranked(scores, limits, k):
    history = jnp.zeros((USERS, 1), jnp.int32)
    return best_allowed(scores, RequestBatch(history, history, limits=limits), k)


cut = jax.jit(first_within, static_argnames="k")


@pytest.mark.parametrize("seed", range(4))
def test_scores_of_all_items_are_chosen_from_greedily(seed):
    rng, limits = np.random.default_rng(seed), some_limits(seed)
    scores = rng.normal(size=(USERS, ITEMS)).astype(np.float32)
    scores[0, rng.permutation(ITEMS)[:30]] = -np.inf  # few may be listed
    found, unlike = ranked(jnp.asarray(scores), limits, k=K), 0
    for user in range(USERS):
        order = [row for row in np.argsort(-scores[user], kind="stable").tolist() if scores[user, row] > -np.inf]
        expected = greedy(order, *(np.asarray(x) for x in limits), K)
        assert found.rows[user].tolist() == expected
        values = [scores[user, row] if row >= 0 else -np.inf for row in expected]
        np.testing.assert_array_equal(found.scores[user], values)
        unlike += expected != order[:K]
    assert unlike  # control: the limits do something


@pytest.mark.parametrize("seed", range(4))
def test_longer_lists_are_cut_greedily(seed):
    rng, limits = np.random.default_rng(seed), some_limits(seed)
    rows = np.stack([rng.permutation(ITEMS)[:20] for _ in range(USERS)]).astype(np.int32)
    rows[1, 3:], rows[2, :] = -1, -1
    scores = np.where(rows < 0, -np.inf, rng.normal(size=rows.shape)).astype(np.float32)  # of any order, as drawn
    found = cut(TopK(jnp.asarray(rows), jnp.asarray(scores)), limits, k=K)
    for user in range(USERS):
        expected = greedy(rows[user][rows[user] >= 0].tolist(), *(np.asarray(x) for x in limits), K)
        assert found.rows[user].tolist() == expected
        of_row = dict(zip(rows[user].tolist(), scores[user].tolist(), strict=True))
        assert found.scores[user].tolist() == [of_row[row] if row >= 0 else -np.inf for row in expected]


def test_without_limits_lists_stay_as_they_are():
    found = TopK(jnp.arange(6).reshape(2, 3), jnp.zeros((2, 3)))
    assert first_within(found, None, 3) is found
