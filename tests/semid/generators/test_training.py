"""Training a generator: its losses against plain arithmetic, what it writes, and what it refuses."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from scipy import special

from semid import artifacts
from semid.artifacts import Manifest, Origin
from semid.catalog import SemanticCatalog
from semid.data import Dataset, HeldOutItems, Histories
from semid.errors import SemidError
from semid.evaluation import evaluate
from semid.generators import (
    GeneratorConfig,
    LossTables,
    ObjectiveConfig,
    TaughtHistories,
    Teacher,
    VectorTeacher,
    as_teacher,
    content_features,
    distillation,
    generator_loss,
    taught,
    train,
    training_counts,
    training_rows,
)
from semid.generators.training import check_catalog, check_teacher, validation
from semid.graphs import ItemGraph, ItemGraphConfig, SmoothConfig, add_column
from semid.recommender import ItemData, ModelSpec, Recommender
from semid.recommender.scorers import _top
from semid.training import OptimizerConfig, SingleRows, StepContext, TrainingConfig, pack
from seq_models import (
    CodeTrie,
    DenseConfig,
    EncoderDecoderConfig,
    FlatDecoderConfig,
    HybridConfig,
    ItemTables,
    Layout,
    ParallelHeadsConfig,
    RQTransformerConfig,
    SoftmaxOver,
    TeacherItems,
    TrainingBatch,
    TransformerConfig,
)

ITEMS = 12
BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
CODES = RQTransformerConfig(backbone=BACKBONE, depth_dropout=0.0)
CONFIG = GeneratorConfig(
    model=CODES,
    max_history=4,
    row_length=6,
    objective=ObjectiveConfig(repeats=True),  # no factor to compile
    training=TrainingConfig(epochs=2, batch_size=8, log_every=1),
)


@pytest.mark.parametrize(
    ("interactions", "epochs", "every", "dropout"),
    [
        (10**7, 36, 1, 0.1),
        (32_181, 36, 1, 0.1),
        (25_000, 36, 1, 0.1),
        (12_500, 72, 2, 0.1),
        (6_250, 144, 4, 0.3),
        (0, 216, 6, 0.3),
    ],
)
def test_epochs_and_dropout_follow_the_data_where_none_are_named(interactions, epochs, every, dropout):
    config = GeneratorConfig().resolved(interactions, repeats=True)
    assert (config.training.epochs, config.training.validate_every) == (epochs, every)
    assert config.model == RQTransformerConfig(TransformerConfig(dropout=dropout))
    assert config.objective.repeats is True
    assert config.resolved(30_000 - interactions if interactions < 15_000 else 0, repeats=False) == config  # named
    named = GeneratorConfig(RQTransformerConfig(BACKBONE), training=TrainingConfig(epochs=3), objective=CHILDREN)
    resolved = named.resolved(interactions, repeats=False)
    assert resolved == dataclasses.replace(
        named, objective=dataclasses.replace(CHILDREN, repeats=False, distillation=0.0)
    )
    dense = GeneratorConfig(DenseConfig()).resolved(interactions, repeats=False)
    assert (dense.model, dense.training.epochs) == (DenseConfig(), epochs)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Everybody walks round the circle of items, so that the next item can be learned."""
    rows = [(f"u{user}", f"i{(user + at) % ITEMS}", at) for user in range(24) for at in range(6)]
    users, items, positions = zip(*rows, strict=True)
    table = pa.table({"user_id": users, "item_id": items, "position": positions})
    made = Dataset.build(pa.table({"item_id": [f"i{row}" for row in range(ITEMS)]}), table, name="circle")
    return made.with_vectors("v", np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def catalog(dataset) -> SemanticCatalog:
    codes = np.stack(np.unravel_index(np.arange(ITEMS), (3, 4)), axis=1).astype(np.int32)
    return SemanticCatalog(dataset.item_ids, codes, (3, 4))


FAMILIES = {
    "rq-transformer": CODES,
    "encoder-decoder": EncoderDecoderConfig(backbone=BACKBONE, decoder_layers=1),
    "flat": FlatDecoderConfig(backbone=BACKBONE),
    "hybrid": HybridConfig(backbone=BACKBONE),
    "parallel-heads": ParallelHeadsConfig(backbone=BACKBONE),
    "sasrec": DenseConfig(backbone=BACKBONE),
}
CHILDREN = ObjectiveConfig(normalization=SoftmaxOver.CHILDREN)
CASES = [(name, ObjectiveConfig()) for name in FAMILIES]
CASES += [(name, CHILDREN) for name in ("rq-transformer", "encoder-decoder", "flat")]
UNSEEN = ObjectiveConfig(repeats=False)
CASES += [(name, UNSEEN) for name in ("hybrid", "sasrec")]


def _losses(config: GeneratorConfig, dataset, catalog, *, teacher: Recommender | None = None):
    """Loss and terms of one batch of everything, and the untrained recommender."""
    features, counts = content_features(dataset, None), training_counts(dataset)
    spec = ModelSpec(
        config.model, catalog.level_sizes, ITEMS, features.shape[1], 4, normalization=config.objective.normalization
    )
    model = spec.build(seed=1)
    recommender = Recommender(model, catalog, spec=spec, items=ItemData(counts, features))
    rows = training_rows(dataset, config, model.layout)
    batch = rows[np.arange(len(rows))]
    batch = batch if teacher is None else taught(batch, as_teacher(teacher, config.objective), config.objective)
    trie = CodeTrie.from_codes(catalog.codes, catalog.level_sizes)
    tables = LossTables(ItemTables.from_arrays(catalog.codes, features, counts), trie)
    context = StepContext(jax.random.key(0), jnp.zeros(()))
    value, terms = jax.jit(functools.partial(generator_loss, objective=config.objective))(
        model, jax.tree.map(jnp.asarray, batch), tables, context
    )
    return batch, float(value), {name: float(term) for name, term in terms.items()}, recommender


@pytest.mark.parametrize(("family", "objective"), CASES)
def test_the_loss_is_minus_the_mean_log_probability_of_what_came_next(dataset, catalog, family, objective):
    """All rows, one pass: the same number as the recommender's exact scores, prefix after prefix."""
    config = GeneratorConfig(model=FAMILIES[family], max_history=4, row_length=10, objective=objective)
    batch, value, terms, recommender = _losses(config, dataset, catalog)
    assert (batch.segments == 0).any()  # there is padding, which must not count
    if batch.targets.ndim > 1:
        assert batch.segments.max() > 1  # and there are rows of several histories, which must not see each other
    train, names = dataset.splits.train, dataset.item_ids.to_pylist()
    walks = [[names[row] for row in train[user]] for user in range(len(train))]
    pairs = [(walk[:at], walk[at]) for walk in walks for at in range(1, len(walk))]
    assert terms.pop("targets") == len(pairs)
    scores = recommender.score([history for history, _ in pairs], names)
    if objective == UNSEEN:  # each window is its whole history here
        for row, (history, _) in zip(scores, pairs, strict=True):
            row[[names.index(item) for item in history]] = -np.inf
        scores -= special.logsumexp(scores, axis=1, keepdims=True)
    expected = -np.mean([scores[index, names.index(target)] for index, (_, target) in enumerate(pairs)])
    if family == "hybrid":  # its scores are the dense head's
        assert terms["loss/dense"] == pytest.approx(expected, abs=1e-5)
    else:
        assert value == pytest.approx(expected, abs=1e-5)
    if terms:
        assert sum(terms.values()) == pytest.approx(value, abs=1e-5)


def _training_batch(history, segments, targets):
    return TrainingBatch(*(jnp.asarray(x, jnp.int32) for x in (history, segments, targets)))


def test_each_position_leaves_out_its_own_history_alone_and_a_target_in_it_is_none():
    batch = _training_batch([[3, 1, 3, 5, 6, 0]], [[1, 1, 1, 2, 2, 0]], [[1, 3, 4, 6, 5, -1]]).without_repeats()
    seen = [[sorted(set(row) - {-1}) for row in rows] for rows in batch.seen.tolist()]
    assert seen == [[[3], [1, 3], [1, 3], [5], [5, 6], []]]
    assert batch.targets.tolist() == [[1, -1, 4, 6, -1, -1]]
    single = _training_batch([[3, 1, 0], [5, 6, 6]], [[1, 1, 0], [2, 2, 2]], [2, 6]).without_repeats()
    assert (single.seen.tolist(), single.targets.tolist()) == ([[3, 1, -1], [5, 6, 6]], [2, -1])


@pytest.mark.parametrize(
    ("given", "end", "factor"),
    [
        (None, (5, 6, 7), 0.0),
        (None, (0, 1, 2), 1.0),
        (None, (0, 6, 7), 0.0),  # by validation, where nothing repeats
        (True, (5, 6, 7), 1.0),
        (False, (0, 1, 2), 0.0),
    ],
)
def test_a_model_leaves_the_history_out_where_no_training_target_repeats(catalog, given, end, factor, tmp_path):
    """Everybody has items 0 to 4, then one more (or item 0 again), and two for validation and test."""
    walk = [0, 1, 2, 3, 4, *end]
    rows = [(f"u{user}", f"i{item}", at) for user in range(8) for at, item in enumerate(walk)]
    users, items, positions = zip(*rows, strict=True)
    table = pa.table({"user_id": users, "item_id": items, "position": positions})
    made = Dataset.build(pa.table({"item_id": catalog.item_ids}), table, name="walk")
    assert made.repeats == (8 * (end[0] == 0), 40)
    config = dataclasses.replace(
        CONFIG, model=FAMILIES["sasrec"], objective=ObjectiveConfig(repeats=given), max_history=5
    )
    trained = train(made, catalog, config, out=tmp_path / "model")
    assert Recommender.from_pretrained(tmp_path / "model").spec.repeat_factor == trained.spec.repeat_factor == factor
    found = evaluate(trained, made, ks=(ITEMS,))
    about = ("repeat_share", "leaves_out_history", "exclude_seen")
    assert [found.provenance[name] for name in about] == [0.2 * (end[0] == 0), factor == 0, False]
    ranked = trained.rank(made.splits.test.histories, k=ITEMS, exclude_seen=False)
    listed = np.isin(ranked, made.splits.test.histories[0]).any()
    assert listed == (factor == 1)
    histories = made.splits.test.histories
    exact = np.exp(trained.catalog_log_probs(histories))
    read = np.exp(trained.catalog_log_probs(Histories.from_lists([histories[n][-5:] for n in range(8)])))
    np.testing.assert_allclose(read.sum(axis=1), 1, rtol=1e-5)
    if factor == 0:  # what is older than the model reads is closed, too, as in the search
        read[:, histories[0]] = 0
    np.testing.assert_allclose(exact, read, rtol=1e-5)
    assert (exact[:, histories[0]] == 0).all() == (factor == 0)


def test_probabilities_among_children_sum_to_one_over_the_catalogue(dataset, catalog):
    """Control of the above: the two normalizations differ, and only one leaves nothing to codes without an item."""
    some = SemanticCatalog(catalog.item_ids, catalog.codes + np.array([0, 1], np.int32), (3, 6))
    for normalization, total in ((SoftmaxOver.CHILDREN, 1.0), (SoftmaxOver.VOCABULARY, None)):
        config = GeneratorConfig(model=CODES, objective=ObjectiveConfig(normalization=normalization))
        recommender = _losses(config, dataset, some)[-1]
        found = np.exp(recommender.score([["i1"]], dataset.item_ids.to_pylist())).sum()
        assert (found == pytest.approx(1, abs=1e-5)) == (total == 1.0)


def test_a_teacher_that_is_sure_is_a_second_target(dataset, catalog):
    """A dense teacher of one best item teaches that item's codes, where the target shares their prefix."""
    dense = _losses(GeneratorConfig(model=FAMILIES["sasrec"]), dataset, catalog)[-1]
    objective = ObjectiveConfig(distillation=0.5, teacher_items=3, teacher_temperature=1e-4)
    config = GeneratorConfig(model=CODES, max_history=4, row_length=10, objective=objective)
    batch, value, terms, _ = _losses(config, dataset, catalog, teacher=dense)
    _, plain, plain_terms, _ = _losses(dataclasses.replace(config, objective=ObjectiveConfig()), dataset, catalog)
    assert value == pytest.approx(plain + 0.5 * terms["loss/distillation"], abs=1e-5)
    assert terms["loss/level_0"] == pytest.approx(plain_terms["loss/level_0"], abs=1e-6)
    row, at = (int(index[0]) for index in np.nonzero(batch.segments == 1))
    ids = dataset.item_ids.to_pylist()
    best = dense.recommend([[ids[batch.history[row, at]]]], k=3)
    assert [ids[item] for item in batch.teacher_items[row, at]] == best.item_ids[0]
    gaps = -np.diff(batch.teacher_scores[row, at])
    np.testing.assert_allclose(gaps * 1e-4, -np.diff(best.scores[0]), rtol=1e-3)


@pytest.mark.parametrize("scores_at_once", [1, 300, 10**6])
@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.CLOSED, Layout.SINGLE])
@pytest.mark.parametrize(("own", "repeats"), [(1.0, None), (1.0, False), (0.0, None), (0.0, True)])
def test_a_dense_teacher_answers_as_it_recommends(dataset, catalog, layout, own, repeats, scores_at_once, monkeypatch):
    """At every position its best items after the history there, without those in it where either repeats nothing."""
    monkeypatch.setattr(distillation, "_SCORES", scores_at_once)
    spec = ModelSpec(FAMILIES["sasrec"], (3, 4), ITEMS, 0, max_history=4, repeat_factor=own)
    dense = Recommender(spec.build(seed=0), catalog, spec=spec, items=ItemData(training_counts(dataset)))
    config = dataclasses.replace(CONFIG, row_length=10, objective=ObjectiveConfig(teacher_items=10, repeats=repeats))
    rows = training_rows(dataset, config, layout)
    rows = taught(rows[np.arange(len(rows))], as_teacher(dense, config.objective), config.objective)
    unseen = own == 0 or repeats is False
    places = [place for place in np.ndindex(rows.targets.shape) if rows.targets[place] >= 0]
    histories = []
    for row, *at in places:
        until = at[0] + 1 if at else len(rows.segments[row])
        own_segment = rows.segments[row, :until] == rows.segments[row, :until].max()
        histories.append(rows.history[row, :until][own_segment].tolist())
    scores = dense.log_probs(Histories.from_lists(histories), np.arange(ITEMS))
    for place, history, row in zip(places, histories, scores, strict=True):
        if unseen:
            row = np.where(np.isin(np.arange(ITEMS), history), -np.inf, row)
        row = row - special.logsumexp(row)
        order = np.argsort(-row, kind="stable")[:10]
        assert rows.teacher_items[place].tolist() == np.where(np.isinf(row[order]), -1, order).tolist()
        np.testing.assert_allclose(rows.teacher_scores[place], row[order], atol=1e-5)
    assert (rows.teacher_items[tuple(zip(*places, strict=True))] == -1).any() == unseen  # 3 of 12 leave 9


