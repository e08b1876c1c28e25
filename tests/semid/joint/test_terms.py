"""The losses of the joint step against plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semid.joint import code_agreement, session_contrast, symmetric_info_nce

N, DIM, SIZES = 6, 4, (5, 3)


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


A, B = random(0, N, DIM), random(1, N, DIM)
BOOKS = tuple(random(10 + level, size, DIM) for level, size in enumerate(SIZES))
CODEBOOKS = tuple(map(jnp.asarray, BOOKS))
ITEMS, SESSIONS = np.array([3, 1, 3, 4, 5, 1]), np.array([0, 0, 1, 1, 2, 3])
MASK = np.array([True, True, True, False, True, True])


def shares(x, temperature):
    """Every level's probabilities of a latent's codes, in float64, the nearest code the likeliest."""
    residual, found = x.astype(float), []
    for book in BOOKS:
        distances = ((residual[:, None] - book[None]) ** 2).sum(-1)
        weights = np.exp(-distances / temperature)
        found.append(weights / weights.sum(-1, keepdims=True))
        assert np.array_equal(found[-1].argmax(-1), distances.argmin(-1))
        residual = residual - book[distances.argmin(-1)]
    return found


def info_nce(anchors, targets, usable, temperature):
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (anchors.astype(float), targets.astype(float))]
    scores = np.exp(unit[0] @ unit[1].T / temperature)
    return np.array([-np.log(scores[r, r] / (scores[r, r] + scores[r, usable[r]].sum())) for r in range(N)])


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_code_agreement_is_both_divergences_summed_over_levels(mask, temperature):
    each = sum(
        (p * np.log(p / q)).sum(-1) + (q * np.log(q / p)).sum(-1)
        for p, q in zip(shares(A, temperature), shares(B, temperature), strict=True)
    )
    kept = None if mask is None else jnp.asarray(mask)
    found = code_agreement(jnp.asarray(A), jnp.asarray(B), CODEBOOKS, temperature=temperature, mask=kept)
    assert float(found) == pytest.approx(each[slice(None) if mask is None else mask].mean(), rel=1e-4)


def test_code_agreement_leads_to_the_target_and_its_codes():
    """The sign: following the gradient brings the summary of a history nearer to its target's codes."""
    a, b = jnp.asarray(A), jnp.asarray(B)
    start = code_agreement(a, b, CODEBOOKS)
    assert float(code_agreement(b, b, CODEBOOKS)) == 0
    pull = jax.jit(jax.value_and_grad(lambda a: code_agreement(a, b, CODEBOOKS)))
    for _ in range(60):
        a = a - 0.05 * pull(a)[1]
    assert float(pull(a)[0]) < 0.2 * float(start)
    before, after = (np.log(shares(np.asarray(x), 1.0)[0]) for x in (A, a))
    nearest = shares(B, 1.0)[0].argmax(-1)
    assert after[np.arange(N), nearest].mean() > before[np.arange(N), nearest].mean()


def test_code_agreement_is_finite_far_from_all_codes():
    far = jnp.asarray(100 * A)
    value, gradient = jax.value_and_grad(lambda x: code_agreement(x, jnp.asarray(B), CODEBOOKS, temperature=0.01))(far)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("mask", [None, MASK])
def test_symmetric_info_nce_in_both_directions(mask):
    usable = (ITEMS[:, None] != ITEMS[None]) & (True if mask is None else mask[None])
    each = (info_nce(A, B, usable, 0.3) + info_nce(B, A, usable, 0.3)) / 2
    kept = None if mask is None else jnp.asarray(mask)
    items = jnp.asarray(ITEMS)
    found = symmetric_info_nce(jnp.asarray(A), jnp.asarray(B), items=items, temperature=0.3, mask=kept)
    assert float(found) == pytest.approx(each[slice(None) if mask is None else mask].mean(), rel=1e-4)
    swapped = symmetric_info_nce(jnp.asarray(B), jnp.asarray(A), items=items, temperature=0.3, mask=kept)
    assert float(swapped) == pytest.approx(float(found), rel=1e-6)


@pytest.mark.parametrize("mask", [None, MASK])
def test_session_contrast_has_no_negatives_of_the_same_session(mask):
    apart = (SESSIONS[:, None] != SESSIONS[None]) & (ITEMS[:, None] != ITEMS[None])
    usable = apart & (True if mask is None else mask[None])
    each = info_nce(A, B, usable, 0.1)
    kept = None if mask is None else jnp.asarray(mask)
    options = {"items": jnp.asarray(ITEMS), "temperature": 0.1, "mask": kept}
    found = session_contrast(jnp.asarray(A), jnp.asarray(B), sessions=jnp.asarray(SESSIONS), **options)
    rows = slice(None) if mask is None else mask
    assert float(found) == pytest.approx(each[rows].mean(), rel=1e-4)
    alone = session_contrast(jnp.asarray(A), jnp.asarray(B), sessions=jnp.arange(N), **options)
    assert float(alone) > float(found)  # more negatives


def test_masked_rows_of_nan_reach_no_gradient():
    bad = jnp.asarray(np.where(MASK[:, None], A, np.nan))
    items, mask = jnp.asarray(ITEMS), jnp.asarray(MASK)
    losses = (
        lambda x: code_agreement(x, jnp.asarray(B), CODEBOOKS, mask=mask),
        lambda x: symmetric_info_nce(x, jnp.asarray(B), items=items, mask=mask),
        lambda x: session_contrast(x, jnp.asarray(B), items=items, sessions=jnp.asarray(SESSIONS), mask=mask),
    )
    for loss in losses:
        gradient = np.asarray(jax.grad(loss)(bad))
        assert np.isfinite(gradient).all()
        assert not gradient[~MASK].any()
        assert gradient[MASK].any()
