"""Alignments against loops in numpy, what they read of the interactions, and aligned tokenizers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import nnx

from quantizers import Gumbel, Nearest, Schedule, Sinkhorn
from semid import artifacts
from semid.data import Dataset, GlobalTime
from semid.errors import SemidError
from semid.graphs import CM3Config, LightGCNConfig, PpmiConfig, VectorColumn
from semid.tokenizers import (
    RQVAE,
    CooccurrenceConfig,
    DasConfig,
    DistillConfig,
    LetterConfig,
    MatchConfig,
    ProductConfig,
    RQKmeansConfig,
    RQVaeConfig,
    SemanticTokenizer,
    TokenizerConfig,
    tokenization,
    tokenize,
)
from semid.tokenizers.alignment import Signals, base, cooccurrence, das, read_signals
from semid.tokenizers.autoencoder import Tables, autoencoder_loss
from semid.training import OptimizerConfig, StepContext, TrainingConfig, loop, make_mesh, named_leaves

ITEMS, USERS, DIM = 30, 24, 6
METHOD = RQVaeConfig(
    level_sizes=(4, 4),
    hidden=(8,),
    latent=4,
    kmeans_iterations=3,
    training=TrainingConfig(
        epochs=4, batch_size=8, validate_every=1, log_every=1, optimizer=OptimizerConfig(learning_rate=1e-2)
    ),
)
ALL = (LetterConfig(), DistillConfig(), MatchConfig(), CooccurrenceConfig(), DasConfig())
SIGNALS = {
    "ppmi": PpmiConfig(dim=3),
    "lightgcn": LightGCNConfig(dim=3, layers=1, epochs=1, batch_size=16),
    "column": VectorColumn("teacher"),
}


def _histories() -> list[list[int]]:
    """The last two items of a user are validation and test; items 28 and 29 are no one's in training."""
    rng = np.random.default_rng(1)
    lists = [rng.integers(0, 28, rng.integers(4, 9)).tolist() for _ in range(USERS)]
    return [[*rows[:-1], 28 + user % 2] for user, rows in enumerate(lists)]


def _dataset(lists: list[list[int]] | None = None, **more) -> Dataset:
    lists = _histories() if lists is None else lists
    rng = np.random.default_rng(0)
    items = pa.table({"item_id": [f"i{row}" for row in range(ITEMS)]})
    rows = [(f"u{user}", f"i{item}", at) for user, of_user in enumerate(lists) for at, item in enumerate(of_user)]
    names = ("user_id", "item_id", "position")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    dataset = Dataset.build(items, pa.table(columns), name="tiny", **more)
    dataset = dataset.with_vectors("content", rng.normal(size=(ITEMS, DIM)))
    return dataset.with_vectors("teacher", rng.normal(size=(ITEMS, 3)))


def _x() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(ITEMS, DIM)).astype(np.float32)


def _made(lists: list[list[int]], signal) -> dict[str, np.ndarray]:
    found = read_signals(_dataset(lists), ALL, signal, _x(), seed=0)
    return {name: np.asarray(value) for name, value in found._asdict().items()}


@pytest.mark.parametrize("signal", SIGNALS.values(), ids=SIGNALS)
def test_signals_read_training_interactions_and_nothing_later(signal):
    lists = _histories()
    later = [[*rows[:-2], (rows[-2] + 7) % ITEMS, (rows[-1] + 11) % ITEMS] for rows in lists]
    earlier = [[(rows[0] + 1) % 28, *rows[1:]] for rows in lists]
    first, second, third = (_made(changed, signal) for changed in (lists, later, earlier))
    assert set(first) == set(Signals._fields)
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
    for name in set(first) - {"known"} - ({"vectors"} if isinstance(signal, VectorColumn) else set()):
        assert not np.array_equal(third[name], first[name]), name  # the control: a training interaction shows


