"""Conformance battery of all model families: a new one adds a row to FAMILIES and, if it has codes, to MEMBERS."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from semid.config import choices
from seq_models import (
    CodeTrie,
    DenseConfig,
    EncoderDecoderConfig,
    FlatDecoderConfig,
    HybridConfig,
    Inputs,
    ItemTables,
    Layout,
    Mixer,
    ModelConfig,
    ParallelHeadsConfig,
    Precision,
    Prefixes,
    Remat,
    RequestBatch,
    RQTransformerConfig,
    SoftmaxOver,
    TeacherItems,
    TrainingBatch,
    TransformerConfig,
)

SIZES = (3, 5, 4)
LEVELS = len(SIZES)
STACK = TransformerConfig(dim=16, layers=2, heads=4, hidden=12, dropout=0.3)
GROUPED = replace(STACK, kv_heads=2)
RECURRENT = replace(STACK, mixer=Mixer.STATE_SPACE, state_size=3)


MEMBERS = {
    "rq": RQTransformerConfig(STACK, depth_layers=2, depth_dropout=0.1),
    "rq untied, grouped": RQTransformerConfig(GROUPED, tied_heads=False),
    "rq, relation": RQTransformerConfig(replace(GROUPED, relation=True)),
    "rq, state space": RQTransformerConfig(RECURRENT),
    "flat": FlatDecoderConfig(GROUPED),
    "flat untied, not grouped": FlatDecoderConfig(STACK, tied_heads=False),
    "encoder-decoder": EncoderDecoderConfig(GROUPED),
    "encoder-decoder untied": EncoderDecoderConfig(STACK, tied_heads=False, decoder_layers=1),
    "encoder-decoder, order-free": EncoderDecoderConfig(STACK, decoder_layers=1, order_free=True),
    "parallel": ParallelHeadsConfig(STACK, temperature=0.5),
    "parallel untied": ParallelHeadsConfig(GROUPED, temperature=0.5, tied_heads=False),
}
CODE_FAMILIES = ("rq", "flat", "encoder-decoder", "parallel")
every_member = pytest.mark.parametrize("name", MEMBERS)
# Of rows and of models, those that most tests share and so their programs.
ROW = 12
WITH_IDS = (("id_embedding", True),)
every_family = pytest.mark.parametrize("name", CODE_FAMILIES)


def new(config, sizes=SIZES, *, num_items=0, num_features=0):
    return config.build(level_sizes=sizes, num_items=num_items, num_features=num_features, rngs=nnx.Rngs(0))


def build(config, sizes=SIZES, **inputs):
    """A model far from its initialisation: every parameter random, the biases too."""
    graph, params = nnx.split(new(config, sizes, **inputs))
    rng = np.random.default_rng(0)
    return graph, jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params)


@functools.cache
def built(name, sizes=SIZES, changes=(), stack=()):
    config = replace(MEMBERS[name], backbone=replace(MEMBERS[name].backbone, **dict(stack)))
    num = {"num_features": 3, "num_items": 9} if "id_embedding" in dict(changes) else {}
    return build(replace(config, **dict(changes)), sizes, **num)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, params, inputs, segments, targets, key):
    return nnx.merge(graph, params).decode(inputs, segments, targets, key=key).logits


@functools.partial(jax.jit, static_argnums=0)
def _read(graph, params, inputs, segments):
    return nnx.merge(graph, params).encode_history(inputs, segments)


@functools.partial(jax.jit, static_argnums=0)
def _step(graph, params, context, cache, prefixes):
    return nnx.merge(graph, params).decode_step(context, cache, prefixes)


def logits(model, inputs, segments, targets, key=None):
    inputs = inputs if isinstance(inputs, Inputs) else Inputs(jnp.asarray(inputs))
    return [np.asarray(x) for x in _logits(*model, inputs, jnp.asarray(segments), jnp.asarray(targets), key)]


def layout(model):
    return nnx.merge(*model).layout


def random_codes(seed, *shape, sizes=SIZES):
    return np.random.default_rng(seed).integers(0, sizes, (*shape, len(sizes)))


def row(model, items, *, before=0, width=ROW):
    """One row: histories side by side, the last item of each its target; any codes where there is padding, before them
    and up to the width.

    Returns inputs, segments, targets, and for each history where its last target is predicted.
    """
    kind, levels = layout(model), items[0].shape[-1]
    stop = None if kind is Layout.CLOSED else -1
    inputs = [x[:stop] for x in items]
    targets = [np.concatenate([x[1:], x[:1]])[: len(i)] for x, i in zip(items, inputs, strict=True)]
    ends = np.cumsum([len(x) for x in inputs]) + before - (2 if kind is Layout.CLOSED else 1)
    after = width - before - sum(len(x) for x in inputs)

    def pad(parts, edge):
        around = ((before, after), *[(0, 0)] * (parts[0].ndim - 1))
        return np.pad(np.concatenate(parts), around, constant_values=edge)[None]

    segments = pad([np.full(len(x), n + 1) for n, x in enumerate(inputs)], 0)
    codes = np.where(segments[..., None] == 0, np.arange(levels) % 2, pad(inputs, 0))
    if kind is Layout.SINGLE:
        return codes, segments, items[0][None, -1], ends
    return codes, segments, pad(targets, 1), ends


def of_targets(model, items, **padding):
    """Logits of every history's last target, all levels side by side: [histories, sum of sizes]."""
    *args, ends = row(model, items, **padding)
    found = np.concatenate(logits(model, *args), axis=-1)
    return found if layout(model) is Layout.SINGLE else found[0, ends]


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@every_member
@pytest.mark.parametrize("where", ["before", "after", "around"])
def test_padding_changes_nothing_wherever_it_stands(name, where):
    model, items = built(name), random_codes(1, 5)
    width = 5 if layout(model) is Layout.CLOSED else 4
    before = {"before": ROW - width, "after": 0, "around": 3}[where]
    close(of_targets(model, [items], before=before), of_targets(model, [items], width=width))


