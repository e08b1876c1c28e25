"""Tokenizers on a tiny catalogue: what they write and read back, and that training and codebook maintenance work."""

import dataclasses
import importlib
import json

import numpy as np
import pyarrow as pa
import pytest
from flax import nnx

from quantizers import (
    Distance,
    GradientPath,
    Nearest,
    OverusedGumbel,
    ProductKMeans,
    ResidualKMeans,
    Sinkhorn,
)
from semid import artifacts
from semid.catalog import Collisions, SemanticCatalog
from semid.data import Dataset
from semid.errors import SemidError
from semid.tokenizers import (
    RQVAE,
    ProductConfig,
    RQKmeansConfig,
    RQVaeConfig,
    SemanticTokenizer,
    TokenizerConfig,
    tokenize,
)
from semid.training import OptimizerConfig, TrainingConfig

ITEMS = 48


def _dataset(
    vectors: np.ndarray | None = None, users: tuple[tuple[int, ...], ...] = ((0, 1, 2),), **more: np.ndarray
) -> Dataset:
    rng = np.random.default_rng(0)
    if vectors is None:  # 8 clusters, so that there is something to learn
        vectors = rng.normal(size=(8, 6))[np.arange(ITEMS) % 8] + 0.3 * rng.normal(size=(ITEMS, 6))
    items = pa.table({"item_id": [f"i{row}" for row in range(len(vectors))]})
    rows = [(f"u{user}", f"i{row}", at) for user, had in enumerate(users) for at, row in enumerate(had)]
    columns = dict(zip(("user_id", "item_id", "position"), map(list, zip(*rows, strict=True)), strict=True))
    dataset = Dataset.build(items, pa.table(columns), name="tiny")
    for column, values in {"content": vectors, **more}.items():
        dataset = dataset.with_vectors(column, values.astype(np.float32))
    return dataset


def _training(epochs: float) -> TrainingConfig:
    return TrainingConfig(
        epochs=epochs, batch_size=16, validate_every=epochs / 2, optimizer=OptimizerConfig(learning_rate=1e-2)
    )


def _rqvae(epochs: float = 30) -> RQVaeConfig:
    return RQVaeConfig(level_sizes=(4, 4), hidden=(8,), latent=4, kmeans_iterations=5, training=_training(epochs))