def test_signals_are_what_their_names_say():
    lists = [rows[:-2] for rows in _histories()]
    found, x = _made(_histories(), VectorColumn("teacher")), _x()
    of_item = [{user for user, rows in enumerate(lists) if item in rows} for item in range(ITEMS)]
    near = [set() for _ in range(ITEMS)]
    for rows in lists:
        for i, left in enumerate(rows):
            near[left] |= {right for j, right in enumerate(rows) if left != right and abs(i - j) <= 5}
    known = np.array([len(users) > 0 for users in of_item])
    np.testing.assert_array_equal(found["known"], known)
    assert 0 < known.sum() < 28 + 1
    teacher = _dataset().vectors("teacher")
    expected = np.where(known[:, None], (teacher - teacher[known].mean(0)) / teacher[known].std(0), 0)
    np.testing.assert_allclose(found["vectors"], expected, atol=1e-5)
    for item in range(ITEMS):
        assert set(found["consumers"][item].tolist()) <= (of_item[item] or {-1})
        assert set(found["partners"][item].tolist()) <= (near[item] or {-1})
    for name, size in (("consumer", USERS), ("partner", ITEMS)):
        drawn = found[f"{name}s"][found[f"{name}s"] >= 0]
        counts = np.bincount(drawn, minlength=size)
        share = np.exp(found[f"{name}_log_share"])
        np.testing.assert_allclose(share[counts > 0], counts[counts > 0] / counts.sum(), rtol=1e-5)
    for name, source in (("users", x), ("user_vectors", expected)):
        means = np.stack([source[sorted(set(rows))].mean(0) for rows in lists])
        np.testing.assert_allclose(found[name], means, atol=1e-5)
    np.testing.assert_allclose(found["log_popularity"], np.log1p([len(users) for users in of_item]), rtol=1e-6)
    np.testing.assert_allclose(found["log_activity"], np.log1p([len(set(rows)) for rows in lists]), rtol=1e-6)


def test_each_alignment_has_what_it_reads_and_no_more():
    def given(*configs) -> set[str]:
        found = read_signals(_dataset(), configs, SIGNALS["ppmi"], _x(), seed=0)
        return {name for name, value in found._asdict().items() if value is not None}

    assert given() == set()
    assert given(LetterConfig()) == given(DistillConfig()) == given(MatchConfig()) == {"known", "vectors"}
    assert given(CooccurrenceConfig()) == {"known", "partners", "partner_log_share"}
    assert given(DasConfig()) == set(Signals._fields)


# One batch: row 3 twice, items 3 and 5 with a partner and a consumer in common, item 11 unknown.
ROWS = np.array([0, 3, 3, 5, 7, 11, 2])


def _tables() -> Tables:
    """12 items and 8 users; three entries an item, of which `draw_entries` takes the column it is told."""
    rng = np.random.default_rng(4)
    partners = rng.integers(0, 11, (12, 3)).astype(np.int32)
    partners[2], partners[3], partners[5], partners[7] = [5, 4, 1], [4, 6, 1], [3, 4, 4], [0, 9, 10]
    consumers = rng.integers(0, 8, (12, 3)).astype(np.int32)
    consumers[3], consumers[5] = [1, 2, 6], [2, 1, 7]
    partners[11] = consumers[11] = -1
    floats = {
        "vectors": (12, 3),
        "partner_log_share": (12,),
        "consumer_log_share": (8,),
        "users": (8, DIM),
        "user_vectors": (8, 3),
    }
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in floats.items()}
    values["vectors"][11] = 0
    values |= {"log_popularity": np.log1p(np.arange(12.0, dtype=np.float32) + 1)}
    values |= {"log_activity": np.log1p(np.arange(8.0, dtype=np.float32) + 3)}
    signals = Signals(known=np.arange(12) != 11, partners=partners, consumers=consumers, **values)
    return jax.tree.map(jnp.asarray, Tables(rng.normal(size=(12, DIM)).astype(np.float32), signals))


