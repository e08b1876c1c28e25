"""What is trained of an encoder: by its gradients, by the program that computes them, and by what the cache holds."""

import os
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from semid.encoders import (
    BlocksConfig,
    FeatureRows,
    Frozen,
    Full,
    HiddenRows,
    ImageConfig,
    ImageEncoder,
    ImageRows,
    LowRank,
    SideAdapters,
    SideTower,
    cached_states,
    tuned,
)
from semid.encoders.adapters import CrossTower, read_states
from semid.encoders.blocks import Constant
from semid.errors import SemidError

HIDDEN = 24  # a width that nothing else has: products of this width are the backbone's
CONFIG = ImageConfig(size=4, patch=2, blocks=BlocksConfig(dim=8, layers=4, heads=2, hidden=HIDDEN))
SIDE = SideAdapters(states=3, hidden=5)


def _backbone(seed=0):
    return ImageEncoder(CONFIG, rngs=nnx.Rngs(seed))


def _rows(items=6):
    pixels = np.random.default_rng(0).integers(0, 256, (items, 4, 4, 3), np.uint8)
    return ImageRows(jnp.asarray(pixels), jnp.arange(items) != 1)


def _loss(encoder, rows):
    """Of parameters: what a training step differentiates."""
    graph, params, rest = nnx.split(encoder, nnx.Param, ...)
    return lambda params: jnp.mean(jnp.tanh(nnx.merge(graph, params, rest)(rows)) ** 2), params


def _names(state):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def _wide_products(jaxpr):
    """How many matrix products of `jaxpr`, those in it included, have an axis of the backbone's own width."""
    found = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        found += equation.primitive.name == "dot_general" and any(HIDDEN in shape for shape in shapes)
        found += sum(_wide_products(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return found


def _products(encoder, rows):
    """Of the loss, and of the loss with its gradient."""
    loss, params = _loss(encoder, rows)
    return tuple(_wide_products(jax.make_jaxpr(f)(params).jaxpr) for f in (loss, jax.value_and_grad(loss)))


@pytest.mark.parametrize(
    ("tuning", "forward", "with_gradient"),
    [(Full(), 8, 24), (Frozen(), 8, 8), (SIDE, 8, 8), (LowRank(rank=2), 8, 16)],
)
def test_the_gradient_of_a_frozen_backbone_is_absent_from_the_program(tuning, forward, with_gradient):
    """Two products in each of 4 blocks. A gradient takes two more of each, of inputs and of weights; low-rank changes
    need the first of them."""
    encoder = tuned(_backbone(), tuning, rngs=nnx.Rngs(1))
    assert _products(encoder, _rows()) == (forward, with_gradient)


def test_cached_states_leave_no_backbone_in_the_program(tmp_path):
    rows, backbone = _rows(), _backbone()
    hidden = cached_states(tmp_path, backbone, rows, config=SIDE)
    assert _products(SideTower(8, SIDE, rngs=nnx.Rngs(1)), hidden) == (0, 0)
    assert _products(tuned(backbone, SIDE, rngs=nnx.Rngs(1)), hidden) == (0, 0)


def test_cached_and_uncached_give_the_same_loss_and_gradients(tmp_path):
    rows, encoder = _rows(), tuned(_backbone(), SIDE, rngs=nnx.Rngs(1))
    hidden = cached_states(tmp_path, encoder.backbone, rows, config=SIDE, batch_size=4)
    assert hidden.states.shape == (6, 3, 8)
    assert hidden.states.dtype == jnp.float16
    np.testing.assert_array_equal(hidden.present, rows.present)
    (cached, gradient), (uncached, expected) = (
        jax.value_and_grad(loss)(params) for loss, params in (_loss(encoder, hidden), _loss(encoder, rows))
    )
    np.testing.assert_allclose(cached, uncached, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected)


def test_states_are_computed_once_for_the_same_weights_and_content(tmp_path, monkeypatch):
    rows, calls = _rows(), []
    hidden = ImageEncoder.hidden
    monkeypatch.setattr(ImageEncoder, "hidden", lambda self, rows: (calls.append(1), hidden(self, rows))[1])
    first = cached_states(tmp_path, _backbone(), rows, config=SIDE)
    assert len(calls) == 1
    second = cached_states(tmp_path, _backbone(), rows, config=SIDE)
    assert len(calls) == 1
    np.testing.assert_array_equal(first.states, second.states)
    brighter = rows._replace(pixels=rows.pixels.at[0, 0, 0, 0].add(1))
    cached_states(tmp_path, _backbone(1), rows, config=SIDE)
    cached_states(tmp_path, _backbone(), brighter, config=SIDE)
    cached_states(tmp_path, _backbone(), rows, config=SideAdapters(states=2))
    assert len(calls) == 4
    assert len(list(tmp_path.iterdir())) == 4


def test_an_interrupted_computation_leaves_nothing(tmp_path, monkeypatch):
    replace = os.replace

    def stop(source, target):
        if Path(target).parent == tmp_path:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        cached_states(tmp_path, _backbone(), _rows(), config=SIDE)
    assert list(tmp_path.iterdir()) == []


def test_the_place_of_states_is_tried_before_they_are_computed(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(ImageEncoder, "hidden", lambda self, rows: pytest.fail("computed"))
    with pytest.raises(SemidError, match=r"file: is a file, and .* should go below it"):
        cached_states(tmp_path / "file" / "states", _backbone(), _rows(), config=SIDE)


def test_a_damaged_cache_is_named(tmp_path):
    cached_states(tmp_path, _backbone(), _rows(), config=SIDE)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"damaged")
    with pytest.raises(SemidError, match=f"{file.name}: expected cached states, got a damaged file"):
        cached_states(tmp_path, _backbone(), _rows(), config=SIDE)


def test_states_are_read_at_equal_distances_and_stay_finite():
    hidden = jnp.broadcast_to(jnp.arange(13.0)[None, :, None], (1, 13, 1))
    np.testing.assert_array_equal(read_states(hidden, 7)[0, :, 0], [0, 2, 4, 6, 8, 10, 12])
    assert jnp.isfinite(read_states(hidden * 1e6, 7)).all()


def _affine(layer, x):
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])[None]


