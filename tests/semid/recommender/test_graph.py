"""A model mixed with an item graph: files, growth, explanations; tests/seq_models/test_mixture.py has the rest."""

import dataclasses
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest

from semid import artifacts
from semid.catalog import CATALOG_FILE
from semid.catalog.changes import ChangeKind
from semid.data import Histories
from semid.errors import SemidError
from semid.generators.mixing import with_best_graph_weight, with_best_repeat_factor
from semid.graphs import ItemGraph, ItemGraphConfig
from semid.recommender import Recommender, scorers
from seq_models import RQTransformer, RQTransformerConfig
from tests.semid.recommender.test_catalog_updates import (
    BACKBONE,
    BEAM,
    GONE,
    IDS,
    ITEMS,
    LATER,
    RAW,
    _append,
    _catalog,
    _make,
)

K = 6
CONFIG = ItemGraphConfig(window=2, neighbors=3, width=8, columns=("v",)).resolved(["v"])
HISTORIES = [["i1", "i2", "i3"], ["i7"], ["i2", "i9"]]


def _graph(items: int = ITEMS) -> ItemGraph:
    """Training histories know no item past the 16th: the others are reached by content."""
    lists = [np.random.default_rng(user).permutation(ITEMS)[:5].tolist() for user in range(30)]
    return ItemGraph.from_histories(Histories.from_lists(lists), pa.array(IDS[:items]), CONFIG, vectors=RAW[:items])


def _mixed(items: int, **options) -> Recommender:
    made = _make(RQTransformerConfig(backbone=BACKBONE), _catalog(items), **options)
    return made.with_repeat_factor(0.0).with_graph(_graph(items), weight=0.4)


@pytest.fixture(scope="module")
def model() -> Recommender:
    return _mixed(ITEMS, capacity_factor=2.0)


def _top(model: Recommender, **options) -> tuple[list[list[str]], np.ndarray]:
    top = model.recommend(HISTORIES, k=K, beam_size=BEAM, **options)
    return top.item_ids, top.scores


def test_a_mixed_model_is_read_as_it_was_written(model, tmp_path):
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as folder:
        model.write(folder)
    read = Recommender.from_pretrained(tmp_path / "model", capacity_factor=2.0)
    assert (read.spec.graph_weight, read.graph.config) == (0.4, CONFIG)
    for one, other in zip(_top(read), _top(model), strict=True):
        np.testing.assert_array_equal(one, other)
    assert _top(read, graph_weight=0.0)[0] == _top(model.with_graph(None))[0] != _top(read)[0]
    model.save_pretrained(tmp_path / "package")
    assert Recommender.from_pretrained(tmp_path / "package").graph.digest != ""


def test_files_that_the_manifest_does_not_list_are_not_read(model, tmp_path):
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as folder:
        model.with_graph(None).write(folder)
    model.graph.write(tmp_path / "model")  # as a download over an earlier one leaves them
    (tmp_path / "model/condition/encoders").mkdir(parents=True)
    artifacts.save_tensors(tmp_path / "model/condition/encoders/of_another.safetensors", {"x": np.zeros(1)})
    read = Recommender.from_pretrained(tmp_path / "model")
    assert (read.graph, read.items.conditions.encoder) == (None, None)
    assert _top(read)[0] == _top(model.with_graph(None))[0]


def test_other_weights_read_what_was_computed_once(monkeypatch):
    config = RQTransformerConfig(backbone=BACKBONE, id_embedding=True, dense_share=0.5)
    vectors, passes = mock.Mock(wraps=scorers._item_vectors), mock.Mock(side_effect=RQTransformer.leaf_blocks)
    monkeypatch.setattr(scorers, "_item_vectors", vectors)
    monkeypatch.setattr(RQTransformer, "leaf_blocks", lambda *arguments: passes(*arguments))
    mixed = _make(config, _catalog(ITEMS)).with_graph(_graph(), weight=0.4)
    rows = Histories.from_lists([[1, 2], [3]])
    mixed.catalog_log_probs(rows)
    for _ in range(2):
        found = mixed.catalog_log_probs(rows, graph_weight=0.3)
    assert (vectors.call_count, passes.call_count) == (1, 1)
    other = _make(config, _catalog(ITEMS)).with_graph(_graph(), weight=0.3)
    np.testing.assert_array_equal(found, other.catalog_log_probs(rows))
    assert np.abs(found - mixed.catalog_log_probs(rows)).max() > 1e-3  # control
    assert mixed.with_model(mixed.model).scorer.request_tables is not mixed.scorer.request_tables