@dataclasses.dataclass
class Oracle:
    """A teacher that knows the target, and nothing where there is none."""

    item_ids: pa.Array
    digest: str = "0" * 64
    origin: Origin | None = None

    def best(self, rows, *, k):
        items = np.stack([rows.targets, *[np.full_like(rows.targets, -1)] * (k - 1)], axis=-1)
        return TeacherItems(items, np.where(items < 0, -np.inf, 0.0))


def test_a_teacher_changes_no_bucket_of_the_rows(tmp_path):
    rows = SingleRows(Histories.from_lists([list(range(9))] * 50), max_history=8)
    known = TaughtHistories(rows, Oracle(pa.array([f"i{row}" for row in range(9)])), ObjectiveConfig(distillation=1.0))
    known.prepare(tmp_path)
    buckets = rows.buckets(1)
    assert set(buckets) == {0, 1, 2}
    np.testing.assert_array_equal(known.buckets(1), buckets)
    index = np.flatnonzero(buckets == 0)
    batch, plain = (of.batch(index, bucket=0) for of in (known, rows))
    assert batch.history.shape == plain.history.shape == (len(index), 2)
    np.testing.assert_array_equal(batch.teacher_items[:, 0], plain.targets)


@pytest.mark.parametrize("repeats", [None, True, False])
def test_a_teacher_teaches_nothing_of_the_history_where_the_model_leaves_it_out(catalog, repeats):
    histories = Histories.from_lists([[0, 1, 0, 2], [1, 0, 1, 3, 0], [2, 0, 1, 2, 0]])
    graph = ItemGraph.from_histories(histories, catalog.item_ids, ItemGraphConfig().resolved([]), repeats=True)
    spec = ModelSpec(FAMILIES["sasrec"], (3, 4), ITEMS, 0, max_history=4)
    dense = Recommender(spec.build(seed=0), catalog, spec=spec, items=ItemData(np.ones(ITEMS, np.int32)))
    rows = pack(histories, max_history=4, row_length=6)
    there = rows.targets >= 0
    seen = np.asarray(_training_batch(*rows[:3]).without_repeats().seen)[there]
    vectors = VectorTeacher(catalog.item_ids, np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32))
    for teacher, share in ((graph, 0.0), (dense, 0.5), (vectors, 0.0)):
        objective = ObjectiveConfig(repeats=repeats, teacher_graph=share)
        best = as_teacher(teacher, objective, graph=graph).best(rows, k=ITEMS)
        items, shares = best.rows[there], np.exp(best.scores[there])
        of_history = shares[(items[..., None] == seen[:, None]).any(axis=-1) & (items >= 0)].sum()
        assert (of_history > 0) == (repeats is not False)