@pytest.mark.parametrize("name", [name for name in MEMBERS if not name.startswith("encoder-decoder")])
def test_histories_packed_into_a_row_have_the_logits_they_have_alone(name):
    model, items = built(name), [random_codes(seed, length) for seed, length in enumerate((4, 2, 3))]
    alone = np.concatenate([of_targets(model, [one]) for one in items])
    close(of_targets(model, items, before=1), alone)
    assert np.abs(of_targets(model, [np.concatenate(items)])[0] - alone[2]).max() > 1e-2  # one history: they do see


@every_member
@pytest.mark.parametrize("left", [True, False])
def test_steps_over_shuffled_beams_give_the_teacher_forced_logits(name, left):
    """All prefixes of three users of different histories; every step's beams stand in an order of their own."""
    model, lengths, longest = built(name), (1, 4, 3), 4
    histories = [random_codes(seed, n) for seed, n in enumerate(lengths)]
    pads = [((longest - n, 0) if left else (0, longest - n), (0, 0)) for n in lengths]
    codes = jnp.asarray(np.stack([np.pad(h, pad) for h, pad in zip(histories, pads, strict=True)]))
    segments = jnp.asarray(
        np.stack([np.pad(np.ones(len(h), int), pad[0]) for h, pad in zip(histories, pads, strict=True)])
    )
    context, rng = _read(*model, Inputs(codes), segments), np.random.default_rng(0)
    cache = nnx.merge(*model).init_cache(context)
    live, ancestors, steps = np.zeros((3, 1, 0), int), np.zeros((3, 1, 0), int), []
    for size in SIZES:
        found, cache = _step(*model, context, cache, Prefixes(jnp.asarray(live), jnp.asarray(ancestors)))
        assert found.shape == (3, live.shape[1], size)
        steps.append((live, np.asarray(found)))
        children = np.stack(
            [rng.permutation(list(itertools.product(range(live.shape[1]), range(size)))) for _ in "abc"]
        )
        parents, codes = children[..., :1], children[..., 1:]
        kept = np.concatenate([np.take_along_axis(ancestors, parents, axis=1), parents], axis=-1)
        live, ancestors = np.concatenate([np.take_along_axis(live, parents, axis=1), codes], axis=-1), kept
    for level, (prefixes, found) in enumerate(steps):
        for user, history in enumerate(histories):
            targets = np.pad(prefixes[user], ((0, 0), (0, LEVELS - level)))  # the codes at and after it must not matter
            forced = [of_targets(model, [np.concatenate([history, target[None]])]) for target in targets]
            begin = sum(SIZES[:level])
            close(found[user], np.concatenate(forced)[:, begin : begin + SIZES[level]])


