"""ItemMask against counting in plain Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seq_models.masks import ItemMask
from seq_models.trie import Capacity, CodeTrie

ITEMS, USERS = 23, 4
CODES = np.random.default_rng(0).integers(0, 3, size=(ITEMS, 3))
RANGES = jnp.asarray([(start, end) for start in range(ITEMS + 1) for end in range(start, ITEMS + 1)]).T


def among_all(mask: ItemMask) -> np.ndarray:
    """Allowed items in every range of positions, per user: [users, ranges]."""
    start, end = (jnp.broadcast_to(x[None], (USERS, RANGES.shape[1])) for x in RANGES)
    return np.asarray(jax.jit(ItemMask.among)(mask, start, end))


def counted(trie: CodeTrie, left: np.ndarray) -> np.ndarray:
    by_position = left[:, np.asarray(trie.item_rows)[:ITEMS]]
    return np.stack([by_position[:, start:end].sum(-1) for start, end in RANGES.T.tolist()], axis=-1)


@pytest.mark.parametrize("capacity", [None, Capacity(30, (3, 3, 3), 9)], ids=["exact", "padded"])
@pytest.mark.parametrize("denied_users", [None, 1, USERS])
@pytest.mark.parametrize("allowed_users", [None, 1, USERS])
def test_counts_are_those_of_the_items_allowed_and_not_denied(allowed_users, denied_users, capacity):
    trie = CodeTrie.from_codes(CODES, (3, 3, 3), capacity=capacity)
    rng, left, lists = np.random.default_rng(1), np.ones((USERS, trie.num_items), bool), {}
    if allowed_users:
        lists["allowed"] = rng.random((allowed_users, trie.num_items)) < 0.5
        left &= lists["allowed"]
    if denied_users:
        denied = rng.integers(-1, ITEMS, size=(denied_users, 15))
        denied[:, 7:10] = denied[:, :3]  # twice or more
        for user in range(USERS):
            rows = denied[user % denied_users]
            left[user, rows[rows >= 0]] = False
        lists["denied"] = denied
    mask = ItemMask.of(trie, **lists)
    assert np.array_equal(among_all(mask), counted(trie, left[:, :ITEMS]))
    inside = jax.jit(lambda trie, lists: ItemMask.of(trie, **lists))(trie, lists)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(mask), jax.tree.leaves(inside), strict=True))


def test_rows_that_no_item_has_deny_nothing():
    trie = CodeTrie.from_codes(CODES, (3, 3, 3), capacity=Capacity(30, (3, 3, 3), 9))
    everything = counted(trie, np.ones((USERS, ITEMS), bool))
    assert np.array_equal(among_all(ItemMask.of(trie, denied=jnp.array([[-1, -7, ITEMS, 29, 30, 999]]))), everything)
    assert np.array_equal(among_all(ItemMask.of(trie, denied=np.zeros((1, 0), np.int32))), everything)
    assert np.array_equal(among_all(ItemMask.of(trie)), everything)
    assert not np.array_equal(among_all(ItemMask.of(trie, denied=np.array([[-1, 3]]))), everything)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"allowed": np.ones((1, ITEMS + 1), bool)}, f"{ITEMS} items.*got bool .1, {ITEMS + 1}."),
        ({"allowed": np.ones(ITEMS, bool)}, "must be booleans"),
        ({"allowed": np.ones((1, ITEMS), np.int32)}, "must be booleans"),
        ({"denied": np.array([[0, ITEMS]])}, f"denied row {ITEMS} is outside the catalogue's 0..{ITEMS - 1}"),
        ({"denied": np.array([[-2, 0]])}, "denied row -2 is outside"),
        ({"denied": np.array([0, 1])}, "must be item rows"),
        ({"denied": np.array([[0.0]])}, "must be item rows"),
    ],
)
def test_bad_masks_are_refused(lists, message):
    trie = CodeTrie.from_codes(CODES, (3, 3, 3))
    ItemMask.of(trie, allowed=np.ones((1, ITEMS), bool), denied=np.array([[-1, ITEMS - 1]]))
    with pytest.raises(ValueError, match=message):
        ItemMask.of(trie, **lists)
