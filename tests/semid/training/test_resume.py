"""Training killed with signal 9 at random moments, or told to end, and started again ends on the bits of an unbroken
run; to rounding where it goes on with other devices."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest

from semid import artifacts
from semid.catalog import SemanticCatalog
from semid.data import Dataset
from semid.generators import GeneratorConfig, train
from semid.training import MeshConfig, TrainingConfig, loop, make_mesh, read_history
from seq_models import RQTransformerConfig
from seq_models.layers import TransformerConfig

ITEMS, USERS, STEPS = 40, 48, 60  # 8 steps are an epoch


def run(out: Path, *, seed: int, count: int = 1, sharing: MeshConfig = MeshConfig()) -> None:
    """Train a small generator, dropout on, on `count` devices."""
    data = dataset()
    codes = np.stack([np.arange(ITEMS) % 7, np.arange(ITEMS) // 7], axis=1).astype(np.int32)
    catalog = SemanticCatalog(data.item_ids, codes, (7, 6), tie_break=False)
    training = TrainingConfig(epochs=STEPS / 8, batch_size=4, validate_every=15 / 8, log_every=1, patience=STEPS)
    config = GeneratorConfig(
        model=RQTransformerConfig(TransformerConfig(8, layers=1, heads=2, hidden=16, dropout=0.2)),
        max_history=6,
        row_length=12,
        training=training,
        validation_users=16,
        validation_beam=10,
    )
    mesh = make_mesh(jax.devices()[:count], sharing)
    train(data, catalog, config, out=out, seed=seed, mesh=mesh)


def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(USERS), 11)
    items = (np.cumsum(rng.integers(1, 4, users.shape)) + users) % ITEMS
    columns = {
        "user_id": [f"u{u}" for u in users],
        "item_id": [f"i{i}" for i in items],
        "position": np.arange(len(users)),
    }
    catalogue = pa.table({"item_id": [f"i{i}" for i in range(ITEMS)], "title": ["a title"] * ITEMS})
    return Dataset.build(catalogue, pa.table(columns), name="tiny")


def start(out: Path, *devices: int) -> subprocess.Popen:
    """The same training with seed 0 in a process of its own, each step drawn out so that kills land in the middle; on
    `devices`, which are their number, fsdp and tensor."""
    command = [sys.executable, __file__, str(out), *map(str, devices)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, *, status: int = 0) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors


def steps_done(out: Path) -> int:
    history = out.with_name(f"{out.name}.checkpoints") / "history.jsonl"
    complete = history.read_text().split("\n")[:-1] if history.exists() else []
    return json.loads(complete[-1])["step"] if complete else 0


def kill_at(process: subprocess.Popen, out: Path, *, step: int, delay: float) -> int:
    """Signal 9 `delay` seconds after the run has recorded `step`; the last step recorded by then."""
    deadline = time.monotonic() + 120
    while steps_done(out) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    return steps_done(out)


def tell_to_end(process: subprocess.Popen, out: Path, *, after: int) -> int:
    """Signal 15 once the run has recorded a step after that one; the last step recorded by its end."""
    while steps_done(out) <= after and process.poll() is None:
        time.sleep(0.005)
    process.terminate()
    finish(process, status=128 + signal.SIGTERM)
    return steps_done(out)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs that nobody killed, with seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("unbroken")
    for seed in (0, 1):
        run(folder / f"seed{seed}", seed=seed)
    return folder / "seed0", folder / "seed1"


def test_killed_runs_end_on_the_same_bits(unbroken, tmp_path):
    out, draw, killed_at = tmp_path / "model", random.Random(7), []
    for first in (2, 20, 40):  # before the first checkpoint, and twice after some
        step = draw.randrange(first, first + 12)
        killed_at.append(kill_at(start(out), out, step=step, delay=draw.uniform(0, 0.1)))
        assert not out.exists()
        if first == 2:
            stopped_at = tell_to_end(start(out), out, after=killed_at[0])
            assert out.with_name("model.checkpoints").joinpath(str(stopped_at)).is_dir()
    assert killed_at == sorted(killed_at), killed_at
    assert killed_at[-1] < STEPS, "the last kill came too late to show anything"
    finish(start(out))
    assert not out.with_name("model.checkpoints").exists()
    for name in ("model.safetensors", "history.jsonl"):
        assert (out / name).read_bytes() == (unbroken[0] / name).read_bytes(), f"{name} after kills at {killed_at}"


def test_a_killed_run_goes_on_with_other_devices(unbroken, tmp_path):
    out = tmp_path / "model"
    killed_at = [kill_at(start(out, 1), out, step=17, delay=0), kill_at(start(out, 4), out, step=32, delay=0)]
    assert killed_at == sorted(killed_at)
    assert killed_at[-1] < STEPS, "the last kill came too late to show anything"
    run(out, seed=0, count=8, sharing=MeshConfig(2, 2))
    expected, found = (read_history(folder / "history.jsonl") for folder in (unbroken[0], out))
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    losses, expected_losses = ([r["loss"] for r in records if "loss" in r] for records in (found, expected))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    params, other = (artifacts.load_tensors(folder / "model.safetensors") for folder in (out, unbroken[0]))
    for name, value in params.items():
        np.testing.assert_allclose(value, other[name], atol=1e-3, err_msg=name)


def test_another_seed_ends_elsewhere(unbroken):
    for name in ("model.safetensors", "history.jsonl"):
        assert (unbroken[0] / name).read_bytes() != (unbroken[1] / name).read_bytes()


def test_the_record_is_whole(unbroken):
    records = [json.loads(line) for line in (unbroken[0] / "history.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    looks = [r["step"] for r in records if "validation/ndcg@10" in r]
    assert looks == [15, 30, 45, STEPS]
    losses = [r["loss"] for r in records if "loss" in r]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


if __name__ == "__main__":
    put_batch = loop.put_batch
    loop.put_batch = lambda batch, mesh: (time.sleep(0.01), put_batch(batch, mesh))[1]
    count, *sharing = map(int, sys.argv[2:] or [1])
    run(Path(sys.argv[1]), seed=0, count=count, sharing=MeshConfig(*sharing))
