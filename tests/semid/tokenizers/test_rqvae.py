"""The RQ-VAE's losses against numpy, the reach of an alignment's gradients, and codebook maintenance."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxprs import equations, precisions

from quantizers import Codebook, Distance, GradientPath, Gumbel, Nearest, Schedule, Sinkhorn
from semid.errors import SemidError
from semid.tokenizers import RQVAE, AlignedRQVAE, ItemRows, RQVaeConfig, map_blocks, reseeding, train_autoencoder
from semid.tokenizers.alignment import Alignment
from semid.tokenizers.autoencoder import Tables, autoencoder_loss
from semid.tokenizers.method import explained_variance
from semid.tokenizers.rqvae import joint_loss, maintain_codebooks
from semid.training import (
    OptimizerConfig,
    StepContext,
    TrainingConfig,
    TrainStep,
    create_state,
    make_mesh,
    make_optimizer,
    named_leaves,
    with_variables,
)

ITEMS, DIM = 48, 6
X = np.random.default_rng(0).normal(size=(ITEMS, DIM)).astype(np.float32)
SMALL = RQVaeConfig(
    level_sizes=(4, 6),
    hidden=(8,),
    latent=4,
    kmeans_iterations=5,
    training=TrainingConfig(epochs=2, batch_size=16, optimizer=OptimizerConfig(learning_rate=1e-2)),
)
ROWS = ItemRows(jnp.asarray([3, 11, 4, 40, 7, 7, 0, 25]))
TABLES = Tables(jnp.asarray(X), None)


def _config(**changes) -> RQVaeConfig:
    return dataclasses.replace(SMALL, **changes)


def _model(config: RQVaeConfig = SMALL) -> RQVAE:
    model = RQVAE(config, dim=DIM, rngs=nnx.Rngs(0))
    model.initialize(X, iterations=config.kmeans_iterations, seed=0)
    return model


def _context(progress: float = 0.5) -> StepContext:
    return StepContext(jax.random.key(5), jnp.asarray(progress))


class Pull(Alignment):
    """Stands for an alignment: the mean square of the quantized vectors, scaled by something trained along."""

    def __init__(self, weight: float) -> None:
        self.weight, self.scale = weight, nnx.Param(jnp.asarray(2.0))

    def __call__(self, model, rows, items, tables, context):
        loss = self.scale[...] * jnp.square(items.quantized.vectors).mean()
        return self.weight * loss, {"pull": loss}


def _mlp(layers: nnx.List, x: np.ndarray) -> np.ndarray:
    for index, layer in enumerate(layers):
        x = x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)
        x = np.maximum(x, 0) if index < len(layers) - 1 else x
    return x


def _by_hand(model: RQVAE, x: np.ndarray) -> dict:
    """Every part of the loss in float64 loops over levels."""
    latents = _mlp(model.encoder, x.astype(np.float64))
    residual, total, error, shares, codes = latents, np.zeros_like(latents), 0.0, [], []
    for book in model.quantizer.codebooks:
        book = np.asarray(book[...], np.float64)
        squares = ((residual[:, None] - book[None]) ** 2).sum(-1)
        share = np.exp(-squares)
        shares.append(share / share.sum(-1, keepdims=True))
        codes.append(squares.argmin(-1))
        chosen = book[codes[-1]]
        error += ((residual - chosen) ** 2).mean()
        residual, total = residual - chosen, total + chosen
    reconstruction = ((_mlp(model.decoder, total) - x) ** 2).mean()
    return {"reconstruction": reconstruction, "error": error, "shares": shares, "codes": codes}


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_loss_is_reconstruction_codebook_and_commitment(decay):
    config = _config(decay=decay, commitment=0.3)
    model = _model(config)
    loss, metrics = autoencoder_loss(model, config, model(jnp.asarray(X)))
    wanted = _by_hand(model, X)
    parts = 1.3 if decay is None else 0.3  # moving averages are not learned by gradient
    assert float(loss) == pytest.approx(wanted["reconstruction"] + parts * wanted["error"], rel=1e-5)
    assert set(metrics) == {"reconstruction", "codebook", "commitment"}
    for name, value in {"reconstruction": wanted["reconstruction"], "commitment": wanted["error"]}.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5)


def test_entropy_and_diversity_are_added_by_their_weights():
    plain, model = _model(), _model()
    for level, clusters in enumerate(model.clusters):
        clusters[...] = jnp.asarray(np.arange(SMALL.level_sizes[level]) % 2)
    passed, wanted = model(jnp.asarray(X)), _by_hand(model, X)
    base, _ = autoencoder_loss(plain, SMALL, passed)
    entropy = sum((p * np.log(p)).sum() for p in (share.mean(0) for share in wanted["shares"]))
    loss, _ = autoencoder_loss(model, _config(entropy=0.7), passed)
    assert float(loss) == pytest.approx(float(base) + 0.7 * entropy, rel=1e-5)

    diversity = 0.0
    for book, clusters, codes in zip(model.quantizer.codebooks, model.clusters, wanted["codes"], strict=True):
        book, clusters = np.asarray(book[...], np.float64), np.asarray(clusters[...])
        for code in codes:
            others = [c for c in range(len(book)) if c != code]
            logits = book[others] @ book[code]
            log_shares = logits - np.log(np.exp(logits).sum())
            mates = [log_shares[at] for at, c in enumerate(others) if clusters[c] == clusters[code]]
            diversity -= np.mean(mates) / len(codes)
    loss, _ = autoencoder_loss(model, _config(diversity=0.2), passed)
    assert float(loss) == pytest.approx(float(base) + 0.2 * diversity, rel=1e-5)


def test_rows_outside_the_mask_count_for_nothing():
    config = _config(assignments=(Sinkhorn(),), entropy=0.7, diversity=0.2)
    model, keep = _model(config), np.arange(ITEMS) % 3 > 0
    for level, clusters in enumerate(model.clusters):
        clusters[...] = jnp.asarray(np.arange(SMALL.level_sizes[level]) % 2)
    masked = model(jnp.asarray(X), mask=jnp.asarray(keep))
    alone, whole = (model(jnp.asarray(x)) for x in (X[keep], X))
    np.testing.assert_array_equal(masked.found.codes[keep], alone.found.codes)
    assert not np.array_equal(whole.found.codes[keep], alone.found.codes)  # the control
    losses = (jax.tree.leaves(autoencoder_loss(model, config, passed)) for passed in (masked, alone))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def _gradients(config: RQVaeConfig, *alignments: Alignment):
    """Loss, metrics and the gradients by name, of one batch."""
    model = AlignedRQVAE(_model(config), alignments)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def compute(params):
        current = nnx.merge(graph, params, rest, copy=True)
        return joint_loss(current, ROWS, TABLES, _context(), config=config)

    (loss, metrics), gradients = jax.jit(jax.value_and_grad(compute, has_aux=True))(params)
    return float(loss), metrics, {name: np.asarray(leaf) for name, leaf in named_leaves(gradients).items()}


@pytest.mark.parametrize("path", [GradientPath.STRAIGHT_THROUGH, GradientPath.SOFT_BACKWARD, GradientPath.SOFT])
def test_an_alignments_gradient_reaches_the_encoder_and_on_soft_paths_the_codebooks(path):
    """Straight through, codebooks follow the encoder by the codebook loss alone."""
    config = _config(path=path)
    base, _, alone = _gradients(config)
    loss, metrics, aligned = _gradients(config, Pull(3.0))
    assert loss == pytest.approx(base + 3 * float(metrics["pull"]), rel=1e-6)
    changed = {name for name in alone if not np.allclose(alone[name], aligned[name], rtol=1e-4, atol=1e-9)}
    encoder = {name for name in alone if "/encoder/" in name}
    books = {name for name in alone if "/codebooks/" in name}
    decoder = {name for name in alone if "/decoder/" in name}
    assert [len(encoder), len(books), len(decoder)] == [4, 2, 4]
    assert changed == encoder | (set() if path is GradientPath.STRAIGHT_THROUGH else books)
    assert aligned["alignments/0/scale"] == pytest.approx(1.5 * float(metrics["pull"]))


def test_an_alignment_of_weight_zero_changes_no_gradient():
    noisy = _config(assignments=(Gumbel(Schedule(3.0)),))  # the search's noise must be the same too
    base, _, alone = _gradients(noisy)
    loss, metrics, aligned = _gradients(noisy, Pull(0.0), Pull(0.0))
    assert loss == base
    assert "pull" in metrics
    for name in alone:
        np.testing.assert_array_equal(aligned[name], alone[name], err_msg=name)


def test_every_step_observes_usage_and_progress_reaches_the_assignment():
    still = _model()
    model = AlignedRQVAE(_model(_config(assignments=(Gumbel(Schedule(0.0, initial=1e3)),))), ())
    codes = {}
    for progress in (0.0, 1.0):
        before = [np.asarray(usage[...]) for usage in model.autoencoder.quantizer.usage]
        passed = model.autoencoder(TABLES.x[ROWS.rows], key=_search_key(), progress=jnp.asarray(progress))
        joint_loss(model, ROWS, TABLES, _context(progress), config=SMALL)
        codes[progress] = np.asarray(passed.found.codes)
        for level, usage in enumerate(model.autoencoder.quantizer.usage):
            shares = np.bincount(codes[progress][:, level], minlength=SMALL.level_sizes[level]) / len(ROWS.rows)
            np.testing.assert_allclose(usage[...], 0.99 * before[level] + 0.01 * shares, rtol=1e-5)
    nearest = np.asarray(still.encode(TABLES.x[ROWS.rows]))
    assert not np.array_equal(codes[0.0], nearest)  # nothing but noise at the start
    np.testing.assert_array_equal(codes[1.0], nearest)  # and none at the end


def _search_key():
    """The key that `joint_loss` gives to the search of `_context`'s step."""
    return jax.random.split(_context().key, 1)[0]