CONFIGS = {
    "rq-vae": TokenizerConfig(_rqvae()),
    "rq-k-means": TokenizerConfig(RQKmeansConfig((4, 4), iterations=5)),
    "rq-k-means-unit-norm": TokenizerConfig(RQKmeansConfig((4, 4), iterations=5, unit_norm=True)),
    "opq": TokenizerConfig(ProductConfig((4, 4), iterations=5, rotations=3)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def made(request, tmp_path_factory):
    """Dataset, config, catalogue and its folder, for each method."""
    dataset, config = _dataset(), CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    dataset = dataset.save(folder / "dataset")
    catalog = tokenize(dataset, config, out=folder / "catalog", seed=3)
    return dataset, config, catalog, folder / "catalog"


def test_a_tokenizer_that_is_not_finite_is_refused(made):
    tokenizer = SemanticTokenizer.from_pretrained(made[3])
    kind = type(made[1].method).__name__
    assert repr(tokenizer) == f"SemanticTokenizer({kind} 4 x 4, columns {', '.join(tokenizer.columns)})"
    for name, tensor in (tensors := tokenizer.tensors()).items():
        bad = np.full_like(tensor, np.nan) if np.issubdtype(tensor.dtype, np.floating) else tensor
        if bad is not tensor:
            with pytest.raises(SemidError, match=f"^here: tensor '{name}' holds values that are not finite"):
                SemanticTokenizer.from_tensors(made[1], {**tensors, name: bad}, columns=(), where="here")
    # The scale of a dimension that is the same for all items is infinite.
    constant = tensors["standardizer/scale"].copy()
    constant[0] = np.inf
    SemanticTokenizer.from_tensors(made[1], {**tensors, "standardizer/scale": constant}, columns=(), where="here")


def test_the_artifact_holds_what_it_should(made):
    dataset, config, catalog, folder = made
    trained = isinstance(config.method, RQVaeConfig)
    files = {"catalog.parquet", "tokenizer.safetensors", "health.json"} | ({"history.jsonl"} if trained else set())
    manifest = artifacts.read_artifact(folder, "catalog")
    assert set(manifest.files) == files
    assert (manifest.seed, manifest.parents) == (3, {"dataset": dataset.digest})
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
    dataset, config, catalog, folder = made
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
    dataset, _, catalog, folder = made
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


def test_what_is_current_is_not_made_again(made, caplog):
    caplog.set_level("INFO", "semid")
    dataset, config, catalog, folder = made
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = tokenize(dataset, config, out=folder, seed=3)
    assert "this catalog exists, made with the same settings and inputs; skipped" in caplog.text
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    np.testing.assert_array_equal(again.codes, catalog.codes)


def test_checkpoints_that_a_kill_left_beside_the_artifact_go(made):
    dataset, config, _, folder = made
    left = folder.with_name("catalog.checkpoints")
    left.mkdir()
    (left / "request.json").write_text("{}")
    tokenize(dataset, config, out=folder, seed=3)
    assert not left.exists()


def test_a_folder_in_use_names_what_differs(made):
    dataset, config, _, folder = made
    other = dataclasses.replace(config, method=dataclasses.replace(config.method, level_sizes=(5, 5)))
    with pytest.raises(SemidError, match=r"in use by a catalog of other settings \(tokenizer.method.level_sizes: "):
        tokenize(dataset, other, out=folder, seed=3)
    with pytest.raises(SemidError, match=r"\(seed: 3 -> 4\)"):
        tokenize(dataset, config, out=folder, seed=4)
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
    with pytest.raises(SemidError, match=r"^no column was chosen; name some as columns .--columns., or leave them out"):
        SemanticTokenizer.fit(alone, TokenizerConfig(method, ()), seed=0, folder=tmp_path)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_dataset_that_cannot_be_tokenized_leaves_nothing_behind(tmp_path, config):
    bare = _dataset().replace(items=_dataset().items.select(["item_id"]))
    same = _dataset(np.ones((ITEMS, 6)))
    none = r"has no vector columns to tokenize; add one, such as one of texts \(`semid prepare`, or "
    for dataset, message in ((bare, none), (same, "all items have the same vector")):
        with pytest.raises(SemidError, match=message):
            tokenize(dataset, config, out=tmp_path / "catalog")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [(0,), (4, -1)])
@pytest.mark.parametrize("kind", [RQVaeConfig, RQKmeansConfig, ProductConfig])
def test_level_sizes_are_checked(kind, sizes):
    with pytest.raises(SemidError, match="expected level_sizes of at least 1"):
        kind(level_sizes=sizes)
    kind(level_sizes=(4, 4))


@pytest.mark.parametrize("bad", [{"iterations": -1}, {"rotations": -1}])
def test_iterations_are_checked(bad):
    kinds = [ProductConfig] if "rotations" in bad else [ProductConfig, RQKmeansConfig]
    for kind in kinds:
        with pytest.raises(SemidError, match=r"expected (iterations|rotations) of at least 0, got -1"):
            kind(level_sizes=(4, 4), **bad)


def test_product_codes_share_the_dimensions(tmp_path):
    with pytest.raises(SemidError, match=r"product codes have one size, got \(4, 5\)"):
        ProductConfig((4, 5))
    for parts, near in ((4, 3), (5, 6), (7, 6)):
        message = f"{parts} product codes cannot share 6 content dimensions equally; .* such as {near} .--level-sizes 4"
        with pytest.raises(SemidError, match=message):
            SemanticTokenizer.fit(_dataset(), TokenizerConfig(ProductConfig((4,) * parts)), seed=0, folder=tmp_path)
    SemanticTokenizer.fit(_dataset(), TokenizerConfig(ProductConfig((4,) * 6)), seed=0, folder=tmp_path)


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
    with pytest.raises(SemidError, match=r"checkpoints of another run \(tables: "):
        SemanticTokenizer.fit(other, config, seed=0, folder=tmp_path)


def test_k_means_touches_no_checkpoints_of_another_method(tmp_path):
    mine = tmp_path / "catalog.checkpoints"
    mine.mkdir()
    (mine / "history.jsonl").write_text("{}\n")
    tokenize(_dataset(), CONFIGS["rq-k-means"], out=tmp_path / "catalog")
    assert (mine / "history.jsonl").exists()
    assert not (tmp_path / "catalog" / "history.jsonl").exists()


def test_the_history_has_losses_and_health(made):
    _, config, _, folder = made
    if not isinstance(config.method, RQVaeConfig):
        assert not (folder / "history.jsonl").exists()
        return
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    names = set().union(*records)
    assert {"loss", "reconstruction", "codebook", "commitment", "validation/explained"} <= names
    assert {"validation/usage/level_0", "validation/usage/level_1"} <= names


KINDS = {
    "balanced": RQKmeansConfig((4, 3), iterations=5, balanced=True),
    "product": ProductConfig((4, 4, 4), iterations=5, rotations=0),
    "moving": dataclasses.replace(_rqvae(1), decay=0.99),
    "cosine": dataclasses.replace(_rqvae(1), metric=Distance.COSINE, path=GradientPath.ROTATION),
    "sinkhorn": dataclasses.replace(_rqvae(1), assignments=(Nearest(), Sinkhorn()), entropy=1e-2),
    "over-used": dataclasses.replace(
        _rqvae(1), assignments=(OverusedGumbel(),), path=GradientPath.SOFT_BACKWARD, diversity=1e-2
    ),
}


@pytest.mark.parametrize("method", KINDS.values(), ids=KINDS)
def test_every_kind_is_fitted_written_and_read_back(tmp_path, method):
    dataset, config = _dataset(), TokenizerConfig(method)
    catalog = tokenize(dataset, config, out=tmp_path / "catalog")
    loaded = SemanticTokenizer.from_pretrained(tmp_path / "catalog")
    assert loaded.config == config
    np.testing.assert_array_equal(loaded.encode(dataset.vectors("content")), catalog.codes[:, :-1])
    health = artifacts.read_json(tmp_path / "catalog" / "health.json")
    assert loaded.explained(dataset.vectors("content")) == pytest.approx(health["explained_variance"], abs=1e-6)
    if isinstance(method, ProductConfig):
        assert isinstance(loaded.model, ProductKMeans)
        np.testing.assert_array_equal(loaded.model.rotation, np.eye(6))
    else:
        assert health["explained_variance"] > (-0.5 if isinstance(method, RQVaeConfig) else 0.2)
    if isinstance(method, RQKmeansConfig):
        assert np.bincount(catalog.codes[:, 0]).tolist() == [ITEMS // 4] * 4


def test_moving_codebooks_move_and_are_no_parameters(tmp_path):
    """With a decay of all but 1 they stay where k-means put them."""
    books, x = {}, SemanticTokenizer.fit(_dataset(), CONFIGS["rq-k-means"], seed=0, folder=tmp_path).standardizer
    start = RQVAE(_rqvae(), dim=6, rngs=nnx.Rngs(0))
    start.initialize(x(_dataset().vectors("content")), iterations=5, seed=0)
    for decay in (0.5, 0.999999):
        method = dataclasses.replace(_rqvae(1), decay=decay, reseed=False)
        folder = tmp_path / str(decay)
        made = SemanticTokenizer.fit(_dataset(), TokenizerConfig(method), seed=0, folder=folder)
        books[decay] = np.asarray(made.model.quantizer.codebooks[0][...])
        names = {path.name for path in (folder / sorted(p.name for p in folder.glob("[0-9]*"))[-1]).iterdir()}
        assert {"params", "rest"} <= names
    np.testing.assert_allclose(books[0.999999], start.quantizer.codebooks[0][...], atol=1e-3)
    assert np.abs(books[0.5] - books[0.999999]).max() > 0.1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_codebooks_larger_than_the_catalogue_shrink_and_say_so(tmp_path, config):
    if isinstance(config.method, RQVaeConfig):
        method = dataclasses.replace(_rqvae(1), level_sizes=(64, 4))
    else:
        method = dataclasses.replace(config.method, level_sizes=(64, 64))
    dataset = _dataset()
    with pytest.warns(UserWarning, match="48 (items|codes)|level 1 has 1 code"):
        catalog = tokenize(dataset, TokenizerConfig(method), out=tmp_path / "catalog")
    assert catalog.level_sizes[0] == ITEMS
    loaded = SemanticTokenizer.from_pretrained(tmp_path / "catalog")
    assert loaded.level_sizes == catalog.level_sizes[:2]
    np.testing.assert_array_equal(loaded.encode(dataset.vectors("content")), catalog.codes[:, :2])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_first_row_that_is_not_finite_is_named(tmp_path, config):
    if isinstance(config.method, RQVaeConfig):
        config = TokenizerConfig(_rqvae(0.1))
    tokenizer = SemanticTokenizer.fit(_dataset(), config, seed=0, folder=tmp_path)
    for odd in (np.nan, np.inf):
        vectors = _dataset().vectors("content").copy()
        vectors[[7, 30], [2, 0]] = odd
        with pytest.raises(SemidError, match="expected finite content vectors, got NaN or infinity in row 7 of 48"):
            tokenizer.encode(vectors)
    assert tokenizer.encode(vectors[8:30]).shape == (22, 2)


def _resolved(folder, policy: Collisions, *sizes: int, **data):
    """Codes before a policy, the catalogue after it, and the health, of balanced residual k-means."""
    dataset = _dataset(**data)
    config = TokenizerConfig(RQKmeansConfig(sizes, iterations=5, balanced=True), collisions=policy)
    catalog = tokenize(dataset, config, out=folder / policy.value)
    before = SemanticTokenizer.from_pretrained(folder / policy.value).encode(dataset.vectors("content"))
    return before, catalog, artifacts.read_json(folder / policy.value / "health.json")


def _colliding(codes: np.ndarray) -> int:
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    return int(counts[counts > 1].sum())


def test_ties_are_broken_by_popularity_when_asked(tmp_path):
    """Users of one or two interactions only train: item 47 is the most popular one, item 0 the least."""
    users = tuple((row,) for row in range(ITEMS) for _ in range(1 + row // 12))
    before, catalog, _ = _resolved(tmp_path, Collisions.POPULARITY, 2, 4, users=users)
    plain = _resolved(tmp_path, Collisions.TIE_BREAK, 2, 4, users=users)[1]
    np.testing.assert_array_equal(catalog.codes[:, :-1], before)
    assert catalog.tie_break
    assert catalog.level_sizes == plain.level_sizes
    differ = 0
    for group in np.unique(before, axis=0):
        rows = np.flatnonzero((before == group).all(axis=1))
        wanted = sorted(rows.tolist(), key=lambda row: (-(1 + row // 12), row))
        assert catalog.codes[wanted, -1].tolist() == list(range(len(rows)))
        assert plain.codes[rows, -1].tolist() == list(range(len(rows)))
        differ += wanted != rows.tolist()
    assert differ


def test_the_last_level_is_reassigned_at_the_least_cost(tmp_path):
    before, catalog, health = _resolved(tmp_path, Collisions.MIN_COST, 4, 16)
    assert _colliding(before) > 0 == _colliding(catalog.codes)
    assert (catalog.tie_break, catalog.level_sizes) == (False, (4, 16))
    np.testing.assert_array_equal(catalog.codes[:, 0], before[:, 0])
    assert health["collisions"] == "min-cost"
    assert (health["collision_rate_before"], health["collision_rate_after"]) == (_colliding(before) / ITEMS, 0)
    with pytest.raises(SemidError, match=r"12 items share all codes but the last .* the collision policy tie-break"):
        _resolved(tmp_path / "small", Collisions.MIN_COST, 4, 8)
    assert not (tmp_path / "small").exists()


def test_sinkhorn_changes_the_last_level_only(tmp_path):
    before, catalog, health = _resolved(tmp_path, Collisions.SINKHORN, 4, 16)
    assert (catalog.tie_break, catalog.level_sizes) == (False, (4, 16))
    np.testing.assert_array_equal(catalog.codes[:, 0], before[:, 0])
    assert _colliding(catalog.codes) < _colliding(before)
    assert health["collision_rate_after"] == _colliding(catalog.codes) / ITEMS


def test_collisions_may_be_allowed(tmp_path):
    before, catalog, health = _resolved(tmp_path, Collisions.ALLOWED, 4, 4)
    np.testing.assert_array_equal(catalog.codes, before)
    assert (catalog.tie_break, catalog.level_sizes) == (False, (4, 4))
    assert health["collision_rate_before"] == health["collision_rate_after"] == _colliding(before) / ITEMS > 0


@pytest.mark.parametrize("policy", [Collisions.SINKHORN, Collisions.MIN_COST])
def test_product_codes_have_no_last_level_to_move(policy):
    with pytest.raises(SemidError, match="moves the last residual code, and product codes have none"):
        TokenizerConfig(ProductConfig((4, 4)), collisions=policy)
    TokenizerConfig(RQKmeansConfig((4, 4)), collisions=policy)


@pytest.mark.parametrize("config", [CONFIGS["rq-k-means"], TokenizerConfig(_rqvae(1))], ids=["k-means", "rq-vae"])
def test_last_residuals_are_what_the_last_level_quantizes(tmp_path, config):
    tokenizer = SemanticTokenizer.fit(_dataset(), config, seed=0, folder=tmp_path)
    vectors = _dataset().vectors("content")
    x = tokenizer.standardizer(vectors)
    if isinstance(config.method, RQVaeConfig):
        quantizer = tokenizer.model.quantizer
        for layer in (0, 1):  # one hidden layer
            linear = tokenizer.model.encoder[layer]
            x = x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])
            x = np.maximum(x, 0) if layer == 0 else x
    else:
        quantizer = tokenizer.model
    codes = tokenizer.encode(vectors)
    first, last = (np.asarray(book[...]) for book in quantizer.codebooks)
    residuals, book = tokenizer.last_residuals(vectors, codes)
    np.testing.assert_allclose(residuals, x - first[codes[:, 0]], atol=1e-4)
    np.testing.assert_array_equal(book, last)
    nearest = ((residuals[:, None] - last[None]) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(nearest, codes[:, 1])
    if isinstance(config.method, RQVaeConfig):  # the same model, its codes by direction
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, metric=Distance.COSINE))
        unit, units = config.method.last_residuals(tokenizer.model, tokenizer.standardizer(vectors), codes)
        for found, expected in ((unit, residuals), (units, last)):
            lengths = np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(found, expected / lengths, atol=1e-4)


@pytest.mark.parametrize("policy", [Collisions.TIE_BREAK, Collisions.ALLOWED])
def test_many_items_of_equal_content_are_warned_of_where_they_make_a_level(caplog, policy):
    config = TokenizerConfig(RQKmeansConfig((16, 16), iterations=2), collisions=policy)
    vectors = np.random.default_rng(0).normal(size=(1000, 6))
    assert tokenize(_dataset(vectors), config).level_sizes[2:] < (4 * 16,)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    equal = vectors.copy()
    equal[:300] = 9.0
    tokenize(_dataset(equal), config)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    start = "300 items, such as i299, share all codes"
    assert [message[: len(start)] for message in warned] == ([start] if policy.adds_level else [])


@pytest.mark.parametrize("most", [1_000, 5_000_000])
def test_the_collaborative_health_reads_some_users_of_a_large_log(tmp_path, monkeypatch, most):
    rng = np.random.default_rng(0)
    dataset = _dataset(users=tuple(tuple(rng.permutation(ITEMS)[: rng.integers(4, 12)].tolist()) for _ in range(400)))
    monkeypatch.setattr("semid.tokenizers.tokenization._INTERACTIONS", most)
    counted, module = [], importlib.import_module("semid.graphs.cooccurrence")
    cooccurrence = module.cooccurrence

    def recorded(histories, **options):
        counted.append(int(histories.lengths.sum()))
        return cooccurrence(histories, **options)

    monkeypatch.setattr(module, "cooccurrence", recorded)
    tokenize(dataset, CONFIGS["rq-k-means"], out=tmp_path / "catalog")
    health, every = artifacts.read_json(tmp_path / "catalog/health.json"), int(dataset.splits.train.lengths.sum())
    assert every > 1_500
    assert health["collaborative"]["codes"]["neighbors_sharing"][0] > 0
    if most > every:
        assert counted == [every]
        assert "collaborative_interactions" not in health
    else:
        assert counted == [health["collaborative_interactions"]]
        assert 950 < counted[0] <= most
