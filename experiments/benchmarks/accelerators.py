"""Programs compiled for TPU slices that need not be present: their needs per chip, and the time at its peak rates.

    python -m experiments.benchmarks.accelerators --out runs/accelerators.json --page docs/accelerators.md

Needs libtpu (extra `tpu`); a minute of a core for each program. Nothing is run: the figures are the compiler's and the
published rates'. Programs that are in the file already are not compiled again; the page's tables are written anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import tyro
from jax.sharding import Mesh

from semid.artifacts import read_json, replacing, try_file, write_json
from semid.cli.compile import size
from semid.generators import GeneratorConfig, ObjectiveConfig, ProgramSizes, search_program, training_program
from semid.joint import joint_program
from semid.training import (
    DoesNotFit,
    MeshConfig,
    TrainingConfig,
    TrainState,
    chip_of,
    compile_for,
    make_mesh,
    size_on_a_device,
    topology_devices,
)
from seq_models import DenseConfig, Precision, Remat, RQTransformerConfig, TransformerConfig, attention

# Tables of the page, between two lines that name them.
TABLES = ("table", "lengths")


@dataclass(frozen=True)
class Case:
    """A program, the sizes it is traced from, and the slice it is compiled for."""

    what: str
    topology: str
    mesh: MeshConfig
    config: GeneratorConfig
    sizes: ProgramSizes = ProgramSizes()
    trace: Callable[[Case, Mesh], tuple[jax.stages.Traced, TrainState | None]] = lambda case, mesh: training_program(
        case.config, case.sizes, mesh
    )
    """The program, and the state that it takes if it has one."""
    table: str = "table"
    """Table of the page to add it to."""
    plain: bool = False
    """Attention computes all scores at once, for rows of any length."""

    @property
    def name(self) -> str:
        """Unique name."""
        return f"{self.what}, {self.topology}, fsdp {self.mesh.fsdp} x tensor {self.mesh.tensor}"


def decoder(dim: int, layers: int, hidden: int, remat: Remat, rows: int) -> GeneratorConfig:
    """An RQ-Transformer over rows of 64 items in bfloat16, with this batch size."""
    backbone = TransformerConfig(
        dim, layers=layers, heads=dim // 64, hidden=hidden, dropout=0.1, dtype=Precision.BFLOAT16, remat=remat
    )
    training = TrainingConfig(batch_size=rows)
    return GeneratorConfig(model=RQTransformerConfig(backbone), max_history=64, row_length=64, training=training)


def _search(case: Case, mesh: Mesh) -> tuple[jax.stages.Traced, None]:
    return search_program(case.config, case.sizes, mesh), None


def _joint(case: Case, mesh: Mesh) -> tuple[jax.stages.Traced, TrainState]:
    return joint_program(case.config, case.sizes, mesh)


def _cases() -> list[Case]:
    default = replace(GeneratorConfig(), model=RQTransformerConfig().with_dropout(0.1))
    medium, large = decoder(768, 12, 2048, Remat.DOTS, 1024), decoder(2048, 20, 5504, Remat.FULL, 1024)
    more_medium, more_large = (replace(c, training=TrainingConfig(batch_size=1 << 14)) for c in (medium, large))
    codes = ProgramSizes(items=1_000_000, level_sizes=(1024, 1024, 1024))
    dense = GeneratorConfig(
        model=DenseConfig(TransformerConfig(64, dropout=0.3, dtype=Precision.BFLOAT16)),
        objective=ObjectiveConfig(repeats=False),
        training=TrainingConfig(batch_size=256),
    )
    end_to_end = decoder(256, 4, 1024, Remat.NOTHING, 4096)
    content = ProgramSizes(items=100_000_000, level_sizes=(1024, 1024, 1024, 256), num_features=768, item_dim=256)
    many = ProgramSizes(items=20_000_000, level_sizes=(512, 512, 512))
    return [
        Case("default generator, step", "v5e:4x4", MeshConfig(), default),
        Case("decoder of 100M, step", "v5e:4x4", MeshConfig(fsdp=4), medium, codes),
        Case("beam search of 50, 20M items", "v5e:4x4", MeshConfig(), default, many, trace=_search),
        Case("SASRec of 10M items, step", "v5e:4x4", MeshConfig(fsdp=16), dense, ProgramSizes(items=10_000_000)),
        Case("decoder of 1B, step", "v5e:4x4", MeshConfig(fsdp=4, tensor=4), large, codes),
        Case("default generator, search", "v5e:4x4", MeshConfig(), default, trace=_search),
        Case("joint step, 100M items", "v5e:16x16", MeshConfig(fsdp=4), end_to_end, content, trace=_joint),
        Case("decoder of 1B, step", "v5p:2x2x2", MeshConfig(fsdp=8), large, codes),
        Case("decoder of 1B, step", "v6e:16x16", MeshConfig(fsdp=16), more_large, codes),
        Case("decoder of 1B, step", "v5p:4x8x8", MeshConfig(fsdp=8), more_large, codes),
        Case("decoder of 100M, step", "v5e:16x16", MeshConfig(fsdp=4), more_medium, codes),
        Case("decoder of 1B, step", "v5e:16x16", MeshConfig(fsdp=16, tensor=4), more_large, codes),
        Case("decoder of 100M, step", "v6e:4x4", MeshConfig(fsdp=4), medium, codes),
    ]


def _lengths() -> list[Case]:
    """Steps with one row per device, of increasing length."""
    cases = []
    for length in (200, 2_000, 20_000):
        for topology, rows in (("v5e:2x2", 4), ("cpu", 1)):
            short = decoder(256, 4, 1024, Remat.NOTHING, rows)
            long = replace(short, max_history=length, row_length=length)
            for plain in (False, True)[: 2 if length > 512 else 1]:
                what = f"{length:,} items, {'all scores' if plain else 'as chosen'}"
                cases.append(Case(what, topology, MeshConfig(), long, table="lengths", plain=plain))
    return cases


def _needs(case: Case) -> dict[str, Any]:
    chip, mesh = chip_of(case.topology), make_mesh(topology_devices(case.topology), case.mesh)
    row: dict[str, Any] = {}
    never = mock.patch.object(attention, "_QUERIES", 1 << 30)
    with never if case.plain else contextlib.nullcontext():
        traced, state = case.trace(case, mesh)
    if state is not None:
        row["state"] = size(size_on_a_device(state))
    try:
        found = compile_for(traced, devices=mesh.size, chip=chip)
    except DoesNotFit as error:
        return row | {"temporaries" if case.table == "lengths" else "memory": f"does not fit: {error}"}
    if case.table == "lengths":
        measured = {"temporaries": size(found.temporaries), "traffic": size(found.traffic)}
        return row | measured | {"compiled in, s": round(found.seconds)}
    sent = sum(exchange.sent for exchange in found.exchanges)
    exchanges = ", ".join(f"{exchange.number} {exchange.kind}" for exchange in found.exchanges)
    return row | {
        "memory": size(found.memory),
        "GFLOP (by the compiler)": f"{found.products / 1e9:.4g} ({found.counted / 1e9:.4g})",
        "traffic": size(found.traffic),
        "exchanges": f"{exchanges or 'none'}; {size(sent)}",
        **{f"{name}, ms": f"{seconds * 1e3:.3g}" for name, seconds in found.times.items()},
        "bound": found.bound,
        "peak at best": f"{found.peak_share or 0.0:.0%}",
        "compiled in, s": round(found.seconds),
    }


def main(out: Path = Path("runs/accelerators.json"), page: Path | None = None, only: tuple[str, ...] = ()) -> None:
    """Compile programs that are not in the file yet, and update the page's tables.

    Args:
        out: File of the figures.
        page: Page whose tables are updated.
        only: Prefixes of the names of programs to compile; none given: all.
    """
    out = try_file(out)
    wanted: Callable[[str], bool] = lambda name: not only or name.startswith(only)  # noqa: E731
    for case in (cases := [*_cases(), *_lengths()]):
        figures = read_json(out) if out.exists() else {}
        if wanted(case.name) and case.name not in figures:
            print(case.name, flush=True)
            row = _needs(case)
            print(row, flush=True)
            write_json(out, (read_json(out) if out.exists() else {}) | {case.name: row})
    if page is not None:
        figures = read_json(out)
        for name in TABLES:
            begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
            before, _, rest = page.read_text(encoding="utf-8").partition(begin)
            shown = _table({case.name: figures[case.name] for case in cases if _is_in(case, name, figures)})
            with replacing(page) as temporary:
                temporary.write_text(f"{before}{begin}\n{shown}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def _is_in(case: Case, table: str, figures: dict[str, Any]) -> bool:
    return case.table == table and case.name in figures


def _table(figures: dict[str, dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    lines = ["| program, slice, mesh | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for name, row in figures.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