def test_without_iterations_codebooks_stay_random():
    raw, fitted = RQVAE(SMALL, dim=DIM, rngs=nnx.Rngs(0)), _model()
    untouched = _model(_config(kmeans_iterations=0))
    for a, b, c in zip(raw.quantizer.codebooks, untouched.quantizer.codebooks, fitted.quantizer.codebooks, strict=True):
        np.testing.assert_array_equal(a[...], b[...])
        assert not np.allclose(a[...], c[...])


def test_the_reconstruction_of_codes_and_blocks_of_rows():
    model = _model()
    codes = map_blocks(model.encode, X)
    np.testing.assert_array_equal(codes, np.stack(_by_hand(model, X)["codes"], 1))
    rebuilt = map_blocks(model.decode, codes)
    total = sum(np.asarray(b[...])[codes[:, level]] for level, b in enumerate(model.quantizer.codebooks))
    np.testing.assert_allclose(rebuilt, _mlp(model.decoder, total), rtol=1e-4, atol=1e-5)
    assert explained_variance(X, X) == 1
    assert explained_variance(X, np.zeros_like(X)) == pytest.approx(0)


def _cared(config: RQVaeConfig, *, step: int):
    """A state before and after the hook at `step`, its moments 7: code 1 of level 0 repeats code 0, which wins ties."""
    autoencoder = _model(config)
    book = autoencoder.quantizer.codebooks[0]
    book[...] = book[...].at[1].set(book[...][0])
    model = AlignedRQVAE(autoencoder, [Pull(1.0)])
    state = create_state(model, make_optimizer(OptimizerConfig(), num_steps=10), make_mesh(jax.devices()[:1]))
    moments = jax.tree.map(lambda m: jnp.full_like(m, 7) if m.ndim else m, state.opt_state)
    state = dataclasses.replace(state, opt_state=moments)
    after = maintain_codebooks(model, jnp.asarray(X), config, every=3, seed=0)(step, state, {})
    return model, state, after


