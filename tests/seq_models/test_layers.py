"""The backbone's pieces: what a state may depend on, rotary positions against complex numbers, dropout's statistics."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from scipy import special

from seq_models import attention as attending
from seq_models import backbones
from seq_models.attention import (
    KeyValue,
    attend_history,
    attend_past,
    attend_rows,
    gather_ancestors,
    rotate,
    segment_positions,
)
from seq_models.backbones import Transformer
from seq_models.layers import (
    Attention,
    Precision,
    Remat,
    TransformerConfig,
    dropout,
    last_state,
    products,
    split_key,
)

CONFIG = TransformerConfig(dim=8, layers=2, heads=2, hidden=12, dropout=0.5)
LENGTH = 6


def normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@functools.cache
def backbone():
    return nnx.split(Transformer(CONFIG, rngs=nnx.Rngs(0)))


@jax.jit
def _states(params, x, segments, key):
    return nnx.merge(backbone()[0], params)(x, segments, key=key)


def states(x, segments, key=None):
    return np.asarray(_states(backbone()[1], x, jnp.asarray(segments), key))


ONE_SEGMENT = [[1] * LENGTH]


def test_no_state_depends_on_the_future():
    x = normal(0, 1, LENGTH, 8)
    before = states(x, ONE_SEGMENT)
    for at in range(LENGTH):
        changed = np.any(states(x.at[:, at].add(1.0), ONE_SEGMENT) != before, axis=-1)[0]
        np.testing.assert_array_equal(changed, np.arange(LENGTH) >= at)  # the past and itself: they do change


def test_a_history_in_a_packed_row_has_the_states_it_has_alone():
    x = normal(1, 1, LENGTH, 8)
    packed = states(x, [[1, 1, 2, 2, 2, 0]])
    for begin, end in ((0, 2), (2, 5)):
        alone = jnp.zeros_like(x).at[:, : end - begin].set(x[:, begin:end])
        segments = [[1] * (end - begin) + [0] * (LENGTH - end + begin)]
        np.testing.assert_allclose(packed[0, begin:end], states(alone, segments)[0, : end - begin], atol=1e-6)
    assert np.abs(states(x, ONE_SEGMENT)[0, 2:5] - packed[0, 2:5]).max() > 1e-2  # one segment: they do see each other


def test_padding_changes_no_real_state_and_is_finite():
    x = normal(2, 1, LENGTH, 8)
    segments = [[1, 1, 1, 1, 0, 0]]
    padded, other = states(x, segments), states(x.at[:, 4:].add(100.0), segments)
    np.testing.assert_array_equal(padded[:, :4], other[:, :4])
    assert np.isfinite(states(x, [[0] * LENGTH])).all()


def turned(x, positions):
    """Rotary embedding in complex numbers: feature i and feature i + half are one number's parts."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    pairs = pairs * np.exp(1j * positions[..., None, None] * 10000.0 ** (-np.arange(half) / half))
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


@pytest.mark.parametrize("positions", [[[0, 1, 2, 3]], [[0, 1, 0, 50]]])
def test_attention_against_loops_in_float64(positions):
    attention, x, positions = Attention(CONFIG, rngs=nnx.Rngs(1)), normal(3, 1, 4, 8), np.array(positions)
    weights, out = (np.asarray(layer.kernel[...], np.float64) for layer in (attention.qkv, attention.out))
    q, k, v = np.einsum("bti,ijhw->jbthw", np.asarray(x, np.float64), weights)
    q, k, mixed = turned(q, positions)[0], turned(k, positions)[0], np.zeros((4, 2, 4))
    for at, head in np.ndindex(4, 2):
        powers = np.exp(k[: at + 1, head] @ q[at, head] / 2.0)
        mixed[at, head] = powers @ v[0, : at + 1, head] / powers.sum()

    @jax.jit
    def attend(attention, x, positions):
        query, (keys, values) = attention.project(x)
        query, keys = rotate(query, positions), rotate(keys, positions)
        return attention.merge(attend_rows(query, KeyValue(keys, values), jnp.ones((1, 4), jnp.int32), causal=True))

    got = attend(attention, x, positions.astype(np.int32))
    np.testing.assert_allclose(got[0], mixed.reshape(4, 8) @ out, atol=1e-5)


