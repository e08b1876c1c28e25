"""Losses that need more care than one line."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Logits held at once: a block stays in the cache of a CPU core.
_BLOCK = 1 << 21


def softmax_cross_entropy(
    states: Float[Array, "n dim"],
    vectors: Float[Array, "ids dim"],
    targets: Int[Array, " n"],
    weights: Float[Array, " n"],
) -> Float[Array, ""]:
    """Sum over n of `weight * -log softmax(vectors @ state)[target]`, never holding all n x ids logits.

    Blocks of states are taken one after another, and each block's gradient is computed along with its loss, as in
    fused linear cross-entropy kernels: three matrix products, and two passes over logits that stay in cache.
    """
    block = max(min(_BLOCK // len(vectors), len(states)), 1)
    missing = -len(states) % block
    padded = jnp.pad(states, ((0, missing), (0, 0)))
    return _blocked(padded, vectors, jnp.pad(targets, (0, missing)), jnp.pad(weights, (0, missing)), block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(states: Array, vectors: Array, targets: Array, weights: Array, block: int) -> Array:
    return _forward(states, vectors, targets, weights, block)[0]


def _forward(states: Array, vectors: Array, targets: Array, weights: Array, block: int) -> tuple[Array, tuple]:
    def one(by_vectors: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        state, target, weight = inputs
        logits = jnp.matmul(state, vectors.T)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        powers = jnp.exp(logits - largest)
        total = jnp.sum(powers, axis=-1, keepdims=True)
        wanted = jnp.take_along_axis(logits, target[:, None], axis=-1)
        losses = (jnp.log(total) + largest - wanted)[:, 0]
        shares = powers * (weight[:, None] / total)
        by_state = jnp.matmul(shares, vectors) - weight[:, None] * vectors[target]
        by_vectors = by_vectors + jnp.matmul(shares.T, state)
        return by_vectors.at[target].add(-weight[:, None] * state), (losses, by_state)

    blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (states, targets, weights))
    by_vectors, (losses, by_states) = jax.lax.scan(one, jnp.zeros_like(vectors), blocks)
    by_weights = losses.reshape(weights.shape)
    return jnp.sum(weights * by_weights), (by_states.reshape(states.shape), by_vectors, by_weights)


def _backward(block: int, gradients: tuple, scale: Array) -> tuple:
    by_states, by_vectors, by_weights = gradients
    return by_states * scale, by_vectors * scale, None, by_weights * scale


_blocked.defvjp(_forward, _backward)