def _block(tower, k, x):
    adapter = tower.adapters[k]
    return _affine(adapter.up, np.maximum(_affine(adapter.down, x), 0)) + x


def test_a_side_tower_computes_the_published_recurrence():
    tower = SideTower(2, SideAdapters(states=3, hidden=4), rngs=nnx.Rngs(0))
    tower.gates[...] = jnp.array([0.05, -0.1])
    states = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float16)

    expected = _block(tower, 0, states[:, 0].astype(np.float32))
    for k, mu in ((1, 0.05), (2, -0.1)):
        g = 1 / (1 + np.exp(-mu / 0.1))
        expected = _block(tower, k, g * states[:, k].astype(np.float32) + (1 - g) * np.asarray(expected))
    np.testing.assert_allclose(tower(HiddenRows(jnp.asarray(states), jnp.ones(5, bool))), expected, atol=1e-6)


def test_the_tower_between_modalities_reads_only_what_is_there():
    tower = CrossTower([4, 2], SideAdapters(states=3, hidden=4), rngs=nnx.Rngs(0))
    text, image = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.normal(jax.random.key(1), (2, 3, 2))
    only_text = jnp.array([[True, False], [True, True]])
    before, after = (tower([text, x], only_text) for x in (image, image + 1))
    np.testing.assert_array_equal(before[0], after[0])
    assert jnp.any(before[1] != after[1])


