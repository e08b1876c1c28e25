"""The shared transformer stack: what positions see, which parameters are where, and what costs nothing."""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from semid.encoders import BlocksConfig
from semid.encoders.blocks import T5, Activation, Blocks, LayerScale, PostNorm, distance_buckets
from semid.errors import SemidError
from seq_models import Precision, dropout

SMALL = {"dim": 8, "hidden": 12, "heads": 2, "layers": 2}
BERT = BlocksConfig(**SMALL, architecture=PostNorm())
DINO = BlocksConfig(**SMALL, architecture=LayerScale(), activation=Activation.QUICK_GELU)
GATED_T5 = BlocksConfig(**SMALL, architecture=T5(gated=True, buckets=8, max_distance=12), head_width=5)
KINDS = pytest.mark.parametrize("config", [BERT, DINO, GATED_T5], ids=["bert", "dino", "t5"])


@functools.cache
def _built(config: BlocksConfig) -> Blocks:
    return nnx.jit(lambda: Blocks(config, rngs=nnx.Rngs(0)))()


@functools.cache
def _run(config: BlocksConfig) -> Callable[..., jax.Array]:
    """The stack as one program."""
    graph, state = nnx.split(_built(config))
    return jax.jit(lambda x, mask=None, key=None: nnx.merge(graph, state)(x, mask, key=key))


def _states(n: int = 2, t: int = 5) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (n, t, 8))


@KINDS
def test_padding_is_not_read_and_real_positions_are(config):
    blocks, x = _run(config), _states()
    mask = jnp.arange(5)[None] < jnp.array([[3], [5]])
    other = x.at[:, 4].set(7.0)
    first, second = blocks(x, mask), blocks(other, mask)
    np.testing.assert_array_equal(first[0, :3], second[0, :3])
    assert np.abs(first[1, :4] - second[1, :4]).max() > 1e-3  # control: in the second row the position is real


@KINDS
def test_a_padded_row_equals_the_row_alone(config):
    blocks, x = _run(config), _states()
    mask = jnp.arange(5)[None] < jnp.array([[3], [5]])
    np.testing.assert_allclose(blocks(x, mask)[0, :3], blocks(x.at[0, 3:].set(0.0)[:, :3])[0], atol=1e-5)


@KINDS
def test_a_row_without_any_real_position_is_finite_and_so_is_its_gradient(config):
    blocks, x, mask = _run(config), _states(), jnp.zeros((2, 5), bool)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(blocks(x, mask) ** 2)))(x)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@KINDS
def test_hidden_states_are_the_input_and_every_layers(config):
    blocks, x = _built(config), _states()
    states = jax.jit(blocks.hidden)(x)
    assert len(states) == 3
    np.testing.assert_array_equal(states[0], x)
    last = states[-1] if blocks.norm is None else blocks.norm(states[-1])
    np.testing.assert_allclose(_run(config)(x), last, atol=1e-5)


def test_matrices_are_found_by_name():
    blocks = _built(GATED_T5)
    for layer in blocks.layers:
        for name in ("query", "key", "value", "out"):
            assert isinstance(getattr(layer.attention, name), nnx.Linear)
        for name in ("up", "gate", "down"):
            assert isinstance(getattr(layer.feed, name), nnx.Linear)


@KINDS
def test_every_parameter_has_a_gradient(config):
    graph, state = nnx.split(_built(config))
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(_states()) ** 3)))(state)
    # A bias of the keys adds the same to all logits of a query: softmax does not see it.
    sizes = {path: np.abs(leaf[...]).max() for path, leaf in nnx.to_flat_state(gradient)}
    dead = {path for path, size in sizes.items() if size < 1e-6 * max(sizes.values())}
    expected = {("layers", i, "attention", "key", "bias") for i in range(2)} if config.architecture.bias else set()
    assert dead == expected


def test_dropout_is_drawn_from_the_key_and_off_without_one():
    blocks, x = _run(BERT), _states()
    np.testing.assert_array_equal(blocks(x), blocks(x))
    first, again, second = (blocks(x, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3
    kept = dropout(jnp.ones(10_000), 0.25, jax.random.key(2))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(kept.mean()) - 1) < 0.02


def test_recomputing_changes_no_gradient():
    def gradient(remat):
        graph, state = nnx.split(_built(replace(GATED_T5, remat=remat)))
        return jax.jit(jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(_states(), key=jax.random.key(3)) ** 2)))(state)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient(False), gradient(True))


@KINDS
def test_bfloat16_is_near_float32_and_keeps_its_parameters(config):
    exact, rough = (Blocks(BlocksConfig(**{**vars(config), "dtype": dtype}), rngs=nnx.Rngs(0)) for dtype in Precision)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(rough))} == {jnp.dtype("float32")}
    with jax.numpy_dtype_promotion("standard"):  # dot_product_attention itself promotes
        got = rough(_states())
    assert got.dtype == jnp.bfloat16
    want = exact(_states())
    assert np.abs(got.astype(jnp.float32) - want).max() < 0.05 * np.abs(want).max()


def test_distances_fall_into_the_buckets_of_t5():
    """Where torch's transformers 5.23 begin a bucket, for 32 of them up to a distance of 128."""
    begins = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    expected = np.searchsorted(begins, np.arange(300), side="right") - 1
    buckets = distance_buckets(300, T5())
    np.testing.assert_array_equal(buckets[:, 0], expected)  # keys before
    np.testing.assert_array_equal(buckets[0, 1:], expected[1:] + 16)  # keys after


@pytest.mark.parametrize("activation", list(Activation))
def test_activations(activation):
    x = np.linspace(-4, 4, 9)
    normal = np.vectorize(lambda v: 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))))
    exact = jax.scipy.stats.norm.cdf(jnp.asarray(x, jnp.float32))
    expected = {
        Activation.GELU: x * np.asarray(exact),
        Activation.GELU_TANH: x * normal(x),
        Activation.QUICK_GELU: x / (1 + np.exp(-1.702 * x)),
        Activation.RELU: np.maximum(x, 0),
    }[activation]
    np.testing.assert_allclose(activation(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 9}, "dim 9 must divide into 2 heads; change either or give head_width"),
        ({"layers": 0}, "expected layers of at least 1, got 0"),
        ({"dropout": 1.0}, r"expected dropout in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(SemidError, match=message):
        BlocksConfig(**{**SMALL, **change})
    assert BlocksConfig(**SMALL).dim == 8
    assert BlocksConfig(**{**SMALL, "dim": 9, "head_width": 4}).dim == 9
