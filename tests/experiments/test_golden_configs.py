"""Every experiment's resolved configs are those of `golden/`: a changed default shows in review, not in a later table.

`SEMID_GOLDEN=write python -m pytest tests/experiments/test_golden_configs.py` writes the files.
"""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pyarrow as pa
import pytest

from experiments import alignment, amazon, arms, das, end_to_end, generators, letter
from experiments.recipes import RECIPES
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
from semid.graphs import ItemGraphConfig
from semid.joint import JointConfig
from semid.tokenizers import TokenizerConfig, TokenizerMethod

GOLDEN = Path(__file__).parent / "golden"
REWRITE = "SEMID_GOLDEN=write python -m pytest tests/experiments/test_golden_configs.py"
ITEMS, INTERACTIONS = 2_000, 30_000
ABSENT = "(absent)"


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


def of_config(config):
    """Settings of a config, resolved."""
    return leaves(to_dict(resolved(config)))


def differences(configs):
    """The first config's settings, and where each other one differs from it."""
    (name, base), *others = [(name, of_config(config)) for name, config in configs.items()]
    changed = {
        other: {at: ours.get(at, ABSENT) for at in {**base, **ours} if base.get(at, ABSENT) != ours.get(at, ABSENT)}
        for other, ours in others
    }
    return {name: base} | {f"{other} differs from {name} in": leaf for other, leaf in changed.items()}


class Recorder:
    """Stands for `tokenize` and `train` of an experiment: keeps their configs by the names of the folders."""

    def __init__(self, monkeypatch, module):
        self.configs = {}
        for function in ("tokenize", "train"):
            monkeypatch.setattr(module, function, self)

    def __call__(self, *inputs, out, seed, **_):
        self.configs[out.name.removesuffix(f"_{seed}")] = inputs[-1]
        return MagicMock()


def of_amazon(monkeypatch, folder):
    recorder = Recorder(monkeypatch, amazon)
    monkeypatch.setattr(amazon, "fit_graph", MagicMock(return_value=SimpleNamespace(config=ItemGraphConfig())))
    amazon._train(MagicMock(), folder, seed=0, budget=1.0, ablations=True)
    return {name: of_config(config) for name, config in recorder.configs.items()}


def of_arms(monkeypatch, folder):
    """What all comparisons of tokenizers share, on real and on simulated items; then their tokenizers."""
    found = {}
    for kind, columns in {"real": (amazon.TEXT, "other"), "simulated": ("content",)}.items():
        recorder = Recorder(monkeypatch, arms)
        ids = pa.array(["a", "b", "c"])
        data = SimpleNamespace(vector_columns=dict.fromkeys(columns), num_items=3, item_ids=ids)
        stages = arms._Stages(data, folder, 0, 1.0)
        stages.teacher()
        stages.codes("any", data, TokenizerConfig(columns=stages.content))
        stages.generator("any", None)
        found |= {f"{kind} {name}": config for name, config in recorder.configs.items()}
    families = {"text": alignment.ARMS["text"], **alignment.ARMS, "letter": letter.tokenizer, "das": das.tokenizer}
    shared = {name: of_config(config) for name, config in found.items()}
    return {"stages": shared, "tokenizers": differences({name: arm(("content",)) for name, arm in families.items()})}


def of_end_to_end(*_):
    simulated, real = end_to_end.END_TO_END, end_to_end.REAL
    return {
        "world": leaves(to_dict(end_to_end.WORLD)),
        "teacher": leaves(to_dict(end_to_end.TEACHER)),
        "simulated": differences({"end-to-end": simulated} | end_to_end.arms(simulated)),
        "real": dict([*differences({"simulated": simulated, "end-to-end": real}).items()][1:])
        | dict([*differences({"end-to-end": real} | end_to_end.arms(real)).items()][1:]),
    }


def of_generators(*_):
    return {"tokenizer": of_config(TokenizerConfig())} | differences(generators.FAMILIES)


def of_recipes(*_):
    return {name: of_config(config) for name, config in RECIPES.items()}


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


EXPERIMENTS = {
    "amazon": of_amazon,
    "arms": of_arms,
    "demo": of_demo,
    "end_to_end": of_end_to_end,
    "generators": of_generators,
    "recipes": of_recipes,
}


def check(name, configs):
    file = GOLDEN / f"{name}.json"
    text = json.dumps(configs, indent=1) + "\n"
    if os.environ.get("SEMID_GOLDEN") == "write":
        file.write_text(text)
    wanted, got = leaves(json.loads(file.read_text())), leaves(json.loads(text))
    changed = [at for at in {**wanted, **got} if wanted.get(at, ABSENT) != got.get(at, ABSENT)]
    shown = "\n".join(f"  {at}: {wanted.get(at, ABSENT)} -> {got.get(at, ABSENT)}" for at in changed[:20])
    assert not changed, f"{len(changed)} settings of {name} changed:\n{shown}\nTo accept them: {REWRITE}"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_resolved_configs_are_the_golden_ones(name, monkeypatch, tmp_path, capsys):
    check(name, EXPERIMENTS[name](monkeypatch, tmp_path))


def test_a_changed_default_shows(monkeypatch):
    monkeypatch.delenv("SEMID_GOLDEN", raising=False)
    changed = dataclasses.replace(GeneratorConfig(), max_history=7)
    families = {**generators.FAMILIES, "flat": changed}
    monkeypatch.setattr(generators, "FAMILIES", families)
    with pytest.raises(AssertionError, match=r"max_history: .* -> 7(.|\n)*SEMID_GOLDEN=write"):
        check("generators", of_generators())