@every_member
def test_a_level_depends_on_the_codes_before_it_and_on_no_other(name):
    """Parallel heads: on none."""
    model, items, reads_codes = built(name), random_codes(2, 4), not name.startswith("parallel")
    ends = np.cumsum(SIZES)[:-1]
    before = np.split(of_targets(model, [items])[0], ends)
    for level, size in enumerate(SIZES):
        changed = items.copy()
        changed[-1, level] = (changed[-1, level] + 1) % size
        after = np.split(of_targets(model, [changed])[0], ends)
        assert [bool(np.any(a != b)) for a, b in zip(after, before, strict=True)] == [
            reads_codes and x > level for x in range(LEVELS)
        ]


@every_member
def test_no_logits_depend_on_later_items_and_all_on_the_earlier(name):
    model, items = built(name), random_codes(3, 6)
    codes, segments, targets, _ = row(model, [items])
    before = np.concatenate(logits(model, codes, segments, targets), axis=-1)
    for at in range(5):
        changed = codes.copy()
        changed[:, at] = (changed[:, at] + 1) % np.array(SIZES)
        after = np.concatenate(logits(model, changed, segments, targets), axis=-1)
        if layout(model) is Layout.SINGLE:  # all of the history comes before the target
            assert np.any(after != before)
            continue
        moved = np.any(after != before, axis=-1)[0, :5]
        own = layout(model) is Layout.CLOSED  # the item is the target of the position before, codes before it included
        np.testing.assert_array_equal(moved, np.arange(5) >= at - own)
        if own and at:
            np.testing.assert_array_equal(after[0, at - 1, : SIZES[0]], before[0, at - 1, : SIZES[0]])


@every_family
def test_other_rows_change_nothing(name):
    model = built(name)
    codes, segments, targets, _ = row(model, [random_codes(4, 5)])

    def both(other):
        pair = [np.concatenate([a, b]) for a, b in zip((codes, segments, targets), other, strict=True)]
        return [x[0] for x in logits(model, *pair)]

    one = both(row(model, [random_codes(5, 5)])[:3])
    for a, b in zip(one, both((codes * 0, segments * 0, targets * 0)), strict=True):
        np.testing.assert_array_equal(a, b)


@every_family
def test_dropout_acts_with_a_key_alone(name):
    model = built(name)
    args = row(model, [random_codes(6, 5)])[:3]
    plain, again, first, repeated, other = (
        np.concatenate(logits(model, *args, key=key), axis=-1) for key in (None, None, *map(jax.random.key, (0, 0, 1)))
    )
    np.testing.assert_array_equal(plain, again)
    np.testing.assert_array_equal(first, repeated)
    assert min(np.abs(first - plain).max(), np.abs(first - other).max()) > 1e-2


def with_everything(model, seed=7):
    """Inputs of all kinds, in which every code of every level and every id occurs; also as targets."""
    every = np.stack([np.arange(16) % size for size in SIZES], axis=-1)
    rng = np.random.default_rng(seed)
    dense, ids = jnp.asarray(rng.normal(size=(2, 16, 3)), jnp.float32), jnp.asarray(np.arange(32).reshape(2, 16) % 9)
    codes, targets = jnp.asarray(np.stack([every, every[::-1]])), jnp.asarray(np.stack([every[::-1], every]))
    targets = targets[:, 3] if layout(model) is Layout.SINGLE else targets
    return Inputs(codes, dense, ids), jnp.asarray([[1] * 8 + [2] * 8, [1] * 16]), targets