@pytest.mark.parametrize(("widths", "narrow"), [((4, 2), 2), ((2, 4), 2), ((3, 3), 3)])
def test_the_tower_between_modalities_takes_the_wider_down_to_the_narrower_at_every_step(widths, narrow):
    tower, mu = CrossTower(widths, SideAdapters(states=3, hidden=4), rngs=nnx.Rngs(0)), np.array([0.1, 0.0, -0.2])
    tower.gates[...] = jnp.stack([jnp.asarray(mu), jnp.zeros(3)], axis=1)  # the first modality's: sigmoid(mu / .1)
    states = [np.random.default_rng(j).normal(size=(5, 3, dim)).astype(np.float32) for j, dim in enumerate(widths)]
    expected = np.zeros((5, narrow), np.float32)
    for k in range(3):
        first, second = (
            x[:, k] if x.shape[-1] == narrow else _affine(tower.down[j][k], x[:, k]) for j, x in enumerate(states)
        )
        g = 1 / (1 + np.exp(-mu[k] / 0.1))
        expected = _block(tower, k, expected + g * first + (1 - g) * second)
    found = tower([jnp.asarray(x) for x in states], jnp.ones((5, 2), bool))
    assert found.shape == (5, tower.dim) == (5, narrow)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    parameters = {name.split(".")[0] for name in _names(nnx.state(tower, nnx.Param))}
    assert parameters == {"adapters", "gates", *(["down"] if len(set(widths)) > 1 else [])}  # as it was where equal


@pytest.mark.parametrize("tuning", [Full(), Frozen(), LowRank(rank=2), LowRank(rank=2, layers=("up", "down", "out"))])
def test_an_encoder_starts_as_the_backbone_is(tuning):
    encoder = tuned(_backbone(), tuning, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(encoder(_rows()), _backbone()(_rows()))


@pytest.mark.parametrize(
    ("tuning", "trained"),
    [(Full(), {"patches", "positions", "blocks"}), (Frozen(), set()), (SIDE, {"adapters", "gates"})],
)
def test_only_what_is_tuned_has_parameters(tuning, trained):
    encoder = tuned(_backbone(), tuning, rngs=nnx.Rngs(1))
    assert {name.split(".")[0] for name in _names(nnx.state(encoder, nnx.Param))} == trained
    frozen = _names(nnx.state(encoder, Constant))
    assert bool(frozen) == (not isinstance(tuning, Full))


def test_low_rank_trains_the_narrow_matrices_alone_and_they_change_the_output():
    encoder = tuned(_backbone(), LowRank(rank=2), rngs=nnx.Rngs(1))
    names = _names(nnx.state(encoder, nnx.Param))
    wanted = {
        f"blocks.layers.{layer}.attention.{name}.{part}.kernel"
        for layer in range(4)
        for name in ("query", "value")
        for part in ("narrow", "widen")
    }
    assert names == wanted
    loss, params = _loss(encoder, _rows())
    gradient = dict(nnx.to_flat_state(jax.grad(loss)(params)))
    for path, value in gradient.items():
        assert bool(jnp.any(value[...])) == (path[-2] == "widen")  # the other waits for this one to leave zero
    moved = jax.tree.map(lambda p, g: p - 10 * g, params, nnx.from_flat_state(list(gradient.items())))
    assert loss(moved) < loss(params)


def test_what_does_not_fit_is_refused():
    with pytest.raises(SemidError, match="low-rank adapters: the encoder has no matrix 'queries'"):
        tuned(_backbone(), LowRank(layers=("queries",)), rngs=nnx.Rngs(0))
    with pytest.raises(SemidError, match="expected at most the encoder's 5 states, got 7; lower `states`"):
        tuned(_backbone(), SideAdapters(), rngs=nnx.Rngs(0))(_rows())
    tower = SideTower(8, SIDE, rngs=nnx.Rngs(0))
    with pytest.raises(SemidError, match="expected cached states, got FeatureRows"):
        tower(FeatureRows(jnp.zeros((1, 8)), jnp.ones(1, bool)))
    with pytest.raises(SemidError, match=r"expected states of \(3, 8\), got \(2, 8\); cache them again"):
        tower(HiddenRows(jnp.zeros((1, 2, 8), jnp.float16), jnp.ones(1, bool)))
