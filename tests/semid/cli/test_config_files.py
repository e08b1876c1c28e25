"""Options of a command in a file: read as its defaults, refused by line, written next to what was made of them."""

import errno
import json
import os
import re

import pytest
import tyro
import yaml

from semid import artifacts
from semid.artifacts import read_manifest
from semid.cli import app, main
from semid.cli.config_files import build, read_entries, to_yaml
from semid.cli.fields import fields_below
from semid.cli.train import Train
from semid.config import to_dict
from semid.data import GlobalTime, HeldOutItems, ShuffledTies
from semid.errors import SemidError
from semid.joint import JointConfig, Phase, Surgery
from semid.training import TrainingConfig
from seq_models import DenseConfig, RQTransformerConfig

PLACES = "dataset: d\ncatalog: c\nout: o\n"
SOURCE = "prepare parquet --items i --interactions x"
# A command each, and one of each choice.
LINES = (
    "demo --seed 3",
    f"{SOURCE} --out o --columns item_id=asin title=name --ties shuffled:3 --vectors seen seen.npy --encoder a b",
    "prepare simulated --out o --seed 5 --split-rule held-out-items --split-rule.seed 3",
    "tokenize --dataset d --out o --alignment letter das --letter.weight.value 0.5 --collisions popularity",
    "tokenize --dataset d --out o rq-vae --level-sizes 4 4 --decay 0.9 gumbel --temperature.value 0.5",
    "tokenize --dataset d --out o rq-kmeans --seed 3",
    "tokenize --catalog c --input a.parquet b.parquet --out o",
    "graph --dataset d --out o --tune",
    "train --dataset d --catalog c --out o sasrec --dim 32 --repeats False --epochs 3",
    "train --dataset d --catalog c@3 --out s3://shop/m --features --rates encoder 0.5 --options b1 0.9",
    "compile --topology v5e:4x4 --fsdp 4 --items 1000 --level-sizes 64 64 sasrec --dim 32",
    "sweep --space space.yaml --out o --trials 3",
    "train-end-to-end --dataset d --out o --image scratch",
    "evaluate --model m n --dataset d --ks 1 5 --exclude-seen",
    "recommend --model m --history i1,i2 -k 5",
    "catalog append --catalog c --input i --known update",
    "catalog diff a b",
    "export --catalog c --format trie --out o",
    "export-program --model m --out o --platforms cpu",
    "import-codes --codes c --dataset d --out o",
    "package --model m --out o --license apache-2.0",
    "report a b",
    "vectors --dataset d --out o smooth --layers 2",
    "vectors --dataset d --out o fuse --signal lightgcn --epochs 3",
)


def _written(tmp_path, text, name="run.yaml"):
    file = tmp_path / name
    file.write_text(text)
    return str(file)


@pytest.fixture
def parsed(tmp_path):
    """The command of these words, `{}` standing for a file with this text."""
    return lambda line, text: app.parse(line.format(_written(tmp_path, text)).split())


@pytest.mark.parametrize("line", LINES)
def test_all_options_of_a_command_are_written_and_read_again(parsed, line):
    command = app.parse(line.split())
    again = parsed(f"{line.split()[0]} --config {{}}", to_yaml(command))
    assert yaml.safe_load(to_yaml(again)) == yaml.safe_load(to_yaml(command))
    assert type(again) is type(command)


def test_every_command_is_among_them():
    assert {line.split()[0] for line in LINES} == set(app.COMMANDS)


@pytest.mark.parametrize("line", LINES)
def test_names_of_a_file_are_those_of_the_command_line(capsys, monkeypatch, line):
    monkeypatch.setenv("COLUMNS", "200")
    command = app.parse(line.split())
    names = [word for word in line.split()[1:] if word in _choice_names(command)]
    with pytest.raises(SystemExit):
        app.parse([line.split()[0], *names, "--help"])
    shown = capsys.readouterr().out
    options = [
        ".".join(field.name[field.scope :])
        for field in fields_below(type(command), {}, command)
        if not field.alternatives and not _only_in_files(field)
    ]
    missing = [name for name in options if f"--{name.replace('_', '-')}" not in shown]
    assert missing == []


def _choice_names(command):
    return {name for field in fields_below(type(command), {}, command) for name in field.alternatives}


def _only_in_files(field):
    """Settings of end-to-end stages, lists of configs, arguments without a name, the seed of held-out items."""
    of_rule = field.path[-2:] == ("split_rule", "seed")
    positional = tyro.conf.Positional in getattr(field.kind, "__metadata__", ())
    return field.path[0] == "stages" or field.path[-1] == "assignments" or of_rule or positional


