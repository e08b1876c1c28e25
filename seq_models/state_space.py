"""A state-space recurrence over histories (after Mamba-2, arXiv 2405.21060, and MMM4Rec, arXiv 2506.02916).

A head has a state `h_t = a_t h_{t-1} + d_t b_t x_t^T` and outputs `c_t h_t`. The decay `a_t = exp(-d_t r)`, the write
`d_t b_t` and the read `c_t` depend on the input; if times are read, `d_t` also depends on the time since the item
before. At the first position of a segment `a_t` is 0. Rows are processed in chunks: within a chunk by products with
decays, like attention without a softmax; between chunks by an associative scan over the chunks' states.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from seq_models.layers import SwiGLU, TransformerConfig, dropout, fused, linear, norm, split_key

# Positions per chunk.
_CHUNK = 64
# Width of the causal convolution before the recurrence.
_TAPS = 4
# Items after which a new head's state has decayed to 1 / e, spaced geometrically from the first head to the last.
_SHORTEST, _LONGEST = 1.0, 32.0


class Within(NamedTuple):
    """Segments of rows, and the bias of the step sizes' logits by times; None: times are not read."""

    segments: Int[Array, "b t"]
    by_time: Float[Array, "b t heads"] | None = None


class StateSpace(nnx.Module):
    """The recurrence with its projections: a short convolution before it, a gate and a norm after it."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        heads, width = config.heads, config.dim // config.heads
        self.mix = fused(config, config.dim, (2, heads, width), rngs)
        self.maps = linear(config, config.dim, 2 * config.state_size, rngs)
        self.step = linear(config, config.dim, heads, rngs, bias=True)
        self.taps = nnx.Param(jnp.zeros((_TAPS, heads, width)).at[0].set(1.0))
        self.log_rates = nnx.Param(-jnp.log(jnp.geomspace(_SHORTEST, _LONGEST, heads)))
        self.skip = nnx.Param(jnp.ones(heads))
        self.norm = nnx.RMSNorm(width, dtype=jnp.float32, rngs=rngs)
        self.out = linear(config, config.dim, config.dim, rngs)

    def __call__(self, x: Float[Array, "b t dim"], within: Within) -> Float[Array, "b t dim"]:
        """Outputs at every position, which depend on its segment up to it."""
        values, gate = jnp.moveaxis(self.mix(x), -3, 0)
        values = jax.nn.silu(convolved(values, self.taps[...].astype(values.dtype), within.segments))
        keys, queries = jnp.split(self.maps(x), 2, axis=-1)
        logits = self.step(x).astype(jnp.float32)
        steps = jax.nn.softplus(logits if within.by_time is None else logits + within.by_time)
        log_decays = -steps * jnp.exp(self.log_rates[...])[None, None]
        written = values * steps[..., None].astype(values.dtype)
        read = recurrence(written, log_decays, keys, queries, within.segments)
        read = read + values * self.skip[...].astype(values.dtype)[None, None, :, None]
        gated = self.norm(read * jax.nn.silu(gate))
        return self.out(gated.reshape(x.shape))


class StateSpaceBlock(nnx.Module):
    """Pre-norm block: state space and feed-forward, each with a residual and dropout."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.rate = config.rate
        self.norm_mixer = norm(config, rngs)
        self.mixer = StateSpace(config, rngs=rngs)
        self.norm_feed = norm(config, rngs)
        self.feed = SwiGLU(config, rngs=rngs)

    def __call__(self, x: Array, within: Within, key: Key[Array, ""] | None) -> tuple[Array, tuple[()]]:
        """The states, and an empty cache."""
        first, second = split_key(key, 2)
        x = x + dropout(self.mixer(self.norm_mixer(x), within), self.rate, first)
        return x + dropout(self.feed(self.norm_feed(x)), self.rate, second), ()


def convolved(
    x: Float[Array, "b t heads width"], taps: Float[Array, "taps heads width"], segments: Int[Array, "b t"]
) -> Float[Array, "b t heads width"]:
    """Causal convolution within segments: sums of `taps[n]` times the entry `n` positions before."""
    length, total = x.shape[1], x * taps[0][None, None]
    for lag in range(1, len(taps)):
        own = jnp.pad(segments, ((0, 0), (lag, 0)), constant_values=-1)[:, :length] == segments
        before = jnp.pad(x, ((0, 0), (lag, 0), (0, 0), (0, 0)))[:, :length]
        total += jnp.where(own[..., None, None], before, 0) * taps[lag][None, None]
    return total


def recurrence(
    values: Float[Array, "b t heads width"],
    log_decays: Float[Array, "b t heads"],
    keys: Float[Array, "b t state"],
    queries: Float[Array, "b t state"],
    segments: Int[Array, "b t"],
    *,
    chunk: int = _CHUNK,
) -> Float[Array, "b t heads width"]:
    """`queries_t h_t` with `h_t = exp(log_decays_t) h_{t-1} + keys_t values_t^T`, per head; h is zero before a segment.

    Decays and the states between chunks are float32, products are in the dtype of `values`.
    """
    length, size = values.shape[1], min(chunk, values.shape[1])
    missing = -length % size

    def chunks(x: Array, fill: int = 0) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return padded.reshape(x.shape[0], -1, size, *x.shape[2:])

    values, keys, queries, total = chunks(values), chunks(keys), chunks(queries), jnp.cumsum(chunks(log_decays), axis=2)
    segments = chunks(segments, fill=-1)
    own = (segments[..., :, None] == segments[..., None, :]) & jnp.tri(size, dtype=bool)[None, None]
    shares = jnp.einsum("bnqd,bnkd->bnqk", queries, keys, preferred_element_type=jnp.float32)
    shares = shares[..., None] * _exp(total[:, :, :, None] - total[:, :, None], own)
    read = jnp.einsum("bnqkh,bnkhw->bnqhw", shares.astype(values.dtype), values)
    if total.shape[1] > 1:
        read += _from_before(values, total, keys, queries, segments)
    return read.reshape(read.shape[0], -1, *read.shape[3:])[:, :length]


def _from_before(
    values: Float[Array, "b n t heads width"],
    total: Float[Array, "b n t heads"],
    keys: Float[Array, "b n t state"],
    queries: Float[Array, "b n t state"],
    segments: Int[Array, "b n t"],
) -> Float[Array, "b n t heads width"]:
    """Contribution of earlier chunks to the outputs of each chunk; `total` are log decays summed from its start."""
    last = segments[:, :, -1]
    before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]
    to_end = _exp(total[:, :, -1:] - total, segments == last[..., None])
    written = values * to_end[..., None].astype(values.dtype)
    states = jnp.einsum("bnkd,bnkhw->bnhdw", keys, written, preferred_element_type=jnp.float32)
    # A segment at the end of two consecutive chunks fills the second one.
    kept = _exp(total[:, :, -1], last == before)[..., None, None]
    _, states = jax.lax.associative_scan(_joined, (kept, states), axis=1)
    entering = jnp.pad(states, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))[:, :-1].astype(values.dtype)
    read = jnp.einsum("bnqd,bnhdw->bnqhw", queries, entering)
    return read * _exp(total, segments == before[..., None])[..., None].astype(values.dtype)


def _joined(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Decay and state of two consecutive stretches."""
    return first[0] * second[0], second[0] * first[1] + second[1]


def _exp(log: Float[Array, "*b heads"], there: Array) -> Float[Array, "*b heads"]:
    """Decays, 0 where not `there`."""
    return jnp.exp(jnp.where(there[..., None], log, -jnp.inf))
