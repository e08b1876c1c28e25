"""Two processes that share four devices each train as one process with eight does."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pytest
from flax import nnx

from semid.artifacts import load_tensors
from semid.catalog import Collisions, SemanticCatalog
from semid.data import Dataset, Histories
from semid.errors import SemidError
from semid.generators import ObjectiveConfig, TaughtHistories
from semid.tokenizers import RQKmeansConfig, RQVaeConfig, TokenizerConfig, tokenize
from semid.training import (
    MeshConfig,
    OptimizerConfig,
    PackedHistories,
    RunFolder,
    SharedArray,
    SingleRows,
    Task,
    TrainingConfig,
    batches,
    join_processes,
    make_mesh,
    named_leaves,
    on_first,
    own_share,
    processes,
    read_history,
    train,
)
from semid.training.loop import _log_hook
from semid.training.processes import from_first
from semid.training.tracking import NullTracker, open_tracker
from seq_models import TeacherItems

ITEMS, STEPS = 40, 12
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NUM_TASKS")


class Next(nnx.Module):
    """The next item by a table, a matrix that opens and one that closes."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(ITEMS, 8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.out = nnx.Linear(16, ITEMS, rngs=rngs)

    def __call__(self, history):
        return self.out(jax.nn.relu(self.up(self.table(history).mean(axis=1))))


def loss(model, batch, tables, context):
    logits = model(batch.history) + tables[None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets).mean(), {}


class Numbered(SingleRows):
    """Rows of which the processes leave a share each in the run's folder."""

    def prepare(self, folder):
        numbers = SharedArray.exchanged(own_share(len(self)), folder / "numbers")
        assert (numbers[np.arange(len(self))] == np.arange(len(self))).all()


def run(folder: Path, *, epochs: float = 3.0, told_at: int | None = None) -> nnx.Module:
    """Train `Next` on all devices of all processes, four steps an epoch; the last process is sent SIGTERM at a step."""

    def hook(at, state, metrics):
        if at == told_at and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return state

    rng = np.random.default_rng(0)
    rows = Numbered(Histories.from_lists([rng.integers(0, ITEMS, 9).tolist() for _ in range(8)]), max_history=4)
    examples = rows[np.arange(len(rows))]

    def validate(model):
        logits = model(jnp.asarray(examples.history))
        return {"score": float(jnp.mean(logits.argmax(-1) == examples.targets))}

    task = Task(
        Next(nnx.Rngs(0)),
        loss,
        rows,
        tables=jnp.zeros(ITEMS),
        validate=validate,
        select="score",
        hooks=lambda steps: [hook],
    )
    return train(
        task,
        TrainingConfig(epochs=epochs, batch_size=16, optimizer=OptimizerConfig(learning_rate=0.03), log_every=1),
        run=RunFolder(folder, {"epochs": epochs}, title="next"),
        seed=0,
        mesh=make_mesh(config=MeshConfig(fsdp=2, tensor=2)),
    )


def leaves(model: nnx.Module) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(nnx.state(model)).items()}


def catalogs(folder: Path) -> None:
    """Tokenize with a trained quantizer, whose codes are re-seeded and clustered every epoch, and with an untrained."""
    vectors = np.random.default_rng(0).normal(size=(ITEMS, 6)).astype(np.float32)
    ids, once = [f"i{row}" for row in range(ITEMS)], {"user_id": ["u"], "item_id": ["i0"], "position": [0]}
    dataset = Dataset.build(pa.table({"item_id": ids}), pa.table(once), name="tiny").with_vectors("x", vectors)
    training = TrainingConfig(epochs=2, batch_size=16, validate_every=1, log_every=1)
    sizes = {"level_sizes": (16, 8), "kmeans_iterations": 0, "hidden": (8,), "latent": 4}
    methods = {"vae": RQVaeConfig(**sizes, diversity=0.1, training=training), "kmeans": RQKmeansConfig((8, 4))}
    for name, method in methods.items():
        config = TokenizerConfig(method, collisions=Collisions.ALLOWED)
        tokenize(dataset, config, out=folder / name, mesh=make_mesh(config=MeshConfig(fsdp=2)))


class Distance:
    """A teacher to whom the best item after each position is the one three rows on; it counts the rows it is asked."""

    item_ids = pa.array([f"i{row}" for row in range(ITEMS)])
    digest, origin = "0" * 64, None
    asked = 0

    def best(self, rows, *, k):
        self.asked += len(rows.history)
        items = (rows.history[..., None] + 3 + np.arange(k, dtype=np.int32)) % ITEMS
        return TeacherItems(items, np.log(items + 1))


