"""Item graphs against brute force in dictionaries, growth against fitting to everything, and files."""

import dataclasses
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from semid import SemidError, artifacts, evaluate
from semid.data import Dataset, HeldOutItems, Histories
from semid.graphs import Edges, ItemGraph, ItemGraphConfig, fit_graph, item_graph, ranking, tuned
from semid.graphs.item_graph import next_item
from semid.graphs.ranking import best_items, by_popularity
from semid.graphs.transitions import content_edges, count_transitions, pruned, row_blocks
from semid.graphs.tuning import _ndcg_at_10

ITEMS = 9
CONFIG = ItemGraphConfig(window=3, neighbors=2, width=ITEMS)
LISTS = [[0, 1, 2, 1], [3], [], [2, 2, 0, 4, 1, 3], [1, 0]]


def _vectors(items: int = ITEMS) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(items, 3)).astype(np.float32)


def _dataset(lists, *, vectors=None) -> Dataset:
    """Users whose last two interactions are validation and test; `lists` are their training histories."""
    rows = [(f"u{user}", f"i{item}", place) for user, items in enumerate(lists) for place, item in enumerate(items)]
    users, items, position = zip(*rows, strict=True)
    columns = {"item_id": [f"i{row}" for row in range(ITEMS)]}
    if vectors is not None:
        columns["content"] = pa.array(list(vectors), pa.list_(pa.float32(), vectors.shape[1]))
    return Dataset.build(
        pa.table(columns), pa.table({"user_id": users, "item_id": items, "position": position}), name="tiny"
    )


def _unrepeated(seed: int, users: int = 12) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(ITEMS)[: rng.integers(3, 8)].tolist() for _ in range(users)]


def _edges(train, vectors, config, *, loops: bool = False) -> np.ndarray:
    """`D^-a (C + tau C T + nu C N + kappa T)`, entry by entry."""
    counts = defaultdict(float)
    for items in train:
        for t, source in enumerate(items):
            for distance, target in enumerate(items[t + 1 : t + 1 + config.window]):
                if source != target or loops:
                    counts[source, target] += config.decay**distance
                    counts[target, source] += config.backward * config.decay**distance
    content = np.zeros((ITEMS, ITEMS))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for i in range(ITEMS):
        cosines = {j: float(unit[i] @ unit[j]) for j in range(ITEMS) if j != i}
        nearest = sorted(cosines, key=cosines.get)[-config.neighbors :]
        powers = {j: np.exp(cosines[j] / config.temperature) for j in nearest}
        for j in nearest:
            content[i, j] = powers[j] / sum(powers.values())
    c = np.array([[counts[i, j] for j in range(ITEMS)] for i in range(ITEMS)])
    edges = c + config.smoothing * c @ content + config.content * content
    for j in np.flatnonzero(c.sum(axis=0) == 0):
        edges[:, j] += config.new_items * sum(content[j, k] * c[:, k] for k in range(ITEMS))
    return edges / edges.sum(axis=1, keepdims=True) ** config.degree_power


def test_items_that_are_nearly_one_keep_their_edges_at_any_temperature():
    vectors = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    vectors[1] = vectors[0] * 1.0001
    edges = content_edges(vectors, ItemGraphConfig(neighbors=3, temperature=1e-3)).toarray()
    np.testing.assert_allclose(edges.sum(axis=1), 1, rtol=1e-6)
    assert edges[0, 1] > 0.999 < edges[1, 0]


def _next_item(history, edges, config, *, loops: bool) -> np.ndarray:
    q = sum(config.recency**age * edges[item] for age, item in enumerate(history[::-1][: config.window]))
    if not loops:
        q[history] = 0
    return q / q.sum()


def _train(dataset: Dataset) -> list[list[int]]:
    return [dataset.splits.train[user].tolist() for user in range(dataset.num_users)]


