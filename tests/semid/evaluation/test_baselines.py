"""Popularity and bigram against a plain recount in dictionaries."""

import importlib
import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from semid.data import Histories
from semid.evaluation import Bigram, Popularity

ITEMS = 12
baselines = importlib.import_module("semid.evaluation.baselines")  # the package has a function of that name
IDS = pa.array([f"i{row}" for row in range(ITEMS)])


def _lists(rng: np.random.Generator, n: int) -> list[list[int]]:
    return [rng.integers(ITEMS - 2, size=rng.integers(0, 7)).tolist() for _ in range(n)]  # two items never occur


def _recount(train: list[list[int]], history: list[int], *, use_bigrams: bool) -> list[int]:
    popular = Counter(item for one in train for item in one)
    after = Counter()
    if use_bigrams and history:
        after.update(b for one in train for a, b in itertools.pairwise(one) if a == history[-1])
    return sorted(range(ITEMS), key=lambda item: (-after[item], -popular[item], item))


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("masks", [None, 1, 42])
@pytest.mark.parametrize("k", [1, 4, ITEMS + 3])
@pytest.mark.parametrize("model", [Popularity, Bigram])
def test_ranking_equals_a_recount(model, k, masks, exclude_seen, monkeypatch):
    monkeypatch.setattr(baselines, "_CANDIDATES", 5 * ITEMS)
    rng = np.random.default_rng(k)
    train, queries = _lists(rng, 15), [*_lists(rng, 40), [], [ITEMS - 1]]
    allowed = np.ones((1, ITEMS), bool) if masks is None else rng.random((masks, ITEMS)) < 0.6
    ranked = model.fit(Histories.from_lists(train), IDS).rank(
        Histories.from_lists(queries),
        k=k,
        exclude_seen=exclude_seen,
        allowed=None if masks is None else allowed[0] if masks == 1 else allowed,
    )
    for history, mask, got in zip(queries, np.broadcast_to(allowed, (42, ITEMS)), ranked.tolist(), strict=True):
        order = _recount(train, history, use_bigrams=model is Bigram)
        expected = [item for item in order if mask[item] and not (exclude_seen and item in history)][:k]
        assert got == expected + [-1] * (k - len(expected)), history


@pytest.mark.parametrize("model", [Popularity, Bigram])
@pytest.mark.parametrize("shared", [True, False])
def test_masks_hold_few_candidates(model, shared, monkeypatch):
    held, choose = [], baselines._first_wanted
    monkeypatch.setattr(baselines, "_first_wanted", lambda *args: held.append(args[0].shape) or choose(*args))
    monkeypatch.setattr(baselines, "_CANDIDATES", 2 * ITEMS)
    fitted, queries = model.fit(Histories.from_lists([[0, 1]]), IDS), Histories.from_lists([[2]] * 5)
    mask = np.arange(ITEMS) >= ITEMS - 3
    ranked = fitted.rank(queries, k=2, allowed=mask if shared else np.tile(mask, (5, 1)))
    assert ranked.tolist() == [[ITEMS - 3, ITEMS - 2]] * 5
    assert held == ([(5, 2)] if shared else [(2, 11), (2, 11), (1, 11)])


@pytest.mark.parametrize("model", [Popularity, Bigram])
def test_a_long_history_is_ranked_apart(model, monkeypatch):
    held, choose = [], baselines._first_wanted
    monkeypatch.setattr(baselines, "_first_wanted", lambda *args: held.append(args[0].shape) or choose(*args))
    monkeypatch.setattr(baselines, "_CANDIDATES", 4 * ITEMS)
    fitted = model.fit(Histories.from_lists([[0]]), IDS, repeats=False)
    long, short = list(range(ITEMS - 1)), [[row] for row in range(8)]
    ranked = fitted.rank(Histories.from_lists([*short[:3], long * 2, *short[3:]]), k=2).tolist()
    assert ranked[3] == [ITEMS - 1, -1]
    np.testing.assert_array_equal(np.delete(ranked, 3, axis=0), fitted.rank(Histories.from_lists(short), k=2))
    assert held == [(8, 3), (1, ITEMS), (8, 3)]


def test_bigrams_do_not_cross_from_one_history_into_the_next():
    train = Histories.from_lists([[0, 1], [2, 3]])
    ranked = Bigram.fit(train, IDS).rank(Histories.from_lists([[1], [0]]), k=1)
    assert ranked.tolist() == [[0], [1]]  # nothing follows item 1 (so the most popular row); item 1 follows item 0
