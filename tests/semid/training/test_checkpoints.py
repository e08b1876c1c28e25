"""Checkpoints: the best and the last two, to the bit, of one request, whatever a kill or a bad disk left behind."""

import asyncio
import dataclasses
import errno
import gc
import json
import os
import re
import shutil
import threading
import time
import warnings

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from semid import artifacts
from semid.artifacts.files import temporary_file
from semid.errors import SemidError
from semid.training import (
    MeshConfig,
    OptimizerConfig,
    TrainState,
    create_state,
    discard_checkpoints,
    make_mesh,
    make_optimizer,
    named_leaves,
)
from semid.training import (
    checkpoints as module,
)
from semid.training.checkpoints import Checkpoints
from semid.training.seals import damage, restorable

REQUEST = {"config": {"epochs": 3, "nested": {"rate": 0.1}}, "seed": 0}


class Position:
    """Stands for a Grain iterator: a position in the stream of some data."""

    def __init__(self, at=0, data="these"):
        self.at, self.data = at, data

    def get_state(self):
        return json.dumps({"at": self.at, "data": self.data}).encode()

    def set_state(self, state):
        read = json.loads(state)
        if read["data"] != self.data:
            raise ValueError(f"data in checkpoint:\n{read['data']}\ndata in loader:\n{self.data}")
        self.at = read["at"]


@pytest.fixture(scope="module")
def state() -> TrainState:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    return create_state(model, make_optimizer(OptimizerConfig(), num_steps=9), make_mesh(jax.devices()[:2]))


def at_step(state: TrainState, step: int) -> TrainState:
    """A state that carries its step in every number."""
    return jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state)


def save(checkpoints: Checkpoints, state: TrainState, scores: dict[int, float]) -> None:
    for step, score in scores.items():
        checkpoints.save(at_step(state, step), Position(step), {"score": score, "other": -score})
    checkpoints.wait()


def opened(folder, request=None) -> Checkpoints:
    return Checkpoints(folder, request=request or REQUEST, select="score")


def steps_on_disk(folder) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def equal(a: TrainState, b: TrainState) -> bool:
    pairs = zip(named_leaves(a).values(), named_leaves(b).values(), strict=True)
    return all(x.dtype == y.dtype and (np.asarray(x) == np.asarray(y)).all() for x, y in pairs)


def test_keys_of_a_model_come_back(tmp_path):
    def made(seed):
        model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(seed)))
        return create_state(model, make_optimizer(OptimizerConfig(), num_steps=9), make_mesh(jax.devices()[:2]))

    def key_of(state):
        (key,) = (x for x in jax.tree.leaves(state.rest) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))
        return key

    checkpoints, saved, other = opened(tmp_path / "run"), made(1), made(2)
    checkpoints.save(saved, Position(), {"score": 0.0})
    assert key_of(other) != key_of(saved)
    assert key_of(checkpoints.restore(other, 0)) == key_of(saved)
    checkpoints.close()


def test_a_state_comes_back_to_the_bit_with_its_position(tmp_path, state):
    odd = dataclasses.replace(at_step(state, 7), params=jax.tree.map(lambda x: x / 3, state.params))
    checkpoints = opened(tmp_path)
    checkpoints.save(odd, Position(11), {"score": 0.5})
    checkpoints.close()
    checkpoints, position = opened(tmp_path), Position()
    found = checkpoints.restore(state, checkpoints.last_step, position)
    checkpoints.close()
    assert equal(found, odd)
    assert not equal(found, state)
    assert position.at == 11
    assert jax.tree.leaves(found.params)[0].sharding == jax.tree.leaves(state.params)[0].sharding


