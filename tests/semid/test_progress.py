"""Progress without a terminal, on one, and in a notebook."""

import logging
import subprocess
import sys
import time
import types

import pytest

from semid import progress as module
from semid.progress import show_progress


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def work(clock, *, pieces, seconds):
    with show_progress("training", total=pieces, unit="steps") as progress:
        progress.say("compiling ...")
        for piece in range(1, pieces + 1):
            clock[0] += seconds
            progress.advance(piece, f"loss {1 / piece:.2f}")


def test_a_log_has_a_line_at_once_then_fewer_and_the_last(clock, caplog):
    caplog.set_level(logging.INFO, "semid")
    work(clock, pieces=100, seconds=1)
    assert caplog.messages[:3] == [
        "training: compiling ...",
        "training: 1/100 steps, loss 1.00",
        "training: 4/100 steps, loss 0.25, 1.0 steps/s, 0:01:36 left",
    ]
    assert caplog.messages[-1] == "training: 100/100 steps, loss 0.01, 1.0 steps/s"
    steps = [int(line.split()[1].split("/")[0]) for line in caplog.messages[1:]]
    assert steps == [1, 4, 14, 34, 64, 94, 100]
    assert {record.name for record in caplog.records} == {"semid"}


def test_the_last_line_is_not_said_twice(clock, caplog):
    caplog.set_level(logging.INFO, "semid")
    work(clock, pieces=2, seconds=60)
    assert [line.split(",")[0] for line in caplog.messages[1:]] == ["training: 1/2 steps", "training: 2/2 steps"]


def test_work_that_ends_early_has_no_time_left(clock, caplog):
    caplog.set_level(logging.INFO, "semid")
    with show_progress("training", total=9, unit="steps") as progress:
        for piece in (1, 2):
            clock[0] += 1
            progress.advance(piece)
    assert caplog.messages == ["training: 1/9 steps", "training: 2/9 steps, 1.0 steps/s"]


def test_where_logging_is_not_configured_nothing_is_said():
    script = "from semid.progress import show_progress\nwith show_progress('t', total=1, unit='u') as p: p.advance(1)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_notebook_has_one_line_that_changes(clock, capsys, monkeypatch):
    shell = types.SimpleNamespace(kernel=True)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    work(clock, pieces=3, seconds=1)
    out = capsys.readouterr().out
    assert [line.split(",")[0].strip() for line in out.split("\r")[1:]] == [
        "training: compiling ...",
        *(f"training: {done}/3 steps" for done in (1, 2, 3, 3)),
    ]
    assert out.endswith("\n")
    assert out.count("\n") == 1


@pytest.mark.parametrize(("level", "shown"), [(logging.NOTSET, True), (logging.WARNING, False)])
def test_a_terminal_has_a_bar_unless_all_should_be_quiet(capsys, monkeypatch, level, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(module.LOG, "level", level)
    work([time.monotonic()], pieces=3, seconds=0)
    said = capsys.readouterr()
    assert ("3/3" in said.err) == shown
    assert said.out == ""
