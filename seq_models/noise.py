"""Sampling of items without replacement: log-probabilities perturbed by Gumbel noise, over all items or down a trie.

Sorting items by log p(i) / T + G(i), with independent standard Gumbel G, is equivalent to drawing them one by one, each
in proportion to p(i)^(1/T) among those left (Gumbel-top-k). In a trie, a node's perturbed value is the maximum over all
items below it, and children are drawn given the value of their parent (Kool, van Hoof and Welling, "Stochastic Beams
and Where to Find Them", ICML 2019, section 4.2).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class GumbelNoise(NamedTuple):
    """Noise of requests: one key each, so that draws do not depend on the batch, and the temperature, above 0."""

    keys: Key[Array, " b"]
    temperature: Float[Array, ""]

    def perturb(self, log_probs: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """Perturbed values of all items; -inf stays."""
        return log_probs / self.temperature + self._gumbel(log_probs.shape[1:], step=0)

    def perturb_children(
        self,
        parents: Float[Array, "b beam"] | None,
        log_probs: Float[Array, "b beam"],
        child_log_probs: Float[Array, "b beam n"],
        *,
        step: int,
        below: tuple[Int[Array, "b beam"], Int[Array, "b beam n"]],
    ) -> Float[Array, "b beam n"]:
        """Perturbed values of children, given those of their parents and the log-probabilities of both.

        `parents` is None at the root, whose children are drawn independently. `below` are the numbers of items below
        the parents and the children.

        The children need not have all of a parent's probability: part of it may belong to codes without an item, or to
        items that a mask denies. That part takes its share of the maximum and is then dropped, so that the other items
        are perturbed independently of it. At temperatures other than 1, the sum of p(i)^(1/T) below a node is unknown;
        it is at most p^(1/T) n^max(0, 1 - 1/T) for n items (Hoelder), and the rest up to that bound is treated the
        same way.
        """
        inverse = 1 / self.temperature
        spread = jnp.maximum(0.0, 1 - inverse)
        above, own = (spread * jnp.log(jnp.maximum(n, 1).astype(jnp.float32)) for n in below)
        location = child_log_probs * inverse + own
        noisy = location + self._gumbel(location.shape[1:], step=step)
        if parents is None:
            return noisy
        whole = (log_probs * inverse + above)[..., None]
        others = jnp.maximum(1 - jnp.exp(location - whole).sum(axis=-1, keepdims=True), 0.0)
        other = whole + jnp.log(others) + self._gumbel(whole.shape[1:], step=step, also=1)
        largest = jnp.maximum(noisy.max(axis=-1, keepdims=True), other)
        perturbed = truncated(noisy, largest, parents[..., None])
        return jnp.where(child_log_probs == -jnp.inf, -jnp.inf, perturbed)

    def _gumbel(self, shape: tuple[int, ...], *, step: int, also: int = 0) -> Float[Array, "b ..."]:
        def draw(key: Key[Array, ""]) -> Array:
            return jax.random.gumbel(jax.random.fold_in(key, 2 * step + also), shape)

        return jax.vmap(draw)(self.keys)


def truncated(
    values: Float[Array, "*n"], largest: Float[Array, "*#n"], maximum: Float[Array, "*#n"]
) -> Float[Array, "*n"]:
    """Gumbel values with maximum `largest`, conditioned on another `maximum`: -log(exp(-maximum) - exp(-largest) +
    exp(-values)), in the stable form of Kool et al. (appendix B.3)."""
    gap = values - largest
    below = jnp.where(gap > -0.6931472, jnp.log(-jnp.expm1(gap)), jnp.log1p(-jnp.exp(gap)))
    v = maximum - values + below
    return maximum - jnp.maximum(0.0, v) - jnp.log1p(jnp.exp(-jnp.abs(v)))


def request_noise(seed: int, index: Int[Array, " b"], *, temperature: float) -> GumbelNoise:
    """Noise of the requests number `index` under a seed. Raises ValueError for a temperature of 0 or less."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), index)
    return GumbelNoise(keys, jnp.asarray(temperature, jnp.float32))
