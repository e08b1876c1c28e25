"""A whole run of the stages on a tiny world: what comes out, what moved, and what may be shared and resumed."""

import dataclasses
import shutil
from types import SimpleNamespace

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
import shapes
from flax import nnx

from quantizers import Schedule, health
from semid import Dataset, Recommender
from semid.artifacts import Kind, load_tensors, read_artifact
from semid.catalog import SemanticCatalog, extend
from semid.data import GlobalTime, LeaveOneOut
from semid.data.simulated import SimulatedConfig, simulate
from semid.encoders import (
    BlocksConfig,
    ContentConfig,
    FeatureEncoder,
    FeatureRows,
    FusionConfig,
    ImageConfig,
    ImageEncoder,
    ImageRows,
    ItemContent,
    ItemEncoder,
    PretrainedImage,
    PretrainedText,
    TextFromScratch,
    read_content,
)
from semid.errors import SemidError
from semid.generators import ConditionsConfig, GeneratorConfig, ObjectiveConfig
from semid.graphs import ItemGraph
from semid.joint import (
    HoldThenRefit,
    JointConfig,
    JointModel,
    Objective,
    Phase,
    PreviousRun,
    Reach,
    Refresh,
    Relaxation,
    StepConfig,
    Surgery,
    code_mixtures,
    encode_items,
    level_logits,
    train_end_to_end,
    trained_encoder,
)
from semid.joint import stages as joint_stages
from semid.joint.context import WARM_UP, Context
from semid.joint.training import (
    STATE_FILE,
    _check,
    _check_continued,
    _content_config,
    _read_content,
    _request,
    _teacher_vectors,
)
from semid.recommender import ItemData, ModelSpec
from semid.stage import shared_folder
from semid.tokenizers import RQVAE, RQVaeConfig, SemanticTokenizer
from semid.training import OptimizerConfig, SingleRows, TrainingConfig, make_mesh, read_history, replace_leaves
from seq_models import (
    DenseConfig,
    FlatDecoderConfig,
    Inputs,
    RQTransformerConfig,
    SoftmaxOver,
    TransformerConfig,
    last_state,
)


def short(epochs=1.0, **rates):
    optimizer = OptimizerConfig(learning_rate=3e-3, rates=tuple(rates.items()))
    return TrainingConfig(epochs=epochs, batch_size=64, log_every=1, validate_every=epochs, optimizer=optimizer)


BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.1)
HISTORY = 5  # items, to which the shortest batches are padded: all are, and one program trains on all
CONFIG = JointConfig(
    encoder=short(),
    tokenizer=RQVaeConfig(level_sizes=(8, 8), hidden=(8,), latent=4, training=short(4.0)),
    generator=GeneratorConfig(RQTransformerConfig(BACKBONE), max_history=HISTORY, training=short()),
    joint=(Phase(short(autoencoder=0.3), StepConfig(Objective(contrast=Schedule(0.1))), Surgery.PROJECT),),
    codes=Refresh(0.5),
    finetune=short(),
)
STAGED = dataclasses.replace(CONFIG, joint=())


@pytest.fixture(scope="module")
def world():
    config = SimulatedConfig(
        num_items=120, num_users=60, taxonomy=(2, 2, 2), family_size=1.0, images=False, content_dim=8
    )
    return simulate(config).dataset


def item_encoder(world):
    vectors = np.stack(world.items["content"].to_numpy(zero_copy_only=False)).astype(np.float32)
    content = {"content": FeatureRows(jnp.asarray(vectors), jnp.ones(len(vectors), bool))}
    encoder = ItemEncoder({"content": FeatureEncoder(8)}, FusionConfig(dim=8, hidden=8), rngs=nnx.Rngs(0))
    return ItemContent(content, encoder)


def records(folder, stage):
    """What the history has of a stage."""
    return [record for record in read_history(folder / "history.jsonl") if record["stage"] == stage]


def run(world, config, out, **options):
    return train_end_to_end(world, content=item_encoder(world), config=config, out=out, **options)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    home = tmp_path_factory.mktemp("joint")
    made = {name: run(world, config, home / name, shared=home / "shared") for name, config in ARMS.items()}
    return home, made


ARMS = {"end-to-end": CONFIG, "staged": STAGED}


def test_what_is_written_recommends(world, runs):
    home, made = runs
    histories = world.splits.test.histories.take(slice(0, 8))
    loaded = Recommender.from_pretrained(home / "end-to-end")
    ranked = loaded.rank(histories, k=5, exclude_seen=False)
    np.testing.assert_array_equal(ranked, made["end-to-end"].rank(histories, k=5, exclude_seen=False))
    assert (ranked >= 0).all()
    assert not list(home.glob("*.checkpoints"))
    assert {path.name for path in (home / "shared").iterdir()} == set(WARM_UP)


def test_it_is_handed_over_with_what_encodes_item_vectors(runs, tmp_path):
    loaded = Recommender.from_pretrained(runs[0] / "end-to-end")
    loaded.save_pretrained(tmp_path / "out")
    assert "It is simulated" in (tmp_path / "out" / "README.md").read_text()
    codes = SemanticTokenizer.from_pretrained(tmp_path / "out").encode(np.asarray(loaded.tables.features))
    np.testing.assert_array_equal(codes, loaded.codes[:, :-1])
    assert len(np.unique(codes, axis=0)) > 5