def loss(params, graph, inputs, segments, targets, key=None):
    found = nnx.merge(graph, params).decode(inputs, segments, targets, key=key).logits
    chosen = (jnp.take_along_axis(jax.nn.log_softmax(x), targets[..., i, None], -1) for i, x in enumerate(found))
    return -sum(jnp.mean(x) for x in chosen)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(graph, params, *args):
    return jax.value_and_grad(loss)(params, graph, *args)


@functools.partial(jax.jit, static_argnums=0)
def gradient_by_mixtures(graph, params, inputs, *args):
    return jax.grad(lambda mixtures: loss(params, graph, inputs._replace(mixtures=mixtures), *args))(inputs.mixtures)


@every_member
def test_the_gradient_is_finite_and_reaches_every_parameter(name):
    model = built(name, changes=WITH_IDS)
    value, gradient = value_and_gradient(*model, *with_everything(model), jax.random.key(0))
    leaves = jax.tree.leaves_with_path(gradient)
    assert np.isfinite(value)
    assert [jax.tree_util.keystr(path) for path, g in leaves if not (np.isfinite(g).all() and g.any())] == []


@every_member
def test_mixtures_of_one_code_give_its_logits_and_pass_a_gradient(name):
    """Exactly its logits; the codes beside mixtures are not read; a mixture of two codes lies between them."""
    model = built(name, changes=WITH_IDS)
    inputs, segments, targets = with_everything(model)
    one_hot = tuple(jax.nn.one_hot(inputs.codes[..., level], size) for level, size in enumerate(SIZES))
    mixed = inputs._replace(codes=jnp.zeros_like(inputs.codes), mixtures=one_hot)
    for plain, found in zip(*(logits(model, x, segments, targets) for x in (inputs, mixed)), strict=True):
        np.testing.assert_array_equal(found, plain)

    for of_level in gradient_by_mixtures(*model, mixed, segments, targets):
        assert np.isfinite(of_level).all()
        assert np.abs(of_level[:, 0]).max(axis=-1).all()


@every_family
@pytest.mark.parametrize("again", [Remat.DOTS, Remat.FULL])
def test_remat_gives_the_same_loss_and_gradient(name, again):
    plain, remat = (built(name, changes=WITH_IDS, stack=stack) for stack in ((), (("remat", again),)))
    args = *with_everything(plain), jax.random.key(1)
    for a, b in zip(*(jax.tree.leaves(value_and_gradient(*model, *args)) for model in (plain, remat)), strict=True):
        close(a, b)
    text = str(jax.make_jaxpr(value_and_gradient, static_argnums=0)(*remat, *args))
    assert "remat" in text or "checkpoint" in text


@every_family
def test_bfloat16_multiplies_in_it_and_keeps_float32_parameters_and_logits(name):
    rough = built(name, changes=WITH_IDS, stack=(("dtype", Precision.BFLOAT16),))
    exact = built(name, changes=WITH_IDS)
    assert {x.dtype for x in jax.tree.leaves(rough[1])} == {jnp.dtype("float32")}
    args, key = with_everything(exact), jax.random.key(0)
    expected, (wanted, _) = logits(exact, *args), value_and_gradient(*exact, *args, key)
    with jax.numpy_dtype_promotion("standard"):  # jax promotes inside dot_product_attention and in its derivative
        found, (value, gradient) = logits(rough, *args), value_and_gradient(*rough, *args, key)
        context = _read(*rough, args[0], jnp.ones((2, 16), jnp.int32))
        root = Prefixes(*[jnp.zeros((2, 1, 0), jnp.int32)] * 2)
        step, _ = _step(*rough, context, nnx.merge(*rough).init_cache(context), root)
    assert {x.dtype for x in (*found, step)} == {np.dtype("float32")}
    for got, sure in zip(found, expected, strict=True):
        assert 1e-3 < np.linalg.norm(got - sure) / np.linalg.norm(sure) < 0.1
    assert float(value) == pytest.approx(float(wanted), rel=0.05)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@every_family
