"""Times of a history's items: their buckets, the input that they make, and the bias that they add to attention."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seq_models import ConditionSizes, DenseConfig, FlatDecoderConfig, Mixer, RQTransformerConfig, TransformerConfig
from seq_models import attention as attending
from seq_models.attention import KeyValue, attend_rows
from seq_models.conditions import ConditionEncoder, Times, gap_buckets
from seq_models.types import Inputs

STACK = TransformerConfig(dim=8, layers=2, heads=2, hidden=8, dropout=0.0)
RECURRENT = replace(STACK, mixer=Mixer.STATE_SPACE, state_size=3)
SIZES = ConditionSizes(time_inputs=True, time_bias=True)
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])
SECONDS = jnp.asarray([[0, 5, 5, 0, 90, -1], [0, 0, 40, 4000, 4000, 2**31 - 1]], jnp.int32)


def random(module):
    """Parameters far from their initialization, where the tables of times are zero."""
    graph, params = nnx.split(module)
    rng = np.random.default_rng(1)
    return nnx.merge(graph, jax.tree.map(lambda x: x + jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), params))


def test_buckets_are_powers_of_two_of_seconds():
    seconds = np.array([0, 1, 2, 3, 6, 7, 100, 3600, 2**30, 2**31 - 1])
    expected = [min(int(np.floor(np.log2(second + 1))) + 1, 31) for second in seconds.tolist()]
    first = jnp.zeros(len(seconds), jnp.int32)
    assert gap_buckets(jnp.asarray(seconds, jnp.int32), first).tolist() == expected
    assert gap_buckets(first, jnp.asarray(seconds, jnp.int32)).tolist() == expected
    assert gap_buckets(jnp.asarray([-1, 4]), jnp.asarray([4, -1])).tolist() == [0, 0]


def test_the_gap_before_a_history_s_first_item_is_unknown():
    expected = [[0, 3, 1, 0, 7, 0], [0, 0, 6, 12, 1, 31]]
    assert Times(SECONDS, SEGMENTS).gaps().tolist() == expected


@pytest.mark.parametrize("queries", [512, 4])
def test_the_bias_is_added_to_the_scores_of_attention(queries, monkeypatch):
    """Against numpy, in one block and in several."""
    monkeypatch.setattr(attending, "_QUERIES", queries)
    encoder = random(ConditionEncoder(SIZES, STACK, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, 2, 4)), jnp.float32) for _ in range(3))
    bias = encoder.time_bias(Times(SECONDS, SEGMENTS))
    got = attend_rows(q, KeyValue(k, v), SEGMENTS, causal=True, bias=bias.between)
    table = np.asarray(encoder.bias.embedding[...], np.float64)
    buckets = np.asarray(gap_buckets(SECONDS[:, :, None], SECONDS[:, None, :]))
    scores = np.einsum("bqhd,bkhd->bhqk", np.float64(q), np.float64(k)) / 2 + np.moveaxis(table[buckets], -1, 1)
    sees = (np.asarray(SEGMENTS)[:, :, None] == np.asarray(SEGMENTS)[:, None]) & np.tri(6, dtype=bool)
    powers = np.where(sees[:, None], np.exp(scores), 0.0)
    expected = np.einsum("bhqk,bkhd->bqhd", powers / powers.sum(-1, keepdims=True), np.float64(v))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def states(model, rows, segments, times):
    if isinstance(model, tuple(ROWS)):
        return model.states(Inputs(jnp.stack([rows, rows], -1), times=times), segments)
    return model.states(model.vectors(None), rows, segments, times=times)


def model(config, sizes=SIZES):
    built = config.build(level_sizes=(4, 4), num_items=4, num_features=0, rngs=nnx.Rngs(0))
    built.add_conditions(sizes, rngs=nnx.Rngs(1))
    return built


ROWS = {type(model(RQTransformerConfig(STACK)))}


@pytest.mark.parametrize("config", [RQTransformerConfig(STACK), DenseConfig(STACK), RQTransformerConfig(RECURRENT)])
def test_times_reach_the_states_of_their_own_history_alone(config):
    rows, times = jnp.asarray([[0, 1, 2, 3, 1, 0], [1, 0, 2, 3, 1, 2]]), Times(SECONDS, SEGMENTS)
    read = random(model(config))
    packed = states(read, rows, SEGMENTS, times)
    alone = states(read, rows[:1, 3:5], jnp.asarray([[1, 1]]), Times(SECONDS[:1, 3:5] + 700, jnp.asarray([[1, 1]])))
    np.testing.assert_allclose(packed[0, 3:5], alone[0], atol=1e-5)
    other = states(read, rows, SEGMENTS, times._replace(seconds=SECONDS.at[0, 4].set(9)))
    assert not np.allclose(other[0, 4], packed[0, 4], atol=1e-3)
    np.testing.assert_array_equal(np.delete(other, 4, 1), np.delete(packed, 4, 1))
    unknown = states(read, rows, SEGMENTS, times._replace(seconds=jnp.full_like(SECONDS, -1)))
    np.testing.assert_allclose(states(read, rows, SEGMENTS, None), unknown, atol=1e-5)


@pytest.mark.parametrize("stack", [STACK, RECURRENT])
def test_a_fresh_model_takes_no_notice_of_times(stack):
    rows = jnp.asarray([[0, 1, 2, 3, 1, 0]] * 2)
    fresh = model(RQTransformerConfig(stack))
    with_times, without = (states(fresh, rows, SEGMENTS, times) for times in (Times(SECONDS, SEGMENTS), None))
    np.testing.assert_array_equal(with_times, without)


def test_a_bias_needs_a_position_per_item():
    model(FlatDecoderConfig(STACK), ConditionSizes(time_inputs=True))
    with pytest.raises(ValueError, match="attends to codes"):
        model(FlatDecoderConfig(STACK))
