"""A trained model on later versions of its catalogue: as if it were built for them, in the programs that it has."""

import dataclasses

import jax
import numpy as np
import pyarrow as pa
import pytest

from semid import artifacts
from semid.catalog import CATALOG_FILE, SemanticCatalog
from semid.catalog.changes import ChangeKind
from semid.catalog.versions import commit, current, revert
from semid.data import Histories, Standardizer
from semid.errors import SemidError
from semid.recommender import ItemData, ModelSpec, Recommender, Sampling, Scorer, ranking, recommender, scorers
from seq_models import (
    DenseConfig,
    HybridConfig,
    RQTransformerConfig,
    SoftmaxOver,
    TransformerConfig,
)

ITEMS, LATER, WIDTH, SIZES = 16, 20, 3, (4, 4, 3)
BEAM = 32
IDS = [f"i{row}" for row in range(LATER)]
BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
CODES = np.stack(np.unravel_index(np.random.default_rng(0).permutation(48)[:LATER], SIZES), axis=1).astype(np.int32)
RAW = np.random.default_rng(1).normal(3, 2, size=(LATER, WIDTH)).astype(np.float32)
COUNTS = np.random.default_rng(2).permutation(ITEMS).astype(np.int32) + 1
GONE = [2, ITEMS + 1]
HISTORIES = [["i1", "i2", "i3"], ["i7"], [], ["i2"]]
MODELS = {
    "codes": (RQTransformerConfig(backbone=BACKBONE), SoftmaxOver.CHILDREN),
    "hybrid": (HybridConfig(backbone=BACKBONE), SoftmaxOver.VOCABULARY),
}


def _catalog(items: int, removed=()) -> SemanticCatalog:
    marks = np.isin(np.arange(items), removed)
    return SemanticCatalog(pa.array(IDS[:items]), CODES[:items], SIZES, True, marks)


def _make(
    config, catalog: SemanticCatalog, *, width: int = WIDTH, model=None, digest: str = "", **options
) -> Recommender:
    """A recommender of a catalogue whose first 16 items training has seen."""
    spec = ModelSpec(config, SIZES, len(catalog), width, max_history=4, catalog=digest, columns=("v",) if width else ())
    spec = ModelSpec(**vars(spec) | {"normalization": options.pop("normalization", SoftmaxOver.VOCABULARY)})
    standardizer = Standardizer.fit([RAW[:ITEMS]]) if width else None
    return Recommender(
        spec.build(seed=5) if model is None else model,
        catalog,
        spec=spec,
        items=ItemData(
            np.pad(COUNTS, (0, len(catalog) - ITEMS)),
            standardizer(RAW[: len(catalog)]) if width else None,
            options.pop("standardizer", standardizer),
        ),
        **options,
    )


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Recommender:
    config, normalization = MODELS[request.param]
    catalog = _catalog(ITEMS)
    return _make(config, catalog, capacity_factor=2.0, normalization=normalization, digest=catalog.digest)


def _plain(model: Recommender, catalog: SemanticCatalog) -> Recommender:
    """The same model built for that catalogue, with no spare capacity."""
    return _make(model.spec.model, catalog, model=model.model, normalization=model.spec.normalization)


def _answers(model: Recommender, histories=HISTORIES, **options):
    """All there are: of one shape, so in few programs."""
    return model.recommend(histories, k=LATER, beam_size=BEAM, **options)


def _agree(one, other) -> None:
    assert one.item_ids == other.item_ids
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_a_later_version_is_answered_as_by_a_model_built_for_it(model):
    later, new = _catalog(LATER, GONE), [["i17", "i5", "i16"], ["i1"], [], ["i19"]]
    updated, plain = model.with_catalog(later, vectors=RAW[ITEMS:]), _plain(model, later)
    allowed = np.random.default_rng(0).random((len(new), LATER)) < 0.5
    for options in ({}, {"allowed": allowed, "exclude_seen": True}):
        _agree(_answers(updated, new, **options), _answers(plain, new, **options))
    rows = Histories.from_lists([[1, 2], [17], [], [3]])
    np.testing.assert_allclose(updated.catalog_log_probs(rows), plain.catalog_log_probs(rows), atol=1e-5)
    assert (updated.spec.columns, updated.spec.num_items, updated.spec.catalog) == (("v",), LATER, later.digest)
    assert model.spec.catalog == _catalog(ITEMS).digest  # the old one goes on as it was
    assert [len(ids) for ids in _answers(model).item_ids] == [ITEMS] * len(HISTORIES)