def test_other_items_are_encoded_and_recommended_without_training(world, runs):
    path = runs[0] / "end-to-end"
    given = item_encoder(world)
    loaded, encoder = Recommender.from_pretrained(path), trained_encoder(path, given.encoder)
    vectors = encode_items(encoder, {"content": jax.tree.map(lambda x: x[:2], given.rows["content"])})
    np.testing.assert_allclose(vectors, loaded.item_vectors()[:2], atol=1e-5)
    assert not np.shares_memory(loaded.item_vectors(), loaded.items.features)  # the caller's own, to be scaled in place
    codes = SemanticTokenizer.from_pretrained(path).encode(vectors)
    np.testing.assert_array_equal(codes, loaded.codes[:2, :-1])
    later = extend(loaded.catalog, ["new 0", "new 1"], codes)
    for row in later.codes[-2:]:  # the same content as items 0 and 1: the next numbers among those of their codes
        assert row[-1] == loaded.codes[(loaded.codes[:, :-1] == row[:-1]).all(axis=1), -1].max() + 1
    updated = loaded.with_catalog(later, vectors=vectors)
    history = [loaded.item_ids[0].as_py()]
    only = updated.recommend([history], k=2, allowed=updated.allow(["new 0", "new 1"]))
    assert sorted(only.item_ids[0]) == ["new 0", "new 1"]
    known = loaded.item_ids.to_pylist()
    np.testing.assert_allclose(updated.score([history], known), loaded.score([history], known), atol=1e-5)


def test_every_term_and_the_health_of_bank_and_codes_are_logged(runs):
    home, _ = runs
    found = records(home / "end-to-end", "joint")
    steps = [record for record in found if "loss" in record]
    terms = {"generation", "reconstruction", "codebook", "commitment", "entropy", "contrast"}
    assert all({f"loss/{term}" for term in terms} <= set(record) for record in steps)
    assert all(0 <= record["conflicts"] <= 1 for record in steps)
    assert all(record["bank/agreement"] > 0.9 for record in steps)
    looked = next(record for record in found if "validation/recall@10" in record)
    assert looked["validation/bank/coverage"] == 1.0
    assert {f"validation/{name}/level_1" for name in ("churn", "usage")} <= set(looked)


def test_the_encoder_moves_in_joint_steps_alone(world, runs):
    home, _ = runs
    together, staged = (load_tensors(home / name / STATE_FILE) for name in ("end-to-end", "staged"))
    names = [name for name in staged if name.startswith("encoder/") and "kernel" in name]
    assert names
    assert all(np.any(together[name] != staged[name]) for name in names)
    fresh = item_encoder(world).encoder.projections["content"].kernel[...]
    assert np.any(staged["encoder/projections/content/kernel"] != np.asarray(fresh))


def test_a_frozen_part_does_not_move(world, runs, tmp_path):
    home, _ = runs
    phase = Phase(short(encoder=0.0, autoencoder=0.3), StepConfig(reach=Reach.TOKENIZER))
    frozen = dataclasses.replace(CONFIG, joint=(phase,))
    run(world, frozen, tmp_path / "frozen", shared=home / "shared")
    found, staged = (load_tensors(path / STATE_FILE) for path in (tmp_path / "frozen", home / "staged"))
    assert all(np.array_equal(found[name], staged[name]) for name in staged if name.startswith("encoder/"))
    moved = [name for name in staged if name.startswith("autoencoder/encoder") and "kernel" in name]
    assert any(np.any(found[name] != staged[name]) for name in moved)


def test_an_item_graph_is_mixed_and_the_warm_up_is_the_same(world, runs, tmp_path):
    home, made = runs
    before = {path: path.stat().st_mtime_ns for path in (home / "shared").rglob("*.json")}
    graph = ItemGraph.fit(world)
    mixed = run(world, STAGED, tmp_path / "mixed", shared=home / "shared", graph=graph)
    assert {path: path.stat().st_mtime_ns for path in (home / "shared").rglob("*.json")} == before
    loaded = Recommender.from_pretrained(tmp_path / "mixed")
    assert loaded.graph is not None
    assert loaded.spec.graph_weight == mixed.spec.graph_weight > 0
    histories = world.splits.test.histories.take(slice(0, 8))
    ranked = [model.rank(histories, k=5, exclude_seen=False) for model in (loaded.with_graph(None), made["staged"])]
    np.testing.assert_array_equal(*ranked)
    with pytest.raises(SemidError, match=r"the item graph: trained on dataset digest abc, .*; fit a graph to this"):
        run(world, STAGED, tmp_path / "other", graph=dataclasses.replace(graph, dataset="abc"))


def test_where_items_repeat_their_factor_is_chosen(world, tmp_path, monkeypatch):
    items = world.item.copy()
    items[1::2] = items[: 2 * (len(items) // 2) : 2]
    repeating = world.replace(item=items)
    assert repeating.repeats.common
    monkeypatch.setattr(
        "semid.generators.training.with_best_repeat_factor", lambda whole, _: whole.with_repeat_factor(0.5)
    )
    made = run(repeating, STAGED, tmp_path / "out")
    assert made.spec.repeat_factor == Recommender.from_pretrained(tmp_path / "out").spec.repeat_factor == 0.5


def test_all_items_are_encoded_as_each_is():
    """4,096 rows of 128 through a layer of zeros: with variables as constants, XLA's program for a CPU gave garbage."""
    encoder = ItemEncoder({"x": FeatureEncoder(128)}, FusionConfig(dim=128, hidden=32, identity=True), rngs=nnx.Rngs(0))
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(4096, 128)), jnp.float32)
    content = {"x": FeatureRows(vectors, jnp.ones(len(vectors), bool))}
    np.testing.assert_allclose(encode_items(encoder, content), encoder(content), atol=1e-5)


