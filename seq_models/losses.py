"""Losses over codes and over items: pure functions, which a training loss weighs and adds up."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from seq_models.sharing import shared_axes
from seq_models.trie import Children, CodeTrie

# Logits per block: it fits into the cache of a CPU core. A GPU has a launch cost per product, so its blocks are larger
# (256 MiB).
_BLOCK, _GPU_BLOCK = 1 << 21, 1 << 26
# A block spans all ids if it then has at least _FEW_STATES states (on a GPU a multiple of that); otherwise it has
# _MANY_STATES, and the ids are split into blocks, too.
_FEW_STATES, _MANY_STATES = 64, 1024


def code_cross_entropy(
    logits: Sequence[Float[Array, "*n _"]],
    codes: Int[Array, "*n level"],
    weights: Float[Array, "*n"],
    *,
    smoothing: float = 0.0,
) -> Float[Array, " level"]:
    """Weighted mean of each level's cross-entropy, in nats; `smoothing` is the share of label smoothing."""
    levels = [
        weighted_mean(cross_entropy(of_level, codes[..., level], smoothing=smoothing), weights)
        for level, of_level in enumerate(logits)
    ]
    return jnp.stack(levels)


def cross_entropy(
    logits: Float[Array, "*n size"], codes: Int[Array, "*n"], *, smoothing: float = 0.0
) -> Float[Array, "*n"]:
    """Cross-entropy of `codes`, in nats; label smoothing after Szegedy et al. 2016, section 7."""
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    loss = total - _at(logits, codes)
    return loss if smoothing == 0.0 else loss + smoothing * (_at(logits, codes) - jnp.mean(logits, axis=-1))


def constrained_cross_entropy(
    logits: Float[Array, "*n size"],
    codes: Int[Array, "*n"],
    children: Int[Array, "*n fan_out"],
    valid: Bool[Array, "*n fan_out"],
    *,
    smoothing: float = 0.0,
) -> Float[Array, "*n"]:
    """Cross-entropy of `codes` among the children of their prefix in the trie (MSCGRec, arXiv 2602.03713).

    `children` are the tokens that may follow, with padding where not `valid`; the code itself must be one of them.
    """
    among, total = _among(logits, children, valid)
    loss = total - _at(logits, codes)
    if smoothing == 0.0:
        return loss
    mean = jnp.sum(jnp.where(valid, among, 0.0), axis=-1) / jnp.sum(valid, axis=-1, dtype=logits.dtype)
    return loss + smoothing * (_at(logits, codes) - mean)


def child_cross_entropy(
    logits: Sequence[Float[Array, "*n _"]],
    codes: Int[Array, "*n level"],
    weights: Float[Array, "*n"],
    *,
    trie: CodeTrie,
    smoothing: float = 0.0,
) -> Float[Array, " level"]:
    """Weighted mean of each level's `constrained_cross_entropy` among the children of the target's prefix."""
    losses: list[Array] = []
    for level, children in enumerate(_children(trie, codes)):
        each = constrained_cross_entropy(
            logits[level], codes[..., level], children.tokens, children.valid, smoothing=smoothing
        )
        losses.append(weighted_mean(each, weights))
    return jnp.stack(losses)


def _children(trie: CodeTrie, codes: Int[Array, "*n level"]) -> list[Children]:
    """Children of the codes' prefixes, for each level."""
    path = trie.path(codes)
    parents = (jnp.zeros_like(path[0]), *path[:-1])
    return [trie.children(nodes, level=level) for level, nodes in enumerate(parents)]


def _among(
    logits: Float[Array, "*n size"], children: Int[Array, "*n fan_out"], valid: Bool[Array, "*n fan_out"]
) -> tuple[Float[Array, "*n fan_out"], Float[Array, "*n"]]:
    """Logits of the children, -inf where not valid, and their logsumexp."""
    among = jnp.where(valid, jnp.take_along_axis(logits, children, axis=-1), -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(among, axis=-1, keepdims=True))
    return among, jnp.log(jnp.sum(jnp.exp(among - largest), axis=-1)) + largest[..., 0]


def item_cross_entropy(
    states: Float[Array, "*n dim"],
    vectors: Float[Array, "items dim"],
    targets: Int[Array, "*n"],
    weights: Float[Array, "*n"],
    *,
    seen: Int[Array, "*n s"] | None = None,
) -> Float[Array, ""]:
    """Weighted mean of the full-softmax cross-entropy of the next item, in nats, over all items but those `seen`.

    On a mesh set by `jax.set_mesh`, items and states are sharded (`shared_axes`).
    """
    flat = (states.reshape(-1, states.shape[-1]), vectors, jnp.maximum(targets, 0).reshape(-1), weights.reshape(-1))
    without = None if seen is None else seen.reshape(-1, seen.shape[-1])
    rows, ids = shared_axes(len(flat[0]), len(vectors))
    total, of_all = softmax_cross_entropy(*flat, without=without, row_axes=rows, id_axes=ids), jnp.sum(weights)
    return total / jnp.where(of_all == 0, 1.0, of_all)


