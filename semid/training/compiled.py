"""Programs compiled ahead of time: what a step needs of a chip, and the time that the chip's published rates allow."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from semid.errors import SemidError
from semid.training.programs import Program
from semid.training.topologies import Chip


@dataclass(frozen=True)
class Exchange:
    """All collectives of a kind in a step: their number, and the bytes that a device sends for them."""

    kind: str
    number: int
    sent: float
    largest: float


@dataclass(frozen=True)
class Compiled:
    """Needs of a compiled program in a step, on each of its devices."""

    devices: int
    chip: Chip | None
    arguments: float
    """Bytes of the program's inputs: state, tables, batch."""
    temporaries: float
    """Bytes of what it holds while it runs, results that are no input's included."""
    products: float
    """FLOPs of matrix products, those of the whole step divided among the devices."""
    counted: float
    """FLOPs by the compiler's count, which takes a loop for one turn; more than `products`: work done twice."""
    traffic: float
    """Bytes read and written in memory."""
    exchanges: tuple[Exchange, ...]
    seconds: float
    """Taken to compile it."""

    @property
    def memory(self) -> float:
        """Bytes that it needs."""
        return self.arguments + self.temporaries

    @property
    def times(self) -> dict[str, float]:
        """Seconds that matrix products, memory and the links between chips need at least, at the chip's rates."""
        if self.chip is None:
            return {}
        sent = sum(exchange.sent for exchange in self.exchanges)
        flops = max(self.products, self.counted)
        return {
            "compute": flops / self.chip.flops,
            "memory": self.traffic / self.chip.bandwidth,
            "interconnect": sent / self.chip.links,
        }

    @property
    def bound(self) -> str | None:
        """The resource that needs the most time."""
        return max(self.times, key=lambda name: self.times[name]) if self.times else None

    @property
    def peak_share(self) -> float | None:
        """Share of the chip's matrix peak that a step reaches at best: one bound hides the others, nothing waits."""
        slowest = max(self.times.values(), default=0.0)
        return self.products / self.chip.flops / slowest if self.chip and slowest else None


def compile_for(traced: jax.stages.Traced, *, devices: int, chip: Chip | None = None) -> Compiled:
    """Compile a traced program for the devices that its arguments lie on, and read what it needs.

    Raises SemidError where it does not fit into the chip's memory, by the compiler's word or by its sums.
    """
    start = time.monotonic()
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_need(str(error)), chip) from None
    seconds = time.monotonic() - start
    needs, parsed = program.memory_analysis(), Program.parse(program.as_text())
    found = Compiled(
        devices=devices,
        chip=chip,
        arguments=needs.argument_size_in_bytes,
        temporaries=needs.temp_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes,
        products=products(traced.jaxpr) / devices,
        counted=float((program.cost_analysis() or {}).get("flops", 0.0)),
        traffic=parsed.traffic,
        exchanges=_exchanges(parsed),
        seconds=seconds,
    )
    if chip is not None and found.memory > chip.memory:
        raise DoesNotFit(found.memory, chip)
    return found


class DoesNotFit(SemidError):
    """A program that needs more memory than a chip has."""

    def __init__(self, need: float | None, chip: Chip | None) -> None:
        has = "" if chip is None else f" of the {chip.memory / 2**30:.1f} GiB of a {chip.name}"
        super().__init__(f"it needs {'more than all' if need is None else f'{need / 2**30:.1f} GiB'}{has} a device")


def _need(message: str) -> float | None:
    """Bytes, as the compiler says what it lacks."""
    found = re.search(r"Used ([\d.]+)([KMG]) of", message)
    return float(found[1]) * {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}[found[2]] if found else None


def _exchanges(program: Program) -> tuple[Exchange, ...]:
    by_kind = defaultdict(list)
    for one in program.collectives:
        by_kind[one.kind].append(one)
    return tuple(
        Exchange(
            kind, sum(one.times for one in of), sum(one.sent * one.times for one in of), max(one.sent for one in of)
        )
        for kind, of in sorted(by_kind.items())
    )


def products(jaxpr: ClosedJaxpr) -> float:
    """FLOPs of all matrix products of a program, loops counted as often as they run, and of branches (those of other
    platforms, say) the one with the most."""
    return _work(jaxpr.jaxpr)


def _work(jaxpr: Jaxpr) -> float:
    return sum(_flops(equation) + _inside(equation) for equation in jaxpr.eqns)


def _inside(equation: Any) -> float:
    """FLOPs of the programs that an equation runs, on all devices."""
    name, parameters = equation.primitive.name, equation.params
    turns = parameters.get("length", 1) if name == "scan" else 1
    shards = math.prod(parameters["mesh"].shape.values()) if name == "shard_map" else 1
    bodies = [
        _work(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
        for inner in jax.tree.leaves(tuple(parameters.values()), is_leaf=_is_program)
        if _is_program(inner)
    ]
    return turns * shards * (max(bodies, default=0.0) if name == "cond" else sum(bodies))


def _is_program(value: Any) -> bool:
    return isinstance(value, (ClosedJaxpr, Jaxpr))


def _flops(equation: Any) -> float:
    if equation.primitive.name != "dot_general":
        return 0.0
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def size_on_a_device(tree: Any) -> int:
    """Bytes of the arrays of a tree of shapes with layouts, on one of their devices."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