@pytest.mark.parametrize(("side", "blocks"), [(80, [512]), (96, [256, 64])])  # 19,200 and 27,648 numbers a picture
def test_large_pictures_are_encoded_few_at_once(monkeypatch, side, blocks):
    seen = []

    def encode(graph, variables, rows, content):
        seen.append(len(rows))
        return jnp.zeros((len(rows), 4))

    monkeypatch.setattr("semid.joint.context._encode", encode)
    image = ImageEncoder(ImageConfig(size=side, patch=side, blocks=BlocksConfig(dim=2, heads=1)), rngs=nnx.Rngs(0))
    pictures = ImageRows(np.zeros((300, side, side, 3), np.uint8), np.ones(300, bool))
    encoder = ItemEncoder({"image": image}, FusionConfig(dim=4, hidden=2), rngs=nnx.Rngs(0))
    assert encode_items(encoder, {"image": pictures}).shape == (300, 4)
    assert seen == blocks


def test_items_are_encoded_by_float32_products():
    """On every device: codes are made of these vectors."""
    seen = []

    class Asked(ItemEncoder):
        def __call__(self, content, *, key=None):
            seen.append(jax.config.jax_default_matmul_precision)
            return super().__call__(content, key=key)

    encoder = Asked({"x": FeatureEncoder(4)}, FusionConfig(dim=4), rngs=nnx.Rngs(0))
    encode_items(encoder, {"x": FeatureRows(jnp.ones((3, 4)), jnp.ones(3, bool))})
    assert seen == ["highest"]


def test_what_is_finished_is_not_made_again(world, runs):
    home, made = runs
    before = {path: path.stat().st_mtime_ns for path in (home / "staged").iterdir()}
    again = run(world, STAGED, home / "staged", shared=home / "shared")
    assert {path: path.stat().st_mtime_ns for path in (home / "staged").iterdir()} == before
    np.testing.assert_array_equal(again.codes, made["staged"].codes)


def test_another_machine_goes_on_from_the_shared_warm_up(world, runs, tmp_path, monkeypatch):
    """Its encoders give vectors of other last bits. Vectors of other settings, which no name of a stage tells, are
    refused all the same."""
    home, made = runs
    fill = Context.fill_bank

    def last_bits(context, model):
        fill(context, model)
        first = np.asarray(model.bank.vectors[...])[0, 0]
        model.bank.vectors[...] = model.bank.vectors[...].at[0, 0].set(np.nextafter(first, np.float32(9)))

    monkeypatch.setattr(Context, "fill_bank", last_bits)
    again = run(world, STAGED, tmp_path / "again", shared=home / "shared")
    assert np.array_equal(again.codes, made["staged"].codes)
    settings = dataclasses.replace(CONFIG.tokenizer, commitment=0.5)
    for config in (dataclasses.replace(STAGED, encoder=None), dataclasses.replace(STAGED, tokenizer=settings)):
        with pytest.raises(SemidError, match=r"shared.tokenizer"):
            run(world, config, tmp_path / "other", shared=home / "shared")


def test_without_a_folder_the_model_is_in_memory(world, runs, tmp_path, monkeypatch):
    home, made = runs
    monkeypatch.chdir(tmp_path)
    model = run(world, STAGED, None, shared=home / "shared")
    assert model.origin is None
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(model.codes, made["staged"].codes)


