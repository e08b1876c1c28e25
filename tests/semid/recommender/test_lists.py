"""Lists with at most so many items of a group, drawn or by popularity, by names and against loops over all items."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import shapes

from semid.catalog import SemanticCatalog
from semid.data import Dataset, Tags
from semid.errors import SemidError
from semid.evaluation import evaluate
from semid.recommender import ItemData, ModelSpec, Recommender, Sampling, ranking
from seq_models import DenseConfig, HybridConfig, RQTransformerConfig, TransformerConfig

ITEMS, K = 24, 8
IDS = [f"i{row}" for row in range(ITEMS)]
BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
MODELS = {
    "codes": (RQTransformerConfig(backbone=BACKBONE), 0),
    "hybrid": (HybridConfig(backbone=BACKBONE), 3),
    "dense": (DenseConfig(backbone=BACKBONE), 0),
}
BRANDS = [f"b{row % 5}" if row % 7 else None for row in range(ITEMS)]
CATEGORIES = [["All", f"c{row % 3}", f"d{row % 4}"] for row in range(ITEMS)]
TABLE = pa.table({"item_id": IDS[::-1], "brand": BRANDS[::-1], "categories": CATEGORIES[::-1]})
HISTORIES = [["i1", "i5"], [], ["i9"], ["i3", "i2", "i7"], []]


def catalog(items: int = ITEMS) -> SemanticCatalog:
    chosen = np.random.default_rng(0).permutation(48)[:items]
    codes = np.stack(np.unravel_index(chosen, (4, 4, 3)), axis=1).astype(np.int32)
    return SemanticCatalog(pa.array([f"i{row}" for row in range(items)]), codes, (5, 4, 3), tie_break=True)


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Recommender:
    config, width = MODELS[request.param]
    spec = ModelSpec(config, (5, 4, 3), num_items=ITEMS, num_features=width, max_history=4)
    rng = np.random.default_rng(1)
    features = rng.normal(size=(ITEMS, width)).astype(np.float32) if width else None
    counts = rng.permutation(ITEMS).astype(np.int32)
    made = Recommender(spec.build(seed=5), catalog(), spec=spec, items=ItemData(counts, features))
    return made.with_groups(TABLE, "brand", "categories")


def greedy(order: list[str], at_most: dict[str, int]) -> list[str]:
    chosen, used = [], {}
    groups = {"brand": lambda row: [BRANDS[row]] if BRANDS[row] else [], "categories": lambda row: CATEGORIES[row][1:]}
    for item in order:
        own = [(column, group) for column in at_most for group in groups[column](int(item[1:]))]
        if all(used.get(one, 0) < at_most[one[0]] for one in own):
            chosen.append(item)
            used |= {one: used.get(one, 0) + 1 for one in own}
    return chosen[:K]


@pytest.mark.parametrize("at_most", [{"brand": 1}, {"brand": 2, "categories": 3}], ids=str)
def test_lists_hold_at_most_so_many_of_a_group(model, at_most):
    whole = model.recommend(HISTORIES, k=ITEMS, exclude_seen=True)
    found = model.recommend(HISTORIES, k=K, exclude_seen=True, at_most=at_most)
    for ids, scores, every, all_scores in zip(found.item_ids, found.scores, whole.item_ids, whole.scores, strict=True):
        expected = greedy(every, at_most)
        assert ids == expected != every[: len(expected)]
        np.testing.assert_allclose(scores[: len(ids)], [all_scores[every.index(item)] for item in ids], atol=1e-5)
    limits = {column: np.int64(limit) for column, limit in at_most.items()}
    with shapes.unchecked():  # numbers of numpy will do
        shorter = model.recommend(HISTORIES, k=K - 3, exclude_seen=True, at_most=limits)
    assert shorter.item_ids == [ids[: K - 3] for ids in found.item_ids]
    np.testing.assert_array_equal(shorter.scores, found.scores[:, : K - 3])
    assert model.recommend(HISTORIES, k=K, at_most={}).item_ids == model.recommend(HISTORIES, k=K).item_ids


def test_draws_are_by_seed_and_history_and_near_zero_the_best(model):
    plain = model.recommend(HISTORIES, k=K, exclude_seen=True)
    near = model.recommend(HISTORIES, k=K, exclude_seen=True, sample=Sampling(temperature=1e-4))
    assert near.item_ids == plain.item_ids
    draws = [model.recommend(HISTORIES, k=K, exclude_seen=True, sample=Sampling(seed=s)).item_ids for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    shorter = model.recommend(HISTORIES, k=K - 3, exclude_seen=True, sample=Sampling(seed=0)).item_ids
    assert shorter == [ids[: K - 3] for ids in draws[0]]
    assert draws[0][1] != draws[0][4]  # two users without history
    first = model.recommend(HISTORIES[:3], k=K, exclude_seen=True, sample=Sampling(seed=0)).item_ids
    assert first == draws[0][:3]  # whoever else asks
    for ids, history in zip(draws[0], HISTORIES, strict=True):
        assert len(set(ids)) == K
        assert not set(ids) & set(history)
    both = model.recommend(HISTORIES, k=K, sample=Sampling(seed=2), at_most={"brand": 1}).item_ids
    brands = [[BRANDS[int(item[1:])] for item in ids if BRANDS[int(item[1:])]] for ids in both]
    assert all(len(set(own)) == len(own) for own in brands)


def test_first_items_are_drawn_in_proportion_to_their_probabilities(model):
    """Of users with one history, and of users with none: frequencies within five standard deviations."""
    n = 3000
    for history, scores in ((["i9"], model.score([["i9"]], IDS)[0]), ([], model.score([[]], IDS)[0])):
        lists = model.recommend([history] * n, k=1, sample=Sampling(seed=7)).item_ids
        weights = np.exp(scores.astype(np.float64))
        p, counts = weights / weights.sum(), np.bincount([int(ids[0][1:]) for ids in lists], minlength=ITEMS)
        np.testing.assert_array_less(np.abs(counts / n - p), 5 * np.sqrt(p / n) + 1e-3)
        assert np.abs(counts / n - 1 / ITEMS).max() > 0.03  # control


def test_a_later_catalogue_keeps_the_groups_of_its_items(caplog):
    config, _ = MODELS["codes"]
    spec = ModelSpec(config, (5, 4, 3), num_items=ITEMS, num_features=0, max_history=4)
    made = Recommender(spec.build(seed=5), catalog(), spec=spec, items=ItemData(np.ones(ITEMS, np.int32)))
    later = made.with_groups(TABLE, "brand").with_catalog(catalog(ITEMS + 4))
    assert not caplog.messages
    later.with_groups(TABLE, "brand")
    assert caplog.messages == ["groups: the table lacks 4 of 28 items, which at_most does not limit"]
    listed = later.recommend([["i1"]], k=ITEMS + 4, at_most={"brand": 1}).item_ids[0]
    brands = [BRANDS[int(item[1:])] for item in listed if int(item[1:]) < ITEMS]
    assert sorted(brand for brand in brands if brand) == sorted({brand for brand in BRANDS if brand})
    assert {f"i{row}" for row in range(ITEMS, ITEMS + 4)} <= set(listed)  # new ones are in no group


def test_lists_of_both_kinds_can_be_evaluated(model):
    interactions = {"user_id": ["u", "u", "u", "v", "v", "v"], "item_id": ["i1", "i5", "i2", "i3", "i9", "i7"]}
    dataset = Dataset.build(
        pa.table({"item_id": IDS}), pa.table({**interactions, "position": range(6)}), name="two users"
    )
    options = {"at_most": {"brand": 1}, "sample": Sampling(temperature=0.5)}
    found = evaluate(model, dataset, ks=(5,), **options)
    assert found.provenance["options"] == {name: str(value) for name, value in options.items()}
    histories = dataset.splits.test.histories
    np.testing.assert_array_equal(found.ranked, model.rank(histories, k=5, exclude_seen=False, **options))


def test_groups_of_all_items_are_placed_once(model, monkeypatch):
    calls, padded = [], Tags.padded
    monkeypatch.setattr(Tags, "padded", lambda tags: calls.append(tags.column) or padded(tags))
    fresh = model.with_groups(TABLE, "brand", "categories")
    for at_most in ({"brand": 1}, {"brand": 2}, {"brand": 1, "categories": 3}):
        limits = [one._limits(at_most) for one in (fresh, fresh.with_model(fresh.model))]
        assert [of.most[0] for of in limits] == [at_most["brand"]] * 2
    assert calls == ["brand", "brand", "categories"]
    other = pa.table({"item_id": TABLE["item_id"], "brand": TABLE["brand"][::-1]})
    again = fresh.with_groups(other, "brand")._limits({"brand": 1})
    assert not np.array_equal(again.groups, fresh._limits({"brand": 1}).groups)


def test_what_cannot_be_is_said(model):
    with pytest.raises(SemidError, match=r"groups of the items by 'color', and it has those of brand, categories"):
        model.recommend([["i1"]], at_most={"color": 2})
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(SemidError, match="expected at least 1 item of a brand"):
            model.recommend([["i1"]], at_most={"brand": wrong})
    with pytest.raises(SemidError, match=r"no column 'brnd' among .* did you mean 'brand'"):
        model.with_groups(TABLE, "brnd")
    with pytest.raises(SemidError, match="has none of the model's"):
        model.with_groups(TABLE.set_column(0, "item_id", pa.array([f"x{row}" for row in range(ITEMS)])), "brand")
    with pytest.raises(SemidError, match=r"item id 'i23' is given twice, in rows 1 and 25 of the items; keep one row"):
        model.with_groups(pa.concat_tables([TABLE, TABLE.slice(0, 1)]), "brand")
    with pytest.raises(SemidError, match="the items' column 'brand' occurs more than once; rename or drop one"):
        model.with_groups(TABLE.append_column("brand", TABLE["brand"]), "brand")
    for wrong in (0.0, float("nan"), float("inf")):
        with pytest.raises(SemidError, match="expected a temperature above 0"):
            Sampling(temperature=wrong)
    for wrong in (-1, 1.5):
        with pytest.raises(SemidError, match="expected a seed from 0"):
            Sampling(seed=wrong)


@pytest.mark.parametrize("k", [1, 4, ITEMS, ITEMS + 3])
def test_the_best_by_popularity_are_those_of_a_stable_sort(k):
    scores = np.random.default_rng(0).integers(0, 4, (20, ITEMS)).astype(np.float32)  # many ties
    scores[:3] = scores[3:6, 2:] = -np.inf
    rows, values = ranking._best(scores, k, None, None, None, padded=scores.shape)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(scores, order, axis=1)
    np.testing.assert_array_equal(rows[:, :ITEMS], np.where(np.isneginf(expected), -1, order))
    np.testing.assert_array_equal(values[:, :ITEMS], expected)
    assert (rows[:, ITEMS:] == -1).all()
    assert np.isneginf(values[:, ITEMS:]).all()


def test_requests_share_the_popularity_of_the_catalogue_and_boosts_do_not_change_it(model):
    before = model._ranking(None).popularity.log_shares.copy()
    boosted, plain = model.recommend([[]], k=K, boosts={"i3": 1e9}), model.recommend([[]], k=K)
    assert boosted.item_ids[0][0] == "i3" != plain.item_ids[0][0]
    assert model._ranking(None).popularity is model._ranking(None).popularity
    np.testing.assert_array_equal(model._ranking(None).popularity.log_shares, before)
    removed = np.arange(ITEMS) == int(before.argmax())
    later = model.with_catalog(dataclasses.replace(model.catalog, removed=removed))
    np.testing.assert_array_equal(np.isneginf(later._ranking(None).popularity.log_shares), removed)
    assert later.recommend([[]], k=1).item_ids[0] == plain.item_ids[0][1:2]
