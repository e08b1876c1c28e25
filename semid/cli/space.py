"""Search space of a sweep: a file of options with ranges and choices in place of values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
import yaml

from semid.cli.config_files import TRUTH, Entry, build, entries_of, read_mapping
from semid.cli.tokenize import Tokenize
from semid.cli.train import Train
from semid.errors import SemidError, did_you_mean

SECTIONS: dict[str, Any] = {"tokenize": Tokenize, "train": Train}
_RANGE, _CHOICES = {"low", "high", "log"}, "choices"


@dataclass(frozen=True)
class Searched:
    """A searched field: a range of numbers (integers if both ends are), or a list of choices as texts."""

    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[str, ...] = ()

    def suggest(self, trial: Any, name: str) -> Any:
        """A value suggested by an optuna trial."""
        if self.choices:
            return trial.suggest_categorical(name, self.choices)
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return (trial.suggest_int if whole else trial.suggest_float)(name, self.low, self.high, log=self.log)

    @property
    def ends(self) -> tuple[Any, Any]:
        """The first and the last value."""
        return (self.choices[0], self.choices[-1]) if self.choices else (self.low, self.high)


@dataclass(frozen=True)
class Space:
    """Search space from a file: options of `semid train` and, if its fields are searched, of `semid tokenize`."""

    file: str
    sections: Mapping[str, yaml.MappingNode]
    searched: dict[str, Searched] = field(default_factory=dict)
    """Searched fields by section and key: `train.model.dim`."""

    @classmethod
    def read(cls, file: str | Path) -> Space:
        """Read a space. Raises SemidError naming the line of an error, or of an option that the command refuses."""
        sections: dict[str, yaml.MappingNode] = {}
        for key, node in read_mapping(file).value:
            name = str(key.value)
            line = f"{file}: line {key.start_mark.line + 1}: {name}"
            if name in sections:
                raise SemidError(f"{line}: given twice; keep one")
            if name not in SECTIONS:
                raise SemidError(f"{line}: expected tokenize or train{did_you_mean(name, SECTIONS, cutoff=0.3)}")
            if not isinstance(node, yaml.MappingNode):
                raise SemidError(f"{line}: expected the options of `semid {name}`")
            sections[name] = node
        space = cls(str(file), sections)
        for name, node in space.sections.items():
            space._filled(node, name, {})
        space._check()
        return space

    def _check(self) -> None:
        if "train" not in self.sections:
            raise SemidError(f"{self.file}: expected the options of `semid train` below `train:`, got none")
        for name in self.sections:
            if not any(key.startswith(f"{name}.") for key in self.searched):
                once = "; tokenize once, and name its folder as train.catalog" if name == "tokenize" else ""
                raise SemidError(f"{self.file}: {name}: no field is searched: none has low and high, or choices{once}")
        for name, places in self._places("trial").items():
            if searched := next((key for key in places if f"{name}.{key}" in self.searched), None):
                raise SemidError(f"{self.file}: {name}.{searched}: each trial has its own; leave it out")
        first, last = ({name: one.ends[end] for name, one in self.searched.items()} for end in (0, 1))
        for values in (first, last):
            self.commands(values, "trial")
        for choice in ({name: value} for name, one in self.searched.items() for value in one.choices[1:-1]):
            try:
                self.commands(first | choice, "trial")
            except SemidError:  # not all combinations of choices need be valid
                self.commands(last | choice, "trial")

    def commands(self, values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
        """The commands of a trial by name, with these values; they write below the folder."""
        places = self._places(folder)
        return {name: self._command(name, values, places[name]) for name in SECTIONS if name in self.sections}

    def _places(self, folder: str | Path) -> dict[str, dict[str, str]]:
        """Options of a trial's commands that name folders below the trial's."""
        catalog = {"catalog": f"{folder}/catalog"} if "tokenize" in self.sections else {}
        return {"tokenize": {"out": f"{folder}/catalog"}, "train": {"out": f"{folder}/model", **catalog}}

    def _command(self, name: str, values: Mapping[str, Any], places: Mapping[str, str]) -> Any:
        node = self._filled(self.sections[name], name, values)
        entries = [entry for entry in entries_of(node, self.file) if entry.key[0] not in places]
        own = [Entry((key,), _scalar(place, node), self.file) for key, place in places.items()]
        command = build(SECTIONS[name], entries + own, chosen={})
        if missing := [key for key, value in vars(command).items() if value is tyro.MISSING]:
            raise SemidError(f"{self.file}: {name}: {missing[0]} is missing; give it")
        return command

    def _filled(self, node: yaml.Node, name: str, values: Mapping[str, Any]) -> Any:
        """Copy of a node, with searched fields recorded and replaced by `values` (else by their first value)."""
        if not isinstance(node, yaml.MappingNode):
            return node
        keys = {str(key.value): value for key, value in node.value}
        if not (_CHOICES in keys or {"low", "high"} <= set(keys)):
            pairs = [
                (key, self._filled(value, f"{name}.{str(key.value).replace('_', '-')}", values))
                for key, value in node.value
            ]
            return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)
        one = self.searched.setdefault(name, self._searched(name, node, keys))
        return _node(values.get(name, one.ends[0]), node)

    def _searched(self, name: str, node: yaml.Node, keys: Mapping[str, Any]) -> Searched:
        where = f"{self.file}: line {node.start_mark.line + 1}: {name}"
        for at, (key, _) in enumerate(node.value):
            if str(key.value) in [str(other.value) for other, _ in node.value[:at]]:
                raise SemidError(f"{where}: {key.value}: given twice; keep one")
        if unknown := sorted(set(keys) - (_RANGE if "low" in keys else {_CHOICES})):
            raise SemidError(f"{where}: {unknown[0]}: expected low, high and log, or choices")
        if "low" not in keys:
            choices = keys[_CHOICES].value if isinstance(keys[_CHOICES], yaml.SequenceNode) else []
            if not choices:
                raise SemidError(f"{where}: expected a list of choices")
            return Searched(choices=tuple(dict.fromkeys(map(_text, choices))))
        low, high = (_number(keys[end], where) for end in ("low", "high"))
        log = "log" in keys and _truth(keys["log"], f"{where}: log")
        if not low < high or (log and low <= 0):
            raise SemidError(f"{where}: expected low below high{', above 0 for log' if log else ''}, got {low}, {high}")
        return Searched(low, high, log)

    @property
    def plain(self) -> dict[str, Any]:
        """The space as JSON, to compare it with others."""
        return {name: yaml.load(yaml.serialize(node), Loader=yaml.BaseLoader) for name, node in self.sections.items()}


def _number(node: yaml.Node, where: str) -> float:
    for kind in (int, float):
        with contextlib.suppress(TypeError, ValueError):
            if math.isfinite(value := kind(node.value)):
                return value
    raise SemidError(f"{where}: expected a finite number, got {node.value!r}")


def _truth(node: yaml.Node, where: str) -> bool:
    if (word := str(node.value).lower()) not in TRUTH:
        raise SemidError(f"{where}: expected true or false, got {node.value!r}")
    return TRUTH[word]


def _text(node: yaml.Node) -> str:
    return str(yaml.serialize(node, width=1 << 20)).removesuffix("...\n").strip()


def _node(value: Any, at: yaml.Node) -> yaml.Node:
    """A YAML node for a value, with the line number of the node `at`."""
    if not isinstance(value, str):
        return _scalar(str(value), at)
    node = yaml.compose(value, Loader=yaml.SafeLoader)
    node.start_mark = at.start_mark
    return node


def _scalar(text: str, at: yaml.Node) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", text, at.start_mark)
