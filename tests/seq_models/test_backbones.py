"""Backbones: the state-space recurrence against a loop, the relation term against its formula, and who takes which."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from semid.config import to_dict
from seq_models import (
    DenseConfig,
    EncoderDecoderConfig,
    FlatDecoderConfig,
    Mixer,
    Precision,
    Remat,
    TransformerConfig,
    backbones,
    state_space,
)
from seq_models.backbones import RelationBlock, Transformer, build_backbone
from seq_models.state_space import convolved, recurrence

CONFIG = TransformerConfig(dim=8, layers=3, heads=2, hidden=8, dropout=0.0)
RECURRENT = replace(CONFIG, mixer=Mixer.STATE_SPACE, state_size=3)
# Padding in front and behind; histories of one item, and of more than a chunk.
SEGMENTS = np.array(
    [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3, 0], [1] * 15, [1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4]]
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_after_another(values, log_decays, keys, queries, segments):
    """The definition, position by position, in float64."""
    read = np.zeros(values.shape)
    for row, at in np.ndindex(segments.shape):
        if at == 0 or segments[row, at] != segments[row, at - 1]:
            state = np.zeros((values.shape[2], keys.shape[-1], values.shape[-1]))
        written = np.einsum("d,hw->hdw", np.float64(keys[row, at]), np.float64(values[row, at]))
        state = np.exp(np.float64(log_decays[row, at]))[:, None, None] * state + written
        read[row, at] = np.einsum("d,hdw->hw", queries[row, at], state)
    return read


@pytest.mark.parametrize("chunk", [1, 4, 5, 64])
def test_the_recurrence_by_chunks_is_that_of_one_position_after_another(chunk):
    values, keys, queries = normal(0, 3, 15, 2, 4), normal(1, 3, 15, 5), normal(2, 3, 15, 5)
    log_decays = -np.abs(normal(3, 3, 15, 2))
    got = jax.jit(recurrence, static_argnames="chunk")(values, log_decays, keys, queries, SEGMENTS, chunk=chunk)
    expected = one_after_another(values, log_decays, keys, queries, SEGMENTS)
    real = SEGMENTS > 0
    np.testing.assert_allclose(got[real], expected[real], rtol=1e-5, atol=1e-5)


def test_the_convolution_stays_in_its_segment():
    x, taps = normal(4, 3, 15, 2, 4), normal(5, 3, 2, 4)
    expected = np.zeros(x.shape)
    for row, at in np.ndindex(SEGMENTS.shape):
        for lag in range(min(3, at + 1)):
            if SEGMENTS[row, at - lag] == SEGMENTS[row, at]:
                expected[row, at] += taps[lag] * np.float64(x[row, at - lag])
    got = convolved(jnp.asarray(x), jnp.asarray(taps), jnp.asarray(SEGMENTS))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def states(config, *, segments=SEGMENTS, key=None, x=None):
    graph, parameters = nnx.split(build_backbone(config, rngs=nnx.Rngs(0)))
    x = jnp.asarray(normal(6, *segments.shape, 8) if x is None else x)

    @jax.jit
    def run(parameters):
        return jax.value_and_grad(lambda p: _sum(nnx.merge(graph, p)(x, jnp.asarray(segments), key=key)), has_aux=True)(
            parameters
        )

    def _sum(found):
        found = jnp.where(segments[..., None] > 0, found, 0.0)  # padding reads what it will
        return jnp.sum(jnp.sin(found)), found

    (_, found), gradient = run(parameters)
    return np.asarray(found), gradient


def test_loops_and_remat_change_nothing(monkeypatch):
    """The states of the stack and the gradients of all its parameters, with dropout."""
    config, key = replace(RECURRENT, dropout=0.5), jax.random.key(1)
    plain = states(config, key=key)
    monkeypatch.setattr(backbones, "_UNROLLED", 2)
    for how in (Remat.NOTHING, Remat.DOTS):
        for a, b in zip(*map(jax.tree.leaves, (plain, states(replace(config, remat=how), key=key))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_change_nothing(monkeypatch):
    """The states of the stack, with dropout; gradients of the recurrence, before a stack makes a hundred of one."""
    config, key = replace(RECURRENT, dropout=0.5), jax.random.key(1)
    plain = states(config, key=key)[0]
    monkeypatch.setattr(state_space, "recurrence", functools.partial(recurrence, chunk=4))
    np.testing.assert_allclose(states(config, key=key)[0], plain, rtol=1e-5, atol=1e-5)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=(1, 2, 3, 4))
    def gradients(chunk, values, log_decays, keys, queries):
        read = recurrence(values, log_decays, keys, queries, jnp.asarray(SEGMENTS), chunk=chunk)
        return jnp.sum(jnp.sin(jnp.where(SEGMENTS[..., None, None] > 0, read, 0.0)))

    values, keys, queries = normal(0, 3, 15, 2, 4), normal(1, 3, 15, 5), normal(2, 3, 15, 5)
    given = [jnp.asarray(x) for x in (values, -np.abs(normal(3, 3, 15, 2)), keys, queries)]
    for a, b in zip(gradients(4, *given), gradients(64, *given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [RECURRENT, replace(CONFIG, relation=True)], ids=["state space", "relation"])
def test_packed_histories_do_not_leak(config, monkeypatch):
    """Across chunks too: what is alone is as it is in the row."""
    monkeypatch.setattr(state_space, "recurrence", functools.partial(recurrence, chunk=4))
    x = normal(6, *SEGMENTS.shape, 8)
    packed = states(config, x=x)[0]
    for row, at in ((0, slice(2, 11)), (2, slice(5, 8))):
        alone = states(config, segments=np.ones((1, at.stop - at.start), int), x=x[row : row + 1, at])[0]
        np.testing.assert_allclose(packed[row, at], alone[0], atol=1e-5)
    changed = x.copy()
    changed[1, 7] += 1
    moved = np.abs(states(config, x=changed)[0] - packed).max(-1)[1]
    assert (moved[:7] == 0).all()
    assert (moved[7:] > 1e-4).all()


@pytest.mark.parametrize("config", [RECURRENT, replace(CONFIG, relation=True)], ids=["state space", "relation"])
def test_bfloat16_comes_near_and_keeps_float32_parameters(config, monkeypatch):
    monkeypatch.setattr(state_space, "recurrence", functools.partial(recurrence, chunk=4))
    exact = states(config)[0]
    with jax.numpy_dtype_promotion("standard"):  # jax promotes inside dot_product_attention and in its derivative
        rough, gradient = states(replace(config, dtype=Precision.BFLOAT16))
    assert 1e-4 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 0.1
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {np.dtype("float32")}


def test_the_relation_term_by_its_formula():
    """One block in float64: scores and values with the second product, scaled by the mean of what is seen."""
    config = TransformerConfig(dim=4, layers=1, heads=2, hidden=4, dropout=0.0, relation=True)
    backbone = Transformer(config, causal=True, rotary=False, rngs=nnx.Rngs(3))
    block, x = backbone.blocks[0], normal(7, 1, 5, 4)
    assert isinstance(block, RelationBlock)
    q, k, v = np.moveaxis(np.asarray(block.attention.qkv(block.norm_attention(x)), np.float64), 2, 0)
    means = np.cumsum(x, axis=1) / np.arange(1, 6)[None, :, None]
    scaled = np.asarray(block.relation_qkv(block.norm_attention(x)) * block.scale_qkv(means.astype(np.float32)))
    of_q, of_k, of_v = np.moveaxis(scaled.astype(np.float64), 2, 0)
    scores = (np.einsum("bqhw,bkhw->bhqk", q, k) + np.einsum("bqhw,bkhw->bhqk", of_q, of_k)) / np.sqrt(2)
    powers = np.where(np.tri(5, dtype=bool), np.exp(scores), 0)
    read = np.einsum("bhqk,bkhw->bqhw", powers / powers.sum(-1, keepdims=True), v + of_v).reshape(x.shape)
    expected = jnp.asarray(x) + block.attention.out(jnp.asarray(read, jnp.float32))
    expected = backbone.norm(block.feed_forward(expected, None))
    np.testing.assert_allclose(backbone(jnp.asarray(x), jnp.ones((1, 5), jnp.int32)), expected, rtol=1e-5, atol=1e-5)


def test_who_takes_which():
    sizes = {"level_sizes": (3, 3), "num_items": 4, "num_features": 0}
    for config in (EncoderDecoderConfig(RECURRENT), FlatDecoderConfig(RECURRENT)):
        with pytest.raises(
            ValueError, match=r"^the mixer state-space is for models that decode an item from one state"
        ):
            config.build(**sizes, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^the flat decoder's beams have no relation term"):
        FlatDecoderConfig(replace(CONFIG, relation=True)).build(**sizes, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^relation is a term of attention"):
        replace(RECURRENT, relation=True)
    assert isinstance(DenseConfig(RECURRENT).build(**sizes, rngs=nnx.Rngs(0)).backbone, backbones.StateSpaceStack)


def test_configs_of_before_are_stored_as_before():
    assert not {"mixer", "state_size", "relation"} & to_dict(CONFIG).keys()
    assert to_dict(RECURRENT)["mixer"] == "state-space"
