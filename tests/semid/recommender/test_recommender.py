"""The recommender against brute force: search equals scoring every item, whatever the batch, the filter or the file."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapes
from flax import nnx

from semid import artifacts
from semid.catalog import SemanticCatalog
from semid.data import Histories, Standardizer
from semid.errors import SemidError
from semid.recommender import ItemData, ModelSpec, Recommender, Sampling, Scorer, ranking, scorers
from semid.recommender.ranking import Ranking
from semid.recommender.requests import read_histories
from seq_models import (
    DenseConfig,
    EncoderDecoderConfig,
    FlatDecoderConfig,
    HybridConfig,
    RQTransformerConfig,
    TransformerConfig,
    codes,
)

ITEMS = 24
# More beams than there are items, and of all as many results for nearly all tests: one program.
BEAM, K = 32, 6
IDS = [f"i{row}" for row in range(ITEMS)]
BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
MODELS = {
    "codes": (RQTransformerConfig(backbone=BACKBONE, id_embedding=True), 3),
    "encoder-decoder": (EncoderDecoderConfig(backbone=BACKBONE, decoder_layers=1), 0),
    "flat": (FlatDecoderConfig(backbone=BACKBONE), 0),
    "hybrid": (HybridConfig(backbone=BACKBONE), 3),
    "dense": (DenseConfig(backbone=BACKBONE, widths=(4,)), 0),
}


def _catalog() -> SemanticCatalog:
    """24 of the 48 code tuples of three levels: no two items collide, and the first level has an unused code."""
    chosen = np.random.default_rng(0).permutation(48)[:ITEMS]
    codes = np.stack(np.unravel_index(chosen, (4, 4, 3)), axis=1).astype(np.int32)
    return SemanticCatalog(pa.array(IDS), codes, (5, 4, 3), tie_break=True)


def _make(name: str, catalog: SemanticCatalog) -> Recommender:
    config, width = MODELS[name]
    spec = ModelSpec(config, catalog.level_sizes, num_items=len(catalog), num_features=width, max_history=4)
    rng = np.random.default_rng(1)
    return Recommender(
        spec.build(seed=5),
        catalog,
        spec=spec,
        items=ItemData(
            features=rng.normal(size=(len(catalog), width)).astype(np.float32) if width else None,
            train_counts=rng.permutation(len(catalog)).astype(np.int32),
        ),
    )


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Recommender:
    return _make(request.param, _catalog())


def _ranks_densely(model: Recommender) -> bool:
    return isinstance(model.spec.model, (DenseConfig, HybridConfig))


def _histories(n: int, *, seed: int = 0, shortest: int = 1) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [rng.choice(IDS, rng.integers(shortest, 9)).tolist() for _ in range(n)]


def _brute_force(scores: np.ndarray, k: int, *, without: tuple[str, ...] = ()) -> tuple[list[str], list[float]]:
    order = [row for row in np.argsort(-scores, kind="stable") if IDS[row] not in without][:k]
    return [IDS[row] for row in order], [float(scores[row]) for row in order]


def test_histories_without_items_share_a_list_and_masks_and_draws_are_ranked_in_blocks(model, monkeypatch):
    masks, draw = np.random.default_rng(0).random((3, ITEMS)) < 0.5, Sampling().noise
    ranking_of = model._ranking(None)
    one_by_one = [ranking_of.most_popular(1, K, mask[None]) for mask in masks]
    drawn = [ranking_of.most_popular(1, K, None, noise=draw(np.array([user]))) for user in range(3)]
    monkeypatch.setattr("semid.recommender.ranking._SCORES", ITEMS)
    for allowed in (None, masks[:1]):
        shared = ranking_of.most_popular(3, K, allowed)
        assert [part.strides[0] for part in shared] == [0, 0]
        for part, of_one in zip(shared, ranking_of.most_popular(1, K, allowed), strict=True):
            np.testing.assert_array_equal(part, np.repeat(of_one, 3, axis=0))
    in_blocks = ranking_of.most_popular(3, K, masks), ranking_of.most_popular(3, K, None, noise=draw(np.arange(3)))
    for found, expected in zip(in_blocks, (one_by_one, drawn), strict=True):
        for part, parts in zip(found, zip(*expected, strict=True), strict=True):
            np.testing.assert_array_equal(part, np.concatenate(parts))


def test_the_most_popular_are_sorted_once(model, monkeypatch):
    ranking_of, everything = model._ranking(None), np.ones((1, ITEMS), bool)
    of_all = ranking_of.most_popular(1, ITEMS + 2, everything)
    monkeypatch.setattr(ranking, "largest", None)  # which goes through all items
    for part, expected in zip(ranking_of.most_popular(1, ITEMS + 2, None), of_all, strict=True):
        np.testing.assert_array_equal(part, expected)
    assert ranking_of.popularity.order is model._ranking(0.0).popularity.order


def test_scores_are_log_probabilities(model):
    scores = model.score(_histories(5), IDS)
    assert scores.shape == (5, ITEMS)
    totals = np.exp(scores.astype(np.float64)).sum(axis=1)
    if _ranks_densely(model):
        np.testing.assert_allclose(totals, 1, atol=1e-5)  # every item has its share
    else:
        assert (totals < 1).all()  # code tuples that no item has keep some
    assert not np.allclose(scores[0], scores[1])  # histories matter


def test_the_whole_catalogue_is_scored_as_its_items_are(model, monkeypatch):
    histories = Histories.from_lists([[1, 2, 3], [], *([row] for row in range(5))])
    monkeypatch.setattr(ranking, "_USERS", 4)
    monkeypatch.setattr(codes, "_LEAVES", 7)  # blocks of both, the last ones short
    model, calls, blocks = model.with_model(model.model), [], type(model.model).leaf_blocks
    monkeypatch.setattr(type(model.model), "leaf_blocks", lambda *args: calls.append(args) or blocks(*args))
    found = model.catalog_log_probs(histories)
    assert len(calls) == 1  # for two batches
    np.testing.assert_allclose(found, model.log_probs(histories, np.arange(ITEMS)), atol=1e-5)
    assert (found.argsort(axis=1) != found[0].argsort()).any()  # control


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_recommendations_equal_scoring_every_item(model, exclude_seen):
    histories = _histories(7)
    scores = model.score(histories, IDS)
    top = model.recommend(histories, k=K, beam_size=BEAM, exclude_seen=exclude_seen)
    for index, history in enumerate(histories):
        ids, values = _brute_force(scores[index], K, without=tuple(history) if exclude_seen else ())
        assert top.item_ids[index] == ids
        np.testing.assert_allclose(top.scores[index], values, atol=1e-5)


def test_seen_items_are_recommended_unless_excluded(model):
    """Control for the test above: without the option some lists do hold items of their history."""
    histories = _histories(7)
    lists = {
        seen: model.recommend(histories, k=K, beam_size=BEAM, exclude_seen=seen).item_ids for seen in (False, True)
    }
    overlap = {
        seen: sum(len(set(a) & set(h)) for a, h in zip(ids, histories, strict=True)) for seen, ids in lists.items()
    }
    assert overlap[False] > 0
    assert overlap[True] == 0


def test_a_history_longer_than_the_beam_leaves_enough_unseen(model):
    longest = [IDS[:19]]
    top = model.recommend(longest, k=5, beam_size=2, exclude_seen=True)
    assert sorted(top.item_ids[0]) == sorted(IDS[19:])


def test_an_answer_depends_on_its_history_alone(model):
    """Also where another one is searched wider, and the catalogue is larger than the beam."""
    histories = [IDS[:14] * 2, *([a, b] for a in IDS[:12] for b in IDS[12:])]
    mixed = model.recommend(histories, k=2, beam_size=2, exclude_seen=True)
    wide = model.recommend(histories, k=2, beam_size=BEAM, exclude_seen=True)
    by_width = [index for index in range(len(histories)) if mixed.item_ids[index] != wide.item_ids[index]]
    assert len(by_width) >= (0 if _ranks_densely(model) else 3)  # control: the width of the search does change answers
    for index in (0, 1, 2, *by_width[:4]):
        alone = model.recommend([histories[index]], k=2, beam_size=2, exclude_seen=True)
        assert alone.item_ids[0] == mixed.item_ids[index]
        np.testing.assert_allclose(alone.scores[0], mixed.scores[index], atol=1e-5)
    assert all(len(set(ids) - set(of)) == 2 for ids, of in zip(mixed.item_ids, histories, strict=True))


@pytest.mark.parametrize("shared", [True, False])
def test_only_what_is_allowed_is_recommended_and_all_of_it_can_be(model, shared):
    histories, rng = _histories(6), np.random.default_rng(7)
    allowed = rng.random((1 if shared else 6, ITEMS)) < 0.2
    allowed[:, 0] = True
    scores = model.score(histories, IDS)
    top = model.recommend(histories, k=8, beam_size=8, exclude_seen=True, allowed=allowed[0] if shared else allowed)
    for index, history in enumerate(histories):
        mask = allowed[0 if shared else index]
        forbidden = {IDS[row] for row in np.flatnonzero(~mask)} | set(history)
        ids, values = _brute_force(scores[index], ITEMS - len(forbidden), without=tuple(forbidden))
        assert top.item_ids[index] == ids[:8]
        np.testing.assert_allclose(top.scores[index][: len(ids)], values[:8], atol=1e-5)


def test_one_item_of_all_is_found_by_one_beam(model):
    for item in IDS[:8]:
        assert model.recommend([["i9"]], k=1, beam_size=1, allowed=model.allow([item])).item_ids == [[item]]


def test_nothing_allowed_gives_empty_lists_that_are_marked(model):
    top = model.recommend([["i1"], []], k=3, allowed=np.zeros(ITEMS, bool))
    assert top.item_ids == [[], []]
    assert np.isneginf(top.scores).all()


def test_what_is_popular_is_masked_too(model):
    allowed = model.allow(IDS[4:7])
    popular = [IDS[row] for row in np.argsort(-model.train_counts, kind="stable") if allowed[row]]
    assert model.recommend([[]], k=5, allowed=allowed).item_ids == [popular]


@pytest.mark.parametrize(
    "wrong", [np.ones(ITEMS - 1, bool), np.ones((2, ITEMS), bool), np.ones(ITEMS, int), ["i1", "i2"]]
)
def test_a_mask_of_another_shape_or_kind_is_refused(model, wrong):
    with pytest.raises(SemidError, match=r"expected allowed as booleans .*makes it of ids: allow\(item_ids\)"):
        model.recommend([["i1"]] * 3, k=2, allowed=wrong)
    with pytest.raises(SemidError, match="i99"):
        model.allow(["i99"])
    assert model.allow(["i99", "i3"], skip_unknown=True).tolist() == model.allow(["i3"]).tolist()
    assert model.allow(["i3"]).sum() == 1  # control


def test_a_hybrid_recommends_items_that_training_never_saw():
    model = _make("hybrid", _catalog())
    cold = [IDS[row] for row in np.flatnonzero(model.train_counts == 0)]
    assert len(cold) == 1
    scores = model.score([["i1"]], IDS)[0]
    # one beam finds one item; beside it stands the cold one, wherever the beams are, in the dense head's order
    top = model.recommend([["i1"]], k=ITEMS, beam_size=1)
    assert len(top.item_ids[0]) == ITEMS  # k beams at least
    two = model.recommend([["i1"]], k=1, beam_size=1, allowed=model.allow([*cold, IDS[3]]))
    assert two.item_ids[0] == [max([*cold, IDS[3]], key=lambda item: scores[IDS.index(item)])]


def test_the_catalogue_must_be_the_one_whose_codes_the_model_speaks():
    catalog = _catalog()
    spec = ModelSpec(*MODELS["codes"][:1], catalog.level_sizes, ITEMS, 3, 4, catalog=catalog.digest)
    parts = {"spec": spec, "items": ItemData(np.ones(ITEMS, np.int32), np.zeros((ITEMS, 3), np.float32))}
    model = spec.build(seed=0)
    Recommender(model, catalog, **parts)  # control
    other = SemanticCatalog(catalog.item_ids, catalog.codes[::-1], catalog.level_sizes, tie_break=True)
    with pytest.raises(SemidError, match="trained on the codes of another catalogue"):
        Recommender(model, other, **parts)


def test_rank_gives_the_rows_of_recommend(model):
    histories = _histories(5)
    rows = Histories.from_lists([[IDS.index(item) for item in history] for history in histories])
    ranked = model.rank(rows, k=K, exclude_seen=False, beam_size=BEAM)
    top = model.recommend(histories, k=K, beam_size=BEAM)
    assert (ranked.shape, ranked.dtype) == ((5, K), np.int32)
    assert [[IDS[row] for row in one] for one in ranked] == top.item_ids


def test_shorter_lists_are_the_first_of_longer_ones_and_of_one_program(model):
    whole = model.recommend(_histories(3), k=16, beam_size=BEAM)
    programs = scorers._top._cache_size()
    for k in (1, 5, K):
        top = model.recommend(_histories(3), k=k, beam_size=BEAM)
        assert top.item_ids == [ids[:k] for ids in whole.item_ids]
        np.testing.assert_array_equal(top.scores, whole.scores[:, :k])
    assert scorers._top._cache_size() == programs
    model.recommend(_histories(3), k=BEAM + 1, beam_size=BEAM)  # control
    assert scorers._top._cache_size() > programs


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_more_than_there_is_comes_marked(model, exclude_seen):
    history = IDS[3:5]
    left = ITEMS - 2 * exclude_seen
    top = model.recommend([history, []], k=ITEMS + 4, beam_size=BEAM, exclude_seen=exclude_seen)
    assert len(top.item_ids[0]) == len(set(top.item_ids[0])) == left
    assert len(top.item_ids[1]) == ITEMS
    assert top.scores.shape == (2, ITEMS + 4)
    assert np.isneginf(top.scores[0, left:]).all()
    assert np.isfinite(top.scores[0, :left]).all()
    ranked = model.rank(Histories.from_lists([[3, 4]]), k=ITEMS + 4, beam_size=BEAM, exclude_seen=exclude_seen)
    assert (ranked[0, left:] == -1).all()


def test_an_empty_history_gets_what_is_popular(model):
    popular = np.argsort(-model.train_counts, kind="stable")
    top = model.recommend([["i1"], [], ["i2"]], k=K, beam_size=BEAM, exclude_seen=True)
    assert top.item_ids[1] == [IDS[row] for row in popular[:K]]
    share = (model.train_counts + 1) / (model.train_counts + 1).sum()
    np.testing.assert_allclose(top.scores[1], np.log(np.sort(share)[::-1][:K]), rtol=1e-5)
    np.testing.assert_allclose(model.score([[]], IDS)[0], np.log(share), rtol=1e-5)
    for index, history in ((0, "i1"), (2, "i2")):  # the neighbors are answered as when asked alone
        assert top.item_ids[index] == model.recommend([[history]], k=K, beam_size=BEAM, exclude_seen=True).item_ids[0]


def test_only_the_latest_items_are_read_but_all_are_excluded(model):
    old, recent = IDS[10:14], IDS[:4]
    np.testing.assert_allclose(model.score([old + recent], IDS), model.score([recent], IDS), atol=1e-6)
    assert not np.allclose(model.score([recent[::-1]], IDS), model.score([recent], IDS))  # control: order is read
    top = model.recommend([old + recent], k=ITEMS, beam_size=BEAM, exclude_seen=True)
    assert sorted(top.item_ids[0]) == sorted(set(IDS) - {*old, *recent})


def test_no_histories_and_no_items_give_empty_answers(model):
    top = model.recommend([], k=3)
    assert (top.item_ids, top.scores.shape) == ([], (0, 3))
    assert model.score([], IDS).shape == (0, ITEMS)
    assert model.score([["i1"]], []).shape == (1, 0)


def test_batches_of_any_size_answer_alike(model, monkeypatch):
    histories = [*_histories(9, seed=3), [], *_histories(4, seed=4)]
    whole = model.recommend(histories, k=K, beam_size=BEAM, exclude_seen=True)
    scores = model.score(histories, IDS[::-1])
    monkeypatch.setattr(ranking, "_BATCH", 4)  # several groups by length, and batches of 4, 2 and 1
    monkeypatch.setattr(ranking, "_PAIRS", 16)  # items in blocks too, the last one short
    monkeypatch.setattr(Ranking, "top", _in_groups_of(5))
    cut = model.recommend(histories, k=K, beam_size=BEAM, exclude_seen=True)
    assert cut.item_ids == whole.item_ids
    np.testing.assert_allclose(cut.scores, whole.scores, atol=1e-5)
    np.testing.assert_allclose(model.score(histories, IDS[::-1]), scores, atol=1e-5)


def test_a_dense_model_holds_a_bounded_number_of_scores(monkeypatch):
    model, histories = _make("dense", _catalog()), _histories(11, seed=3)
    whole, scores = model.recommend(histories, k=5), model.score(histories, IDS[:3])
    held = []
    for name in ("top", "log_probs"):

        def recorded(scorer, question, *rest, call=getattr(type(model._scorer), name), **options):
            held.append(len(question.history) * ITEMS)
            return call(scorer, question, *rest, **options)

        monkeypatch.setattr(type(model._scorer), name, recorded)
    monkeypatch.setattr(ranking, "_SCORES", 4 * ITEMS + 1)
    cut = model.recommend(histories, k=5)
    assert cut.item_ids == whole.item_ids
    np.testing.assert_allclose(model.score(histories, IDS[:3]), scores, atol=1e-5)
    assert held == [4 * ITEMS] * 6
    monkeypatch.setattr(ranking, "_SCORES", 1)  # less than one history needs: one at a time
    model.recommend(histories[:2], k=5)
    assert held[6:] == [ITEMS] * 2


def _in_groups_of(size: int):
    rank = Ranking.top

    def grouped(self, histories, **options):
        parts = [rank(self, histories.take(slice(at, at + size)), **options) for at in range(0, len(histories), size)]
        return tuple(np.concatenate(side) for side in zip(*parts, strict=True))

    return grouped


def test_one_by_one_equals_all_at_once(model):
    histories = _histories(5, seed=8)
    top = model.recommend(histories, k=K, beam_size=BEAM)
    for index, history in enumerate(histories):
        alone = model.recommend([history], k=K, beam_size=BEAM)
        assert alone.item_ids[0] == top.item_ids[index]
        np.testing.assert_allclose(alone.scores[0], top.scores[index], atol=1e-5)


def test_a_model_that_was_loaded_answers_to_the_bit(model, tmp_path):
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as folder:
        model.write(folder)
    loaded = Recommender.from_pretrained(tmp_path / "model")
    histories = [*_histories(4), []]
    for exclude_seen in (False, True):
        before, after = (
            m.recommend(histories, k=K, beam_size=BEAM, exclude_seen=exclude_seen) for m in (model, loaded)
        )
        assert before.item_ids == after.item_ids
        np.testing.assert_array_equal(before.scores, after.scores)
    np.testing.assert_array_equal(model.score(histories, IDS), loaded.score(histories, IDS))
    assert (loaded.spec, loaded.tie_break) == (model.spec, True)
    assert (loaded.codes is None) == (model.codes is None)


def test_another_model_takes_the_same_tables(model, monkeypatch):
    other = model.spec.build(seed=6)
    fresh = Recommender(other, model.catalog, spec=model.spec, items=model.items)
    before, wanted = (m.recommend(_histories(4), k=K, beam_size=BEAM) for m in (model, fresh))
    monkeypatch.delattr(Scorer, "from_model")  # neither tables nor trie are built again
    found = model.with_model(other).recommend(_histories(4), k=K, beam_size=BEAM)
    assert found.item_ids == wanted.item_ids != before.item_ids
    np.testing.assert_array_equal(found.scores, wanted.scores)
    assert model.recommend(_histories(4), k=K, beam_size=BEAM).item_ids == before.item_ids  # it keeps its own


@pytest.mark.parametrize(
    "config",
    [
        HybridConfig(backbone=BACKBONE),
        DenseConfig(backbone=BACKBONE),
        RQTransformerConfig(backbone=BACKBONE, id_embedding=True, dense_share=0.5),
    ],
)
def test_item_vectors_are_computed_once_for_all_requests(config, monkeypatch):
    monkeypatch.setitem(MODELS, "own", (config, 3))
    model = _make("own", _catalog())
    scorer = model.scorer
    told = scorer.request_tables
    assert told is scorer.request_tables
    assert model.tables.item_vectors is None  # which training reads, where parameters change

    def scores(tables):
        other = dataclasses.replace(scorer)
        vars(other)["request_tables"] = tables
        model._scorer = other
        return model.score(_histories(3), IDS)

    expected = scores(model.tables)
    np.testing.assert_allclose(scores(told), expected, atol=1e-5)
    assert np.abs(scores(told._replace(item_vectors=-told.item_vectors)) - expected).max() > 1e-3  # control


def test_parameters_from_the_host_are_uploaded_once(model):
    on_host = nnx.merge(model._scorer.graph, jax.device_get(model._scorer.params))
    assert any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(nnx.state(on_host)))  # control
    leaves = jax.tree.leaves(model.with_model(on_host)._scorer.params)
    assert leaves
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_every_file_of_a_model_is_verified(model, tmp_path):
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as folder:
        model.write(folder)
    for file in sorted((tmp_path / "model").iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(SemidError, match=file.name):
            Recommender.from_pretrained(tmp_path / "model")
        file.write_bytes(content)
    Recommender.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("file", ["model.safetensors", "items.safetensors"])
def test_a_model_that_is_not_finite_is_refused(tmp_path, file):
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as folder:
        _make("codes", _catalog()).write(folder)
        tensors = artifacts.load_tensors(folder / file)
        name = next(name for name, tensor in tensors.items() if tensor.dtype == np.float32)
        tensors[name].flat[-1] = np.nan
        artifacts.save_tensors(folder / file, tensors)
    with pytest.raises(
        SemidError, match=rf"/model/{file}: tensor '{name}' holds values that are not finite; train or "
    ):
        Recommender.from_pretrained(tmp_path / "model")


def test_a_model_of_vectors_with_a_constant_dimension_is_read(tmp_path):
    made, raw = _make("codes", _catalog()), np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32)
    raw[:, 1] = 0.5
    standardizer = Standardizer.fit([raw])
    items = ItemData(made.train_counts, standardizer(raw), standardizer)
    made = Recommender(made.model, made.catalog, spec=made.spec, items=items)
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as folder:
        made.write(folder)
    read = Recommender.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(read.tables.features, standardizer(raw))


def test_a_model_and_its_parts_are_one_line_in_a_notebook(model, tmp_path):
    assert repr(model.catalog) == "SemanticCatalog(24 items, codes 5 x 4 x 3 with tie-break)"
    made = repr(model)
    assert made.startswith(f"Recommender({model.spec.model.name}, ")
    assert made.endswith(" parameters, 24 items)")
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as folder:
        model.write(folder)
    loaded = Recommender.from_pretrained(tmp_path / "model")
    assert repr(loaded) == f"{made.removesuffix(')')}, from {tmp_path}/model)"
    top = repr(loaded.recommend(_histories(4), k=K, beam_size=BEAM))
    assert top == "Recommendations(6 items for each of 4 histories)"


def test_the_ids_of_all_histories_are_looked_up_at_once(model):
    with mock.patch.object(SemanticCatalog, "find_rows", autospec=True, side_effect=SemanticCatalog.find_rows) as find:
        read = read_histories([["i1", "x", "i2"], [], ["i3"]], model.catalog, conditions=None, skip_unknown=True)
    assert ([rows.tolist() for rows in read.padded(2)[0]], find.call_count) == ([[1, 2], [0, 0], [3, 0]], 1)


def test_unknown_ids_stop_or_are_dropped(model):
    with pytest.raises(SemidError, match=r"history 1: unknown item id 'x' \(2 of 3 unknown\).*--skip-unknown"):
        model.recommend([["i1"], ["x", "i1", "y"]])
    with pytest.raises(SemidError, match="history 0: unknown item id 'x'"):
        model.score([["x"]], ["i1"])
    with pytest.raises(SemidError, match="item id 'x'"):
        model.score([["i1"]], ["x"])
    kept = model.recommend([["x", "i1", "y"], ["x"]], k=K, beam_size=BEAM, skip_unknown=True)
    wanted = model.recommend([["i1"], []], k=K, beam_size=BEAM)
    assert kept.item_ids == wanted.item_ids
    np.testing.assert_array_equal(kept.scores, wanted.scores)
    np.testing.assert_array_equal(
        model.score([["x", "i1"]], IDS, skip_unknown=True), model.score([["i1"]], IDS, skip_unknown=True)
    )


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        (["i1", "i2"], "history 0 is the string 'i1'; expected a list of item ids"),
        ("i1", "history 0 is the string 'i'; expected a list of item ids"),
        ([["i1"], [3.0]], r"item ids \(history 1\): entry 0 is 3\.0 of type float"),
        ([["i1"], [3]], "history 1: unknown item id '3'"),
        ([["i1"], None], r"expected a list of item ids \(history 1\), got None"),
        ([["i1"], float("nan")], r"expected a list of item ids \(history 1\), got nan"),
        ([["i1"], {"zzz"}], "history 1: unknown item id 'zzz'"),
        ([pd.Series(["i1", "zzz", "i2"], index=[1, 0, 2])], "history 0: unknown item id 'zzz'"),
    ],
)
def test_what_is_no_list_of_histories_is_refused(model, histories, message):
    with pytest.raises(SemidError, match=message):
        model.recommend(histories)


@pytest.mark.parametrize("options", [{"k": 0}, {"beam_size": 0}, {"k": -1}, {"k": 5.0}])
def test_nothing_to_recommend_is_refused(model, options):
    with pytest.raises(SemidError, match="expected k and beam_size of at least 1, got"):
        model.recommend([["i1"]], **options)


def test_numbers_of_numpy_will_do(model):
    with shapes.unchecked():
        found = model.recommend(_histories(7), k=np.int64(K), beam_size=np.int64(BEAM))
    assert found.item_ids == model.recommend(_histories(7), k=K, beam_size=BEAM).item_ids


def test_items_that_share_all_codes_share_their_score_and_come_by_popularity():
    codes = np.array([[0, 0], [1, 1], [0, 0], [2, 0], [0, 0]], np.int32)
    catalog = SemanticCatalog(pa.array(IDS[:5]), codes, (3, 2))
    model = _make("codes", catalog)
    scores = model.score([["i1"]], IDS[:5])[0]
    assert scores[0] == scores[2] == scores[4]
    top = model.recommend([["i1"]], k=5, beam_size=BEAM)
    alike = sorted(("i0", "i2", "i4"), key=lambda item: -model.train_counts[IDS.index(item)])
    assert [item for item in top.item_ids[0] if item in alike] == alike != ["i0", "i2", "i4"]
    assert sorted(top.item_ids[0]) == IDS[:5]


def test_a_narrow_beam_gives_k_items_nevertheless(model):
    """The search is as wide as k at least; each entry has its exact score."""
    top = model.recommend([["i1", "i2"]], k=8, beam_size=1)
    assert len(top.item_ids[0]) == 8
    np.testing.assert_allclose(top.scores[0], model.score([["i1", "i2"]], top.item_ids[0])[0], atol=1e-5)
    assert (np.diff(top.scores[0]) <= 0).all()


@pytest.fixture(scope="module", params=["codes", "dense"])
def unrepeated(request) -> tuple[Recommender, Recommender]:
    """A recommender, and one of the same model for data without repeats."""
    plain = _make(request.param, _catalog())
    spec = dataclasses.replace(plain.spec, repeat_factor=0.0)
    return plain, Recommender(plain.model, plain.catalog, spec=spec, items=plain.items)


def test_a_model_of_data_without_repeats_never_recommends_the_history(unrepeated):
    """Its mass goes to the others in proportion; that of older items, which the model does not read, to none. Search
    and exact scores have one rule."""
    plain, model = unrepeated
    histories = [IDS[3:5], [*IDS[10:16], "i3", "i4"]]
    before, scores = np.exp(plain.score(histories, IDS)), np.exp(model.score(histories, IDS))
    seen = np.asarray([[item in history[-4:] for item in IDS] for history in histories])
    left = np.where(seen, 0, before / (1 - np.where(seen, before, 0).sum(axis=1, keepdims=True)))
    left[1, 10:14] = 0
    np.testing.assert_allclose(scores, left, atol=1e-5)
    rows = Histories.from_lists([[IDS.index(item) for item in history] for history in histories])
    np.testing.assert_allclose(np.exp(model.catalog_log_probs(rows)), left, atol=1e-5)
    assert (np.exp(plain.catalog_log_probs(rows))[1, 10:14] > 0).all()  # control
    top = model.recommend(histories, k=ITEMS, beam_size=BEAM)
    for index, history in enumerate(histories):
        assert set(top.item_ids[index]) == set(IDS) - set(history)
        rows = [IDS.index(item) for item in top.item_ids[index]]
        np.testing.assert_allclose(np.exp(top.scores[index][: len(rows)]), left[index, rows], atol=1e-5)
    assert set(plain.recommend(histories, k=ITEMS, beam_size=BEAM).item_ids[1]) == set(IDS)  # control


def test_boosts_multiply_probabilities_and_nothing_else(unrepeated):
    boosts = {"i5": 1.5, "i6": 0.0, "i9": 40.0}
    for model in unrepeated:
        histories = [["i1", "i2"], ["i5", "i9"], []]
        scores = model.score(histories, IDS)
        with np.errstate(divide="ignore"):
            scores[:, [5, 6, 9]] += np.log(np.asarray([1.5, 0, 40], np.float32))
        top = model.recommend(histories, k=ITEMS, beam_size=BEAM, boosts=boosts)
        for index, found in enumerate(top.item_ids):
            ids, values = _brute_force(scores[index], int(np.isfinite(scores[index]).sum()))
            assert found == ids
            np.testing.assert_allclose(top.scores[index][: len(ids)], values, atol=1e-5)
        kept = model.recommend(histories, k=ITEMS, beam_size=BEAM, boosts=boosts | {"x": 2.0}, skip_unknown=True)
        assert kept.item_ids == top.item_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boosts": {"i5": -1.0}}, r"^expected a finite boost of at least 0 for item 'i5', got -1\.0$"),
        (
            {"boosts": {"i5": 1.0, "i6": float("nan")}},
            r"^expected a finite boost of at least 0 for item 'i6', got nan$",
        ),
        ({"boosts": {"i5": "much"}}, "^expected numbers as boosts"),
        ({"boosts": {"x": 2.0}}, "item id 'x'"),
        ({"boosts": {5: 2.0, "5": 3.0}}, "^boosts: item '5' is given twice, as text and as a number; keep one"),
        ({"graph_weight": 0.5}, r"^a graph_weight of 0\.5 needs an item graph, and the recommender has none$"),
        (
            {"graph_weight": 1.5},
            r"^expected a graph_weight from 0 \(the model alone\) to 1 \(the graph alone\), got 1\.5$",
        ),
    ],
)
def test_what_is_no_boost_or_weight_is_refused(unrepeated, options, message):
    with pytest.raises(SemidError, match=message):
        unrepeated[0].recommend([["i1"]], k=2, **options)


def test_a_dense_model_serves_at_a_width_that_is_chosen_later(tmp_path):
    model, histories = _make("dense", _catalog()), _histories(3)
    narrow = model.with_width(4)
    np.testing.assert_array_equal(narrow.item_vectors(), model.item_vectors()[:, :4])
    assert np.abs(narrow.score(histories, IDS) - model.score(histories, IDS)).max() > 1e-3
    np.testing.assert_array_equal(narrow.with_width(None).score(histories, IDS), model.score(histories, IDS))
    narrow.save_pretrained(tmp_path / "narrow")
    loaded = Recommender.from_pretrained(tmp_path / "narrow")
    assert (loaded.spec.model.width, model.spec.model.width) == (4, None)
    np.testing.assert_array_equal(loaded.score(histories, IDS), narrow.score(histories, IDS))
    for untrained in (3, 9):
        with pytest.raises(ValueError, match=f"expected a width that is trained, of 4, 8, got {untrained}"):
            model.with_width(untrained)
    with pytest.raises(SemidError, match="got a generator of codes, RQ-Transformer; take a SASRec model"):
        _make("codes", _catalog()).with_width(4)