def test_a_warm_up_is_shared_by_url(world, runs, tmp_path, monkeypatch):
    """The second run is on another machine: it has no copy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there, shared = fsspec.filesystem("memory"), "memory://bucket/shared"
    try:
        for again in (False, True):
            before = {name: there.info(name)["created"] for name in there.find("/bucket")}
            model = run(world, STAGED, None, shared=shared)
            np.testing.assert_array_equal(model.codes, runs[1]["staged"].codes)
            made = {name: there.info(name)["created"] for name in there.find("/bucket")}
            assert {name.split("/")[3] for name in made} == set(WARM_UP)
            kept = {name: created for name, created in made.items() if "default" in name or "params" in name}
            assert kept
            assert not again or kept.items() <= before.items()
            shutil.rmtree(tmp_path / "cache")
        watched = dataclasses.replace(STAGED, finetune=dataclasses.replace(short(), tensorboard=True))
        with pytest.raises(SemidError, match=f"{shared}: tensorboard writes its events while"):
            run(world, watched, tmp_path / "out", shared=shared)
        monkeypatch.setattr("jax.process_count", lambda: 2)
        with pytest.raises(SemidError, match=f"{shared}: several processes need a folder on a disk"):
            shared_folder(shared)
    finally:
        there.store.clear()


def test_other_encoders_are_another_request(world, runs):
    home, _ = runs
    content = item_encoder(world)
    content.encoder.scale[...] = content.encoder.scale[...] * 2
    with pytest.raises(SemidError, match="staged"):
        train_end_to_end(world, content=content, config=STAGED, out=home / "staged", shared=home / "shared")
    with pytest.raises(SemidError, match="expected text and image, or content, got both"):
        train_end_to_end(world, image="scratch", content=content, config=STAGED)


def test_codes_that_collapse_are_an_error(world, tmp_path):
    with pytest.raises(SemidError, match=r"\d+ items share their codes, and tie_break leaves room for 1"):
        run(world, dataclasses.replace(STAGED, tie_break=1), tmp_path / "narrow")
    assert not (tmp_path / "narrow").exists()


def test_phases_take_turns_and_each_moves_its_own(world, runs, tmp_path):
    home, _ = runs
    tokenizer = Phase(short(generator=0.0, encoder=0.0), StepConfig(Objective(generation=Schedule(0.0))))
    generator = Phase(short(autoencoder=0.0, encoder=0.0), StepConfig(reach=Reach.GENERATOR))
    config = dataclasses.replace(CONFIG, joint=(tokenizer, generator), cycles=2)
    run(world, config, tmp_path / "turns", shared=home / "shared")
    turns = [records(tmp_path / "turns", f"joint.{turn}") for turn in range(4)]
    has_generation = ["loss/generation" in of_turn[0] for of_turn in turns]
    assert has_generation == [False, True, False, True]
    churn = [of_turn[-1]["validation/churn/level_0"] for of_turn in turns]
    assert churn[1] == churn[3] == 0.0  # the generator's turns change no codes


def test_a_cycle_holds_the_codes_and_ends_with_a_tokenizer_and_a_generator_fitted_anew(world, runs, tmp_path):
    home, _ = runs
    config = dataclasses.replace(CONFIG, codes=HoldThenRefit())
    made = run(world, config, tmp_path / "refit", shared=home / "shared")
    refit, staged = (load_tensors(path / STATE_FILE) for path in (tmp_path / "refit", home / "staged"))
    changed = {name for name in staged if np.any(refit[name] != staged[name])}
    for part in ("encoder/", "autoencoder/encoder", "autoencoder/quantizer", "generator/", "bank/vectors"):
        assert any(name.startswith(part) for name in changed), part
    found = records(tmp_path / "refit", "joint")
    assert found[-1]["validation/churn/level_0"] == 0.0
    model = trained_model(world, tmp_path / "refit")
    np.testing.assert_array_equal(made.codes[:, :-1], model.autoencoder.encode(model.bank.read(jnp.arange(120))))
    stages = (tmp_path / "refit", "generator.1"), (home / "staged", "generator")
    anew, first = ([record["loss"] for record in records(*stage) if "loss" in record] for stage in stages)
    assert anew[0] == pytest.approx(first[0], rel=0.1)  # untrained again
    assert anew[0] > first[-1]


def test_dead_codes_are_revived_at_every_refresh_but_the_last(monkeypatch):
    revived, state = [], SimpleNamespace(params=None, rest=None)
    monkeypatch.setattr(joint_stages, "reseeding", lambda *_, **__: lambda state, _: revived.append(step) or state)
    monkeypatch.setattr(joint_stages, "with_variables", lambda *_: None)
    monkeypatch.setattr(joint_stages, "edit_variables", lambda _, state, __: state)
    context = SimpleNamespace(config=CONFIG, seed=0, item_vectors=lambda _: None)
    with shapes.unchecked():
        (hook,) = joint_stages._refresh_hooks(None, CONFIG.joint[0], context, 4)  # every two steps of four
        for step in range(1, 5):
            hook(step, state, {})
    assert revived == [2]


@pytest.fixture(scope="module")
def next_day(world):
    """The same world with two more items, and an interaction with each of them at the end of two users' histories."""
    new = [f"new {number}" for number in range(2)]
    added = pa.Table.from_pylist(
        [{**row, "item_id": item} for item, row in zip(new, world.items.slice(0, 2).to_pylist(), strict=True)],
        schema=world.items.schema,
    )
    items = pa.concat_tables([world.items, added])
    known, users = world.item_ids.take(pa.array(world.item)).to_pylist(), world.users.take(pa.array(world.user))
    late = world.time.max() + np.arange(1, 9)
    sold = [new[0], known[0], known[1], known[2]]
    rows = {
        "user_id": users.to_pylist() + [users[0].as_py()] * 4 + [users[-1].as_py()] * 4,
        "item_id": known + sold + sold[::-1],
        "timestamp": [*world.time, *late],
    }
    return Dataset.build(items, pa.table(rows), name="next day")


def test_the_next_day_goes_on_from_the_artifact(world, next_day, runs, tmp_path):
    home, made = runs
    still = short(**{"": 0.0})
    config = dataclasses.replace(CONFIG, joint=(Phase(still),), finetune=still)
    found = run(next_day, config, tmp_path / "next", previous=PreviousRun(home / "end-to-end", world))
    assert (
        read_artifact(tmp_path / "next", Kind.MODEL).parents["previous"]
        == read_artifact(home / "end-to-end", Kind.MODEL).digest
    )
    before, after = (load_tensors(path / STATE_FILE) for path in (home / "end-to-end", tmp_path / "next"))
    kept = [name for name in before if not name.startswith(("bank/", "codes", "churn"))]
    assert all(np.array_equal(before[name], after[name]) for name in kept)
    old = slice(0, world.num_items)
    np.testing.assert_array_equal(found.codes[old], made["end-to-end"].codes)
    np.testing.assert_allclose(after["bank/vectors"][old], before["bank/vectors"][old], atol=1e-5)
    found = records(tmp_path / "next", "joint")
    looked = next(record for record in found if "validation/bank/coverage" in record)
    assert looked["validation/bank/coverage"] == pytest.approx(1 - 1 / next_day.num_items)  # one was never a target