def teacher_shift(
    states: Float[Array, "*n dim"],
    vectors: Float[Array, "items dim"],
    targets: Int[Array, "*n"],
    weights: Float[Array, "*n"],
    *,
    teacher_rows: Int[Array, "*n k"],
    teacher_scores: Float[Array, "*n k"],
) -> Float[Array, ""]:
    """Change of `item_cross_entropy` when a teacher's distribution over k items replaces the target: weighted mean of
    the target's logit minus the mean logit under the teacher; 0 at positions without teacher items.

    `teacher_scores` are logits, -inf for items that do not count.
    """
    counts = teacher_scores > -jnp.inf
    shares = jax.nn.softmax(jnp.where(counts, teacher_scores, jnp.finfo(jnp.float32).min), axis=-1)
    items = jnp.einsum("...k,...kd->...d", shares, vectors[jnp.maximum(teacher_rows, 0)])
    gained = jnp.sum(states * (vectors[jnp.maximum(targets, 0)] - items), axis=-1)
    return weighted_mean(jnp.where(counts.any(axis=-1), gained, 0.0), weights)


def distillation(
    logits: Sequence[Float[Array, "*n _"]],
    codes: Int[Array, "*n level"],
    weights: Float[Array, "*n"],
    *,
    teacher_codes: Int[Array, "*n k level"],
    teacher_scores: Float[Array, "*n k"],
    trie: CodeTrie | None = None,
) -> Float[Array, " level"]:
    """Cross-entropy of each level to a teacher that scores items, given the target's codes before that level.

    `teacher_codes` are the codes of k items, e.g. the teacher's best; `teacher_scores` their logits, divided by a
    temperature if desired, -inf for items that do not count. The teacher's probability of a code is the sum over the
    items with the target's prefix and that code; if none of the k items has the prefix, the level has no loss. UniGRec
    (arXiv 2601.17438), too, distills a teacher over items, by contrasting states; comparing distributions of codes
    needs no projection between widths. With a `trie`, the student's softmax is over the children of the target's
    prefix.
    """
    shares_prefix, losses = teacher_scores > -jnp.inf, []
    children = None if trie is None else _children(trie, codes)
    for level, of_level in enumerate(logits):
        known = jnp.any(shares_prefix, axis=-1)
        powers = jax.nn.softmax(jnp.where(shares_prefix, teacher_scores, jnp.finfo(jnp.float32).min), axis=-1)
        if children is None:
            students = jnp.take_along_axis(jax.nn.log_softmax(of_level), teacher_codes[..., level], axis=-1)
        else:
            total = _among(of_level, children[level].tokens, children[level].valid)[1]
            students = jnp.take_along_axis(of_level, teacher_codes[..., level], axis=-1) - total[..., None]
        losses.append(weighted_mean(-jnp.sum(powers * students, axis=-1), weights * known.astype(weights.dtype)))
        shares_prefix &= teacher_codes[..., level] == codes[..., None, level]
    return jnp.stack(losses)


def weighted_mean(losses: Float[Array, "*n"], weights: Float[Array, "*n"]) -> Float[Array, ""]:
    """Weighted mean; 0 if all weights are 0."""
    total = jnp.sum(weights)
    return jnp.sum(losses * weights) / jnp.where(total == 0, 1.0, total)