@pytest.mark.parametrize(("written", "read"), [((8, 2, 2), (1, 1, 1)), ((1, 1, 1), (8, 2, 2)), ((8, 1, 1), (4, 2, 1))])
def test_a_checkpoint_of_one_mesh_is_read_on_another_to_the_bit(tmp_path, written, read):
    def on(count, fsdp, tensor, *, seed):
        mesh = make_mesh(jax.devices()[:count], MeshConfig(fsdp, tensor))
        return create_state(nnx.Linear(4, 6, rngs=nnx.Rngs(seed)), make_optimizer(OptimizerConfig(), num_steps=9), mesh)

    saved, like = at_step(on(*written, seed=0), 7), on(*read, seed=1)
    checkpoints = opened(tmp_path)
    checkpoints.save(saved, Position(), {"score": 0.5})
    found = checkpoints.restore(like, 7)
    checkpoints.close()
    assert equal(found, saved)
    assert not equal(found, like)
    assert [x.sharding for x in jax.tree.leaves(found)] == [x.sharding for x in jax.tree.leaves(like)]


@pytest.mark.parametrize(
    ("scores", "best", "kept"),
    [
        ({1: 0.1, 2: 0.3, 3: 0.2}, 2, [2, 3]),
        ({1: 0.3, 2: 0.2, 3: 0.1}, 1, [1, 2, 3]),
        ({1: 0.1, 2: 0.2, 3: 0.3}, 3, [2, 3]),
        ({1: 0.3, 2: 0.2, 3: 0.4}, 3, [1, 2, 3]),  # the best of before 3 serves whoever goes on from 2
        ({1: 0.3, 2: 0.4, 3: 0.1, 4: 0.1}, 2, [2, 3, 4]),
        ({1: 0.2, 2: 0.2, 3: 0.2}, 1, [1, 2, 3]),  # a plateau: the first
        ({1: -5.0, 2: -2.0, 3: -4.0}, 2, [2, 3]),
    ],
)
def test_best_and_last_two_are_kept(tmp_path, state, scores, best, kept):
    checkpoints, last = opened(tmp_path), max(scores)
    assert (checkpoints.best_step, checkpoints.last_step) == (None, None)
    save(checkpoints, state, scores)
    assert (checkpoints.best_step, checkpoints.last_step) == (best, last)
    checkpoints.close()
    assert steps_on_disk(tmp_path) == kept
    again = opened(tmp_path)
    assert (again.best_step, again.last_step) == (best, last)
    assert equal(again.restore(state, best), at_step(state, best))
    again.close()


@pytest.mark.parametrize(
    ("request_", "difference"),
    [
        ({"config": {"epochs": 4, "nested": {"rate": 0.1}}, "seed": 0}, "config.epochs: 3 -> 4"),
        ({"config": {"epochs": 3, "nested": {"rate": 0.2}}, "seed": 0}, "config.nested.rate: 0.1 -> 0.2"),
        (REQUEST | {"seed": 1}, "seed: 0 -> 1"),
        (REQUEST | {"parents": {"dataset": "ab"}}, "parents: None -> "),
    ],
)
def test_checkpoints_of_another_request_are_refused(tmp_path, state, request_, difference):
    for request in (request_, REQUEST):  # nothing was saved for the first: it gives way
        opened(tmp_path, request).close()
    again = opened(tmp_path)
    save(again, state, {1: 0.5})
    again.close()
    opened(tmp_path).close()
    with pytest.raises(SemidError, match=rf"^{tmp_path}: checkpoints of another run \({difference}.*$"):
        opened(tmp_path, request_)


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SemidError, match="holds files that are no checkpoints of semid"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(SemidError, match=r"thesis.txt: is a file, and checkpoints should go below it"):
        opened(tmp_path / "thesis.txt")
    opened(tmp_path / "new").close()


def test_a_run_killed_while_it_wrote_its_request_can_start_again(tmp_path):
    temporary_file(tmp_path / "request.json").write_text('{"config"')
    opened(tmp_path).close()
    assert json.loads((tmp_path / "request.json").read_text()) == REQUEST


def _unfinished_copy(folder):
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    (folder / "3.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").unlink()


def _unfinished_item(folder):
    _unfinished_copy(folder)
    temporary = folder / "3.orbax-checkpoint-tmp"
    (temporary / "params").rename(temporary / "params.orbax-checkpoint-tmp")


def _bare_beginning(folder):
    (folder / "3.orbax-checkpoint-tmp").mkdir()