def test_without_joint_steps_new_items_enter_the_bank_at_once(world, next_day, runs, tmp_path):
    previous = PreviousRun(runs[0] / "staged", world)
    run(next_day, dataclasses.replace(STAGED, finetune=short(0.1)), tmp_path / "next", previous=previous)
    before, after = (load_tensors(path / STATE_FILE) for path in (previous.path, tmp_path / "next"))
    model, content = trained_model(next_day, tmp_path / "next"), item_encoder(next_day).rows
    new, old = np.arange(world.num_items, next_day.num_items), slice(0, world.num_items)
    np.testing.assert_allclose(after["bank/vectors"][new], encode_items(model.encoder, content, new), atol=1e-5)
    assert len(np.unique(after["bank/vectors"][new], axis=0)) == len(new) > 1
    np.testing.assert_array_equal(after["bank/vectors"][old], before["bank/vectors"][old])


def test_the_earlier_dataset_is_that_of_the_artifact(next_day, runs, tmp_path):
    home, _ = runs
    with pytest.raises(
        SemidError,
        match=r"end-to-end: trained on dataset digest .*, not on this one of .*; give the dataset of that run",
    ):
        run(next_day, CONFIG, tmp_path / "other", previous=PreviousRun(home / "end-to-end", next_day))


@pytest.mark.filterwarnings("ignore:.* of 120 texts are cut to 64 tokens")
def test_the_next_day_has_the_tokens_that_the_encoders_know(world, tmp_path):
    source = ContentConfig(TextFromScratch(vocabulary=200))
    first = read_content(world, source)
    first.reader.write(tmp_path)
    texts = pa.array([f"Number {row} " + text for row, text in enumerate(world.texts())])
    today = world.replace(items=world.items.drop_columns(["text"]).append_column("text", texts))
    read = _read_content(today, source, PreviousRun(tmp_path, world), seed=0, cache=tmp_path)
    vocabulary = first.reader.modalities["text"].vocabulary.model
    assert read.reader.modalities["text"].vocabulary.model == vocabulary
    assert read_content(today, source).reader.modalities["text"].vocabulary.model != vocabulary  # control
    with pytest.raises(
        SemidError, match=r"has other encoders \(content.text.vocabulary: 200 -> 100\); give the same t"
    ):
        _read_content(
            world, ContentConfig(TextFromScratch(vocabulary=100)), PreviousRun(tmp_path, world), seed=0, cache=tmp_path
        )


def test_embeddings_of_item_ids_are_not_continued_with_other_items(world, next_day, runs, tmp_path):
    home, _ = runs
    model = dataclasses.replace(CONFIG.generator.model, id_embedding=True)
    config = dataclasses.replace(CONFIG, generator=dataclasses.replace(CONFIG.generator, model=model))
    previous = PreviousRun(home / "end-to-end", world)
    with pytest.raises(SemidError, match="previous: embeddings of item ids know nothing of other items"):
        run(next_day, config, tmp_path / "next", previous=previous)
    _request(world, config, None, None, None, previous, 0)  # the same items


def test_only_what_is_new_is_a_target_of_the_next_day(world, next_day):
    had = {user: len(history) for user, history in zip(world.users.to_pylist(), world.splits.train, strict=True)}
    seen = np.array([had[user] for user in next_day.users.to_pylist()])
    rows = SingleRows(next_day.splits.train, max_history=4, seen=seen)
    assert len(rows) == sum(len(history) for history in next_day.splits.train) - sum(had.values())
    with pytest.raises(SemidError, match="no training history has an item that it did not have before"):
        SingleRows(world.splits.train, max_history=4, seen=world.splits.train.lengths)


def _of(lists: dict[str, str], *, rule=LeaveOneOut()) -> Dataset:
    """A dataset of users' items, one letter each, a second apart."""
    rows = [(user, item, 1_700_000_000 + at) for user, items in lists.items() for at, item in enumerate(items)]
    users, items, times = zip(*rows, strict=True)
    interactions = pa.table({"user_id": users, "item_id": items, "timestamp": times})
    return Dataset.build(pa.table({"item_id": sorted({*items})}), interactions, name="tiny", split_rule=rule)


def test_what_was_trained_on_begins_the_training_histories_of_the_next_run(caplog):
    before = _of({"u": "cdefg", "w": "fgfgf", "x": "fg", "gone": "cde"})
    same = {"w": "fgfgf", "x": "fgfg"}
    _check_continued(before, before)
    _check_continued(_of({"new": "agc", "u": "cdefgab", **same}), before)  # items and users have other rows
    assert not caplog.messages
    refused = {
        "without its oldest": {"u": "defgab", **same},
        "with another one": {"u": "cdgfgab", **same},
        "with fewer": {"u": "cdef", **same},
    }
    for lists in refused.values():
        with pytest.raises(SemidError, match=r"^previous: user 'u': what that run trained on is not the beginning of"):
            _check_continued(_of(lists), before)
    _check_continued(_of({"u": "cdefg", "w": "fgfgf", "x": "fgf"}), before)
    assert caplog.messages == ["previous: that run trained on what is validation here of 1 users"]
    with pytest.raises(SemidError, match=r"^previous: user 'x'"):
        _check_continued(_of({"u": "cdefg", "w": "fgfgf", "x": "ffg"}), before)
    long, rule = {"u": "abcabcabca", "w": "bcabcabcab"}, GlobalTime(0.4, 0.6)
    _check_continued(_of(long, rule=rule), _of(long, rule=GlobalTime(0.3, 0.5)))
    with pytest.raises(SemidError, match="or another split"):  # its test targets were trained on
        _check_continued(_of(long, rule=rule), _of(long))