def test_the_weight_one_is_the_graphs_own_ranking(model):
    rows = Histories.from_lists([[IDS.index(item) for item in history] for history in HISTORIES])
    expected, q = model.graph.rank(rows, k=K), model.graph.distribution(rows).toarray()
    ids, scores = _top(model, graph_weight=1.0)
    for row, (found, log_probs) in enumerate(zip(ids, scores, strict=True)):
        led_to = [item for item in expected[row].tolist() if q[row, item] > 0]
        assert found == [IDS[item] for item in led_to]
        np.testing.assert_allclose(np.exp(log_probs[: len(led_to)]), q[row, led_to], rtol=1e-4)


def test_an_appended_item_is_found_through_the_graph(model):
    later = model.with_catalog(_catalog(LATER), vectors=RAW[ITEMS:])
    assert len(later.graph.item_ids) == LATER
    (ids, scores), (expected_ids, expected) = _top(later), _top(_mixed(LATER, model=model.model))
    assert ids == expected_ids
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert any(item in IDS[ITEMS:] for found in _top(later, graph_weight=1.0)[0] for item in found)
    with pytest.raises(SemidError, match=r"item graph: expected vectors \[.*; give those as graph_vectors"):
        model.with_catalog(_catalog(LATER), vectors=RAW[ITEMS:], graph_vectors=RAW[ITEMS:, :1])


def test_vectors_are_the_models_where_the_graph_has_none(model):
    counted = ItemGraph.from_histories(Histories.from_lists([[0, 1], [1, 2]]), pa.array(IDS[:ITEMS]), ItemGraphConfig())
    plain = model.with_graph(counted, weight=0.4)
    assert len(plain.with_catalog(_catalog(LATER), vectors=RAW[ITEMS:]).graph.item_ids) == LATER
    with pytest.raises(SemidError, match=r"item graph: the graph has no content vectors, .*; leave them out$"):
        plain.with_catalog(_catalog(LATER), vectors=RAW[ITEMS:], graph_vectors=RAW[ITEMS:])


def test_the_graph_follows_appended_items_that_were_updated_since(model, tmp_path):
    folder = tmp_path / "catalog"
    with artifacts.write_artifact(folder, kind="catalog", config={}) as new:
        _catalog(ITEMS).write(new / CATALOG_FILE)
    for row in range(ITEMS, ITEMS + 2):
        _append(folder, row, v=RAW)
    first = model.with_version(folder)
    assert first.with_version(folder).graph is first.graph  # nothing to compute again
    _append(folder, ITEMS, ChangeKind.UPDATE, v=-RAW)
    vectors = RAW[ITEMS : ITEMS + 2] * np.array([[-1], [1]], np.float32)
    expected = model.with_catalog(_catalog(ITEMS + 2), vectors=vectors)
    assert first.with_version(folder).graph.digest == expected.graph.digest != first.graph.digest
    _append(folder, ITEMS + 2, v=RAW)
    expected = expected.with_catalog(_catalog(ITEMS + 3), vectors=RAW[ITEMS + 2 : ITEMS + 3])
    assert first.with_version(folder).graph.digest == expected.graph.digest