def _half_deleted(folder):
    """A kill while step 0, neither best nor last, was being deleted."""
    shutil.copytree(folder / "2", folder / "0")
    shutil.rmtree(folder / "0" / "params")
    (folder / "0" / "_CHECKPOINT_METADATA").unlink()


@pytest.mark.parametrize("leave", [_bare_beginning, _unfinished_copy, _unfinished_item, _half_deleted])
def test_what_a_kill_leaves_does_not_break_a_resumed_run(tmp_path, state, leave):
    checkpoints = opened(tmp_path)
    save(checkpoints, state, {1: 0.9, 2: 0.1})
    checkpoints.close()
    leave(tmp_path)
    resumed, position = opened(tmp_path), Position()
    assert (resumed.best_step, resumed.last_step) == (1, 2)
    assert equal(resumed.restore(state, 2, position), at_step(state, 2))
    assert position.at == 2
    save(resumed, state, {3: 1.0})
    assert (resumed.best_step, resumed.last_step) == (3, 3)
    assert equal(resumed.restore(state, 3), at_step(state, 3))
    resumed.close()
    assert not list(tmp_path.glob("*tmp*"))


def test_a_position_in_other_data_is_refused_in_one_line(tmp_path, state):
    checkpoints = opened(tmp_path)
    save(checkpoints, state, {1: 0.5})
    remedy = f"take the settings of that run, or delete {re.escape(str(tmp_path))} and run again$"
    with pytest.raises(SemidError, match=rf"1: cannot go on from here, .* \(data in checkpoint: these .*\); {remedy}"):
        checkpoints.restore(state, 1, Position(data="others"))
    checkpoints.close()