@pytest.mark.parametrize("family", ["rq-transformer", "encoder-decoder", "hybrid"])
def test_anything_that_ranks_items_is_a_teacher(dataset, catalog, family, tmp_path):
    """The loss to one that is sure of the target is that of the target: entries that it leaves open do not count."""
    objective = ObjectiveConfig(distillation=0.5, teacher_items=3, repeats=True)
    config = dataclasses.replace(CONFIG, model=FAMILIES[family], objective=objective)
    terms = _losses(config, dataset, catalog, teacher=Oracle(dataset.item_ids))[2]
    assert terms["loss/distillation"] == pytest.approx(terms["loss/level_0"] + terms["loss/level_1"], abs=1e-5)
    train(dataset, catalog, config, out=tmp_path / "model", teacher=Oracle(dataset.item_ids))
    assert artifacts.read_manifest(tmp_path / "model").parents["teacher"] == "0" * 64
    with pytest.raises(SemidError, match="the teacher's items are not the dataset's"):
        train(dataset, catalog, config, teacher=Oracle(dataset.item_ids[::-1]))
    with pytest.raises(SemidError, match=r"trained on dataset digest 0{16}, not on this one"):
        train(dataset, catalog, config, teacher=Oracle(dataset.item_ids, origin=_origin(dataset="0" * 64)))