def _batch(config, monkeypatch, *, progress: float = 0.5, method: RQVaeConfig = METHOD, none: int = 0):
    """The loss of one batch, its metrics, and all that went into it. The n-th draw takes column n, `none` of a row that
    has no entry."""
    tables = _tables()
    columns = iter(range(3))

    def drawn(table, rows, key):
        column = table[rows, next(columns)]
        return jnp.where(column >= 0, column, none), column >= 0

    for module in (cooccurrence, das):
        monkeypatch.setattr(module, "draw_entries", drawn)
    model = RQVAE(method, dim=DIM, rngs=nnx.Rngs(0))
    model.initialize(np.asarray(tables.x), iterations=3, seed=0)
    module = config.build(method, dim=DIM, signals=tables.signals, seed=1)
    for name in ("interest", "property"):  # not just where they start
        if hasattr(module, name):
            parameter = getattr(module, name)
            parameter[...] = parameter[...] + jnp.asarray(_noise(parameter.shape))
    items = model(tables.x[ROWS])
    context = StepContext(jax.random.key(0), jnp.asarray(progress))
    loss, metrics = module(model, jnp.asarray(ROWS), items, tables, context)
    return float(loss), {name: float(value) for name, value in metrics.items()}, model, module, tables


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(8).normal(size=shape).astype(np.float32)


def _host(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def _linear(layer: nnx.Linear, x: np.ndarray) -> np.ndarray:
    return x @ _host(layer.kernel[...]) + _host(layer.bias[...])


def _quantized(model: RQVAE, x) -> np.ndarray:
    return _host(model.quantizer.decode(model.encode(x)))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _nce(anchors, positives, *, score, keep, is_negative, log_share=None) -> float:
    """Mean over the kept rows of -log of the positive's softmax share among itself and the negatives."""
    losses = []
    for r in np.flatnonzero(keep):
        candidates = [c for c in np.flatnonzero(keep) if c == r or is_negative(r, c)]
        logits = {c: score(anchors[r], positives[c]) - (0 if log_share is None else log_share[c]) for c in candidates}
        losses.append(np.log(sum(np.exp(value) for value in logits.values())) - logits[r])
    return float(np.mean(losses))


def _sharp(temperature: float):
    return lambda a, b: _cosine(a, b) / temperature


def test_letter_is_info_nce_with_the_items_own_vectors(monkeypatch):
    config = LetterConfig(weight=Schedule(0.6, initial=0.2), temperature=0.2)
    loss, metrics, model, module, tables = _batch(config, monkeypatch)
    own = _host(tables.signals.vectors)[ROWS]
    quantized = _linear(module.head, _quantized(model, tables.x[ROWS]))
    options = {"score": _sharp(0.2), "keep": ROWS != 11, "is_negative": lambda r, c: ROWS[r] != ROWS[c]}
    expected = (_nce(quantized, own, **options) + _nce(own, quantized, **options)) / 2
    assert metrics == {"alignment/letter": pytest.approx(expected, rel=1e-4)}
    assert loss == pytest.approx(0.4 * expected, rel=1e-4)  # half way from 0.2 to 0.6


def test_distill_is_the_error_of_the_items_own_vectors(monkeypatch):
    loss, metrics, model, module, tables = _batch(DistillConfig(weight=Schedule(0.5)), monkeypatch)
    rows = ROWS[ROWS != 11]
    quantized = _linear(module.head, _quantized(model, tables.x[rows]))
    expected = np.mean((quantized - _host(tables.signals.vectors)[rows]) ** 2)
    assert metrics == {"alignment/distill": pytest.approx(expected, rel=1e-4)}
    assert loss == pytest.approx(0.5 * expected, rel=1e-4)


def test_match_is_the_error_of_latents_and_of_what_they_decode_to(monkeypatch):
    loss, metrics, model, module, tables = _batch(MatchConfig(Schedule(0.5), 0.25), monkeypatch)
    rows = ROWS[ROWS != 11]
    own = _host(tables.signals.vectors)[rows]
    latent = _linear(module.encoder, own)
    match = np.mean((_quantized(model, tables.x[rows]) - latent) ** 2)
    decoded = np.mean((_linear(module.decoder, latent) - own) ** 2)
    expected = {"alignment/match": match, "alignment/decoded": decoded}
    assert metrics == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}
    assert loss == pytest.approx(0.5 * (match + 0.25 * decoded), rel=1e-4)