def distilled(folder: Path) -> dict[str, np.ndarray]:
    """Training rows with what the teacher ranks best, the same of this process's batches, and the state after them."""
    rng, teacher = np.random.default_rng(0), Distance()
    train = Histories.from_lists([rng.integers(0, ITEMS, size).tolist() for size in rng.integers(2, 9, 31)])
    packed = PackedHistories(train, max_history=4, row_length=6)
    rows = TaughtHistories(packed, teacher, ObjectiveConfig(distillation=1.0, teacher_items=3))
    rows.prepare(folder / "shares")
    assert teacher.asked <= -(-len(rows) // jax.process_count())
    fields = {name: field for name, field in rows[np.arange(len(rows))]._asdict().items() if field is not None}
    mine = batches(rows, batch_size=4, num_batches=9, seed=0, process=(jax.process_index(), jax.process_count()))
    stream = np.stack([batch.teacher_items for batch in mine])
    return fields | {"stream": stream, "state": np.frombuffer(mine.get_state(), np.uint8)}


def worker(folder: Path) -> None:
    """What each of two processes does: train, be refused with another config, read the finished run, and tokenize."""
    join_processes()
    rank = jax.process_index()
    assert (jax.process_count(), jax.device_count()) == (2, 8)
    trained = leaves(run(folder / "run"))
    np.savez(folder / f"{rank}.npz", **trained)
    again = leaves(run(folder / "run"))
    assert all((again[name] == value).all() for name, value in trained.items())
    with pytest.raises(SystemExit, match=r"^143$"):
        run(folder / "stopped", told_at=5)
    assert max(int(path.name) for path in (folder / "stopped").iterdir() if path.name.isdigit()) == 5
    resumed = leaves(run(folder / "stopped"))
    assert all((resumed[name] == value).all() for name, value in trained.items())
    np.savez(folder / f"distilled{rank}.npz", **distilled(folder))
    said = []
    try:
        run(folder / "run", epochs=1.0)
    except SemidError as error:
        said.append(str(error))
    on_first(lambda: (folder / "first").write_text(str(rank)))
    for _ in range(2):  # the second time it is all there
        catalogs(folder)
    (folder / f"{rank}.json").write_text(
        json.dumps([*said, from_first(f"from {rank}"), (folder / "first").read_text()])
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder where two processes did what `worker` does."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**common, "JAX_PROCESS_ID": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return folder


def test_two_processes_train_as_one(two, tmp_path):
    alone = leaves(run(tmp_path / "run"))
    first, second = (dict(np.load(two / f"{rank}.npz")) for rank in range(2))
    for name, value in alone.items():
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], value, atol=1e-5, err_msg=name)
    together, expected = (read_history(folder / "run" / "history.jsonl") for folder in (two, tmp_path))
    assert [record["step"] for record in together] == [record["step"] for record in expected], "each record once"
    for ours, theirs in zip(together, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    losses = [record["loss"] for record in together if "loss" in record]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.1


def test_one_process_reads_what_two_wrote_to_the_bit(two):
    first = dict(np.load(two / "0.npz"))
    for name, value in leaves(run(two / "run")).items():
        np.testing.assert_array_equal(value, first[name])


def test_two_processes_ask_a_teacher_about_a_share_each_and_read_all(two, tmp_path):
    alone = distilled(tmp_path)
    shares = [dict(np.load(two / f"distilled{rank}.npz")) for rank in range(2)]
    for share in shares:
        for name in alone.keys() - {"stream"}:
            np.testing.assert_array_equal(share[name], alone[name])
    np.testing.assert_array_equal(np.concatenate([share["stream"] for share in shares], axis=1), alone["stream"])
    assert len(list((two / "shares").glob("*.npy"))) == 4
    assert not (tmp_path / "shares").exists()


@pytest.mark.parametrize("name", ["vae", "kmeans"])
def test_two_processes_tokenize_as_one(two, tmp_path, name):
    catalogs(tmp_path)
    together, alone = (load_tensors(folder / name / "tokenizer.safetensors") for folder in (two, tmp_path))
    for tensor in (tensor for tensor in alone if "/clusters/" not in tensor):  # where two are as good, rounding decides
        np.testing.assert_allclose(together[tensor], alone[tensor], atol=1e-5, err_msg=tensor)
    codes = [SemanticCatalog.read(folder / name / "catalog.parquet").codes for folder in (two, tmp_path)]
    np.testing.assert_array_equal(*codes)
    if name == "vae":  # control: codes were dead, so that the first epoch re-seeded some
        looks = [r for r in read_history(two / name / "history.jsonl") if "validation/explained" in r]
        assert looks[0]["validation/usage/level_0"] < 1


def test_all_processes_are_told_the_same(two):
    for rank in range(2):
        refused, sent, wrote = json.loads((two / f"{rank}.json").read_text())
        assert "checkpoints of another run (epochs: 3.0 -> 1.0)" in refused
        assert (sent, wrote) == ("from 0", "0")


@pytest.fixture
def calls(monkeypatch) -> list:
    """Calls of `jax.distributed.initialize`, in an environment that names no processes."""
    for name in (*VARIABLES, "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    made = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **options: made.append((given, options)))
    return made


@pytest.mark.parametrize(
    ("values", "made"),
    [
        ({}, [((), {})]),
        ({"SLURM_STEP_NUM_TASKS": "1"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, []),
        ({"SLURM_STEP_NUM_TASKS": "2"}, [((), {})]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, [((), {})]),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            [(("host:1", 4, 3), {"cluster_detection_method": "deactivate"})],
        ),
    ],
)
def test_processes_are_joined_if_the_environment_or_jax_names_them(calls, monkeypatch, values, made):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    join_processes()
    assert calls == made


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("coordinator_address should be defined."), None),
        (RuntimeError("jax.distributed.initialize() must be called before any JAX calls"), None),
        (RuntimeError("Barrier timed\nout"), "the processes of this cluster do not meet .Barrier timed out.; set JAX_"),
        (ValueError("Number of processes must be defined."), "the processes of this cluster do not meet .Number"),
    ],
)
def test_a_cluster_that_is_none_and_one_that_does_not_meet(calls, monkeypatch, error, message):
    def initialize():
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with contextlib.nullcontext() if message is None else pytest.raises(SemidError, match=f"^{message}"):
        join_processes()


