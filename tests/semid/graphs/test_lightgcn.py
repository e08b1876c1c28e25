"""LightGCN against dense matrices and direct differentiation, and on planted communities."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from quantizers import unit_rows
from semid.data import Dataset, Histories, Standardizer
from semid.errors import SemidError
from semid.graphs import (
    BM3Config,
    CM3Config,
    FreedomConfig,
    GraphConfig,
    LightGCNConfig,
    MMHCLConfig,
    interactions_matrix,
    lightgcn,
    losses,
    train_graph,
)
from semid.graphs.lightgcn import TrainingEdges, _draw_edges, propagated
from semid.graphs.losses import (
    bootstrap_loss,
    bpr_loss,
    content_contrast,
    ego_norm,
    uniform_loss,
    uniformity,
    view_contrast,
)
from semid.graphs.neighbors import neighbors
from semid.graphs.propagation import content_graph, hyperedges, make_graph, propagate, propagate_hyperedges

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
    return train_graph(histories, num_items=41, num_users=201, config=config, seed=seed)


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
        train_graph(lists, num_items=3, num_users=3, config=replace(SMALL, batch_size=size), seed=0)
        for size in (6, 4096)
    )
    np.testing.assert_array_equal(one.items, same.items)


def test_no_interactions_is_an_error():
    with pytest.raises(SemidError, match=r"training histories hold no interaction.*move the split"):
        train_graph(_histories([[], []]), num_items=3, num_users=2, config=SMALL, seed=0)


@pytest.mark.parametrize(
    "setting",
    [
        *({"dim": 0}, {"layers": -1}, {"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0}, {"weight_decay": -1}),
        *({"learning_rate": np.nan}, {"weight_decay": np.inf}, {"contrast": -1}, {"uniformity": np.nan}),
    ],
)
def test_bad_settings(setting):
    with pytest.raises(SemidError, match=next(iter(setting))):
        LightGCNConfig(**setting)


def test_a_column_that_nothing_reads_is_refused():
    items, users = [f"i{row}" for row in range(4)], ["a", "a", "a", "b", "b", "b"]
    rows = pa.table({"user_id": users, "item_id": [*items[:3], *items[1:]], "position": range(6)})
    dataset = Dataset.build(pa.table({"item_id": items}), rows, name="tiny").with_vectors("content", np.eye(4))
    with pytest.raises(SemidError, match="LightGCNConfig: column 'content' would not be read, as no setting needs"):
        LightGCNConfig(dim=2, epochs=1, column="content").item_vectors(dataset, seed=0)
    LightGCNConfig(dim=2, epochs=1, neighbors=1, column="content").item_vectors(dataset, seed=0)


FREEDOM = FreedomConfig(8, 2, 20, 256, 0.02, neighbors=5, keep=0.5)


@pytest.fixture(scope="module")
def content():
    """The item's community, amid noise; the last item, which nobody has had, is of the second."""
    vectors = np.random.default_rng(3).normal(size=(41, 6)).astype(np.float32)
    vectors[:, 0] += np.where(np.arange(41) < 20, 3, -3)
    return vectors


def _with_content(histories, content, config):
    return train_graph(histories, content, num_items=41, num_users=201, config=config, seed=0)


def test_lightgcn_is_the_family_with_its_defaults(planted, trained, content):
    same = GraphConfig(
        **{name: getattr(SMALL, name) for name in ("dim", "layers", "epochs", "batch_size", "learning_rate")}
    )
    np.testing.assert_array_equal(_train(planted, same).items, trained.items)
    np.testing.assert_array_equal(_with_content(planted, content, SMALL).items, trained.items)


def test_content_neighbors_are_added_by_a_dense_matrix(content):
    graph, lists = content_graph(content, 5), neighbors(content, k=5)
    dense = np.zeros((41, 41))
    dense[np.repeat(np.arange(41), 5), lists.ravel()] = 1
    dense = np.maximum(dense, dense.T)
    scale = dense.sum(axis=1) ** -0.5
    dense *= scale[:, None] * scale
    ego = np.random.default_rng(0).normal(size=(43, 3)).astype(np.float32)
    matrix = interactions_matrix(_histories([[0, 1], [2]]), num_items=41, num_users=2)
    edges = TrainingEdges(make_graph(matrix), graph)
    made = jax.jit(lambda ego: propagated(ego, edges, num_users=2, config=FREEDOM))(ego)
    plain = propagate(jnp.asarray(ego), edges.interactions, layers=2)
    np.testing.assert_allclose(made[2:] - plain[2:], dense @ ego[2:], atol=1e-5)
    np.testing.assert_allclose(made[:2], plain[:2], atol=1e-6)


