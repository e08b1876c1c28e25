"""Attention functions: over packed rows, over the few codes of a prefix, over a history shared by all beams."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seq_models.sharing import HEAD_AXES, ROW_AXES, axes_spec, dividing

# Queries per block: longer rows never hold all their scores at once.
_QUERIES = 512
# Queries, and keys, per step of the kernel for TPUs.
_SPLASH_BLOCK = 256


class KeyValue(NamedTuple):
    """Keys and values of attention; each group of `heads / kv_heads` query heads shares one of their heads."""

    keys: Float[Array, "*b kv_heads width"]
    values: Float[Array, "*b kv_heads width"]


# Called with `start, stop, last`: bias of the queries from `start` to `stop` and the keys up to `last`.
AttentionBias = Callable[[int, int, int], Float[Array, "b heads q k"]]
Past = tuple[KeyValue, ...]  # one per level so far


def rotate(x: Float[Array, "b t heads width"], positions: Int[Array, "#b #t"]) -> Float[Array, "b t heads width"]:
    """Rotary position embedding (Su et al. 2021, RoFormer eq. 15), halves convention; computed in float32."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * rates[None, None, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def segment_begins(segments: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """True at the first entry of each segment."""
    return jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)


def segment_positions(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each entry within its segment, from 0."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[-1])[None], segments.shape)
    return index - jax.lax.cummax(jnp.where(segment_begins(segments), index, 0), axis=1)


def attend_rows(
    q: Float[Array, "b t heads width"],
    kv: KeyValue,
    segments: Int[Array, "b t"],
    *,
    causal: bool,
    bias: AttentionBias | None = None,
) -> Float[Array, "b t heads width"]:
    """Attention within segments; causal: to no later position. Padding attends to padding, so every query has keys.
    A `bias` is added to the scores.

    Rows of up to 512 positions compute all scores at once. Longer rows compute them in parts, so that memory grows
    linearly with the length. The platform that the program is lowered for decides how: on TPUs JAX's splash attention,
    elsewhere blocks of queries, computed by cuDNN if the process has CUDA and cuDNN supports the shapes. With a bias,
    blocks are used everywhere.
    """
    if q.shape[1] <= _QUERIES:
        return _attend_block(q, kv, segments, start=0, causal=causal, bias=bias)
    blocks = functools.partial(_attend_blocks, causal=causal, bias=bias)
    if bias is not None or not isinstance(q.shape[0], int):  # the kernels take neither a bias nor a symbolic size
        return blocks(q, kv, segments)
    return jax.lax.platform_dependent(
        q,
        kv,
        segments,
        tpu=functools.partial(splash_attention, causal=causal),
        cuda=functools.partial(blocks, implementation="cudnn") if _cudnn_supports(q) else blocks,
        default=blocks,
    )


def _attend_blocks(
    q: Array,
    kv: KeyValue,
    segments: Array,
    *,
    causal: bool,
    bias: AttentionBias | None = None,
    implementation: Literal["cudnn"] | None = None,
) -> Array:
    """Attention in blocks of queries; the backward pass computes their scores again."""
    settings: dict[str, Any] = {"causal": causal, "bias": bias, "implementation": implementation}
    blocks = [
        jax.checkpoint(functools.partial(_attend_block, start=start, **settings))(
            q[:, start : start + _QUERIES], kv, segments
        )
        for start in range(0, q.shape[1], _QUERIES)
    ]
    return jnp.concatenate(blocks, axis=1)


def _attend_block(
    q: Array,
    kv: KeyValue,
    segments: Array,
    *,
    start: int,
    causal: bool,
    bias: AttentionBias | None = None,
    implementation: Literal["cudnn"] | None = None,
) -> Array:
    """Attention of the queries from position `start` on over all keys that any of them sees."""
    stop = start + q.shape[1]
    last = stop if causal else segments.shape[1]
    sees = segments[:, start:stop, None] == segments[:, None, :last]
    if causal:
        sees &= (jnp.arange(start, stop)[:, None] >= jnp.arange(last)[None])[None]
    added = None if bias is None else bias(start, stop, last)
    return jax.nn.dot_product_attention(
        q, kv.keys[:, :last], kv.values[:, :last], added, sees[:, None], implementation=implementation
    )


def _cudnn_supports(q: Float[Array, "b t heads width"]) -> bool:
    """True if this process has CUDA and cuDNN's flash attention with a mask supports the dtype, width and (even)
    length."""
    fits = q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and q.shape[1] % 2 == 0
    return fits and "cuda" in jax.extend.backend.get_backend().platform_version


def splash_attention(
    q: Float[Array, "b t heads width"],
    kv: KeyValue,
    segments: Int[Array, "b t"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "b t heads width"]:
    """Attention within segments by the kernel for TPUs, each device on its own rows and heads. `interpret` runs it on
    any device, slowly."""
    run = functools.partial(_splash, causal=causal, interpret=interpret)
    rows, heads = dividing(ROW_AXES, q.shape[0]), dividing(HEAD_AXES, kv.keys.shape[2])
    if not rows and not heads:
        return run(q, kv, segments)
    states = axes_spec(rows, (), heads)
    specs = states, states, axes_spec(rows)
    return jax.shard_map(run, in_specs=specs, out_specs=states, check_vma=False)(q, kv, segments)


def _splash(q: Array, kv: KeyValue, segments: Array, *, causal: bool, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, missing = q.shape[1], -q.shape[1] % _SPLASH_BLOCK
    whole = (length + missing,) * 2
    mask = splash.MultiHeadMask([splash.CausalMask(whole) if causal else splash.FullMask(whole)] * q.shape[2])
    size = _SPLASH_BLOCK
    sizes = splash.BlockSizes(size, size, size, size, size, size, size, size)
    attend = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)

    def heads_first(x: Array) -> Array:
        return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))), 1, 2)

    def of_row(q: Array, keys: Array, values: Array, segments: Array) -> Array:
        return attend(q, keys, values, splash.SegmentIds(segments, segments))

    filled = jnp.pad(segments, ((0, 0), (0, missing)), constant_values=-1)  # a segment of its own
    keys, values = (heads_first(x) for x in kv)
    found = jax.vmap(of_row)(heads_first(q * q.shape[-1] ** -0.5), keys, values, filled)
    return jnp.moveaxis(found, 2, 1)[:, :length]


def attend_past(q: Float[Array, "*b heads width"], past: Past) -> Float[Array, "*b heads width"]:
    """Attention of one query over a few levels, by float32 sums of products, which XLA fuses, unlike tiny matmuls."""
    past = _for_every_head(past, q)
    return _mix(_scores(q, past), [kv.values for kv in past]).astype(q.dtype)


def attend_history(
    q: Float[Array, "b beam heads width"], history: KeyValue, real: Bool[Array, "b t"], past: Past
) -> Float[Array, "b beam heads width"]:
    """Attention of each beam's query over its user's history, stored once for all beams, and over the beam's own past.

    The result of attention over the history is treated as one more value next to the levels of the past, its score
    being the logsumexp over the history. Everything is float32: JAX rounds that logsumexp to the dtype of the keys, and
    in bfloat16 the weight of the history would be off by up to a tenth.
    """
    query, keys, values = (x.astype(jnp.float32) for x in (q, *history))
    read, score = jax.nn.dot_product_attention(query, keys, values, mask=real[:, None, None, :], return_residual=True)
    past = _for_every_head(past, q)
    scores = jnp.concatenate([score[None], _scores(q, past)])
    return _mix(scores, [read, *(kv.values for kv in past)]).astype(q.dtype)


def _for_every_head(past: Past, q: Float[Array, "*b heads width"]) -> Past:
    """Keys and values repeated for each query head of a group: cheap for a few levels."""
    group = q.shape[-2] // past[0].keys.shape[-2]
    return past if group == 1 else jax.tree.map(lambda x: jnp.repeat(x, group, axis=-2), past)


def _scores(q: Float[Array, "*b heads width"], past: Past) -> Float[Array, "level *b heads"]:
    q = q.astype(jnp.float32)
    products = [jnp.sum(q * kv.keys.astype(jnp.float32), axis=-1) for kv in past]
    return jnp.stack(products) * (q.shape[-1] ** -0.5)


def _mix(scores: Float[Array, "n *b heads"], values: list[Array]) -> Float[Array, "*b heads width"]:
    shares, exact = jax.nn.softmax(scores, axis=0), [value.astype(jnp.float32) for value in values]
    return functools.reduce(jnp.add, [share[..., None] * value for share, value in zip(shares, exact, strict=True)])


def gather_ancestors(past: Past, ancestors: Int[Array, "b beam level"]) -> Past:
    """Gather each live beam's own past from the results of every step, which are in the order of that step's beams."""
    return tuple(
        jax.tree.map(lambda kept, at=ancestors[..., step]: jax.vmap(lambda beams, i: beams[i])(kept, at), kv)
        for step, kv in enumerate(past)
    )


def append_level(pasts: Sequence[Past], new: Sequence[KeyValue]) -> tuple[Past, ...]:
    """Append a level's keys and values to the past of every block."""
    return tuple((*past, kv) for past, kv in zip(pasts, new, strict=True))