def _codes(model: AlignedRQVAE, state) -> np.ndarray:
    return np.asarray(with_variables(model, state.params, state.rest).autoencoder.encode(jnp.asarray(X)))


@pytest.mark.parametrize("changes", [{}, {"metric": Distance.COSINE}, {"decay": 0.99}], ids=["", "cosine", "moving"])
def test_dead_codes_are_revived_and_their_moments_zeroed(changes):
    model, before, after = _cared(_config(**changes), step=3)
    used = set(_codes(model, before)[:, 0].tolist())
    assert 1 not in used
    dead = [code for code in range(4) if code not in used]
    assert set(dead) <= set(_codes(model, after)[:, 0].tolist())  # each stands on an item's own latent
    old, new = named_leaves(before), named_leaves(after)
    place = "rest" if "decay" in changes else "params"
    name = f"{place}/autoencoder/quantizer/codebooks/0"
    for code in range(4):
        assert np.array_equal(old[name][code], new[name][code]) == (code not in dead)
    moments = [key for key in old if key.startswith("opt_state") and key.endswith("quantizer/codebooks/0")]
    assert len(moments) == (0 if "decay" in changes else 2)
    for key in moments:
        expected = np.array([0.0 if code in dead else 7.0 for code in range(4)], np.float32)
        np.testing.assert_array_equal(new[key], np.repeat(expected[:, None], 4, axis=1))
    for key in set(old) - {key for key in old if "quantizer/codebooks" in key}:
        np.testing.assert_array_equal(old[key], new[key], err_msg=key)