def test_dense_and_id_inputs_are_used_and_never_tell_of_the_target(name):
    model = built(name, changes=WITH_IDS)
    inputs, segments, targets = with_everything(model)
    segments = jnp.ones_like(segments)
    whole = np.concatenate(logits(model, inputs, segments, targets), axis=-1)
    changed = (
        inputs._replace(dense=inputs.dense.at[:, 5].add(1.0)),
        inputs._replace(ids=inputs.ids.at[:, 5].add(1) % 9),
        inputs._replace(dense=None),
        inputs._replace(ids=None),
    )
    for index, other in enumerate(changed):
        moved = np.abs(np.concatenate(logits(model, other, segments, targets), axis=-1) - whole)
        assert moved.max() > 1e-3
        if index < 2 and layout(model) is not Layout.SINGLE:
            assert moved[:, :5].max() == 0.0
            assert moved[:, 5].max() > 1e-3


@every_family
@pytest.mark.parametrize("sizes", [(7,), (2, 9)])
def test_one_level_two_levels_and_a_history_of_one_item(name, sizes):
    model, history = built(name, sizes), random_codes(8, 2, sizes=sizes)
    forced = of_targets(model, [history])
    assert forced.shape == (1, sum(sizes))
    context = _read(*model, Inputs(jnp.asarray(history[None, :1])), jnp.ones((1, 1), jnp.int32))
    cache, begin = nnx.merge(*model).init_cache(context), 0
    for level, size in enumerate(sizes):
        prefixes = Prefixes(jnp.asarray(history[None, 1:, :level]), jnp.zeros((1, 1, level), jnp.int32))
        found, cache = _step(*model, context, cache, prefixes)
        close(found[0, 0], forced[0, begin : begin + size])
        begin += size


@every_family
def test_new_values_run_in_the_same_program(name):
    model, traces = built(name), []

    @jax.jit
    def run(params, inputs, segments, targets):
        traces.append(1)
        m = nnx.merge(model[0], params)
        context, root = m.encode_history(inputs, segments), jnp.zeros((1, 1, 0), jnp.int32)
        logits = m.decode(inputs, segments, targets).logits
        return logits, m.decode_step(context, m.init_cache(context), Prefixes(root, root))

    for seed in (9, 10):
        codes, segments, targets, _ = map(jnp.asarray, row(model, [random_codes(seed, 5)]))
        found = run(jax.tree.map(lambda x, s=seed: x * s, model[1]), Inputs(codes), segments, targets)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
    assert len(traces) == 1


@every_family
def test_rows_of_padding_alone_are_finite(name):
    model = built(name)
    codes, segments, targets, _ = row(model, [random_codes(11, 5)])
    assert all(np.isfinite(x).all() for x in logits(model, codes, segments * 0, targets))


@every_family
@pytest.mark.parametrize("sizes", [(), (3, 0)])
def test_level_sizes_are_checked(name, sizes):
    config = MEMBERS[name]
    with pytest.raises(ValueError, match=r"^expected level_sizes of at least 1, one or more of them, got \(.*\)$"):
        new(config, sizes)
    with pytest.raises(ValueError, match=r"^id_embedding needs num_items of at least 1, got 0$"):
        new(replace(config, id_embedding=True))
    new(config, (1,))


def test_the_decoders_depth_is_checked():
    with pytest.raises(ValueError, match=r"^expected decoder_layers of at least 1, got 0$"):
        EncoderDecoderConfig(STACK, decoder_layers=0)
    EncoderDecoderConfig(STACK, decoder_layers=1)


