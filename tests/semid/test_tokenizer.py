"""Tokenizers on a tiny catalogue: what they write and read back, and that training and codebook care do their work."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import nnx

from quantizers import ResidualKMeans
from semid import artifacts
from semid.catalog import SemanticCatalog
from semid.data.dataset import Dataset
from semid.errors import SemidError
from semid.tokenizer import (
    RQVAE,
    RQKmeansConfig,
    RQVaeConfig,
    SemanticTokenizer,
    TokenizerConfig,
    _reseed_hook,
    tokenize,
)
from semid.training import OptimizerConfig, TrainingConfig, make_mesh, named_leaves, with_params
from semid.training.state import create_state, make_optimizer

ITEMS = 48


def _dataset(vectors: np.ndarray | None = None, **more: np.ndarray) -> Dataset:
    rng = np.random.default_rng(0)
    if vectors is None:  # 8 clusters, so that there is something to learn
        vectors = rng.normal(size=(8, 6))[np.arange(ITEMS) % 8] + 0.3 * rng.normal(size=(ITEMS, 6))
    items = pa.table({"item_id": [f"i{row}" for row in range(len(vectors))]})
    interactions = pa.table({"user_id": ["u"] * 3, "item_id": ["i0", "i1", "i2"], "position": [0, 1, 2]})
    dataset = Dataset.build(items, interactions, name="tiny")
    for column, values in {"content": vectors, **more}.items():
        dataset = dataset.with_vectors(column, values.astype(np.float32))
    return dataset


def _training(epochs: float) -> TrainingConfig:
    return TrainingConfig(
        epochs=epochs, batch_size=16, validate_every=epochs / 2, optimizer=OptimizerConfig(learning_rate=1e-2)
    )


def _rqvae(epochs: float = 30) -> RQVaeConfig:
    return RQVaeConfig(level_sizes=(4, 4), hidden=(8,), latent=4, kmeans_iterations=5, training=_training(epochs))


CONFIGS = {"rq-vae": TokenizerConfig(_rqvae()), "rq-k-means": TokenizerConfig(RQKmeansConfig((4, 4), iterations=5))}


@pytest.fixture(scope="module", params=CONFIGS)
def made(request, tmp_path_factory):
    """Dataset, config, catalogue and its folder, for each method."""
    dataset, config = _dataset(), CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    parents = {"dataset": dataset.save(folder / "dataset")}
    catalog = tokenize(dataset, config, out=folder / "catalog", parents=parents, seed=3)
    return dataset, config, catalog, folder / "catalog", parents


def test_the_artifact_holds_what_it_should(made):
    dataset, config, catalog, folder, parents = made
    trained = isinstance(config.method, RQVaeConfig)
    files = {"catalog.parquet", "tokenizer.safetensors", "health.json"} | ({"history.jsonl"} if trained else set())
    manifest = artifacts.read_artifact(folder, "catalog")
    assert set(manifest.files) == files
    assert (manifest.seed, manifest.parents) == (3, {"dataset": parents["dataset"].digest})
    assert sorted(path.name for path in folder.parent.iterdir()) == ["catalog", "dataset"]  # no checkpoints left
    read = SemanticCatalog.read(folder / "catalog.parquet")
    assert read.item_ids.equals(dataset.item_ids)
    assert read.tie_break
    np.testing.assert_array_equal(read.codes, catalog.codes)


def test_codes_are_unique_and_the_last_level_only_breaks_ties(made):
    codes = made[2].codes
    assert len(np.unique(codes, axis=0)) == ITEMS
    for group in np.unique(codes[:, :-1], axis=0):
        members = codes[(codes[:, :-1] == group).all(axis=1)]
        assert members[:, -1].tolist() == list(range(len(members)))


def test_a_tokenizer_that_was_loaded_encodes_as_before(made):
    dataset, config, catalog, folder, _ = made
    loaded = SemanticTokenizer.from_pretrained(folder)
    assert loaded.config == config
    assert loaded.level_sizes == catalog.level_sizes[:-1]
    vectors = dataset.vectors("content")
    np.testing.assert_array_equal(loaded.encode(vectors), catalog.codes[:, :-1])
    one_by_one = [loaded.encode(vectors[row : row + 1])[0] for row in range(3)]
    np.testing.assert_array_equal(one_by_one, catalog.codes[:3, :-1])
    with pytest.raises(SemidError, match="expected content vectors of 6 dimensions, got 5"):
        loaded.encode(vectors[:, :5])


def test_health_is_a_recount_of_the_codes(made):
    dataset, _, catalog, folder, _ = made
    health = artifacts.read_json(folder / "health.json")
    assert health["items"] == ITEMS
    for level, entry in enumerate(health["levels"]):
        counts = np.bincount(catalog.codes[:, level], minlength=catalog.level_sizes[level])
        assert (entry["level"], entry["size"], entry["counts"]) == (level, len(counts), counts.tolist())
        assert (entry["used"], entry["dead"]) == ((counts > 0).sum(), (counts == 0).sum())
        share = counts[counts > 0] / ITEMS
        assert entry["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    groups = np.unique(catalog.codes[:, :-1], axis=0, return_counts=True)[1]
    assert health["collision_rate_before"] == pytest.approx(groups[groups > 1].sum() / ITEMS)
    assert health["largest_group_before"] == groups.max() == catalog.level_sizes[-1]
    assert health["collision_rate_after"] == 0
    x = SemanticTokenizer.from_pretrained(folder)
    assert health["explained_variance"] == pytest.approx(x.explained(dataset.vectors("content")))


def test_what_is_current_is_not_made_again(made, capsys):
    dataset, config, catalog, folder, parents = made
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = tokenize(dataset, config, out=folder, parents=parents, seed=3)
    assert "this catalog exists, made with the same settings and inputs; skipped" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    np.testing.assert_array_equal(again.codes, catalog.codes)


def test_checkpoints_that_a_kill_left_beside_the_artifact_go(made):
    dataset, config, _, folder, parents = made
    left = folder.with_name("catalog.checkpoints")
    left.mkdir()
    (left / "request.json").write_text("{}")
    tokenize(dataset, config, out=folder, parents=parents, seed=3)
    assert left.exists() == isinstance(config.method, RQKmeansConfig)  # which writes none: they are another's
    shutil.rmtree(left, ignore_errors=True)


def test_a_folder_in_use_names_what_differs(made):
    dataset, config, _, folder, parents = made
    other = dataclasses.replace(config, method=dataclasses.replace(config.method, level_sizes=(4, 5)))
    with pytest.raises(SemidError, match=r"in use by a catalog of other settings \(tokenizer.method.level_sizes: "):
        tokenize(dataset, other, out=folder, parents=parents, seed=3)
    with pytest.raises(SemidError, match=r"\(seed: 3 -> 4\)"):
        tokenize(dataset, config, out=folder, parents=parents, seed=4)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["catalog", "dataset"]


def test_training_explains_more_than_no_training(tmp_path):
    dataset = _dataset()
    x = dataset.vectors("content")
    explained = {}
    for epochs in (30.0, 0.1):  # the control takes one step
        config = TokenizerConfig(_rqvae(epochs))
        tokenizer = SemanticTokenizer.fit(dataset, config, seed=0, folder=tmp_path / str(epochs))
        explained[epochs] = tokenizer.explained(x)
    assert explained[30.0] > explained[0.1] + 0.3


def test_explained_variance_is_that_of_the_reconstruction(tmp_path):
    dataset = _dataset()
    tokenizer = SemanticTokenizer.fit(dataset, CONFIGS["rq-k-means"], seed=0, folder=tmp_path)
    assert isinstance(tokenizer.model, ResidualKMeans)
    x, books = tokenizer.standardizer(dataset.vectors("content")), [np.asarray(b) for b in tokenizer.model.codebooks]
    codes = tokenizer.encode(dataset.vectors("content"))
    rebuilt = books[0][codes[:, 0]] + books[1][codes[:, 1]]
    assert tokenizer.explained(dataset.vectors("content")) == pytest.approx(
        1 - ((x - rebuilt) ** 2).sum() / (x**2).sum()
    )


def test_the_seed_decides_the_codes(tmp_path):
    dataset, config = _dataset(), TokenizerConfig(_rqvae(2))
    codes = [
        SemanticTokenizer.fit(dataset, config, seed=seed, folder=tmp_path / str(run)).encode(dataset.vectors("content"))
        for run, seed in enumerate((0, 0, 1))
    ]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert not np.array_equal(codes[0], codes[2])


def _reseeded(step: int):
    """A state whose code 1 of level 0 is out of reach and whose moments are 7, before and after the hook at `step`."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ITEMS, 6)), jnp.float32)
    model = RQVAE(_rqvae(), dim=6, rngs=nnx.Rngs(0))
    model.quantizer.codebooks[0][...] = model.quantizer.codebooks[0][...].at[1].set(1e3)
    state = create_state(model, make_optimizer(OptimizerConfig(), num_steps=10), make_mesh(jax.devices()[:1]))
    moments = jax.tree.map(lambda m: jnp.full_like(m, 7) if m.ndim else m, state.opt_state)
    state = dataclasses.replace(state, opt_state=moments)
    return model, x, state, _reseed_hook(model, x, every=3, seed=0)(step, state, {})