@pytest.mark.parametrize(
    ("optimizer", "zeroed"),
    [(optax.lion(1e-3), 1), (optax.adafactor(min_dim_size_to_factor=2), 0), (optax.contrib.muon(1e-3), 1)],
    ids=["lion", "adafactor", "muon"],
)
def test_codes_are_revived_under_any_optimizer(optimizer, zeroed):
    autoencoder = _model(SMALL)
    book = autoencoder.quantizer.codebooks[0]
    book[...] = book[...].at[1].set(book[...][0])
    model = AlignedRQVAE(autoencoder, [])
    state = create_state(model, optimizer, make_mesh(jax.devices()[:1]))
    state = dataclasses.replace(state, opt_state=jax.tree.map(lambda m: jnp.full_like(m, 7), state.opt_state))
    after = reseeding(model, SMALL, seed=0)(state, jnp.asarray(X))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    old, new = named_leaves(state.opt_state), named_leaves(after.opt_state)
    changed = [name for name in old if not np.array_equal(old[name], new[name])]
    assert len([name for name in changed if name.endswith("autoencoder/quantizer/codebooks/0")]) == zeroed
    assert all("autoencoder/quantizer/codebooks" in name for name in changed)


def test_no_table_of_all_items_and_codes_is_made_to_revive_codes():
    items, config = 2**18, _config(level_sizes=(64, 64), kmeans_iterations=0)
    model = AlignedRQVAE(_model(config), [])
    state = create_state(model, make_optimizer(OptimizerConfig(), num_steps=10), make_mesh(jax.devices()[:1]))
    traced = reseeding(model, config, seed=0).trace(state, jax.ShapeDtypeStruct((items, DIM), jnp.float32))
    made = [math.prod(array.aval.shape) for equation in equations(traced.jaxpr.jaxpr) for array in equation.outvars]
    assert max(made) == items * config.latent * 2  # the residuals of both levels


def test_codes_that_last_are_made_by_float32_products_and_training_is_not():
    model, x = _model(), jnp.asarray(X)
    for exact in (model.encode, model.exact_latents):
        assert precisions(exact, x) == {jax.lax.Precision.HIGHEST}
    assert precisions(model.latents, x) == {None}
    np.testing.assert_array_equal(model.latents(x), model.exact_latents(x))


