"""Columns made of columns: smoothing against matrix products, alignment that learns, users as means of their items."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from semid.artifacts import read_manifest
from semid.config import to_dict
from semid.data import Dataset, Standardizer
from semid.encoders import restore_encoders, with_text_vectors
from semid.errors import SemidError
from semid.graphs import (
    AlphaRecConfig,
    BM3Config,
    CM3Config,
    EdgeWeights,
    FreedomConfig,
    FuseConfig,
    GraphConfig,
    MMHCLConfig,
    PpmiConfig,
    SmoothConfig,
    VectorColumn,
    VectorKNN,
    add_column,
    cooccurrence,
    neighbor_overlap,
)
from semid.graphs.columns.alpharec import Interactions, contrast, fit_map, mapped
from semid.graphs.columns.fuse import Projection, _draw_rows, fit_projection, modulated
from semid.graphs.neighbors import neighbors
from semid.graphs.signals import standardize_known

ITEMS, NEW = 30, 29  # nobody has had the last two


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Two communities of items; content says which, amid noise, in a column of its own next to the texts."""
    rng = np.random.default_rng(0)
    titles = [f"{'red lipstick' if row % 2 else 'motor oil'} word{row % 5} thing{row % 3}" for row in range(ITEMS)]
    items = pa.table({"item_id": [f"i{row}" for row in range(ITEMS)], "title": titles})
    rows = [(f"u{u}", f"i{2 * item + u % 2}", at) for u in range(40) for at, item in enumerate(rng.permutation(14)[:7])]
    users, taken, places = zip(*rows, strict=True)
    interactions = pa.table({"user_id": users, "item_id": taken, "position": places})
    made = Dataset.build(items, interactions, name="two", source={"type": "test"})
    vectors = rng.normal(size=(ITEMS, 6)).astype(np.float32)
    vectors[:, 0] = np.where(np.arange(ITEMS) % 2, 0.8, -0.8)
    return made.with_vectors("content", vectors)


@pytest.mark.parametrize("weights", EdgeWeights)
def test_smoothing_is_the_mean_of_matrix_powers_and_leaves_isolated_items_as_they_are(dataset, weights):
    x = dataset.vectors("content")
    counts = cooccurrence(dataset.splits.train, num_items=ITEMS, window=2).toarray()
    degree = np.maximum(counts.sum(1), 1)
    scaled = counts / degree[:, None] if weights is EdgeWeights.ROWS else counts / np.sqrt(np.outer(degree, degree))
    scaled[counts.sum(1) == 0, counts.sum(1) == 0] = 1
    expected = np.mean([np.linalg.matrix_power(scaled, power) @ x for power in range(4)], axis=0)
    made = add_column(dataset, SmoothConfig("content", layers=3, window=2, weights=weights)).vectors("content_smooth")
    np.testing.assert_allclose(made, expected, atol=1e-5)
    np.testing.assert_array_equal(made[NEW], x[NEW])
    assert np.abs(made[:28] - x[:28]).max(axis=1).min() > 1e-3  # control: all others move


def test_a_modulated_projection_is_a_layer_norm_with_scale_and_shift_of_its_input():
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(5, 4)), rng.normal(size=(4, 9)), rng.normal(size=9)
    main, scale, shift = np.split(x @ kernel + bias, 3, axis=1)
    normal = (main - main.mean(1, keepdims=True)) / np.sqrt(main.var(1, keepdims=True) + 1e-5)
    made = modulated(Projection(jnp.float32(kernel), jnp.float32(bias)), jnp.float32(x))
    np.testing.assert_allclose(made, (1 + scale) * normal + shift, rtol=1e-4, atol=1e-5)


CONFIG = FuseConfig("content", VectorColumn("behavior"), epochs=40, batch_size=8, learning_rate=0.02)


@pytest.fixture(scope="module")
def behaved(dataset) -> Dataset:
    """With behavior that is a rotation of content, and noise."""
    rng = np.random.default_rng(1)
    turned = dataset.vectors("content") @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    return dataset.with_vectors("behavior", turned + 0.1 * rng.normal(size=turned.shape))