def test_what_is_removed_is_not_recommended_and_what_is_left_all_is(model):
    updated = model.with_catalog(_catalog(LATER, GONE), vectors=RAW[ITEMS:])
    left = sorted(set(IDS) - {"i2", "i17"})
    for top in (_answers(updated), _answers(updated, allowed=updated.allow(IDS))):
        assert [sorted(ids) for ids in top.item_ids] == [left] * len(HISTORIES)
    assert _answers(updated, allowed=updated.allow(["i2", "i17"])).item_ids == [[]] * len(HISTORIES)
    assert "i2" in _answers(model.with_catalog(_catalog(LATER), vectors=RAW[ITEMS:])).item_ids[0]  # control
    gone = updated.catalog_log_probs(Histories.from_lists([[1, 2], [17], [], [3]]))[:, GONE]
    np.testing.assert_array_equal(gone, -np.inf)


def test_removed_items_have_no_score_and_histories_are_scored_in_batches(model, monkeypatch):
    sizes = []

    def even(scorer: Scorer, requests, rows) -> np.ndarray:
        sizes.append(len(requests.history))
        return np.zeros((len(requests.history), len(rows)), np.float32)

    monkeypatch.setattr(Scorer, "log_probs", even)
    monkeypatch.setattr(ranking, "_BATCH", 2)
    updated = model.with_catalog(_catalog(LATER, GONE), vectors=RAW[ITEMS:])
    scores = updated.score([["i1"], ["i2"], ["i3"]], ["i17", "i5", "i2"])
    np.testing.assert_array_equal(scores, [[-np.inf, 0, -np.inf]] * 3)
    assert sizes == [2, 1]


def test_a_history_that_holds_a_removed_item_is_read(model):
    updated = model.with_catalog(_catalog(LATER, GONE), vectors=RAW[ITEMS:])
    histories = [["i5", "i2"], ["i5", "i4"], ["i5"], ["i4"]]
    scores = _answers(updated, histories).scores[:, : LATER - len(GONE)]
    assert np.isfinite(scores).all()
    assert np.abs(scores[:1] - scores[1:]).max(axis=1).min() > 1e-4  # not as if it were not there, or another


def _programs() -> int:
    jitted = (scorers._top, scorers._log_probs, scorers._catalog_log_probs, scorers._item_vectors)
    return sum(one._cache_size() for one in jitted)


def test_an_appended_item_is_reached_at_once_without_compiling(model):
    def ask(recommender: Recommender, items: int) -> None:
        _answers(recommender)
        _answers(recommender, allowed=np.ones(items, bool))
        _answers(recommender, exclude_seen=True, allowed=np.ones((len(HISTORIES), items), bool))

    updated, at = model, ITEMS
    ask(updated, ITEMS)
    before = _programs()
    for items, gone in [(ITEMS + 1, (3,)), (LATER, (2, 3)), (LATER, ())]:
        updated, at = updated.with_catalog(_catalog(items, gone), vectors=RAW[at:items]), items
        ask(updated, items)
    top = _answers(updated, allowed=updated.allow(["i18"]))
    assert top.item_ids == [["i18"]] * len(HISTORIES)
    assert np.isfinite(top.scores[:, 0]).all()
    assert _programs() == before
    _answers(_plain(model, _catalog(LATER)))  # control: without it, another number of items is another program
    assert _programs() > before


def test_a_few_items_more_or_less_are_scored_in_one_program(model):
    scorers._log_probs.clear_cache()
    model.score(HISTORIES, IDS[:5])
    of_eight = model.score(HISTORIES, IDS[:8])
    for n in (6, 7):
        np.testing.assert_array_equal(model.score(HISTORIES, IDS[:n]), of_eight[:, :n])
    assert scorers._log_probs._cache_size() == 1
    model.score(HISTORIES, IDS[:9])  # control
    assert scorers._log_probs._cache_size() == 2