def test_options_of_the_command_line_win(parsed):
    text = PLACES + "dim: 32\nlearning-rate: 1e-2\nfeatures: [a, b]\nother_dataset: true\nepochs: null\n"
    given = parsed("train --config {} --dim 64 --features c --no-other-dataset --out p", text)
    config = given.config
    assert (given.dataset, given.out, given.other_dataset) == ("d", "p", False)
    assert (config.model.backbone.dim, config.features, config.training.epochs) == (64, ("c",), None)
    assert config.training.optimizer.learning_rate == 1e-2


def test_what_the_file_lacks_the_command_line_must_give(parsed, capsys):
    assert parsed("train --config {} --out o", "dataset: d\ncatalog: c\n").out == "o"
    with pytest.raises(SystemExit) as exit:
        parsed("train --config {}", "dataset: d\ncatalog: c\n")
    assert exit.value.code == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "model: sasrec\ndim: 32",
        "model: sasrec\nmodel.dim: 32",
        "model: {type: sasrec, dim: 32}",
        "model: {type: DenseConfig, backbone: {dim: 32}}",
        "config: {model: {type: sasrec, backbone: {dim: 32}}}",
    ],
)
def test_a_choice_is_a_name_and_its_options_stand_inside_or_next_to_it(parsed, text):
    model = parsed("train --config {}", f"{PLACES}{text}").config.model
    assert (type(model), model.backbone.dim, model.backbone.layers) == (DenseConfig, 32, DenseConfig().backbone.layers)


def test_another_choice_of_the_command_line(parsed):
    """Options that the file gives to any model are those of the model that is named there; to one model, its own."""
    for words in ("sasrec", "--model sasrec"):
        assert parsed(f"train --config {{}} {words}", f"{PLACES}dim: 32").config.model.backbone.dim == 32
        model = parsed(f"train --config {{}} {words}", f"{PLACES}model: {{type: rq-transformer, depth-layers: 3}}")
        assert model.config.model == DenseConfig()
    assert parsed("train --config {}", f"{PLACES}depth-layers: 3").config.model == RQTransformerConfig(depth_layers=3)


def test_sources_and_rules_are_choices_like_others(parsed):
    text = "items: i\ninteractions: x\nout: o\nties: shuffled:3\nvectors: {seen: a.npy}\n"
    text += "split-rule: global-time\ntest: .95"
    for line, more in (("prepare parquet --config {}", ""), ("prepare --config {}", "source: parquet\n")):
        source = parsed(line, more + text).source
        assert (source.split_rule, source.ties) == (GlobalTime(test=0.95), ShuffledTies(3))
        assert source.vectors == {"seen": "a.npy"}
    drawn = parsed("prepare --config {} --split-rule.seed 5", "source: simulated\nout: o\nsplit-rule: held-out-items")
    assert drawn.source.split_rule == HeldOutItems(seed=5)


def test_settings_of_stages_are_options_of_files(parsed):
    places = ["--dataset", "d", "--out", "o"]
    config = JointConfig(tie_break=9, cycles=2)
    whole = json.dumps(to_dict(config))
    for text in (whole, f"stages: {whole}", "stages: {tie-break: 9, cycles: 2}", "tie_break: 9\ncycles: 2"):
        assert parsed(f"train-end-to-end --config {{}} {' '.join(places)}", text).stages == config