def test_a_model_of_all_stages_is_asked_for_an_event_and_a_group(world, next_day, tmp_path):
    rng, names = np.random.default_rng(0), ("buy", "look")
    told = world.replace(event=pa.array(rng.choice(names, len(world.item))))
    told = told.replace(items=told.items.append_column("half", pa.array(rng.choice(["a", "b"], world.num_items))))
    asked = ConditionsConfig(on_event=True, on_group="half", event_inputs=True, event_head=True)
    generator = dataclasses.replace(CONFIG.generator, conditions=asked)
    config = dataclasses.replace(CONFIG, encoder=None, generator=generator, joint=(Phase(short()),))
    found = run(told, config, tmp_path / "asked")
    histories, every = told.splits.test.histories.take(slice(0, 8)), {"k": 5, "exclude_seen": False}
    loaded, wish = Recommender.from_pretrained(tmp_path / "asked"), {"event": "buy", "group": "a"}
    ranked = loaded.rank(histories, condition=wish, **every)
    np.testing.assert_array_equal(ranked, found.rank(histories, condition=wish, **every))
    assert (ranked != loaded.rank(histories, **every)).any()
    assert loaded.event_log_probs(histories, np.arange(3)).shape == (8, 3, 2)
    with pytest.raises(SemidError, match="asked: the previous run knows other conditions"):
        run(next_day, CONFIG, tmp_path / "next", previous=PreviousRun(tmp_path / "asked", told))


def test_a_term_that_learns_from_a_teacher_wants_one(world, tmp_path):
    step = StepConfig(Objective(teacher_codes=Schedule(0.01)), reach=Reach.TOKENIZER)
    taught = dataclasses.replace(CONFIG, joint=(Phase(short(), step),))
    with pytest.raises(SemidError, match="the term teacher_codes learns from a teacher: give one"):
        run(world, taught, tmp_path / "deaf")
    few = np.zeros((3, 4), np.float32)
    with pytest.raises(SemidError, match="expected a teacher's vectors of 120 items, got 3"):
        run(world, taught, tmp_path / "few", teacher=few)
    gaps = np.where(np.arange(120)[:, None] == 7, np.nan, np.zeros((120, 4), np.float32))
    with pytest.raises(SemidError, match=f"vector of item '{world.item_ids[7]}' has NaN or infinity, as do 1 in all"):
        run(world, taught, tmp_path / "gaps", teacher=gaps)
    with pytest.raises(SemidError, match="no term learns from the teacher: weigh teacher_codes or teacher_states"):
        run(world, CONFIG, tmp_path / "untaught", teacher=np.zeros((120, 4), np.float32))
    with pytest.raises(SemidError, match="expected a Recommender or item vectors as the teacher, got ItemGraph"):
        run(world, taught, tmp_path / "graph", teacher=ItemGraph.fit(world))
    with pytest.raises(SemidError, match="the term teacher_codes learns"):  # before content is read
        train_end_to_end(world, text="no such folder", config=taught)


def test_a_model_teaches_by_its_item_vectors_and_is_a_parent(world):
    order = np.arange(120)[::-1]
    catalog = SemanticCatalog(world.item_ids.take(pa.array(order)), order[:, None].astype(np.int32), (120,))
    spec = ModelSpec(DenseConfig(BACKBONE), (120,), 120, 0, max_history=HISTORY)
    items = ItemData(np.zeros(120, np.int64))
    teacher = Recommender(spec.build(seed=0), catalog, spec=spec, items=items, dataset=world.digest)
    np.testing.assert_array_equal(_teacher_vectors(teacher, world), teacher.item_vectors()[order])
    request = _request(world, CONFIG, None, None, teacher, None, 0)
    assert request.parents == {"dataset": world.digest, "teacher": teacher.digest}
    teacher.dataset = "0" * 64
    with pytest.raises(SemidError, match=r"the teacher: trained on dataset digest 0{16}, not on this one"):
        _teacher_vectors(teacher, world)


def test_content_of_other_items_is_refused(world, tmp_path):
    content, encoder, _ = item_encoder(world)
    fewer = {"content": jax.tree.map(lambda x: x[:-1], content["content"])}
    with pytest.raises(SemidError, match="expected content of the dataset's 120 items, got 119 rows"):
        train_end_to_end(world, content=ItemContent(fewer, encoder), config=CONFIG, out=tmp_path / "fewer")
    none = {"content": content["content"]._replace(present=jnp.zeros(120, bool))}
    with pytest.raises(SemidError, match="expected items with 'content', got none among 120"):
        train_end_to_end(world, content=ItemContent(none, encoder), config=CONFIG, out=tmp_path / "none")