def test_lists_without_history_are_drawn_in_one_program_though_items_come(model):
    ranking._best_allowed.clear_cache()
    drawn = [model.recommend([[]] * n, k=3, sample=Sampling(seed=1)).item_ids for n in (3, 4)]
    assert drawn[0] == drawn[1][:3]  # whoever else asks
    longer = model.recommend([[]] * 4, k=5, sample=Sampling(seed=1)).item_ids
    assert [ids[:3] for ids in longer] == drawn[1]
    updated = model.with_catalog(_catalog(LATER), vectors=RAW[ITEMS:])
    lists = [updated.recommend([[]] * n, k=3, sample=Sampling(seed=1), allowed=updated.allow(IDS)) for n in (3, 4)]
    assert [len(set(ids)) for top in lists for ids in top.item_ids] == [3] * 7
    assert ranking._best_allowed._cache_size() == 1
    plain = _plain(model, _catalog(LATER)).recommend([[]] * 4, k=3, sample=Sampling(seed=1))  # control
    assert ranking._best_allowed._cache_size() == 2
    _agree(lists[1], plain)  # spare rows change no draw


def test_beyond_its_room_it_compiles_and_answers_all_the_same(model):
    parts = {"model": model.model, "normalization": model.spec.normalization}
    small = _make(model.spec.model, _catalog(ITEMS), capacity_factor=1.0, **parts)
    updated = small.with_catalog(_catalog(LATER), vectors=RAW[ITEMS:])
    _agree(_answers(updated), _answers(model.with_catalog(_catalog(LATER), vectors=RAW[ITEMS:])))
    again = updated.with_catalog(_catalog(LATER, GONE))
    assert again._capacity == updated._capacity != small._capacity
    for factor in (0.5, float("inf"), float("nan")):
        with pytest.raises(SemidError, match=rf"expected a capacity_factor of 1 or more, and finite, got {factor}"):
            _make(model.spec.model, _catalog(ITEMS), capacity_factor=factor)


def _same(one: Recommender, other: Recommender) -> None:
    """What two recommenders of one model answer from: catalogue, spec, tables and trie."""
    assert (one.catalog.digest, one.spec) == (other.catalog.digest, other.spec)
    for parts in zip(
        *(jax.tree.leaves((m.tables, m._scorer.trie, m._scorer.params)) for m in (one, other)), strict=True
    ):
        np.testing.assert_array_equal(*parts)


def test_an_updated_model_is_written_and_read(model, tmp_path):
    updated = model.with_catalog(_catalog(ITEMS + 2, GONE[:1]), vectors=RAW[ITEMS : ITEMS + 2])
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as folder:
        updated.write(folder)
    loaded = Recommender.from_pretrained(tmp_path / "model")
    _same(loaded, _as_it_is(updated))
    assert loaded.catalog.active.tolist() == [row != GONE[0] for row in range(ITEMS + 2)]
    later = _catalog(LATER, GONE)
    _same(*(_as_it_is(m.with_catalog(later, vectors=RAW[ITEMS + 2 :])) for m in (loaded, updated)))


def test_a_package_that_is_replaced_while_it_is_read_is_refused(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "package")
    other = model.with_model(model.spec.build(seed=99))

    def meanwhile(*args, read=recommender.read_model):
        other.save_pretrained(tmp_path / "package")
        return read(*args)

    monkeypatch.setattr(recommender, "read_model", meanwhile)
    with pytest.raises(SemidError, match="package: was replaced while it was read; load it again"):
        Recommender.from_pretrained(tmp_path / "package")
    loaded = Recommender.from_pretrained(tmp_path / "package")  # control: replaced by its like
    _same(loaded, _as_it_is(other))


def _as_it_is(model: Recommender) -> Recommender:
    """The same with no spare capacity."""
    return Recommender(model.model, model.catalog, spec=model.spec, items=model.items)


def test_a_model_without_its_standardizer_loads_and_says_what_it_lacks(model, tmp_path):
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as folder:
        model.write(folder)
        tensors = artifacts.load_tensors(folder / "items.safetensors")
        old = {name: value for name, value in tensors.items() if not name.startswith("standardizer")}
        artifacts.save_tensors(folder / "items.safetensors", old)
    loaded = Recommender.from_pretrained(tmp_path / "model")
    _same(loaded, _as_it_is(model))
    loaded.with_catalog(_catalog(ITEMS, (2,)))  # removals need no vectors
    with pytest.raises(SemidError, match="without their standardizer, which the vectors of 4 appended items need"):
        loaded.with_catalog(_catalog(LATER), vectors=RAW[ITEMS:])