def test_a_pruned_graph_keeps_a_share_of_the_edges_fewer_of_popular_nodes(planted):
    lists = [[0, 1 + user] for user in range(39)]  # all have item 0
    matrix = interactions_matrix(_histories(lists), num_items=41, num_users=39)
    whole = TrainingEdges(make_graph(matrix), None)
    kept = _draw_edges(whole, matrix, 0.5, np.random.default_rng(0)).interactions
    assert kept.nodes.shape == whole.interactions.nodes.shape
    assert int((kept.weights > 0).sum()) == 78  # 39 of 78 pairs, both ways
    of_popular = (kept.weights[kept.nodes == 39] > 0).sum()
    assert of_popular < 16  # of 39; 19.5 without preference
    assert int((whole.interactions.weights > 0).sum()) == 156  # control


@pytest.mark.parametrize("absent", [[], [1, 2]])
def test_the_bootstrap_loss_equals_its_definition(absent):
    """Of content over the items that have some."""
    rng, there = np.random.default_rng(0), np.setdiff1d(np.arange(4), absent)
    final, content, head = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 3), (4, 3), (3, 3)))
    triples = rng.integers(0, 6, (4, 3))

    def apart(one, other):
        return np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(one, other, strict=True)])

    users, items = final[triples[:, 0]], final[triples[:, 1]]
    expected = apart(users @ head, items) + apart(items @ head, users)
    expected += apart((content @ head)[there], items[there]) + apart((content @ head)[there], content[there])
    arrays, present = map(jnp.asarray, (final, triples, content, head)), jnp.asarray(np.isin(np.arange(4), there))
    made = bootstrap_loss(*arrays, jax.random.key(0), dropout=0.0, present=present if absent else None)
    np.testing.assert_allclose(made, expected, rtol=1e-5)


@pytest.mark.parametrize("absent", [[], [1, 3]])
def test_the_contrast_equals_its_definition(absent):
    """InfoNCE among the items that have content, each against those of other ids."""
    rng, there = np.random.default_rng(0), np.setdiff1d(np.arange(5), absent)
    final, content = (rng.normal(size=(n, 3)).astype(np.float32) for n in (6, 5))
    triples = np.array([[0, 4, 1], [1, 5, 2], [2, 4, 0], [2, 3, 1], [0, 3, 1]])
    items = triples[:, 1]
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (final[items], content))

    def loss(row):
        others = [x[row] @ y[c] / 0.2 for c in there if items[c] != items[row]]
        own = x[row] @ y[row] / 0.2
        return np.log(np.exp([own, *others]).sum()) - own

    present = jnp.asarray(np.isin(np.arange(5), there)) if absent else None
    made = content_contrast(*map(jnp.asarray, (final, triples, content)), present=present)
    np.testing.assert_allclose(made, np.mean([loss(row) for row in there]), rtol=1e-5)


def test_content_that_items_lack_is_zero_and_counted_by_no_loss(planted, content, monkeypatch):
    """Where all have some, the scale is that of all and nothing is masked."""
    there = np.arange(41) % 4 > 0
    without = np.where(there[:, None], content, np.float32(0))
    for config in (BM3Config(8, 2, 2, 256, 0.02), CM3Config(8, 2, 2, 256, 0.02, contrast=1.0)):
        assert np.isfinite(_with_content(planted, without, config).items).all()
    passed = []
    monkeypatch.setattr(lightgcn, "_epoch", lambda state, *given, **_: passed.append(given[3:5]) or state)
    for vectors in (content, without, 0 * content):
        _with_content(planted, vectors, BM3Config(8, 2, 1, 256, 0.02))
    np.testing.assert_array_equal(passed[0][0], Standardizer.fit([content])(content))
    assert passed[0][1] is None
    expected = np.zeros_like(content)
    expected[there] = Standardizer.fit([content[there]])(content[there])
    np.testing.assert_array_equal(passed[1][0], expected)
    np.testing.assert_array_equal(passed[1][1], there)
    assert not any(array.any() for array in passed[2])  # nobody has any