def test_a_checkpoint_that_a_kill_left_unsealed_is_none(tmp_path, state):
    checkpoints = opened(tmp_path)
    save(checkpoints, state, {1: 0.5, 2: 0.6})
    checkpoints.close()
    for step, left in ((2, 1), (1, None)):
        (tmp_path / str(step) / "seal.json").unlink()
        since = f"from step {left}" if left else "from the start"
        with pytest.warns(
            UserWarning, match=rf"^{tmp_path}/{step}: .*\(seal.json: no such file\); .* goes on {since}$"
        ):
            again = opened(tmp_path)
        assert again.last_step == left
        again.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, state):
    """Checkpoints of steps 1 (best), 2 and 3."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    checkpoints = opened(folder)
    (folder / "history.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    save(checkpoints, state, {1: 0.9, 2: 0.1, 3: 0.2})
    checkpoints.close()
    return folder


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1 << 3
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"first bits": lambda path: flip(path, 0), "bits": flip, "cut": cut, "deleted": lambda path: path.unlink()}


@pytest.mark.parametrize("harm", DAMAGES.values(), ids=DAMAGES)
def test_damage_to_any_file_of_a_checkpoint_is_named(whole, tmp_path, harm):
    step = shutil.copytree(whole, tmp_path / "run") / "3"
    files = [path for path in step.rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        harm(file)
        found = damage(step)
        assert found is not None
        assert found.startswith(f"{file.relative_to(step)}: ")
        file.write_bytes(content)
    assert damage(step) is None  # control


@pytest.mark.parametrize("harm", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(
    ("name", "scores", "said"),
    [
        ("1/params/_METADATA", None, "/1: damaged"),  # the best
        ("2/params/_METADATA", {1: 0.9, 3: 0.2}, None),  # neither the best nor the last
        ("3/params/_METADATA", {1: 0.9, 2: 0.1}, "/3: damaged or never finished .*; training goes on from step 2$"),
        ("1/seal.json", None, "/1: damaged"),
        ("3/seal.json", {1: 0.9, 2: 0.1}, "/3: damaged or never finished .*; training goes on from step 2$"),
        ("request.json", None, "/3: damaged"),
    ],
)
def test_what_is_left_of_a_damaged_run(whole, tmp_path, harm, name, scores, said):
    folder = shutil.copytree(whole, tmp_path / "run")
    harm(folder / name)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if scores is None:
            with pytest.raises(SemidError, match=f"^{folder}{said}"):
                restorable(folder)
        else:
            assert restorable(folder) == scores
    assert len(warned) == (scores is not None and said is not None)
    for warning in warned:
        assert re.match(f"{folder}{said}", str(warning.message))


def test_a_damaged_log_is_named(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    log = folder / "history.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "loss": 0.5}\n')  # control: what came after the last checkpoint
    assert restorable(folder) == {1: 0.9, 2: 0.1, 3: 0.2}
    for harm in (flip, cut):
        shutil.copy(whole / "history.jsonl", log)
        harm(log)
        with pytest.raises(SemidError, match=f"^{log}: changed before step 3; delete it to go on without its records"):
            restorable(folder)
    log.unlink()
    with pytest.warns(UserWarning, match=f"^{log}: gone; the records until step 3 are lost"):
        assert restorable(folder) == {1: 0.9, 2: 0.1, 3: 0.2}


def _swapped(folder):
    (folder / "3").rename(folder / "x")
    (folder / "2").rename(folder / "3")
    (folder / "x").rename(folder / "2")


def _of_another_run(folder):
    sealed = json.loads((folder / "3" / "seal.json").read_text())
    del sealed["sha256"]
    sealed["request"] = artifacts.sha256_json("another")
    artifacts.write_json(folder / "3" / "seal.json", {**sealed, "sha256": artifacts.sha256_json(sealed)})


def _with_another_file(folder):
    (folder / "3" / "params" / "more").write_text("")


@pytest.mark.parametrize("harm", [_swapped, _of_another_run, _with_another_file])
@pytest.mark.filterwarnings("ignore:.*/2. damaged")
def test_a_folder_that_is_not_as_it_was_is_not_read(whole, tmp_path, harm):
    folder = shutil.copytree(whole, tmp_path / "run")
    harm(folder)
    with pytest.warns(UserWarning, match=f"^{folder}/3: damaged"):
        assert 3 not in restorable(folder)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, tmp_path, state):
    folder = shutil.copytree(whole, tmp_path / "run")
    flip(folder / "3" / "params" / "_METADATA")
    with pytest.warns(UserWarning, match=f"^{folder}/3: .*_METADATA: changed.*; training goes on from step 2$"):
        again = opened(folder)
    position = Position()
    assert equal(again.restore(state, again.last_step, position), at_step(state, 2))
    assert (position.at, again.best_step) == (2, 1)
    flip(folder / "1" / "params" / "_METADATA")
    with pytest.raises(SemidError, match=rf"^{folder}/1: damaged \(params/_METADATA: changed\); delete {folder} and"):
        again.restore(state, 1)
    again.close()


@pytest.mark.parametrize("content", ["[1]", "null", "\xff", "{"])
def test_a_request_that_is_none(whole, tmp_path, content):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "request.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(SemidError, match=f"^{folder}/request.json: not "):
        opened(folder)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ValueError("RESOURCE\nNo space left on device: x")]
)
@pytest.mark.parametrize("where", ["orbax", "seal"])
def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, state, monkeypatch, where, error):
    checkpoints = opened(tmp_path)
    save(checkpoints, state, {1: 0.5})

    def full(step, *rest, **options):
        (tmp_path / "2").mkdir(exist_ok=True)
        (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((checkpoints._manager, "save") if where == "orbax" else (module, "seal")), full)
        with pytest.raises(
            SemidError,
            match=rf"^{tmp_path}/2: cannot be written \(No space left on device\); the last good checkpoint is 1; make",
        ):
            save(checkpoints, state, {2: 0.6})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "request.json"]
    again = opened(tmp_path)
    save(again, state, {2: 0.6})
    assert equal(again.restore(state, 2), at_step(state, 2))
    again.close()


def test_a_save_that_fails_waits_for_its_other_writes_and_says_one_thing(tmp_path, state, monkeypatch, caplog):
    checkpoints, written = opened(tmp_path), []

    async def write():
        await asyncio.sleep(0.01)
        written.append("the other array")

    class Commit(threading.Thread):
        def run(self):
            time.sleep(0.3)
            written.append("another part")

    Commit.__module__ = "orbax.checkpoint"

    async def fail():
        await asyncio.sleep(0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def save_all():
        forgotten = asyncio.create_task(fail())
        await asyncio.gather(fail(), write())
        await forgotten

    def full(*_, **__):  # as Orbax runs and closes its loops
        Commit().start()
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(save_all())
        finally:
            loop.close()

    with pytest.raises(OSError, match="No space left"):  # control
        full()
    gc.collect()
    assert "exception was never retrieved" in caplog.text
    time.sleep(0.5)
    written.clear()
    caplog.clear()
    monkeypatch.setattr(checkpoints._manager, "save", full)
    policy = asyncio.get_event_loop_policy()
    with pytest.raises(SemidError, match="No space left on device"):
        save(checkpoints, state, {1: 0.5})
    gc.collect()
    assert (written, caplog.text) == (["the other array", "another part"], "")
    assert asyncio.get_event_loop_policy() is policy
    checkpoints.close()


def test_checkpoints_are_discarded_and_nothing_else(tmp_path, state):
    checkpoints = opened(tmp_path / "run")
    save(checkpoints, state, {1: 0.5})
    checkpoints.close()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for name in ("run", "notes", "absent"):
        discard_checkpoints(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    assert (tmp_path / "notes" / "thesis.txt").exists()


def test_checkpoints_of_a_url_are_gone_on_from_on_another_machine(tmp_path, state, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there, folder = fsspec.filesystem("memory"), artifacts.resolved("memory://bucket/m.checkpoints")
    try:
        checkpoints = opened(folder)
        save(checkpoints, state, {1: 0.3, 2: 0.2, 3: 0.1, 4: 0.1})
        checkpoints.close()
        assert {name.split("/")[3] for name in there.find("/bucket")} == {"1", "3", "4", "request.json"}
        there.rm_file("/bucket/m.checkpoints/4/seal.json")  # never finished
        shutil.rmtree(tmp_path / "cache")
        with pytest.warns(UserWarning, match="4: damaged or never finished"):
            checkpoints = opened(folder)
        assert (checkpoints.best_step, checkpoints.last_step) == (1, 3)
        assert equal(checkpoints.restore(state, 3), at_step(state, 3))
        checkpoints.close()
        discard_checkpoints(folder)
        assert there.find("/bucket") == []
    finally:
        there.store.clear()


def test_a_run_goes_on_while_its_checkpoint_is_written(tmp_path, state, monkeypatch):
    """What it does meanwhile, with its arrays and its log, is not in the checkpoint; the next save waits."""
    checkpoints, log, go_on = opened(tmp_path), tmp_path / "history.jsonl", threading.Event()
    save_all = checkpoints._manager.save
    monkeypatch.setattr(
        checkpoints._manager, "save", lambda *given, **named: go_on.wait() and save_all(*given, **named)
    )
    log.write_text('{"step": 1}\n')
    taken = at_step(state, 1)
    checkpoints.save(taken, Position(1), {"score": 0.5})
    jax.tree.map(lambda x: x.delete(), taken)  # as the next step does, which overwrites them
    log.write_text('{"step": 1}\n{"step": 2}\n')
    assert (checkpoints.last_step, steps_on_disk(tmp_path)) == (1, [])
    threading.Timer(0.2, go_on.set).start()
    checkpoints.save(at_step(state, 2), Position(2), {"score": 0.6})
    assert (tmp_path / "1" / "seal.json").exists()
    checkpoints.close()
    log.write_text('{"step": 1}\n')  # as a run that goes on from there leaves it
    shutil.rmtree(tmp_path / "2")
    again = opened(tmp_path)
    assert equal(again.restore(state, again.last_step), at_step(state, 1))
    again.close()


def test_a_checkpoint_that_failed_is_told_at_the_next(tmp_path, state, monkeypatch):
    checkpoints = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "seal", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        )
        checkpoints.save(at_step(state, 1), Position(1), {"score": 0.5})
        with pytest.raises(
            SemidError, match=f"^{tmp_path}/1: cannot be written .No space left on device.; no checkpoint"
        ):
            checkpoints.save(at_step(state, 2), Position(2), {"score": 0.5})
    checkpoints.close()  # nothing more is said
    assert steps_on_disk(tmp_path) == []