def test_cooccurrence_is_info_nce_with_co_consumed_items(monkeypatch):
    config = CooccurrenceConfig(weight=Schedule(0.5), temperature=0.3)
    loss, metrics, model, module, tables = _batch(config, monkeypatch)
    partners = np.asarray(tables.signals.partners)
    drawn = np.maximum(partners[ROWS, 0], 0)
    expected = _nce(
        _linear(module.head, _quantized(model, tables.x[ROWS])),
        _linear(module.head, _quantized(model, tables.x[drawn])),
        score=_sharp(0.3),
        keep=ROWS != 11,
        is_negative=lambda r, c: drawn[c] not in {drawn[r], ROWS[r], *partners[ROWS[r]]},
        log_share=_host(tables.signals.partner_log_share)[drawn],
    )
    assert metrics == {"alignment/cooccurrence": pytest.approx(expected, rel=1e-4)}
    assert loss == pytest.approx(0.5 * expected, rel=1e-4)


def _das_views(model: RQVAE, module, tables: Tables) -> dict[str, float]:
    signals = tables.signals
    consumers, partners = np.asarray(signals.consumers), np.asarray(signals.partners)
    user, other, partner = (
        np.maximum(table[ROWS, column], 0) for column, table in enumerate((consumers, consumers, partners))
    )
    interests, properties = _host(module.interest[...]), _host(module.property[...])
    of_item = _linear(module.item_head, _quantized(model, tables.x[ROWS]))
    of_user = _linear(module.user_head, _quantized(module.users, signals.users[user]))
    had = [set(consumers[row].tolist()) for row in ROWS]
    shares, near = _host(signals.consumer_log_share), [set(partners[row].tolist()) for row in ROWS]
    options = {"score": _sharp(0.25), "keep": ROWS != 11}

    def view(anchors, positives, is_negative, log_share=None):
        return _nce(anchors, positives, is_negative=is_negative, log_share=log_share, **options)

    return {
        "user_to_item": view(of_user, properties[ROWS], lambda r, c: ROWS[r] != ROWS[c] and user[r] not in had[c]),
        "item_to_user": view(
            of_item, interests[user], lambda r, c: user[r] != user[c] and user[c] not in had[r], shares[user]
        ),
        "item_to_own": view(of_item, properties[ROWS], lambda r, c: ROWS[r] != ROWS[c]),
        "user_to_own": view(of_user, interests[user], lambda r, c: user[r] != user[c], shares[user]),
        "item_to_partner": view(
            of_item,
            properties[partner],
            lambda r, c: partner[c] not in {partner[r], ROWS[r], *near[r]},
            _host(signals.partner_log_share)[partner],
        ),
        "user_to_other": view(
            of_user, interests[other], lambda r, c: other[r] != other[c] and other[c] not in had[r], shares[other]
        ),
    }


def _das_sides(module, tables: Tables) -> tuple[float, float]:
    """The click model's loss, and that of popularity kept apart."""
    signals, keep = tables.signals, ROWS != 11
    consumers = np.asarray(signals.consumers)
    user = np.maximum(consumers[ROWS, 0], 0)
    interest, conformity = _host(module.interest[...])[user], _host(module.conformity[...])[user]
    taste, popularity = _host(module.property[...])[ROWS], _host(module.popularity[...])[ROWS]
    click = _nce(
        np.concatenate([interest, conformity], 1),
        np.concatenate([taste, popularity], 1),
        score=lambda a, b: float(a @ b),
        keep=keep,
        is_negative=lambda r, c: ROWS[r] != ROWS[c] and user[r] not in consumers[ROWS[c]],
    )
    of_items = _linear(module.from_popularity, _host(signals.log_popularity)[ROWS][:, None])
    of_users = _linear(module.from_activity, _host(signals.log_activity)[user][:, None])
    sides = ((taste, popularity, of_items), (interest, conformity, of_users))
    debias = 0.0
    for kept_out, bias, observed in sides:
        rows = np.flatnonzero(keep)
        debias += np.mean([1 - _cosine(bias[r], observed[r]) for r in rows])
        debias += np.mean([_cosine(kept_out[r], bias[r]) ** 2 for r in rows])
    return click, debias