def test_jax_says_what_is_taken_for_no_cluster():
    """The real one, in a process that has used devices and in one that has not."""
    jax.devices()
    join_processes()
    script = "import jax\nfrom semid.training import join_processes\njoin_processes()\nprint(jax.process_count())"
    hidden = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR")
    alone = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=alone, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host:1", "2", None), "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES set without JAX_PROCESS_ID; set all of .*"),
        ((None, None, "1"), "JAX_PROCESS_ID set without JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES; .* or none"),
        (("host:1", "2", "2"), "expected 0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES, got 2 and 2"),
        (("host:1", "two", "0"), "expected 0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES, got 0 and two"),
    ],
)
def test_variables_that_do_not_fit_together(calls, monkeypatch, values, message):
    for name, value in zip(VARIABLES, values, strict=False):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(SemidError, match=f"^{message}$"):
        join_processes()
    assert calls == []


def test_one_process_is_the_first():
    done = []
    on_first(lambda: done.append(1))
    assert (done, from_first({"a": [1.5]})) == ([1], {"a": [1.5]})


def _broken_log(folder: Path) -> None:
    (folder / "history.jsonl").write_text("no record\n")
    open_tracker(folder, title="next", num_steps=1)


def _full_disk(folder: Path) -> None:
    class Full(NullTracker):
        def log(self, step, scalars):
            raise SemidError("history.jsonl: cannot be written")

    log = _log_hook(Full(folder), SimpleNamespace(due=lambda at: False, checkpoints=None), 1)
    log(1, None, {"loss": 1.0})


def _unforeseen(folder: Path) -> None:
    on_first(lambda: {}["gone"])


@pytest.mark.parametrize(
    ("work", "kind", "line"),
    [
        (_broken_log, SemidError, "history.jsonl: line 1: not a record of a training log; delete the file"),
        (_full_disk, SemidError, "history.jsonl: cannot be written"),
        (_unforeseen, KeyError, "'gone'"),
    ],
)
def test_what_the_first_process_raises_the_others_raise(tmp_path, monkeypatch, work, kind, line):
    sent: list[np.ndarray] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index, expected, broadcast in (
        (0, kind, lambda value: sent.append(value) or value),
        (1, SemidError, lambda value: sent.pop(0)),
    ):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(processes, "broadcast_one_to_all", broadcast)
        with pytest.raises(expected) as raised:
            work(tmp_path)
        assert type(raised.value) is expected
        assert str(raised.value).endswith(line)
    assert not sent


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