# Every family, whether it has codes or not, on a catalogue of 17 items of which training has not seen the last.
SMALL = replace(STACK, dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
FAMILIES = {
    "rq-transformer": RQTransformerConfig(SMALL),
    "encoder-decoder": EncoderDecoderConfig(SMALL, decoder_layers=1),
    "flat": FlatDecoderConfig(SMALL),
    "hybrid": HybridConfig(SMALL),
    "parallel-heads": ParallelHeadsConfig(SMALL),
    "sasrec": DenseConfig(SMALL),
}
ITEMS, WIDTH = 17, 3


def test_every_family_has_a_row():
    assert {name: type(config) for name, config in FAMILIES.items()} == choices(ModelConfig)
    assert len({config.title for config in FAMILIES.values()}) == len(FAMILIES)


@functools.cache
def catalogue():
    codes = np.stack(np.unravel_index(np.random.default_rng(0).permutation(60)[:ITEMS], SIZES), axis=-1)
    features = np.random.default_rng(1).normal(size=(ITEMS, WIDTH)).astype(np.float32)
    return ItemTables.from_arrays(codes, features, np.arange(ITEMS)[::-1]), CodeTrie.from_codes(codes, SIZES)


@functools.cache
def family(name):
    return build(FAMILIES[name], num_items=ITEMS, num_features=WIDTH)


@functools.partial(jax.jit, static_argnames=("graph", "blocks"))
def rank_and_score(graph, params, tables, trie, requests, *, blocks):
    model, options = nnx.merge(graph, params), {"softmax_over": SoftmaxOver.CHILDREN}
    top = model.top(tables, trie, requests, k=ITEMS + 1, beam_size=ITEMS + 1, **options)
    some = model.log_probs(tables, trie, requests, jnp.asarray([3, 0, 3]), **options)
    return top, some, model.catalog_log_probs(tables, trie, requests, blocks=blocks, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_ranking_is_that_of_the_scores_of_all_items(name):
    """Of those allowed and not denied; and the probabilities of all items add up to one."""
    (tables, trie), (graph, params) = catalogue(), family(name)
    allowed, denied = np.ones((1, ITEMS), bool), np.asarray([[5, -1], [-1, -1]])
    allowed[0, 2] = False
    history, segments = jnp.asarray([[1, 16, 0], [4, 5, 6]]), jnp.asarray([[1, 1, 0], [1, 1, 1]])
    requests = RequestBatch(history, segments, jnp.asarray(allowed), jnp.asarray(denied))
    blocks = nnx.merge(graph, params).leaf_blocks(trie)
    top, some, every = rank_and_score(graph, params, tables, trie, requests, blocks=blocks)
    np.testing.assert_allclose(np.exp(every).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(some, every[:, [3, 0, 3]], atol=1e-5)
    for user, gone in enumerate(([2, 5], [2])):
        left = np.delete(np.argsort(-every[user]), np.flatnonzero(np.isin(np.argsort(-every[user]), gone)))
        assert top.rows[user].tolist() == [*left, *[-1] * (1 + len(gone))]
        np.testing.assert_allclose(top.scores[user, : len(left)], every[user, left], atol=1e-5)
        assert (top.scores[user, len(left) :] == -jnp.inf).all()


@functools.partial(jax.jit, static_argnums=0)
def terms_and_gradient(graph, params, tables, batch, trie, key):
    def loss(params):
        terms = nnx.merge(graph, params).loss_terms(tables, batch, trie=trie, smoothing=0.1, key=key)
        return sum(jnp.sum(term) for term in terms.values()), terms

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_of_the_loss_terms_reaches_every_parameter(name):
    """With and without a teacher, whose term alone is added."""
    (tables, trie), (graph, params) = catalogue(), family(name)
    history = jnp.asarray(np.random.default_rng(2).integers(0, ITEMS, (8, 6)))
    targets = jnp.roll(history, -1, axis=1).at[:, -1].set(-1)
    targets = targets[:, 0] if nnx.merge(graph, params).layout is Layout.SINGLE else targets
    batch = TrainingBatch(history, jnp.ones_like(history), targets)
    items = jnp.maximum(targets, 0)[..., None]
    teacher = TeacherItems(items, jnp.zeros(items.shape))
    (_, plain), gradient = terms_and_gradient(graph, params, tables, batch, trie, jax.random.key(0))
    (_, terms), _ = terms_and_gradient(graph, params, tables, batch._replace(teacher=teacher), trie, jax.random.key(0))
    leaves = jax.tree.leaves_with_path(gradient)
    unreached = [jax.tree_util.keystr(path) for path, g in leaves if not (np.isfinite(g).all() and g.any())]
    assert unreached == []
    assert "loss" not in terms  # so is their sum named where they are logged
    assert set(terms) - set(plain) == ({"loss/distillation"} if FAMILIES[name].has_codes else set())
    for term in plain:
        np.testing.assert_allclose(terms[term], plain[term], rtol=1e-5)