def test_more_items_without_content_than_the_tie_break_tells_apart_are_refused_before_any_work(world):
    content, encoder, _ = item_encoder(world)
    first = {"content": content["content"]._replace(present=jnp.arange(120) >= 5)}  # in a single modality: none of them
    both = first | {"other": content["content"]._replace(present=jnp.arange(120) < 1)}
    for rows, alike in ((first, 5), (both, 4)):
        _check(world, ItemContent(rows, encoder), dataclasses.replace(CONFIG, tie_break=alike))
        few = dataclasses.replace(CONFIG, tie_break=alike - 1)
        with pytest.raises(SemidError, match=rf"{alike} items have nothing that .* give tie_break {alike} or more"):
            _check(world, ItemContent(rows, encoder), few)


def test_more_items_of_equal_content_than_the_tie_break_tells_apart_are_refused_before_any_work(world):
    content, encoder, _ = item_encoder(world)
    rows = content["content"]
    equal = {"content": rows._replace(vectors=rows.vectors.at[7:12].set(rows.vectors[7]))}
    other = equal | {"other": rows._replace(present=jnp.arange(120) == 8)}  # tells one of the five apart
    for given, alike in ((equal, 5), (other, 4)):
        _check(world, ItemContent(given, encoder), dataclasses.replace(CONFIG, tie_break=alike))
        few = dataclasses.replace(CONFIG, tie_break=alike - 1)
        item = world.item_ids[7].as_py()
        with pytest.raises(SemidError, match=rf"{alike} items have the same content as item '{item}', .* {alike} or m"):
            _check(world, ItemContent(given, encoder), few)


def test_folders_of_encoders_may_be_paths(tmp_path):
    config = _content_config(tmp_path / "text", tmp_path / "image", None)
    assert (config.text, config.image) == (
        PretrainedText(str(tmp_path / "text")),
        PretrainedImage(str(tmp_path / "image")),
    )


def test_a_dataset_without_validation_is_refused_before_any_work(world, monkeypatch):
    monkeypatch.setattr("semid.joint.training._run_stages", None)
    first = np.arange(len(world.user)) - world.offsets[world.user] < 2  # two interactions of each user
    short = world.replace(user=world.user[first], item=world.item[first], time=world.time[first])
    with pytest.raises(SemidError, match="the validation split has no examples: no user has 3 interactions or more"):
        run(short, CONFIG, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finetune": dataclasses.replace(short(), batch_size=100)}, "stage finetune: batch_size 100 does not divide"),
        ({"finetune": short(generatr=0.0)}, "stage finetune: rates: no part of the model begins with 'generatr'"),
        ({"tokenizer": RQVaeConfig(training=short(decodr=0.0))}, "stage tokenizer: rates: no part of the .* 'decodr'"),
        ({"joint": (Phase(short(**{"generator/depht": 0.5})),)}, "stage joint: rates: no part of the .*ator/depht'"),
    ],
)
def test_settings_that_a_later_stage_would_refuse_are_named_before_any_work(world, monkeypatch, change, message):
    monkeypatch.setattr(joint_stages, "_take_steps", None)
    with pytest.raises(SemidError, match=message):
        run(world, dataclasses.replace(CONFIG, **change), None)


def test_a_phase_that_leaves_the_encoders_without_a_gradient_is_refused():
    alone = Objective.only(generation=Schedule(1.0))
    with pytest.raises(SemidError, match=r"no loss reaches the encoders: .* give a window of at least 1"):
        Phase(short(), StepConfig(alone, window=0))
    Phase(short(), StepConfig(dataclasses.replace(alone, contrast=Schedule(0.1)), window=0))
    Phase(short(), StepConfig(alone, window=0, reach=Reach.TOKENIZER))


def test_settings_of_joint_steps_that_do_nothing_are_refused():
    alone = Objective.only(generation=Schedule(1.0))
    with pytest.raises(SemidError, match=r"no term 'generaton'; did you mean 'generation'\?"):
        Objective.only(generaton=Schedule(1.0))
    with pytest.raises(SemidError, match="no term of the objective has a weight"):
        Phase(short(), StepConfig(Objective.only()))
    for objective in (alone, Objective.only(reconstruction=Schedule(1.0), entropy=Schedule(1.0))):
        with pytest.raises(SemidError, match=r"surgery treats .* of one alone \((generation|entropy, recons)"):
            Phase(short(), StepConfig(objective), Surgery.PROJECT)
    Phase(short(), StepConfig(dataclasses.replace(alone, codebook=Schedule(1.0))), Surgery.PROJECT)
    still = StepConfig(alone, backward=0.0)
    with pytest.raises(SemidError, match="no loss reaches the encoders: none of the items is differentiated"):
        Phase(short(), still)
    Phase(short(encoder=0.0), still)
    Phase(short(), dataclasses.replace(still, reach=Reach.TOKENIZER))
    noisy = (Phase(short(), StepConfig(alone, dropout=True)),)
    with pytest.raises(SemidError, match="the bank, which holds noisy vectors under dropout"):
        dataclasses.replace(CONFIG, joint=noisy)
    dataclasses.replace(CONFIG, joint=noisy, codes=HoldThenRefit())


@pytest.mark.parametrize("place", ["encoder", "tokenizer.training", "joint.0.training", "finetune"])
def test_a_stage_without_a_number_of_epochs_is_named_before_any_work(place):
    endless = TrainingConfig(epochs=None)
    tokenizer = dataclasses.replace(CONFIG.tokenizer, training=endless)
    fields = {"tokenizer.training": {"tokenizer": tokenizer}, "joint.0.training": {"joint": (Phase(endless),)}}
    with pytest.raises(SemidError, match=f"expected a number of epochs for {place}, got none; name one"):
        dataclasses.replace(CONFIG, **fields.get(place, {place: endless}))