@pytest.mark.parametrize("family", ["encoder-decoder", "flat", "hybrid"])
def test_every_family_learns_and_comes_back(dataset, catalog, family, tmp_path):
    optimizer = OptimizerConfig(learning_rate=2e-2)
    training = TrainingConfig(epochs=60, batch_size=16, validate_every=20, log_every=50, optimizer=optimizer)
    wider = dataclasses.replace(FAMILIES[family], backbone=dataclasses.replace(BACKBONE, dim=16, hidden=32))
    config = GeneratorConfig(model=wider, max_history=4, row_length=6, training=training)
    trained = train(dataset, catalog, config, out=tmp_path / "m")
    assert evaluate(trained, dataset, split="test", ks=(1,)).values["recall@1"] > 0.4  # by chance: 1 of 12
    again = Recommender.from_pretrained(tmp_path / "m")
    assert again.recommend([["i3"]], k=3).item_ids == trained.recommend([["i3"]], k=3).item_ids


@pytest.mark.parametrize(
    ("model", "distillation", "with_teacher", "message"),
    [
        (CODES, 0.0, True, "distillation needs a weight above 0 and a teacher"),
        (CODES, 0.5, False, "distillation needs a weight above 0 and a teacher"),
        (FAMILIES["sasrec"], 0.5, True, "distillation is for models of codes"),
    ],
)
def test_a_teacher_without_a_use_for_it_is_refused(
    dataset, catalog, model, distillation, with_teacher, message, tmp_path
):
    teacher = _losses(GeneratorConfig(model=FAMILIES["sasrec"]), dataset, catalog)[-1] if with_teacher else None
    config = dataclasses.replace(CONFIG, model=model, objective=ObjectiveConfig(distillation=distillation))
    with pytest.raises(SemidError, match=message):
        train(dataset, catalog, config, out=tmp_path / "m", teacher=teacher)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_codes_are_refused_for_a_model_without():
    for objective in (CHILDREN, ObjectiveConfig(label_smoothing=0.1)):
        GeneratorConfig(model=CODES, objective=objective)
        with pytest.raises(SemidError, match=r"are of codes; SASRec has none: leave them out"):
            GeneratorConfig(model=FAMILIES["sasrec"], objective=objective)