def _moved(row: int) -> SemanticCatalog:
    codes = CODES.copy()
    codes[row, 2] = (codes[row, 2] + 1) % 3
    return SemanticCatalog(pa.array(IDS), codes, SIZES, True)


@pytest.mark.parametrize(
    ("catalog", "vectors", "message"),
    [
        (
            _catalog(LATER),
            None,
            r"reads 3 dimensions of vectors \(v\) .*expected \[4, 3\] of the appended ones, got none",
        ),
        (_catalog(LATER), RAW, r"expected \[4, 3\] of the appended ones, got \[20, 3\]"),
        (_catalog(LATER), np.full((4, 3), np.nan), "expected finite vectors .*got NaN or infinity in row 0 of 4"),
        (_moved(5), RAW[ITEMS:], r"1 of 16 items have other codes, item i5 <a_\d><b_\d><c_\d> instead of <a_\d>"),
        (
            _catalog(ITEMS - 1),
            None,
            "1 of 16 items are not in it, such as item i15; give a later version of its own, or",
        ),
        (SemanticCatalog(pa.array(IDS[::-1]), CODES, SIZES, True), None, "16 of 16 items have other codes, item i0 "),
        (
            SemanticCatalog(pa.array(IDS), CODES, (5, 4, 3), True),
            None,
            r"levels of \(4, 4, 3\) codes became \(5, 4, 3\)",
        ),
    ],
)
def test_a_catalogue_that_does_not_fit_is_refused(model, catalog, vectors, message):
    with pytest.raises(SemidError, match=message):
        model.with_catalog(catalog, vectors=vectors)
    model.with_catalog(_moved(ITEMS), vectors=RAW[ITEMS:])  # control: a row that it does not know


@pytest.mark.parametrize(
    "config", [DenseConfig(backbone=BACKBONE), RQTransformerConfig(backbone=BACKBONE, id_embedding=True)]
)
def test_a_model_that_knows_items_by_row_does_not_gain_any(config):
    model = _make(config, _catalog(ITEMS), width=0)
    with pytest.raises(SemidError, match="learned a vector of each of its 16 items and has none for the 4 appended"):
        model.with_catalog(_catalog(LATER))
    model.with_catalog(_catalog(ITEMS, (2,)))  # control: it may lose some
    updated = model.with_catalog(_catalog(LATER, (2, *range(ITEMS, LATER))))  # what it does not know is gone again
    assert updated.catalog.digest == _catalog(ITEMS, (2,)).digest


def test_a_dense_model_does_not_recommend_what_is_removed():
    model = _make(DenseConfig(backbone=BACKBONE), _catalog(ITEMS), width=0, capacity_factor=1.0)
    before, programs = _answers(model).item_ids, _programs()
    after = _answers(model.with_catalog(_catalog(ITEMS, (2,)))).item_ids
    assert _programs() == programs
    assert [len(ids) for ids in before] == [ITEMS] * len(HISTORIES)
    assert after == [[item for item in ids if item != "i2"] for ids in before]


def test_a_folder_has_all_that_a_model_needs(model, tmp_path):
    with artifacts.write_artifact(tmp_path / "catalog", kind="catalog", config={}) as folder:
        _catalog(ITEMS).write(folder / CATALOG_FILE)
    folder = tmp_path / "catalog"
    for first, end in ((ITEMS, ITEMS + 3), (ITEMS + 3, LATER)):
        lists = (pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(x[first:end])), 3) for x in (CODES, RAW))
        table = pa.table(dict(zip(("item_id", "codes", "v"), (pa.array(IDS[first:end]), *lists), strict=True)))
        commit(folder, current(folder), ChangeKind.APPEND, table)
    commit(folder, current(folder), ChangeKind.REMOVE, pa.table({"item_id": [IDS[row] for row in GONE]}))
    wanted = model.with_catalog(_catalog(LATER, GONE), vectors=RAW[ITEMS:])
    _same(model.with_version(folder), wanted)
    half = model.with_version(folder, 1)
    assert half.catalog.digest == SemanticCatalog.load(folder, 1).digest
    _same(half.with_version(folder), wanted)  # on from there
    if model.codes is not None:
        assert len(half.codes) == ITEMS + 3