def test_other_families_are_refused():
    with pytest.raises(SemidError, match="end-to-end training is of the RQ-Transformer, not of FlatDecoderConfig"):
        JointConfig(generator=GeneratorConfig(FlatDecoderConfig(BACKBONE)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": ()}, "leave features out"),
        ({"objective": ObjectiveConfig(distillation=1.0)}, "leave distillation and teacher_graph out"),
        ({"objective": ObjectiveConfig(teacher_graph=0.5)}, "leave distillation and teacher_graph out"),
        ({"objective": ObjectiveConfig(normalization=SoftmaxOver.CHILDREN)}, "over the vocabulary, not over children"),
        ({"objective": ObjectiveConfig(event_weights={"buy": 2.0})}, "leave event_weights out"),
        ({"objective": ObjectiveConfig(interaction_weights=True)}, "leave interaction_weights out"),
        ({"objective": ObjectiveConfig(state_column="fused")}, "leave state_column out"),
    ],
)
def test_settings_of_the_generator_that_joint_steps_do_not_read_are_refused(settings, message):
    with pytest.raises(SemidError, match=message):
        JointConfig(generator=dataclasses.replace(CONFIG.generator, **settings))


def trained_model(world, folder):
    """The joint model of an artifact."""
    encoder = item_encoder(world).encoder
    codes = Recommender.from_pretrained(folder).codes
    autoencoder = RQVAE(CONFIG.tokenizer, dim=encoder.dim, rngs=nnx.Rngs(0))
    spec = ModelSpec(
        CONFIG.generator.model, (8, 8, CONFIG.tie_break), world.num_items, encoder.dim, max_history=HISTORY
    )
    model = JointModel(encoder, autoencoder, spec.build(seed=0), codes=jnp.asarray(codes), rngs=nnx.Rngs(1))
    graph, state = nnx.split(model)
    path = folder / STATE_FILE
    return nnx.merge(graph, replace_leaves(state, load_tensors(path), where=str(path)))


def ndcg(model, examples, relaxation, temperature):
    """NDCG@10 of all items by their probability after histories read through mixtures of codes."""
    history, real = map(jnp.asarray, examples.histories.padded(HISTORY))
    vectors, codes = model.bank.read(history), model.codes[...]
    quantizer = model.autoencoder.quantizer
    found, books = quantizer.search(model.autoencoder.latents(vectors)), [book[...] for book in quantizer.codebooks]
    soft = tuple(jax.nn.softmax(x / temperature) for x in level_logits(found, books))
    mixtures = code_mixtures(found._replace(probabilities=soft), books, relaxation=relaxation)
    last = jax.nn.one_hot(codes[history][..., -1], CONFIG.tie_break)
    inputs = Inputs(codes[history], vectors, mixtures=(*mixtures, last))
    segments = real.astype(jnp.int32)
    state = last_state(model.generator.states(inputs, segments), segments)
    users, items = len(state), len(codes)
    logits = model.generator.depth_logits(jnp.repeat(state, items, 0), jnp.tile(codes, (users, 1)))
    each = [
        jnp.take_along_axis(jax.nn.log_softmax(x), c[:, None], 1)[:, 0]
        for x, c in zip(logits, jnp.tile(codes, (users, 1)).T, strict=True)
    ]
    scores = sum(each).reshape(users, items)
    place = (scores > jnp.take_along_axis(scores, jnp.asarray(examples.targets)[:, None], 1)).sum(1)
    return float(jnp.where(place < 10, 1 / jnp.log2(place.astype(jnp.float32) + 2), 0).mean())


def test_at_the_lowest_temperature_soft_codes_rank_as_hard_ones_do(world, runs):
    home, _ = runs
    model, examples = trained_model(world, home / "end-to-end"), world.splits.test
    hard = ndcg(model, examples, Relaxation.SOFT_BACKWARD, 1.0)
    assert hard > 0
    assert ndcg(model, examples, Relaxation.SOFT, 1e-3) == pytest.approx(hard, rel=0.01)
    assert ndcg(model, examples, Relaxation.SOFT, 100.0) != pytest.approx(hard, rel=0.01)


def test_naive_straight_through_codes_collapse_where_the_default_keeps_them(tmp_path):
    world = simulate(
        SimulatedConfig(num_items=400, num_users=200, taxonomy=(4, 4, 2), family_size=1.0, images=False, content_dim=8)
    )
    tokenizer = dataclasses.replace(CONFIG.tokenizer, level_sizes=(16, 16), training=short(20.0))
    # The generation loss alone, the gradient of a chosen code taken for that of its distance, and no care.
    alone = Objective.only(generation=Schedule(1.0))
    naive = StepConfig(alone, relaxation=Relaxation.STRAIGHT_THROUGH)
    usage = {}
    for step, cared in ((naive, False), (StepConfig(), True)):
        config = dataclasses.replace(
            STAGED,
            encoder=None,
            tokenizer=dataclasses.replace(tokenizer, reseed=cared),
            joint=(Phase(short(10.0), step),),
            tie_break=400,
        )
        made = run(world.dataset, config, tmp_path / str(cared), mesh=make_mesh(jax.devices()[:1]))
        usage[cared] = [level.usage for level in health(made.codes[:, :-1], (16, 16)).levels]
    assert max(usage[False]) < 0.5
    assert min(usage[True]) >= 0.9