def test_items_that_were_removed_since_are_not_recommended_through_the_graph(model):
    grown, without = (model.with_catalog(_catalog(LATER, gone), vectors=RAW[ITEMS:]) for gone in ((), GONE))
    lost = {IDS[row] for row in GONE}
    for weight in (0.4, 1.0):
        of_all, of_rest = (_top(one, graph_weight=weight) for one in (grown, without))
        assert lost & {item for ids in of_all[0] for item in ids}
        assert not lost & {item for ids in of_rest[0] for item in ids}
    q = grown.graph.distribution(Histories.from_lists([[1, 2, 3], [7], [2, 9]])).toarray()
    q[:, GONE] = 0
    for ids, scores, row in zip(*of_rest, q / q.sum(axis=1, keepdims=True), strict=True):
        np.testing.assert_allclose(np.exp(scores[: len(ids)]), row[[IDS.index(item) for item in ids]], rtol=1e-4)


def test_an_explanation_adds_up(model):
    ids, scores = _top(model)
    for history, items, log_probs in zip(HISTORIES, ids, scores, strict=True):
        parts = model.explain(history, items)
        of_model = model.score([history], items, graph_weight=0.0)[0]
        for part, item, log_prob, alone in zip(parts, items, log_probs, of_model, strict=True):
            assert part.item_id == item
            np.testing.assert_allclose(part.log_prob, log_prob, atol=1e-4)
            assert np.isclose(np.exp(log_prob) * (1 - part.graph_share), 0.6 * np.exp(alone), rtol=1e-3)
            assert {source for source, _ in part.sources} <= set(history)
            assert not part.sources or np.isclose(sum(share for _, share in part.sources), 1)
    history = [
        "unknown",
        "i3",
        "i4",
        "i5",
        "i6",
        "i7",
    ]  # a graph of window 2, then a wider one
    wide = model.with_graph(dataclasses.replace(model.graph, config=dataclasses.replace(CONFIG, window=9)))
    for reader, read in ((model, history[-2:]), (wide, history[-4:])):
        parts = reader.explain(history, IDS[:ITEMS], skip_unknown=True)
        assert {source for part in parts for source, _ in part.sources} == set(read)
    with pytest.raises(SemidError, match="the model has no item graph"):
        model.with_graph(None).explain(["i1"], ["i2"])


def test_a_graph_of_other_items_and_odd_weights_are_refused(model):
    with pytest.raises(SemidError, match=r"the item graph is of other items \(20\) than the catalogue \(16\)"):
        model.with_graph(_graph(LATER))
    with pytest.raises(SemidError, match="expected a graph_weight from 0"):
        model.with_graph(_graph(), weight=1.5)
    with pytest.raises(SemidError, match="expected a graph_weight from 0"):
        dataclasses.replace(model.spec, graph_weight=1.5)  # as a file may have it
    with pytest.raises(SemidError, match="expected a graph_weight from 0"):
        _top(model, graph_weight=-0.1)
    with pytest.raises(SemidError, match="needs an item graph, and the recommender has none"):
        _top(model.with_graph(None), graph_weight=0.5)


def test_weight_and_repeat_factor_are_chosen_by_the_score_that_they_reach(model):
    """Scores that want the weight .3, and the factor 2: of all examples, or of so few that it may be chance."""
    chosen = with_best_graph_weight(
        model.with_graph(None), _graph(), lambda one: {"ndcg@10": -abs(one.spec.graph_weight - 0.3)}
    )
    assert (chosen.spec.graph_weight, chosen.spec.repeat_factor) == (0.3, 0.0)
    plain, noise = model.with_graph(None).with_repeat_factor(1.0), np.array([4.0, -2.0, -2.0])
    for given, by_chance, factor in ((chosen, 0, 2.0), (plain, 0, 2.0), (plain, 1, 1.0)):

        def ndcg(one, by_chance=by_chance):
            gain = -abs(one.spec.repeat_factor - 2)
            return gain + by_chance * one.spec.repeat_factor * noise

        fitted = with_best_repeat_factor(given, ndcg)
        assert (fitted.spec.repeat_factor, fitted.spec.graph_weight) == (factor, given.spec.graph_weight)
