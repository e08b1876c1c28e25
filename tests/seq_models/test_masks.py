"""ItemMask against prefixes collected in plain Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seq_models.masks import ItemMask, run_sums, stable_order
from seq_models.trie import Capacity, CodeTrie

ITEMS, USERS, SIZES = 23, 4, (3, 3, 3)
CODES = np.random.default_rng(0).integers(0, SIZES, size=(ITEMS, 3))  # several share a leaf
LARGER = Capacity(30, SIZES, 9)
ORDERED = sorted(range(ITEMS), key=lambda row: (*CODES[row].tolist(), row))


def members_of(level: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Prefixes before a level and the level's own; behind the last level stand the items, each with its row."""
    items = [(*CODES[row].tolist(), row) for row in ORDERED]
    return tuple(sorted({item[:length] for item in items}) for length in (level, level + 1))


@jax.jit
def left_of_all(trie: CodeTrie, mask: ItemMask) -> list[jax.Array]:
    """Per level, and of the leaves' items, which members of all parents are left to each user."""
    left = []
    for level in range(4):
        nodes = jnp.arange(len(members_of(level)[0]), dtype=jnp.int32)
        nodes = jnp.broadcast_to(nodes[None], (USERS, len(nodes)))
        members, valid = trie.members(nodes, level=level)
        left.append(mask.filter_members(valid, nodes, members, level=level))
    return left


@jax.jit
def members_of_all(trie: CodeTrie) -> list[jax.Array]:
    return [trie.members(jnp.arange(len(members_of(level)[0])), level=level).indices for level in range(4)]


def check(trie: CodeTrie, mask: ItemMask, left: np.ndarray) -> None:
    """Against prefixes of the items left: [users, items]."""
    everything = jax.device_get((left_of_all(trie, mask), members_of_all(trie)))
    for level, (found, index) in enumerate(zip(*everything, strict=True)):
        parents, members = members_of(level)
        for user in range(USERS):
            alive = {(*CODES[row].tolist(), row)[: level + 1] for row in np.flatnonzero(left[user])}
            for n, parent in enumerate(parents):
                expected = {member for member in members if member[:-1] == parent} & alive
                assert {members[i] for i in index[n][found[user, n]]} == expected


@pytest.mark.parametrize("capacity", [None, LARGER], ids=["exact", "padded"])
@pytest.mark.parametrize("denied_users", [None, 1, USERS])
@pytest.mark.parametrize("allowed_users", [None, 1, USERS])
def test_what_is_left_is_what_leads_to_items_allowed_and_not_denied(allowed_users, denied_users, capacity):
    trie = CodeTrie.from_codes(CODES, SIZES, capacity=capacity)
    for seed, share in enumerate((0.05, 0.3, 0.6, 0.9)):
        rng, left, lists = np.random.default_rng(seed), np.ones((USERS, trie.num_items), bool), {}
        if allowed_users:
            lists["allowed"] = rng.random((allowed_users, trie.num_items)) < share
            left &= lists["allowed"]
        if denied_users:
            denied = rng.integers(-1, ITEMS, size=(denied_users, 40 if seed else 15))
            denied[:, 7:10] = denied[:, :3]  # twice or more
            for user in range(USERS):
                rows = denied[user % denied_users]
                left[user, rows[rows >= 0]] = False
            lists |= {"denied": denied, "codes": CODES}
        mask = ItemMask.from_items(trie, **lists)
        check(trie, mask, left[:, :ITEMS])
        inside = jax.jit(lambda trie, lists: ItemMask.from_items(trie, **lists))(trie, lists)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(mask), jax.tree.leaves(inside), strict=True))


@pytest.mark.parametrize("capacity", [None, LARGER], ids=["exact", "padded"])
def test_whole_leaves_branches_and_catalogues_are_denied(capacity):
    """All items, all but one, all of the largest leaf, all but one of it; allowed as well are few or all."""
    trie = CodeTrie.from_codes(CODES, SIZES, capacity=capacity)
    _, leaf_of, sizes = np.unique(CODES, axis=0, return_inverse=True, return_counts=True)
    mates = np.flatnonzero(leaf_of.ravel() == sizes.argmax())
    assert len(mates) > 1
    denied = np.full((USERS, ITEMS), -1)
    denied[0], denied[1, 1:] = np.arange(ITEMS), np.arange(ITEMS)[::-1][:-1]
    denied[2, 3 : 3 + len(mates)], denied[3, : len(mates) - 1] = mates, mates[1:]
    left = np.stack([~np.isin(np.arange(ITEMS), rows) for rows in denied])
    assert left.sum(axis=-1).tolist() == [0, 1, ITEMS - len(mates), ITEMS - len(mates) + 1]
    check(trie, ItemMask.from_items(trie, denied=denied, codes=CODES), left)
    for row in (0, *mates):
        allowed = np.zeros((1, trie.num_items), bool)
        allowed[0, [row, 5]] = True
        check(trie, ItemMask.from_items(trie, allowed=allowed, denied=denied, codes=CODES), left & allowed[:, :ITEMS])


def test_rows_that_no_item_has_deny_nothing():
    trie, everything = CodeTrie.from_codes(CODES, SIZES, capacity=LARGER), np.ones((USERS, ITEMS), bool)
    padded = np.concatenate([CODES, np.zeros((7, 3), int)])
    for codes in (CODES, padded):
        no_rows = jax.device_put(np.array([[-1, -7, ITEMS, 29, 30, 999]]))
        check(trie, ItemMask.from_items(trie, denied=no_rows, codes=codes), everything)
        check(trie, ItemMask.from_items(trie, denied=np.zeros((1, 0), np.int32), codes=codes), everything)
    check(trie, ItemMask.from_items(trie), everything)
    with pytest.raises(AssertionError):  # a control
        check(trie, ItemMask.from_items(trie, denied=np.array([[-1, 3]]), codes=CODES), everything)


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
        ({"denied": np.array([[0]]), "codes": None}, f"need the codes .up to {ITEMS} items, 3 levels.*got None"),
        ({"denied": np.array([[0]]), "codes": CODES[:, :2]}, f"got .{ITEMS}, 2."),
        ({"denied": np.array([[0]]), "codes": np.zeros((ITEMS + 1, 3), int)}, f"got .{ITEMS + 1}, 3."),
    ],
)
def test_bad_masks_are_refused(lists, message):
    trie = CodeTrie.from_codes(CODES, (3, 3, 3))
    ItemMask.from_items(trie, allowed=np.ones((1, ITEMS), bool), denied=np.array([[-1, ITEMS - 1]]), codes=CODES)
    with pytest.raises(ValueError, match=message):
        ItemMask.from_items(trie, **({"codes": CODES} | lists))


@pytest.mark.parametrize("most", [40, 2**30], ids=["at once", "by parts"])
def test_keys_are_ordered_stably(most):
    keys = np.random.default_rng(0).choice([0, 5, 39, 40, most - 1, most], (USERS, 37)).astype(np.int32)
    np.testing.assert_array_equal(stable_order(jnp.asarray(keys), most=most), np.argsort(keys, axis=1, kind="stable"))


def test_sums_of_runs_are_exact_whatever_stands_around_them():
    values, keys = np.asarray([[1e8, 1.0, 2.0, 3.0, 1e-8, 5.0]]), np.asarray([[0, 3, 3, 3, 7, 8]], np.int32)
    sums = run_sums(jnp.asarray(values, jnp.float32), jnp.asarray(keys))
    np.testing.assert_array_equal(sums, np.asarray([[1e8, 1, 3, 6, 1e-8, 5]], np.float32))
