"""The command `semid compile`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import tyro
from jax.sharding import Mesh

from semid.cli.console import console
from semid.cli.train import Generator
from semid.errors import SemidError
from semid.generators import GeneratorConfig, ProgramSizes, search_program, training_program
from semid.joint import joint_program
from semid.training import (
    Compiled,
    DoesNotFit,
    MeshConfig,
    TrainState,
    chip_of,
    compile_for,
    make_mesh,
    size_on_a_device,
    topology_devices,
)


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True)
class Compile:
    """Compile a training step and a search for accelerators that need not be present, from sizes alone, and print the
    memory and operations that a chip needs and the time at its published rates.

    TPUs need libtpu (extra `tpu`). If a program does not fit, one line names an option that would help.
    """

    topology: str = "cpu"
    """Devices to compile for: a slice such as v5e:4x4, v5p:2x2x2 or v6e:16x16; cpu or cuda: those of this machine."""
    config: tyro.conf.OmitArgPrefixes[Generator] = Generator()
    sizes: ProgramSizes = ProgramSizes()
    end_to_end: bool = False
    """Compile the joint step of end-to-end training (`semid train-end-to-end`) instead of the generator's: an encoder
    from --num-features numbers per item to vectors of --item-dim, a tokenizer, a generator, and the memory bank of all
    items' vectors. The last of --level-sizes is the tie-break."""
    mesh: MeshConfig = MeshConfig()
    """Division of the work among devices."""

    def run(self) -> None:
        mesh, chip = make_mesh(topology_devices(self.topology), self.mesh), chip_of(self.topology)
        config = GeneratorConfig(**vars(self.config))
        config = replace(config, model=config.model.with_dropout(0.1))
        program, name = (joint_program, "joint step") if self.end_to_end else (training_program, "training step")
        traced, state = program(config, self.sizes, mesh)
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
        console.print(f"{self.topology}: {mesh.size} devices, {dict(mesh.shape)}; {parameters:,} parameters")
        step = self._compiled(lambda: compile_for(traced, devices=mesh.size, chip=chip), state, mesh, name)
        print_needs(name, step, state=size_on_a_device(state))
        sizes = replace(self.sizes, num_features=self.sizes.item_dim) if self.end_to_end else self.sizes
        search = search_program(config, sizes, mesh)
        found = self._compiled(lambda: compile_for(search, devices=mesh.size, chip=chip), None, mesh, "search")
        print_needs("search", found)

    def _compiled(self, run: Callable[[], Compiled], state: TrainState | None, mesh: Mesh, what: str) -> Compiled:
        try:
            return run()
        except DoesNotFit as error:
            raise SemidError(f"the {what} does not fit: {error}; {self._remedy(state, mesh)}") from None

    def _remedy(self, state: TrainState | None, mesh: Mesh) -> str:
        """The option to try: more devices if most of the memory is the state, else smaller parts of a batch."""
        chip, accumulate = chip_of(self.topology), self.config.training.accumulate
        if state is None:
            return f"try --users {max(self.sizes.users // 4, 1)}"
        held, limit = size_on_a_device(state), math.inf if chip is None else chip.memory / 3
        if held > limit:
            fsdp = mesh.shape["fsdp"] * 2 ** math.ceil(math.log2(held / limit))
            if mesh.size % (fsdp * mesh.shape["tensor"]) == 0:
                return f"try --fsdp {fsdp}"
            return "its state alone fills the devices: try a larger --topology with --fsdp"
        return f"try --accumulate {accumulate * 2}, or --remat full"


def print_needs(name: str, needs: Compiled, *, state: int | None = None) -> None:
    """Print a program's needs as a table of two columns."""
    rows = table(needs, state=state)
    width = max(map(len, rows))
    console.print(f"\n{name}, compiled in {needs.seconds:.1f} s")
    for label, value in rows.items():
        console.print(f"  {label:<{width}}  {value}")


def table(needs: Compiled, *, state: int | None = None) -> dict[str, str]:
    """What a program needs per device and step, as texts by name."""
    of = "" if needs.chip is None else f" of {needs.chip.memory / 2**30:.1f} GiB"
    rows = {} if state is None else {"state": size(state)}
    rows |= {
        "arguments": size(needs.arguments),
        "temporaries": size(needs.temporaries),
        "memory": f"{size(needs.memory)}{of}",
        "matrix products": f"{needs.products / 1e9:.4g} GFLOP ({needs.counted / 1e9:.4g} GFLOP of all by the compiler)",
        "memory traffic": size(needs.traffic),
    }
    for one in needs.exchanges:
        rows[one.kind] = f"{one.number} a step, {size(one.sent)} sent, the largest {size(one.largest)}"
    for name, seconds in needs.times.items():
        rows[f"time, {name}"] = f"{seconds * 1e3:.4g} ms"
    if needs.bound is not None and needs.peak_share is not None:
        rows["bound"] = needs.bound
        rows["matrix peak at best"] = f"{needs.peak_share:.1%}"
    return rows


def size(count: float) -> str:
    """A number of bytes in a suitable unit."""
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if count >= _UNITS[unit]), "B")
    return f"{count / _UNITS[unit]:.4g} {unit}"


_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
