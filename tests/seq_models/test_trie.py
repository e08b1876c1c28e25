"""CodeTrie against prefixes collected in plain Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seq_models.trie import Capacity, CodeTrie


def prefixes_of(codes: np.ndarray, length: int) -> list[tuple[int, ...]]:
    return sorted({tuple(row[:length]) for row in codes.tolist()})


@jax.jit
def expand(trie: CodeTrie, nodes: list[jax.Array]):
    children = [trie.children(parents, level=level) for level, parents in enumerate(nodes[:-1])]
    return children, trie.items(nodes[-1])


def expand_all(trie: CodeTrie, codes: np.ndarray):
    nodes = [np.arange(len(prefixes_of(codes, level)), dtype=np.int32) for level in range(codes.shape[1] + 1)]
    return jax.device_get(expand(trie, nodes))


@jax.jit
def upwards(trie: CodeTrie, codes: jax.Array, nodes: list[jax.Array], positions: jax.Array):
    """Paths of codes, parents of nodes and leaves of positions."""
    parents = [trie.parents(members, level=level) for level, members in enumerate(nodes)]
    return trie.path(codes), parents, trie.leaves(positions)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("level_sizes", [(9,), (5, 7), (4, 300, 3), (2, 3, 2, 2, 3, 2, 2, 3)])
def test_nodes_children_and_items_are_those_of_the_prefixes(level_sizes, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, level_sizes, size=(int(rng.integers(1, 60)), len(level_sizes)))
    capacity = Capacity(80, (*level_sizes[:-1], level_sizes[-1] + 1), 60) if seed % 2 else None
    trie = CodeTrie.from_codes(codes, level_sizes, capacity=capacity)
    all_children, (rows, positions, valid_rows) = expand_all(trie, codes)
    for level, children in enumerate(all_children):
        parents, nodes = prefixes_of(codes, level), prefixes_of(codes, level + 1)
        assert len(children.valid) == len(parents)
        for n, parent in enumerate(parents):
            expected = [i for i, node in enumerate(nodes) if node[:-1] == parent]
            valid = children.valid[n]
            assert children.nodes[n][valid].tolist() == expected
            assert children.tokens[n][valid].tolist() == [nodes[i][-1] for i in expected]
        most = max(sum(node[:-1] == parent for node in nodes) for parent in parents)
        assert trie.fan_outs[level] == (most if capacity is None else capacity.fan_outs[level])
    leaves = prefixes_of(codes, len(level_sizes))
    assert len(rows) == len(leaves)
    for n, leaf in enumerate(leaves):
        assert rows[n][valid_rows[n]].tolist() == [
            row for row, code in enumerate(codes.tolist()) if tuple(code) == leaf
        ]
    assert positions[valid_rows].tolist() == list(range(len(codes)))


@pytest.mark.parametrize("capacity", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("level_sizes", [(9,), (4, 300, 3), (2, 3, 2, 2, 3, 2, 2, 3)])
def test_nodes_know_their_parents_and_codes_their_path(level_sizes, capacity):
    codes = np.random.default_rng(0).integers(0, level_sizes, size=(40, len(level_sizes)))
    trie = CodeTrie.from_codes(codes, level_sizes, capacity=Capacity(50, level_sizes, 20) if capacity else None)
    every = [np.arange(len(prefixes_of(codes, level + 1)), dtype=np.int32) for level in range(len(level_sizes))]
    paths, above, leaves = jax.device_get(upwards(trie, codes, every, np.arange(40, dtype=np.int32)))
    items = sorted(map(tuple, codes.tolist()))
    for level, (path, found) in enumerate(zip(paths, above, strict=True)):
        parents, nodes = prefixes_of(codes, level), prefixes_of(codes, level + 1)
        assert [parents[parent] for parent in found] == [node[:-1] for node in nodes]
        assert [nodes[node] for node in path.tolist()] == [tuple(row[: level + 1]) for row in codes.tolist()]
    assert leaves.tolist() == [prefixes_of(codes, len(level_sizes)).index(i) for i in items]


def test_items_of_a_leaf_lie_by_popularity_then_by_row():
    codes = np.array([[1, 1], [0, 2], [1, 1], [1, 1], [0, 2]])
    trie = CodeTrie.from_codes(codes, (2, 3), popularity=np.array([3, 0, 7, 3, 1], np.uint8))
    assert trie.item_rows.tolist() == [4, 1, 2, 0, 3]
    assert CodeTrie.from_codes(codes, (2, 3)).item_rows.tolist() == [1, 4, 0, 2, 3]


@pytest.mark.parametrize("level_sizes", [(2048,) * 8, (1,) * 3, (2**31 - 1, 2**20, 1, 2**31 - 1), (3,) * 20])
def test_rows_are_sorted_as_by_a_plain_sort_whatever_fits_a_key(level_sizes):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, [min(size, 3) for size in level_sizes], size=(300, len(level_sizes)))
    codes[:150] = np.array(level_sizes) - 1 - codes[:150] % np.array(level_sizes)  # both ends of every range
    codes[250:] = codes[:50]
    trie = CodeTrie.from_codes(codes, level_sizes)
    assert trie.item_rows.tolist() == sorted(range(300), key=lambda row: (*codes[row].tolist(), row))


def test_expanding_takes_any_leading_shape_and_pads_with_real_nodes():
    trie = CodeTrie.from_codes(np.array([[0, 0], [1, 0], [1, 1], [1, 2]]), (2, 3))
    children = jax.device_get(trie.children(jnp.array([[0, 1, 1], [1, 0, 0]]), level=1))
    assert children.nodes.shape == (2, 3, 3)
    assert children.nodes[0, :2].tolist() == [[0, 0, 0], [1, 2, 3]]
    assert children.valid[0, :2].tolist() == [[True, False, False], [True, True, True]]


def test_is_a_pytree_of_small_arrays_with_static_sizes():
    trie = CodeTrie.from_codes(np.array([[3, 0, 69999], [1, 1, 0], [3, 0, 69999], [3, 300, 5]]), [4, 301, 70000])
    assert [tokens.dtype for tokens in trie.tokens] == [jnp.uint8, jnp.uint16, jnp.int32]
    assert trie.children(jnp.array([0]), level=0).tokens.dtype == jnp.int32
    leaves, structure = jax.tree.flatten(trie)
    assert all(leaf.dtype == jnp.int32 for leaf in leaves[3:])
    assert jax.tree.unflatten(structure, leaves).level_sizes == (4, 301, 70000)
    assert (trie.num_items, trie.fan_outs, trie.max_leaf_items) == (4, (2, 2, 1), 2)
    assert trie.item_rows.tolist() == [1, 0, 2, 3]


def test_ranges_of_one_member_each_are_not_stored():
    trie = CodeTrie.from_codes(np.array([[0, 2], [0, 1], [1, 0]]), (2, 3))
    assert [start is None for start in (*trie.child_start, trie.leaf_start)] == [False, False, True]
    codes = np.random.default_rng(0).permutation(2000)[:, None] // np.array([100, 1]) % np.array([2048, 2048])
    trie = CodeTrie.from_codes(np.concatenate([codes] * 4, axis=1), (2048,) * 8)
    # of 2,000 items: 20 + 7 * 2,000 tokens of 2 bytes, 1 + 1 and 20 + 1 starts, item rows
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(trie)) == 2 * (20 + 7 * 2000) + 4 * (2 + 21) + 4 * 2000


def test_tries_of_one_capacity_have_equal_shapes():
    rng, capacity = np.random.default_rng(0), Capacity(items=9, fan_outs=(3, 2), leaf_items=5)
    assert capacity.nodes == (1, 3, 6)
    shapes = set()
    for num_items in (1, 4, 9):
        codes = np.unique(rng.integers(0, (3, 2), size=(99, 2)), axis=0)[rng.integers(0, 6, num_items) % 6]
        trie = CodeTrie.from_codes(codes, (3, 2), capacity=capacity)
        leaves, structure = jax.tree.flatten(trie)
        shapes.add((structure, *(leaf.shape for leaf in leaves)))
    assert len(shapes) == 1
    assert Capacity.around(CodeTrie.from_codes(codes[:4], (3, 2))).items == 6


@pytest.mark.parametrize(
    ("capacity", "message"),
    [
        (Capacity(3, (2, 3), 2), "4 items, its trie's capacity is 3: build with a larger Capacity"),
        (Capacity(4, (1, 3), 2), "2 children of one parent at level 0, its trie's capacity is 1"),
        (Capacity(4, (2, 1), 2), "2 children of one parent at level 1, its trie's capacity is 1"),
        (Capacity(4, (2, 3), 1), "2 items of one leaf, its trie's capacity is 1"),
        (Capacity(4, (2, 3, 1), 2), "2 levels but the capacity 3"),
    ],
)
def test_a_catalogue_beyond_the_capacity_is_refused(capacity, message):
    codes = np.array([[0, 1], [1, 2], [1, 0], [0, 1]])
    assert CodeTrie.from_codes(codes, (2, 3), capacity=Capacity(4, (2, 2), 2)).num_items == 4
    with pytest.raises(ValueError, match=message):
        CodeTrie.from_codes(codes, (2, 3), capacity=capacity)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[0, 1], [1, 3]], "code 3 at row 1, level 1 is outside 0..2"),
        ([[0, 1], [-1, 2]], "code -1 at row 1, level 0 is outside 0..1"),
        ([[0, 1, 0]], "3 levels"),
        ([0, 1], "must be integers"),
        ([[0.0, 1.0]], "must be integers"),
        (np.zeros((0, 2), int), "at least one item"),
        (np.zeros((2, 0), int), "at least one item"),
    ],
)
def test_bad_codes_are_refused(codes, message):
    CodeTrie.from_codes(np.array([[0, 1], [1, 2]]), (2, 3))
    with pytest.raises(ValueError, match=message):
        CodeTrie.from_codes(np.array(codes), (2, 3))


def test_popularity_of_another_number_of_items_is_refused():
    codes = np.array([[0, 1], [1, 2]])
    CodeTrie.from_codes(codes, (2, 3), popularity=np.ones(2))
    with pytest.raises(ValueError, match=r"each of 2 items, got \(3,\)"):
        CodeTrie.from_codes(codes, (2, 3), popularity=np.ones(3))


@pytest.mark.parametrize("capacity", [None, Capacity(60, (3, 4, 5), 9)])
def test_dead_items_are_not_in_the_trie(capacity):
    """It is the trie of the others, whose rows stay as they are."""
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(size, size=40) for size in (3, 4, 5)], axis=1)
    popularity, active = rng.integers(5, size=40), rng.random(40) < 0.6
    rows = np.flatnonzero(active)
    trie = CodeTrie.from_codes(codes, (3, 4, 5), popularity=popularity, active=active, capacity=capacity)
    few = CodeTrie.from_codes(codes[rows], (3, 4, 5), popularity=popularity[rows])
    order = [*rows[np.asarray(few.item_rows)].tolist(), *[trie.num_items] * (trie.num_items - len(rows))]
    assert trie.item_rows.tolist() == order
    assert trie.num_items == (60 if capacity else 40)
    for own, other in zip(trie.tokens, few.tokens, strict=True):
        assert own[: len(other)].tolist() == other.tolist()
    found, (few_rows, _, valid) = (expand_all(one, codes[rows])[1] for one in (trie, few))
    for own, own_valid, other, other_valid in zip(found.rows, found.valid, few_rows, valid, strict=True):
        assert own[own_valid].tolist() == rows[other[other_valid]].tolist()
    for wrong in (active[1:], np.zeros(40, bool), active.astype(np.int32)):
        with pytest.raises(ValueError, match="active must be booleans, one for each of 40 items, some of them true"):
            CodeTrie.from_codes(codes, (3, 4, 5), active=wrong)
