"""Sampling of items without replacement: log-probabilities perturbed by Gumbel noise, leaf by leaf or down a trie.

The order of log p(i) / T + G(i), with independent standard Gumbel G, is that of drawing items one by one, each in
proportion to p(i)^(1/T) among those left (Gumbel-top-k). Down a trie, a node's perturbed value is the maximum of those
of all items below it, and children are drawn given that of their parent (Kool, van Hoof and Welling, "Stochastic Beams
and Where to Find Them", ICML 2019, section 4.2).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class GumbelNoise(NamedTuple):
    """Noise of requests: a key for each, so that no draw depends on the others, and the temperature, above 0."""

    keys: Key[Array, " b"]
    temperature: Float[Array, ""]

    def perturb(self, log_probs: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """Perturbed values of all items; -inf stays."""
        return log_probs / self.temperature + self._gumbel(log_probs.shape[1:], step=0)

    def of_children(
        self,
        parents: Float[Array, "b beam"] | None,
        log_probs: Float[Array, "b beam"],
        of_children: Float[Array, "b beam n"],
        *,
        step: int,
        below: tuple[Int[Array, "b beam"], Int[Array, "b beam n"]],
    ) -> Float[Array, "b beam n"]:
        """Perturbed values of children, given those of their parents and the log-probabilities of both.

        `parents` is None at the root, whose children depend on nothing. `below` are the numbers of items below the
        parents and the children.

        The children need not have all of a parent's probability: codes that no item has, and items that a mask denies,
        may have a part. That part takes its share of the maximum and is dropped, so that the items left are perturbed
        independently of it. At another temperature than 1 the sum of p(i)^(1/T) below a node is not known; it is at
        most p^(1/T) n^max(0, 1 - 1/T), with n items below (Hoelder), and what is missing to that is such a part, too.
        """
        inverse = 1 / self.temperature
        spread = jnp.maximum(0.0, 1 - inverse)
        above, own = (spread * jnp.log(jnp.maximum(n, 1).astype(jnp.float32)) for n in below)
        location = of_children * inverse + own
        noisy = location + self._gumbel(location.shape[1:], step=step)
        if parents is None:
            return noisy
        whole = (log_probs * inverse + above)[..., None]
        others = jnp.maximum(1 - jnp.exp(location - whole).sum(axis=-1, keepdims=True), 0.0)
        other = whole + jnp.log(others) + self._gumbel(whole.shape[1:], step=step, also=1)
        largest = jnp.maximum(noisy.max(axis=-1, keepdims=True), other)
        given = truncated(noisy, largest, parents[..., None])
        return jnp.where(of_children == -jnp.inf, -jnp.inf, given)

    def _gumbel(self, shape: tuple[int, ...], *, step: int, also: int = 0) -> Float[Array, "b ..."]:
        def of_one(key: Key[Array, ""]) -> Array:
            return jax.random.gumbel(jax.random.fold_in(key, 2 * step + also), shape)

        return jax.vmap(of_one)(self.keys)


def truncated(
    values: Float[Array, "*n"], largest: Float[Array, "*#n"], wanted: Float[Array, "*#n"]
) -> Float[Array, "*n"]:
    """Gumbel values moved so that their largest is as wanted: -log(exp(-wanted) - exp(-largest) + exp(-values)), in the
    stable form of Kool et al. (appendix B.3)."""
    gap = values - largest
    below = jnp.where(gap > -0.6931472, jnp.log(-jnp.expm1(gap)), jnp.log1p(-jnp.exp(gap)))
    v = wanted - values + below
    return wanted - jnp.maximum(0.0, v) - jnp.log1p(jnp.exp(-jnp.abs(v)))


def noise_of(seed: int, index: Int[Array, " b"], *, temperature: float) -> GumbelNoise:
    """The noise of requests by their numbers. Raises ValueError for a temperature that is not above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), index)
    return GumbelNoise(keys, jnp.asarray(temperature, jnp.float32))
