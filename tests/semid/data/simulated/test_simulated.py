from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from simulated_by_hand import components, history_of, other_variants

from semid import config as configs
from semid.data import Dataset, Examples, GlobalTime, HeldOutItems, Histories
from semid.data.simulated import SimulatedConfig, simulate
from semid.data.simulated import world as simulated
from semid.data.simulated.config import Mixture
from semid.data.simulated.world import draw_next
from semid.errors import SemidError

TINY = SimulatedConfig(num_items=60, num_users=600, taxonomy=(2, 2, 2), max_length=20, images=False, seed=3)


@pytest.fixture(scope="module")
def tiny():
    return simulate(TINY)


def _recall(ranked, targets):
    return (ranked == targets[:, None]).any(axis=1).mean()


def _all_examples(dataset):
    """Every interaction as the target of what its user did before, the first ones included."""
    at = np.arange(len(dataset.item))
    return Examples(Histories(dataset.user, dataset.item, dataset.offsets[dataset.user], at), dataset.item)


def test_same_config_gives_the_same_dataset_and_another_seed_another(tiny):
    again = simulate(configs.from_dict(SimulatedConfig, tiny.dataset.source["config"])).dataset
    assert again.items.equals(tiny.dataset.items)
    for name in ("user", "item", "time"):
        np.testing.assert_array_equal(getattr(again, name), getattr(tiny.dataset, name))
    other = simulate(dataclasses.replace(TINY, seed=4)).dataset
    assert not other.items.equals(tiny.dataset.items)
    assert len(other.item) != len(tiny.dataset.item) or (other.item != tiny.dataset.item).any()


def test_images_are_the_same_bytes_each_time_and_change_no_interaction(tiny):
    first, second = (simulate(dataclasses.replace(TINY, images=True)).dataset for _ in range(2))
    assert first.items["image"].equals(second.items["image"])
    np.testing.assert_array_equal(first.item, tiny.dataset.item)


def test_sizes_are_as_asked(tiny):
    dataset = tiny.dataset
    lengths = np.diff(dataset.offsets)
    assert (dataset.num_items, dataset.num_users) == (60, 600)
    assert (lengths.min(), lengths.max()) == (5, 20)
    assert abs(lengths.mean() - 10) < 0.7  # the cap at 20 costs half an interaction
    assert dataset.vectors("content").shape == (60, 32)


def test_the_dataset_is_what_build_makes_of_the_same_tables(tiny):
    dataset = tiny.dataset
    ids = {
        "user_id": dataset.users.take(pa.array(dataset.user)),
        "item_id": dataset.item_ids.take(pa.array(dataset.item)),
    }
    shuffled = pa.table({**ids, "timestamp": dataset.time}).take(
        np.random.default_rng(0).permutation(len(dataset.item))
    )
    built = Dataset.build(dataset.items, shuffled.sort_by("user_id"), name="simulated")
    for name in ("user", "item", "time"):
        np.testing.assert_array_equal(getattr(built, name), getattr(dataset, name))


def test_probabilities_sum_to_one_and_are_zero_on_seen_and_unreleased_items(tiny):
    dataset, oracle = tiny
    examples = _all_examples(dataset)
    p = oracle.probabilities(examples.histories)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)
    seen, owner = examples.histories.flat()
    unreleased = oracle.world.release > dataset.time[:, None]
    assert unreleased.any()
    assert not p[owner, seen].any()
    assert not p[unreleased].any()
    possible = ~unreleased
    possible[owner, seen] = False
    assert (p[possible] > 0).all()  # popularity reaches every item that is there
    assert (p[np.arange(len(examples)), examples.targets] > 0).all()


def test_probabilities_are_the_mixture_written_out_item_by_item(tiny):
    offered = []
    for user, step in ((0, 0), (2, 1), (3, 2), (1, 3), (5, 4)):
        expected = components(tiny, user, step).sum(axis=0)
        found = tiny.oracle.probabilities(history_of(tiny, user, step))[0]
        np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-12)
        recent = history_of(tiny, user, step)[0][:-4:-1]
        offered += [len(other_variants(tiny.oracle.world, item)) > 0 for item in recent]
    assert len(offered) == 9
    assert 0 < sum(offered) < 9  # some recent items have other variants, some have none