def test_grouped_heads_are_full_heads_with_shared_keys_and_values():
    full = TransformerConfig(dim=16, heads=4)
    grouped, x = Attention(replace(full, kv_heads=2), rngs=nnx.Rngs(2)), normal(9, 1, 5, 16)
    kernel = np.asarray(grouped.qkv.kernel[...])  # [dim, two queries, key and value, heads, width]
    repeated = Attention(full, rngs=nnx.Rngs(3))
    queries = kernel[:, :2].swapaxes(1, 2).reshape(16, 4, 4)
    heads = [queries, *(np.repeat(kernel[:, of], 2, axis=1) for of in (2, 3))]
    repeated.qkv.kernel[...] = jnp.asarray(np.stack(heads, axis=1))
    rows = jnp.ones((1, 5), jnp.int32)
    got, expected = (attend_rows(*module.project(x), rows, causal=True) for module in (grouped, repeated))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    last = [module.project(x) for module in (grouped, repeated)]
    steps = [tuple(KeyValue(kv.keys[:, at], kv.values[:, at]) for at in range(5)) for _, kv in last]
    for (q, _), past in zip(last, steps, strict=True):  # the few levels of a prefix: the same sums, by another way
        np.testing.assert_allclose(attend_past(q[:, 4], past), expected[:, 4], atol=1e-6)


def test_what_is_seen_by_hand():
    """Equal keys share attention evenly, so that values of one position each show who is seen."""
    segments = jnp.asarray([[1, 1, 2, 0, 0]])
    zeros, values = np.zeros((1, 5, 1, 5), np.float32), np.eye(5, dtype=np.float32)[None, :, None]
    attend = jax.jit(attend_rows, static_argnames="causal")

    def seen(causal):
        shares = np.asarray(attend(zeros, KeyValue(zeros, values), segments, causal=causal))[0, :, 0]
        return (np.asarray(shares) * np.count_nonzero(shares, axis=1)[:, None]).round(5).tolist()

    assert seen(True) == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert seen(False) == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]


def test_positions_by_hand():
    rows = jnp.asarray([[1, 1, 2, 2, 2, 3], [4, 4, 4, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(segment_positions(rows), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_queries_give_the_values_and_gradients_of_one(causal, monkeypatch):
    q, kv = normal(10, 2, 7, 4, 2), KeyValue(normal(11, 2, 7, 2, 2), normal(12, 2, 7, 2, 2))
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1]])

    def attended(q, kv):
        out = attend_rows(q, kv, segments, causal=causal)
        return jnp.sum(jnp.sin(out)), out

    def values_and_gradients():
        return jax.tree.leaves(jax.jit(jax.value_and_grad(lambda q, kv: attended(q, kv), (0, 1), has_aux=True))(q, kv))

    whole = values_and_gradients()
    monkeypatch.setattr(attending, "_QUERIES", 3)
    for a, b in zip(values_and_gradients(), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_long_rows_hold_no_scores_of_all_pairs(monkeypatch):
    monkeypatch.setattr(attending, "_QUERIES", 4)
    q, segments = normal(13, 1, 12, 1, 2), jnp.ones((1, 12), jnp.int32)

    def program(length):
        kv = KeyValue(q[:, :length], q[:, :length])
        loss = jax.grad(lambda q: jnp.sum(attend_rows(q, kv, segments[:, :length], causal=False)))
        return jax.jit(loss).lower(q[:, :length]).as_text()

    assert "1x12x12x" not in program(12)
    assert "4x12" in program(12)
    assert "4x4" in program(4)


@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_for_tpus_gives_the_values_and_gradients_of_the_plain_form(causal, monkeypatch):
    """Interpreted, with rows that are no multiple of its blocks and heads that share keys; within 2e-6 and that
    share of the value, for sums of float32 in another order."""
    monkeypatch.setattr(attending, "_SPLASH_BLOCK", 128)
    q, kv = normal(40, 2, 200, 2, 8), KeyValue(normal(41, 2, 200, 1, 8), normal(42, 2, 200, 1, 8))
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], 50, axis=1))

    def values_and_gradients(attend):
        def attended(q, kv):
            out = attend(q, kv, segments, causal=causal)
            return jnp.sum(jnp.sin(out)), out

        return jax.tree.leaves(jax.jit(jax.value_and_grad(attended, (0, 1), has_aux=True))(q, kv))

    kernel = functools.partial(attending.splash_attention, interpret=True)
    for a, b in zip(values_and_gradients(kernel), values_and_gradients(attend_rows), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("platform", ["tpu", "cpu", "cuda"])
def test_long_rows_go_by_the_platform_s_form(platform, monkeypatch):
    """Short ones by the plain form everywhere; on a mesh each device has its rows and heads."""
    shape = jax.ShapeDtypeStruct((8, 1024, 2, 8), jnp.float32)
    segments = jax.ShapeDtypeStruct((8, 1024), jnp.int32)

    def kernels(length):
        def attended(q, segments):
            q, segments = q[:, :length], segments[:, :length]
            return attend_rows(q, KeyValue(q, q), segments, causal=True)

        with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)):
            lowered = jax.jit(attended).trace(shape, segments).lower(lowering_platforms=(platform,))
        return "tpu_custom_call" in lowered.as_text()

    assert kernels(1024) == (platform == "tpu")
    assert not kernels(512)