def test_codebooks_are_found_by_their_type():
    model = _model(SMALL)
    found = named_leaves(nnx.state(model, Codebook))
    assert set(found) == {"quantizer/codebooks/0", "quantizer/codebooks/1"}
    assert not named_leaves(nnx.state(_model(_config(decay=0.9)), Codebook))  # moving averages learn by no gradient


def test_between_epochs_at_the_last_step_and_without_care_nothing_changes():
    for config, step in ((SMALL, 2), (SMALL, 6), (_config(diversity=1e-4), 4), (_config(reseed=False), 3)):
        _, before, after = _cared(config, step=step)
        assert after is before


def test_codes_are_clustered_for_diversity_once_an_epoch():
    _, before, after = _cared(_config(level_sizes=(4, 25), reseed=False, diversity=1e-4), step=3)
    old, new = named_leaves(before), named_leaves(after)
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == {f"rest/autoencoder/clusters/{level}" for level in (0, 1)}
    sizes = [np.bincount(np.asarray(new[f"rest/autoencoder/clusters/{level}"])).tolist() for level in (0, 1)]
    assert sorted(sizes[0]) == [2, 2]  # two codes a cluster at least
    assert sorted(sizes[1]) == [2] * 5 + [3] * 5


def _trained(config: RQVaeConfig, folder, *alignments: Alignment) -> RQVAE:
    model = AlignedRQVAE(_model(config), alignments)
    mesh = make_mesh(jax.devices()[:1])
    return train_autoencoder(model, X, config, signals=None, request={}, seed=0, folder=folder, mesh=mesh)


def test_an_alignment_of_weight_zero_trains_the_same_autoencoder(tmp_path):
    leaves = [
        {name: np.asarray(leaf) for name, leaf in named_leaves(nnx.state(model)).items()}
        for model in (
            _trained(SMALL, tmp_path / "alone"),
            _trained(SMALL, tmp_path / "zero", Pull(0.0)),
            _trained(SMALL, tmp_path / "some", Pull(5.0)),
        )
    ]
    for name, leaf in leaves[0].items():
        np.testing.assert_allclose(leaves[1][name], leaf, rtol=1e-5, atol=1e-7, err_msg=name)
    assert not np.allclose(leaves[2]["encoder/0/kernel"], leaves[0]["encoder/0/kernel"], atol=1e-3)


def test_a_training_whose_hooks_change_its_state_compiles_one_step(tmp_path, monkeypatch):
    calls, call = [], TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda step, *given: calls.append(step) or call(step, *given))
    _trained(_config(level_sizes=(5, 6)), tmp_path)  # re-seeds after the first of two epochs
    assert len(calls) == 6
    assert calls[0].program._cache_size() == 1


def test_codes_are_clustered_from_the_first_step(tmp_path):
    short = dataclasses.replace(SMALL.training, epochs=0.1)  # one step: no epoch ends
    trained = _trained(_config(diversity=1e-4, training=short), tmp_path)
    assert [np.bincount(np.asarray(clusters[...])).tolist() for clusters in trained.clusters] == [[2, 2], [2, 2, 2]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"assignments": ()}, "expected 1 or 2 assignments, got 0"),
        ({"assignments": (Nearest(), Sinkhorn(), Nearest())}, "expected 1 or 2 assignments, got 3"),
        ({"decay": 1.0}, r"expected decay in \[0, 1\), got 1.0"),
        ({"decay": 0.9, "diversity": 1e-4}, "leave one of the two out"),
        ({"kmeans_iterations": -1}, "expected kmeans_iterations of at least 0, got -1"),
        ({"latent": 0}, "expected latent of at least 1, got 0"),
        ({"commitment": -1.0}, "expected commitment of at least 0, got -1.0"),
        ({"reconstruction": np.inf}, "expected reconstruction of at least 0 and finite, got inf"),
    ],
)
def test_configs_that_cannot_work(bad, message):
    with pytest.raises(SemidError, match=message):
        _config(**bad)
    _config(assignments=(Nearest(), Sinkhorn()), decay=0.0, kmeans_iterations=0)