@pytest.mark.parametrize("rounds", [32, 1, 0], ids=["rejection", "both", "dense"])
def test_draws_follow_the_oracle(tiny, monkeypatch, rounds):
    """Pearson's chi-square of 20,000 draws for one user, and the control: the next user's distribution fails."""
    monkeypatch.setattr(simulated, "REJECTION_ROUNDS", rounds)
    dataset, oracle = tiny
    user, draws = 7, 20_000
    rows = dataset.item[dataset.offsets[user] :][:4]
    drawn = draw_next(
        oracle.world,
        oracle.people,
        users=np.full(draws, user),
        seen=np.tile(rows, (draws, 1)),
        rng=np.random.default_rng(0),
    )
    users = np.array([user, user + 1], np.int32)
    right, wrong = oracle.probabilities(Histories(users, rows, np.array([0, 0]), np.array([4, 4])))
    assert _chi_square(drawn, right) < 5
    assert _chi_square(drawn, wrong) > 50


def _chi_square(drawn, p):
    """Pearson's statistic in deviations above its mean; rare items are pooled, an impossible one makes it infinite."""
    expected, observed = p * len(drawn), np.bincount(drawn, minlength=len(p))
    if observed[p == 0].any():
        return np.inf
    rare = expected < 20
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    observed = np.append(observed[~rare], observed[rare].sum())
    freedom = len(expected) - 1
    return (((observed - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_the_walk_follows_the_oracle_at_every_step(tiny):
    """The surprise of all interactions is the entropy that the oracle claims; with users shifted by one it is not."""
    examples = _all_examples(tiny.dataset)
    histories = examples.histories
    shifted = dataclasses.replace(histories, users=(histories.users + 1) % TINY.num_users)
    assert abs(_excess_surprise(tiny.oracle.probabilities(histories), examples.targets)) < 5
    assert _excess_surprise(tiny.oracle.probabilities(shifted), examples.targets) > 50


def _excess_surprise(p, targets):
    """Sum of -log p(target) minus its expectation under p, in standard deviations."""
    surprise = -np.log(np.maximum(p, 1e-6))
    mean = (p * surprise).sum(axis=1)
    variance = (p * surprise**2).sum(axis=1) - mean**2
    return (surprise[np.arange(len(p)), targets] - mean).sum() / np.sqrt(variance.sum())


def test_families_are_geometric_runs_of_a_cell():
    large = dataclasses.replace(TINY, num_items=6_000)
    world = simulate(large).oracle.world
    families = slice(large.num_cells, None)
    sizes = (world.stop - world.start)[families]
    assert sizes.sum() == 6_000
    assert abs(sizes.mean() - large.family_size) < 0.1
    assert abs((sizes == 1).mean() - 1 / large.family_size) < 0.03
    first, last = world.row_of_slot[world.start[families]], world.row_of_slot[world.stop[families] - 1]
    np.testing.assert_array_equal(world.cell[first], world.cell[last])
    np.testing.assert_array_equal(np.bincount(world.family)[families], sizes)


def test_variants_are_taken_in_turn(tiny):
    """The next item is another variant far more often than where the component is off."""
    off = simulate(dataclasses.replace(TINY, mixture=dataclasses.replace(TINY.mixture, variant=0.0)))
    np.testing.assert_array_equal(off.oracle.world.family, tiny.oracle.world.family)
    assert _in_turn(tiny) > 2 * _in_turn(off) > 0


def _in_turn(simulation):
    dataset, family = simulation.dataset, simulation.oracle.world.family[simulation.dataset.item]
    return (family[1:] == family[:-1])[dataset.user[1:] == dataset.user[:-1]].mean()


def test_a_world_without_variants_is_the_one_whose_mixture_has_none(tiny):
    alone = dataclasses.replace(TINY, family_size=1.0)
    dataset, oracle = simulate(alone)
    assert len(set(oracle.world.family)) == 60
    assert not any("shade" in title for title in dataset.items["title"].to_pylist())
    assert any("shade" in title for title in tiny.dataset.items["title"].to_pylist())
    off = simulate(dataclasses.replace(alone, mixture=dataclasses.replace(TINY.mixture, variant=0.0)))
    examples = dataset.splits.test
    p, q = (world.probabilities(examples.histories) for world in (oracle, off.oracle))
    np.testing.assert_allclose(p, q, rtol=1e-12)


def test_content_of_variants_is_nearly_the_same():
    dataset, oracle = simulate(dataclasses.replace(TINY, num_users=5, images=True))
    family, cell = oracle.world.family, oracle.world.cell
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in dataset.items["image"].to_pylist()]
    for vectors in (dataset.vectors("content"), np.array(pixels, float).reshape(60, -1)):
        distance = np.abs(vectors[:, None] - vectors[None]).mean(axis=-1)
        variant = (family[:, None] == family[None]) & ~np.eye(60, dtype=bool)
        other = (cell[:, None] == cell[None]) & (family[:, None] != family[None])
        assert 0 < distance[variant].mean() < 0.5 * distance[other].mean()
    titles = dataset.items["title"].to_pylist()
    assert len(set(titles)) == 60
    assert len({title.split(", shade ")[0] for title in titles}) == len(set(family))
    for number in set(family):
        members = [titles[row] for row in np.flatnonzero(family == number)]
        endings = [f", shade {shade + 1}" for shade in range(len(members))] if len(members) > 1 else [""]
        assert members == [members[0].split(", shade ")[0] + ending for ending in endings]


def test_the_oracle_beats_popularity_and_bigram(tiny):
    dataset, oracle = tiny
    test, train = dataset.splits.test, dataset.splits.train
    items, owner = train.flat()
    counts = np.bincount(items, minlength=60).astype(float)
    pairs = np.zeros((60, 60))
    same = owner[1:] == owner[:-1]
    np.add.at(pairs, (items[:-1][same], items[1:][same]), 1)
    last = test.histories.items[test.histories.ends - 1]
    seen, of = test.histories.flat()
    recalls = []
    for scores in (np.tile(counts, (len(test), 1)), pairs[last] + 1e-6 * counts):
        scores[of, seen] = -1
        recalls.append(_recall(np.argsort(-scores, axis=1)[:, :5], test.targets))
    best = _recall(oracle.rank(test.histories, k=5, exclude_seen=True), test.targets)
    assert best > 1.2 * recalls[1] > 1.2 * recalls[0]


def test_rank_orders_by_probability_and_marks_what_cannot_come(tiny, monkeypatch):
    histories = tiny.dataset.splits.test.histories.take(slice(0, 20))
    p = tiny.oracle.probabilities(histories)
    ranked = tiny.oracle.rank(histories, k=60, exclude_seen=False)
    for row, probability in zip(ranked, p, strict=True):
        possible = row[row >= 0]
        assert set(possible) == set(np.flatnonzero(probability))
        assert (np.diff(probability[possible]) <= 0).all()
        assert (row[len(possible) :] == -1).all()
    np.testing.assert_array_equal(tiny.oracle.rank(histories, k=5, exclude_seen=True), ranked[:, :5])
    np.testing.assert_array_equal(tiny.oracle.rank(histories, k=70, exclude_seen=True)[:, :60], ranked)
    monkeypatch.setattr("semid.data.simulated.oracle.DENSE_ENTRIES", 60)  # a row at a time
    np.testing.assert_array_equal(tiny.oracle.rank(histories, k=60, exclude_seen=True), ranked)


def test_the_oracle_refuses_users_and_items_of_elsewhere(tiny):
    with pytest.raises(SemidError, match=r"users 0 to 599 .* got -1"):
        tiny.oracle.rank(Histories.from_lists([[1, 2]]), k=5, exclude_seen=False)
    known = dataclasses.replace(Histories.from_lists([[1, 2]]), users=np.array([0], np.int32))
    assert tiny.oracle.rank(known, k=5, exclude_seen=False).shape == (1, 5)
    with pytest.raises(SemidError, match="item rows 0 to 59, got 1 to 60"):
        tiny.oracle.rank(dataclasses.replace(known, items=np.array([1, 60], np.int32)), k=5, exclude_seen=False)


def test_late_items_exist_and_come_after_their_release_only(tiny):
    dataset, release = tiny.dataset, tiny.oracle.world.release
    late = release > simulated.START
    assert late.sum() == TINY.num_late == 12
    assert (dataset.time >= release[dataset.item]).all()
    counts = np.bincount(dataset.splits.train.flat()[0], minlength=60)
    assert late[dataset.item].any()
    assert counts[late].mean() < 0.7 * counts[~late].mean()


def test_nobody_has_an_item_twice_and_no_times_tie(tiny):
    statistics = tiny.dataset.statistics()
    assert statistics["repeated (user, item)"] == 0
    assert statistics["same time as the one before"] == 0
    assert (np.diff(tiny.dataset.time)[np.diff(tiny.dataset.user) == 0] > 0).all()


def test_every_split_rule_works(tiny):
    assert len(tiny.dataset.splits.test) == len(tiny.dataset.splits.validation) == 600
    by_time = tiny.dataset.replace(split_rule=GlobalTime()).splits
    share = len(by_time.test) / len(tiny.dataset.item)
    assert 0.09 < share < 0.11
    ranked = tiny.oracle.rank(by_time.test.histories, k=5, exclude_seen=True)
    assert _recall(ranked, by_time.test.targets) > 0.3
    assert len(tiny.dataset.replace(split_rule=HeldOutItems()).splits.test) > 0


def test_content_shows_the_taxonomy_in_part(tiny):
    """The nearest other item is of the same cell far more often than by chance, and not always."""
    world, vectors = tiny.oracle.world, tiny.dataset.vectors("content")
    distance = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=-1)
    np.fill_diagonal(distance, np.inf)
    agree = (world.cell[distance.argmin(axis=1)] == world.cell).mean()
    chance = (np.bincount(world.cell) ** 2).sum() / 60**2
    assert 3 * chance < agree < 1
    categories = tiny.dataset.items["category"].to_pylist()
    kinds = world.cell // TINY.styles
    assert len(set(zip(kinds.tolist(), categories, strict=True))) == len(set(categories)) == 8
    assert all(path.count(" > ") == 2 for path in categories)
    assert set(tiny.dataset.text_columns) == {"title", "brand", "color", "material", "category", "text"}


def test_taxonomies_wider_than_the_words_still_have_distinct_names():
    wide = dataclasses.replace(TINY, num_items=400, num_users=5, taxonomy=(7, 5, 5), styles=1)
    assert len(set(simulate(wide).dataset.items["category"].to_pylist())) == 175


def test_images_decode_and_differ_between_departments():
    dataset, oracle = simulate(dataclasses.replace(TINY, num_users=5, styles=1, images=True))
    pictures = [Image.open(io.BytesIO(data)) for data in dataset.items["image"].to_pylist()]
    assert {(p.format, p.size, p.mode) for p in pictures} == {("PNG", (32, 32), "RGB")}
    masks = np.array([(np.asarray(p) != 245).any(axis=-1) for p in pictures])  # the shape against its background
    department = oracle.world.cell // 4
    assert len({p.tobytes() for p in pictures}) == 60
    # Mean shapes: an item is nearer to its own department's than to the other's.
    means = np.array([masks[department == d].mean(axis=0) for d in range(2)])
    nearest = ((masks[:, None] - means[None]) ** 2).sum(axis=(2, 3)).argmin(axis=1)
    assert (nearest == department).mean() > 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 15}, "expected 16 items or more .*, got 15"),
        ({"max_length": 48}, "max_length 48"),
        ({"min_length": 12}, "min_length <= mean_length"),
        ({"styles": 0}, "styles"),
        ({"family_size": 0.9}, "family_size of 1 .* or more, got 0.9"),
        ({"family_size": math.nan}, "family_size of 1 .* or more, got nan"),
        ({"mixture": Mixture(variant=-0.1)}, "weights of 0 or more"),
        ({"mixture": Mixture(popularity=0.0)}, "popularity above 0"),
    ],
)
def test_impossible_worlds_are_refused(changes, message):
    with pytest.raises(SemidError, match=message):
        dataclasses.replace(TINY, **changes)


def test_the_tightest_world_ends():
    """Users who take every item there is but one, through one favourite kind."""
    tight = SimulatedConfig(
        num_items=16,
        num_users=50,
        taxonomy=(2, 2, 2),
        mean_length=14.0,
        min_length=13,
        max_length=15,
        late_items=0.0,
        mixture=Mixture(taste=1.0, transition=0.0, variant=0.0, successor=0.0, popularity=1e-9),
        images=False,
    )
    dataset, oracle = simulate(tight)
    assert np.diff(dataset.offsets).max() == 15
    examples = _all_examples(dataset)
    np.testing.assert_allclose(oracle.probabilities(examples.histories).sum(axis=1), 1, rtol=1e-12)
