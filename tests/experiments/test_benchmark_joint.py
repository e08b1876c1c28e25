"""A pulse of `experiments.benchmarks.joint` on tiny sizes; that the step it measures is the one that trains."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.benchmarks import joint
from experiments.benchmarks.joint import Pretrained, Sizes, Way
from semid.encoders import BlocksConfig, LowRank, PostNorm, SideAdapters
from semid.training import make_step
from seq_models import TransformerConfig

TEXT = BlocksConfig(dim=8, layers=1, heads=2, hidden=16)
SIZES = Sizes(
    items=50,
    batch=16,
    history=4,
    pieces=6,
    vocabulary=30,
    text=TEXT,
    dim=8,
    level_sizes=(8, 4),
    generator=TransformerConfig(dim=8, layers=1, heads=2, hidden=8),
)
BACKBONE = Pretrained(
    BlocksConfig(dim=32, layers=1, heads=2, hidden=128, architecture=PostNorm()),
    vocabulary=40,
    items=16,
    tokens=16,
    side=SideAdapters(states=2, hidden=4),
    low_rank=LowRank(rank=2),
)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    out = tmp_path_factory.mktemp("joint") / "cost.json"
    options = {"windows": (1,), "rates": ((0.2, 0.2),), "bank": 640_000, "sizes": SIZES, "pretrained": BACKBONE}
    joint.main(out, rounds=1, steps=1, **options)
    return json.loads(out.read_text())


def test_fewer_items_are_encoded_for_fewer_operations(figures):
    rows = {row.pop("step"): row for row in figures["steps"]}
    staged, _, few, default, every = rows.values()
    assert list(rows) == ["staged", "staged, every item a target", "w 1, p 0.2, q 0.2", joint.DEFAULT, joint.EVERY]
    encoded = [few["items encoded"], default["items encoded"], every["items encoded"]]
    assert encoded == [7, 32, 80]  # of 16 targets and histories of 4; no target where the generation term is alone
    assert 0 < few["over p = q = 1"] <= 0.6
    assert few["encoder, GFLOP"] / 7 == pytest.approx(every["encoder, GFLOP"] / 80)
    assert staged["step, GFLOP"] < few["step, GFLOP"] < every["step, GFLOP"]
    assert all(row["time over staged"] > 0 for row in rows.values())


def test_without_rounds_nothing_is_run_and_figures_are_those_of_the_programs():
    rows = joint._joint_steps(SIZES, (1,), ((0.2, 0.2),), rounds=0, steps=1)
    counted = {"step, GFLOP", "trained, with moments, MiB", "temporaries, MiB", "in all, MiB"}
    assert all(counted <= set(row) and "ms a step" not in row for row in rows)


def test_a_gradient_costs_more_than_a_vector_and_less_than_four():
    vector, gradient = joint._flops_of_an_item(SIZES)
    assert 1.5 * vector < gradient < 3.5 * vector  # two products more of each


def test_adapters_beside_a_cached_encoder_need_the_least(figures):
    rows = {row["tuning"]: row for row in figures["tunings"]}
    assert list(rows) == ["full", "low rank", "side adapters", "frozen", "side adapters, states cached"]
    cached, full = rows["side adapters, states cached"], rows["full"]
    assert cached["temporaries, MiB"] < full["temporaries, MiB"]
    assert cached["in all, MiB"] < rows["side adapters"]["in all, MiB"] < full["in all, MiB"]
    trained = {name: row["trained, with moments, MiB"] for name, row in rows.items()}
    assert trained["frozen"] < trained["side adapters"] == trained["side adapters, states cached"] < trained["full"]


def test_a_device_holds_its_part_of_the_bank_and_no_copy(figures):
    (row,) = figures["bank"]
    assert row["bank, MiB"] == pytest.approx(640_000 * 257 * 4 / 2**20, rel=1e-6)
    assert row["of a device, MiB"] == pytest.approx(row["bank, MiB"] / 8, rel=1e-3)
    assert row["temporaries, MiB"] < row["of a device, MiB"] / 2


class Tiny(nnx.Module):
    """A parameter, and a variable that the loss sets."""

    def __init__(self):
        self.weight, self.seen = nnx.Param(jnp.ones((2, 3))), nnx.Variable(jnp.zeros(()))


def test_the_step_is_that_of_training():
    def loss(model, batch, tables, context):
        model.seen[...] = model.seen[...] + batch.sum()
        drawn = jax.random.uniform(context.key)
        return jnp.mean(jnp.square(batch @ model.weight[...] - tables[None] - drawn)), {"seen": model.seen[...]}

    way = Way(Tiny, loss, lambda: jnp.ones((8, 2)), lambda: jnp.arange(3.0))
    program = joint._Program(way)
    program.start()
    options = {"tables": way.tables(), "seed": 0, "num_steps": 10_000, "mesh": program.mesh}
    step, state = make_step(Tiny(), program.optimizer, loss, **options), program._first()
    for _ in range(3):
        program.take(1)
        state, metrics = step(state, way.batch())
    for name, found in program.metrics.items():
        assert float(found) == pytest.approx(float(metrics[name])), name
    np.testing.assert_allclose(program.state.params["weight"][...], state.params["weight"][...], rtol=1e-6)
    assert float(metrics["seen"]) == 3 * 16
