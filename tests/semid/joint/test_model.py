"""The joint step: who learns from which loss, what the bank hides, and that it equals the step that hides nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from quantizers import Nearest, Schedule, Sinkhorn
from semid.encoders import FeatureRows
from semid.errors import SemidError
from semid.generators import GeneratorConfig, ObjectiveConfig
from semid.joint import JointModel, Objective, Phase, Reach, Relaxation, StepConfig
from semid.joint.model import HISTORY_TERMS, PARTS, TOKENIZER_TERMS, ContentTables, joint_loss, joint_terms
from semid.tokenizers import RQVAE, RQVaeConfig
from semid.training import (
    OptimizerConfig,
    PackedRows,
    StepContext,
    TrainingConfig,
    create_state,
    make_mesh,
    make_step,
    named_leaves,
    put_batch,
)
from seq_models import (
    Conditions,
    ConditionSizes,
    Inputs,
    RQTransformer,
    RQTransformerConfig,
    TransformerConfig,
    code_cross_entropy,
    last_state,
)

ITEMS, DIM, SIZES, BATCH, LENGTH = 30, 6, (4, 4), 8, 5
TERMS = [field.name for field in dataclasses.fields(Objective)]
MODULES = ("encoder/text", "encoder/image", "encoder/fusion", "autoencoder/encoder", "autoencoder/decoder")
MODULES += ("autoencoder/quantizer", "generator")


class TwoTowers(nnx.Module):
    """A linear text and image encoder, and a linear fusion."""

    dim = DIM

    def __init__(self, rngs):
        self.text, self.image, self.fusion = (nnx.Linear(DIM, DIM, rngs=rngs) for _ in range(3))

    def __call__(self, content, *, key=None):
        return self.fusion(self.text(content["text"].vectors) + self.image(content["image"].vectors))


def make(*, assignment=Nearest(), decay=None, ids=False):
    rng = np.random.default_rng(0)
    tokenizer = RQVaeConfig(assignments=(assignment,), level_sizes=SIZES, hidden=(8,), latent=4, decay=decay)
    backbone = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
    sizes = {"level_sizes": (*SIZES, 3), "num_features": DIM, "num_items": ITEMS}
    generator = RQTransformer(RQTransformerConfig(backbone, id_embedding=ids), **sizes, rngs=nnx.Rngs(1))
    codes = np.column_stack([rng.integers(0, size, ITEMS) for size in (*SIZES, 3)]).astype(np.int32)
    model = JointModel(
        TwoTowers(nnx.Rngs(2)),
        RQVAE(tokenizer, dim=DIM, rngs=nnx.Rngs(3)),
        generator,
        codes=codes,
        num_teacher=5,
        rngs=nnx.Rngs(4),
    )
    present = jnp.ones(ITEMS, bool)
    vectors = rng.standard_normal((3, ITEMS, DIM)).astype(np.float32)
    content = {
        name: FeatureRows(jnp.asarray(of), present) for name, of in zip(("text", "image"), vectors, strict=False)
    }
    tables = ContentTables(content, jnp.asarray(rng.standard_normal((ITEMS, 5)), jnp.float32))
    lengths = rng.integers(1, LENGTH + 1, BATCH)
    segments = (np.arange(LENGTH)[None] < lengths[:, None]) * np.arange(1, BATCH + 1)[:, None]
    batch = PackedRows(
        jnp.asarray(rng.integers(0, ITEMS, (BATCH, LENGTH)) * (segments > 0), jnp.int32),
        jnp.asarray(rng.integers(0, ITEMS, BATCH), jnp.int32),
        jnp.asarray(segments, jnp.int32),
    )
    fill(model, tables)
    return model, tables, batch


def fill(model, tables):
    rows = jnp.arange(ITEMS)
    model.bank.write(rows, model.encoder(tables.content), mask=jnp.ones(ITEMS, bool))


def only(*names):
    return Objective(**{name: Schedule(float(name in names)) for name in TERMS})


def context():
    return StepContext(jax.random.key(0), jnp.float32(1.0))


def gradients(model, batch, tables, config, **options):
    """Of every unweighted term, by name: its gradient by every parameter, by name."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def of(params):
        current = nnx.merge(graph, params, rest, copy=True)
        return joint_terms(current, batch, tables, context(), config=config, **options)[0]

    found = jax.jit(jax.jacrev(of))(params)  # one program for all terms
    return {term: {name: np.asarray(leaf) for name, leaf in named_leaves(of).items()} for term, of in found.items()}


def reached(found):
    return {module for module in MODULES if any(np.any(g) for name, g in found.items() if name.startswith(module))}