def test_configs_inside_of_a_list_are_mappings_like_others(parsed):
    """Those without a default too, which need no `type`."""
    line = "train-end-to-end --config {} --dataset d --out o"
    for phase in ("training: {epochs: 1}", "training.epochs: 1", "training: {type: TrainingConfig, epochs: 1}"):
        text = f"stages:\n  joint:\n  - {phase}\n  - training: {{type: TrainingConfig}}\n    surgery: project"
        joint = parsed(line, text).stages.joint
        assert joint == (Phase(TrainingConfig(epochs=1)), Phase(TrainingConfig(), surgery=Surgery.PROJECT))
    for phase, message in (
        ("training: {epochz: 1}", "line 3: stages.joint.training.epochz: unknown key; did you mean 'training.epochs'?"),
        ("training: {epochs: many}", "line 3: stages.joint.training.epochs: expected a value of type float"),
        ("{training: {epochs: 1}, training: {}}", "line 3: stages.joint.training: given twice; keep one"),
        ("surgery: project", "line 3: stages.joint: training is missing; give it"),
    ):
        with pytest.raises(SemidError, match=re.escape(message)):
            parsed(line, f"stages:\n  joint:\n  - {phase}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {dmi: 64}", "line 1: model.dmi: unknown key; did you mean 'model.dim'?"),
        ("\nbach-size: 3", "line 2: bach_size: unknown key; did you mean 'batch_size'?"),
        ("model: sasrek", "line 1: model: expected one of .*, got 'sasrek'; did you mean 'sasrec'?"),
        ("epochs: many", "line 1: epochs: expected a value of type float, got 'many'"),
        ("epochs: [1, 2]", "line 1: epochs: expected float, got a list"),
        ("dim: {a: 3}", "line 1: dim: expected int, got a mapping"),
        ("tied-heads: maybe", "line 1: tied_heads: expected true or false, got 'maybe'"),
        ("dataset: null", "line 1: dataset: expected a value of type str, got null"),
        ("normalization: child", "line 1: normalization: expected one of .*did you mean 'children'?"),
        ("rates: [[a]]", "line 1: rates: expected 2 values, got 1"),
        ("dim: 6\nheads: 4", "line 1: dim: dim 6 must divide into 4 heads"),
        ("batch-size: 0", "line 1: batch_size: expected batch_size of at least 1, got 0"),
        ("epochs: 1\ntraining: {epochs: 2}", "line 2: training.epochs: given before as epochs; keep one"),
        ("epochs: 1\nepochs: 2", "line 2: epochs: given twice; keep one"),
        ("dataset: [a, b]", "line 1: dataset: expected str, got a list"),
        ("training: 3", "line 1: training: expected its options, got a value"),
        ("dataset: &a d\nout: *a", "line 2: aliases"),
        ("dataset: [d", "line 1: not valid YAML"),
        ("- a", "expected options as `key: value`, got a list"),
        ("? [a]\n: 3", "line 1: .*expected the name of an option"),
        ("seed: !!python/object/apply:os.system [ls]", "line 1: seed: expected int, got a list"),
        ("a: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
    ],
)
def test_what_does_not_fit_is_said_by_file_and_line(parsed, tmp_path, text, message):
    with pytest.raises(SemidError, match=rf"run\.yaml: {message.replace('?', '[?]')}") as error:
        parsed("train --config {}", text)
    assert str(error.value).count("run.yaml") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --config", "train: expected a file of options after --config, got none"),
        ("train --config a --config=b", "train: expected one --config, got 2: a, b"),
        ("train --config no.yaml", "no.yaml: no such file"),
    ],
)
def test_a_file_that_is_not_there_is_one_line(capsys, words, message):
    with pytest.raises(SystemExit):
        main(words.split())
    assert capsys.readouterr().err == f"semid: {message}\n"


def test_a_key_that_is_of_two_configs_alike_is_refused(parsed):
    with pytest.raises(SemidError, match=r"weight.value: may be cooccurrence.weight.value or das.weight.value"):
        parsed("tokenize --config {}", "out: o\nweight: {value: 1}")


def test_no_options_are_a_file_too(tmp_path):
    assert build(Train, read_entries(_written(tmp_path, "# none\n")), chosen={}).dataset is tyro.MISSING


def test_the_written_file_makes_the_same_artifact(tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "a", tmp_path / "b"
    main(["prepare", "simulated", "--out", str(first), "--num-items", "80", "--num-users", "30", "--seed", "3"])
    file = first / "config.yaml"
    assert file.read_text().startswith("# semid prepare --config config.yaml\n")
    assert yaml.safe_load(file.read_text())["source"]["num-items"] == 80
    main(["prepare", "--config", str(file), "--out", str(second)])
    assert read_manifest(second).digest == read_manifest(first).digest
    other = file.read_text().replace("seed: 3", "seed: 4")
    main(["prepare", "--config", _written(tmp_path, other), "--out", str(tmp_path / "c")])  # control
    assert read_manifest(tmp_path / "c").digest != read_manifest(first).digest
    artifacts.read_artifact(first, "dataset")
    before = file.stat().st_mtime_ns
    main(["prepare", "--config", str(file)])
    assert file.stat().st_mtime_ns == before

    def fail(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(artifacts, "replacing", fail)
    words = ["prepare", "--config", str(file), "--out", f"{tmp_path}/b/../a"]  # other options of the same artifact
    number = errno.EROFS
    main(words)
    assert "config.yaml: not written (Read-only file system); the artifact is as it was" in capsys.readouterr().err
    number = errno.ENOSPC  # control
    with pytest.raises(SystemExit):
        main(words)
