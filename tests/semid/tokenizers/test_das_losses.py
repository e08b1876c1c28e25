"""The losses of DAS's click model: a loop in numpy as the oracle, masks, and the same losses on eight devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import in_batch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from in_batch import DIM, N, cross_entropy, naive_rows, unit, vectors
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from semid.tokenizers.alignment.das import debias_loss, debiased_click_loss

OPTIONS = in_batch.OPTIONS[:3]  # clicks are not corrected for popularity
CHOICES = [chosen for chosen in in_batch.CHOICES if set(chosen) <= set(OPTIONS)]


@pytest.fixture(name="options")
def _options() -> dict[str, np.ndarray]:
    return {name: in_batch.options()[name] for name in OPTIONS}


@pytest.mark.parametrize("chosen", CHOICES, ids="+".join)
def test_click_loss_equals_a_double_loop(options, chosen):
    chosen = {name: options[name] for name in chosen}
    interest, conformity, quality, popularity = vectors(4)
    found = debiased_click_loss(interest, conformity, quality, popularity, **chosen)
    scores = interest @ quality.T + conformity @ popularity.T
    expected = np.mean([cross_entropy(*row) for row in naive_rows(scores, chosen)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_debias_losses_are_cosines(options):
    interest, bias, observed = vectors(3)
    kept = options["mask"]
    tied, apart = debias_loss(interest, bias, observed, mask=kept)
    np.testing.assert_allclose(tied, 1 - (unit(bias) * unit(observed)).sum(-1)[kept].mean(), rtol=1e-5)
    np.testing.assert_allclose(apart, np.square((unit(interest) * unit(bias)).sum(-1))[kept].mean(), rtol=1e-5)
    orthogonal = bias[:, [1, 0, 3, 2]] * np.float32([1, -1, 1, -1])
    np.testing.assert_allclose(debias_loss(orthogonal, bias, 3 * bias), [0, 0], atol=1e-6)
    np.testing.assert_allclose(debias_loss(-bias, bias, -bias), [2, 1], rtol=1e-6)


def all_losses(x: list[Any], options: dict[str, Any]) -> jax.Array:
    """Every loss of this file on four arrays of rows."""
    return jnp.stack([debiased_click_loss(*x, **options), *debias_loss(*x[:3], mask=options.get("mask"))])


@jax.jit
def values_and_gradients(x: list[Any], options: dict[str, Any]) -> tuple[Any, Any]:
    return all_losses(x, options), jax.jacrev(all_losses)(x, options)


def test_masked_rows_reach_neither_values_nor_gradients(options):
    x, mask = [jnp.asarray(v) for v in vectors(4)], options["mask"]
    spoiled = [jnp.where(mask[:, None], v, jnp.nan) for v in x]
    values, gradients = values_and_gradients(spoiled, options)
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
    cosines = [gradients[0][1:], gradients[1][1:], gradients[2][1:]]
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
    (lambda a: debiased_click_loss(a, a[:, :2], a[:, :3], a[:, :3]), r"\(16, 2\) and \(16, 3\)"),
    (lambda a: debias_loss(a, a, a[:, :3]), r"\(16, 4\) and \(16, 3\)"),
    (lambda a: debias_loss(a, a, a, mask=np.ones(3, bool)), "mask of shape"),
]


@pytest.mark.parametrize(("call", "message"), BAD_INPUTS)
def test_shapes_that_do_not_agree_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(vectors(1)[0])