def _append(folder, first: int, kind: ChangeKind = ChangeKind.APPEND, **columns) -> None:
    """One item, with codes and these vectors."""
    lists = {"codes": CODES, **columns}.items()
    table = {name: pa.FixedSizeListArray.from_arrays(pa.array(x[first]), x.shape[1]) for name, x in lists}
    commit(folder, current(folder), kind, pa.table({"item_id": IDS[first : first + 1], **table}))


@pytest.mark.parametrize("written", [False, True])
def test_appended_items_that_were_updated_since_have_their_new_vectors(model, tmp_path, written):
    """Those of training keep theirs: the model learned them."""
    folder = tmp_path / "catalog"
    with artifacts.write_artifact(folder, kind="catalog", config={}) as new:
        _catalog(ITEMS).write(new / CATALOG_FILE)
    for row in (ITEMS, ITEMS + 1):
        _append(folder, row, v=RAW)
    first = model.with_version(folder)
    if written:
        with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as new:
            first.write(new)
        first = Recommender.from_pretrained(tmp_path / "model", capacity_factor=2.0)
    for row in (0, ITEMS):
        _append(folder, row, ChangeKind.UPDATE, v=RAW + 1)
    later = RAW[ITEMS : ITEMS + 2] + np.array([[1], [0]], np.float32)
    expected = model.with_catalog(_catalog(ITEMS + 2), vectors=later)
    np.testing.assert_array_equal(first.with_version(folder).items.features, expected.items.features)
    _append(folder, ITEMS + 2, v=RAW)
    expected = expected.with_catalog(_catalog(ITEMS + 3), vectors=RAW[ITEMS + 2 : ITEMS + 3])
    np.testing.assert_array_equal(first.with_version(folder).items.features, expected.items.features)
    assert first.with_version(folder).spec == expected.spec


def test_vectors_are_those_of_the_version_that_was_read_though_another_comes(model, tmp_path, monkeypatch):
    folder = tmp_path / "catalog"
    with artifacts.write_artifact(folder, kind="catalog", config={}) as new:
        _catalog(ITEMS).write(new / CATALOG_FILE)
    _append(folder, ITEMS, v=RAW)

    def meanwhile(*args, read=recommender.appended_vectors, **options):
        _append(folder, ITEMS, ChangeKind.UPDATE, v=-RAW)
        return read(*args, **options)

    monkeypatch.setattr(recommender, "appended_vectors", meanwhile)
    found = model.with_version(folder)
    monkeypatch.undo()
    first, second = (model.with_version(folder, version).items.features for version in (1, 2))
    np.testing.assert_array_equal(found.items.features, first)
    assert not np.array_equal(first, second)  # control


def test_metrics_go_with_the_version_and_the_vectors_that_were_measured_alone(model, tmp_path, monkeypatch):
    monkeypatch.setattr("semid.recommender.packaging.model_card", lambda **_: "")
    folder = tmp_path / "catalog"
    with artifacts.write_artifact(folder, kind="catalog", config={}) as new:
        _catalog(ITEMS).write(new / CATALOG_FILE)
    _append(folder, ITEMS, v=RAW)
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as new:
        model.with_version(folder).write(new)
        artifacts.write_json(new / "metrics.json", {})
    unchanged = Recommender.from_pretrained(tmp_path / "model", catalog=folder)
    _append(folder, ITEMS, ChangeKind.UPDATE, v=-RAW)
    updated = Recommender.from_pretrained(tmp_path / "model", catalog=folder)
    assert unchanged.catalog.digest == updated.catalog.digest
    for name, one, later in (("a", unchanged, False), ("b", updated, True)):
        one.save_pretrained(tmp_path / name)
        assert one.catalog_updated == later == (not (tmp_path / name / "metrics.json").exists())


def test_a_recommender_does_not_go_back_and_says_what_does(model, tmp_path):
    folder = tmp_path / "catalog"
    with artifacts.write_artifact(folder, kind="catalog", config={}) as new:
        _catalog(ITEMS).write(new / CATALOG_FILE)
    for row in (ITEMS, ITEMS + 1):
        _append(folder, row, v=RAW)
    with pytest.raises(SemidError, match=r"has 1 appended items that the version lacks .* load the model again"):
        model.with_version(folder, 2).with_version(folder, 1)
    assert len(model.with_version(folder, 1).catalog) == ITEMS + 1  # control: from the base
    revert(folder, 1)  # as it says
    assert not model.with_version(folder, 2).with_version(folder).active[-1]


