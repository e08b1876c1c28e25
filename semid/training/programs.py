"""Analysis of compiled programs: collectives and memory traffic, with loops counted as often as they run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "u4": 4, "s4": 4}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
# Arrays in the fast memory of a TPU's core.
_ON_CHIP = re.compile(r"\b[a-z]+[0-9]*\[[0-9,]*\]\{[^}]*S\(1\)\}")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^(\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
# Opcodes without traffic: names of memory regions, and calls whose bodies are counted.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}


class Collective(NamedTuple):
    """An exchange between devices: bytes that a device sends each time, and number of times per step."""

    kind: str
    sent: float
    times: int


class _Instruction(NamedTuple):
    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclass(frozen=True)
class Program:
    """The instructions of a compiled program by computation, and how often a step runs each computation."""

    computations: Mapping[str, tuple[_Instruction, ...]]
    times: Mapping[str, int]
    fused: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Program:
        """Parse the output of `compiled.as_text()`."""
        entry, computations = _computations(text)
        times, fused = {entry: 1}, set()
        for name in _callers_first(entry, computations):
            for instruction in computations[name]:
                turns = _turns(instruction, computations)
                for called in _called(instruction):
                    if called in computations:
                        times[called] = times.get(called, 0) + times[name] * turns
                        if instruction.opcode not in ("while", "conditional", "call"):
                            fused.add(called)
        return cls(computations, times, frozenset(fused))

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """All exchanges between devices; of an exchange that a TPU program divides into steps, only the first."""
        found, seen = [], set()
        for name, instruction in self._run():
            kind = instruction.opcode.removesuffix("-start")
            channel = re.search(r"channel_id=\d+", instruction.attributes)
            if kind in _KINDS and not (channel and channel[0] in seen):
                found.append(Collective(kind, _sent(kind, instruction), self.times[name]))
                seen.add(channel[0] if channel else "")
        return tuple(found)

    @property
    def traffic(self) -> float:
        """Bytes that instructions read and write in main memory; slices count with their own size."""
        return float(sum(self._bytes(name, one) * self.times[name] for name, one in self._run(fused=False)))

    def _run(self, *, fused: bool = True) -> Iterator[tuple[str, _Instruction]]:
        for name in self.times:
            if fused or name not in self.fused:
                yield from ((name, instruction) for instruction in self.computations[name])

    def _bytes(self, name: str, instruction: _Instruction) -> float:
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
            return 0.0
        results = {one.name: _ON_CHIP.sub("", one.result) for one in self.computations[name]}
        read = [_size(results.get(operand, "")) for operand in instruction.operands]
        written = _size(results[instruction.name])
        inside = next((self.computations[c] for c in _called(instruction) if c in self.computations), ())
        if instruction.opcode == "fusion":
            for index, small in _sliced(inside, self.computations).items():
                read[index] = min(read[index], small)
            if inside and inside[-1].opcode == "dynamic-update-slice":
                of = {one.name: one.result for one in inside}
                written = min(written, _size(of.get(inside[-1].operands[1], inside[-1].result)))
        elif instruction.opcode in ("dynamic-slice", "gather", "slice"):
            read[0] = min(read[0], written)
        elif instruction.opcode in ("dynamic-update-slice", "scatter"):
            read[0], written = 0.0, sum(read[1:])
        return sum(read) + written


def _computations(text: str) -> tuple[str, dict[str, tuple[_Instruction, ...]]]:
    entry, name = "", ""
    computations: dict[str, tuple[_Instruction, ...]] = {}
    lines: list[_Instruction] = []
    for line in text.splitlines():
        if line.endswith("{") and ("->" in line) and not line.startswith(" "):
            name, lines = line.removeprefix("ENTRY ").split("(")[0].split()[0].lstrip("%"), []
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            computations[name] = tuple(lines)
        elif (at := _LINE.match(line)) and (found := _OPCODE.match(at[2])):
            operands = tuple(word.split()[-1].lstrip("%") for word in found[3].split(",") if word.strip())
            lines.append(_Instruction(at[1], found[1], found[2], operands, found[4]))
    return entry, computations


def _called(instruction: _Instruction) -> list[str]:
    named = (some.strip("{}").split(",") for some in _CALLED.findall(instruction.attributes))
    return [name.strip().lstrip("%") for names in named for name in names]


def _turns(instruction: _Instruction, computations: Mapping[str, tuple[_Instruction, ...]]) -> int:
    """Iterations of a loop: the compiler's trip count or, as in TPU programs, the number that its counter is compared
    with; 1 for other instructions."""
    if said := re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes):
        return int(said[1])
    condition = re.search(r"condition=%?([\w.\-]+)", instruction.attributes)
    inside = computations.get(condition[1], ()) if condition else ()
    if not inside or inside[-1].opcode != "compare" or "direction=LT" not in inside[-1].attributes:
        return 1
    numbers = {one.name: one.operands for one in inside if one.opcode == "constant"}
    bound = "".join(numbers.get(inside[-1].operands[1], ()))
    return int(bound) if bound.isdigit() else 1


def _callers_first(entry: str, computations: Mapping[str, tuple[_Instruction, ...]]) -> list[str]:
    """All reachable computations, callers before callees."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        seen.add(name)
        for called in (called for one in computations[name] for called in _called(one)):
            if called in computations and called not in seen:
                visit(called)
        order.append(name)

    visit(entry)
    return order[::-1]


def _sliced(inside: tuple[_Instruction, ...], computations: Mapping[str, tuple[_Instruction, ...]]) -> dict[int, float]:
    """Bytes that a fusion reads of the parameters that it (or a fusion within it) only slices, by parameter number."""
    small = {}
    for parameter in (one for one in inside if one.opcode == "parameter"):
        users = [one for one in inside if parameter.name in one.operands]
        parts = [_part_read(one, parameter.name, computations) for one in users]
        read = [part for part in parts if part is not None]
        if users and len(read) == len(parts):
            small[int(parameter.operands[0])] = sum(read)
    return small


def _part_read(user: _Instruction, name: str, computations: Mapping[str, tuple[_Instruction, ...]]) -> float | None:
    """Bytes that an instruction reads of an operand that it slices; None if it reads the whole operand."""
    if user.opcode == "fusion" and user.operands.count(name) == 1:
        inside = next((computations[called] for called in _called(user) if called in computations), ())
        return _sliced(inside, computations).get(user.operands.index(name))
    if user.opcode not in ("dynamic-slice", "gather", "dynamic-update-slice") or user.operands[0] != name:
        return None
    return 0.0 if user.opcode == "dynamic-update-slice" else _size(user.result)


def _size(shape: str) -> float:
    """Bytes of the arrays of a shape."""
    bits = 0
    for kind, dims in _ARRAY.findall(shape):
        each = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
        bits += each * math.prod(int(size) for size in dims.split(",") if size)
    return bits / 8


def _sent(kind: str, instruction: _Instruction) -> float:
    """Bytes that a device sends under ring algorithms."""
    shape = instruction.result
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):  # of operands and results
        shape = "".join(f"{k}[{d}]" for k, d in _ARRAY.findall(shape)[1:2])
    size, group = _size(shape), _group(instruction.attributes)
    if kind == "collective-permute":
        return size
    factor = {"all-reduce": 2.0, "reduce-scatter": float(group)}.get(kind, 1.0)
    return factor * size * (group - 1) / group


def _group(attributes: str) -> int:
    """Number of devices in an exchange."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*? \{('.*?)\}", attributes):
        sizes = dict(re.findall(r"('[^']*')=(\d+)", named[1]))
        axes = re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(tiled[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed else 1
