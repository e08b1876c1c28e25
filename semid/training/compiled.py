"""Programs compiled ahead of time: the memory and operations of a step, and its time at a chip's published rates."""

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
    """Resources that a compiled program needs per step on each device."""

    devices: int
    chip: Chip | None
    arguments: float
    """Bytes of the program's inputs: state, tables, batch."""
    temporaries: float
    """Bytes of temporary arrays, and of results that do not reuse the memory of inputs."""
    products: float
    """FLOPs of matrix products, those of the whole step divided among the devices."""
    counted: float
    """FLOPs by the compiler's count, which counts a loop body once; more than `products` means recomputation."""
    traffic: float
    """Bytes read and written in memory."""
    exchanges: tuple[Exchange, ...]
    seconds: float
    """Compilation time."""

    @property
    def memory(self) -> float:
        """Total bytes."""
        return self.arguments + self.temporaries

    @property
    def times(self) -> dict[str, float]:
        """Minimum seconds for matrix products, memory and links between chips, at the chip's rates."""
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
        """Largest possible share of the chip's matrix peak, if all work overlaps perfectly."""
        slowest = max(self.times.values(), default=0.0)
        return self.products / self.chip.flops / slowest if self.chip and slowest else None


def compile_for(traced: jax.stages.Traced, *, devices: int, chip: Chip | None = None) -> Compiled:
    """Compile a traced program for the devices of its arguments, and read the resources it needs.

    Raises SemidError if it does not fit into the chip's memory, by the compiler's error or by its memory analysis.
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
    """Needed bytes in a compiler's error message, if it states them."""
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
    """FLOPs of all matrix products of a program: loops count as often as they run, and of branches (say, for other
    platforms) only the largest."""
    return _work(jaxpr.jaxpr)


def _work(jaxpr: Jaxpr) -> float:
    return sum(_flops(equation) + _inside(equation) for equation in jaxpr.eqns)


def _inside(equation: Any) -> float:
    """FLOPs of the programs that an equation calls, on all devices."""
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
    """Bytes per device of a tree of array shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
