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


def shares(x):
    """Every level's probabilities of a latent's codes, in float64, the nearest code the likeliest."""
    residual, found = x.astype(float), []
    for book in BOOKS:
        distances = ((residual[:, None] - book[None]) ** 2).sum(-1)
        weights = np.exp(-distances)
        found.append(weights / weights.sum(-1, keepdims=True))
        assert np.array_equal(found[-1].argmax(-1), distances.argmin(-1))
        residual = residual - book[distances.argmin(-1)]
    return found


def info_nce(anchors, targets, usable, temperature):
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (anchors.astype(float), targets.astype(float))]
    scores = np.exp(unit[0] @ unit[1].T / temperature)
    return np.array([-np.log(scores[r, r] / (scores[r, r] + scores[r, usable[r]].sum())) for r in range(N)])


def test_code_agreement_is_both_divergences_summed_over_levels():
    each = sum(
        (p * np.log(p / q)).sum(-1) + (q * np.log(q / p)).sum(-1) for p, q in zip(shares(A), shares(B), strict=True)
    )
    found = code_agreement(jnp.asarray(A), jnp.asarray(B), CODEBOOKS)
    assert float(found) == pytest.approx(each.mean(), rel=1e-4)


def test_code_agreement_leads_to_the_target_and_its_codes():
    """The sign: following the gradient brings the summary of a history nearer to its target's codes."""
    a, b = jnp.asarray(A), jnp.asarray(B)
    start = code_agreement(a, b, CODEBOOKS)
    assert float(code_agreement(b, b, CODEBOOKS)) == 0
    pull = jax.jit(jax.value_and_grad(lambda a: code_agreement(a, b, CODEBOOKS)))
    for _ in range(60):
        a = a - 0.05 * pull(a)[1]
    assert float(pull(a)[0]) < 0.2 * float(start)
    before, after = (np.log(shares(np.asarray(x))[0]) for x in (A, a))
    nearest = shares(B)[0].argmax(-1)
    assert after[np.arange(N), nearest].mean() > before[np.arange(N), nearest].mean()


def test_code_agreement_is_finite_far_from_all_codes():
    far = jnp.asarray(1000 * A)
    value, gradient = jax.value_and_grad(lambda x: code_agreement(x, jnp.asarray(B), CODEBOOKS))(far)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_symmetric_info_nce_in_both_directions():
    usable = ITEMS[:, None] != ITEMS[None]
    each = (info_nce(A, B, usable, 0.07) + info_nce(B, A, usable, 0.07)) / 2
    items = jnp.asarray(ITEMS)
    found = symmetric_info_nce(jnp.asarray(A), jnp.asarray(B), items=items)
    assert float(found) == pytest.approx(each.mean(), rel=1e-4)
    swapped = symmetric_info_nce(jnp.asarray(B), jnp.asarray(A), items=items)
    assert float(swapped) == pytest.approx(float(found), rel=1e-6)


def test_session_contrast_has_no_negatives_of_the_same_session():
    apart = (SESSIONS[:, None] != SESSIONS[None]) & (ITEMS[:, None] != ITEMS[None])
    each, items = info_nce(A, B, apart, 0.02), jnp.asarray(ITEMS)
    found = session_contrast(jnp.asarray(A), jnp.asarray(B), items=items, sessions=jnp.asarray(SESSIONS))
    assert float(found) == pytest.approx(each.mean(), rel=1e-4)
    alone = session_contrast(jnp.asarray(A), jnp.asarray(B), items=items, sessions=jnp.arange(N))
    assert float(alone) > float(found)  # more negatives
