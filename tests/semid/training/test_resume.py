"""Training killed with signal 9 at random moments and started again ends on the bits of an unbroken run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

ITEMS, USERS, STEPS = 40, 48, 60  # 8 steps are an epoch


def main(seed: int, *outs: str) -> None:
    """Train a small generator, dropout on; the second of several `outs` has the next seed, and so on."""
    import semid.generator as generator
    import semid.training.loop as loop
    from semid.catalog import SemanticCatalog
    from seq_models import RQTransformerConfig
    from seq_models.layers import TransformerConfig

    put_batch = loop.put_batch

    def slow_put_batch(batch, mesh):
        time.sleep(0.01)  # so that kills land in the middle
        return put_batch(batch, mesh)

    loop.put_batch = slow_put_batch
    data = dataset()
    codes = np.stack([np.arange(ITEMS) % 7, np.arange(ITEMS) // 7], axis=1).astype(np.int32)
    catalog = SemanticCatalog(data.item_ids, codes, (7, 6), tie_break=False)
    config = generator.GeneratorConfig(
        model=RQTransformerConfig(TransformerConfig(8, layers=1, heads=2, hidden=16, dropout=0.2)),
        max_history=6,
        row_length=12,
        training=generator.TrainingConfig(
            epochs=STEPS / 8, batch_size=4, validate_every=7 / 8, log_every=1, patience=STEPS
        ),
        validation_users=16,
        validation_beam=10,
    )
    for offset, out in enumerate(outs):
        generator.train_generator(data, catalog, config, out=Path(out), parents={}, seed=seed + offset)


def dataset():
    from semid.data.dataset import Dataset

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


def start(*outs: Path, seed: int = 0) -> subprocess.Popen:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, __file__, str(seed), *map(str, outs)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


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


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs that nobody killed, with seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start(folder / "seed0", folder / "seed1"))
    return folder / "seed0", folder / "seed1"


def test_killed_runs_end_on_the_same_bits(unbroken, tmp_path):
    out, draw, killed_at = tmp_path / "model", random.Random(7), []
    for first in (2, 20, 40):  # before the first checkpoint, and twice after some
        step = draw.randrange(first, first + 12)
        killed_at.append(kill_at(start(out), out, step=step, delay=draw.uniform(0, 0.1)))
        assert not out.exists()
    assert killed_at == sorted(killed_at), killed_at
    assert killed_at[-1] < STEPS, "the last kill came too late to show anything"
    finish(start(out))
    assert not out.with_name("model.checkpoints").exists()
    for name in ("model.safetensors", "history.jsonl"):
        assert (out / name).read_bytes() == (unbroken[0] / name).read_bytes(), f"{name} after kills at {killed_at}"


def test_another_seed_ends_elsewhere(unbroken):
    for name in ("model.safetensors", "history.jsonl"):
        assert (unbroken[0] / name).read_bytes() != (unbroken[1] / name).read_bytes()


def test_the_record_is_whole(unbroken):
    records = [json.loads(line) for line in (unbroken[0] / "history.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    looks = [r["step"] for r in records if "validation/ndcg@10" in r]
    assert looks == [*range(7, STEPS, 7), STEPS]
    losses = [r["loss"] for r in records if "loss" in r]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
