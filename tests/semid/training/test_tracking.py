"""What a run writes of itself."""

import json
import resource
import sys

import pytest

from semid.errors import SemidError
from semid.training import HISTORY, read_history
from semid.training.sinks import chosen_trackers, tracked_by
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
    track(tmp_path, [(5, {"loss": 2.5, "rate": 1})], first_step=4, trackers=("tensorboard",))
    assert written == [("loss", 2.5, 5), ("rate", 1.0, 5), "closed"]
    assert options == {"folder": str(tmp_path / "tensorboard"), "purge_step": 5}  # what the dead run wrote is dropped


def test_tensorboard_writes_event_files_only_when_asked(tmp_path):
    pytest.importorskip("tensorboardX")
    track(tmp_path, [(1, {"loss": 2.5})])
    assert not (tmp_path / "tensorboard").exists()
    track(tmp_path, [(1, {"loss": 2.5})], trackers=("tensorboard",))
    events = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert [b"loss" in path.read_bytes() for path in events] == [True]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SemidError, match=r"needs the extra: pip install 'semid\[tensorboard\]'"):
        track(tmp_path, [], trackers=("tensorboard",))
    track(tmp_path, [])


class _Library:
    """Stand-in for wandb and mlflow that notes the calls."""

    def __init__(self):
        self.calls = []
        self.api = self.tracking = self.info = self
        self.api_key, self.run_id = "key", "r1"

    def __getattr__(self, name):
        def call(*args, **options):
            self.calls.append((name, args, options))
            return None if name == "get_experiment_by_name" else self

        return call


@pytest.fixture
def library(monkeypatch):
    """It, in place of both."""
    made = _Library()
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, made)
    return made


def test_weights_and_biases_gets_scalars_config_and_end(tmp_path, library, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    with tracked_by("wandb"):
        track(tmp_path, [(1, {"loss": 2.5})], config={"seed": 3}, trackers=chosen_trackers())
    assert chosen_trackers() == ()
    (begin, _, options), log, end = library.calls
    assert (begin, options["project"], options["name"], options["config"]) == ("init", "semid", "a run", {"seed": 3})
    assert (log, end) == (("log", ({"loss": 2.5},), {"step": 1}), ("finish", (), {"exit_code": 0}))
    track(tmp_path, [], trackers=("wandb",))
    assert library.calls[3][2]["id"] != options["id"]  # one from the start is another
    with Tracker(tmp_path, title="a run", num_steps=9, first_step=4, trackers=("wandb",)):
        assert library.calls[-1][2]["id"] == library.calls[3][2]["id"]  # a resumed run is the same run
    assert len(read_history(tmp_path / HISTORY)) == 0


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_later_is_left_out_and_the_training_goes_on(tmp_path, library, monkeypatch, caplog, fails):
    monkeypatch.setattr(library, fails, lambda *_, **__: 1 / 0, raising=False)
    records = [(1, {"loss": 2.5}), (2, {"loss": 2.0})]
    with caplog.at_level("WARNING", "semid"):
        track(tmp_path, records, trackers=("wandb", "mlflow"))
    assert len(read_history(tmp_path / HISTORY)) == 2
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("WeightsAndBiases: division by zero; what follows is in ")
    assert library.calls[-1][0] == "set_terminated"


def test_mlflow_gets_scalars_config_and_end(tmp_path, library):
    records = [(1, {"validation/ndcg@10": 0.25})]
    track(tmp_path, records, config={"config": {"dim": 8}, "seed": 3}, trackers=("mlflow",))
    calls = [(name, args) for name, args, _ in library.calls]
    assert [args[1:] for name, args in calls if name == "log_param"] == [("config.dim", "8"), ("seed", "3")]
    assert [args[1:] for name, args in calls if name == "log_metric"] == [("validation/ndcg_at_10", 0.25)]
    assert library.calls[-1][::2] == ("set_terminated", {"status": "FINISHED"})


def test_a_failed_run_ends_as_one(tmp_path, library):
    with pytest.raises(SemidError), Tracker(tmp_path, title="a run", num_steps=1, trackers=("wandb", "mlflow")):
        raise SemidError("loss is not finite")
    ends = [options for name, _, options in library.calls if name in ("finish", "set_terminated")]
    assert ends == [{"exit_code": 1}, {"status": "FAILED"}]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_cannot_work_is_refused_before_any(monkeypatch, library, tmp_path, name):
    with tracked_by(name):
        pass  # control
    monkeypatch.setattr(library, "init", lambda **_: 1 / 0, raising=False)
    monkeypatch.setattr(library, "create_run", lambda *_, **__: 1 / 0, raising=False)
    with pytest.raises(SemidError, match=rf"{name} cannot begin a run \(division by zero\); mend that"):
        track(tmp_path, [], trackers=(name,))
    monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(SemidError, match=rf"{name} output needs the extra: pip install 'semid\[{name}\]'"),
        tracked_by(name),
    ):
        pass


def test_weights_and_biases_without_a_login_is_for_offline_runs(monkeypatch, library):
    monkeypatch.setattr(library, "api_key", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with (
        pytest.raises(SemidError, match="wandb has no login; give `wandb login`, or set WANDB_MODE=offline"),
        tracked_by("wandb"),
    ):
        pass
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracked_by("wandb"):
        assert chosen_trackers(tensorboard=True) == ("wandb", "tensorboard")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what its store is built on
def test_mlflow_itself_keeps_a_run_in_a_store_on_this_machine(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    records = [(1, {"validation/ndcg@10": 0.25}), (2, {"loss": float("nan")})]
    track(tmp_path / "run", records, config={"config": {"dim": 8}}, trackers=("mlflow",))
    client = mlflow.tracking.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("semid").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    assert (run.data.params, run.data.metrics["validation/ndcg_at_10"]) == ({"config.dim": "8"}, 0.25)


def test_weights_and_biases_itself_keeps_a_run_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    track(tmp_path / "run", [(1, {"loss": 2.5})], config={"dim": 8}, trackers=("wandb",))
    wandb.teardown()  # its service writes what it still holds
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"loss" in log.read_bytes()
