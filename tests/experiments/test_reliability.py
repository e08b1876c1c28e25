"""A pulse of `experiments.reliability`: damages of one artifact, mutations of one file, and the table."""

import json
import os
import random
import signal
import warnings

import pyarrow as pa
import pytest

from experiments import reliability
from experiments.faults import damage, fuzz, inputs, kills
from experiments.faults import world as world_module
from experiments.faults.world import make_world
from semid.data import Dataset

ITEMS = pa.table({"item_id": ["a", "b", "c"], "title": ["x", "y", "z"]})
SEEN = pa.table({"user_id": ["u"] * 3, "item_id": ["a", "b", "c"], "timestamp": [1, 2, 3]})


@pytest.fixture
def world(tmp_path):
    Dataset.from_tables(ITEMS, SEEN, name="tiny").save(tmp_path / "world" / "dataset")
    return tmp_path / "world"


def test_damages_are_told_apart(world):
    trial = damage._Trials(world, "dataset")
    for how, outcome in (("flip", "named"), ("truncate", "named"), ("delete", "named"), ("add", "harmless")):
        assert {trial(how, random.Random(seed))["outcome"] for seed in range(8)} == {outcome}, how
    assert trial("edit", random.Random(0))["part"] == "manifest.json"
    trial._door = lambda folder: "as before"  # a reader that looks at nothing
    trial._clean = "as it was"
    assert trial("flip", random.Random(0))["outcome"] == "wrong"
    trial._home.cleanup()


def test_mutations_differ_and_come_again():
    made = [fuzz.mutated(b"item_id,title\na,x\n", random.Random(seed)) for seed in range(50)]
    assert made == [fuzz.mutated(b"item_id,title\na,x\n", random.Random(seed)) for seed in range(50)]
    assert len(set(made)) > 40


def test_half_of_the_mutations_of_json_are_json():
    made = [fuzz.mutated(b'{"a": [1, {"b": "c"}]}\n', random.Random(seed)) for seed in range(100)]
    assert made == [fuzz.mutated(b'{"a": [1, {"b": "c"}]}\n', random.Random(seed)) for seed in range(100)]
    assert sum(json.loads(value) != {"a": [1, {"b": "c"}]} for value in made if _is_json(value)) > 40


def _is_json(value):
    try:
        return bool(json.loads(value)) or True
    except ValueError:
        return False


def test_folders_are_compared_without_their_times(world):
    before = kills.tree(world, "")
    Dataset.from_tables(ITEMS, SEEN, name="tiny").save(world / "dataset")
    assert kills.tree(world, "") == before
    (world / ".dataset.lock").touch()
    assert kills.tree(world, "").keys() - before.keys() == {".dataset.lock"}


def test_moments_inside_a_write_are_counted_and_no_others(tmp_path, monkeypatch):
    out, log, died = tmp_path / "out", tmp_path / "moments", []
    monkeypatch.setattr(kills.os, "kill", lambda process, signal: died.append((process, signal)))
    out.mkdir()
    hook = kills.Moments(out, log, last=2)
    hook("open", (str(out / "a"), "w", os.O_WRONLY))  # nothing is being written yet
    (out / ".a.writing-vm-1").touch()
    hook("open", (str(out / "a"), "r", os.O_RDONLY))
    hook("open", (str(tmp_path / "b"), "w", os.O_WRONLY))
    hook("os.listdir", (str(out),))
    assert not log.exists()
    hook("open", (str(out / ".a.writing-vm-1"), None, os.O_RDWR))
    assert not died
    hook("os.rename", (out / ".a.writing-vm-1", out / "a", -1, -1))
    assert died == [(os.getpid(), signal.SIGKILL)]
    assert log.read_bytes() == b".."


def test_every_input_has_its_files():
    named = {word.removeprefix("{in}/") for line in inputs.INPUTS for word in line.split() if word.startswith("{in}/")}
    assert {name for name in named if "absent" not in name and "/" not in name} <= inputs.FILES.keys()


def test_what_a_command_writes_into_the_world_is_noticed(world, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    ended = inputs.Ended(1, "semid: no", 0.0, 0.0)
    monkeypatch.setattr(inputs, "run_command", lambda words, log, seconds: ended)
    assert inputs._run("train", world, home) == (ended, [])  # control

    def meddle(words, log, seconds):
        (world / "dataset" / "manifest.json").write_text("{}")
        (home / "out" / "m").mkdir()
        return ended

    monkeypatch.setattr(inputs, "run_command", meddle)
    assert inputs._run("train", world, home) == (ended, ["dataset/manifest.json", "out/m"])


def test_a_parser_that_hangs_is_noticed_whatever_errors_it_catches(monkeypatch):
    def read(path):
        try:
            signal.raise_signal(signal.SIGPROF)
        except Exception:
            return

    monkeypatch.setattr(fuzz, "parsers", lambda world: {"x": (b"content", ".txt", read)})
    before = signal.getsignal(signal.SIGPROF)
    with warnings.catch_warnings():
        trial = fuzz._Parser(None, "x", float("inf"))
        assert trial("x", random.Random(0))["outcome"] == "hang"
        trial._home.cleanup()
    signal.signal(signal.SIGPROF, before)


def test_the_later_versions_of_a_world_take_any_folder(tmp_path, monkeypatch):
    ran, home = [], tmp_path / "a folder"
    monkeypatch.setattr(world_module, "_run", lambda words, folder: ran.append(words))
    for name in ("_write_inputs", "make_checkpoints"):
        monkeypatch.setattr(world_module, name, lambda folder: None)
    monkeypatch.setattr(world_module, "lay_out", lambda command, world, out: out.mkdir(parents=True, exist_ok=True))
    make_world(home)
    assert ["catalog", "remove", "--catalog", f"{home}/grown", "--items", "new-1", "new-2"] in ran


def test_results_are_written_once_and_shown(tmp_path, monkeypatch, capsys):
    asked = []

    def measured(world, kind, *, counts, seed):
        asked.append(kind)
        if kind == "model" and asked.count(kind) == 1:
            raise KeyboardInterrupt
        return {"outcomes": {"flip": {"named": 3}}, "bad": [{"outcome": "wrong"}]}

    monkeypatch.setattr(reliability, "make_world", lambda folder: folder)
    monkeypatch.setattr(damage, "DOORS", {"dataset": None, "model": None})
    monkeypatch.setattr(damage, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        reliability.main(tmp_path, parts=("damage",), small=True)
    for _ in range(2):  # what was measured before it was stopped is not measured again, nor is the whole
        reliability.main(tmp_path, parts=("damage",), small=True)
        assert asked == ["dataset", "model", "model"]
    assert capsys.readouterr().out.count("| dataset | 3 named |\n  {'outcome': 'wrong'}\n") == 2