@pytest.mark.parametrize(
    "lists",
    [_unrepeated(0), [*_unrepeated(0, users=900), [2, 2, 0, 1, 3]], LISTS],
    ids=["nothing repeats", "1 of 1,800 targets repeats", "repeats"],
)
def test_distribution_equals_the_equations(lists):
    dataset, queries = _dataset(lists, vectors=_vectors()), [[0, 1, 2, 5], [7], [3, 8]]
    config = CONFIG.resolved(["content"])
    graph = ItemGraph.fit(dataset, CONFIG)
    assert graph.repeats == (lists is LISTS)
    edges = _edges(_train(dataset), _vectors(), config, loops=graph.repeats)
    found = graph.distribution(Histories.from_lists(queries)).toarray()
    expected = [_next_item(history, edges, config, loops=graph.repeats) for history in queries]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


def test_an_item_leads_to_itself_only_where_loops_are_counted():
    histories = Histories.from_lists([[2, 2, 0]])
    config = dataclasses.replace(CONFIG, backward=0.0)
    without, loops = (count_transitions(histories, config, num_items=3, loops=loops) for loops in (False, True))
    assert without.todok().items() == {(2, 0): np.float32(1 + config.decay)}.items()
    assert loops[2, 2] == 1


def test_transitions_of_the_latest_items_are_those_that_were_not_counted_before():
    lists = _unrepeated(2)
    new = np.array([min(2, len(items)) for items in lists], np.int32)
    early = [items[: len(items) - n] for items, n in zip(lists, new, strict=True)]
    before, all_, later = (
        count_transitions(Histories.from_lists(part), CONFIG, num_items=ITEMS, new=fresh).toarray()
        for part, fresh in ((early, None), (lists, None), (lists, new))
    )
    np.testing.assert_allclose(before + later, all_, atol=1e-6)
    assert later.sum() > 0


