"""A whole run of the stages on a tiny world: what comes out, what moved, and what may be shared and resumed."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quantizers import Schedule
from semid import Recommender
from semid.artifacts import load_tensors
from semid.autoencoder import RQVaeConfig
from semid.data.simulated import SimulatedConfig, simulate
from semid.encoders.content import FeatureRows
from semid.encoders.fusion import FeatureEncoder, FusionConfig, ItemEncoder
from semid.errors import SemidError
from semid.generator import GeneratorConfig
from semid.joint.model import Objective, Reach, StepConfig
from semid.joint.training import STAGES, STATE_FILE, JointConfig, Surgery, train_joint
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import FlatDecoderConfig, RQTransformerConfig, TransformerConfig


def short(steps_of_an_epoch=1.0, **rates):
    optimizer = OptimizerConfig(learning_rate=3e-3, rates=tuple(rates.items()))
    return TrainingConfig(epochs=steps_of_an_epoch, batch_size=64, log_every=1, optimizer=optimizer)


BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.1)
CONFIG = JointConfig(
    encoder=short(),
    tokenizer=RQVaeConfig(level_sizes=(8, 8), hidden=(8,), latent=4, training=short(4.0)),
    generator=GeneratorConfig(RQTransformerConfig(BACKBONE), training=short()),
    joint=short(autoencoder=0.3),
    step=StepConfig(objective=Objective(contrast=Schedule(0.1))),
    surgery=Surgery.PROJECT,
    refresh=0.5,
    finetune=short(),
)
STAGED = dataclasses.replace(CONFIG, joint=None)


@pytest.fixture(scope="module")
def world():
    config = SimulatedConfig(num_items=120, num_users=60, taxonomy=(2, 2, 2), images=False, content_dim=8)
    return simulate(config).dataset


def item_encoder(world):
    vectors = np.stack(world.items["content"].to_numpy(zero_copy_only=False)).astype(np.float32)
    content = {"content": FeatureRows(jnp.asarray(vectors), jnp.ones(len(vectors), bool))}
    return content, ItemEncoder({"content": FeatureEncoder(8)}, FusionConfig(dim=8, hidden=8), rngs=nnx.Rngs(0))


def run(world, config, out, **options):
    content, encoder = item_encoder(world)
    return train_joint(world, content, encoder, config, out=out, parents={}, **options)


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
    assert not list(home.glob("*.stages"))
    assert {path.name for path in (home / "shared").iterdir()} == set(STAGES[:3])


def test_every_term_and_the_health_of_bank_and_codes_are_logged(runs):
    home, _ = runs
    records = [json.loads(line) for line in (home / "end-to-end/history.joint.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    terms = {"generation", "reconstruction", "codebook", "commitment", "entropy", "contrast"}
    assert all({f"loss/{term}" for term in terms} <= set(record) for record in steps)
    assert all(0 <= record["conflicts"] <= 1 for record in steps)
    assert all(record["bank/agreement"] > 0.9 for record in steps)
    looked = next(record for record in records if "validation/recall@10" in record)
    assert looked["validation/bank/coverage"] == 1.0
    assert {f"validation/{name}/level_1" for name in ("churn", "usage")} <= set(looked)


def test_the_encoder_moves_in_joint_steps_alone(world, runs):
    home, _ = runs
    together, staged = (load_tensors(home / name / STATE_FILE) for name in ("end-to-end", "staged"))
    names = [name for name in staged if name.startswith("encoder/") and "kernel" in name]
    assert names
    assert all(np.any(together[name] != staged[name]) for name in names)
    _, encoder = item_encoder(world)
    fresh = encoder.projections["content"].kernel[...]
    assert np.any(staged["encoder/projections/content/kernel"] != np.asarray(fresh))


def test_a_frozen_part_does_not_move(world, runs, tmp_path):
    home, _ = runs
    frozen = dataclasses.replace(
        CONFIG, joint=short(encoder=0.0, autoencoder=0.3), step=dataclasses.replace(CONFIG.step, reach=Reach.TOKENIZER)
    )
    run(world, frozen, tmp_path / "frozen", shared=home / "shared")
    found, staged = (load_tensors(path / STATE_FILE) for path in (tmp_path / "frozen", home / "staged"))
    assert all(np.array_equal(found[name], staged[name]) for name in staged if name.startswith("encoder/"))
    moved = [name for name in staged if name.startswith("autoencoder/encoder") and "kernel" in name]
    assert any(np.any(found[name] != staged[name]) for name in moved)


def test_what_is_finished_is_not_made_again(world, runs):
    home, made = runs
    before = {path: path.stat().st_mtime_ns for path in (home / "staged").iterdir()}
    again = run(world, STAGED, home / "staged", shared=home / "shared")
    assert {path: path.stat().st_mtime_ns for path in (home / "staged").iterdir()} == before
    np.testing.assert_array_equal(again.codes, made["staged"].codes)


def test_codes_that_collapse_are_an_error(world, tmp_path):
    with pytest.raises(SemidError, match=r"\d+ items share their codes, and tie_break leaves room for 1"):
        run(world, dataclasses.replace(STAGED, tie_break=1), tmp_path / "narrow")
    assert not (tmp_path / "narrow").exists()


def test_other_families_are_refused():
    with pytest.raises(SemidError, match="end-to-end training is of the RQ-Transformer, not of FlatDecoderConfig"):
        JointConfig(generator=GeneratorConfig(FlatDecoderConfig(BACKBONE)))
