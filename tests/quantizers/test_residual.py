"""Gradients and codebook maintenance of the residual quantizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from quantizers import (
    GradientPath,
    Gumbel,
    Nearest,
    ResidualQuantizer,
    Sinkhorn,
    code_counts,
    code_logits,
    reseed_dead_codes,
    residual_codes,
    residual_encode,
    residual_quantize,
)
from quantizers.residual import level_errors

DIM = 4
LEVEL_SIZES = (6, 5, 4)


@pytest.fixture
def codebooks() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (size, DIM)) for key, size in zip(keys, LEVEL_SIZES, strict=True))


@pytest.fixture
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (20, DIM))


def test_jacobian_of_the_vectors_is_exactly_the_identity(codebooks, x):
    jacobian = jax.jit(jax.vmap(jax.jacrev(lambda item: residual_quantize(item, codebooks).vectors)))(x)
    np.testing.assert_array_equal(jacobian, np.broadcast_to(np.eye(DIM), (20, DIM, DIM)))


def test_every_level_commits_the_input(codebooks, x):
    """d/dx mean (r_l - sg(e_l))^2 = 2 (r_l - e_l) / size at every level, since dr_l/dx = 1."""

    @jax.jit
    def commitment(items: jax.Array) -> jax.Array:
        _, residuals, chosen, _ = residual_codes(items, codebooks)
        return level_errors(residuals - jax.lax.stop_gradient(chosen))

    jacobian = np.asarray(jax.jit(jax.jacrev(commitment))(x))
    _, residuals, chosen, _ = jax.device_get(residual_codes(x, codebooks))
    np.testing.assert_allclose(jacobian, 2 * (residuals - chosen).swapaxes(0, 1) / x.size, rtol=1e-5)
    assert (np.linalg.norm(jacobian, axis=(1, 2)) > 0.01).all()
    np.testing.assert_allclose(commitment(x).sum(), residual_quantize(x, codebooks).losses.commitment, rtol=1e-6)


def test_control_residuals_of_straight_through_codes_commit_the_first_level_only(codebooks, x):
    def commitment(items: jax.Array) -> jax.Array:
        residual, errors = items, []
        for codebook, code in zip(codebooks, residual_codes(items, codebooks).codes.T, strict=True):
            vector = codebook[code]
            errors.append(jnp.square(residual - jax.lax.stop_gradient(vector)).mean())
            residual = residual - (residual + jax.lax.stop_gradient(vector - residual))
        return jnp.stack(errors)

    norms = np.linalg.norm(jax.jit(jax.jacrev(commitment))(x), axis=(1, 2))
    assert norms[0] > 0.01
    np.testing.assert_array_equal(norms[1:], 0)


def test_each_loss_moves_its_own_side(codebooks, x):
    def terms(books: tuple[jax.Array, ...], items: jax.Array) -> tuple[jax.Array, ...]:
        quantized = residual_quantize(items, books)
        return (*quantized.losses, quantized.vectors.sum())

    by_term = jax.device_get(jax.jit(jax.jacrev(terms, argnums=(0, 1)))(codebooks, x))
    moved = [tuple(any(np.any(leaf != 0) for leaf in jax.tree.leaves(side)) for side in term) for term in by_term]
    assert moved == [(True, False), (False, True), (False, True)]  # codebook loss, commitment loss, vectors
    codes, residuals, chosen, _ = jax.device_get(residual_codes(x, codebooks))
    for level, gradient in enumerate(by_term[0][0]):  # 2 (e - r) / size, added up over the items that chose e
        expected = np.zeros(gradient.shape)
        np.add.at(expected, codes[:, level], 2 * (chosen - residuals)[:, level] / x.size)
        np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_losses_are_mean_squares_summed_over_levels(codebooks, x):
    _, residuals, chosen, _ = jax.device_get(residual_codes(x, codebooks))
    expected = sum(np.square((residuals - chosen)[:, level]).mean() for level in range(3))
    np.testing.assert_allclose(residual_quantize(x, codebooks).losses, [expected, expected], rtol=1e-6)


def test_logits_fall_with_distance():
    logits = code_logits(jnp.array([0.0, 0.0]), jnp.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), temperature=2.0)
    np.testing.assert_array_equal(logits, [-12.5, -0.5, 0.0])


def test_training_by_gradient_halves_the_error():
    """A split module in a jitted step, from random codebooks, on vectors that four codes by four reconstruct."""
    grid = jax.random.normal(jax.random.key(0), (4, 1, DIM)) * 2 + jax.random.normal(jax.random.key(1), (1, 4, DIM)) / 2
    x = grid.reshape(16, DIM)
    graph, state = nnx.split(ResidualQuantizer((4, 4), dim=DIM, rngs=nnx.Rngs(3)))
    optimizer = optax.sgd(1.0)

    def loss_of(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        quantized = nnx.merge(graph, params)(x)
        return quantized.losses.codebook, jnp.square(quantized.vectors - x).mean()

    @jax.jit
    def step(params: nnx.State, moments: optax.OptState) -> tuple[nnx.State, optax.OptState, jax.Array]:
        (_, error), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(params, updates), moments, error

    moments, errors = optimizer.init(state), []
    for _ in range(100):
        state, moments, error = step(state, moments)
        errors.append(float(error))
    assert errors[-1] < 0.5 * errors[0]


def test_counts_are_those_of_bincount(codebooks, x):
    codes = residual_codes(x, codebooks).codes
    mask = jnp.arange(20) < 13
    for level, size in enumerate(LEVEL_SIZES):
        whole = code_counts(codes.reshape(4, 5, 3), level_sizes=LEVEL_SIZES)[level]
        part = code_counts(codes, level_sizes=LEVEL_SIZES, mask=mask)[level]
        np.testing.assert_array_equal(whole, np.bincount(codes[:, level], minlength=size))
        np.testing.assert_array_equal(part, np.bincount(codes[:13, level], minlength=size))
    (small,) = code_counts(jnp.array([[3], [100]], jnp.int8), level_sizes=(200,))  # which int8 does not hold
    assert np.flatnonzero(small).tolist() == [3, 100]


def test_reseeding_revives_dead_codes_and_leaves_the_living_alone(codebooks, x):
    books = [codebooks[0].at[jnp.array([1, 4])].set(1e3), codebooks[1].at[0].set(-1e3), codebooks[2]]
    codes, residuals, _, _ = residual_codes(x, books)
    counts = code_counts(codes, level_sizes=LEVEL_SIZES)
    result = reseed_dead_codes(books, counts, residuals=residuals, key=jax.random.key(2))
    np.testing.assert_array_equal(result.num_replaced, [np.sum(np.asarray(count) == 0) for count in counts])
    assert result.num_replaced[0] >= 2
    assert result.num_replaced[1] >= 1
    for level in range(3):
        replaced, book = np.asarray(result.replaced[level]), np.asarray(result.codebooks[level])
        np.testing.assert_array_equal(replaced, np.asarray(counts[level]) == 0)
        np.testing.assert_array_equal(book[~replaced], np.asarray(books[level])[~replaced])
        rows = {row.tobytes() for row in np.asarray(residuals[:, level])}
        assert all(row.tobytes() in rows for row in book[replaced])
        assert len(np.unique(book, axis=0)) == len(book)
    revived = code_counts(residual_codes(x, result.codebooks).codes, level_sizes=LEVEL_SIZES)
    assert (revived[0][result.replaced[0]] > 0).all()
    again = reseed_dead_codes(books, counts, residuals=residuals, key=jax.random.key(2))
    other = reseed_dead_codes(books, counts, residuals=residuals, key=jax.random.key(3))
    np.testing.assert_array_equal(again.codebooks[0], result.codebooks[0])
    assert not np.array_equal(other.codebooks[0], result.codebooks[0])


def test_reseeding_more_dead_codes_than_items_uses_items_again(codebooks, x):
    residuals = residual_codes(x[:2], codebooks).residuals
    zeros = tuple(jnp.zeros(size, jnp.int32) for size in LEVEL_SIZES)
    result = reseed_dead_codes(codebooks, zeros, residuals=residuals, key=jax.random.key(0))
    np.testing.assert_array_equal(result.num_replaced, LEVEL_SIZES)
    np.testing.assert_array_equal(np.unique(result.codebooks[0], axis=0), np.unique(residuals[:, 0], axis=0))


@pytest.mark.parametrize(("level_sizes", "dim"), [((), 4), ((4, 0), 4), ((4,), 0)])
def test_sizes_must_be_positive(level_sizes, dim):
    with pytest.raises(ValueError, match="1 or more"):
        ResidualQuantizer(level_sizes, dim=dim, rngs=nnx.Rngs(0))


def test_plain_encoding_and_training_compute_no_probabilities(codebooks, x):
    """Their softmax is dead code there: the compiled programs hold no exponential."""
    graph, state = nnx.split(ResidualQuantizer(LEVEL_SIZES, dim=DIM, rngs=nnx.Rngs(0)))

    def gradient(state: nnx.State, x: jax.Array) -> nnx.State:
        return jax.grad(lambda state: sum(nnx.merge(graph, state)(x).losses))(state)

    programs = (residual_encode.lower(x, codebooks), jax.jit(gradient).lower(state, x))
    assert not any("exponential" in program.compile().as_text() for program in programs)
    assert "exponential" in residual_codes.lower(x, codebooks).compile().as_text()  # control


def test_the_halves_of_a_call_make_the_call(x):
    options = {"assignment": [Nearest(), Gumbel(), Sinkhorn()], "path": GradientPath.ROTATION}
    quantizer = ResidualQuantizer(LEVEL_SIZES, dim=DIM, rngs=nnx.Rngs(0), **options)
    mask, key = jnp.arange(20) < 15, jax.random.key(1)
    whole = quantizer(x, mask=mask, key=key, progress=0.3)
    found = quantizer.search(x, mask=mask, key=key, progress=0.3)
    jax.tree.map(np.testing.assert_array_equal, whole, quantizer.quantize_found(x, found, mask=mask))
    assert [share.shape for share in found.probabilities] == [(20, size) for size in LEVEL_SIZES]
    np.testing.assert_array_equal(found.codes[:, 0], quantizer.encode(x)[:, 0])
    assert not np.array_equal(found.codes[:, 1], quantizer.search(x, mask=mask).codes[:, 1])


def test_one_assignment_a_level():
    with pytest.raises(ValueError, match="each of 3 levels, got 2"):
        ResidualQuantizer(LEVEL_SIZES, dim=DIM, rngs=nnx.Rngs(0), assignment=[Nearest(), Sinkhorn()])
