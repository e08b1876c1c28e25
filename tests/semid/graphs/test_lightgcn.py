"""LightGCN against dense matrices and direct differentiation, and on planted communities."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semid.data import Histories
from semid.errors import SemidError
from semid.graphs import LightGCNConfig, interactions_matrix, train_lightgcn
from semid.graphs.lightgcn import bpr_loss, ego_norm, make_graph, propagate
from semid.graphs.neighbors import neighbors

SMALL = LightGCNConfig(dim=8, layers=2, epochs=10, batch_size=256, learning_rate=0.02)


def _histories(lists):
    made = Histories.from_lists(lists)
    return Histories(np.arange(len(lists), dtype=np.int32), made.items, made.starts, made.ends)


def _communities(seed, *, shuffled):
    """200 users, each with 8 of the 20 items of one of two communities; `shuffled` deals all items out again."""
    rng = np.random.default_rng(seed)
    lists = np.stack([20 * (user % 2) + rng.permutation(20)[:8] for user in range(200)])
    return _histories((rng.permutation(lists.reshape(-1)).reshape(lists.shape) if shuffled else lists).tolist())


def _train(histories, config=SMALL, seed=0):
    return train_lightgcn(histories, num_items=41, num_users=201, config=config, seed=seed)


@pytest.fixture(scope="module")
def planted():
    return _communities(0, shuffled=False)


@pytest.fixture(scope="module")
def trained(planted):
    return _train(planted)


def _dense(matrix):
    """D^-1/2 A D^-1/2 of the graph of users, then items."""
    users = matrix.shape[0]
    adjacency = np.zeros((sum(matrix.shape),) * 2)
    adjacency[:users, users:], adjacency[users:, :users] = matrix, matrix.T
    scale = np.diag(1 / np.sqrt(np.maximum(adjacency.sum(1), 1)))
    return scale @ adjacency @ scale


@pytest.fixture(scope="module")
def world():
    """A graph with nodes of degree 0, below, at and above the width of its rows, and its dense matrix."""
    lists = [list(range(13)), list(range(8)), list(range(7)), [], *[[0, 3]] * 20]
    matrix = interactions_matrix(_histories(lists), num_items=15, num_users=len(lists))
    return make_graph(matrix), _dense(matrix.toarray())


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_propagation_is_the_mean_of_matrix_powers(world, layers):
    graph, dense = world
    x = np.random.default_rng(0).normal(size=(len(dense), 5)).astype(np.float32)
    powers = [np.linalg.matrix_power(dense, power) for power in range(layers + 1)]
    found = jax.jit(propagate, static_argnames="layers")(jnp.asarray(x), graph, layers=layers)
    np.testing.assert_allclose(found, np.mean(powers, axis=0) @ x, atol=1e-6)


def test_the_gradient_is_propagated_as_the_vectors_are(world):
    """Assumption of a training step: differentiating through the propagation gives the propagated gradient."""
    graph, dense = world
    ego = jax.random.normal(jax.random.key(0), (len(dense), 5))
    triples = jax.random.randint(jax.random.key(1), (9, 3), 0, len(dense))

    def both(ego):
        direct = jax.grad(lambda ego: bpr_loss(propagate(ego, graph, layers=2), triples))(ego)
        return direct, propagate(jax.grad(bpr_loss)(propagate(ego, graph, layers=2), triples), graph, layers=2)

    direct, ours = jax.jit(both)(ego)
    np.testing.assert_allclose(ours, direct, atol=1e-6)
    assert np.abs(direct).max() > 1e-3


def test_losses_equal_their_definitions():
    rng = np.random.default_rng(0)
    x, triples = rng.normal(size=(6, 3)).astype(np.float32), rng.integers(0, 6, (10, 3))
    margins = [x[u] @ x[i] - x[u] @ x[n] for u, i, n in triples]
    np.testing.assert_allclose(
        bpr_loss(jnp.asarray(x), jnp.asarray(triples)), np.mean(np.log1p(np.exp(-np.array(margins)))), rtol=1e-5
    )
    norms = [np.square(x[row]).sum() / 2 for row in triples]
    np.testing.assert_allclose(ego_norm(jnp.asarray(x), jnp.asarray(triples)), np.mean(norms), rtol=1e-5)


def test_neighbors_lie_in_the_planted_community(trained):
    def share(model):
        return (neighbors(model.items[:40], k=5) // 20 == np.arange(40)[:, None] // 20).mean()

    assert share(trained) > 0.95
    assert 0.3 < share(_train(_communities(0, shuffled=True))) < 0.7


def test_users_score_their_own_community_higher(trained):
    scores = trained.users[:200] @ trained.items[:40].T
    own = scores.reshape(100, 2, 2, 20).mean((0, 3))  # users alternate between the communities
    assert own[0, 0] > own[0, 1]
    assert own[1, 1] > own[1, 0]


def test_shapes_and_zeros_for_who_never_interacted(trained):
    assert trained.items.shape == (41, 8)
    assert trained.users.shape == (201, 8)
    assert trained.items.dtype == trained.users.dtype == np.float32
    np.testing.assert_array_equal(trained.items[40], 0)
    np.testing.assert_array_equal(trained.users[200], 0)
    assert np.abs(trained.items[:40]).max(1).min() > 0


def test_the_seed_decides(planted, trained):
    np.testing.assert_array_equal(trained.items, _train(planted).items)
    assert not np.array_equal(trained.items, _train(planted, seed=1).items)


def test_only_the_windows_of_the_histories_are_read(planted, trained):
    """Whatever stands on the flat array between the histories (validation and test interactions) changes nothing."""
    rows = planted.items.reshape(200, 8)
    for filler in (0, 39):
        items = np.concatenate([rows, np.full((200, 2), filler, np.int32)], axis=1).reshape(-1)
        starts = np.arange(200) * 10
        np.testing.assert_array_equal(_train(Histories(planted.users, items, starts, starts + 8)).items, trained.items)
    with_filler = Histories(planted.users, items, starts, starts + 9)
    assert not np.array_equal(_train(with_filler).items, trained.items)


def test_a_batch_larger_than_the_data_is_one_step():
    lists = _histories([[0, 1], [1, 2], [2, 0]])
    one, same = (
        train_lightgcn(lists, num_items=3, num_users=3, config=replace(SMALL, batch_size=size), seed=0)
        for size in (6, 4096)
    )
    np.testing.assert_array_equal(one.items, same.items)


def test_no_interactions_is_an_error():
    with pytest.raises(SemidError, match=r"training histories hold no interaction.*move the split"):
        train_lightgcn(_histories([[], []]), num_items=3, num_users=2, config=SMALL, seed=0)


@pytest.mark.parametrize(
    "setting",
    [{"dim": 0}, {"layers": -1}, {"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0}, {"weight_decay": -1}],
)
def test_bad_settings(setting):
    with pytest.raises(SemidError, match=next(iter(setting))):
        LightGCNConfig(**setting)