def test_features_are_standardized_chosen_and_absent(dataset):
    assert content_features(dataset, ()) is None
    features = content_features(dataset, ("v",))
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(features.std(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(features, content_features(dataset, None))
    with pytest.raises(SemidError, match="no vector column 'w' in dataset 'circle'"):
        content_features(dataset, ("w",))


def test_counts_are_of_training_alone(dataset):
    train = dataset.splits.train
    expected = np.zeros(ITEMS, int)
    for user in range(len(train)):
        for row in train[user]:
            expected[row] += 1
    np.testing.assert_array_equal(training_counts(dataset), expected)
    assert expected.sum() == len(dataset.item) - 2 * dataset.num_users


@pytest.fixture(scope="module")
def trained(dataset, catalog, tmp_path_factory):
    home = tmp_path_factory.mktemp("generator")
    dataset = dataset.save(home / "dataset")
    config = dataclasses.replace(
        CONFIG, training=TrainingConfig(epochs=60, batch_size=8, validate_every=10, log_every=5)
    )
    return home, config, dataset, train(dataset, catalog, config, out=home / "model", seed=2)


def test_it_learns_the_circle(trained, dataset, catalog):
    _, _, _, recommender = trained
    after = evaluate(recommender, dataset, ks=(1,), beam_size=ITEMS).values["recall@1"]
    spec = recommender.spec
    untrained = Recommender(
        spec.build(seed=2),
        catalog,
        spec=spec,
        items=ItemData(training_counts(dataset), content_features(dataset, None)),
    )
    before = evaluate(untrained, dataset, ks=(1,), beam_size=ITEMS).values["recall@1"]
    assert after > max(before, 0.5) + 0.2


def test_what_is_returned_is_what_was_written(trained):
    home, _, dataset, recommender = trained
    assert sorted(path.name for path in home.iterdir()) == ["dataset", "model"]  # checkpoints are gone
    manifest = artifacts.read_artifact(home / "model", "model")
    assert (manifest.seed, manifest.parents) == (2, {"dataset": dataset.digest, "catalog": recommender.catalog.digest})
    assert manifest.devices == f"{jax.device_count()} x cpu"
    loaded = Recommender.from_pretrained(home / "model")
    histories = [["i1", "i2"], ["i7"], []]
    first, second = (m.recommend(histories, k=4) for m in (recommender, loaded))
    assert first.item_ids == second.item_ids
    np.testing.assert_array_equal(first.scores, second.scores)


def test_the_history_and_its_best_score(trained, dataset):
    """The best validation in the history is what the returned model scores: it, not the last one, was kept."""
    home, _, _, recommender = trained
    records = [json.loads(line) for line in (home / "model" / "history.jsonl").read_text().splitlines()]
    assert {"loss", "gradient_norm", "loss/level_0", "loss/level_1"} <= set().union(*records)
    scores = [record["validation/ndcg@10"] for record in records if "validation/ndcg@10" in record]
    assert len(scores) > 1
    found = evaluate(recommender, dataset, split="validation", ks=(10,), beam_size=20).values["ndcg@10"]
    assert found == pytest.approx(max(scores), abs=1e-6)


def test_validation_searches_with_the_program_of_the_trained_recommender(dataset, catalog, tmp_path):
    config = dataclasses.replace(CONFIG, training=TrainingConfig(epochs=2, batch_size=8), validation_beam=7)
    before = _top._cache_size()
    recommender = train(dataset, catalog, config, out=tmp_path / "model", seed=0)
    evaluate(recommender, dataset, split="validation", ks=(10,), beam_size=7)
    assert _top._cache_size() == before + 1


def test_the_same_request_is_not_trained_again(trained, catalog, caplog):
    caplog.set_level("INFO", "semid")
    home, config, dataset, recommender = trained
    before = (home / "model" / "manifest.json").stat().st_mtime_ns
    again = train(dataset, catalog, config, out=home / "model", seed=2)
    assert "this model exists, made with the same settings and inputs; skipped" in caplog.text
    assert (home / "model" / "manifest.json").stat().st_mtime_ns == before
    assert again.recommend([["i1"]], k=3).item_ids == recommender.recommend([["i1"]], k=3).item_ids
    with pytest.raises(SemidError, match=r"in use by a model of other settings \(seed: 2 -> 3\)"):
        train(dataset, catalog, config, out=home / "model", seed=3)


def test_checkpoints_that_a_kill_left_beside_the_artifact_go(trained, catalog):
    home, config, dataset, _ = trained
    left = home / "model.checkpoints"
    (left / "7").mkdir(parents=True)
    (left / "request.json").write_text("{}")
    train(dataset, catalog, config, out=home / "model", seed=2)
    assert sorted(path.name for path in home.iterdir()) == ["dataset", "model"]


@pytest.mark.parametrize(("factor", "expected"), [(0.0, 1.0), (1.0, 10 / ITEMS)])
def test_validation_counts_items_of_one_code_as_evaluate_does(factor, expected, dataset):
    """All items have one code: where the four of the history are left out, the other eight stand in the first ten."""
    catalog = SemanticCatalog(dataset.item_ids, np.zeros((ITEMS, 2), np.int32), (3, 4))
    spec = ModelSpec(CODES, catalog.level_sizes, ITEMS, 0, max_history=4, repeat_factor=factor)
    model = Recommender(spec.build(seed=0), catalog, spec=spec, items=ItemData(training_counts(dataset)))
    found = validation(dataset, CONFIG, seed=0)(model)
    measured = evaluate(model, dataset, split="validation", ks=(10,), beam_size=CONFIG.validation_beam).values
    assert found == pytest.approx({name: measured[name] for name in found})
    assert found["recall@10"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["max_history", "row_length", "validation_users", "validation_beam"])
def test_sizes_are_checked(name):
    with pytest.raises(SemidError, match=f"^expected {name} of at least 1, got 0$"):
        GeneratorConfig(**{name: 0})
    GeneratorConfig(**{name: 1})


def test_a_catalogue_of_other_items_is_refused_and_one_in_another_order_is_followed(dataset, catalog, tmp_path):
    order = np.arange(ITEMS)[::-1]
    turned = SemanticCatalog(catalog.item_ids.take(pa.array(order)), catalog.codes[order], catalog.level_sizes)
    fewer = SemanticCatalog(catalog.item_ids[:5], catalog.codes[:5], catalog.level_sizes)
    with pytest.raises(SemidError, match="the catalogue's 5 items are not all of the dataset's 12"):
        train(dataset, fewer, CONFIG, out=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    brief = dataclasses.replace(CONFIG, training=TrainingConfig(epochs=1, batch_size=8))
    one, other = (train(dataset, codes, brief) for codes in (catalog, turned))
    assert one.catalog.digest == other.catalog.digest
    np.testing.assert_array_equal(*(model.recommend([["i1"]], k=3).scores for model in (one, other)))
    assert list(tmp_path.iterdir()) == []  # without `out` nothing is written


def test_a_dataset_too_small_to_learn_from_or_to_validate_is_refused(catalog, tmp_path):
    def of_lengths(*lengths: int) -> Dataset:
        rows = [(f"u{user}", f"i{at}", at) for user, length in enumerate(lengths) for at in range(length)]
        users, items, positions = zip(*rows, strict=True)
        table = pa.table({"user_id": users, "item_id": items, "position": positions})
        return Dataset.build(pa.table({"item_id": catalog.item_ids}), table, name="small")

    with pytest.raises(SemidError, match="no training history has two items or more"):
        train(of_lengths(3, 3), catalog, CONFIG, out=tmp_path / "m")
    with pytest.raises(SemidError, match="the validation split has no examples"):
        train(of_lengths(2, 2), catalog, CONFIG, out=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# Catalogues and teachers of another dataset.


def _origin(config: dict | None = None, **parents: str) -> Origin:
    return Origin(Path("made/before"), Manifest("catalog", config or {}, {}, parents))


ALIGNED = {"tokenizer": {"alignment": [{"type": "LetterConfig"}]}}


@pytest.mark.parametrize(
    ("config", "parents", "message"),
    [
        ({}, {"dataset": "0" * 64}, "before: made from dataset digest 0{16}, not .*other_dataset=True .--other-d"),
        ({}, {}, "made from dataset digest unknown, not from this one"),
        (ALIGNED, {"dataset": "0" * 64}, "aligned with interactions that may be test here; tokenize this dataset$"),
        (ALIGNED, {"tokenizer": "0" * 64}, "made from dataset digest unknown.*aligned"),  # files encoded with it
    ],
)
def test_a_catalogue_of_another_dataset_is_refused(dataset, catalog, config, parents, message):
    other = catalog.with_origin(_origin(config, **parents))
    with pytest.raises(SemidError, match=message):
        train(dataset, other, CONFIG)
    if config == ALIGNED:
        with pytest.raises(SemidError, match=message):
            train(dataset, other, CONFIG, other_dataset=True)
    else:
        check_catalog(other, dataset, other_dataset=True)
    check_catalog(catalog.with_origin(_origin(config, dataset=dataset.digest)), dataset)  # control


@pytest.mark.parametrize(
    ("columns", "refused"),
    [(None, "v_smooth"), (["v_smooth"], "v_smooth"), (["v"], None), (["v", "taught"], "taught")],
)
def test_codes_of_vectors_that_interactions_made_are_not_taken_for_another_dataset(
    dataset, catalog, columns, refused, tmp_path
):
    smoothed = add_column(dataset.with_vectors("v", np.eye(ITEMS)), SmoothConfig("v"))
    smoothed.encoders[-1].write(tmp_path)
    files, parents = {"encoders/v_smooth.safetensors": ""}, {"dataset": "0" * 64, "taught": "1" * 64}
    made = Manifest("catalog", {"tokenizer": {"columns": columns}}, files, parents if columns else {})
    other = catalog.with_origin(Origin(tmp_path, made))
    if refused is None:
        check_catalog(other, dataset, other_dataset=True)
        return
    with pytest.raises(SemidError, match=f"its codes read the column '{refused}', .*; tokenize this dataset$"):
        check_catalog(other, dataset, other_dataset=True)


def test_catalogues_that_say_no_dataset_or_the_same_in_another_way_are_taken(dataset, catalog, tmp_path):
    check_catalog(catalog, dataset)  # in memory
    check_catalog(catalog.with_origin(_origin({"tokenizer": {"alignment": []}}, tokenizer="0" * 64)), dataset)
    saved = dataset.replace().save(tmp_path / "dataset")
    before = catalog.with_origin(_origin(dataset=saved.replace().digest))
    check_catalog(before, Dataset.load(tmp_path / "dataset"))  # made before that very dataset was saved
    check_catalog(before.with_origin(_origin(dataset=saved.digest)), saved.with_vectors("t", np.zeros((ITEMS, 2))))
    with pytest.raises(SemidError, match="made from dataset digest"):  # the same items, cut in another way
        check_catalog(before, saved.replace(split_rule=HeldOutItems()))


def test_a_teacher_of_another_dataset_is_refused(dataset, catalog):
    spec = ModelSpec(FAMILIES["sasrec"], (3, 4), ITEMS, 0, max_history=4)
    teacher = Recommender(spec.build(seed=0), catalog, spec=spec, items=ItemData(training_counts(dataset)))
    config = dataclasses.replace(CONFIG, objective=ObjectiveConfig(distillation=1.0))

    def of(digest: str) -> Teacher:
        return as_teacher(teacher.with_origin(_origin(dataset=digest)), config.objective)

    check_teacher(of(dataset.digest), dataset, config)  # control
    with pytest.raises(SemidError, match=r"before: trained on dataset digest 0{16}, not on this one"):
        check_teacher(of("0" * 64), dataset, config)
    teacher.dataset = "0" * 64  # in memory
    with pytest.raises(SemidError, match=r"the teacher: trained on dataset digest 0{16}, not on this one"):
        check_teacher(as_teacher(teacher, config.objective), dataset, config)
    teacher.dataset = dataset.digest
    graph = ItemGraph.fit(dataset)
    other = dataclasses.replace(graph, dataset="0" * 64)
    mixing = dataclasses.replace(CONFIG, objective=ObjectiveConfig(distillation=1.0, teacher_graph=0.5))
    for taught_by, asked in ((None, config), (teacher, mixing)):  # the graph alone, and mixed with the dense model

        def teachers(graph: ItemGraph, taught_by=taught_by, asked=asked) -> Teacher:
            return as_teacher(taught_by or graph, asked.objective, graph=graph)

        check_teacher(teachers(graph), dataset, asked)  # control
        with pytest.raises(SemidError, match=r"the item graph: trained on dataset digest 0{16}, not on this one"):
            check_teacher(teachers(other), dataset, asked)


def test_a_share_of_the_graph_is_of_a_dense_teacher(dataset):
    for weight, teacher in ((1.0, as_teacher(ItemGraph.fit(dataset), ObjectiveConfig())), (0.0, None)):
        objective = ObjectiveConfig(distillation=weight, teacher_graph=0.5)
        with pytest.raises(SemidError, match=r"teacher_graph 0.5 mixes the item graph with a dense teacher \(SASRec\)"):
            check_teacher(teacher, dataset, dataclasses.replace(CONFIG, objective=objective))
