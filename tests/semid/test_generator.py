"""Training a generator: its losses against plain arithmetic, what it writes, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from semid import artifacts
from semid.catalog import SemanticCatalog
from semid.data.batches import pack
from semid.data.dataset import Dataset
from semid.errors import SemidError
from semid.evaluation import evaluate
from semid.generator import (
    GeneratorConfig,
    code_loss,
    content_features,
    dense_loss,
    train_generator,
    training_counts,
)
from semid.recommender import ItemTables, ModelSpec, Recommender, build_model
from semid.training import StepContext, TrainingConfig
from seq_models import DenseConfig, RQTransformerConfig
from seq_models.layers import TransformerConfig

ITEMS = 12
BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
CODES = RQTransformerConfig(backbone=BACKBONE, depth_dropout=0.0)
CONFIG = GeneratorConfig(
    model=CODES, max_history=4, row_length=6, training=TrainingConfig(epochs=2, batch_size=8, log_every=1)
)


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


@pytest.mark.parametrize("config", [CODES, DenseConfig(backbone=BACKBONE)], ids=["codes", "dense"])
def test_the_loss_is_minus_the_mean_log_probability_of_what_came_next(dataset, catalog, config):
    """Packed rows, one pass: the same number as the recommender's exact scores, prefix after prefix."""
    features = content_features(dataset, None)
    spec = ModelSpec(config, catalog.level_sizes, ITEMS, features.shape[1], max_history=4)
    model = build_model(spec, seed=1)
    counts = training_counts(dataset)
    recommender = Recommender(model, catalog, spec=spec, features=features, train_counts=counts)
    train = dataset.splits.train
    packed = pack(train, max_history=4, row_length=7)
    assert (packed.segments == 0).any()  # there is padding, which must not count
    assert packed.segments.max() > 1  # and there are rows of several histories, which must not see each other
    tables = ItemTables(jnp.asarray(catalog.codes), jnp.asarray(features))
    loss = dense_loss if isinstance(config, DenseConfig) else code_loss
    batch = jax.tree.map(jnp.asarray, packed)
    value, terms = jax.jit(loss)(model, batch, tables, StepContext(jax.random.key(0), jnp.zeros(())))
    names = dataset.item_ids.to_pylist()
    walks = [[names[row] for row in train[user]] for user in range(len(train))]
    pairs = [(walk[:at], walk[at]) for walk in walks for at in range(1, len(walk))]
    scores = recommender.score([history for history, _ in pairs], names)
    expected = -np.mean([scores[index, names.index(target)] for index, (_, target) in enumerate(pairs)])
    assert float(value) == pytest.approx(expected, abs=1e-5)
    if terms:
        assert float(sum(terms.values())) == pytest.approx(float(value), abs=1e-5)


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
    parents = {"dataset": dataset.save(home / "dataset")}
    config = dataclasses.replace(
        CONFIG, training=TrainingConfig(epochs=60, batch_size=8, validate_every=10, log_every=5)
    )
    return home, config, parents, train_generator(dataset, catalog, config, out=home / "model", parents=parents, seed=2)


def test_it_learns_the_circle(trained, dataset, catalog):
    _, _, _, recommender = trained
    after = evaluate(recommender, dataset, ks=(1,), beam_size=ITEMS).values["recall@1"]
    spec = recommender.spec
    untrained = Recommender(
        build_model(spec, seed=2),
        catalog,
        spec=spec,
        features=content_features(dataset, None),
        train_counts=training_counts(dataset),
    )
    before = evaluate(untrained, dataset, ks=(1,), beam_size=ITEMS).values["recall@1"]
    assert after > max(before, 0.5) + 0.2


def test_what_is_returned_is_what_was_written(trained):
    home, _, parents, recommender = trained
    assert sorted(path.name for path in home.iterdir()) == ["dataset", "model"]  # checkpoints are gone
    manifest = artifacts.read_artifact(home / "model", "model")
    assert (manifest.seed, manifest.parents) == (2, {"dataset": parents["dataset"].digest})
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


def test_the_same_request_is_not_trained_again(trained, dataset, catalog, capsys):
    home, config, parents, recommender = trained
    before = (home / "model" / "manifest.json").stat().st_mtime_ns
    again = train_generator(dataset, catalog, config, out=home / "model", parents=parents, seed=2)
    assert "this model exists, made with the same settings and inputs; skipped" in capsys.readouterr().out
    assert (home / "model" / "manifest.json").stat().st_mtime_ns == before
    assert again.recommend([["i1"]], k=3).item_ids == recommender.recommend([["i1"]], k=3).item_ids
    with pytest.raises(SemidError, match=r"in use by a model of other settings \(seed: 2 -> 3\)"):
        train_generator(dataset, catalog, config, out=home / "model", parents=parents, seed=3)


def test_checkpoints_that_a_kill_left_beside_the_artifact_go(trained, dataset, catalog):
    home, config, parents, _ = trained
    left = home / "model.checkpoints"
    (left / "7").mkdir(parents=True)
    (left / "request.json").write_text("{}")
    train_generator(dataset, catalog, config, out=home / "model", parents=parents, seed=2)
    assert sorted(path.name for path in home.iterdir()) == ["dataset", "model"]


@pytest.mark.parametrize("name", ["max_history", "row_length", "validation_users", "validation_beam"])
def test_sizes_are_checked(name):
    with pytest.raises(SemidError, match=f"^expected {name} of at least 1, got 0$"):
        GeneratorConfig(**{name: 0})
    GeneratorConfig(**{name: 1})


def test_a_catalogue_of_other_items_or_another_order_is_refused(dataset, catalog, tmp_path):
    order = np.arange(ITEMS)[::-1]
    turned = SemanticCatalog(catalog.item_ids.take(pa.array(order)), catalog.codes[order], catalog.level_sizes)
    fewer = SemanticCatalog(catalog.item_ids[:5], catalog.codes[:5], catalog.level_sizes)
    for other in (turned, fewer):
        with pytest.raises(
            SemidError, match=f"the catalogue's {len(other)} items are not the dataset's 12 in the same"
        ):
            train_generator(dataset, other, CONFIG, out=tmp_path / "m", parents={})
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_too_small_to_learn_from_or_to_validate_is_refused(catalog, tmp_path):
    def of_lengths(*lengths: int) -> Dataset:
        rows = [(f"u{user}", f"i{at}", at) for user, length in enumerate(lengths) for at in range(length)]
        users, items, positions = zip(*rows, strict=True)
        table = pa.table({"user_id": users, "item_id": items, "position": positions})
        return Dataset.build(pa.table({"item_id": catalog.item_ids}), table, name="small")

    with pytest.raises(SemidError, match="no training history has two items or more"):
        train_generator(of_lengths(3, 3), catalog, CONFIG, out=tmp_path / "m", parents={})
    with pytest.raises(SemidError, match="the validation split has no examples"):
        train_generator(of_lengths(2, 2), catalog, CONFIG, out=tmp_path / "m", parents={})
    assert list(tmp_path.iterdir()) == []