def test_dead_codes_are_revived_and_their_moments_zeroed():
    model, x, before, after = _reseeded(step=3)
    old, new = named_leaves(before), named_leaves(after)
    used = [set(np.asarray(with_params(model, state.params).encode(x))[:, 0].tolist()) for state in (before, after)]
    assert 1 not in used[0]
    assert 1 in used[1]  # it now stands on an item's own latent, which no other code is nearer to
    name = "params/quantizer/codebooks/0"
    dead = [code for code in range(4) if code not in used[0]]
    for code in range(4):
        assert np.array_equal(old[name][code], new[name][code]) == (code not in dead)
    moments = [key for key in old if key.startswith("opt_state") and key.endswith("quantizer/codebooks/0")]
    assert len(moments) == 2  # first and second moment
    for key in moments:
        expected = [0.0 if code in dead else 7.0 for code in range(4)]
        np.testing.assert_array_equal(
            np.asarray(new[key]), np.repeat(np.array(expected, np.float32)[:, None], 4, axis=1)
        )
    codebooks = {key for key in old if "quantizer/codebooks" in key}
    for key in set(old) - codebooks:
        np.testing.assert_array_equal(np.asarray(old[key]), np.asarray(new[key]), err_msg=key)


def test_between_epochs_nothing_is_reseeded():
    _, _, before, after = _reseeded(step=2)
    assert after is before