ENCODER = set(MODULES[:3])
TOKENIZER = {"autoencoder/encoder", "autoencoder/quantizer"}
# What each loss moves beside the encoders, which it reaches in end-to-end mode alone: in joint mode, and end to end.
OF_TERM = {
    "generation": {"generator", *TOKENIZER},
    "reconstruction": {"autoencoder/encoder", "autoencoder/decoder"},  # straight through, past the codebooks
    "codebook": {"autoencoder/quantizer"},
    "commitment": {"autoencoder/encoder"},
    "entropy": TOKENIZER,
    "contrast": set(),
    "sequence_item": {"generator", *TOKENIZER},
    "preference": {"generator", "autoencoder/decoder", *TOKENIZER},  # codebooks by the history's codes
    "teacher_codes": TOKENIZER,
    "teacher_states": {"generator", *TOKENIZER},
}

# Where the gradient does not pass the codes that the generator reads.
OF_STATE_ALONE = {
    "generation": {"generator"},
    "teacher_states": {"generator"},
    "sequence_item": {"generator", *TOKENIZER},  # by the target's side
    "preference": {"generator", "autoencoder/encoder", "autoencoder/decoder"},
}


@pytest.mark.parametrize("reach", Reach)
def test_every_loss_reaches_exactly_what_it_should(reach):
    model, tables, batch = make()
    found = gradients(model, batch, tables, StepConfig(objective=only(*TERMS), reach=reach))
    assert set(found) == set(TERMS)
    for term in TERMS:
        expected = set(OF_TERM[term])
        if reach is Reach.ENCODER and term != "codebook":  # which holds the latents still
            expected |= ENCODER
        if reach is Reach.GENERATOR and term in ("generation", "sequence_item", "preference", "teacher_states"):
            expected = OF_STATE_ALONE[term]
        assert reached(found[term]) == expected, term


def test_without_window_only_terms_of_the_target_reach_the_encoders():
    model, tables, batch = make()
    found = gradients(model, batch, tables, StepConfig(objective=only(*TERMS), window=0))
    silent = {term for term, of in found.items() if not reached(of) & ENCODER}
    assert silent == HISTORY_TERMS  # exactly zero; with a window all but the codebook term do (above)


def test_a_full_window_is_the_step_that_encodes_every_item():
    """Generation loss, its value and all gradients, against an implementation without a bank; of a generator that reads
    items' ids, with label smoothing."""
    model, tables, batch = make(ids=True)
    config, smoothing = StepConfig(objective=only("generation"), window=LENGTH), 0.1
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def plain(params):
        current = nnx.merge(graph, params, rest, copy=True)
        vectors = current.encoder(tables.content)[batch.history]
        quantizer = current.autoencoder.quantizer
        residual, mixtures = current.autoencoder.latents(vectors), []
        for book in quantizer.codebooks:
            distance = jnp.square(residual[..., None, :] - book[...][None, None]).sum(-1)
            soft, hard = jax.nn.softmax(-distance), jax.nn.one_hot(distance.argmin(-1), len(book[...]))
            mixtures.append(soft + jax.lax.stop_gradient(hard - soft))
            residual = residual - jax.lax.stop_gradient(book[...][distance.argmin(-1)])
        codes = current.codes[...]
        mixtures.append(jax.nn.one_hot(codes[batch.history][..., -1], 3))
        inputs = Inputs(codes[batch.history], vectors, batch.history, tuple(mixtures))
        state = last_state(current.generator.states(inputs, batch.segments), batch.segments)
        logits = current.generator.depth_logits(state, codes[batch.targets])
        return code_cross_entropy(logits, codes[batch.targets], jnp.ones(BATCH), smoothing=smoothing).sum()

    found = gradients(model, batch, tables, config, smoothing=smoothing)["generation"]
    expected = {name: np.asarray(leaf) for name, leaf in named_leaves(jax.jit(jax.grad(plain))(params)).items()}
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-5, atol=1e-5, err_msg=name)
    value, _ = jax.jit(functools.partial(joint_loss, config=config, smoothing=smoothing))(
        model, batch, tables, context()
    )
    assert float(value) == pytest.approx(float(plain(params)), rel=1e-5)


