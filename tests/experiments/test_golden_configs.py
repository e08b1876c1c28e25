"""Every experiment's resolved configs are those of `golden/`: a changed default shows in review, not in a later table.

`SEMID_GOLDEN=write python -m pytest tests/experiments/test_golden_configs.py` writes the files.
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from experiments.experiment import experiments
from semid.cli import demo
from semid.cli.evaluate import Evaluate
from semid.cli.export import Export
from semid.cli.graph import Graph
from semid.cli.prepare import Prepare
from semid.cli.recommend import Recommend
from semid.cli.report import Report
from semid.cli.tokenize import Tokenize
from semid.cli.train import Train
from semid.config import to_dict
from semid.generators import GeneratorConfig
from semid.joint import JointConfig
from semid.tokenizers import TokenizerConfig, TokenizerMethod

GOLDEN = Path(__file__).parent / "golden"
REWRITE = "SEMID_GOLDEN=write python -m pytest tests/experiments/test_golden_configs.py"
ITEMS, INTERACTIONS = 2_000, 30_000
ABSENT = "(absent)"
SETTINGS = ("model", "tokenizer", "teacher", "vectors", "graph", "encoders", "weights", "beam_size", "cpu")


def leaves(value, path=""):
    """Settings by their dotted paths; a list of plain values is one setting."""
    if isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value):
        value = {str(number): entry for number, entry in enumerate(value)}
    if isinstance(value, list):
        value = json.dumps(value)
    if not isinstance(value, dict):
        return {path: value}
    return {at: leaf for name, part in value.items() for at, leaf in leaves(part, f"{path}.{name}".lstrip(".")).items()}


def resolved(config):
    """The config with the defaults that follow the data, as the smallest data behind a published figure has them."""
    if isinstance(config, TokenizerConfig | TokenizerMethod):
        return config.resolved(ITEMS)
    if isinstance(config, JointConfig):
        return config.resolved(items=ITEMS, interactions=INTERACTIONS, repeats=False)
    return config.resolved(INTERACTIONS, repeats=False) if isinstance(config, GeneratorConfig) else config


def differences(settings):
    """The first settings, and where each other ones differ from them."""
    (name, base), *others = settings.items()
    changed = {
        other: {at: ours.get(at, ABSENT) for at in {**base, **ours} if base.get(at, ABSENT) != ours.get(at, ABSENT)}
        for other, ours in others
    }
    return {name: base} | {f"{other} differs from {name} in": leaf for other, leaf in changed.items()}


def of_experiment(experiment):
    """Settings of an experiment; what is known of it is left out."""
    parts = {name: resolved(getattr(experiment, name)) for name in SETTINGS}
    return leaves({name: part if part is None else to_dict(part) for name, part in parts.items()})


def of_file(stem):
    """The first variant of a file of experiments, and where each other one differs from it."""
    return differences({name: of_experiment(one) for name, one in experiments().items() if name.split(".")[0] == stem})


def of_demo(monkeypatch, folder):
    """The commands of `make demo`, as the command line reads them."""
    commands = []
    for command in (Tokenize, Graph, Train, Evaluate, Recommend, Export, Report, Prepare):
        monkeypatch.setattr(command, "run", lambda self: commands.append((type(self).__name__, self)))
    monkeypatch.setattr(demo, "_first_history", lambda folder: ["a", "b"])
    demo.Demo(folder).run()
    return {f"{number} {name}": settings(command, folder) for number, (name, command) in enumerate(commands, 1)}


def settings(command, folder):
    """A command's settings; `OUT` stands for the folder of the demo."""

    def plain(value):
        value = resolved(value)
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, (tuple, list)):
            return [plain(entry) for entry in value]
        return (
            value if value is None or isinstance(value, (bool, int, float)) else str(value).replace(str(folder), "OUT")
        )

    return leaves(plain(command))


FILES = sorted({name.split(".")[0] for name in experiments()})


def check(name, configs):
    file = GOLDEN / f"{name}.json"
    text = json.dumps(configs, indent=1) + "\n"
    if os.environ.get("SEMID_GOLDEN") == "write":
        file.write_text(text)
    wanted, got = leaves(json.loads(file.read_text())), leaves(json.loads(text))
    changed = [at for at in {**wanted, **got} if wanted.get(at, ABSENT) != got.get(at, ABSENT)]
    shown = "\n".join(f"  {at}: {wanted.get(at, ABSENT)} -> {got.get(at, ABSENT)}" for at in changed[:20])
    assert not changed, f"{len(changed)} settings of {name} changed:\n{shown}\nTo accept them: {REWRITE}"


@pytest.mark.parametrize("stem", FILES)
def test_resolved_configs_are_the_golden_ones(stem):
    check(stem, of_file(stem))


def test_the_demo_is_the_golden_one(monkeypatch, tmp_path):
    check("demo", of_demo(monkeypatch, tmp_path))


def test_every_golden_file_is_of_an_experiment():
    assert {file.stem for file in GOLDEN.glob("*.json")} == {*FILES, "demo"}


def test_a_changed_default_shows(monkeypatch):
    monkeypatch.delenv("SEMID_GOLDEN", raising=False)
    flat = experiments()["default"]
    changed = {"default": dataclasses.replace(flat, model=dataclasses.replace(flat.model, max_history=7))}
    monkeypatch.setitem(globals(), "experiments", lambda: changed)
    with pytest.raises(AssertionError, match=r"max_history: .* -> 7(.|\n)*SEMID_GOLDEN=write"):
        check("default", of_file("default"))