def test_columns_are_chosen_by_name(tmp_path):
    """Three methods of saying the same: the only column, that column of two, and not the other one."""
    rng = np.random.default_rng(1)
    alone = _dataset()
    both = _dataset(alone.vectors("content"), other=rng.normal(size=(ITEMS, 3)))
    method = CONFIGS["rq-k-means"].method

    def codes(dataset: Dataset, *columns: str) -> np.ndarray:
        config = TokenizerConfig(method, columns or None)
        vectors = np.concatenate([dataset.vectors(c) for c in columns or dataset.vector_columns], axis=1)
        return SemanticTokenizer.fit(dataset, config, seed=0, folder=tmp_path).encode(vectors)

    np.testing.assert_array_equal(codes(both, "content"), codes(alone))
    assert not np.array_equal(codes(both), codes(alone))
    with pytest.raises(SemidError, match="no vector column 'nope' in dataset 'tiny'"):
        SemanticTokenizer.fit(alone, TokenizerConfig(method, ("nope",)), seed=0, folder=tmp_path)
    with pytest.raises(SemidError, match=r"^no column was chosen; name some after --columns, or leave it out"):
        SemanticTokenizer.fit(alone, TokenizerConfig(method, ()), seed=0, folder=tmp_path)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_dataset_that_cannot_be_tokenized_leaves_nothing_behind(tmp_path, config):
    bare = _dataset().replace(items=_dataset().items.select(["item_id"]))
    same = _dataset(np.ones((ITEMS, 6)))
    for dataset, message in ((bare, "has no vector columns to tokenize"), (same, "all items have the same vector")):
        with pytest.raises(SemidError, match=message):
            tokenize(dataset, config, out=tmp_path / "catalog", parents={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [(), (0,), (4, -1)])
@pytest.mark.parametrize("kind", [RQVaeConfig, RQKmeansConfig])
def test_level_sizes_are_checked(kind, sizes):
    with pytest.raises(SemidError, match="expected at least one level, and sizes of at least 1"):
        kind(level_sizes=sizes)


def test_imported_codes_have_no_tokenizer(tmp_path):
    with artifacts.write_artifact(tmp_path / "catalog", kind="catalog", config={"imported": "x"}) as folder:
        SemanticCatalog(pa.array(["a"]), np.zeros((1, 1), np.int32), (1,)).write(folder / "catalog.parquet")
    with pytest.raises(SemidError, match="its codes were imported, there is no tokenizer"):
        SemanticTokenizer.from_pretrained(tmp_path / "catalog")


def test_an_interrupted_run_is_not_continued_on_other_vectors(tmp_path):
    config = TokenizerConfig(_rqvae(1))
    SemanticTokenizer.fit(_dataset(), config, seed=0, folder=tmp_path)  # its checkpoints stay: tokenize removes them
    SemanticTokenizer.fit(_dataset(), config, seed=0, folder=tmp_path)
    other = _dataset(np.random.default_rng(9).normal(size=(ITEMS, 6)))
    with pytest.raises(SemidError, match=r"checkpoints of another run \(vectors: "):
        SemanticTokenizer.fit(other, config, seed=0, folder=tmp_path)


def test_k_means_touches_no_checkpoints_of_another_method(tmp_path):
    mine = tmp_path / "catalog.checkpoints"
    mine.mkdir()
    (mine / "history.jsonl").write_text("{}\n")
    tokenize(_dataset(), CONFIGS["rq-k-means"], out=tmp_path / "catalog", parents={})
    assert (mine / "history.jsonl").exists()
    assert not (tmp_path / "catalog" / "history.jsonl").exists()


def test_the_history_has_losses_and_health(made):
    _, config, _, folder, _ = made
    if not isinstance(config.method, RQVaeConfig):
        assert not (folder / "history.jsonl").exists()
        return
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    names = set().union(*records)
    assert {"loss", "reconstruction", "codebook", "commitment", "validation/explained"} <= names
    assert {"validation/usage/level_0", "validation/usage/level_1"} <= names