def test_freedom_places_an_item_that_nobody_has_had_by_its_content(planted, content):
    made = _with_content(planted, content, FREEDOM)
    assert (neighbors(made.items, k=5)[40] // 20 == 1).all()
    scores = made.users[:200] @ made.items.T
    own = scores.reshape(100, 2, 41)
    assert own[:, 1, 40].mean() > own[:, 0, 40].mean()
    assert not np.array_equal(made.items, _with_content(planted, -content[::-1].copy(), FREEDOM).items)  # control


@pytest.mark.parametrize("config", [FREEDOM, MMHCLConfig(8, 2, 1, 256, 0.02)])
def test_an_item_without_interactions_and_without_content_has_no_vector(planted, content, config):
    without = content.copy()
    without[40] = 0
    np.testing.assert_array_equal(_with_content(planted, without, replace(config, epochs=1)).items[40], 0)
    assert np.abs(_with_content(planted, content, replace(config, epochs=1)).items[40]).max() > 0  # control


def test_without_negatives_vectors_do_not_collapse_and_keep_the_communities(planted, content):
    made = _with_content(planted, content, BM3Config(8, 2, 20, 256, 0.02))
    unit = made.items[:40] / np.linalg.norm(made.items[:40], axis=1, keepdims=True)
    assert (unit[:20] @ unit[20:].T).mean() < 0.5
    assert (neighbors(made.items[:40], k=5) // 20 == np.arange(40)[:, None] // 20).mean() > 0.95


def test_hyperedges_propagate_by_dense_matrices(content):
    """Users over the items that they share, each not over itself; items over neighborhoods of content."""
    matrix = interactions_matrix(_histories([[0, 1], [1, 2, 3], [1, 3], [7]]), num_items=41, num_users=5)
    shared = matrix.toarray().astype(np.float64) @ matrix.toarray().T
    np.fill_diagonal(shared, 0)
    near = np.eye(41)
    near[np.repeat(np.arange(41), 5), neighbors(content, k=5).ravel()] = 1  # a row per neighborhood
    dense = np.zeros((46, 46))
    for start, block in ((0, shared), (5, near.T @ near)):
        scale = np.maximum(block.sum(axis=1), 1) ** -0.5
        dense[start : start + len(block), start : start + len(block)] = scale[:, None] * block * scale
    x = np.random.default_rng(0).normal(size=(46, 3)).astype(np.float32)
    made = jax.jit(propagate_hyperedges, static_argnames="layers")(x, hyperedges(matrix, content, 5), layers=2)
    np.testing.assert_allclose(made, dense @ dense @ x, atol=1e-5)


@pytest.mark.parametrize("absent", [[], [1, 3]])
def test_the_uniform_loss_equals_its_definition(absent):
    """Over pairs of other users, and of other items; the latter from distances that their content lets expect, those of
    unlike items where one has none."""
    rng = np.random.default_rng(0)
    final, content = (rng.normal(size=(n, 3)).astype(np.float32) for n in (6, 4))
    triples = np.array([[0, 4, 1], [1, 4, 2], [2, 5, 0], [2, 3, 1]])
    users, items, alike = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (final[triples[:, 0]], final[triples[:, 1]], content)
    )
    content[absent], there = 0, np.setdiff1d(np.arange(4), absent)

    def apart(x, ids, expected):
        pairs = [(a, b) for a in range(4) for b in range(4) if ids[a] != ids[b]]
        return np.log(np.mean([np.exp(-2 * (np.sum((x[a] - x[b]) ** 2) - expected(a, b))) for a, b in pairs]))

    wanted = np.mean(np.sum((users - items) ** 2, axis=1)) + 0.35 * (
        apart(users, triples[:, 0], lambda a, b: 0)
        + apart(
            items,
            triples[:, 1],
            lambda a, b: 2 - 2 * np.clip(alike[a] @ alike[b], 0, 0.8) if a in there and b in there else 2,
        )
    )
    made = uniform_loss(*map(jnp.asarray, (final, triples, content)), weight=0.7)
    np.testing.assert_allclose(made, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, triples: view_contrast(x, 2 * x, triples),
        lambda x, triples: content_contrast(x, triples, x[triples[:, 2]]),
        lambda x, triples: uniform_loss(x, triples, x[triples[:, 2]], weight=1.0),
    ],
)
def test_a_step_compares_1024_of_its_triples_with_each_other(loss):
    """Not all 4096: a table of these would take most of a step's time."""

    def program(n):
        return str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((9, 3)), jnp.zeros((n, 3), jnp.int32)))

    assert "[4096,4096]" not in program(4096)
    assert "[1024,1024]" in program(4096)
    assert "[1000,1000]" in program(1000)  # control: all of a smaller step


