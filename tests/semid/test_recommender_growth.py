"""A trained model on later versions of its catalogue: as if it were built for them, in the programs that it has."""

import jax
import numpy as np
import pyarrow as pa
import pytest

from semid import artifacts, catalog_log, scorers
from semid.catalog import FILE, SemanticCatalog
from semid.catalog_log import Kind, commit, current
from semid.data.features import Standardizer
from semid.data.histories import Histories
from semid.errors import SemidError
from semid.models import ModelSpec, build_model
from semid.recommender import Recommender
from seq_models import (
    DenseConfig,
    FlatDecoderConfig,
    HybridConfig,
    Normalization,
    RQTransformerConfig,
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
HISTORIES = [["i1", "i2", "i3"], ["i7"], [], ["i17", "i5", "i16"], ["i2"]]
MODELS = {
    "rq": (RQTransformerConfig(backbone=BACKBONE), Normalization.VOCABULARY),
    "children": (FlatDecoderConfig(backbone=BACKBONE), Normalization.CHILDREN),
    "hybrid": (HybridConfig(backbone=BACKBONE), Normalization.VOCABULARY),
}


def _catalog(items: int, removed=()) -> SemanticCatalog:
    marks = np.isin(np.arange(items), removed)
    return SemanticCatalog(pa.array(IDS[:items]), CODES[:items], SIZES, True, marks)


def _make(
    config, catalog: SemanticCatalog, *, width: int = WIDTH, model=None, digest: str = "", **options
) -> Recommender:
    """A recommender of a catalogue whose first 16 items training has seen."""
    spec = ModelSpec(config, SIZES, len(catalog), width, max_history=4, catalog=digest, columns=("v",) if width else ())
    spec = ModelSpec(**vars(spec) | {"normalization": options.pop("normalization", Normalization.VOCABULARY)})
    standardizer = Standardizer.fit([RAW[:ITEMS]]) if width else None
    return Recommender(
        build_model(spec, seed=5) if model is None else model,
        catalog,
        spec=spec,
        features=standardizer(RAW[: len(catalog)]) if width else None,
        train_counts=np.pad(COUNTS, (0, len(catalog) - ITEMS)),
        **{"standardizer": standardizer} | options,
    )


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Recommender:
    config, normalization = MODELS[request.param]
    return _make(config, _catalog(ITEMS), room=2.0, normalization=normalization, digest=_catalog(ITEMS).digest)


def _plain(model: Recommender, catalog: SemanticCatalog) -> Recommender:
    """The same model built for that catalogue, with no room."""
    return _make(model.spec.model, catalog, model=model.model, normalization=model.spec.normalization)


def _answers(model: Recommender, k: int, **options):
    return model.recommend(HISTORIES, k=k, beam_size=BEAM, **options)


def _agree(one, other) -> None:
    assert one.item_ids == other.item_ids
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_a_later_version_is_answered_as_by_a_model_built_for_it(model):
    later = _catalog(LATER, GONE)
    grown, plain = model.with_catalog(later, vectors=RAW[ITEMS:]), _plain(model, later)
    allowed = np.random.default_rng(0).random((len(HISTORIES), LATER)) < 0.5
    for options in ({}, {"exclude_seen": True}, {"allowed": allowed}, {"allowed": allowed, "exclude_seen": True}):
        _agree(_answers(grown, LATER, **options), _answers(plain, LATER, **options))
    rows = Histories.from_lists([[1, 2], [17], []])
    np.testing.assert_allclose(grown.catalog_log_probs(rows), plain.catalog_log_probs(rows), atol=1e-5)
    np.testing.assert_allclose(grown.score(HISTORIES, IDS), plain.score(HISTORIES, IDS), atol=1e-5)
    assert (len(grown.spec.columns), grown.spec.num_items, grown.spec.catalog) == (1, LATER, later.digest)
    known = [history for history in HISTORIES if "i17" not in history]  # and the old one goes on as it was
    _agree(
        model.recommend(known, k=ITEMS, beam_size=BEAM),
        _plain(model, _catalog(ITEMS)).recommend(known, k=ITEMS, beam_size=BEAM),
    )


def test_what_is_removed_is_not_recommended_and_what_is_left_all_is(model):
    grown = model.with_catalog(_catalog(LATER, GONE), vectors=RAW[ITEMS:])
    left = sorted(set(IDS) - {"i2", "i17"})
    for top in (_answers(grown, LATER), _answers(grown, LATER, allowed=grown.allow(IDS))):
        assert [sorted(ids) for ids in top.item_ids] == [left] * len(HISTORIES)
    assert _answers(grown, 5, allowed=grown.allow(["i2", "i17"])).item_ids == [[]] * len(HISTORIES)
    assert "i2" in _answers(model.with_catalog(_catalog(LATER), vectors=RAW[ITEMS:]), LATER).item_ids[0]  # control
    # a history that holds a removed item is read: another one is answered otherwise
    one, other = grown.score([["i5", "i2"], ["i5", "i4"]], left)
    assert np.abs(one - other).max() > 1e-3
    gone = grown.catalog_log_probs(Histories.from_lists([[1], []]))[:, GONE]
    np.testing.assert_array_equal(gone, -np.inf)


def _programs() -> int:
    jitted = (scorers._search, scorers._code_log_probs, scorers._ranked_union, scorers._dense_log_probs)
    return sum(one._cache_size() for one in jitted)


def test_an_appended_item_is_reached_at_once_without_compiling(model):
    cold = "i18"
    for versions in range(2):  # the first time compiles what the shapes of these questions need
        current_model = model
        for items, gone in [(ITEMS, ()), (ITEMS + 1, (3,)), (LATER, (2, 3)), (LATER, ())]:
            before = _programs()
            current_model = current_model.with_catalog(
                _catalog(items, gone), vectors=RAW[current_model.spec.num_items : items]
            )
            _answers(current_model, 4)
            _answers(current_model, 4, allowed=np.ones(items, bool))
            _answers(current_model, 4, exclude_seen=True, allowed=np.ones(items, bool))
            current_model.score(HISTORIES[:2], ["i5"])
            if versions or items > ITEMS:
                assert _programs() == before
        top = _answers(current_model, 4, allowed=current_model.allow([cold]))
        assert top.item_ids == [[cold]] * len(HISTORIES)
    before = _programs()
    plain = _plain(model, _catalog(LATER))  # control: without room another number of items is another program
    _answers(plain, 4)
    assert _programs() > before


def test_beyond_its_room_it_compiles_and_answers_all_the_same(model):
    small = _make(
        model.spec.model, _catalog(ITEMS), model=model.model, normalization=model.spec.normalization, room=1.0
    )
    grown = small.with_catalog(_catalog(LATER), vectors=RAW[ITEMS:])
    _agree(_answers(grown, 6), _answers(_plain(model, _catalog(LATER)), 6))
    again = grown.with_catalog(_catalog(LATER, GONE))
    assert again._capacity == grown._capacity != small._capacity
    with pytest.raises(SemidError, match=r"expected room for at least 1 times the catalogue's items, got 0\.5"):
        _make(model.spec.model, _catalog(ITEMS), room=0.5)


def test_a_grown_model_is_written_and_read(model, tmp_path):
    grown = model.with_catalog(_catalog(ITEMS + 2, GONE), vectors=RAW[ITEMS : ITEMS + 2])
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as folder:
        grown.write(folder)
    loaded = Recommender.from_pretrained(tmp_path / "model", room=2.0)
    _agree(_answers(loaded, 6), _answers(grown, 6))
    later = _catalog(LATER, GONE)
    _agree(*(_answers(m.with_catalog(later, vectors=RAW[ITEMS + 2 :]), 6) for m in (loaded, grown)))


def test_a_model_without_its_standardizer_loads_and_says_what_it_lacks(model, tmp_path):
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}) as folder:
        model.write(folder)
        tensors = artifacts.load_tensors(folder / "items.safetensors")
        old = {name: value for name, value in tensors.items() if not name.startswith("standardizer")}
        artifacts.save_tensors(folder / "items.safetensors", old)
    loaded = Recommender.from_pretrained(tmp_path / "model")
    known = [["i1"], ["i2", "i5"]]
    _agree(*(m.recommend(known, k=4, beam_size=BEAM) for m in (loaded, model)))
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
        (_catalog(ITEMS - 1), None, "its 16 items became 15; give a later version of its own, or train again"),
        (SemanticCatalog(pa.array(IDS[::-1]), CODES, SIZES, True), None, r"item i0 \(row 0\) became i19"),
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
def test_a_model_that_knows_items_by_row_loses_but_does_not_gain(config):
    model = _make(config, _catalog(ITEMS), width=0)
    with pytest.raises(SemidError, match="learned a vector of each of its 16 items and has none for the 4 appended"):
        model.with_catalog(_catalog(LATER))
    before = model.recommend([["i2", "i1"], []], k=ITEMS, beam_size=BEAM)
    after = model.with_catalog(_catalog(ITEMS, (2,))).recommend([["i2", "i1"], []], k=ITEMS, beam_size=BEAM)
    assert [len(ids) for ids in before.item_ids] == [ITEMS] * 2
    assert after.item_ids == [[item for item in ids if item != "i2"] for ids in before.item_ids]