def test_das_is_six_views_a_click_model_and_the_users_own_quantizer(monkeypatch):
    config = DasConfig(weight=Schedule(0.3), temperature=0.25, click=0.7, debias=0.4)
    loss, metrics, model, module, tables = _batch(config, monkeypatch)
    views, (click, debias) = _das_views(model, module, tables), _das_sides(module, tables)
    for name, value in {**views, "click": click, "debias": debias}.items():
        assert metrics.pop(f"alignment/{name}") == pytest.approx(value, rel=1e-4), name
    assert not metrics
    users = np.asarray(tables.signals.consumers)[ROWS[ROWS != 11], 0]
    own, _ = autoencoder_loss(module.users, METHOD, module.users(tables.signals.users[users]))
    expected = float(own) + 0.7 * click + 0.4 * debias + 0.3 * sum(views.values())
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("config", [CooccurrenceConfig(), DasConfig()], ids=lambda config: config.name)
def test_what_is_drawn_where_there_is_nothing_to_draw_counts_for_nothing(config, monkeypatch):
    balanced = dataclasses.replace(METHOD, assignments=(Sinkhorn(),), entropy=0.1)
    losses = [_batch(config, monkeypatch, method=balanced, none=none)[0] for none in (0, 6)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_das_moves_the_users_codebooks_where_they_are_moving_averages(monkeypatch):
    moving = dataclasses.replace(METHOD, decay=0.9)
    start = DasConfig().build(moving, dim=DIM, signals=_tables().signals, seed=1)
    module = _batch(DasConfig(), monkeypatch, method=moving)[3]
    for before, after in zip(start.users.quantizer.codebooks, module.users.quantizer.codebooks, strict=True):
        assert not np.allclose(before[...], after[...])


def test_entries_are_drawn_alike_from_each_rows_own():
    table = jnp.asarray([[1, 1, 3], [-1, -1, -1], [2, 0, 2]])
    rows = jnp.asarray(np.repeat([0, 1, 2], 3000))
    drawn, there = base.draw_entries(table, rows, jax.random.key(0))
    drawn = np.asarray(drawn).reshape(3, 3000)
    np.testing.assert_array_equal(np.asarray(there), np.asarray(rows) != 1)
    assert (drawn[1] == 0).all()
    assert np.mean(drawn[0] == 1) == pytest.approx(2 / 3, abs=0.04)
    assert np.mean(drawn[2] == 0) == pytest.approx(1 / 3, abs=0.04)


def test_an_aligned_tokenizer_leaves_the_alignments_behind_and_reports(tmp_path):
    config = TokenizerConfig(METHOD, ("content",), alignment=(LetterConfig(),), signal=SIGNALS["ppmi"])
    dataset = _dataset()
    catalog = tokenize(dataset, config, out=tmp_path / "catalog", seed=0)
    tensors = artifacts.load_tensors(tmp_path / "catalog" / "tokenizer.safetensors")
    assert not [name for name in tensors if "alignments" in name or "head" in name]
    loaded = SemanticTokenizer.from_pretrained(tmp_path / "catalog")
    assert loaded.config == config
    np.testing.assert_array_equal(loaded.encode(dataset.vectors("content")), catalog.codes[:, :-1])
    report = artifacts.read_json(tmp_path / "catalog" / "health.json")["collaborative"]
    assert set(report) == {"codes", "content_only"}
    for found in report.values():
        assert {name: len(values) for name, values in found.items()} == {
            "neighbors_sharing": 2, "popularity_explained": 2, "usage": 2
        }  # fmt: skip
        assert 0 <= found["neighbors_sharing"][1] <= found["neighbors_sharing"][0] <= 1


class Killed(Exception):
    pass


def test_an_aligned_run_that_was_killed_ends_on_the_same_bits(tmp_path, monkeypatch):
    """Noise, usage, clusters and what the alignments train: all of it is in the checkpoints."""
    method = dataclasses.replace(METHOD, diversity=1e-3, assignments=(Nearest(), Gumbel(Schedule(0.1, initial=1.0))))
    some = (LetterConfig(), CooccurrenceConfig())
    config = TokenizerConfig(method, ("content",), alignment=some, signal=SIGNALS["ppmi"])

    def fit(folder):
        mesh = make_mesh(jax.devices()[:1])
        return SemanticTokenizer.fit(_dataset(), config, seed=0, folder=folder, mesh=mesh)

    unbroken = fit(tmp_path / "unbroken")
    put_batch, steps = loop.put_batch, iter(range(100))

    def killing(batch, mesh):
        if next(steps) == 10:  # 4 steps are an epoch, at whose end there is a checkpoint
            raise Killed
        return put_batch(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", killing)
    with pytest.raises(Killed):
        fit(tmp_path / "broken")
    monkeypatch.setattr(loop, "put_batch", put_batch)
    assert (tmp_path / "broken" / "8").is_dir()
    resumed = fit(tmp_path / "broken")
    leaves = [named_leaves(nnx.state(made.model)) for made in (unbroken, resumed)]
    for name, leaf in leaves[0].items():
        np.testing.assert_array_equal(leaves[1][name], leaf, err_msg=name)
    histories = [(tmp_path / name / "history.jsonl").read_text() for name in ("unbroken", "broken")]
    assert histories[0] == histories[1]


def test_what_the_dataset_cannot_give_is_named():
    dataset, x = _dataset(), _x()

    def fails(message: str, *configs, signal=SIGNALS["ppmi"], of: Dataset = dataset) -> None:
        with pytest.raises(SemidError, match=message):
            read_signals(of, configs, signal, x, seed=0)

    fails(
        r"'tiny' has no vector column 'nope' \(it has content, teacher\), nor is that another signal \(alpharec, ",
        LetterConfig(),
        signal=VectorColumn("nope"),
    )
    fails("an alignment is named twice", LetterConfig(), CooccurrenceConfig(), LetterConfig())
    at_once = _dataset(split_rule=GlobalTime())
    at_once = at_once.replace(time=np.full_like(at_once.time, 1_600_000_000), time_unit="seconds")
    for config in ALL:
        fails("training histories hold no interaction", config, of=at_once)
    alone = _dataset([[user] for user in range(ITEMS)])
    fails("no training history holds two different items", CooccurrenceConfig(), of=alone)
    fails("no two different items are within 5 positions", LetterConfig(), of=alone)
    read_signals(alone, (LetterConfig(),), VectorColumn("teacher"), x, seed=0)  # which needs no two items


@pytest.mark.parametrize(
    ("kind", "name", "value", "limit"),
    [
        (LetterConfig, "temperature", 0.0, "above 0"),
        (CooccurrenceConfig, "temperature", -0.1, "above 0"),
        (DasConfig, "debias", -1.0, "of at least 0"),
        (MatchConfig, "reconstruction", np.nan, "of at least 0"),
    ],
)
def test_weights_and_temperatures_that_cannot_train_are_refused(kind, name, value, limit):
    with pytest.raises(SemidError, match=f"^expected {name} {limit}, got {value}$"):
        kind(**{name: value})
    kind(**{name: 0.1})


def test_what_trains_nothing_cannot_be_aligned():
    for method in (RQKmeansConfig((4, 4)), ProductConfig((4, 4))):
        with pytest.raises(SemidError, match=rf"^alignment .--alignment. is for .* and {method.name} does not; take"):
            TokenizerConfig(method, alignment=(LetterConfig(),))


def test_codes_by_a_signal_that_trains_on_absent_content_are_of_another_version(monkeypatch):
    def asked(request, *_, **__):
        raise SemidError(f"version {request.version}")

    monkeypatch.setattr(tokenization, "run_stage", asked)
    dataset = _dataset().with_vectors("bare", np.eye(ITEMS, DIM))
    for column, alignment, version in (
        ("bare", LetterConfig(), 2),
        ("content", LetterConfig(), 1),
        ("bare", CooccurrenceConfig(), 1),  # which reads no signal
    ):
        config = TokenizerConfig(METHOD, ("content",), alignment=(alignment,), signal=CM3Config(column=column))
        with pytest.raises(SemidError, match=f"version {version}"):
            tokenize(dataset, config)
