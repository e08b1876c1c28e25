"""Wall time by what it was spent on, and traces of steps; tests/semid/training/test_loop.py has the loop."""

import jax.numpy as jnp
import pytest

from semid.errors import SemidError
from semid.training import profiled
from semid.training.profiling import WallTime, traced_steps


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at

    def wait(self, seconds):
        self.at += seconds
        return seconds

    def fail_after(self, seconds):
        self.wait(seconds)
        raise SemidError("not finite")


def test_what_nothing_else_takes_is_of_the_steps():
    clock = Clock()
    spent = WallTime(clock)
    step = spent.first_timed("compiling", clock.wait)
    batches = spent.timed("input", map(clock.wait, [1.0, 0.5]))
    assert [(batch, step(3.0)) for batch in batches] == [(1.0, 3.0), (0.5, 3.0)]
    with pytest.raises(SemidError), spent.spent_on("validation"):
        clock.fail_after(0.5)
    assert spent.shares == pytest.approx({"steps": 3 / 8, "compiling": 3 / 8, "input": 1.5 / 8, "validation": 0.5 / 8})
    assert str(spent) == "0:00:08: 37.5% steps, 18.8% input, 37.5% compiling, 6.2% validation"


def run(title, *, first, steps):
    with traced_steps(title, first=first) as trace:
        for at in range(first + 1, steps + 1):
            assert trace(at, "state", {"loss": jnp.float32(at)}) == "state"


def test_steps_are_traced_where_that_is_asked_for(tmp_path):
    with profiled(tmp_path / "traces", steps=2):
        run("a model", first=3, steps=9)
        run("ends early", first=0, steps=3)
        run("too short to trace", first=0, steps=1)
    run("nobody asks", first=0, steps=9)
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == ["a model", "ends early"]
    assert all(list(path.rglob("*.xplane.pb")) for path in (tmp_path / "traces").iterdir())


def test_what_cannot_be_traced_is_said_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    for folder, steps, message in (
        (tmp_path, 0, "expected at least 1 step to trace, got 0"),
        ("memory://traces", 2, "memory://traces: traces are written while training goes on, and needs a folder"),
        (tmp_path / "file", 2, "file"),
    ):
        with pytest.raises(SemidError, match=message), profiled(folder, steps=steps):
            pass
