"""The command `semid sweep`: its space, failed and interrupted trials, resumption."""

import json
import signal
from dataclasses import asdict

import optuna
import pytest
import sqlalchemy

from semid import artifacts
from semid.catalog import SemanticCatalog
from semid.cli import app, main, sweep
from semid.cli.outcome import Stopped
from semid.cli.space import Searched, Space
from semid.cli.train import Train
from semid.data.simulated import SimulatedConfig, simulate
from semid.errors import SemidError
from semid.stage import store_dataset
from semid.tokenizers import RQKmeansConfig, TokenizerConfig, tokenize

SPACE = """train:
  dataset: d
  catalog: c
  model: {dim: {choices: [16, 32]}, layers: {low: 1, high: 4}}
  learning-rate: {low: 1e-4, high: 1e-1, log: true}
"""


@pytest.fixture
def space(tmp_path):
    """A file with this text."""

    def write(text=SPACE):
        (tmp_path / "space.yaml").write_text(text)
        return str(tmp_path / "space.yaml")

    return write


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder of a sweep whose trainings record how close their learning rate is to .01."""

    def train(self):
        values = [-abs(self.config.training.optimizer.learning_rate - 0.01), -1.0]
        (tmp_path / "out").mkdir(exist_ok=True)
        file = artifacts.resolved(self.out) / "history.jsonl"
        file.parent.mkdir(parents=True)
        records = [{"step": step, sweep.METRIC: value} for step, value in enumerate(values)]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))

    monkeypatch.setattr(Train, "run", train)
    return tmp_path / "out"


def _sweep(file, folder, trials, *more):
    main(["sweep", "--space", file, "--out", str(folder), "--trials", str(trials), *more])


def _values(folder, file):
    study = sweep._study(folder, Space.read(file))
    return [(trial.state.name, trial.value) for trial in study.trials]


def test_a_space_is_of_ranges_and_choices(space):
    read = Space.read(space())
    assert read.searched == {
        "train.model.dim": Searched(choices=("16", "32")),
        "train.model.layers": Searched(1, 4),
        "train.learning-rate": Searched(1e-4, 1e-1, log=True),
    }
    values = {"train.model.dim": "32", "train.model.layers": 3, "train.learning-rate": 1e-5}
    train = read.commands(values, "t")["train"]
    assert (train.dataset, train.catalog, train.out) == ("d", "c", "t/model")
    assert (train.config.model.backbone.dim, train.config.model.backbone.layers) == (32, 3)
    assert train.config.training.optimizer.learning_rate == 1e-5


def test_a_searched_tokenizer_makes_the_catalogue_of_each_trial(space):
    text = "tokenize:\n  dataset: d\n  method: {type: rq-kmeans, level-sizes: {choices: [[8, 8], [4, 4, 4]]}}\n"
    commands = Space.read(space(text + SPACE)).commands({"tokenize.method.level-sizes": "[4, 4, 4]"}, "t")
    assert list(commands) == ["tokenize", "train"]
    assert commands["tokenize"].config.method == RQKmeansConfig(level_sizes=(4, 4, 4))
    assert (commands["tokenize"].out, commands["train"].catalog) == ("t/catalog", "t/catalog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {}", "line 1: trian: expected tokenize or train; did you mean 'train'?"),
        ("train: 3", "line 1: train: expected the options of `semid train`"),
        ("{}", "expected the options of `semid train` below `train:`, got none"),
        ("train: {dataset: d, catalog: c}", "train: no field is searched"),
        (SPACE + "tokenize: {dataset: d}", "tokenize: no field is searched: .*; tokenize once"),
        ("train: {dataset: d, epochs: {low: 1, high: 2}}", "train: catalog is missing; give it"),
        (SPACE + "  epochs: {low: 3, high: 1}", "line 6: train.epochs: expected low below high, got 3, 1"),
        (
            SPACE + "  epochs: {low: 0, high: 1, log: true}",
            "line 6: train.epochs: .* above 0 for log, got 0, 1",
        ),
        (
            SPACE + "  epochs: {low: 1, high: 2, log: yes}",
            "line 6: train.epochs: log: expected true or false, got 'yes'",
        ),
        (SPACE + "  epochs: {low: a, high: 1}", "line 6: train.epochs: expected a finite number, got 'a'"),
        (SPACE + "  epochs: {low: 1, high: inf}", "line 6: train.epochs: expected a finite number, got 'inf'"),
        (SPACE + "  epochs: {low: 1, low: 2, high: 3}", "line 6: train.epochs: low: given twice; keep one"),
        (SPACE + SPACE, "line 6: train: given twice; keep one"),
        (SPACE + "  out: {choices: [a, b]}", "train.out: each trial has its own; leave it out"),
        (
            SPACE.replace("c\n", "{choices: [c, e]}\n")
            + "tokenize: {dataset: d, method: {type: rq-kmeans, iterations: {low: 1, high: 2}}}",
            "train.catalog: each trial has its own; leave it out",
        ),
        (
            SPACE + "  epochs: {low: 1, high: 2, steps: 3}",
            "line 6: train.epochs: steps: expected low, high and log",
        ),
        (SPACE + "  epochs: {choices: 3}", "line 6: train.epochs: expected a list of choices"),
        (SPACE + "  epoch: {low: 1, high: 2}", "line 6: epoch: unknown key; did you mean 'epochs'?"),
        (SPACE + "  row-length: {low: 0.5, high: 2}", "line 6: row_length: expected a value of type int, got '0.5'"),
        (SPACE + "  batch-size: {choices: [1, 0, 2]}", "line 6: batch_size: expected batch_size of at least 1, got 0"),
        (SPACE + "  batch-size: {low: 0, high: 2}", "line 6: batch_size: expected batch_size of at least 1, got 0"),
    ],
)
def test_what_is_no_space_is_said_before_any_trial(space, text, message):
    with pytest.raises(SemidError, match=rf"space\.yaml: {message.replace('?', '[?]')}"):
        Space.read(space(text))


def test_a_sweep_goes_on_to_the_number_of_trials(space, folder, capsys):
    _sweep(file := space(), folder, 3)
    first = _values(folder, file)
    assert [state for state, _ in first] == ["COMPLETE"] * 3
    _sweep(file, folder, 6)
    values = _values(folder, file)
    assert (values[:3], len(values)) == (first, 6)
    assert len(set(values)) == 6
    printed = capsys.readouterr().out
    assert f"{max(value for _, value in values):.4f}" in printed
    assert "plotly" in (folder / "sweep.html").read_text()
    best = app.parse(["train", "--config", str(folder / "config.yaml")])
    rate = best.config.training.optimizer.learning_rate
    assert -abs(rate - 0.01) == max(value for _, value in values)
    assert best.out == f"{folder}/best"


def test_another_space_is_refused_naming_what_changed(space, folder, capsys):
    _sweep(space(), folder, 1)
    with pytest.raises(SystemExit):
        _sweep(space(SPACE.replace("high: 4", "high: 5")), folder, 2)
    assert "a sweep of another space (train.model.layers.high: '4' -> '5')" in capsys.readouterr().err


def test_a_failed_trial_is_recorded_and_the_next_one_runs(space, folder, monkeypatch, capsys):
    train, failures = Train.run, iter([SemidError("loss is not finite at step 3"), MemoryError()])

    def fail_twice(self):
        if error := next(failures, None):
            raise error
        train(self)

    monkeypatch.setattr(Train, "run", fail_twice)
    _sweep(file := space(), folder, 3)
    assert [state for state, _ in _values(folder, file)] == ["FAIL", "FAIL", "COMPLETE"]
    printed = capsys.readouterr().out
    assert "trial 0 failed: loss is not finite at step 3\n" in printed
    assert "trial 1 failed: MemoryError\n" in printed


def test_a_value_that_cannot_be_drawn_fails_its_trial(space, folder, monkeypatch, capsys):
    monkeypatch.setattr(Searched, "suggest", lambda self, trial, name: [][0])
    with pytest.raises(SystemExit):
        _sweep(file := space(), folder, 9)
    assert "all 3 trials failed" in capsys.readouterr().err
    assert [state for state, _ in _values(folder, file)] == ["FAIL"] * 3


def test_tables_that_another_sweep_makes_at_the_same_time(space, folder, monkeypatch):
    made, make = [], optuna.storages.RDBStorage.__init__

    def racing(self, *arguments, **options):
        made.append(arguments)
        if len(made) < 3:
            raise sqlalchemy.exc.OperationalError("CREATE TABLE studies", {}, Exception("table studies already exists"))
        make(self, *arguments, **options)

    monkeypatch.setattr(optuna.storages.RDBStorage, "__init__", racing)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    assert _values(folder, space()) == []
    assert len(made) == 3


def test_a_fault_of_all_trials_ends_the_sweep(space, folder, monkeypatch, capsys):
    def fail(self):
        raise SemidError("d: no such dataset")

    monkeypatch.setattr(Train, "run", fail)
    with pytest.raises(SystemExit):
        _sweep(space(), folder, 9)
    assert capsys.readouterr().err == "semid: all 3 trials failed, the last by: d: no such dataset\n"


def _answered():
    """An error of a library that Ctrl-C has interrupted."""
    error = RuntimeError("callback failed")
    error.__cause__ = Stopped(signal.SIGINT)
    return error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), _answered()])
def test_an_interrupted_trial_goes_on_with_its_values_in_its_folder(space, folder, monkeypatch, error):
    train, seen = Train.run, []

    def stop(self):
        seen.append(self)
        raise error

    monkeypatch.setattr(Train, "run", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        _sweep(file := space(), folder, 2)
    monkeypatch.setattr(Train, "run", lambda self: (seen.append(self), train(self)))
    _sweep(file, folder, 2)
    assert seen[1] == seen[0]
    assert seen[2].out != seen[0].out
    assert [state for state, _ in _values(folder, file)] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_trial_whose_process_was_killed_is_run_again_first_and_one_that_runs_is_left(space, folder):
    study = sweep._study(folder, Space.read(file := space()))
    owner = asdict(artifacts.Owner.this())
    owners = [owner | {"started": "0"}, owner, owner | {"host": "elsewhere", "boot": "other"}, None]
    for at, of in enumerate(owners):  # a killed one's, this process, another machine's, of an earlier semid
        trial = study.ask()
        trial.suggest_int("train.model.layers", 1, 4)
        trial.set_user_attr("folder", f"trials/{at:04d}")
        if of is not None:
            trial.set_user_attr("owner", of)
    _sweep(file, folder, 2)
    trials = study.trials
    assert [trial.state.name for trial in trials] == ["FAIL", *["RUNNING"] * 3, "COMPLETE", "COMPLETE"]
    assert [trial.user_attrs["folder"] for trial in trials[4:]] == ["trials/0000", "trials/0005"]
    assert trials[4].params["train.model.layers"] == trials[0].params["train.model.layers"]
    assert (folder / "trials/0000/model/history.jsonl").is_file()


def test_the_folder_of_a_sweep_may_be_below_the_home_or_a_url_of_this_machine(space, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    for out in ("~/out", f"file://{folder}"):
        _sweep(file := space(), out, 1 + out.startswith("file"))
    assert [state for state, _ in _values(folder, file)] == ["COMPLETE"] * 2


def test_a_sweep_at_a_url_is_refused(space, capsys):
    with pytest.raises(SystemExit):
        _sweep(space(), "memory://sweep", 1)
    assert "the study is a file of SQLite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trials", "message"), [(0, "--trials 0: expected at least 1"), (1, "out: is an artifact; ch")]
)
def test_no_trials_and_the_folder_of_an_artifact_are_refused(space, folder, capsys, trials, message):
    folder.mkdir()
    if trials:
        (folder / artifacts.MANIFEST).write_text("{}")
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit):
        _sweep(space(), folder, trials)
    assert message in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_two_steps_of_training(space, tmp_path):
    """The real thing, of the smallest model."""
    dataset = store_dataset(simulate(SimulatedConfig(num_items=80, num_users=40, images=False)).dataset, tmp_path / "d")
    config = TokenizerConfig(method=RQKmeansConfig(level_sizes=(4, 4), iterations=2))
    assert isinstance(tokenize(dataset, config, out=tmp_path / "c"), SemanticCatalog)
    text = f"train: {{dataset: {tmp_path}/d, catalog: {tmp_path}/c, epochs: 0.1, validation-users: 8, "
    text += "model: {type: sasrec, layers: 1, heads: 1, hidden: 8, dim: {choices: [8]}}}"
    _sweep(space(text), tmp_path / "out", 1)
    assert (tmp_path / "out" / "trials" / "0000" / "model" / "manifest.json").is_file()