def test_padding_takes_no_part_in_a_balanced_plan():
    model, tables, batch = make(assignment=Sinkhorn())
    config = StepConfig(objective=only("generation"), window=0)
    losses = []
    for more in (0, 4):
        history, segments = (jnp.pad(of, ((0, 0), (0, more))) for of in (batch.history, batch.segments))
        padded = batch._replace(history=history, segments=segments)
        losses.append(float(jax.jit(functools.partial(joint_loss, config=config))(model, padded, tables, context())[0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_rates_are_of_parts_of_the_joint_model():
    assert set(PARTS) == {name.split("/")[0] for name in named_leaves(nnx.state(make()[0], nnx.Param))}
    for start in ("", "auto", "encoder", "encoder/text", "autoencoder/quantizer"):
        Phase(TrainingConfig(optimizer=OptimizerConfig(rates=((start, 0.5),))))
    with pytest.raises(SemidError, match="no part 'autoencodr'; did you mean 'autoencoder'"):
        Phase(TrainingConfig(optimizer=OptimizerConfig(rates=(("autoencodr", 0.0),))))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_codebooks_that_are_running_statistics_stay_where_the_tokenizer_is_frozen(rate):
    model, tables, batch = make(decay=0.9)
    optimizer = OptimizerConfig(rates=(("autoencoder", rate),))
    phase = Phase(TrainingConfig(optimizer=optimizer), StepConfig(only("reconstruction")))
    quantizer = model.autoencoder.quantizer
    variables = [*quantizer.codebooks, *quantizer.usage]
    before = [np.asarray(of[...]) for of in variables]
    phase.loss(GeneratorConfig())(model, batch, tables, context())
    same = [np.array_equal(old, of[...]) for old, of in zip(before, variables, strict=True)]
    assert same == [rate == 0] * 4


def test_targets_in_their_own_history_do_not_count_where_nothing_repeats():
    """Not one of the batch, then all but the first row's: its loss alone is left."""
    _, tables, batch = make()
    phase = Phase(TrainingConfig(), StepConfig(only("generation"), window=0, reach=Reach.TOKENIZER))
    unseen = jnp.full(BATCH, ITEMS - 1).at[1:].set(batch.history[1:, 0])
    batch = batch._replace(history=jnp.minimum(batch.history, ITEMS - 2))
    of_first = jax.tree.map(lambda x: x[:1], batch._replace(targets=unseen))
    losses = {}
    for repeats in (None, True, False):
        loss = jax.jit(phase.loss(GeneratorConfig(objective=ObjectiveConfig(repeats=repeats))))
        every = [of_first, *(batch._replace(targets=of) for of in (unseen, batch.history[:, 0]))]
        losses[repeats] = [float(loss(make()[0], rows, tables, context())[0]) for rows in every]
    assert losses[None] == losses[True]
    assert min(losses[True]) > 0
    assert losses[False] == [losses[True][0], pytest.approx(losses[True][0], rel=1e-6), 0.0]


@pytest.mark.parametrize("film", [False, True])
def test_a_target_is_asked_for_by_what_it_is(film):
    """Event and group of the item after each position, and the history's events: against inputs made item by item."""
    model, tables, batch = make()
    rng, sizes = np.random.default_rng(7), ConditionSizes(event=2, group=3, inputs=2, film=film, drop=0.0)
    model.generator.add_conditions(sizes, rngs=nnx.Rngs(5))
    for table in (model.generator.conditioning.inputs, model.generator.conditioning.event):
        table.embedding[...] = jnp.asarray(rng.standard_normal(table.embedding.shape), jnp.float32)
    groups = rng.integers(0, 4, ITEMS).astype(np.int32)
    history, real = np.asarray(batch.history), np.asarray(batch.segments) > 0
    events, done = rng.integers(1, 3, real.shape) * real, rng.integers(1, 3, BATCH)
    wanted = {"event": np.zeros_like(history), "group": np.zeros_like(history)}
    for row, length in enumerate(real.sum(axis=1)):
        items, what = [*history[row, :length], batch.targets[row]], [*events[row, :length], done[row]]
        wanted["event"][row, :length], wanted["group"][row, :length] = what[1:], groups[np.array(items[1:])]
    vectors = model.bank.read(batch.history)
    codes = model.codes[...][batch.history].at[..., :2].set(model.autoencoder.encode(vectors))
    events, done = jnp.asarray(events, jnp.int32), jnp.asarray(done, jnp.int32)

    @nnx.jit
    def plain(model, conditions):
        inputs = Inputs(codes, vectors, events=events, conditions=conditions)
        state = last_state(model.generator.states(inputs, batch.segments), batch.segments)
        targets = model.codes[...][batch.targets]
        return code_cross_entropy(model.generator.depth_logits(state, targets), targets, jnp.ones(BATCH)).sum()

    expected, unasked = (float(plain(model, of)) for of in (Conditions(**jax.tree.map(jnp.asarray, wanted)), None))
    config = StepConfig(objective=only("generation"), window=0)
    told = batch._replace(events=events, target_events=done)
    tables = tables._replace(groups=jnp.asarray(groups[:, None]))
    value, _ = jax.jit(functools.partial(joint_loss, config=config))(model, told, tables, context())
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(value) != pytest.approx(unasked, rel=1e-3)


def test_what_is_not_differentiated_is_still_written():
    model, tables, batch = make()
    before = np.asarray(model.bank.written[...])
    config = StepConfig(objective=only("generation"), forward=0.5, backward=0.25)

    def step(model, batch, tables, config):
        joint_terms(model, batch, tables, context(), config=config)
        return model.bank.written[...]

    after = nnx.jit(functools.partial(step, config=config))(model, batch, tables)
    assert int((np.asarray(after) != before).sum()) == BATCH * 2 // 2
    assert np.any(gradients(model, batch, tables, config)["generation"]["encoder/text/kernel"])
    still = StepConfig(objective=only("generation"), forward=0.5, backward=0.0)
    assert not np.any(gradients(model, batch, tables, still)["generation"]["encoder/text/kernel"])


def test_targets_are_encoded_only_where_a_term_reads_them():
    """The generation loss bit for bit, its gradients but for the order of sums; who is written into the bank."""
    written, found, values = {}, {}, []
    for terms in (("generation",), ("generation", "contrast")):
        model, tables, batch = make()
        before, config = np.asarray(model.bank.written[...][:ITEMS]), StepConfig(objective=only(*terms), window=1)
        found[terms] = gradients(model, batch, tables, config)["generation"]
        value = jax.jit(functools.partial(loss_and_written, config=config))(model, batch, tables)
        value, after = map(np.asarray, value)
        values.append(float(value))
        written[terms] = set(np.flatnonzero(after != before))
    alone, beside = found.values()
    assert values[0] == values[1]
    for name, gradient in alone.items():
        np.testing.assert_allclose(gradient, beside[name], rtol=1e-5, atol=1e-6, err_msg=name)
    ends = {int(of[real][-1]) for of, real in zip(*map(np.asarray, (batch.history, batch.segments > 0)), strict=True)}
    targets = set(np.asarray(batch.targets).tolist())
    assert targets - ends
    assert list(written.values()) == [ends, ends | targets]


def loss_and_written(model, batch, tables, config):
    return joint_terms(model, batch, tables, context(), config=config)[0]["generation"], model.bank.written[...][:ITEMS]


def test_at_the_lowest_temperature_soft_inputs_are_the_hard_ones():
    def generation(temperature, relaxation):
        model, tables, batch = make(assignment=Nearest(Schedule(temperature)))
        config = StepConfig(objective=only("generation"), relaxation=relaxation)
        return float(jax.jit(functools.partial(joint_loss, config=config))(model, batch, tables, context())[0])

    for temperature, close in ((1e-5, True), (1.0, False)):
        values = [generation(temperature, relaxation) for relaxation in (Relaxation.SOFT, Relaxation.SOFT_BACKWARD)]
        assert np.allclose(*values, rtol=1e-5) == close


class Watched(TwoTowers):
    """Tells how many of the rows that it reads lie on a device."""

    def __call__(self, content, *, key=None):
        rows = content["text"].vectors
        jax.debug.inspect_array_sharding(rows, callback=lambda found: SEEN.append(found.shard_shape(rows.shape)[0]))
        return super().__call__(content, key=key)


SEEN = []


def test_devices_share_what_is_encoded_and_agree():
    taken = {}
    for devices in (1, 8):
        model, tables, batch = make()
        model.encoder = Watched(nnx.Rngs(2))
        mesh, optimizer = make_mesh(jax.devices()[:devices]), optax.sgd(0.1)
        loss = functools.partial(joint_loss, config=StepConfig())
        step = make_step(model, optimizer, loss, tables=tables, seed=0, num_steps=1, mesh=mesh)
        SEEN.clear()
        state, metrics = step(create_state(model, optimizer, mesh), put_batch(batch, mesh))
        assert set(SEEN) == {3 * BATCH // devices}
        taken[devices] = jax.device_get((state.params, metrics["loss"]))
    for one, eight in zip(*map(jax.tree.leaves, taken.values()), strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-5)


def test_terms_without_weight_are_not_there():
    assert set(only("contrast").weights(1.0)) == {"contrast"}
    late = Objective(preference=Schedule(1.0, initial=0.0))
    assert {*TOKENIZER_TERMS, "generation", "preference"} == set(late.weights(0.0))
    assert float(late.weights(0.25)["preference"]) == 0.25
