"""The loop and the run around it, with a model whose path is known and a validation that is scripted."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from semid.errors import SemidError
from semid.training import (
    OptimizerConfig,
    RunFolder,
    StopTraining,
    Task,
    TrainingConfig,
    TrainState,
    fit,
    make_mesh,
    read_history,
    train,
)
from semid.training.processes import stop_requested


def count(step):
    """A state of nothing but its step, all that `fit` reads of one."""
    return TrainState(step=jnp.asarray(step), params=nnx.State({}), rest=nnx.State({}), opt_state=())


def count_up(state, batch):
    return count(state.step + 1), {"batch": batch}


def test_fit_takes_the_steps_that_are_left_and_calls_hooks_in_order():
    calls = []

    def hook(name, add):
        def call(at, state, metrics):
            calls.append((name, at, state.step, metrics["batch"]))
            return count(state.step + add)

        return call

    end = fit(count(3), count_up, iter("abcdef"), num_steps=5, hooks=[hook("first", 100), hook("second", -100)])
    assert end.step == 5
    assert calls == [("first", 4, 4, "a"), ("second", 4, 104, "a"), ("first", 5, 5, "b"), ("second", 5, 105, "b")]


def test_fit_takes_no_batch_that_it_does_not_need():
    stream = iter("abc")
    assert fit(count(5), count_up, stream, num_steps=5).step == 5
    fit(count(3), count_up, stream, num_steps=5)
    assert list(stream) == ["c"]


def test_a_hook_stops_the_loop_with_the_state_it_was_given():
    seen = []

    def care(at, state, metrics):
        return count(state.step * 10)

    def stop(at, state, metrics):
        seen.append(at)
        raise StopTraining

    def after(at, state, metrics):
        pytest.fail("a hook after the one that stopped")

    assert fit(count(0), count_up, iter("abc"), num_steps=3, hooks=[care, stop, after]).step == 10
    assert seen == [1]


def test_other_errors_of_a_hook_pass():
    def broken(at, state, metrics):
        raise KeyError(at)

    with pytest.raises(KeyError, match="1"):
        fit(count(0), count_up, iter("abc"), num_steps=3, hooks=[broken])


class Rows(NamedTuple):
    rows: np.ndarray


class Walker(nnx.Module):
    """A number that every step moves down by the learning rate (Adam under a constant gradient)."""

    def __init__(self):
        self.at = nnx.Param(jnp.zeros((1,)))


RATE = 1e-3


def walk(model, batch, tables, key):
    return jnp.sum(model.at[...]) + tables * jnp.mean(batch.rows.astype(jnp.float32)), {}


class Script:
    """A validation that reads its scores off a list, and notes where the model stood."""

    def __init__(self, *scores):
        self.scores, self.seen = list(scores), []

    def __call__(self, model):
        self.seen.append(float(model.at[...][0]))
        return {"score": self.scores[len(self.seen) - 1], "other": 0.0}


def run(folder, validate, *, loss=walk, steps=12, every=2, patience=100, request=None, hooks=(), own=None, **changes):
    """Two steps an epoch, no warm-up, (nearly) constant rate."""
    optimizer = OptimizerConfig(learning_rate=RATE, warmup=0.0, final=1.0, weight_decay=0.0)
    config = TrainingConfig(
        epochs=steps / 2, batch_size=8, optimizer=optimizer, validate_every=every / 2, patience=patience, log_every=3
    )
    task = Task(
        Walker(),
        loss,
        Rows(np.arange(16)),
        tables=jnp.zeros(()),
        validate=validate,
        select="score",
        hooks=lambda steps_per_epoch: hooks,
        optimizer=own,
    )
    return train(
        task,
        dataclasses.replace(config, **changes),
        run=RunFolder(folder, request or {"seed": 0}, title="a walk"),
        seed=0,
        mesh=make_mesh(jax.devices()[:1]),
    )


def position(model) -> int:
    """How many steps the model has walked."""
    return round(-float(model.at[...][0]) / RATE)


def test_the_best_is_returned_not_the_last(tmp_path):
    script = Script(0.1, 0.2, 0.9, 0.3, 0.4, 0.5)
    best = run(tmp_path, script)
    assert [round(-at / RATE) for at in script.seen] == [2, 4, 6, 8, 10, 12]
    assert position(best) == 6
    assert float(best.at[...][0]) == script.seen[2]
    records = read_history(tmp_path / "history.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [3, 6, 9, 12]
    assert [r["validation/score"] for r in records if "validation/score" in r] == script.scores
    assert all({"gradient_norm", "loss"} <= set(r) for r in records if "loss" in r)


def test_an_optimizer_of_ones_own_is_given_the_number_of_steps(tmp_path):
    walked = run(tmp_path, Script(0.1, 0.2), steps=4, own=lambda num_steps: optax.sgd(num_steps * RATE))
    assert position(walked) == 4 * 4


def test_a_rate_of_a_part_that_the_model_has_not_is_refused(tmp_path):
    for start in ("a", "", "at"):
        held = OptimizerConfig(learning_rate=RATE, rates=((start, 0.0),))
        assert position(run(tmp_path / f"held {start}", Script(0.1), steps=2, optimizer=held)) == 0
    with pytest.raises(SemidError, match=r"rates: no part of the model begins with .att.; did you mean .at.\?"):
        run(tmp_path / "bad", Script(), optimizer=OptimizerConfig(rates=(("att", 0.0),)))
    assert not (tmp_path / "bad").exists()


def test_the_last_step_is_validated_whatever_the_rhythm(tmp_path):
    script = Script(0.1, 0.2, 0.3)
    assert position(run(tmp_path, script, steps=11, every=5)) == 11
    assert [round(-at / RATE) for at in script.seen] == [5, 10, 11]


@pytest.mark.parametrize(
    ("scores", "patience", "looks", "best"),
    [
        ([0.5, 0.4, 0.3, 0.6], 2, 3, 2),  # would have come back
        ([0.5, 0.4, 0.6, 0.5, 0.4, 0.9], 2, 5, 6),
        ([0.5, 0.5, 0.5, 0.9], 2, 3, 2),  # a plateau is no progress
        ([0.5, 0.4, 0.9], 1, 2, 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 1, 6, 12),
    ],
)
def test_it_stops_when_patience_ends(tmp_path, scores, patience, looks, best, caplog):
    caplog.set_level("INFO", "semid")
    script = Script(*scores)
    assert position(run(tmp_path, script, patience=patience)) == best
    assert len(script.seen) == looks
    assert (f"stopped at step {2 * looks}, best at step {best}" in caplog.text) == (best < 12)
    again = Script()
    assert position(run(tmp_path, again, patience=patience)) == best, "a run that has ended is not taken up"
    assert again.seen == []


def test_care_changes_the_state_before_it_is_validated(tmp_path):
    def jump(at, state, metrics):
        return dataclasses.replace(state, params=jax.tree.map(lambda p: p + 1, state.params)) if at == 2 else state

    script = Script(0.1, 0.2)
    run(tmp_path, script, steps=4, hooks=[jump])
    np.testing.assert_allclose(script.seen, [1 - 2 * RATE, 1 - 4 * RATE], rtol=1e-5)


class Broken(Exception):
    pass


def test_a_run_that_broke_goes_on_from_its_last_checkpoint(tmp_path):
    def break_at_7(at, state, metrics):
        if at == 7:
            raise Broken
        return state

    with pytest.raises(Broken):
        run(tmp_path / "a", Script(0.1, 0.2, 0.9), hooks=[break_at_7])
    rest = Script(0.3, 0.4, 0.5)
    resumed = run(tmp_path / "a", rest)
    assert [round(-at / RATE) for at in rest.seen] == [8, 10, 12]
    assert position(resumed) == 6, "the best of before the break"
    run(tmp_path / "b", Script(0.1, 0.2, 0.9, 0.3, 0.4, 0.5))
    assert read_history(tmp_path / "a" / "history.jsonl") == read_history(tmp_path / "b" / "history.jsonl")


def test_the_time_of_a_run_is_said_and_shown_and_not_recorded(tmp_path, caplog):
    caplog.set_level("INFO", "semid")
    run(tmp_path / "a", Script(0.1, 0.2, 0.9, 0.3, 0.4, 0.5))
    assert re.fullmatch(
        r".*: 0:00:\d\d: [\d.]+% steps, [\d.]+% input, [\d.]+% compiling, [\d.]+% validation, [\d.]+% checkpoints",
        next(line for line in reversed(caplog.messages) if "% steps" in line),
    )
    assert "wall_time" not in (tmp_path / "a" / "history.jsonl").read_text()


@pytest.mark.parametrize("stopped_at", [3, 8, 12])
def test_sigterm_ends_with_a_checkpoint_to_go_on_from(tmp_path, stopped_at, caplog):
    def tell(at, state, metrics):
        if at == stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return state

    scores = [0.1, 0.2, 0.9, 0.3, 0.4, 0.5]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", Script(*scores), hooks=[tell])
    assert (stop.value.code, signal.getsignal(signal.SIGTERM)) == (143, handler)
    assert caplog.messages[-1] == f"stopped at step {stopped_at} of 12; the same command goes on from there"
    rest = Script(*scores[stopped_at // 2 :])
    assert position(run(tmp_path / "a", rest)) == 6
    assert [round(-at / RATE) for at in rest.seen] == [step for step in (2, 4, 6, 8, 10, 12) if step > stopped_at]
    run(tmp_path / "b", Script(*scores))  # control
    assert (tmp_path / "a" / "history.jsonl").read_bytes() == (tmp_path / "b" / "history.jsonl").read_bytes()


def test_a_signal_after_the_last_step_goes_to_whom_it_went_before():
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with stop_requested(every=1) as stop:
            assert not stop(1)
            os.kill(os.getpid(), signal.SIGTERM)
        assert told == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_handles_no_signals():
    def work():
        with stop_requested(every=1) as stop:
            return stop(1)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() is False


@pytest.mark.parametrize(
    ("bad_step", "checkpoint"), [(1, None), (5, 4), (8, 6)], ids=["at once", "between looks", "at a look"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(tmp_path, bad_step, checkpoint, value):
    def loss(model, batch, tables, key):
        step = jnp.round(-model.at[...][0] / RATE) + 1
        return jnp.where(step == bad_step, value, 1.0) * jnp.sum(model.at[...] - 1), {}

    good = "no checkpoint was written; "
    if checkpoint:
        good = f"the last good checkpoint is {tmp_path}/{checkpoint}; delete {tmp_path} or choose another path .*"
    expected = f"^loss is not finite at step {bad_step}; {good}lower the learning rate and run again$"
    with pytest.raises(SemidError, match=expected):
        run(tmp_path, Script(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), loss=loss)
    kept = {int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()}
    assert kept == ({checkpoint - 2, checkpoint} if checkpoint else set())
    changed = {"request": {"rate": "lower"}}  # as the message says: refused until the folder is deleted, if need be
    if checkpoint:
        with pytest.raises(SemidError, match="checkpoints of another run"):
            run(tmp_path, Script(), **changed)
        shutil.rmtree(tmp_path)
    assert position(run(tmp_path, Script(0.1), steps=2, **changed)) == 2


def test_a_score_that_is_not_finite_is_no_checkpoint(tmp_path):
    with pytest.raises(SemidError, match=f"^score is not finite at step 4; the last good checkpoint is {tmp_path}/2"):
        run(tmp_path, Script(0.1, float("nan")))
    assert position(run(tmp_path, Script(0.2, 0.1, 0.1, 0.1, 0.1))) == 4


def test_checkpoints_of_another_config_are_refused(tmp_path):
    run(tmp_path, Script(0.1), steps=2, request={"config": {"epochs": 1}})
    with pytest.raises(SemidError, match=r"checkpoints of another run \(config.epochs: 1 -> 2\)"):
        run(tmp_path, Script(), steps=2, request={"config": {"epochs": 2}})


def test_the_callers_model_is_not_touched(tmp_path):
    kept = Walker()
    before = kept.at[...]
    optimizer = OptimizerConfig(learning_rate=RATE, warmup=0.0)
    task = Task(
        kept,
        walk,
        Rows(np.arange(16)),
        tables=jnp.zeros(()),
        validate=lambda model: {"score": 1.0},
        select="score",
    )
    config = TrainingConfig(epochs=1, batch_size=8, optimizer=optimizer)
    trained = train(task, config, run=RunFolder(tmp_path / "run", {}, title="a walk"), seed=0)  # on all devices
    assert kept.at[...] is before
    assert float(kept.at[...][0]) == 0 != float(trained.at[...][0])


@pytest.mark.parametrize("name", ["epochs", "batch_size", "accumulate", "validate_every", "patience", "log_every"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_config_that_cannot_train(name, value):
    with pytest.raises(SemidError, match=f"^expected {name} (above 0|of at least 1), got {value}$"):
        TrainingConfig(**{name: value})
    TrainingConfig(**{name: 1})


def test_heavy_libraries_are_imported_where_they_are_used():
    heavy = {"orbax", "grain", "tensorboardX", "rich.progress"}
    script = f"import sys, semid.training; print({heavy!r} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"