def test_views_are_contrasted_by_the_first_triples(monkeypatch):
    x, y = (jax.random.normal(jax.random.key(seed), (6, 3)) for seed in range(2))
    triples = jnp.asarray([[0, 3, 1], [1, 4, 2], [2, 5, 0]])
    whole = view_contrast(x, y, triples)
    monkeypatch.setattr(losses, "_CONTRASTED", 2)
    np.testing.assert_array_equal(view_contrast(x, y, triples), view_contrast(x, y, triples[:2]))
    assert view_contrast(x, y, triples) != whole


def test_one_id_alone_has_no_uniformity_and_no_gradient():
    value, gradient = jax.value_and_grad(uniformity)(jnp.eye(3)[:2], jnp.zeros(2, jnp.int32))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("config", [MMHCLConfig(8, 2, 20, 256, 0.02), CM3Config(8, 2, 20, 256, 0.02, neighbors=5)])
def test_hyperedges_and_the_sphere_keep_the_communities(planted, content, config):
    """And place an item that nobody has had by its content."""
    made = _with_content(planted, content, config)
    assert (neighbors(made.items, k=5) // 20 == np.minimum(np.arange(41) // 20, 1)[:, None]).mean() > 0.9
    scores = (made.users[:200] @ made.items.T).reshape(100, 2, 41)
    assert scores[:, 1, 40].mean() > scores[:, 0, 40].mean()
    unit = made.items[:40] / np.linalg.norm(made.items[:40], axis=1, keepdims=True)
    assert (unit[:20] @ unit[20:40].T).mean() < 0.5


def test_the_gradient_of_hyperedges_is_the_one_by_differentiation(planted, content):
    """As a training step has it: the maps are symmetric."""
    matrix = interactions_matrix(planted, num_items=41, num_users=201)
    edges, rng = hyperedges(matrix, content, 5), np.random.default_rng(0)
    x, other = (jnp.asarray(rng.normal(size=(242, 4)), jnp.float32) for _ in range(2))

    def loss(x):
        return jnp.sum(other * unit_rows(propagate_hyperedges(x, edges, layers=2)))

    def ours(x):
        _, pull = jax.vjp(unit_rows, propagate_hyperedges(x, edges, layers=2))
        return propagate_hyperedges(*pull(other), edges, layers=2)

    np.testing.assert_allclose(jax.jit(ours)(x), jax.jit(jax.grad(loss))(x), atol=1e-5)


def test_a_contrast_brings_items_and_their_content_together(planted, content):
    plain, near = (_with_content(planted, content, replace(SMALL, contrast=weight)) for weight in (0.0, 1.0))

    def explained(items):
        x = np.c_[content[:40], np.ones(40)]
        return (
            1
            - ((x @ np.linalg.lstsq(x, items[:40], rcond=None)[0] - items[:40]) ** 2).sum()
            / items[:40].var(0).sum()
            / 40
        )

    assert explained(near.items) > explained(plain.items)


def test_content_that_is_needed_is_asked_for(planted):
    with pytest.raises(SemidError, match="Freedom: expected content vectors of the items, got none"):
        _train(planted, FREEDOM)
    with pytest.raises(SemidError, match=r"expected keep in \(0, 1\], got 0"):
        FreedomConfig(keep=0)
    with pytest.raises(SemidError, match="give hyperedges too"):
        GraphConfig(views=0.1)
