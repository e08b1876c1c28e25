"""`semid compile`: what it prints, and what it says where a program does not fit."""

import pytest

from semid.cli import compile as command
from semid.cli.app import main
from semid.training.topologies import CHIPS, Chip

TINY = "--items 64 --level-sizes 4 4 --users 8 --beam-size 4 --batch-size 8 --max-history 4 --row-length 8"
MODEL = "rq-transformer --dim 8 --layers 1 --heads 2 --hidden 8"


def run(capsys, words):
    main(["compile", *words.split()])
    return capsys.readouterr().out


def test_a_table_of_the_step_and_of_the_search(capsys, monkeypatch):
    monkeypatch.setattr(command, "chip_of", lambda topology: CHIPS["v5e"])
    printed = run(capsys, f"--topology cpu --fsdp 2 {TINY} {MODEL}")
    assert printed.startswith("cpu: 8 devices, {'data': 4, 'fsdp': 2, 'tensor': 1}; ")
    for program in ("training step, compiled in", "search, compiled in"):
        assert program in printed
    for row in ("state", "memory ", "matrix products", "all-reduce", "time, interconnect", "matrix peak at best"):
        assert f"\n  {row}" in printed


def test_the_joint_step_is_compiled_by_a_word(capsys):
    printed = run(capsys, f"--topology cpu --end-to-end --num-features 6 --item-dim 8 {TINY} {MODEL}")
    assert "\njoint step, compiled in" in printed
    assert "\nsearch, compiled in" in printed
    with pytest.raises(SystemExit):
        run(capsys, f"--topology cpu --end-to-end {TINY} {MODEL}")
    assert "reads content vectors (num_features above 0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "remedy"),
    [(1e2, "try --fsdp 8"), (1e4, "try --accumulate 2"), (1.0, "a larger --topology")],
)
def test_what_does_not_fit_is_one_line_with_an_option(memory, remedy, capsys, monkeypatch):
    monkeypatch.setattr(command, "chip_of", lambda topology: Chip("small", 1e12, memory, 1e9, 1e9))
    monkeypatch.setattr(command, "size_on_a_device", lambda state: 2e2)
    with pytest.raises(SystemExit) as stopped:
        run(capsys, f"--topology cpu {TINY} {MODEL}")
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("semid: the training step does not fit: it needs ")
    assert remedy in said
    assert said.count("\n") == 1