def test_alignment_learns_and_content_then_finds_its_behavior(behaved):
    x, behavior = (behaved.vectors(name) for name in ("content", "behavior"))
    projection, losses = fit_projection(x, behavior, CONFIG)
    assert losses[-20:].mean() < 0.3 * losses[:5].mean()

    def found(projection):
        unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (modulated(projection, jnp.asarray(x)), behavior)]
        return ((unit[0] @ unit[1].T).argmax(axis=1) == np.arange(ITEMS)).mean()

    assert found(projection) > 0.9
    assert found(fit_projection(x, behavior[::-1].copy(), CONFIG)[0]) < 0.3  # control: the behavior of others


def test_a_batch_to_fuse_has_different_items_and_every_item_is_drawn():
    keys = jax.random.split(jax.random.key(0), 200)
    rows = np.asarray(jax.vmap(lambda key: _draw_rows(key, ITEMS, 7))(keys))
    assert (np.diff(rows, axis=1) > 0).all()
    assert set(rows.flat) == set(range(ITEMS))
    np.testing.assert_array_equal(_draw_rows(keys[0], 7, 7), np.arange(7))


def test_fused_vectors_are_unit_halves_and_content_stands_in_for_absent_behavior(behaved, tmp_path):
    made = add_column(behaved, CONFIG, out=tmp_path / "fused")
    assert read_manifest(tmp_path / "fused").config["source"]["content_fuse"]["stage_version"] == 2
    fused = made.vectors("content_fuse")
    halves = fused.reshape(ITEMS, 2, 6)
    np.testing.assert_allclose(np.linalg.norm(halves, axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(halves[NEW, 0], halves[NEW, 1])
    assert np.abs(halves[:28, 0] - halves[:28, 1]).max(axis=1).min() > 1e-3  # control: the others have behavior
    encoder = restore_encoders(made.encoders)["content_fuse"]
    assert (encoder.inputs, encoder.width) == (("content",), 12)
    encoded = encoder.encode(made.items)
    np.testing.assert_allclose(encoded[NEW], fused[NEW], atol=1e-6)
    np.testing.assert_allclose(encoded[:, 6:], fused[:, 6:], atol=1e-6)


def test_a_user_is_the_mean_of_the_other_items():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(300, 4)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    users, items = np.array([0, 0, 0, 1, 1]), np.array([1, 2, 3, 3, 4])
    pairs = Interactions(jnp.asarray(users), jnp.asarray(items), jnp.asarray([3.0, 2.0]))
    key = jax.random.key(0)
    loss = contrast((jnp.asarray(kernel),), (jnp.asarray(x), pairs), key, size=7, temperature=0.2)
    batch_key, negative_key = jax.random.split(key)
    rows = np.asarray(jax.random.randint(batch_key, (7,), 0, 5))
    negatives = np.asarray(jax.random.randint(negative_key, (256,), 0, 300))
    z = x @ kernel

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    losses = []
    for row in rows:
        others = z[[i for u, i in zip(users, items, strict=True) if u == users[row] and i != items[row]]].mean(axis=0)
        against = [cosine(others, z[j]) / 0.2 for j in negatives if j != items[row]]
        own = cosine(others, z[items[row]]) / 0.2
        losses.append(np.log(np.exp(own) + np.exp(against).sum()) - own)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(
        mapped((jnp.asarray(kernel), jnp.eye(3)), jnp.asarray(x)), np.where(z > 0, z, 0.01 * z), rtol=1e-5, atol=1e-6
    )


def test_alpharec_finds_the_communities_and_knows_new_items(dataset):
    config = AlphaRecConfig("content", dim=4, epochs=60, batch_size=64, learning_rate=0.02)
    made = add_column(dataset, config)
    vectors = made.vectors("content_alpharec")
    np.testing.assert_array_equal(vectors, config.item_vectors(dataset, seed=0))

    def share(x):
        return (neighbors(x, k=5) % 2 == np.arange(ITEMS)[:, None] % 2).mean()

    assert share(vectors) > 0.95 > share(dataset.vectors("content"))
    encoder = restore_encoders(made.encoders)["content_alpharec"]
    np.testing.assert_allclose(encoder.encode(dataset.items.slice(NEW)), vectors[NEW:], atol=1e-5)


LACKING = [0, 1, 2, NEW]
THERE = ~np.isin(np.arange(ITEMS), LACKING)


@pytest.fixture(scope="module")
def bare(behaved) -> Dataset:
    """Where some items have no content."""
    return behaved.with_vectors("bare", np.where(THERE[:, None], behaved.vectors("content"), np.float32(0)))


def test_fused_columns_learn_of_items_with_content_and_leave_the_others_without(bare):
    config, x, behavior = replace(CONFIG, column="bare"), bare.vectors("bare"), bare.vectors("behavior")
    made = add_column(bare, config)
    halves = made.vectors("bare_fuse").reshape(ITEMS, 2, 6)
    np.testing.assert_array_equal(halves[LACKING, 1], 0)
    np.testing.assert_array_equal(halves[NEW], 0)
    np.testing.assert_allclose(np.linalg.norm(halves[LACKING[:3], 0], axis=1), 1, atol=1e-5)  # behavior stays
    encoder, scale = restore_encoders(made.encoders)["bare_fuse"], Standardizer.fit([x[THERE]])
    np.testing.assert_array_equal(encoder.encode(made.items)[LACKING], 0)
    known = np.arange(ITEMS) < 28
    of_known = standardize_known(behavior, known).astype(np.float32)
    expected = fit_projection(scale(x)[THERE & known], of_known[THERE & known], config)[0]
    np.testing.assert_array_equal(encoder.tensors()["mean"], scale.mean)
    np.testing.assert_array_equal(encoder.tensors()["kernel"], expected.kernel)
    with pytest.raises(SemidError, match="0 items have content and collaborative vectors, 2 are needed"):
        add_column(bare.with_vectors("none", 0 * x), replace(config, column="none"))


def test_alpharec_learns_of_items_with_content_and_leaves_the_others_without(bare):
    config, x = AlphaRecConfig("bare", dim=4, epochs=2, batch_size=64), bare.vectors("bare")
    made, train = add_column(bare, config), bare.splits.train
    np.testing.assert_array_equal(made.vectors("bare_alpharec")[LACKING], 0)
    place, taken = np.cumsum(THERE) - 1, {user: set() for user in range(bare.num_users)}
    for at, user in enumerate(train.users):
        taken[user] |= {place[item] for item in train[at] if THERE[item]}
    pairs = [(user, item) for user, items in taken.items() for item in sorted(items) if len(items) > 1]
    users, items = (jnp.asarray(side, jnp.int32) for side in zip(*pairs, strict=True))
    counts = jnp.asarray([len(items) for items in taken.values()], jnp.float32)
    scale = Standardizer.fit([x[THERE]])
    layers, _ = fit_map(scale(x[THERE]), Interactions(users, items, counts), config, seed=0)
    tensors = restore_encoders(made.encoders)["bare_alpharec"].tensors()
    np.testing.assert_array_equal(tensors["mean"], scale.mean)
    np.testing.assert_array_equal(tensors["layer0"], layers[0])


def test_what_trains_on_absent_content_is_of_another_version(bare, tmp_path):
    graphs = (CM3Config, BM3Config, partial(GraphConfig, contrast=0.1), AlphaRecConfig)
    others = (FreedomConfig, MMHCLConfig, GraphConfig, PpmiConfig)  # whose vectors are those of before
    for column, expected in (("bare", True), ("content", False)):
        assert {config(column=column).lacks_content(bare) for config in graphs} == {expected}
        assert FuseConfig("content", AlphaRecConfig(column)).lacks_content(bare) == expected
        assert not SmoothConfig(column).lacks_content(bare)
        config = AlphaRecConfig(column, dim=4, epochs=1)
        add_column(bare, config, out=tmp_path / column)
        recipe = read_manifest(tmp_path / column).config["source"][f"{column}_alpharec"]
        assert recipe == to_dict(config) | ({"stage_version": 1} if expected else {})
        assert Dataset.load(tmp_path / column).vector_columns[-1] == f"{column}_alpharec"
    assert not any(
        config(**({} if config is PpmiConfig else {"column": "bare"})).lacks_content(bare) for config in others
    )


def test_a_ranker_by_vectors_takes_the_mean_of_the_history(dataset):
    x = dataset.vectors("content")
    histories = dataset.splits.test.histories.take(slice(0, 5))
    ranked = VectorKNN.fit(dataset, x).rank(histories, k=ITEMS)
    for row, found in enumerate(ranked):
        taken, mean = histories[row], x[histories[row]].mean(axis=0)
        cosines = x @ mean / np.linalg.norm(x, axis=1)
        expected = [item for item in np.argsort(-cosines) if item not in taken]
        assert found.tolist() == expected + [-1] * (ITEMS - len(expected))


def test_overlap_of_neighbors_counts_common_ones():
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    other = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    assert neighbor_overlap(x, 3 * x, k=5) == 1
    one, two = neighbors(x, k=5), neighbors(other, k=5)
    shared = [len(set(a) & set(b)) / 5 for a, b in zip(one.tolist(), two.tolist(), strict=True)]
    assert neighbor_overlap(x, other, k=5) == pytest.approx(np.mean(shared))


def test_a_column_of_a_column_that_an_encoder_makes_takes_new_items_by_their_texts(dataset, tmp_path):
    with_text = with_text_vectors(dataset, dim=5)
    made = add_column(with_text, SmoothConfig("text_lsa", layers=1), out=tmp_path / "made")
    read = Dataset.load(tmp_path / "made")
    np.testing.assert_array_equal(read.vectors("text_lsa_smooth"), made.vectors("text_lsa_smooth"))
    assert add_column(with_text, SmoothConfig("text_lsa", layers=1), out=tmp_path / "made").digest == made.digest
    with pytest.raises(SemidError, match="in use by a dataset of other settings"):
        add_column(with_text, SmoothConfig("text_lsa", layers=2), out=tmp_path / "made")
    encoder = restore_encoders(read.encoders)["text_lsa_smooth"]
    assert (encoder.inputs, encoder.width) == (("title",), 5)
    texts = pa.table({"title": ["red lipstick word1", "motor oil"]})
    np.testing.assert_array_equal(encoder.encode(texts), restore_encoders(read.encoders)["text_lsa"].encode(texts))


def test_what_cannot_be_made_is_refused(dataset):
    with pytest.raises(SemidError, match=r"vector columns content, more; name the one to read .*--freedom\.column"):
        add_column(dataset.with_vectors("more", np.ones((ITEMS, 2))), SmoothConfig())
    bare = dataset.replace(items=dataset.items.select(["item_id"]))
    with pytest.raises(SemidError, match=r"has no vector column to read; add one, such as one of texts \(`semid prep"):
        add_column(bare, SmoothConfig())
    with pytest.raises(SemidError, match="layers of at least 1, got 0"):
        SmoothConfig(layers=0)
    with pytest.raises(SemidError, match="epochs of at least 1, got 0"):
        FuseConfig(epochs=0)
    with pytest.raises(SemidError, match="batch_size of at least 2, got 1"):
        FuseConfig(batch_size=1)
    wrong = ({"temperature": 0}, {"learning_rate": np.nan}, {"weight_decay": -1}, {"temperature": np.inf})
    for config, setting in [*((FuseConfig, one) for one in wrong), *((AlphaRecConfig, one) for one in wrong)]:
        with pytest.raises(SemidError, match=rf"{next(iter(setting))} .*, got {next(iter(setting.values()))}"):
            config(**setting)
    with pytest.raises(SemidError, match="hidden of at least 0, got -5"):
        AlphaRecConfig(hidden=-5)
    made = add_column(dataset, SmoothConfig())
    with pytest.raises(SemidError, match="has a column 'content_smooth' already"):
        add_column(made, SmoothConfig("content", layers=1))
    other = add_column(made, SmoothConfig("content_smooth"))  # control: a column of another name
    assert other.vector_columns == ["content", "content_smooth", "content_smooth_smooth"]
    with pytest.raises(SemidError, match="column 'content': expected vectors of 6 dimensions in every row"):
        restore_encoders(made.encoders)["content_smooth"].encode(pa.table({"content": [[1.0, 2.0]]}))
    assert isinstance(FuseConfig().signal, PpmiConfig)
