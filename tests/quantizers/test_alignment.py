"""Alignment losses: a loop in numpy as the oracle, what negatives may not be, and the same loss on eight devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import in_batch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from in_batch import CHOICES, DIM, OPTIONS, N, cross_entropy, naive_rows, unit, vectors
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from quantizers import Similarity, info_nce, masked_mean, unit_rows


@pytest.fixture(name="options")
def _options() -> dict[str, np.ndarray]:
    return in_batch.options()


@pytest.mark.parametrize("similarity", Similarity)
@pytest.mark.parametrize("chosen", CHOICES, ids="+".join)
def test_equals_a_double_loop(options, chosen, similarity):
    chosen = {name: options[name] for name in chosen}
    a, b = vectors(2)
    found = info_nce(a, b, temperature=0.3, similarity=similarity, **chosen)
    if similarity is Similarity.COSINE:
        a, b = unit(a), unit(b)
    expected = np.mean([cross_entropy(*row) for row in naive_rows(a @ b.T / 0.3, chosen)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_unit_rows_and_their_mean(options):
    (a,), mask = vectors(1), options["mask"]
    np.testing.assert_allclose(unit_rows(a), unit(a), rtol=1e-6)
    np.testing.assert_allclose(unit_rows(a, mask=mask), np.where(mask[:, None], unit(a), 0), rtol=1e-6)
    np.testing.assert_allclose(masked_mean(a[:, 0]), a[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(masked_mean(a[:, 0], mask=mask), a[mask, 0].mean(), rtol=1e-5)


def touched(**options: np.ndarray) -> np.ndarray:
    """Mask: the loss of anchor `r` has a gradient by candidate `c`: d2 loss / d anchor_r d candidate_c is not 0."""
    a, b = vectors(2)
    blocks = jax.jacfwd(jax.grad(partial(info_nce, **options)), argnums=1)(jnp.asarray(a), jnp.asarray(b))
    return (np.asarray(blocks) != 0).any((1, 3))


def test_no_gradient_reaches_a_duplicate_as_a_negative():
    ids = np.arange(N, dtype=np.int32)
    ids[[5, 11]] = 2
    same = ids[:, None] == ids[None, :]
    np.testing.assert_array_equal(touched(ids=ids), ~same | np.eye(N, dtype=bool))
    assert touched().all()  # control: without ids they are negatives


def test_no_gradient_reaches_a_false_negative(options):
    false = options["false_negatives"]
    np.testing.assert_array_equal(touched(false_negatives=false), ~false | np.eye(N, dtype=bool))


def test_duplicates_taken_for_negatives_raise_the_loss():
    axes, ids = np.eye(N, dtype=np.float32), np.arange(N, dtype=np.int32)
    axes[5], ids[5] = axes[2], 2
    assert info_nce(axes, axes, ids=ids) < 1e-4
    # Control: rows 2 and 5 cannot tell their positives apart, each pays log 2.
    np.testing.assert_allclose(info_nce(axes, axes), 2 * np.log(2) / N, rtol=1e-3)


def test_the_order_of_the_batch_is_nothing(options):
    a, b = vectors(2)
    order = np.random.default_rng(3).permutation(N)
    moved = {name: value[order] for name, value in options.items()}
    moved["false_negatives"] = moved["false_negatives"][:, order]
    np.testing.assert_allclose(info_nce(a[order], b[order], **moved), info_nce(a, b, **options), rtol=1e-5)
    assert abs(info_nce(a, b[order]) - info_nce(a, b)) > 1e-3  # control: pairing matters


def test_popularity_is_corrected_by_minus_log_q(options):
    """The same as one more dimension that adds -log q to the inner product, up to any factor of q."""
    a, b = vectors(2)
    log_q, inner = options["log_popularity"], partial(info_nce, temperature=1.0, similarity=Similarity.INNER_PRODUCT)
    longer = inner(np.c_[a, np.ones(N, np.float32)], np.c_[b, -log_q])
    np.testing.assert_allclose(inner(a, b, log_popularity=log_q), longer, rtol=1e-5)
    np.testing.assert_allclose(inner(a, b, log_popularity=log_q + np.float32(3)), longer, rtol=1e-5)
    assert abs(inner(a, b) - longer) > 1e-2


def test_perfect_alignment_costs_nothing_and_none_costs_log_n():
    axes = np.eye(N, dtype=np.float32)
    assert 0 <= info_nce(axes, 5 * axes, temperature=0.05) < 1e-6
    one = np.ones((N, DIM), np.float32)
    np.testing.assert_allclose(info_nce(one, one), np.log(N), rtol=1e-6)
    mask = np.arange(N) < 3
    np.testing.assert_allclose(info_nce(one, one, mask=mask), np.log(3), rtol=1e-6)


def test_both_directions_are_a_symmetric_loss(options):
    a, b = vectors(2)

    def both(x: np.ndarray, y: np.ndarray, false: np.ndarray) -> jax.Array:
        kwargs = {"mask": options["mask"], "ids": options["ids"]}
        return (info_nce(x, y, false_negatives=false, **kwargs) + info_nce(y, x, false_negatives=false.T, **kwargs)) / 2

    false = options["false_negatives"]
    np.testing.assert_allclose(both(a, b, false), both(b, a, false.T), rtol=1e-6)
    assert abs(info_nce(a, b) - info_nce(b, a)) > 1e-3  # control: one direction is not


def test_cosine_forgets_lengths_and_inner_products_do_not():
    a, b = vectors(2)
    np.testing.assert_allclose(info_nce(3 * a, b / 7), info_nce(a, b), rtol=1e-5)
    inner = partial(info_nce, similarity=Similarity.INNER_PRODUCT, temperature=1.0)
    assert abs(inner(3 * a, b) - inner(a, b)) > 0.1
    np.testing.assert_allclose(inner(3 * a, b), info_nce(a, b, similarity=Similarity.INNER_PRODUCT, temperature=1 / 3))


def all_losses(x: list[Any], options: dict[str, Any]) -> jax.Array:
    """Every loss of this file on four arrays of rows."""
    mask = options.get("mask")
    cosines = (unit_rows(x[0], mask=mask) * unit_rows(x[1], mask=mask)).sum(-1)
    inner = partial(info_nce, temperature=1.0, similarity=Similarity.INNER_PRODUCT)
    terms = [info_nce(*x[:2], **options), inner(*x[2:], **options)]
    return jnp.stack([*terms, masked_mean(cosines, mask=mask)])


@jax.jit
def values_and_gradients(x: list[Any], options: dict[str, Any]) -> tuple[Any, Any]:
    return all_losses(x, options), jax.jacrev(all_losses)(x, options)


def test_masked_rows_reach_neither_values_nor_gradients(options):
    x, mask = [jnp.asarray(v) for v in vectors(4)], options["mask"]
    spoiled = [jnp.where(mask[:, None], v, jnp.nan) for v in x]
    unlike = {**options, "log_popularity": jnp.where(mask, options["log_popularity"], -jnp.inf)}
    values, gradients = values_and_gradients(spoiled, unlike)
    small = {name: value[mask] for name, value in options.items() if name != "mask"}
    small["false_negatives"] = small["false_negatives"][:, mask]
    expected, expected_gradients = values_and_gradients([v[mask] for v in x], small)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_array_equal(gradient[:, ~mask], 0)
        np.testing.assert_allclose(gradient[:, mask], wanted, rtol=1e-4, atol=1e-6)
    assert np.isnan(values_and_gradients(spoiled, {})[0]).all()  # control


@pytest.mark.parametrize("rows", [N, 0])
def test_no_rows_cost_nothing(rows):
    values, gradients = values_and_gradients([jnp.ones((rows, DIM))] * 4, {"mask": np.zeros(rows, bool)})
    np.testing.assert_array_equal(values, 0)
    assert not any(np.any(gradient) for gradient in gradients)


def test_one_row_has_no_negatives():
    values, _ = values_and_gradients([jnp.ones((1, DIM))] * 4, {})
    np.testing.assert_allclose(values, [0, 0, 1], atol=1e-6)


def test_a_vector_of_zeros_has_no_direction_and_no_gradient():
    x = [jnp.asarray(v).at[3].set(0) for v in vectors(4)]
    values, gradients = values_and_gradients(x, {})
    assert np.isfinite(values).all()
    cosines = [gradients[0][jnp.array([0, 2])], gradients[1][jnp.array([0, 2])]]
    for gradient in cosines:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[:, 3], 0)
        assert np.any(gradient[:, 4] != 0)


def test_half_precision_is_computed_in_float32(options):
    x = [jnp.asarray(v, jnp.bfloat16) for v in vectors(4)]
    values, gradients = values_and_gradients(x, options)
    expected, expected_gradients = values_and_gradients([v.astype(jnp.float32) for v in x], options)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, rtol=1e-2, atol=1e-6)


def test_temperature_may_be_learned():
    a, b = vectors(2)
    by_temperature = jax.grad(lambda t: info_nce(a, b, temperature=t))(jnp.float32(0.07))
    assert by_temperature < -0.1  # random vectors: the softer, the nearer to log n


MESH_AXES = ("data", "fsdp")


def mesh_of_eight() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("chosen", [(), OPTIONS], ids=["plain", "all options"])
def test_jit_over_sharded_rows_needs_nothing_more(options, chosen):
    chosen, x = {name: options[name] for name in chosen}, vectors(4)
    expected, expected_gradients = values_and_gradients([jnp.asarray(v) for v in x], chosen)
    spread = jax.device_put((x, chosen), NamedSharding(mesh_of_eight(), P(MESH_AXES)))
    values, gradients = values_and_gradients(*spread)
    assert len(spread[0][0].sharding.device_set) == 8
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


BAD_INPUTS: list[tuple[Callable[..., Any], str]] = [
    (lambda a: info_nce(a, a[:, :3]), r"\(16, 4\) and \(16, 3\)"),
    (lambda a: info_nce(a, a[:5]), r"\(16, 4\) and \(5, 4\)"),
    (lambda a: info_nce(a[0], a[0]), r"\[n, dim\]"),
    (lambda a: info_nce(a, a, ids=np.zeros(1, np.int32)), r"ids of shape \(16,\).*\(1,\)"),
    (lambda a: info_nce(a, a, mask=np.ones((N, 1), bool)), "mask of shape"),
    (lambda a: info_nce(a, a, false_negatives=np.zeros((N, 1), bool)), r"\(16, 16\), got \(16, 1\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD_INPUTS)
def test_shapes_that_do_not_agree_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(vectors(1)[0])
