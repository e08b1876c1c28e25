"""CodeTrie against prefixes collected in plain Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seq_models.trie import CodeTrie


def prefixes_of(codes: np.ndarray, length: int) -> list[tuple[int, ...]]:
    return sorted({tuple(row[:length]) for row in codes.tolist()})


@jax.jit
def expand_all(trie: CodeTrie):
    parents = [start.shape[0] - 1 for start in trie.child_start]
    children = [trie.children(jnp.arange(n), level=level) for level, n in enumerate(parents)]
    return children, trie.items(jnp.arange(trie.leaf_start.shape[0] - 1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("level_sizes", [(9,), (5, 7), (4, 300, 3), (2, 3, 2, 2, 3, 2, 2, 3)])
def test_nodes_children_and_items_are_those_of_the_prefixes(level_sizes, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, level_sizes, size=(int(rng.integers(1, 60)), len(level_sizes)))
    trie = CodeTrie.from_codes(codes, level_sizes)
    all_children, (rows, valid_rows) = jax.tree.map(np.asarray, expand_all(trie))
    for level, children in enumerate(all_children):
        parents, nodes = prefixes_of(codes, level), prefixes_of(codes, level + 1)
        assert len(children.valid) == len(parents)
        for n, parent in enumerate(parents):
            expected = [i for i, node in enumerate(nodes) if node[:-1] == parent]
            valid = children.valid[n]
            assert children.nodes[n][valid].tolist() == expected
            assert children.tokens[n][valid].tolist() == [nodes[i][-1] for i in expected]
        assert trie.fan_outs[level] == max(sum(node[:-1] == parent for node in nodes) for parent in parents)
    leaves = prefixes_of(codes, len(level_sizes))
    assert len(rows) == len(leaves)
    for n, leaf in enumerate(leaves):
        assert rows[n][valid_rows[n]].tolist() == [
            row for row, code in enumerate(codes.tolist()) if tuple(code) == leaf
        ]


def test_expanding_takes_any_leading_shape_and_pads_with_real_nodes():
    trie = CodeTrie.from_codes(np.array([[0, 0], [1, 0], [1, 1], [1, 2]]), (2, 3))
    children = trie.children(jnp.array([[0, 1, 1], [1, 0, 0]]), level=1)
    assert children.nodes.shape == (2, 3, 3)
    assert children.nodes[0, :2].tolist() == [[0, 0, 0], [1, 2, 3]]
    assert children.valid[0, :2].tolist() == [[True, False, False], [True, True, True]]


def test_is_a_pytree_of_int32_arrays_with_static_sizes():
    trie = CodeTrie.from_codes(np.array([[3, 0], [1, 1], [3, 0]], np.uint8), [4, 2])
    leaves, structure = jax.tree.flatten(trie)
    assert all(leaf.dtype == jnp.int32 for leaf in leaves)
    assert len(leaves) == 2 + 2 + 1 + 1
    assert jax.tree.unflatten(structure, leaves).level_sizes == (4, 2)
    assert (trie.num_items, trie.max_leaf_items) == (3, 2)
    assert trie.item_rows.tolist() == [1, 0, 2]


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