def _at(logits: Float[Array, "*n size"], codes: Int[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]


def softmax_cross_entropy(
    states: Float[Array, "n dim"],
    vectors: Float[Array, "ids dim"],
    targets: Int[Array, " n"],
    weights: Float[Array, " n"],
    *,
    without: Int[Array, "n s"] | None = None,
    row_axes: tuple[str, ...] = (),
    id_axes: tuple[str, ...] = (),
) -> Float[Array, ""]:
    """Sum over n of `weight * -log softmax(vectors @ state)[target]`, without ever storing all n x ids logits.

    The softmax of a state is over all ids except those in its row of `without`, in any order, padded with -1. The
    target must not be one of them if its weight is not 0.

    States are processed in blocks, and the gradient of a block is computed together with its loss, as in fused linear
    cross-entropy kernels: three matrix products, and two passes over logits that stay in cache. If there are too many
    ids for that, they are processed in blocks, too, at the cost of a fourth product.

    Matrices are multiplied in the dtype of `states` and summed in float32. On a mesh set by `jax.set_mesh`, states may
    be sharded over `row_axes` and vectors over `id_axes`, whose sizes must divide n and ids: each device then computes
    its part of the logits, and devices exchange only sums.
    """
    return _weighted_sum(states, vectors, targets, weights, without, (row_axes, id_axes))


class _Gradients(NamedTuple):
    """Gradients by argument, or their partition specs."""

    states: Any
    vectors: Any
    weights: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _weighted_sum(
    states: Array, vectors: Array, targets: Array, weights: Array, without: Array | None, axes: tuple
) -> Array:
    return _forward(states, vectors, targets, weights, without, axes)[0]


def _forward(
    states: Array,
    vectors: Array,
    targets: Array,
    weights: Array,
    without: Array | None,
    axes: tuple[tuple[str, ...], tuple[str, ...]],
) -> tuple[Array, _Gradients]:
    run = functools.partial(_shard, row_axes=axes[0], id_axes=axes[1])
    if axes[0] or axes[1]:
        rows, ids = (PartitionSpec(names or None) for names in axes)
        specs = PartitionSpec(), _Gradients(rows, ids, rows)
        run = jax.shard_map(run, in_specs=(rows, ids, rows, rows, rows), out_specs=specs, check_vma=False)
    return run(states, vectors, targets, weights, without)


def _backward(axes: tuple, gradients: _Gradients, scale: Array) -> tuple:
    by_states, by_vectors, by_weights = (x * scale.astype(x.dtype) for x in gradients)
    return by_states, by_vectors, None, by_weights, None


_weighted_sum.defvjp(_forward, _backward)


def _shard(
    states: Array,
    vectors: Array,
    targets: Array,
    weights: Array,
    without: Array | None,
    *,
    row_axes: tuple[str, ...],
    id_axes: tuple[str, ...],
) -> tuple[Array, _Gradients]:
    """Loss and gradients of one device's states over its own ids, summed over the mesh where needed."""
    run = functools.partial(_by_blocks, row_axes=row_axes, id_axes=id_axes)
    gpu = functools.partial(run, block=_GPU_BLOCK, multiple=_FEW_STATES)
    return jax.lax.platform_dependent(
        states, vectors, targets, weights, without, cuda=gpu, rocm=gpu, default=functools.partial(run, block=_BLOCK)
    )


def _by_blocks(
    states: Array,
    vectors: Array,
    targets: Array,
    weights: Array,
    without: Array | None,
    *,
    block: int,
    multiple: int = 1,
    row_axes: tuple[str, ...],
    id_axes: tuple[str, ...],
) -> tuple[Array, _Gradients]:
    """`_shard` with at most `block` logits at once, in blocks whose number of states is a multiple of `multiple`."""
    n, ids = len(states), len(vectors)
    without = jnp.zeros((n, 0), targets.dtype) if without is None else without
    if id_axes:
        targets, without = (x - ids * jax.lax.axis_index(id_axes) for x in (targets, without))
    rows = block // ids // multiple * multiple if block // ids >= _FEW_STATES else _MANY_STATES
    rows = min(rows, n)
    width = min(max(block // rows, 1), ids)
    blocks = [_padded(x, rows) for x in (states, targets, weights, without)]
    one = functools.partial(_block, of_ids=_padded(vectors.astype(states.dtype), width), num_ids=ids, id_axes=id_axes)
    by_vectors, (losses, by_states) = jax.lax.scan(one, jnp.zeros(vectors.shape, jnp.float32), tuple(blocks))
    by_weights, by_states = losses.reshape(-1)[:n], by_states.reshape(-1, states.shape[1])[:n]
    total = jnp.sum(weights * by_weights)
    if row_axes:
        total, by_vectors = jax.lax.psum((total, by_vectors), row_axes)
    return total, _Gradients(by_states.astype(states.dtype), by_vectors.astype(vectors.dtype), by_weights)


def _block(
    by_vectors: Float[Array, "ids dim"],
    inputs: tuple[Float[Array, "rows dim"], Int[Array, " rows"], Float[Array, " rows"], Int[Array, "rows without"]],
    *,
    of_ids: Float[Array, "blocks width dim"],
    num_ids: int,
    id_axes: tuple[str, ...],
) -> tuple[Array, tuple[Float[Array, " rows"], Float[Array, "rows dim"]]]:
    """Loss and gradient of one block of states; gradients of the vectors are added to `by_vectors`."""
    state, target, weight, without = inputs
    blocks, width = of_ids.shape[:2]
    begins = width * jnp.arange(blocks)
    # With a single block there is no loop, and the compiler computes the logits below only once.
    over_ids = functools.partial(jax.lax.scan, xs=(of_ids, begins), unroll=blocks == 1)

    def logits_of(vectors: Array, begin: Array) -> Array:
        logits = jnp.matmul(state, vectors.T, preferred_element_type=jnp.float32)
        if without.shape[1]:
            logits = _leave_out(logits, jnp.where(without < begin, width, without - begin))
        if num_ids % width == 0:
            return logits
        return jnp.where((begin + jnp.arange(width) < num_ids)[None], logits, -jnp.inf)

    def measure(so_far: tuple[Array, Array], ids: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        logits = logits_of(*ids)
        largest = jnp.maximum(so_far[0], jnp.max(logits, axis=-1, keepdims=True))
        total = so_far[1] * jnp.exp(so_far[0] - largest) + jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True)
        return (largest, total), None

    def differentiate(by_state: Array, ids: tuple[Array, Array]) -> tuple[Array, Array]:
        shares = (jnp.exp(logits_of(*ids) - largest) * (weight[:, None] / total)).astype(state.dtype)
        by_state += jnp.matmul(shares, ids[0], preferred_element_type=jnp.float32)
        return by_state, jnp.matmul(shares.T, state, preferred_element_type=jnp.float32)

    # Finite instead of -inf, since all ids of a block may be left out.
    start = jnp.full((len(state), 1), jnp.finfo(jnp.float32).min), jnp.zeros((len(state), 1))
    (largest, total), _ = over_ids(measure, start)
    if id_axes:
        of_device, largest = largest, jax.lax.pmax(largest, id_axes)
        total = jax.lax.psum(total * jnp.exp(of_device - largest), id_axes)
    total = jnp.where(total > 0, total, 1)  # a state for which all ids are left out has no target and weight 0
    by_state, by_ids = over_ids(differentiate, jnp.zeros(state.shape, jnp.float32))
    here = ((target >= 0) & (target < num_ids))[:, None]
    own = jnp.where(here, of_ids.reshape(-1, state.shape[1])[jnp.where(here[:, 0], target, 0)], 0)
    own, state32 = own.astype(jnp.float32), state.astype(jnp.float32)
    target_logit = jnp.sum(state32 * own, axis=-1)
    by_state -= weight[:, None] * own
    if id_axes:
        target_logit, by_state = jax.lax.psum((target_logit, by_state), id_axes)
    by_vectors += by_ids.reshape(-1, state.shape[1])[:num_ids]
    at_target = jnp.where(here, -weight[:, None] * state32, 0.0)
    by_vectors = by_vectors.at[jnp.where(here[:, 0], target, 0)].add(at_target)
    return by_vectors, (jnp.log(total[:, 0]) + largest[:, 0] - target_logit, by_state)


def _leave_out(logits: Float[Array, "rows width"], at: Int[Array, "rows without"]) -> Float[Array, "rows width"]:
    """Set the columns `at` of each row to -inf; indices of `width` or more are ignored."""

    def scattered(logits: Array, at: Array) -> Array:
        return jax.vmap(lambda row, gone: row.at[gone].set(-jnp.inf, mode="drop"))(logits, at)

    # A TPU would scatter entry by entry.
    return jax.lax.platform_dependent(logits, at, tpu=_leave_out_by_comparison, default=scattered)


def _leave_out_by_comparison(logits: Array, at: Array) -> Array:
    """`_leave_out` without a scatter. Column c is bit `c // words` of word `c % words` of its row, so that each index
    in `at` is compared with only one word per 32 columns."""
    rows, width = logits.shape
    words = -(-width // 32)
    bit = jnp.where(at < width, jnp.left_shift(jnp.uint32(1), (at // words).astype(jnp.uint32)), jnp.uint32(0))
    is_word = (at % words)[:, :, None] == jax.lax.broadcasted_iota(at.dtype, (1, 1, words), 2)
    packed = jnp.bitwise_or.reduce(jnp.where(is_word, bit[:, :, None], jnp.uint32(0)), axis=1)
    bits = packed[:, None] >> jax.lax.broadcasted_iota(jnp.uint32, (1, 32, 1), 1)
    gone = (bits.reshape(rows, -1)[:, :width] & jnp.uint32(1)) == 1
    return jnp.where(gone, -jnp.inf, logits)


def _padded(x: Array, size: int) -> Shaped[Array, "blocks size *rest"]:
    """`x` in blocks of `size` rows, the last one padded with zeros."""
    blocks = -(-len(x) // size)
    missing = blocks * size - len(x)
    return jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))).reshape(blocks, size, *x.shape[1:])