def test_a_folder_has_all_that_a_model_needs(model, tmp_path):
    with artifacts.write_artifact(tmp_path / "catalog", kind="catalog", config={}) as folder:
        _catalog(ITEMS).write(folder / FILE)
    folder = tmp_path / "catalog"
    for first, end in ((ITEMS, ITEMS + 3), (ITEMS + 3, LATER)):
        lists = (pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(x[first:end])), 3) for x in (CODES, RAW))
        table = pa.table(dict(zip(("item_id", "codes", "v"), (pa.array(IDS[first:end]), *lists), strict=True)))
        commit(folder, current(folder), Kind.APPEND, table)
    commit(folder, current(folder), Kind.REMOVE, pa.table({"item_id": [IDS[row] for row in GONE]}))
    wanted = model.with_catalog(_catalog(LATER, GONE), vectors=RAW[ITEMS:])
    _agree(_answers(model.with_version(folder), 6), _answers(wanted, 6))
    half = model.with_version(folder, 1)
    assert half.catalog.digest == catalog_log.read(folder, 1).digest
    _agree(_answers(half.with_version(folder), 6), _answers(wanted, 6))  # on from there
    if model.codes is not None:
        assert len(half.codes) == ITEMS + 3


def test_tables_on_the_device_have_room(model):
    rows = jax.tree.map(len, model.tables)
    assert set(jax.tree.leaves(rows)) == {2 * ITEMS}
