"""What a run writes of itself."""

import json
import resource
import sys

import pytest

from semid.errors import SemidError
from semid.training import HISTORY, read_history
from semid.training.tracking import NullTracker, Tracker


def track(folder, records, **options):
    with Tracker(folder, title="a run", num_steps=10, **options) as tracker:
        for step, scalars in records:
            tracker.log(step, scalars)
            tracker.advance(step, "note")


def test_one_line_a_record(tmp_path):
    track(tmp_path / "new", [(1, {"loss": 2.5}), (2, {"loss": 2, "validation/ndcg@10": 0.25})])
    lines = (tmp_path / "new" / HISTORY).read_text().splitlines()
    assert lines == ['{"step": 1, "loss": 2.5}', '{"step": 2, "loss": 2.0, "validation/ndcg@10": 0.25}']
    assert read_history(tmp_path / "new" / HISTORY) == [json.loads(line) for line in lines]


def test_all_processes_but_the_first_are_quiet(tmp_path, capsys):
    with NullTracker(tmp_path / "new", title="a run", num_steps=10) as tracker:
        tracker.log(1, {"loss": 2.5})
        tracker.advance(1, "note")
    assert (list(tmp_path.iterdir()), capsys.readouterr().out) == ([], "")


def test_a_record_is_on_disk_at_once(tmp_path):
    with Tracker(tmp_path, title="a run", num_steps=10) as tracker:
        tracker.log(1, {"loss": 2.5})
        assert read_history(tmp_path / HISTORY) == [{"step": 1, "loss": 2.5}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null(tmp_path, value):
    track(tmp_path, [(1, {"loss": value, "other": 1.0})])
    assert (tmp_path / HISTORY).read_text() == '{"step": 1, "loss": null, "other": 1.0}\n'


def test_a_resumed_run_drops_the_records_after_its_first_step(tmp_path):
    track(tmp_path, [(step, {"loss": 0.0}) for step in (1, 2, 3, 4)])
    track(tmp_path, [(3, {"loss": 1.0})], first_step=2)
    found = [(record["step"], record["loss"]) for record in read_history(tmp_path / HISTORY)]
    assert found == [(1, 0.0), (2, 0.0), (3, 1.0)]
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY]


def test_a_new_run_starts_an_empty_record(tmp_path):
    track(tmp_path, [(1, {"loss": 0.0})])
    track(tmp_path, [])
    assert read_history(tmp_path / HISTORY) == []


@pytest.mark.parametrize("cut", ["", '{"step": 3', '{"step": 3, "loss": 1.0}'])
def test_a_last_line_without_its_end_is_left_out(tmp_path, cut):
    whole = '{"step": 1, "loss": 0.0}\n{"step": 2, "loss": 0.5}\n'
    (tmp_path / HISTORY).write_text(whole + cut)
    assert [record["step"] for record in read_history(tmp_path / HISTORY)] == [1, 2]
    track(tmp_path, [], first_step=9)
    assert (tmp_path / HISTORY).read_text() == whole


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1.0}', '{"step": "1"}', "\xff", "null"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    (tmp_path / HISTORY).write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'.encode("latin-1"))
    with pytest.raises(SemidError, match=f"^{tmp_path}/{HISTORY}: line 2: not a record of a training log; "):
        track(tmp_path, [], first_step=3)


def test_a_record_that_the_disk_has_no_room_for(tmp_path):
    """A limit of the process stands for the disk's: it too ends in a write of a part, then in one of nothing."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Tracker(tmp_path, title="a run", num_steps=10) as tracker:
        tracker.log(1, {"loss": 0.5})
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, old[1]))
        try:
            with pytest.raises(SemidError, match=f"^{tmp_path}/{HISTORY}: cannot be written .*; make space, and give"):
                tracker.log(2, {"loss": 0.25})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        tracker.log(3, {"loss": 0.125})
    assert (tmp_path / HISTORY).read_text() == '{"step": 1, "loss": 0.5}\n{"step": 3, "loss": 0.125}\n'


def test_tensorboard_has_the_same_scalars(tmp_path, monkeypatch):
    written, options = [], {}

    class Spy:
        def __init__(self, folder, **given):
            options.update(given, folder=folder)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    tensorboard = pytest.importorskip("tensorboardX")
    monkeypatch.setattr(tensorboard, "SummaryWriter", Spy)
    track(tmp_path, [(5, {"loss": 2.5, "rate": 1})], first_step=4, tensorboard=True)
    assert written == [("loss", 2.5, 5), ("rate", 1.0, 5), "closed"]
    assert options == {"folder": str(tmp_path / "tensorboard"), "purge_step": 5}  # what the dead run wrote is dropped


def test_tensorboard_writes_event_files_only_when_asked(tmp_path):
    pytest.importorskip("tensorboardX")
    track(tmp_path, [(1, {"loss": 2.5})])
    assert not (tmp_path / "tensorboard").exists()
    track(tmp_path, [(1, {"loss": 2.5})], tensorboard=True)
    events = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert [b"loss" in path.read_bytes() for path in events] == [True]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SemidError, match=r"needs the extra: pip install 'semid\[tensorboard\]'"):
        track(tmp_path, [], tensorboard=True)
    track(tmp_path, [])