@pytest.mark.parametrize("left_out", [(), (9,)])
def test_a_catalogue_in_another_order_is_followed(model, tmp_path, left_out):
    """The artifact is in another order than the dataset, which may lack an item that was removed since."""
    order = np.random.default_rng(3).permutation(ITEMS)
    with artifacts.write_artifact(tmp_path / "catalog", kind="catalog", config={}) as folder:
        SemanticCatalog(pa.array(IDS[:ITEMS]).take(pa.array(order)), CODES[order], SIZES, True).write(
            folder / CATALOG_FILE
        )
    folder, kept = tmp_path / "catalog", np.delete(np.arange(ITEMS), left_out)
    own = SemanticCatalog.load(folder).select(pa.array(IDS[:ITEMS]).take(pa.array(kept)))
    features, standardizer = model.items.features[kept], model.items.standardizer
    spec = dataclasses.replace(model.spec, num_items=len(kept), catalog=own.digest)
    theirs = Recommender(model.model, own, spec=spec, items=ItemData(COUNTS[kept], features, standardizer))
    if left_out:
        commit(folder, current(folder), ChangeKind.REMOVE, pa.table({"item_id": [IDS[9]]}))
    else:
        _same(theirs.with_version(folder), theirs)
    _append(folder, ITEMS, v=RAW)
    commit(folder, current(folder), ChangeKind.REMOVE, pa.table({"item_id": ["i2"]}))
    assert SemanticCatalog.load(folder).select(own.item_ids).digest == own.digest  # training again finds what it found
    updated = theirs.with_version(folder)
    gone, (new,) = updated.catalog.rows(["i2", *(IDS[row] for row in left_out)]), updated.catalog.rows([IDS[ITEMS]])
    assert updated.item_ids[: len(kept)].equals(own.item_ids)
    np.testing.assert_array_equal(np.flatnonzero(~updated.catalog.active), np.sort(gone))
    np.testing.assert_array_equal(updated.codes, CODES[[int(name[1:]) for name in updated.item_ids.to_pylist()]])
    np.testing.assert_array_equal(updated.items.features[: len(kept)], features)
    np.testing.assert_array_equal(updated.items.features[new], standardizer(RAW[ITEMS : ITEMS + 1])[0])
    assert updated.scorer.trie.num_items == ITEMS + 1
    half = SemanticCatalog.load(folder, 0).arranged(own.item_ids)
    assert half.arranged(half.item_ids) is half


def test_an_item_without_the_vectors_that_a_model_reads_can_be_mended(model, tmp_path):
    with artifacts.write_artifact(tmp_path / "catalog", kind="catalog", config={}) as folder:
        _catalog(ITEMS).write(folder / CATALOG_FILE)
    folder = tmp_path / "catalog"
    _append(folder, ITEMS, w=RAW)
    with pytest.raises(
        SemidError, match="item i16 has no vectors 'v', which the model reads; append it with that column"
    ):
        model.with_version(folder)
    commit(folder, current(folder), ChangeKind.REMOVE, pa.table({"item_id": [IDS[ITEMS]]}))
    gone = model.with_catalog(_catalog(ITEMS + 1, (ITEMS,)), vectors=np.zeros((1, WIDTH), np.float32))
    _same(model.with_version(folder), gone)
    columns = {"columns": ("w2", "v")}  # of which the item has the first
    one, other = (
        Recommender(m.model, m.catalog, spec=dataclasses.replace(m.spec, **columns), items=m.items)
        for m in (model, gone)
    )
    _append(folder, ITEMS, w2=RAW[:, :2])
    commit(folder, current(folder), ChangeKind.REMOVE, pa.table({"item_id": [IDS[ITEMS]]}))
    _same(one.with_version(folder), other)
    _append(folder, ITEMS, v=RAW)
    _same(model.with_version(folder), model.with_catalog(_catalog(ITEMS + 1), vectors=RAW[ITEMS : ITEMS + 1]))


def test_tables_on_the_device_have_room(model):
    rows = jax.tree.map(len, model.tables)
    assert set(jax.tree.leaves(rows)) == {2 * ITEMS}