def test_beams_read_a_shared_history_and_their_own_past():
    """Against one softmax over the user's real positions and the beam's ancestors, in float64."""
    q, history = normal(14, 2, 3, 4, 2), KeyValue(normal(15, 2, 5, 2, 2), normal(16, 2, 5, 2, 2))
    real = np.array([[True, True, True, False, False], [False, True, True, True, True]])
    steps = tuple(KeyValue(normal(20 + i, 2, n, 2, 2), normal(30 + i, 2, n, 2, 2)) for i, n in enumerate((2, 4)))
    ancestors = np.array([[[0, 3], [1, 1], [1, 0]], [[1, 2], [0, 2], [0, 0]]])
    places, mask = jnp.asarray(ancestors), jnp.asarray(real)
    got = jax.jit(lambda q, history, steps: attend_history(q, history, mask, gather_ancestors(steps, places)))(
        q, history, steps
    )
    q, history, steps, got = jax.device_get((q, history, steps, got))
    for user, beam, head in np.ndindex(2, 3, 4):
        own = [
            [step[part][user, ancestors[user, beam, i], head // 2] for i, step in enumerate(steps)] for part in (0, 1)
        ]
        keys, values = (
            np.concatenate([np.asarray(of_user[user, real[user], head // 2], np.float64), np.stack(of_beam)])
            for of_user, of_beam in zip(history, own, strict=True)
        )
        powers = np.exp(keys @ np.asarray(q[user, beam, head], np.float64) / 2**0.5)
        np.testing.assert_allclose(got[user, beam, head], powers @ values / powers.sum(), atol=1e-5)


def test_in_bfloat16_beams_weigh_the_history_as_float32_does():
    """Against one softmax over all keys, of the same rounded inputs: nothing but the result is rounded."""

    def rounded(seed, *shape):
        return normal(seed, *shape).astype(jnp.bfloat16)

    q, history = 3 * rounded(50, 4, 3, 2, 16), KeyValue(rounded(51, 4, 40, 2, 16), 1 + rounded(52, 4, 40, 2, 16))
    past = tuple(KeyValue(rounded(53 + i, 4, 3, 2, 16), rounded(56 + i, 4, 3, 2, 16) - 1) for i in range(2))
    real = jnp.ones((4, 40), bool)
    got = jax.jit(attend_history)(q, history, real, past)
    alone = jax.jit(attend_past)(q, past)
    assert got.dtype == alone.dtype == jnp.bfloat16
    q, history, past = jax.tree.map(lambda x: np.asarray(x, np.float64), (q, history, past))
    scores = np.concatenate(
        [np.einsum("bqhw,bkhw->kbqh", q, history.keys), np.stack([(q * kv.keys).sum(-1) for kv in past])]
    )
    values = np.concatenate(
        [np.broadcast_to(np.moveaxis(history.values, 1, 0)[:, :, None], (40, *q.shape)), [kv.values for kv in past]]
    )
    for found, first in ((got, 0), (alone, 40)):
        expected = np.einsum("kbqh,kbqhw->bqhw", special.softmax(scores[first:] / 4, axis=0), values[first:])
        error = np.abs(np.asarray(found, np.float64) - expected)
        assert (error <= 2.0**-8 * np.abs(expected) + 1e-6).all(), error.max()


def test_products_are_summed_in_float32():
    x, table = normal(17, 3, 512), normal(18, 5, 512)
    exact, rough = (products(x, table, dtype) for dtype in (Precision.FLOAT32, Precision.BFLOAT16))
    assert rough.dtype == exact.dtype == jnp.float32
    rounded = (np.asarray(array.astype(jnp.bfloat16), np.float64) for array in (x, table))
    np.testing.assert_allclose(rough, next(rounded) @ next(rounded).T, atol=1e-4)
    assert np.abs(rough - exact).max() > 1e-2


def test_last_state_by_hand():
    x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4, 1)
    segments = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(last_state(x, segments), [[3.0], [5.0], [8.0]])
    segments = jnp.asarray([[0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(last_state(x, segments), [[3.0], [6.0], [8.0]])


def test_rotate_is_multiplication_by_a_complex_phase():
    x, positions = normal(4, 2, 5, 3, 8), np.array([[0, 1, 2, 3, 4], [0, 1, 0, 7, 100]])
    expected = turned(np.asarray(x, np.float64), positions)
    np.testing.assert_allclose(rotate(x, jnp.asarray(positions)), expected, atol=1e-4)


def test_rotated_products_depend_on_the_distance_alone():
    q, k = normal(5, 1, 1, 1, 8), normal(6, 1, 1, 1, 8)

    def product(at, other):
        return float(jnp.sum(rotate(q, jnp.asarray([[at]])) * rotate(k, jnp.asarray([[other]]))))

    assert product(9, 4) == pytest.approx(product(5, 0), abs=1e-5)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


@pytest.mark.parametrize(("rate", "key"), [(0.5, None), (0.0, jax.random.key(0))])
def test_dropout_is_the_identity_without_a_key_and_at_rate_zero(rate, key):
    x = normal(7, 3, 5)
    assert dropout(x, rate, key) is x


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_dropout_keeps_and_rescales(rate):
    x = jnp.ones((101, 499))  # a size that is no multiple of four
    out = np.asarray(jax.jit(dropout, static_argnums=1)(x, rate, jax.random.key(1)))
    keep = round((1 - rate) * 256) / 256
    np.testing.assert_allclose(out[out != 0], 1 / keep, rtol=1e-6)
    deviation = (keep * (1 - keep) / x.size) ** 0.5
    assert abs((out != 0).mean() - keep) < 5 * deviation
    pairs = (out.ravel()[:-1] != 0) & (out.ravel()[1:] != 0)  # neighbors come out of one random word
    assert abs(pairs.mean() - keep**2) < 10 * deviation


def test_dropout_is_a_function_of_its_key():
    x = jnp.ones((7, 9))
    first, again, other = (dropout(x, 0.5, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))
    assert np.isfinite(dropout(x, 0.9999, jax.random.key(0))).all()


def test_split_key_gives_each_its_own():
    assert split_key(None, 3) == [None] * 3
    assert len({tuple(jax.random.key_data(key).tolist()) for key in split_key(jax.random.key(0), 3)}) == 3


def test_the_backbone_drops_only_with_a_key():
    x = normal(8, 1, LENGTH, 8)
    plain, first, again = (states(x, ONE_SEGMENT, key) for key in (None, jax.random.key(0), jax.random.key(0)))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-2
    assert np.abs(first - states(x, ONE_SEGMENT, jax.random.key(1))).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 10, "heads": 4}, "dim 10 must divide into 4 heads"),
        ({"dim": 6, "heads": 2}, "dim 6 must divide into 2 heads of even width"),
        *[({name: 0}, f"^expected {name} of at least 1, got 0$") for name in ("dim", "layers", "heads", "hidden")],
        ({"heads": 4, "kv_heads": 3}, "^heads 4 must divide among kv_heads 3; change either$"),
        ({"kv_heads": 0}, "^heads 2 must divide among kv_heads 0; change either$"),
        ({"heads": -2}, "^expected heads of at least 1, got -2$"),
        ({"dropout": 1.0}, "dropout 1.0 must lie in"),
        ({"dropout": -0.1}, "dropout -0.1 must lie in"),
    ],
)
def test_config_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**change)
    TransformerConfig(dim=2, layers=1, heads=1, hidden=1, dropout=0.0)


@pytest.mark.parametrize("again", Remat)
@pytest.mark.parametrize("key", [None, 3])
def test_many_blocks_in_a_loop_are_the_same_as_one_after_the_other(again, key, monkeypatch):
    """States, kept keys and values, and gradients of every parameter; with dropout and without."""
    config = replace(CONFIG, layers=3, remat=again, dropout=0.5)
    key = None if key is None else jax.random.key(key)
    graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    x, segments = normal(5, 2, 4, 8), jnp.asarray([[1, 1, 2, 2], [1, 1, 1, 0]])

    def loss(state):
        states, kept = nnx.merge(graph, state).read(x, segments, key=key)
        return jnp.sum(jnp.sin(states)) + sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(kept)), (states, kept)

    unrolled = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    monkeypatch.setattr(backbones, "_UNROLLED", 2)
    looped = jax.jit(jax.value_and_grad(lambda state: loss(state), has_aux=True))
    assert "scan" in str(jax.make_jaxpr(lambda state: loss(state))(state))
    for a, b in zip(*map(jax.tree.leaves, (looped(state), unrolled)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_remat_of_earlier_configs():
    assert (Remat(True), Remat(False), Remat("dots")) == (Remat.FULL, Remat.NOTHING, Remat.DOTS)
    with pytest.raises(ValueError, match="'some' is not a valid Remat"):
        Remat("some")