def test_blocks_of_positions_and_of_rows_change_nothing(monkeypatch):
    dataset = _dataset(_unrepeated(3), vectors=_vectors())
    whole = ItemGraph.fit(dataset, CONFIG)
    monkeypatch.setattr("semid.graphs.transitions._PAIRS", 7)
    monkeypatch.setattr("semid.graphs.transitions._ENTRIES", 10)
    assert len(list(row_blocks(whole.counts, CONFIG))) > 3
    in_blocks = ItemGraph.fit(dataset, CONFIG)
    np.testing.assert_array_equal(whole.edges.rows, in_blocks.edges.rows)
    np.testing.assert_allclose(whole.edges.weights, in_blocks.edges.weights, rtol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_pruning_keeps_the_largest_entries_of_every_row(width):
    rng = np.random.default_rng(0)
    dense = rng.permutation(40 * 30).reshape(40, 30) * (rng.random((40, 30)) < 0.5)
    dense[3] = 0
    kept = pruned(sparse.csr_array(dense.astype(np.float32)), width)
    for row in range(40):
        order = np.argsort(-dense[row], kind="stable")
        expected = [column for column in order[:width] if dense[row, column] > 0]
        assert kept[[row]].indices.tolist() == expected


def test_new_items_and_interactions_join_as_if_they_had_been_there():
    lists = _unrepeated(4)
    dataset = _dataset(lists, vectors=_vectors())
    whole = ItemGraph.fit(dataset, CONFIG)
    train, known = _train(dataset), ITEMS - 2  # the last two items are new
    new = np.array([sum(1 for _ in items) if max(items) >= known else 0 for items in train], np.int32)
    old = [items if max(items) < known else [] for items in train]
    config = CONFIG.resolved(["content"])
    ids = dataset.item_ids[:known]
    start = ItemGraph.from_histories(Histories.from_lists(old), ids, config, vectors=_vectors()[:known])
    grown = start.append(
        dataset.item_ids[known:], vectors=_vectors()[known:], histories=Histories.from_lists(train), new=new
    )
    np.testing.assert_array_equal(grown.edges.rows, whole.edges.rows)
    np.testing.assert_allclose(grown.edges.weights, whole.edges.weights, rtol=1e-5)
    np.testing.assert_array_equal(grown.train_counts, whole.train_counts)
    # An item that nobody has had is found through its content alone.
    by_content = start.append(dataset.item_ids[known:], vectors=_vectors()[known:])
    assert (by_content.edges.rows >= known).any()
    with pytest.raises(SemidError, match="'i7' is in the graph already"):
        grown.append(["i7"], vectors=_vectors()[:1])
    with pytest.raises(SemidError, match=r"expected vectors \[1, 3\] of the new items \(content\), got none"):
        grown.append(["new"])
    with pytest.raises(SemidError, match="item 'new' is given 2 times; keep one"):
        grown.append(["new", "other", "new"], vectors=_vectors(3))
    with pytest.raises(SemidError, match="expected finite vectors, got NaN or infinity for item 'other'"):
        grown.append(["new", "other"], vectors=np.array([[1, 2, 3], [1, np.nan, 3]], np.float32))
    more = Histories.from_lists([[0], [1, 2]])
    with pytest.raises(SemidError, match=r"expected vectors \[0, 3\] of the new items \(content\), got \[1, 3\]"):
        grown.append(histories=more, vectors=_vectors(1))
    assert len(grown.append(vectors=_vectors(0)).item_ids) == ITEMS  # control
    plain = ItemGraph.fit(_dataset(lists))
    with pytest.raises(SemidError, match="the graph has no content vectors"):
        plain.append(["new"], vectors=_vectors(1))
    assert len(plain.append(["new"]).item_ids) == ITEMS + 1  # control
    for fresh, message in (([0, 3], "0 to 2 for history 1, its items, got 3"), ([0], r"\[2\], .*, got \[1\]")):
        with pytest.raises(SemidError, match=f"expected new .*{message}"):
            grown.append(histories=more, new=np.array(fresh))


def test_a_graph_with_newer_interactions_is_of_no_dataset():
    """They may be its test: neither is it measured there, nor does anything learn from it."""
    dataset = _dataset(_unrepeated(4), vectors=_vectors())
    graph, whole = (
        ItemGraph.fit(dataset, CONFIG),
        Histories.from_lists([items.tolist() for items in dataset.splits.test.histories]),
    )
    items = graph.append(["new"], vectors=_vectors(1))
    same = graph.append(histories=whole, new=np.zeros(len(whole), int))
    for other in (items, same):
        other.check_dataset(dataset)
        assert other.dataset == graph.dataset
    grown = graph.append(histories=whole)
    assert grown.append(histories=whole).dataset != grown.dataset
    with pytest.raises(SemidError, match="the item graph: trained on dataset digest"):
        grown.check_dataset(dataset)
    with pytest.raises(SemidError, match=r"^ItemGraph: trained on dataset digest"):
        evaluate(grown, dataset)
    assert evaluate(grown, dataset, other_dataset=True).values["recall@10"] > 0.5
    unknown = dataclasses.replace(graph, dataset="").append(histories=whole)
    assert unknown.dataset == ""
    with pytest.raises(
        SemidError, match=r"its histories is not known.*from_histories\(\.\.\., dataset=dataset\.digest\)"
    ):
        unknown.check_dataset(dataset)


def test_ranking_follows_the_distribution_then_popularity_under_masks():
    dataset = _dataset(_unrepeated(5), vectors=_vectors())
    graph = ItemGraph.fit(dataset, dataclasses.replace(CONFIG, width=2))
    queries = Histories.from_lists([[0, 1], [4], []])
    q, ranked = graph.distribution(queries).toarray(), graph.rank(queries, k=ITEMS + 1)
    for history, probabilities, row in zip([[0, 1], [4], []], q, ranked, strict=True):
        candidates = [item for item in range(ITEMS) if item not in history]
        order = sorted(candidates, key=lambda item: (-probabilities[item], -graph.train_counts[item], item))
        assert row.tolist() == order + [-1] * (ITEMS + 1 - len(order))
    allowed = np.zeros(ITEMS, bool)
    allowed[[2, 3]] = True
    assert set(graph.rank(queries, k=3, allowed=allowed).ravel().tolist()) == {2, 3, -1}
    assert evaluate(graph, dataset).values["recall@10"] > 0.5


def test_one_mask_is_applied_once_to_the_order_by_popularity():
    class Counted(np.ndarray):
        masked = 0

        def __getitem__(self, index):
            Counted.masked += isinstance(index, np.ndarray) and len(index) == 50
            return super().__getitem__(index)

    popular, mask = np.random.default_rng(0).permutation(50).view(Counted), np.arange(50) % 3 > 0
    nothing = sparse.csr_array((20, 50), dtype=np.float32)
    shared = best_items(nothing, k=4, popular=popular, allowed=mask[None])
    assert Counted.masked == 1
    np.testing.assert_array_equal(shared, np.tile(popular[mask[popular]][:4], (20, 1)))
    each = best_items(nothing, k=4, popular=popular, allowed=np.tile(mask, (20, 1)))
    np.testing.assert_array_equal(each, shared)


def test_rankings_of_one_graph_share_its_matrix_and_its_order_by_popularity(monkeypatch):
    graph, read, sorted_counts = ItemGraph.fit(_dataset(_unrepeated(5))), [], []
    monkeypatch.setattr(item_graph, "next_item", lambda *args, **kw: (read.append(args[1]), next_item(*args, **kw))[1])
    monkeypatch.setattr(ranking, "by_popularity", lambda c: (sorted_counts.append(c), by_popularity(c))[1])
    lists = [graph.rank(Histories.from_lists([[0, 1], [4]]), k=5) for _ in range(2)]
    np.testing.assert_array_equal(*lists)
    assert len(read) == 2
    assert read[0] is read[1]
    assert len(sorted_counts) == 1
    other = dataclasses.replace(graph, edges=Edges(graph.edges.rows, graph.edges.weights * 2))  # shares nothing of it
    np.testing.assert_array_equal(other._matrix.data, graph._matrix.data * 2)


def test_a_graph_is_read_as_it_was_written(tmp_path):
    dataset = _dataset(_unrepeated(6), vectors=_vectors())
    graph = fit_graph(dataset, CONFIG, out=tmp_path / "graph")
    read = ItemGraph.load(tmp_path / "graph")
    queries = Histories.from_lists([[0, 1], [4]])
    np.testing.assert_array_equal(read.rank(queries, k=5), graph.rank(queries, k=5))
    assert (read.config, read.dataset, read.origin) == (graph.config, dataset.digest, graph.origin)
    grown = read.append(["i9"], vectors=_vectors(1))
    assert (len(grown.item_ids), grown.origin) == (ITEMS + 1, None)


def test_edges_to_items_that_are_not_there_are_refused(tmp_path):
    ItemGraph.fit(_dataset(_unrepeated(6), vectors=_vectors()), CONFIG).write(tmp_path)
    tensors = artifacts.load_tensors(tmp_path / "graph.safetensors")
    assert ItemGraph.read(tmp_path).edges.rows.max() < ITEMS
    tensors["edges/rows"][0, 0] = ITEMS
    artifacts.save_tensors(tmp_path / "graph.safetensors", tensors)
    with pytest.raises(SemidError, match=r"graph.safetensors: its edges are not those of the 9 items"):
        ItemGraph.read(tmp_path)


def test_the_weight_of_content_is_chosen_by_what_it_is_worth():
    """Users take items of one of two families in turn: vectors that show the families count, noise does not."""
    rng, families = np.random.default_rng(0), np.arange(ITEMS) % 2
    lists = [rng.permutation(np.flatnonzero(families == user % 2)).tolist() for user in range(60)]
    start = dataclasses.replace(CONFIG, content=3.0, smoothing=0.0)
    telling = np.eye(3, dtype=np.float32)[families] + 0.01 * _vectors()
    assert tuned(_dataset(lists, vectors=telling), start).content >= 3
    assert tuned(_dataset(lists, vectors=rng.normal(size=(ITEMS, 3)).astype(np.float32)), start).content == 0


def test_new_items_are_found_where_their_content_neighbors_are():
    """Users take twins one after the other: of a twin that training never had, its content alone tells."""
    rng = np.random.default_rng(0)
    twins = [np.stack([pairs, pairs + 20], axis=1).ravel() for pairs in (rng.permutation(20) for _ in range(200))]
    rows = [(f"u{user}", f"i{item}", place) for user, items in enumerate(twins) for place, item in enumerate(items)]
    users, items, position = zip(*rows, strict=True)
    near = np.tile(rng.normal(size=(20, 8)), (2, 1)).astype(np.float32) + 0.01 * rng.normal(size=(40, 8)).astype("f4")
    table = pa.table({"item_id": [f"i{row}" for row in range(40)], "content": pa.array(list(near))})
    interactions = pa.table({"user_id": users, "item_id": items, "position": position})
    dataset = Dataset.build(table, interactions, split_rule=HeldOutItems(0.2), name="twins")
    without, chosen = dataclasses.replace(CONFIG, new_items=0.0), tuned(dataset, CONFIG)
    assert chosen.new_items > 1
    assert tuned(dataset, without).new_items == 0  # what is given is kept
    few, many = (evaluate(ItemGraph.fit(dataset, config), dataset, split="test") for config in (without, chosen))
    assert many.values["recall@5"] > 3 * few.values["recall@5"]  # the twin that comes first cannot be told


def test_ties_are_ranked_in_tuning_as_in_evaluation():
    scores = sparse.csr_array(np.array([[3, 2, 2, 2, 0]] * 4, np.float32))
    targets = np.array([1, 3, 0, 4])
    places = [
        row.tolist().index(target) if target in row else None
        for row, target in zip(best_items(scores.copy(), k=4, popular=np.arange(5)), targets, strict=True)
    ]
    expected = [0 if place is None else 1 / np.log2(place + 2) for place in places]
    assert places == [1, 3, 0, None]
    np.testing.assert_allclose(_ndcg_at_10(scores, targets), expected)


def test_histories_of_one_item_leave_content_and_popularity(caplog):
    dataset = _dataset([[item] for item in (3, 3, 5, 0, 1, 2)], vectors=_vectors())
    graph = ItemGraph.fit(dataset, CONFIG)
    assert caplog.messages == [
        "item graph: no training history holds two items, so there are no transitions; "
        "content neighbors and popularity remain"
    ]
    near = graph.edges.rows[4]
    near = near[near >= 0].tolist()
    assert len(near) == CONFIG.neighbors
    others = sorted(set(range(ITEMS)) - {4, *near}, key=lambda item: (-graph.train_counts[item], item))
    assert graph.rank(Histories.from_lists([[4]]), k=ITEMS)[0].tolist() == [*near, *others, -1]
    with pytest.raises(SemidError, match="the validation split has no examples"):
        tuned(dataset, CONFIG)


def test_histories_and_vectors_give_the_graph_that_fitting_to_their_dataset_gives():
    dataset, queries = _dataset(_unrepeated(8), vectors=_vectors()), Histories.from_lists([[0, 1], [4]])
    fitted = ItemGraph.fit(dataset, CONFIG)
    for vectors, expected in ((_vectors(), fitted), (None, ItemGraph.fit(_dataset(_unrepeated(8)), CONFIG))):
        graph = ItemGraph.from_histories(dataset.splits.train, dataset.item_ids, CONFIG, vectors=vectors)
        np.testing.assert_array_equal(graph.distribution(queries).toarray(), expected.distribution(queries).toarray())
        assert (graph.config.content, graph.config.smoothing) == (expected.config.content, expected.config.smoothing)
    assert not np.array_equal(graph.edges.weights, fitted.edges.weights)  # control: content counts


def test_weights_of_content_that_is_not_there_are_refused():
    dataset = _dataset(_unrepeated(7))
    graph = ItemGraph.fit(dataset, CONFIG)
    assert (graph.config.content, graph.config.smoothing, graph.vectors) == (0, 0, None)
    with pytest.raises(SemidError, match=r"content 2\.0 weigh content edges, and the items have no vectors"):
        ItemGraph.fit(dataset, ItemGraphConfig(content=2.0))
    ids, histories = pa.array([f"i{row}" for row in range(ITEMS)]), Histories.from_lists(LISTS)
    with pytest.raises(SemidError, match=r"content 2\.0 weigh content edges, and the items have no vectors"):
        ItemGraph.from_histories(histories, ids, ItemGraphConfig(content=2.0))
    with pytest.raises(SemidError, match="no vector column 'text' for content edges; there are none"):
        ItemGraph.fit(dataset, ItemGraphConfig(columns=("text",)))
    nan, inf = np.nan, np.inf
    infinite = ({"content": inf}, {"content": nan}, {"smoothing": nan}, {"temperature": inf})
    for wrong in ({"recency": 1.5}, {"width": 0}, {"content": -1.0}, {"temperature": 0.0}, *infinite):
        with pytest.raises(SemidError, match=f"expected .*{next(iter(wrong))}"):
            ItemGraphConfig(**wrong)
